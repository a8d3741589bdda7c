"""``kvroute evaluate routing``: what a head's difficulty is worth on questions it never saw, beside cheaper means."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated, Any

import typer

from kvroute.cli.common import (
    Device,
    Dtype,
    EngineName,
    Force,
    Json,
    Model,
    Quiet,
    command_line,
    load_engine,
    names_in,
    print_json,
    require_caches,
    show_progress,
)
from kvroute.errors import InvalidInputError


def command(
    labels: Annotated[Path, typer.Argument(help="The file that kvroute label wrote.")],
    head: Annotated[Path, typer.Option("--head", help="The folder that kvroute train wrote.")],
    out: Annotated[Path, typer.Option("--out", "-o", help="A folder for report.json, report.html and the plots.")],
    model: Model = "smollm2",
    baselines: Annotated[
        str | None, typer.Option(help="Names with commas between, or none; by default all that can run.")
    ] = None,
    part: Annotated[str, typer.Option(help="The part to judge on: test or calibration.")] = "test",
    points: Annotated[float, typer.Option(min=0, help="Tokens are compared this many points under always slow.")] = 1.0,
    seed: Annotated[int, typer.Option(help="Of the baselines' training and of the resampling.")] = 0,
    bootstrap: Annotated[int, typer.Option(min=100, help="Resamples of the intervals.")] = 2000,
    dtype: Dtype = "auto",
    device: Device = None,
    engine_name: EngineName = "transformers",
    force: Force = False,
    quiet: Quiet = False,
    as_json: Json = False,
) -> None:
    """Accuracy-tokens curve, AUROC, calibration error of a head, and of what it has to beat, with intervals."""
    require_caches(engine_name, "kvroute evaluate routing")
    from kvroute.heads import DifficultyHead
    from kvroute.label_rows import read_labels
    from kvroute.reports.plots import require_matplotlib
    from kvroute.reports.routing_page import PAGE, routing_page
    from kvroute.routing_baselines import EvaluationRows, check_baselines
    from kvroute.routing_evaluation import evaluate_head
    from kvroute.routing_report import REPORT

    require_matplotlib()
    names = None if baselines is None else [] if baselines == "none" else names_in(baselines)
    check_baselines(names or [])
    if (out / REPORT).exists() and not force:
        raise InvalidInputError(f"{out / REPORT} is there already.", hint="Pass --force to replace it.")
    rows, meta = read_labels(labels)
    EvaluationRows.of(rows, part)
    engine = load_engine(model, dtype, device, engine_name)
    engine.info.require(meta.fingerprint, f"{labels}", meta.model)
    loaded = DifficultyHead.load(head, engine.info)
    report = evaluate_head(
        loaded, rows, meta, engine, name=head.resolve().name, baselines=names, test=part, points=points, seed=seed,
        resamples=bootstrap, folder=out / "features", progress=show_progress(quiet),
    )  # fmt: skip
    page = routing_page(report, command=command_line())
    written = report.save(out)
    page.write(out / PAGE)
    written.append(out / PAGE)
    if as_json:
        print_json(_without_curves(report.to_dict()) | {"files": [str(p) for p in written]})
        return
    from rich.console import Console

    console = Console()
    for table in report.tables():
        console.print(table)
    for name, why in report.about["left_out"].items():
        console.print(f"Left out: {name} ({why})", soft_wrap=True, markup=False)
    console.print(f"Written: {', '.join(str(p) for p in written)}.", soft_wrap=True, markup=False)


def _without_curves(report: dict[str, Any]) -> dict[str, Any]:
    """The report without its long lists, which are in the file."""
    short: dict[str, Any] = json.loads(json.dumps(report))
    for policy in short["policies"].values():
        policy.pop("curve", None)
    return short
