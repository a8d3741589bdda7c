"""``kvroute train``: a head from labelled questions."""

from __future__ import annotations

import os
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal, cast, get_args

import typer

from kvroute.cli.common import (
    Device,
    Dtype,
    EngineName,
    Force,
    Json,
    Model,
    Quiet,
    load_engine,
    load_spec,
    print_json,
    require_caches,
    show_progress,
)
from kvroute.errors import InvalidInputError

if TYPE_CHECKING:
    from rich.console import Console

    from kvroute import DifficultyHead, PoolingSpec
    from kvroute.heads.training import TrainingReport

REPORT = "search.json"
_KIND = "kvroute.search"
_SHOWN = 8


def command(
    labels: Annotated[Path, typer.Argument(help="What kvroute label wrote, its .meta.json beside it.")],
    out: Annotated[Path, typer.Option("--out", "-o", help="The folder to save the head in.")],
    model: Model = "smollm2",
    target: Annotated[
        str, typer.Option(help="difficulty (of a prompt) or correct (a confidence in an answer).")
    ] = "difficulty",
    kind: Annotated[str, typer.Option(help="mlp, ridge, logistic, trees, or auto to try them all.")] = "auto",
    spec: Annotated[
        str | None, typer.Option(help="Pooling: a preset, a file or JSON; by default it is searched for.")
    ] = None,
    window_spec: Annotated[str | None, typer.Option(help="The same for windows in mid-thought.")] = None,
    bare: Annotated[
        bool | None,
        typer.Option("--bare/--no-bare", help="Train on bare questions too; by default whichever is better."),
    ] = None,
    windows: Annotated[
        bool | None,
        typer.Option("--windows/--no-windows", help="A head for mid-thought; by default if there are checkpoints."),
    ] = None,
    every: Annotated[
        int | None, typer.Option(min=1, help="Tokens of a fast answer between windows; by default as the checkpoints.")
    ] = None,
    quick: Annotated[bool, typer.Option("--quick", help="A smaller search.")] = False,
    budget_seconds: Annotated[float | None, typer.Option(help="Begin no candidate after that long.")] = None,
    seed: Annotated[int, typer.Option(help="Of everything random.")] = 0,
    dtype: Dtype = "auto",
    device: Device = None,
    engine_name: EngineName = "transformers",
    force: Force = False,
    quiet: Quiet = False,
    as_json: Json = False,
) -> None:
    """Train a head: choose pooling and kind on validation rows, then measure once on test rows.

    The folder gets the head, a model card, and search.json with every candidate that was tried.
    """
    require_caches(engine_name, "kvroute train")
    from kvroute.files import write_json
    from kvroute.heads.search import Kind, SearchOptions
    from kvroute.heads.training import train_head
    from kvroute.label_rows import read_labels

    if target not in ("difficulty", "correct"):
        raise InvalidInputError(f"The target is difficulty or correct, not {target!r}.")
    if kind != "auto" and kind not in get_args(Kind):
        raise InvalidInputError(f"No kind of head is named {kind!r}.", hint=f"Use auto, {', '.join(get_args(Kind))}.")
    if out.exists() and not force:
        raise InvalidInputError(f"{out} is there already.", hint="Pass --force to replace it.")
    _check_writable(out)
    changes: dict[str, Any] = {
        "spec": _spec(spec),
        "window_spec": _spec(window_spec),
        "bare": bare,
        "budget_seconds": budget_seconds,
    }
    if kind != "auto":
        changes["kinds"] = (kind,)
    options = SearchOptions.quick(**changes) if quick else SearchOptions(**changes)
    rows, meta = read_labels(labels)
    engine = load_engine(model, dtype, device, engine_name)
    head, report = train_head(
        engine, rows, meta, target=cast(Literal["difficulty", "correct"], target), search=options, seed=seed,
        windows=windows, every=every, progress=show_progress(quiet),
    )  # fmt: skip
    head.save(out)
    write_json(out / REPORT, _KIND, report.to_dict())
    if as_json:
        print_json(
            {
                "out": str(out),
                "target": head.target,
                "kind": head.kind,
                "spec": head.spec.model_dump(mode="json"),
                "held_out": report.held_out,
                "validation": report.validation,
                "baselines": report.baselines,
                "windows": None if report.windows is None else report.windows.held_out,
                "rows": report.rows,
                "tried": len(report.tried) + (len(report.windows.tried) if report.windows is not None else 0),
                "seconds": report.seconds,
            }
        )
        return
    from rich.console import Console

    console = Console()
    _show(console, head, report, "prompts" if target == "difficulty" else "answers")
    if report.windows is not None and head.windows is not None:
        _show(console, head.windows, report.windows, "windows in mid-thought")
    console.print(f"Saved to {out}, every candidate in {out / REPORT}.", soft_wrap=True, highlight=False)


def _check_writable(out: Path) -> None:
    """Refuse before the work what could not be saved after it."""
    there = next(p for p in (out, *out.absolute().parents) if p.exists())
    if not there.is_dir() or not os.access(there, os.W_OK):
        raise InvalidInputError(f"The head can't be saved in {out}: {there} is not a folder that can be written to.")


def _spec(given: str | None) -> PoolingSpec | None:
    from kvroute import PoolingSpec

    if given is None:
        return None
    return PoolingSpec.from_json(given) if given.lstrip().startswith("{") else load_spec(given)


def _show(console: Console, head: DifficultyHead, report: TrainingReport, what: str) -> None:
    from rich.table import Table

    tried = Table("kind", "pooling", "setting", "AUROC", "MSE", title=f"{what}: best of {len(report.tried)} tried")
    last = [c for c in report.tried if c.stage in ("kinds", "bare")]
    for c in sorted(last, key=lambda c: c.order, reverse=True)[:_SHOWN]:
        setting = ", ".join(f"{k} {v:g}" for k, v in c.setting.items()) + (", bare too" if c.bare else "")
        score = "none" if c.auroc is None else f"{c.auroc:.3f}"
        tried.add_row(c.kind, c.spec.model_dump_json(exclude_defaults=True), setting, score, f"{c.mse:.4f}")
    console.print(tried)
    held_out = Table("", "validation", "test (held out)", title=f"{what}: {head.kind} head")
    for name in report.validation:
        values = (report.validation[name], report.held_out.get(name))
        held_out.add_row(name, *("none" if v is None else f"{v:.4g}" for v in values))
    console.print(held_out)
    if report.baselines:
        baselines = Table("score", "AUROC", "Brier", "calibration error", title="the same test answers by other scores")
        for name, found in sorted(report.baselines.items(), key=lambda item: -item[1]["auroc"]):
            baselines.add_row(name, *(f"{found[k]:.3f}" for k in ("auroc", "brier", "calibration_error")))
        console.print(baselines)
