"""A cascade from a small model to a larger one: the larger is asked only what the small one was not sure of.

Why one would want it: a specialist that runs anywhere can answer much of what comes in, and a larger model is kept for
the rest. What decides is no guess about the question but the confidence in an answer that is there, read from the KV
cache that wrote it.

The tiny thinker (0.9 M parameters) knows the largest of some numbers and nothing of the world; SmolLM2 (135 M) is asked
where its confidence is below one half. It prints each question with the model that answered, the small one's
confidence and the answer; then how many questions and tokens each model had. A confidence speaks of answers like those
it was trained on: the small one's answers at once to questions of the world are told from good ones, what it writes
after *thinking* about them often is not. So it does not think here; measure on questions like yours.

    python examples/cascade.py
"""

import argparse
import random
import sys
from pathlib import Path

from langchain_core.runnables import RunnableLambda

from kvroute import Cascade, DifficultyHead, Router, TransformersEngine

THINKER = Path(__file__).resolve().parent / "tiny_thinker"
sys.path.insert(0, str(THINKER))
from questions import make_question  # noqa: E402

GENERAL = ["What is the capital of France?", "Why is the sky blue?", "Name three colours.", "Who wrote Hamlet?"]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--questions", type=int, default=6, help="of the kind that the small model knows")
    parser.add_argument("--seed", type=int, default=0)
    given = parser.parse_args()
    small = TransformersEngine.from_pretrained(THINKER / "model")
    confidence = DifficultyHead.load(THINKER / "confidence", small.info)
    steps = [
        ("small", Router(small, "fast", confidence=confidence), "fast"),
        ("larger", TransformersEngine.from_pretrained("smollm2")),
    ]
    cascade = Cascade(steps, confidence=0.5)
    chain = RunnableLambda(lambda question: cascade.generate([{"role": "user", "content": question}], max_tokens=48))

    rng = random.Random(given.seed)
    asked = [make_question(rng, "top").question for _ in range(given.questions)] + GENERAL
    answered, tokens = {"small": 0, "larger": 0}, {"small": 0, "larger": 0}
    for question in rng.sample(asked, len(asked)):
        found = chain.invoke(question)
        answered[found.step] += 1
        for attempt in found.attempts:
            tokens[attempt.name] += attempt.routed.usage.generated
        doubt, said = found.attempts[0].confidence, " ".join(found.answer.split())
        print(f"{question[:32]:32} {found.step:6} {doubt:.2f} {said[:60]}")
    for name, count in answered.items():
        print(f"{name}: answered {count} of {len(asked)}, wrote {tokens[name]} tokens")


if __name__ == "__main__":
    main()
