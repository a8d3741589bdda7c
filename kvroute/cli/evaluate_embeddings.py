"""``kvroute evaluate embeddings``: keys and values beside hidden states of the same model and outside references."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from kvroute.cli.common import (
    Device,
    Dtype,
    Force,
    Json,
    Model,
    Quiet,
    command_line,
    load_engine,
    load_spec,
    names_in,
    print_json,
    show_progress,
)
from kvroute.errors import InvalidInputError

if TYPE_CHECKING:
    from kvroute import PoolingSpec


def command(
    data: Annotated[
        Path, typer.Option("--data", help="Folder with classification/, sts/ and retrieval/: see docs/evaluation.md.")
    ],
    out: Annotated[Path, typer.Option("--out", "-o", help="A folder for report.json and report.html.")],
    model: Model = "smollm2",
    preset: Annotated[str, typer.Option(help="Presets to measure, with commas between.")] = "best,fast,paper-mteb",
    spec: Annotated[
        list[Path] | None, typer.Option(help="A JSON file with a PoolingSpec to measure too; may be repeated.")
    ] = None,
    forms: Annotated[
        str, typer.Option(help="Ways to put a text to the model, with commas between: plain, prompt, twice.")
    ] = "plain",
    search: Annotated[
        bool, typer.Option("--search", help="Choose among ways to pool keys and values on the dev rows, too.")
    ] = False,
    train: Annotated[
        bool, typer.Option("--train", help="Train linear projections on pairs of the open rows, too.")
    ] = False,
    references: Annotated[
        str | None,
        typer.Option(help="minilm, bm25, folders of sentence-transformers models, or none; by default what can run."),
    ] = None,
    rows: Annotated[
        int | None,
        typer.Option(min=8, help="Train rows a classification set; other sets in proportion. All by default."),
    ] = None,
    dimension: Annotated[int, typer.Option(min=1, help="Sizes kept by the whitening, the same for all.")] = 256,
    fit_texts: Annotated[int, typer.Option(min=8, help="Short texts that the whitening is fitted on.")] = 1000,
    text_tokens: Annotated[int, typer.Option(min=1, help="Texts are cut here.")] = 256,
    document_tokens: Annotated[int, typer.Option(min=1, help="Documents are cut here.")] = 128,
    bootstrap: Annotated[int, typer.Option(min=20, help="Resamples of the intervals.")] = 500,
    seed: Annotated[int, typer.Option(help="Of the whitening's texts, the training and the resampling.")] = 0,
    dtype: Dtype = "auto",
    device: Device = None,
    force: Force = False,
    quiet: Quiet = False,
    as_json: Json = False,
) -> None:
    """Classification, STS, retrieval and clustering by presets, beside the same model's hidden states and references.

    A run that is killed goes on where it was when it is started again.
    """
    from kvroute.embedding_evaluation import EvaluationOptions, evaluate_embeddings, load_tasks
    from kvroute.embedding_evaluation.report import REPORT
    from kvroute.reports.plots import require_matplotlib

    require_matplotlib()
    options = EvaluationOptions(
        presets=tuple(names_in(preset) or ()),
        specs=_specs(spec or []),
        forms=tuple(names_in(forms) or ()),
        search=search,
        train=train,
        references=None if references is None else () if references == "none" else tuple(names_in(references) or ()),
        dimension=dimension,
        fit_texts=fit_texts,
        limits=(text_tokens, document_tokens),
        rounds=bootstrap,
        seed=seed,
    )
    if not options.presets and not options.specs:
        raise InvalidInputError("Neither a preset nor a spec was named.", hint="Pass --preset best, or --spec FILE.")
    if (out / REPORT).exists() and not force:
        raise InvalidInputError(f"{out / REPORT} is there already.", hint="Pass --force to replace it.")
    tasks = load_tasks(data, rows)
    engine = load_engine(model, dtype, device)
    report = evaluate_embeddings(engine, tasks, options, folder=out / "states", progress=show_progress(quiet))
    written = report.save(out, command=command_line())
    if as_json:
        print_json(report.to_dict() | {"files": [str(p) for p in written]})
        return
    typer.echo(report.markdown())
    for name, why in report.left_out.items():
        typer.echo(f"Left out: {name} ({why})")
    typer.echo(f"Written: {', '.join(str(p) for p in written)}.")


def _specs(files: list[Path]) -> dict[str, PoolingSpec]:
    found = {}
    for file in files:
        if file.stem in found:
            raise InvalidInputError(f"Two specs are named {file.stem}.", hint="Rename one of the files.")
        found[file.stem] = load_spec(str(file))
    return found
