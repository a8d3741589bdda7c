"""What the confidence in an answer is worth on the way: at the ends of its sentences, as ``kvroute ui`` shows it.

Fresh questions are routed; at each sentence's end the head reads the tokens so far, and the numbers are compared to
whether the finished answer is right.
"""

from __future__ import annotations

import argparse
import random
from pathlib import Path

import numpy as np
from sklearn.metrics import roc_auc_score

from kvroute import DifficultyHead, Router, SamplingOptions, TransformersEngine
from kvroute.checkers import check
from kvroute.ui.watching import Watcher
from questions import make_question

HERE = Path(__file__).parent
PLACES = ("first", "middle", "last but one", "last")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--count", type=int, default=1500, help="questions")
    parser.add_argument("--seed", type=int, default=0)
    arguments = parser.parse_args()
    engine = TransformersEngine.from_pretrained(HERE / "model")
    head = DifficultyHead.load(HERE / "confidence", engine.info)
    watcher = Watcher(engine, Router(engine, HERE / "policy.json", confidence=head), head)
    rng = random.Random(f"sentences {arguments.seed}")
    found: dict[str, list[tuple[float, bool]]] = {place: [] for place in PLACES}
    single: list[tuple[float, bool]] = []
    for _ in range(arguments.count):
        asked = make_question(rng)
        chat = [{"role": "user", "content": asked.question}]
        told: dict[int, float | None] = {}
        right = False
        for event in watcher.watch(chat, SamplingOptions(max_tokens=192)):
            if event["type"] == "sentence":
                told[event["sentence"]] = event["confidence"]
            elif event["type"] == "end":
                right = check(event["answer"], asked.answer, "number").correct
        numbers = [p for _, p in sorted(told.items()) if p is not None]
        if len(numbers) < 2:
            single += [(p, right) for p in numbers]
            continue
        for place, i in zip(PLACES, (0, (len(numbers) - 1) // 2, len(numbers) - 2, len(numbers) - 1), strict=True):
            found[place].append((numbers[i], right))
    print("| sentence | answers | right | AUROC [95 %] | mean confidence |")
    print("| --- | --- | --- | --- | --- |")
    for place, rows in (*found.items(), ("the only one", single)):
        p, y = np.array([r[0] for r in rows]), np.array([r[1] for r in rows])
        low, high = interval(p, y, arguments.seed)
        area = roc_auc_score(y, p)
        print(f"| {place} | {len(rows)} | {y.mean():.3f} | {area:.3f} [{low:.3f}, {high:.3f}] | {p.mean():.3f} |")


def interval(p: np.ndarray, y: np.ndarray, seed: int, resamples: int = 1000) -> tuple[float, float]:
    """Of the AUROC, by resampling the answers."""
    rng = np.random.default_rng(seed)
    areas = []
    for _ in range(resamples):
        rows = rng.integers(len(y), size=len(y))
        if 0 < y[rows].sum() < len(y):
            areas.append(roc_auc_score(y[rows], p[rows]))
    low, high = np.quantile(areas, [0.025, 0.975])
    return float(low), float(high)


if __name__ == "__main__":
    main()
