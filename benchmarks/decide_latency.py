"""From the prompt's pooled vector to the decision: head, probability, policy, counters. One request at a time.

The prefill and the pooling are not in it (prefill_overhead.py has them); ``pool_ms`` beside it is the reading of the
head's vector from a cache of 256 tokens.
"""

from __future__ import annotations

import random
import time

import numpy as np
import torch

from _harness import Figure, figure_table, finish, judge, parse_arguments
from _heads import costs_head
from _texts import text_of
from kvroute import Policy, Router, TransformersEngine, pool
from kvroute.route_steering import Request

KINDS = ("mlp", "ridge", "logistic", "trees")


def percentiles(milliseconds: list[float], name: str, seed: int) -> dict[str, Figure]:
    """p50 and p99 with bootstrap intervals."""
    values = np.array(milliseconds)
    rng = np.random.default_rng(seed)
    drawn = values[rng.integers(0, len(values), (400, len(values)))]
    figures = {}
    for q, must in ((50, "<= 1.0"), (99, None)):
        low, high = np.quantile(np.percentile(drawn, q, axis=1), [0.025, 0.975])
        value = float(np.percentile(values, q))
        figures[f"{name}_p{q}_ms"] = Figure(
            value, float(low), float(high), must, judge(float(low), float(high), must), len(values)
        )
    return figures


def main() -> None:
    arguments = parse_arguments(__doc__)
    engine = TransformersEngine.from_pretrained(arguments.model, dtype="float32")
    rng = random.Random(arguments.seed)
    chat = [{"role": "user", "content": text_of(256, rng)}]
    count = 400 if arguments.quick else 4000
    figures: dict[str, Figure] = {}
    for kind in KINDS:
        head = costs_head(engine, arguments.seed, kind=kind)
        router = Router(engine, Policy(kind="one-step"), head=head)
        layout = router.thinking.layout(engine, chat)
        vector = engine.pool([layout.base], [head.spec], progress=False)[0]
        taken = []
        for at in range(count + 50):
            began = time.perf_counter()
            router.choose([Request(layout)], vector, explain=False, began=began)
            if at >= 50:
                taken.append(1000 * (time.perf_counter() - began))
        figures |= percentiles(taken, f"decide_{kind}", arguments.seed)
    ids = layout.base[-256:]
    with torch.inference_mode():
        _, view = next(iter(engine.prefill([ids])))
        taken = []
        for _ in range(count // 4):
            began = time.perf_counter()
            pool(view, head.spec, num_layers=engine.info.num_layers)
            taken.append(1000 * (time.perf_counter() - began))
    figures |= {
        k: Figure(f.value, f.low, f.high, None, None, f.rounds) for k, f in percentiles(taken, "pool", 0).items()
    }
    print(figure_table(figures))
    finish(
        arguments, name="decide_latency", figures=figures, n={"decisions": count}, baseline="none: a time, not a ratio"
    )


if __name__ == "__main__":
    main()
