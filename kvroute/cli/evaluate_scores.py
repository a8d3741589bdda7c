"""``kvroute evaluate scores``: what scores of answers are worth on answers that are known to be right or wrong."""

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
    Head,
    Json,
    Model,
    Quiet,
    command_line,
    load_engine,
    print_json,
    require_caches,
    show_progress,
)
from kvroute.errors import InvalidInputError


def command(
    answers: Annotated[
        list[Path],
        typer.Argument(help="Files of kvroute label, or JSON Lines with question, answer and correct; each is a set."),
    ],
    out: Annotated[Path, typer.Option("--out", "-o", help="A folder for report.json and report.html.")],
    model: Model = "smollm2",
    head: Head = None,
    part: Annotated[
        str, typer.Option(help="The part to judge: test, calibration or all; by default test of files of labels.")
    ] = "auto",
    mode: Annotated[str, typer.Option(help="Answers of files of labels: fast, slow or both.")] = "both",
    limit: Annotated[int | None, typer.Option(min=1, help="Only the first n rows of each file.")] = None,
    folds: Annotated[int, typer.Option(min=2, help="Of the maps that are cross-fitted.")] = 5,
    seed: Annotated[int, typer.Option(min=0, help="Of folds and resampling.")] = 0,
    bootstrap: Annotated[int, typer.Option(min=100, help="Resamples of the intervals.")] = 2000,
    dtype: Dtype = "auto",
    device: Device = None,
    engine_name: EngineName = "transformers",
    force: Force = False,
    quiet: Quiet = False,
    as_json: Json = False,
) -> None:
    """AUROC, calibration and risk-coverage of every score of an answer, with intervals and paired tests.

    What is read is kept in OUT/features: a run that was killed goes on, and a second one runs no model.
    """
    require_caches(engine_name, "kvroute evaluate scores")
    from kvroute.heads import DifficultyHead
    from kvroute.labelled_answers import read_answer_sets
    from kvroute.reports.plots import require_matplotlib
    from kvroute.score_evaluation import evaluate_scores
    from kvroute.score_report import REPORT

    require_matplotlib()
    if (out / REPORT).exists() and not force:
        raise InvalidInputError(f"{out / REPORT} is there already.", hint="Pass --force to replace it.")
    missing = next((path for path in answers if not path.is_file()), None)
    if missing is not None:
        raise InvalidInputError(f"{missing} is no file.")
    engine = load_engine(model, dtype, device, engine_name)
    loaded = None if head is None else DifficultyHead.load(head, engine.info)
    sets = [s for path in answers for s in read_answer_sets(path, engine, part=part, mode=mode, limit=limit)]
    if len({s.name for s in sets}) < len(sets):
        raise InvalidInputError("Two files have the same name.", hint="Rename one: a set is called after its file.")
    report = evaluate_scores(
        engine, sets, head=loaded, folder=out / "features", folds=folds, seed=seed, resamples=bootstrap,
        progress=show_progress(quiet),
    )  # fmt: skip
    written = report.save(out, command=command_line())
    if as_json:
        print_json(_without_curves(report.to_dict()) | {"files": [str(p) for p in written]})
        return
    from rich.console import Console

    console = Console()
    if not console.is_terminal:
        console.width = 160
    for table in report.tables():
        console.print(table)
    console.print(report.summary, soft_wrap=True, markup=False, highlight=False)
    console.print(f"Written: {', '.join(str(p) for p in written)}.", soft_wrap=True, markup=False)


def _without_curves(report: dict[str, Any]) -> dict[str, Any]:
    """The report without its long lists, which are in the file."""
    short: dict[str, Any] = json.loads(json.dumps(report))
    for found in short["sets"].values():
        for score in found["scores"].values():
            score.pop("risk_coverage", None)
    return short
