"""Votes over n samples of the tiny thinker: accuracy by tokens of a plain majority and of confidence-weighted votes.

All sides share the prompts, the mode (slow), temperature and seed. ``majority`` counts all n samples alike and lets all
of them end; ``early`` stops when the vote can't turn; ``weighted`` weighs votes by the confidence of a head that was
trained on other questions' answers (``kvroute train --target correct``). Tokens are those that went through the model.
``again`` is what n separate requests would compute, each with a prefill of its own.
"""

from __future__ import annotations

import numpy as np

import _thinker
from _harness import Figure, figure_table, finish, table
from kvroute import Router, SamplingOptions
from kvroute.checkers import check
from kvroute.heads.search import SearchOptions
from kvroute.heads.training import train_head
from kvroute.label_rows import Part
from kvroute.routing_intervals import Resamples
from kvroute.voting import Voted


def main() -> None:
    parser = _thinker.argument_parser(__doc__)
    parser.add_argument("--samples", type=int, default=7)
    parser.add_argument("--temperature", type=float, default=1.0)
    arguments = parser.parse_args()
    thinker = _thinker.engine(arguments.thinker)
    shares: dict[Part, float] = {"train": 0.7, "validation": 0.3, "calibration": 0.0, "test": 0.0}
    seen = _thinker.questions(400 if arguments.quick else 2000, arguments.seed + 4)
    rows, meta = _thinker.labelled(thinker, seen, shares, checkpoints=None, parts=("train", "validation"))
    head, _ = train_head(
        thinker, rows, meta, target="correct", search=SearchOptions.quick(), seed=arguments.seed, progress=False
    )
    asked = _thinker.questions(40 if arguments.quick else 600, arguments.seed + 5)
    chats = [[{"role": "user", "content": q.question}] for q in asked]
    options = SamplingOptions(
        max_tokens=_thinker.MAX_TOKENS["slow"], temperature=arguments.temperature, seed=arguments.seed
    )
    n = arguments.samples
    plain, judged = Router(thinker, "slow", options=options), Router(thinker, "slow", confidence=head, options=options)
    sides: dict[str, list[Voted]] = {
        "one sample": plain.best_of(chats, 1),
        "majority": plain.best_of(chats, n, weighted=False, early=False),
        "early": plain.best_of(chats, n, weighted=False),
        "weighted": judged.best_of(chats, n, early=False),
        "weighted early": judged.best_of(chats, n),
    }
    right = {
        name: np.array(
            [check(v.winner or "", q.answer, q.answer_type).correct for v, q in zip(votes, asked, strict=True)], float
        )
        for name, votes in sides.items()
    }
    tokens = {name: np.array([v.usage.computed for v in votes], float) for name, votes in sides.items()}
    prompts = np.array([v.samples[0].routed.usage.prompt for v in sides["majority"]], float)
    print(table(
        ["votes", "right", "tokens computed"],
        [[name, f"{right[name].mean():.3f}", f"{tokens[name].mean():.1f}"] for name in sides],
    ))  # fmt: skip
    drawn = Resamples(len(asked), seed=arguments.seed)

    def difference(a: str, b: str) -> Figure:
        return _thinker.figure(drawn.estimate(lambda mean: 100 * mean(right[a] - right[b])), None, len(asked))

    def ratio(a: np.ndarray, b: np.ndarray) -> Figure:  # type: ignore[type-arg]
        return _thinker.figure(drawn.estimate(lambda mean: mean(a) / mean(b)), None, len(asked))

    figures = {
        "majority_points_over_one_sample": difference("majority", "one sample"),
        "weighted_points_over_majority": difference("weighted", "majority"),
        "weighted_early_points_over_majority": difference("weighted early", "majority"),
        "early_tokens_ratio": ratio(tokens["early"], tokens["majority"]),
        "weighted_early_tokens_ratio": ratio(tokens["weighted early"], tokens["majority"]),
        "shared_prefill_tokens_ratio": ratio(tokens["majority"], tokens["majority"] + (n - 1) * prompts),
    }
    print(figure_table(figures))
    finish(
        arguments,
        name="best_of_votes",
        figures=figures,
        n={"questions": len(asked), "samples": n},
        baseline="a plain majority vote over as many samples",
    )


if __name__ == "__main__":
    main()
