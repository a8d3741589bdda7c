"""An agent that doubts its answers: those of low confidence are thought about before the user sees them.

Why one would want it: an agent that always thinks is slow and dear, one that never thinks is often wrong and does not
say so. Here the model's own KV cache says how likely each answer is right, at no further pass; only where that is
below one half the model is asked again, and thinks.

It prints each question with the confidence in its first answer, whether it was thought about, the answer that was
kept and whether that is right; then right answers and tokens, beside those of the same agent without the check.

    python examples/agent_self_check.py
"""

import argparse
import random
import sys
from pathlib import Path

from langchain.agents import create_agent
from langchain_core.tools import tool

from kvroute import TransformersEngine
from langchain_kvroute import ChatKVRoute, SelfEvaluationCallbackHandler, SelfEvaluationMiddleware, self_evaluation

THINKER = Path(__file__).resolve().parent / "tiny_thinker"
sys.path.insert(0, str(THINKER))
from questions import make_question, make_tool_chat  # noqa: E402


@tool
def calculator(expression: str) -> str:
    """Multiplies and adds whole numbers."""
    sign = "+" if "+" in expression else "*"
    left, right = map(int, expression.split(sign))
    return str(left + right if sign == "+" else left * right)


def questions(count: int, seed: int) -> list[tuple[str, str]]:
    """Questions and answers; every third one needs the calculator."""
    rng, found = random.Random(seed), []
    for place in range(count):
        made, (chat, result) = make_question(rng), make_tool_chat(rng)
        found.append((chat[0]["content"], result) if place % 3 == 2 else (made.question, made.answer))
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--questions", type=int, default=18)
    parser.add_argument("--seed", type=int, default=0)
    given = parser.parse_args()
    engine = TransformersEngine.from_pretrained(THINKER / "model")
    model = ChatKVRoute(engine=engine, mode="fast", confidence=THINKER / "confidence", max_tokens=192)
    doubt = SelfEvaluationMiddleware(threshold=0.5, action="retry")
    agents = {
        "without the check": create_agent(model, tools=[calculator]),
        "with the check": create_agent(model, tools=[calculator], middleware=[doubt]),
    }
    watches = {name: SelfEvaluationCallbackHandler() for name in agents}
    right = dict.fromkeys(agents, 0)
    for question, expected in questions(given.questions, given.seed):
        for name, agent in agents.items():
            found = agent.invoke({"messages": question}, {"callbacks": [watches[name]]})
            answer = found["messages"][-1]
            good = str(answer.text).endswith(f" {expected}.")
            right[name] += good
        first, *more = self_evaluation(answer)["attempts"]
        how = f"{first['confidence']:.2f} {'thought about' if more else 'kept':13}"
        print(f"{question[:34]:34} {how} {answer.text[-16:]:>16} {'right' if good else 'wrong'}")
    for name, watch in watches.items():
        tokens = sum(record.tokens["answer"] for record in watch.records)
        print(f"{name}: {right[name]} of {given.questions} right, {tokens} tokens in {len(watch.records)} model calls")


if __name__ == "__main__":
    main()
