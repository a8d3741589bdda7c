"""The routing half of ``kvroute calibrate``: the cheapest policy that keeps a promise, with all it rests on."""

from __future__ import annotations

import os
from pathlib import Path
from typing import TYPE_CHECKING

from kvroute.cli.common import load_engine, print_json, show_progress
from kvroute.errors import InvalidInputError

if TYPE_CHECKING:
    from kvroute.guarantee import AnyPromise, Certificate
    from kvroute.label_rows import LabelMeta
    from kvroute.policy import Policy


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
    from kvroute.heads import DifficultyHead
    from kvroute.label_rows import read_labels
    from kvroute.policy_calibration import KINDS, calibrate_policy, calibration_rows

    if not 0 < delta < 1:
        raise InvalidInputError(f"--delta lies between 0 and 1, and is {delta:g}.")
    if kind not in KINDS:
        raise InvalidInputError(f"The policy is one-step or two-step, not {kind!r}.")
    if head_folder is None:
        raise InvalidInputError("--routing needs --head.", hint="Train one: kvroute train.")
    if target.exists() and not force:
        raise InvalidInputError(f"{target} is there already.", hint="Pass --force to replace it.")
    rows, meta = read_labels(labels)
    promises = _promises(meta, max_loss, max_tokens, max_slow)
    validation, calibration = calibration_rows(rows, labels)
    engine = load_engine(model, dtype, device)
    engine.info.require(meta.fingerprint, str(labels), meta.model)
    head = DifficultyHead.load(head_folder, engine.info)
    if head.target != "difficulty":
        raise InvalidInputError(f"{head_folder} is a head for {head.target!r}.", hint="Train one for difficulty.")
    found = calibrate_policy(
        engine, head, validation, calibration, meta, promises,
        head_folder=os.path.relpath(head_folder, target.parent), delta=delta, kind=kind, candidates=candidates,
        seed=seed, progress=show_progress(quiet),
    )  # fmt: skip
    policy, drift = found.policy, None
    if found.drift is not None:
        drift = target.with_name(f"{target.stem}.drift.safetensors")
        found.drift.save(drift)
        policy = policy.model_copy(update={"drift": drift.name})
    policy.save(target)  # last, so that it never names a file that is not there
    if as_json:
        print_json({**policy.model_dump(mode="json"), "holds": found.certificate.holds, "out": str(target)})
        return
    _show(found.certificate, policy, target, len([r for r in rows if r.part == "calibration"]) - len(calibration))


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
