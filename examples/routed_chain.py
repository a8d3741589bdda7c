"""A chain with two branches, and the difficulty of each question picks one: KVRouteRouter in place of RunnableBranch.

Why: a RunnableBranch needs a condition, and "is this hard?" is one that people pay a second model for. Here it is read
from the KV cache of the prompt that the model computes anyway, and the branch goes on from that cache. Easy questions
are answered at once; thoughts are paid for where they help.

Prints, for each question: the branch, the difficulty (0 to 100), the tokens written and how many of the prompt's tokens
came from the decision's cache, the answer and whether it is right. Then the tokens saved beside thinking about all.

    python examples/routed_chain.py --questions 12
"""

from __future__ import annotations

import argparse
import random
import sys
from pathlib import Path

from langchain_core.prompts import ChatPromptTemplate

from kvroute import Router, TransformersEngine
from langchain_kvroute import ChatKVRoute, KVRouteRouter

THINKER = Path(__file__).parent / "tiny_thinker"
sys.path.insert(0, str(THINKER))


def main() -> None:
    from questions import make_question

    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--questions", type=int, default=12)
    parser.add_argument("--seed", type=int, default=0)
    arguments = parser.parse_args()
    rng = random.Random(arguments.seed)
    asked = [make_question(rng) for _ in range(arguments.questions)]

    engine = TransformersEngine.from_pretrained(THINKER / "model")
    prompt = ChatPromptTemplate.from_messages([("user", "{question}")])
    chain = KVRouteRouter(
        router=Router.load(engine, THINKER / "policy.json"),
        fast=prompt | ChatKVRoute(engine=engine, max_tokens=32),
        slow=prompt | ChatKVRoute(engine=engine, max_tokens=192),
    )
    always_slow = chain.with_config(configurable={"kvroute_mode": "slow"})

    totals = {"routed": 0, "slow": 0}
    right = {"routed": 0, "slow": 0}
    print("branch  difficulty  written  prompt  cached  right  answer")
    for question in asked:
        given = {"question": question.question}
        routed, always = chain.invoke(given), always_slow.invoke(given)
        for name, message in (("routed", routed), ("slow", always)):
            totals[name] += message.usage_metadata["output_tokens"]
            right[name] += message.text.rstrip(".").endswith(question.answer)
        says = routed.response_metadata["kvroute"]
        tokens, good = says["tokens"], routed.text.rstrip(".").endswith(question.answer)
        print(
            f"{says['mode']:6}  {says['difficulty']:10.1f}  {tokens['answer']:7}  {tokens['prompt']:6}  "
            f"{tokens['cached']:6}  {'yes' if good else 'no':5}  {routed.text}"
        )
    saved = totals["slow"] - totals["routed"]
    print(
        f"\n{saved} of {totals['slow']} written tokens saved ({saved / totals['slow']:.0%}); "
        f"{right['routed']} of {len(asked)} right, {right['slow']} when always thinking."
    )


if __name__ == "__main__":
    main()
