"""The routing half of ``kvroute calibrate``: the cheapest policy that keeps a promise, with all it rests on."""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from kvroute.cli.common import load_engine, print_json, show_progress
from kvroute.errors import InvalidInputError

if TYPE_CHECKING:
    from kvroute import TransformersEngine
    from kvroute.candidates import Candidate
    from kvroute.guarantee import AnyPromise, Certificate
    from kvroute.heads import DifficultyHead
    from kvroute.label_rows import LabelMeta, LabelRow
    from kvroute.policy import Policy

_KINDS = {"one-step": 60, "two-step": 6}
"""Kinds of policies, and how many candidates of each are tried."""
_LEAST_VALIDATION = 20
_LEAST_DRIFT = 200


def calibrate_routing(
    labels: Path,
    head_folder: Path | None,
    target: Path,
    *,
    max_loss: float | None,
    max_tokens: float | None,
    max_slow: float | None,
    delta: float,
    kind: str,
    candidates: int | None,
    model: str,
    dtype: str,
    device: str | None,
    seed: int,
    force: bool,
    quiet: bool,
    as_json: bool,
) -> None:
    """Certify candidates on the calibration rows, save the policy, and what the rows looked like beside it."""
    from kvroute.drift import DriftMonitor
    from kvroute.guarantee import certify, order_candidates
    from kvroute.heads import DifficultyHead
    from kvroute.heads.examples import prompt_examples
    from kvroute.heads.features import pool_spans
    from kvroute.label_rows import read_labels, usable

    if not 0 < delta < 1:
        raise InvalidInputError(f"--delta lies between 0 and 1, and is {delta:g}.")
    if kind not in _KINDS:
        raise InvalidInputError(f"The policy is one-step or two-step, not {kind!r}.")
    if head_folder is None:
        raise InvalidInputError("--routing needs --head.", hint="Train one: kvroute train.")
    if target.exists() and not force:
        raise InvalidInputError(f"{target} is there already.", hint="Pass --force to replace it.")
    rows, meta = read_labels(labels)
    promises = _promises(meta, max_loss, max_tokens, max_slow)
    validation, calibration = usable(rows, "validation"), usable(rows, "calibration")
    if len(validation) < _LEAST_VALIDATION or not calibration:
        raise InvalidInputError(
            f"{labels} has {len(validation)} labelled validation rows and {len(calibration)} calibration rows: "
            "candidates come from the former, the guarantee from the latter.",
            hint="Label more questions.",
        )
    engine = load_engine(model, dtype, device)
    engine.info.require(meta.fingerprint, str(labels), meta.model)
    head = DifficultyHead.load(head_folder, engine.info)
    if head.target != "difficulty":
        raise InvalidInputError(f"{head_folder} is a head for {head.target!r}.", hint="Train one for difficulty.")
    show = show_progress(quiet)
    vectors = [
        pool_spans(engine, prompt_examples(engine, part, bare=False), [head.spec], progress=show)[0]
        for part in (validation, calibration)
    ]
    difficulties = [head.predict(v) for v in vectors]

    study = _Study(engine, head, meta, os.path.relpath(head_folder, target.parent), show)
    settings = study.settings(kind, difficulties[0], validation, candidates or _KINDS[kind])
    if max_loss is None or len(promises) > 1:
        # No order by thresholds alone is the surest-first one where promises pull apart.
        tried = study.candidates(settings, difficulties[0], validation)
        order = order_candidates(tried, study.baseline(validation), promises)
        settings = [settings[i] for i in order]
    certificate = certify(
        study.candidates(settings, difficulties[1], calibration), study.baseline(calibration), promises, delta
    ).model_copy(
        update={"skeletons": len({r.skeleton for r in calibration}), "questions_digest": meta.questions_digest}
    )

    policy = settings[certificate.chosen] if certificate.chosen is not None else study.always_slow()
    drift = None
    if len(calibration) >= _LEAST_DRIFT and policy.reads_difficulty:
        drift = target.with_name(f"{target.stem}.drift.safetensors")
        monitor = DriftMonitor.fit(difficulties[1], vectors[1], seed=seed, fingerprint=engine.info.fingerprint)
        monitor.save(drift)
    guarantee = {**certificate.model_dump(mode="json"), "text": str(certificate)}
    policy = policy.model_copy(update={"guarantee": guarantee, "drift": drift.name if drift else None})
    policy.save(target)  # last, so that it never names a file that is not there
    if as_json:
        print_json({**policy.model_dump(mode="json"), "holds": certificate.holds, "out": str(target)})
        return
    _show(certificate, policy, target, len([r for r in rows if r.part == "calibration"]) - len(calibration))


def _promises(
    meta: LabelMeta, max_loss: float | None, max_tokens: float | None, max_slow: float | None
) -> list[AnyPromise]:
    from kvroute.guarantee import AtMostLoss, AtMostSlow, AtMostTokens

    promises: list[AnyPromise] = []
    if max_loss is not None:
        promises.append(AtMostLoss(max_loss))
    if max_tokens is not None:
        promises.append(AtMostTokens(max_tokens, ceiling=float(max(meta.max_tokens.values()))))
    if max_slow is not None:
        promises.append(AtMostSlow(max_slow))
    if not promises:
        raise InvalidInputError("Nothing is promised.", hint="Give --max-loss, --max-tokens or --max-slow.")
    return promises


class _Study:
    """Candidates on rows: from the labels where they say it all, else by running them."""

    def __init__(
        self, engine: TransformersEngine, head: DifficultyHead, meta: LabelMeta, folder: str, progress: bool | None
    ) -> None:
        self.engine, self.head, self.meta, self.folder, self.progress = engine, head, meta, folder, progress

    def settings(self, kind: str, difficulty: Any, rows: Sequence[LabelRow], k: int) -> list[Policy]:
        """The policies to try, the safest first, from validation rows."""
        from kvroute.candidates import one_step_grid, two_step_grid
        from kvroute.policy import Policy

        if kind == "one-step":
            pairs = one_step_grid(difficulty, rows, k)
            return [Policy(kind="one-step", head=self.folder, tau=tau, give_up=end) for tau, end in pairs]
        every = self.meta.checkpoints or Policy().every
        return [
            Policy(kind="two-step", head=self.folder, every=every, **fields)
            for fields in two_step_grid(difficulty, rows, k)
        ]

    def always_slow(self) -> Policy:
        """The way out."""
        from kvroute.policy import Policy

        return Policy(kind="slow")

    def baseline(self, rows: Sequence[LabelRow]) -> Any:
        """Always slow."""
        from kvroute.routing_curves import Modes

        return Modes.of(rows).slow

    def candidates(self, policies: Sequence[Policy], difficulty: Any, rows: Sequence[LabelRow]) -> list[Candidate]:
        """The policies on rows."""
        from kvroute.candidates import one_step_candidate, run_candidate
        from kvroute.router import Router

        found = []
        for policy in policies:
            if policy.kind == "one-step":
                found.append(one_step_candidate(difficulty, rows, policy.tau, policy.give_up))
            else:
                router = Router(self.engine, policy, head=self.head, thinking=self.meta.thinking)
                found.append(run_candidate(router, rows, self.meta, progress=self.progress))
        return found


def _show(certificate: Certificate, policy: Policy, target: Path, left_out: int) -> None:
    from rich.console import Console
    from rich.table import Table

    table = Table("candidate", "p", "certified", "loss, points", "harm (upper limit)", "tokens", "saved", "slow")
    for i, c in enumerate(certificate.candidates):
        settings = c.policy if isinstance(c.policy, dict) else {}
        named = ", ".join(
            f"{k} {v:.4g}" for k, v in settings.items() if k.startswith(("tau", "give")) and v is not None
        )
        table.add_row(
            f"{'> ' if i == certificate.chosen else ''}{named or c.policy}",
            f"{c.p_value:.3g}",
            "yes" if c.certified else "no",
            f"{c.loss:.2f}" + ("" if c.loss_upper is None else f" (at most {c.loss_upper:.2f})"),
            f"{c.harm:.4f} ({c.harm_upper:.4f})",
            f"{c.tokens:.1f}",
            f"{100 * c.saved:.1f} %",
            f"{100 * c.slow:.1f} %",
        )
    console = Console()
    console.print(table)
    console.print(str(certificate), soft_wrap=True, markup=False)
    if left_out:
        console.print(f"{left_out} calibration rows have no label and were left out.", soft_wrap=True)
    skeletons = certificate.skeletons or certificate.n
    if skeletons < certificate.n / 2:
        console.print(
            f"The {certificate.n} calibration rows share {skeletons} skeletons: for questions of other skeletons the "
            "promise is weaker than the number of rows says.",
            soft_wrap=True,
        )
    console.print(f"Saved to {target}{f' and {policy.drift}' if policy.drift else ''}.", soft_wrap=True, markup=False)
