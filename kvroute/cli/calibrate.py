"""``kvroute calibrate``: a confidence from checked answers, or a routing policy with a stated guarantee."""

from __future__ import annotations

import os
import sys
from pathlib import Path
from typing import Annotated, Literal

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
    names_in,
    print_json,
    require_caches,
    show_progress,
)
from kvroute.errors import InvalidInputError
from kvroute.files import is_name
from kvroute.rows import parse_jsonl, read_text


def command(
    confidence: Annotated[
        str | None,
        typer.Option(
            "--confidence",
            help="JSON Lines with correct (true or false) and either scores, or prompt (or messages) and answer.",
        ),
    ] = None,
    routing: Annotated[Path | None, typer.Option("--routing", help="The file that kvroute label wrote.")] = None,
    head: Annotated[Path | None, typer.Option("--head", help="Routing: the folder that kvroute train wrote.")] = None,
    max_loss: Annotated[
        float | None,
        typer.Option("--max-loss", help="Routing: at most this many points of accuracy below always slow."),
    ] = None,
    max_tokens: Annotated[
        float | None, typer.Option("--max-tokens", help="Routing: at most this many tokens a question, on the mean.")
    ] = None,
    max_slow: Annotated[
        float | None, typer.Option("--max-slow", help="Routing: think about at most this share of the questions.")
    ] = None,
    delta: Annotated[float, typer.Option(help="Routing: probability that the promise is broken.")] = 0.1,
    policy: Annotated[str, typer.Option(help="Routing: one-step, or two-step (runs every candidate).")] = "one-step",
    candidates: Annotated[
        int | None, typer.Option(min=1, help="Routing: how many to try at most; by default 60, two-step 6.")
    ] = None,
    name: Annotated[
        str | None,
        typer.Option(help="Save as NAME.json in the folder KVROUTE_CALIBRATORS (routing: KVROUTE_POLICIES)."),
    ] = None,
    out: Annotated[Path | None, typer.Option("--out", "-o", help="Save to this .json file instead.")] = None,
    method: Annotated[str, typer.Option(help="logistic (one or several scores) or isotonic (one).")] = "logistic",
    scores: Annotated[str | None, typer.Option(help="Scores or families to read, with commas between.")] = None,
    seed: Annotated[int, typer.Option(help="Of the cross-validation; routing: of the drift reference.")] = 0,
    model: Model = "smollm2",
    dtype: Dtype = "auto",
    device: Device = None,
    engine_name: EngineName = "transformers",
    force: Force = False,
    quiet: Quiet = False,
    as_json: Json = False,
) -> None:
    """Fit a confidence in [0, 1] (--confidence), or find the cheapest policy that keeps a promise (--routing)."""
    from kvroute import ConfidenceCalibrator
    from kvroute.calibration import FOLDER_VARIABLE

    if (confidence is None) == (routing is None):
        raise InvalidInputError("Give --confidence or --routing, one of the two.")
    if routing is not None:
        require_caches(engine_name, "kvroute calibrate --routing")
        from kvroute.cli.calibrate_routing import calibrate_routing
        from kvroute.policy import FOLDER_VARIABLE as POLICIES

        calibrate_routing(
            routing, head, _target(name, out, POLICIES), max_loss=max_loss, max_tokens=max_tokens, max_slow=max_slow,
            delta=delta, kind=policy, candidates=candidates, model=model, dtype=dtype, device=device, seed=seed,
            force=force, quiet=quiet, as_json=as_json,
        )  # fmt: skip
        return
    assert confidence is not None
    if head is not None or (max_loss, max_tokens, max_slow) != (None, None, None):
        raise InvalidInputError("--head and the promises are for --routing.")
    target = _target(name, out, FOLDER_VARIABLE)
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
    engine = load_engine(model, dtype, device, engine_name)
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


def _target(name: str | None, out: Path | None, variable: str) -> Path:
    if (name is None) == (out is None):
        raise InvalidInputError("Give --name or --out, one of the two.")
    if out is not None:
        if out.suffix != ".json":
            raise InvalidInputError(f"{str(out)!r} does not end in .json.")
        return out
    assert name is not None
    if not is_name(name):
        raise InvalidInputError(f"{name!r} is not a name.", hint="Letters, digits, '.', '-' and '_', no path.")
    folder = os.environ.get(variable)
    if not folder:
        raise InvalidInputError(f"--name needs the folder {variable}.", hint="Set it, or give --out FILE.json.")
    return Path(folder) / f"{name}.json"
