"""Tokens computed by switching in flight / by switching after the fact, on the tiny thinker.

Answers of a two-step router that switched are compared with what a caller does who can't continue the cache: the first
request is stopped where the switch was, then prompt, text so far and phrase are prefilled again and the answer is
written. Both sides are run; they must write the same tokens.
"""

from __future__ import annotations

import numpy as np

import _thinker
from _harness import Figure, figure_table, finish
from kvroute import Policy, Router, SamplingOptions, TransformersEngine
from kvroute.generation import TokenIds
from kvroute.heads import DifficultyHead
from kvroute.heads.search import SearchOptions
from kvroute.heads.training import train_head
from kvroute.label_rows import Part
from kvroute.routing_intervals import Resamples


def train(thinker: TransformersEngine, count: int, seed: int) -> DifficultyHead:
    """A head for prompts and mid-thought from labelled questions."""
    shares: dict[Part, float] = {"train": 0.7, "validation": 0.3, "calibration": 0.0, "test": 0.0}
    asked = _thinker.questions(count, seed + 2)
    rows, meta = _thinker.labelled(thinker, asked, shares, checkpoints=5, parts=("train", "validation"))
    return train_head(thinker, rows, meta, search=SearchOptions.quick(), kinds=("ridge",), seed=seed, progress=False)[0]


def main() -> None:
    arguments = _thinker.argument_parser(__doc__).parse_args()
    thinker = _thinker.engine(arguments.thinker)
    head = train(thinker, 500 if arguments.quick else 2000, arguments.seed)
    options = SamplingOptions(max_tokens=_thinker.MAX_TOKENS["slow"])
    policy = Policy(kind="two-step", tau=30.0, tau_fast=10.0, tau_slow=60.0, every=5)
    router = Router(thinker, policy, head=head, options=options)
    asked = _thinker.questions(200 if arguments.quick else 1000, arguments.seed + 3)
    routed = router.generate([[{"role": "user", "content": q.question}] for q in asked], progress=False)
    figures: dict[str, Figure] = {}
    shown = {"fast": "closed_thoughts", "slow": "opened_thoughts"}
    for to in ("all", "fast", "slow"):
        switched = [(r, r.decision.switch) for r in routed if r.decision.switch and to in ("all", r.decision.switch.to)]
        if len(switched) < 5:
            print(f"only {len(switched)} answers were switched to {to}: no figure")
            continue
        kept = [s.token + s.forced for _, s in switched]  # tokens written, the phrase included
        written = [r.generation for r, _ in switched]
        again = thinker.generate(
            [TokenIds((*g.prompt_token_ids, *g.token_ids[:k])) for g, k in zip(written, kept, strict=True)],
            options=options,
            progress=False,
        )
        for one, k, two in zip(written, kept, again, strict=True):
            assert two.token_ids == one.token_ids[k:], "both must write the same tokens"
        flight = np.array([g.usage.computed for g in written], float)
        # The first request ran its prompt and all it wrote but the last token.
        stopped = np.array([r.usage.prompt + s.token - 1 for r, s in switched], float)
        after = stopped + np.array([g.usage.prompt + g.usage.generated - 1 for g in again], float)
        drawn = Resamples(len(switched), seed=arguments.seed)
        name = "switch_tokens_ratio" if to == "all" else f"switch_tokens_ratio_{shown[to]}"
        figures[name] = _thinker.figure(
            drawn.estimate(lambda mean, a=flight, b=after: mean(a) / mean(b)),
            "<= 0.6" if to == "all" else None,
            len(switched),
        )
    print(figure_table(figures))
    finish(
        arguments,
        name="switch_tokens",
        figures=figures,
        n={"questions": len(asked), "switched": sum(r.decision.switch is not None for r in routed)},
        baseline="stop, prefill prompt, text and phrase again, write on",
    )


if __name__ == "__main__":
    main()
