"""From a head and labelled rows to a policy that keeps a promise: candidates from validation rows, the test on
calibration rows, and the reference for drift."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from kvroute.candidates import Candidate, one_step_candidate, one_step_grid, run_candidate, two_step_grid
from kvroute.drift import DriftMonitor
from kvroute.errors import InvalidInputError
from kvroute.guarantee import AnyPromise, Certificate, certify, order_candidates
from kvroute.heads.examples import prompt_examples
from kvroute.heads.features import pool_spans
from kvroute.label_rows import LabelMeta, LabelRow, usable
from kvroute.policy import Policy
from kvroute.router import Router
from kvroute.routing_curves import Modes, Outcome

if TYPE_CHECKING:
    from kvroute.engines.transformers_engine import TransformersEngine
    from kvroute.heads import DifficultyHead

KINDS = {"one-step": 60, "two-step": 6}
"""Kinds of policies, and how many candidates of each are tried."""
_LEAST_VALIDATION = 20
_LEAST_DRIFT = 200


@dataclass(frozen=True)
class CalibratedPolicy:
    """What calibration gives.

    Attributes:
        policy: the cheapest certified one, or always slow; its guarantee in it.
        certificate: all candidates with their p-values.
        drift: what the calibration rows looked like; None with fewer than 200 of them, or where nothing reads them.
    """

    policy: Policy
    certificate: Certificate
    drift: DriftMonitor | None


def calibration_rows(rows: Sequence[LabelRow], source: object) -> tuple[list[LabelRow], list[LabelRow]]:
    """The validation rows and the calibration rows that have a label.

    Raises:
        InvalidInputError: fewer than 20 of the former, or none of the latter.
    """
    validation, calibration = usable(rows, "validation"), usable(rows, "calibration")
    if len(validation) < _LEAST_VALIDATION or not calibration:
        raise InvalidInputError(
            f"{source} has {len(validation)} labelled validation rows and {len(calibration)} calibration rows: "
            "candidates come from the former, the guarantee from the latter.",
            hint="Label more questions.",
        )
    return validation, calibration


def calibrate_policy(
    engine: TransformersEngine,
    head: DifficultyHead,
    validation: Sequence[LabelRow],
    calibration: Sequence[LabelRow],
    meta: LabelMeta,
    promises: Sequence[AnyPromise],
    *,
    head_folder: str,
    delta: float = 0.1,
    kind: str = "one-step",
    candidates: int | None = None,
    seed: int = 0,
    progress: bool | None = None,
) -> CalibratedPolicy:
    """Certify candidates, and take the cheapest.

    Args:
        engine: the model.
        head: a head for difficulty.
        validation, calibration: see :func:`calibration_rows`.
        meta: their header.
        promises: one or several, of different kinds.
        head_folder: what the policy shall call the head's folder.
        delta: probability that a promise is broken.
        kind: ``one-step`` (read off the labels) or ``two-step`` (run).
        candidates: how many are tried; by default as :data:`KINDS` says.
        seed: of the drift reference.
        progress: whether to show bars; by default on a terminal.
    """
    parts = (validation, calibration)
    vectors = [
        pool_spans(engine, prompt_examples(engine, part, bare=False), [head.spec], progress=progress)[0]
        for part in parts
    ]
    difficulties = [head.predict(v) for v in vectors]
    study = _Study(engine, head, meta, head_folder, progress)
    settings = study.settings(kind, difficulties[0], validation, candidates or KINDS[kind])
    if any(p.kind != "loss" for p in promises):
        # No order by thresholds alone is the surest-first one where promises pull apart.
        tried = study.candidates(settings, difficulties[0], validation)
        settings = [settings[i] for i in order_candidates(tried, _slow(validation), promises)]
    certificate = certify(
        study.candidates(settings, difficulties[1], calibration), _slow(calibration), promises, delta
    ).model_copy(
        update={"skeletons": len({r.skeleton for r in calibration}), "questions_digest": meta.questions_digest}
    )
    policy = settings[certificate.chosen] if certificate.chosen is not None else Policy(kind="slow")
    drift = None
    if len(calibration) >= _LEAST_DRIFT and policy.reads_difficulty:
        drift = DriftMonitor.fit(difficulties[1], vectors[1], seed=seed, fingerprint=engine.info.fingerprint)
    guarantee = {**certificate.model_dump(mode="json"), "text": str(certificate)}
    return CalibratedPolicy(policy.model_copy(update={"guarantee": guarantee}), certificate, drift)


def _slow(rows: Sequence[LabelRow]) -> Outcome:
    return Modes.of(rows).slow


class _Study:
    """Candidates on rows: from the labels where they say it all, else by running them."""

    def __init__(
        self, engine: TransformersEngine, head: DifficultyHead, meta: LabelMeta, folder: str, progress: bool | None
    ) -> None:
        self.engine, self.head, self.meta, self.folder, self.progress = engine, head, meta, folder, progress

    def settings(self, kind: str, difficulty: Any, rows: Sequence[LabelRow], k: int) -> list[Policy]:
        """The policies to try, the safest first, from validation rows."""
        if kind == "one-step":
            pairs = one_step_grid(difficulty, rows, k)
            return [Policy(kind="one-step", head=self.folder, tau=tau, give_up=end) for tau, end in pairs]
        every = self.meta.checkpoints or Policy().every
        return [
            Policy(kind="two-step", head=self.folder, every=every, **fields)
            for fields in two_step_grid(difficulty, rows, k)
        ]

    def candidates(self, policies: Sequence[Policy], difficulty: Any, rows: Sequence[LabelRow]) -> list[Candidate]:
        """The policies on rows."""
        found = []
        for policy in policies:
            if policy.kind == "one-step":
                found.append(one_step_candidate(difficulty, rows, policy.tau, policy.give_up))
            else:
                router = Router(self.engine, policy, head=self.head, thinking=self.meta.thinking)
                found.append(run_candidate(router, rows, self.meta, progress=self.progress))
        return found
