"""``kvroute calibrate``: a confidence from answers that are known to be right or wrong."""

from __future__ import annotations

import os
import re
import sys
from pathlib import Path
from typing import Annotated, Literal

import typer

from kvroute.cli.common import (
    Device,
    Dtype,
    Force,
    Json,
    Model,
    Quiet,
    load_engine,
    names_in,
    print_json,
    show_progress,
)
from kvroute.errors import InvalidInputError
from kvroute.rows import parse_jsonl, read_text


def command(
    confidence: Annotated[
        str,
        typer.Option(
            "--confidence",
            help="JSON Lines with correct (true or false) and either scores, or prompt (or messages) and answer.",
        ),
    ],
    name: Annotated[str | None, typer.Option(help="Save as NAME.json in the folder KVROUTE_CALIBRATORS.")] = None,
    out: Annotated[Path | None, typer.Option("--out", "-o", help="Save to this .json file instead.")] = None,
    method: Annotated[str, typer.Option(help="logistic (one or several scores) or isotonic (one).")] = "logistic",
    scores: Annotated[str | None, typer.Option(help="Scores or families to read, with commas between.")] = None,
    seed: Annotated[int, typer.Option(help="Of the cross-validation.")] = 0,
    model: Model = "smollm2",
    dtype: Dtype = "auto",
    device: Device = None,
    force: Force = False,
    quiet: Quiet = False,
    as_json: Json = False,
) -> None:
    """Fit a confidence in [0, 1] and save it as JSON, bound to the model. Metrics are cross-validated."""
    from kvroute import ConfidenceCalibrator

    target = _target(name, out)
    if target.exists() and not force:
        raise InvalidInputError(f"{target} is there already.", hint="Pass --force to replace it.")
    rows = []
    for _, row in parse_jsonl(read_text(confidence, sys.stdin.buffer), confidence):
        rows.append({**row, "prompt": row["messages"]} if "messages" in row else row)
    if not rows:
        raise InvalidInputError(f"{confidence} holds no row.")
    kind: Literal["logistic", "isotonic"] = "isotonic" if method == "isotonic" else "logistic"
    if method != kind:
        raise InvalidInputError(f"The method is logistic or isotonic, not {method!r}.")
    engine = load_engine(model, dtype, device)
    fitted = ConfidenceCalibrator.fit_rows(
        rows, engine=engine, names=names_in(scores), method=kind, seed=seed, progress=show_progress(quiet)
    )
    fitted.save(target)
    if as_json:
        print_json({**fitted.model_dump(mode="json"), "out": str(target)})
        return
    from rich.console import Console
    from rich.table import Table

    table = Table("cross-validated on held-out rows", "value")
    for key, value in fitted.metrics.model_dump(mode="json").items():
        table.add_row(key, f"{value:.4f}" if isinstance(value, float) else str(value))
    console = Console()
    console.print(f"{fitted.method} over {', '.join(fitted.names)}, {fitted.rows} rows ({fitted.left_out} left out).")
    console.print(table)
    console.print(f"Saved to {target}.", soft_wrap=True)


def _target(name: str | None, out: Path | None) -> Path:
    if (name is None) == (out is None):
        raise InvalidInputError("Give --name or --out, one of the two.")
    if out is not None:
        if out.suffix != ".json":
            raise InvalidInputError(f"{str(out)!r} does not end in .json.")
        return out
    assert name is not None
    from kvroute.calibration import FOLDER_VARIABLE

    if not re.fullmatch(r"[A-Za-z0-9][A-Za-z0-9._-]*", name):
        raise InvalidInputError(f"{name!r} is not a name.", hint="Letters, digits, '.', '-' and '_', no path.")
    folder = os.environ.get(FOLDER_VARIABLE)
    if not folder:
        raise InvalidInputError(f"--name needs the folder {FOLDER_VARIABLE}.", hint="Set it, or give --out FILE.json.")
    return Path(folder) / f"{name}.json"
