"""``kvroute label``: questions with answers to labels of how difficult the model finds them."""

from __future__ import annotations

import sys
import time
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from kvroute.cli.common import (
    Device,
    Dtype,
    EngineName,
    Force,
    Json,
    Model,
    Quiet,
    Restart,
    load_engine,
    print_json,
    show_progress,
    work_to_run,
)
from kvroute.errors import InvalidInputError
from kvroute.rows import PartialRun, parse_jsonl, read_text

if TYPE_CHECKING:
    from collections.abc import Sequence

    from kvroute.label_rows import LabelRow, Part
    from kvroute.labelling import Labeller
    from kvroute.questions import Question
    from kvroute.thinking import ThinkingMode

_CHUNK, _SERVED_CHUNK = 64, 512


def command(
    file: Annotated[
        str, typer.Argument(help="JSON Lines with question, answer and answer_type, or - for standard input.")
    ],
    out: Annotated[Path, typer.Option("--out", "-o", help="A .jsonl file for the labels.")],
    model: Model = "smollm2",
    checkpoints: Annotated[int | None, typer.Option(help="Also close the thought at every n-th token.")] = None,
    samples: Annotated[int, typer.Option(help="Answers a mode; several give a soft label.")] = 1,
    temperature: Annotated[float, typer.Option(help="0 takes the likeliest tokens.")] = 0.0,
    seed: Annotated[int, typer.Option(help="Of the sampling.")] = 0,
    max_fast: Annotated[int, typer.Option(help="Tokens of a fast answer at most.")] = 256,
    max_slow: Annotated[int, typer.Option(help="Tokens of a slow answer at most.")] = 1024,
    short: Annotated[int, typer.Option(help="A right fast answer of fewer tokens has label 0, else 25.")] = 128,
    prompt: Annotated[str, typer.Option(help="The user's message.")] = "{question}",
    fast_instruction: Annotated[
        str | None, typer.Option(help="For a model without thinking tokens: what makes it answer at once.")
    ] = None,
    slow_instruction: Annotated[str | None, typer.Option(help="And what makes it think first.")] = None,
    thinking: Annotated[Path | None, typer.Option(help="A ThinkingMode in a JSON file.")] = None,
    tolerance: Annotated[
        float | None, typer.Option(help="Relative error allowed in numbers, such as 0.04 for TheoremQA.")
    ] = None,
    shares: Annotated[
        str, typer.Option(help="Of train, validation, calibration and test among the questions.")
    ] = "0.5,0.15,0.2,0.15",
    limit: Annotated[int | None, typer.Option(help="Only the first n questions.")] = None,
    chunk: Annotated[
        int | None,
        typer.Option(
            help="Questions answered together, of which a killed run loses one lot; by default 64, or 512 by "
            "vLLM, which is kept full."
        ),
    ] = None,
    retry: Annotated[bool, typer.Option("--retry", help="Label the rows of OUT that failed once more.")] = False,
    dtype: Dtype = "auto",
    device: Device = None,
    engine_name: EngineName = "transformers",
    restart: Restart = False,
    force: Force = False,
    quiet: Quiet = False,
    as_json: Json = False,
) -> None:
    """Answer questions in both modes, check the answers, and label how difficult each question is."""
    from kvroute.label_files import write_labels
    from kvroute.label_rows import read_labels
    from kvroute.labelling import Labeller
    from kvroute.questions import read_questions

    if out.suffix != ".jsonl":
        raise InvalidInputError(f"{str(out)!r} does not end in .jsonl.")
    for name, value in (("--limit", limit), ("--chunk", chunk)):
        if value is not None and value < 1:
            raise InvalidInputError(f"{name} is at least 1, not {value}.")
    if chunk is None:
        chunk = _CHUNK if engine_name == "transformers" else _SERVED_CHUNK
    parts = _shares(shares)
    pair = _thinking(thinking, fast_instruction, slow_instruction)
    rows = parse_jsonl(read_text(file, sys.stdin.buffer), file)[:limit]
    if not rows:
        raise InvalidInputError(f"{file} holds no question.")
    questions = read_questions(rows, file)
    checkers = _checkers(tolerance, questions)
    if not retry and out.exists() and not force:  # before a model is loaded
        raise InvalidInputError(f"{out} is there already.", hint="Pass --force to replace it, or --retry.")
    labeller = Labeller(
        load_engine(model, dtype, device, engine_name),
        thinking=pair,
        checkers=checkers,
        max_tokens={"fast": max_fast, "slow": max_slow},
        short=short,
        samples=samples,
        temperature=temperature,
        seed=seed,
        checkpoints=checkpoints,
        shares=parts,
        prompt=prompt,
    )
    began = time.perf_counter()
    if retry:
        resumed, todo = _retry(labeller, questions, out, tolerance, chunk, restart, quiet)
    else:
        todo = len(questions)
        resumed = write_labels(
            labeller, questions, out, chunk=chunk, identity={"tolerance": tolerance}, restart=restart, force=force,
            progress=show_progress(quiet),
        )  # fmt: skip
    _report(read_labels(out)[0], out, short, todo, resumed, time.perf_counter() - began, as_json)


def _retry(
    labeller: Labeller,
    questions: Sequence[Question],
    out: Path,
    tolerance: float | None,
    chunk: int,
    restart: bool,
    quiet: bool,
) -> tuple[int, int]:
    """Label failed rows once more, in their places; how many were there already, and how many there are."""
    from kvroute.label_files import label_lines
    from kvroute.label_rows import read_labels

    meta = labeller.meta(questions)
    rows, found = read_labels(out)
    changed = [
        name
        for name, value in meta.model_dump(mode="json").items()
        if name != "versions" and value != found.model_dump(mode="json")[name]
    ]
    if changed or [r.id for r in rows] != [q.id for q in questions]:
        raise InvalidInputError(
            f"{out} was labelled otherwise: {', '.join(changed) or 'other questions'}.",
            hint="Give the same questions, model and options as before.",
        )
    failed = [i for i, row in enumerate(rows) if row.label is None]
    if not failed:
        return 0, 0
    identity = {
        "command": "label",
        "meta": meta.model_dump(mode="json"),
        "dtype": labeller.engine.info.dtype,
        "tolerance": tolerance,
        "retry": [rows[i].id for i in failed],
    }

    def work(start: int, stop: int) -> bytes:
        return label_lines(labeller.label([questions[i] for i in failed[start:stop]]))

    with PartialRun(out, identity, len(failed), chunk=chunk, restart=restart, force=True) as run:
        resumed = work_to_run("Labelling again", run, work, quiet=quiet)

        def join(chunks: Any) -> list[bytes]:
            lines = [label_lines([row]) for row in rows]
            for place, line in zip(failed, b"".join(chunks).splitlines(keepends=True), strict=True):
                lines[place] = line
            return lines

        run.finish(join)
    return resumed, len(failed)


def _shares(text: str) -> dict[Part, float]:
    from kvroute.label_rows import PARTS
    from kvroute.skeletons import check_shares

    try:
        values = [float(v) for v in text.split(",")]
    except ValueError:
        values = []
    if len(values) != len(PARTS):
        raise InvalidInputError(f"--shares is four numbers with commas between, not {text!r}.")
    return check_shares(dict(zip(PARTS, values, strict=True)))


def _thinking(file: Path | None, fast: str | None, slow: str | None) -> ThinkingMode | None:
    from kvroute.thinking import ThinkingMode

    if file is not None and (fast is not None or slow is not None):
        raise InvalidInputError("--thinking and the instructions exclude each other.")
    if file is not None:
        if not file.is_file():
            raise InvalidInputError(f"{file} is no file.")
        return ThinkingMode.from_json(file.read_bytes())
    if fast is None and slow is None:
        return None
    given = {"fast": fast, "slow": slow}
    return ThinkingMode.instructions(**{k: f"\n{v}" for k, v in given.items() if v is not None})


def _checkers(tolerance: float | None, questions: Sequence[Question]) -> dict[str, Any]:
    from kvroute.checkers import number_within

    if any(q.answer_type == "latex" for q in questions):
        from kvroute.latex_checker import LatexChecker

        LatexChecker()  # MissingExtraError now, not after hours
    return {} if tolerance is None else {name: number_within(tolerance) for name in ("number", "list")}


def _report(
    rows: Sequence[LabelRow], out: Path, short: int, todo: int, resumed: int, seconds: float, as_json: bool
) -> None:
    from kvroute.label_summary import summarise, summary_dict, summary_table

    groups = summarise(rows, short)
    failed = [r for r in rows if r.label is None]
    if as_json:
        totals = {"rows": len(rows), "labelled": todo, "resumed": resumed, "failed": len(failed)}
        print_json({"out": str(out), **totals, "seconds": seconds, **summary_dict(groups)})
        return
    from rich.console import Console

    console = Console()
    if not console.is_terminal:
        console.width = 120
    console.print(summary_table(groups))
    typer.echo(f"{len(rows)} rows in {out}{f' ({resumed} were there already)' if resumed else ''}.", err=True)
    if failed:
        typer.echo(
            f"{len(failed)} rows failed, the first with: {failed[0].error} Pass --retry to label them once more.",
            err=True,
        )
