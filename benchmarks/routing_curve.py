"""All routing policies on the tiny thinker in one table and plot: accuracy over tokens, with paired intervals.

Questions are labelled (kept in .cache), a head is trained on train rows, thresholds are chosen on validation rows, and
every figure is taken on test rows, which nothing was trained or chosen on. One-step policies and the baselines are read
off the labels (greedy answers, so a run would give the same); two-step policies are run for real, each test question
once a setting. ``x_beats_y`` is tokens of x over those of y, both at the accuracy of always slow minus one point (each
one's settings, chosen on validation rows, and the two plain modes may be mixed), on the same resampled rows;
``..._at_its_own_accuracy`` compares at the accuracy that x has as it was chosen.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np
from rich.console import Console

import _thinker
from _harness import Figure, figure_table, finish
from kvroute import Policy, Router, TransformersEngine
from kvroute.candidates import Candidate, run_candidate
from kvroute.heads import DifficultyHead
from kvroute.heads.search import SearchOptions
from kvroute.heads.training import train_head
from kvroute.label_rows import LabelMeta, LabelRow, Part, usable
from kvroute.routing_baselines import BASELINES
from kvroute.routing_curves import Modes, Outcome, Sweep, choose_threshold
from kvroute.routing_evaluation import evaluate_head
from kvroute.routing_intervals import Estimate, Means, Resamples, tokens_at
from kvroute.routing_report import RoutingReport

EVERY = 5
"""Tokens between the checkpoints of thoughts, in labels and policies."""
TAU_FAST = (2.0, 5.0, 10.0, 20.0)
"""Settings of the two-step policy, safest first; one is chosen on validation rows."""


def run_two_step(
    thinker: TransformersEngine, head: DifficultyHead, rows: Sequence[LabelRow], meta: LabelMeta, policy: Policy
) -> tuple[Candidate, float]:
    """What a router gets on labelled questions, and the share of answers that it switched."""
    router = Router(thinker, policy, head=head)
    found = run_candidate(router, rows, meta)
    return found, router.counts["switches"] / len(rows)


def at_equal_accuracy(outcome: Outcome, curve: Sweep, modes: Modes, drawn: Resamples) -> Estimate:
    """Tokens of a policy over those that a curve needs for the policy's accuracy, paired."""

    def ratio(mean: Means) -> np.ndarray:  # type: ignore[type-arg]
        accuracy = np.column_stack([mean(modes.fast.right), mean(curve.right), mean(modes.slow.right)])
        tokens = np.column_stack([mean(modes.fast.tokens), mean(curve.tokens), mean(modes.slow.tokens)])
        # Where the curve's best point lies under the policy, it is compared at that best point.
        wanted = np.minimum(mean(outcome.right), accuracy.max(axis=1))
        return np.asarray(mean(outcome.tokens) / tokens_at(wanted, accuracy, tokens))

    return drawn.estimate(ratio)


def compared(report: RoutingReport, a: str, b: str, must: str | None) -> Figure:
    """Tokens of ``a`` over those of ``b``, both at the accuracy of always slow minus a point, paired."""
    found = report.compare(a, b)["tokens_ratio"]
    return _thinker.figure(Estimate(**found), must, report.resamples.n)


def by_kind(rows: Sequence[LabelRow]) -> list[str]:
    """Accuracy and tokens of both modes by kind of question."""
    lines = []
    for kind in sorted({str(r.extra["kind"]) for r in rows}):
        modes = Modes.of([r for r in rows if r.extra["kind"] == kind])
        lines.append(
            f"{kind:5} {len(modes):5} rows: fast {modes.fast.accuracy:.3f} in {modes.fast.mean_tokens:.1f} tokens, "
            f"slow {modes.slow.accuracy:.3f} in {modes.slow.mean_tokens:.1f}"
        )
    return lines


def main() -> None:
    parser = _thinker.argument_parser(__doc__)
    parser.add_argument("--rows", type=int, help="questions of all parts; the half of them is test")
    parser.add_argument("--out", type=Path, help="folder for report.json, PNG and SVG")
    arguments = parser.parse_args()
    count = arguments.rows or (600 if arguments.quick else 10_000)
    shares: dict[Part, float] = {"train": 0.37, "validation": 0.13, "calibration": 0.0, "test": 0.5}
    thinker = _thinker.engine(arguments.thinker)
    asked = _thinker.questions(count, arguments.seed + 1)
    seen, meta = _thinker.labelled(thinker, asked, shares, checkpoints=EVERY, parts=("train", "validation"))
    held, _ = _thinker.labelled(thinker, asked, shares, checkpoints=None, parts=("test",))
    search = SearchOptions.quick() if arguments.quick else SearchOptions(rows=1500, budget_seconds=240)
    head, training = train_head(thinker, [*seen, *held], meta, search=search, seed=arguments.seed)
    assert head.windows is not None
    test, validation = usable(held, "test"), usable(seen, "validation")
    baselines = BASELINES[:1] if arguments.quick else BASELINES
    report: RoutingReport = evaluate_head(
        head, [*seen, *held], meta, thinker, name="one-step", baselines=baselines, seed=arguments.seed, points=1.0,
        folder=_thinker.CACHE,
    )  # fmt: skip
    modes, drawn = report.modes, report.resamples

    def figure(estimate: Estimate, must: str | None) -> Figure:
        return _thinker.figure(estimate, must, drawn.n)

    # Two steps: settings are compared on validation rows, then run on test rows.
    choice = Modes.of(validation)
    prompts = [list(r.prompt_ids) for r in validation]
    difficulty = head.predict(thinker.pool(prompts, [head.spec], progress=False)[0])
    tau = choose_threshold(choice, difficulty, 0.3)
    settings = TAU_FAST[1:3] if arguments.quick else TAU_FAST
    policies = [Policy(kind="two-step", tau=tau, tau_fast=t, tau_slow=80.0, every=EVERY) for t in settings]
    tried = [run_two_step(thinker, head, validation, meta, p)[0] for p in policies]
    enough = [i for i, o in enumerate(tried) if o.accuracy >= choice.slow.accuracy - 0.005]
    best = min(enough, key=lambda i: tried[i].mean_tokens) if enough else 0
    ran = [run_two_step(thinker, head, test, meta, p) for p in policies]
    report.add_sweep("two-step", Sweep.of([o for o, _ in ran], list(settings)))
    chosen, switched = ran[best]
    report.add_point("two-step", chosen)

    one = modes.one_step(head.predict(thinker.pool([list(r.prompt_ids) for r in test], [head.spec])[0]),
                         choose_threshold(choice, difficulty, 0.5))  # fmt: skip
    figures = {
        "two_step_accuracy_points": figure(
            drawn.estimate(lambda mean: 100 * mean(chosen.right - modes.slow.right)), ">= -1.0"
        ),
        "two_step_of_oracle": figure(
            drawn.estimate(lambda mean: mean(chosen.tokens) / mean(modes.oracle().tokens)), "<= 1.25"
        ),
        "two_step_of_slow": figure(drawn.estimate(lambda mean: mean(chosen.tokens) / mean(modes.slow.tokens)), None),
        "one_step_accuracy_points": figure(
            drawn.estimate(lambda mean: 100 * mean(one.right - modes.slow.right)), ">= -1.0"
        ),
        "one_step_of_oracle": figure(
            drawn.estimate(lambda mean: mean(one.tokens) / mean(modes.oracle().tokens)), "<= 1.5"
        ),
        "two_step_beats_one_step": compared(report, "two-step", "one-step", "<= 1.0"),
    }
    for name in baselines:
        must = "<= 1.0" if name in ("length", "minilm") else None
        curve = report.curves[name]
        for mine, point in (("two-step", chosen), ("one-step", one)):
            figures[f"{mine.replace('-', '_')}_beats_{name}"] = compared(report, mine, name, must)
            at_its_own = at_equal_accuracy(point, curve, modes, drawn)
            figures[f"{mine.replace('-', '_')}_beats_{name}_at_its_own_accuracy"] = figure(at_its_own, None)
    length = report.difficulties["length"].auroc_fast_right
    figures["length_auroc"] = figure(length, "<= 0.65")

    console = Console(width=120)
    for line in by_kind(test):
        console.print(line)
    for shown in report.tables():
        console.print(shown)
    console.print(f"head: {head.kind} on {head.spec.to_json()}")
    console.print(f"windows: {head.windows.kind} on {head.windows.spec.to_json()}")
    console.print(f"two-step: {policies[best].model_dump(include={'tau', 'tau_fast', 'tau_slow', 'every'})}, "
                  f"{switched:.3f} of the answers switched")  # fmt: skip
    console.print(f"search: {len(training.tried)} candidates for prompts")
    if arguments.out is not None:
        report.save(arguments.out)
    print(figure_table(figures))
    finish(
        arguments,
        name="routing_curve",
        figures=figures,
        n={"test": len(test), "validation": len(validation), "train": len(usable(seen, "train"))},
        baseline="always slow, the oracle, and a head of the same kind on other vectors",
    )


if __name__ == "__main__":
    main()
