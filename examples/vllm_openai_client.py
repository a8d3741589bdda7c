"""A vLLM server with kvroute, asked by the stock ``openai`` client: nothing of kvroute is imported here.

Start a server, and run this against it::

    kvroute serve examples/tiny_thinker/model --policy examples/tiny_thinker --name thinker
    python examples/vllm_openai_client.py http://127.0.0.1:8000

Prints, for two questions, their difficulty, the mode, tokens and answer; scores of an answer, read from the KV cache
that wrote it; an answer as it streams, with the result in its last chunk; and how alike the questions are, embedded.

You would want it where clients are there already and stay as they are, in any language: what is asked of kvroute, and
what it says, travel in ``kv_transfer_params``, a field that vLLM has. One server answers, routes, scores and embeds.
"""

from __future__ import annotations

import sys
from typing import Any

import numpy as np
from openai import OpenAI

QUESTIONS = ["top so:c=41,m=77,d=12 of m", "run a=7 b=7;1b=7;2a*8;3a=3;4b*a;5b+2"]
EASY, HARD = ([{"role": "user", "content": question}] for question in QUESTIONS)


def asking(**wanted: Any) -> dict[str, Any]:
    """The field of a request that kvroute reads."""
    return {"kv_transfer_params": {"kvroute": wanted}}


def told(answer: Any) -> dict[str, Any]:
    """What kvroute says of an answer, or of a stream's last chunk."""
    return answer.model_extra["kv_transfer_params"]["kvroute"]


def main(url: str) -> None:
    with OpenAI(base_url=f"{url}/v1", api_key="-") as client:
        model = client.models.list().data[0].id

        print("As much thinking as each needs:")
        for chat in (EASY, HARD):
            answer = client.chat.completions.create(
                model=model, messages=chat, max_tokens=192, extra_body=asking(policy="policy")
            )
            decision, tokens = told(answer)["decision"], told(answer)["tokens"]
            text = (answer.choices[0].message.content or "").rpartition("</think>")[2].strip()
            print(f"  {decision['difficulty']:5.1f} {decision['final_mode']} {tokens['answer']:3d} tokens: {text}")

        print("Scores of an answer, and a vector of its prompt:")
        answer = client.chat.completions.create(
            model=model,
            messages=EASY,
            max_tokens=64,
            extra_body=asking(features=["kv-coe", "prompt:best"]),
        )
        scores, [vector] = told(answer)["scores"], told(answer)["features"].values()
        for name, score in scores.items():
            print(f"  {name} {score['value']:.3f}")
        print(f"  {len(vector)} numbers, the first {vector[0]:.3f}")

        print("Streaming:")
        stream = client.chat.completions.create(
            model=model, messages=HARD, max_tokens=192, stream=True, extra_body=asking(policy="policy")
        )
        for chunk in stream:
            if chunk.choices:
                print(chunk.choices[0].delta.content or "", end="", flush=True)
            if (chunk.model_extra or {}).get("kv_transfer_params"):
                print(f"\n  difficulty {told(chunk)['decision']['difficulty']:.1f}, in the last chunk")

        entries = client.embeddings.create(model=model, input=QUESTIONS).data
        one, two = (np.array(entry.embedding) for entry in entries)
        cosine = one @ two / np.linalg.norm(one) / np.linalg.norm(two)
        print(f"Embeddings of {len(one)} numbers; cosine of the two questions {cosine:.2f}")


if __name__ == "__main__":
    main(sys.argv[1].rstrip("/") if len(sys.argv) > 1 else "http://127.0.0.1:8000")
