"""Use a :class:`kvroute.VLLMEngine` as a user's script does, and save what it gave.

python -m tests.serving.run_vllm_engine MODEL POLICIES OUT.json
"""

from __future__ import annotations

import asyncio
import json
import sys
from typing import Any

TEXTS = ["run a=6 b=5;1b*5;2b=8;3a+9", "right a=5 b=3;1b=7", "1+2=?"]
CHATS = [[{"role": "user", "content": text}] for text in TEXTS]
FEATURES = ["prompt:best", "answer:paper-mteb", "kv-coe", "length"]


def main(model: str, policies: str, out: str) -> None:
    """Run it."""
    from kvroute import CancelToken, KVEmbedder, Router, SelfEvaluator, VLLMEngine
    from kvroute.errors import KVRouteError

    found: dict[str, Any] = {}
    with VLLMEngine(
        model, policies=policies, dtype="float32", max_model_len=256, enforce_eager=True, max_num_seqs=8
    ) as engine:
        found["fingerprint"] = engine.info.fingerprint
        answers = engine.generate(CHATS, features=FEATURES, max_tokens=12)
        found["answers"] = [
            {
                "text": a.text,
                "tokens": a.token_ids,
                "prompt": a.prompt_token_ids,
                "finish": a.finish_reason,
                "features": {n: v.tolist() for n, v in a.features.items()},
                "scores": {n: s.value for n, s in a.scores.items()},
                "errors": a.feature_errors,
            }
            for a in answers
        ]
        pieces = list(engine.stream(CHATS[0], features="kv-coe", max_tokens=12))
        found["streamed"] = "".join(p.text for p in pieces)
        last = pieces[-1].generation
        found["streamed_scores"] = {} if last is None else {n: s.value for n, s in last.scores.items()}
        stop = answers[0].text[4:6]
        stopped = engine.generate(CHATS[0], features="kv-coe", max_tokens=12, stop=stop)
        found["stopped"] = [stop, stopped.text, stopped.finish_reason, stopped.feature_errors]
        cancel = CancelToken()
        for piece in engine.stream(CHATS[0], max_tokens=200, cancel=cancel):
            cancel.cancel()
            found["cancelled"] = piece.generation and piece.generation.finish_reason
        later: Any = asyncio.run(_together(engine))
        found["together"] = [a.text for a in later]
        found["vectors"] = KVEmbedder(engine, "best").encode(TEXTS).tolist()
        scored = SelfEvaluator(engine, scores=["kv-coe", "length", "p-true"]).score(CHATS[0], "68")
        found["scored"] = {n: [s.value, s.reason] for n, s in scored.scores.items()}
        routed = Router(engine, "policy").generate(CHATS, max_tokens=60)
        found["routed"] = [[r.text, r.decision.mode, r.usage.generated] for r in routed]
        found["langchain"] = _langchain(engine)
        found["llama_index"] = _llama_index(engine)
        found["refused"] = []
        for bad in (
            lambda: engine.generate("a" * 900, max_tokens=8),
            lambda: engine.read([[1, 2]], [1], want={"logits"}),
        ):
            try:
                bad()
            except KVRouteError as error:
                found["refused"].append(type(error).__name__)
    with open(out, "w") as file:
        json.dump(found, file)


def _langchain(engine: Any) -> dict[str, Any]:
    from langchain_kvroute import ChatKVRoute, KVRouteEmbeddings, kvroute_metadata

    chat = ChatKVRoute(engine=engine, policy="policy", max_tokens=60)
    answers = chat.batch(TEXTS)
    streamed = list(chat.stream(TEXTS[0]))
    later = asyncio.run(_invoked(chat))
    embeddings = KVRouteEmbeddings(engine=engine, spec="best")
    about = [kvroute_metadata(answer) or {} for answer in answers]
    return {
        "answers": [answer.text for answer in answers],
        "modes": [a.get("mode") for a in about],
        "faults": [a.get("faults") for a in about],
        "streamed": "".join(piece.text for piece in streamed),
        "later": later,
        "usage": [dict(answer.usage_metadata or {}).get("output_tokens") for answer in answers],
        "documents": embeddings.embed_documents(TEXTS),
        "query": embeddings.embed_query(TEXTS[0]),
    }


async def _invoked(chat: Any) -> str:
    return str((await chat.ainvoke(TEXTS[0])).text)


def _llama_index(engine: Any) -> dict[str, Any]:
    from llama_index.embeddings.kvroute import KVRouteEmbedding

    embedding = KVRouteEmbedding(engine=engine, spec="best")
    return {
        "texts": embedding.get_text_embedding_batch(TEXTS),
        "query": embedding.get_query_embedding(TEXTS[0]),
    }


async def _together(engine: Any) -> list[Any]:
    return list(await asyncio.gather(*(engine.agenerate(chat, max_tokens=12) for chat in CHATS)))


if __name__ == "__main__":
    main(*sys.argv[1:])
