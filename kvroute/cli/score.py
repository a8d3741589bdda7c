"""``kvroute score``: answers in a file to scores in a file."""

from __future__ import annotations

import json
import sys
import time
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
    Restart,
    load_calibrator,
    load_engine,
    messages_in,
    names_in,
    print_json,
    work_to_run,
    work_to_stdout,
)
from kvroute.errors import InvalidInputError
from kvroute.rows import PartialRun, digest_of, parse_jsonl, read_text, text_field

_CHUNK = 32


def command(
    file: Annotated[
        str, typer.Argument(help="JSON Lines with prompt (or messages) and answer, or - for standard input.")
    ],
    out: Annotated[str, typer.Option("--out", "-o", help="A .jsonl file; - for standard output.")] = "-",
    model: Model = "smollm2",
    scores: Annotated[str | None, typer.Option(help="Scores or families, with commas between.")] = None,
    calibrator: Annotated[str | None, typer.Option(help="A calibrator's name or file, for a confidence.")] = None,
    head: Head = None,
    dtype: Dtype = "auto",
    device: Device = None,
    engine_name: EngineName = "transformers",
    restart: Restart = False,
    force: Force = False,
    quiet: Quiet = False,
    as_json: Json = False,
) -> None:
    """Score answers that exist. Each row comes back with scores, reasons where there is none, and a confidence."""
    from kvroute import SelfEvaluator

    if out != "-" and Path(out).suffix != ".jsonl":
        raise InvalidInputError(f"{out!r} does not end in .jsonl.")
    rows = parse_jsonl(read_text(file, sys.stdin.buffer), file)
    if not rows:
        raise InvalidInputError(f"{file} holds no row.")
    pairs = [(_prompt(row, file, number), text_field(row, "answer", file, number)) for number, row in rows]
    finish = [_finish(row, file, number) for number, row in rows]
    engine = load_engine(model, dtype, device, engine_name)
    fitted = load_calibrator(calibrator, engine.info)
    evaluator = SelfEvaluator(engine, calibrator=fitted, scores=names_in(scores), head=head)
    began = time.perf_counter()

    def chunk(start: int, stop: int) -> bytes:
        try:
            found = evaluator.score_many(pairs[start:stop], finish_reason=finish[start:stop], progress=False)
        except InvalidInputError as error:
            index = getattr(error, "index", None)
            where = f"line {rows[start + index][0]}" if index is not None else f"lines from {rows[start][0]}"
            raise InvalidInputError(f"{file}, {where}: {error}") from error
        lines = []
        for (_, row), evaluation in zip(rows[start:stop], found, strict=True):
            result = evaluation.to_dict()
            result.pop("seconds")  # differs from run to run, and the file shall not
            lines.append(json.dumps({**row, **result}, ensure_ascii=False, allow_nan=False))
        return ("\n".join(lines) + "\n").encode()

    if out == "-":
        work_to_stdout("Scoring", len(rows), _CHUNK, chunk, quiet=quiet)
        return
    identity = {
        "command": "score",
        "input": digest_of([row for _, row in rows]),
        "fingerprint": engine.info.fingerprint,
        "dtype": engine.info.dtype,
        "scores": list(evaluator.scores),
        "calibrator": None if fitted is None else fitted.model_dump(mode="json"),
        "head": None if evaluator.head is None else evaluator.head.digest,
    }
    with PartialRun(Path(out), identity, len(rows), chunk=_CHUNK, restart=restart, force=force) as run:
        resumed = work_to_run("Scoring", run, chunk, quiet=quiet)
        run.finish()
    if as_json:
        print_json({"rows": len(rows), "out": out, "resumed": resumed, "seconds": time.perf_counter() - began})
    else:
        typer.echo(f"{len(rows)} rows in {out}{f' ({resumed} were there already)' if resumed else ''}.", err=True)


def _prompt(row: dict[str, Any], file: str, number: int) -> Any:
    messages = messages_in(row, file, number)
    return messages if messages is not None else text_field(row, "prompt", file, number)


def _finish(row: dict[str, Any], file: str, number: int) -> Any:
    reason = row.get("finish_reason") or "stop"
    if reason not in ("stop", "length", "cancelled"):
        raise InvalidInputError(f"{file}, line {number}: finish_reason is stop, length or cancelled, not {reason!r}.")
    return reason
