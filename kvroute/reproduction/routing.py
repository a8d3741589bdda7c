"""The routing part of a recipe: label, train, calibrate, evaluate.

The head is trained, chosen and calibrated on the recipe's training sets; questions of theirs whose skeleton is also
that of a test question are left out. Test sets are judged whole.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from kvroute.candidates import run_candidate, slow_rows
from kvroute.checkers import Checker, number_within
from kvroute.files import write_json
from kvroute.guarantee import AtMostLoss
from kvroute.heads import DifficultyHead
from kvroute.heads.search import SearchOptions
from kvroute.heads.training import train_head
from kvroute.label_files import write_labels
from kvroute.label_rows import LabelMeta, LabelRow, read_labels, usable
from kvroute.label_summary import Group
from kvroute.labelling import Labeller
from kvroute.policy import Policy
from kvroute.policy_calibration import calibrate_policy, calibration_rows
from kvroute.recipes import DataSet, Recipe
from kvroute.reproduction.data import Source
from kvroute.reproduction.steps import Engines, Steps
from kvroute.router import Router
from kvroute.routing_curves import Modes, Outcome
from kvroute.routing_evaluation import evaluate_head
from kvroute.routing_intervals import Resamples
from kvroute.rows import digest_of
from kvroute.thinking import ThinkingMode

if TYPE_CHECKING:
    from kvroute.label_rows import Part
    from kvroute.questions import Question

Figures = dict[str, dict[str, float | None]]
"""By name, value, low and high."""

HEAD, POLICY, SEARCH = "head", "policy.json", "search.json"
_TRAIN, _CALIBRATE = "train", "calibrate"
_ANSWERS = ("prompt", "fast_instruction", "slow_instruction", "max_tokens", "short", "samples", "temperature", "seed",
            "checkpoints")  # fmt: skip
"""What answers depend on."""
_RESAMPLES = 2000


class Routing:
    """Runs the part.

    Args:
        recipe: whole.
        source: of its sets.
        out: folder of everything.
        steps: what is there already.
        engines: opened when needed.
        progress: whether to show bars; by default on a terminal.
    """

    def __init__(
        self, recipe: Recipe, source: Source, out: Path, steps: Steps, engines: Engines, progress: bool | None
    ) -> None:
        assert recipe.routing is not None
        self.recipe, self.part, self.source = recipe, recipe.routing, source
        self.out, self.steps, self.engines, self.progress = out, steps, engines, progress

    # ------------------------------------------------------------------ labels

    def label(self) -> None:
        """Both answers to every question; the only step that needs the engine that writes."""
        training = {"train": 1 - self.part.validation - self.part.calibration, "validation": self.part.validation,
                    "calibration": self.part.calibration}  # fmt: skip
        for part in self.part.train:
            self._label(part, training)  # type: ignore[arg-type]
        for part in self.part.test:
            self._label(part, {"test": 1.0})

    def _label(self, part: DataSet, shares: dict[Part, float]) -> None:
        questions = self.source.questions(part)
        settings = {k: v for k, v in self.part.model_dump(mode="json").items() if k in _ANSWERS}
        facts = [self.recipe.model, self.recipe.dtype, self.recipe.chunk, settings, shares, part.tolerance,
                 [[q.id, q.question, q.answer, q.answer_type, q.extra] for q in questions]]  # fmt: skip

        def work(fresh: bool) -> dict[str, Any]:
            labeller = self._labeller(part, shares, questions)
            path = self._labels(part)
            write_labels(
                labeller, questions, path, chunk=self.recipe.chunk, identity={"tolerance": part.tolerance},
                restart=fresh, force=True, progress=self.progress,
            )  # fmt: skip
            group = Group.of(part.name, read_labels(path)[0], self.part.short)
            return {name: getattr(group, name) for name in ("rows", "failed", "fast_right", "slow_right", "unreadable")}

        self.steps.run(_label_step(part), facts, work)

    def _labeller(self, part: DataSet, shares: dict[Part, float], questions: Sequence[Question]) -> Labeller:
        given = {"fast": self.part.fast_instruction, "slow": self.part.slow_instruction}
        wanted = {k: f"\n{v}" for k, v in given.items() if v is not None}
        checkers = _checkers(part)
        if any(q.answer_type == "latex" for q in questions):
            from kvroute.latex_checker import LatexChecker

            LatexChecker()  # MissingExtraError now, not after hours
        return Labeller(
            self.engines.writer(),
            thinking=ThinkingMode.instructions(**wanted) if wanted else None,
            checkers=checkers,
            max_tokens=self.part.max_tokens.model_dump(),
            short=self.part.short,
            samples=self.part.samples,
            temperature=self.part.temperature,
            seed=self.part.seed,
            checkpoints=self.part.checkpoints,
            shares=shares,
            prompt=self.part.prompt,
        )

    def _labels(self, part: DataSet) -> Path:
        return self.out / "labels" / f"{part.name}.jsonl"

    def _test_rows(self, part: DataSet) -> tuple[list[LabelRow], LabelMeta]:
        rows, meta = read_labels(self._labels(part))
        return usable(rows), meta

    def _training_rows(self) -> tuple[list[LabelRow], LabelMeta, int]:
        """Rows of the training sets without those that are like a test question, their header, and how many those
        were."""
        held = {r.skeleton for part in self.part.test for r in self._test_rows(part)[0]}
        found = [read_labels(self._labels(part)) for part in self.part.train]
        rows = [r for part, _ in found for r in usable(part)]
        kept = [r for r in rows if r.skeleton not in held]
        meta = found[0][1].model_copy(update={"questions_digest": digest_of([m.questions_digest for _, m in found])})
        return kept, meta, len(rows) - len(kept)

    # ------------------------------------------------------------------ head and policy

    def train(self) -> dict[str, Any]:
        """The head."""
        wanted = self.part.head

        def work(_fresh: bool) -> dict[str, Any]:
            rows, meta, alike = self._training_rows()
            changes: dict[str, Any] = {"spec": wanted.spec, "kinds": wanted.kinds, "bare": wanted.bare}
            options = SearchOptions.quick(**changes) if wanted.quick else SearchOptions(**changes)
            head, report = train_head(
                self.engines.reader(), rows, meta, search=options, seed=self.part.seed,
                windows=self.part.two_step is not None, progress=self.progress,
            )  # fmt: skip
            write_json(self.out / SEARCH, "kvroute.search", report.to_dict())
            head.save(self.out / HEAD)
            return {"kind": head.kind, "spec": head.spec.model_dump(mode="json"), "rows": report.rows,
                    "left_out": alike, "validation": report.validation}  # fmt: skip

        after = tuple(map(_label_step, (*self.part.train, *self.part.test)))
        facts = [wanted.model_dump(mode="json"), self.part.two_step is not None]
        return self.steps.run(_TRAIN, facts, work, after=after)

    def calibrate(self) -> dict[str, Any]:
        """The policy that keeps the promise."""

        def work(_fresh: bool) -> dict[str, Any]:
            rows, meta, _ = self._training_rows()
            validation, calibration = calibration_rows(rows, "The recipe's training sets")
            found = calibrate_policy(
                self.engines.reader(), self._head(), validation, calibration, meta, [AtMostLoss(self.part.max_loss)],
                head_folder=HEAD, delta=self.part.delta, seed=self.part.seed, progress=self.progress,
            )  # fmt: skip
            policy = found.policy
            if found.drift is not None:
                found.drift.save(self.out / "policy.drift.safetensors")
                policy = policy.model_copy(update={"drift": "policy.drift.safetensors"})
            policy.save(self.out / POLICY)
            return {"policy": policy.kind, "promise": str(found.certificate)}

        return self.steps.run(_CALIBRATE, [self.part.max_loss, self.part.delta], work, after=(_TRAIN,))

    def _head(self) -> DifficultyHead:
        return DifficultyHead.load(self.out / HEAD, self.engines.reader().info)

    # ------------------------------------------------------------------ figures

    def evaluate(self) -> Figures:
        """Figures of every test set."""
        found: Figures = {}
        for part in self.part.test:
            facts = [self.part.tau, list(self.part.baselines)]
            result = self.steps.run(
                f"evaluate-{part.name}",
                facts,
                lambda _, part=part: self._evaluate(part),  # type: ignore[misc]
                after=(_CALIBRATE,),
            )
            found |= result["figures"]
            two = self.part.two_step
            if two is not None:
                result = self.steps.run(
                    f"two-step-{part.name}", [two.model_dump(), self.part.tau],
                    lambda _, part=part: self._two_step(part), after=(_TRAIN,),  # type: ignore[misc]
                )  # fmt: skip
                found |= result["figures"]
        return found

    def _evaluate(self, part: DataSet) -> dict[str, Any]:
        engine, head, policy = self.engines.reader(), self._head(), Policy.load(self.out / POLICY)
        rows, _ = self._test_rows(part)
        seen, meta, _ = self._training_rows()
        report = evaluate_head(
            head, [*seen, *rows], meta, engine, name=HEAD, baselines=self.part.baselines, seed=self.part.seed,
            resamples=_RESAMPLES, folder=self.out / "features", progress=self.progress,
        )  # fmt: skip
        written = report.save(self.out / "evaluation" / part.name)
        difficulty = head.predict(engine.pool([list(r.prompt_ids) for r in rows], [head.spec], progress=False)[0])
        modes = Modes.of(rows)
        calibrated = modes.slow
        if policy.reads_difficulty:
            calibrated = modes.chosen(slow_rows(difficulty, policy.tau, policy.give_up))
        outcomes = {"fast": modes.fast, "slow": modes.slow, "one-step": modes.one_step(difficulty, self.part.tau),
                    "calibrated": calibrated}  # fmt: skip
        told = report.difficulties[HEAD].auroc_fast_right
        figures = outcome_figures(part.name, outcomes, self.part.seed)
        figures[f"{part.name}.auroc-fast-is-right"] = told.to_dict()
        return {"figures": figures, "files": [str(p.relative_to(self.out)) for p in written]}

    def _two_step(self, part: DataSet) -> dict[str, Any]:
        two = self.part.two_step
        assert two is not None
        rows, meta = self._test_rows(part)
        policy = Policy(
            kind="two-step", tau=self.part.tau, tau_fast=two.tau_fast, tau_slow=two.tau_slow, every=two.every
        )
        router = Router(self.engines.reader(), policy, head=self._head(), thinking=meta.thinking)
        found = run_candidate(router, rows, meta, checkers=_checkers(part), progress=self.progress)
        figures = outcome_figures(part.name, {"two-step": found}, self.part.seed)
        return {"figures": figures, "switches": router.counts["switches"], "slow": float(np.mean(found.slow))}


def outcome_figures(name: str, outcomes: Mapping[str, Outcome], seed: int) -> Figures:
    """Accuracy and tokens of policies on a set, with intervals of the same resampled rows."""
    found: Figures = {}
    for policy, outcome in outcomes.items():
        drawn = Resamples(len(outcome.right), _RESAMPLES, seed=seed)
        for what, values in (("accuracy", outcome.right), ("tokens", outcome.tokens)):
            estimate = drawn.estimate(lambda mean, values=values: mean(values))  # type: ignore[misc]
            found[f"{name}.{policy}.{what}"] = estimate.to_dict()
    return found


def _label_step(part: DataSet) -> str:
    return f"label-{part.name}"


def _checkers(part: DataSet) -> dict[str, Checker]:
    return {} if part.tolerance is None else {kind: number_within(part.tolerance) for kind in ("number", "list")}
