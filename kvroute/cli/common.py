"""Options and helpers that commands share."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from kvroute.errors import InvalidInputError

if TYPE_CHECKING:
    from kvroute import ConfidenceCalibrator, ModelInfo, PoolingSpec, TransformersEngine
    from kvroute.rows import PartialRun

Model = Annotated[str, typer.Option("--model", "-m", help="smollm2, a local folder or a hub id.")]
Dtype = Annotated[str, typer.Option(help="float32, bfloat16, float16 or auto.")]
Device = Annotated[str | None, typer.Option(help="cpu, cuda, ...; by default a GPU if there is one.")]
Json = Annotated[bool, typer.Option("--json", help="Print one JSON object.")]
Quiet = Annotated[bool, typer.Option("--quiet", "-q", help="No progress bar.")]
Head = Annotated[
    str | None,
    typer.Option("--head", help="A trained confidence: the folder that kvroute train --target correct made."),
]
Restart = Annotated[bool, typer.Option("--restart", help="Drop what an earlier run left, and begin anew.")]
Force = Annotated[bool, typer.Option("--force", help="Replace an output that is there already.")]
CHUNK = 256
"""Rows a chunk of a run that can be resumed."""


def load_engine(model: str, dtype: str, device: str | None) -> TransformersEngine:
    """The engine, loaded without transformers' own progress bars."""
    from transformers.utils import logging as transformers_logging

    from kvroute import TransformersEngine

    transformers_logging.disable_progress_bar()
    return TransformersEngine.from_pretrained(model, dtype=dtype, device=device)


def load_spec(name: str) -> PoolingSpec:
    """A preset, or a spec from a JSON file."""
    from kvroute import PRESETS, PoolingSpec

    if name in PRESETS:
        return PRESETS[name]
    path = Path(name)
    if not path.is_file():
        raise InvalidInputError(
            f"{name!r} is no preset and no file.", hint=f"Presets: {', '.join(PRESETS)}; or a JSON file with a spec."
        )
    return PoolingSpec.from_json(path.read_bytes())


def load_calibrator(name: str | None, info: ModelInfo) -> ConfidenceCalibrator | None:
    """A calibrator by name, or from a file."""
    from kvroute import ConfidenceCalibrator

    if name is None:
        return None
    if Path(name).is_file():
        return ConfidenceCalibrator.load(name, info)
    return ConfidenceCalibrator.by_name(name, info)


def print_json(value: Any) -> None:
    """One JSON object on standard output."""
    sys.stdout.write(json.dumps(value, ensure_ascii=False, allow_nan=False) + "\n")


def names_in(text: str | None) -> list[str] | None:
    """Names with commas between, or None for the default."""
    return None if text is None else [name.strip() for name in text.split(",") if name.strip()]


def messages_in(row: Mapping[str, Any], file: object, number: int) -> list[dict[str, Any]] | None:
    """A row's chat, or None where it has none.

    Raises:
        InvalidInputError: it is no list of objects, naming the line.
    """
    if "messages" not in row:
        return None
    messages = row["messages"]
    if not isinstance(messages, list) or not messages or not all(isinstance(m, dict) for m in messages):
        raise InvalidInputError(f"{file}, line {number}: messages is not a list of objects.")
    return messages


def work_to_stdout(label: str, rows: int, size: int, work: Callable[[int, int], bytes], *, quiet: bool) -> None:
    """Do ``rows`` in chunks of ``size`` and print what ``work(start, stop)`` gives."""
    from kvroute.progress import progress_bar

    with progress_bar(label, rows, show=show_progress(quiet)) as advance:
        for start in range(0, rows, size):
            stop = min(start + size, rows)
            sys.stdout.write(work(start, stop).decode())
            advance(stop - start)


def work_to_run(label: str, run: PartialRun, work: Callable[[int, int], bytes], *, quiet: bool) -> int:
    """Do the chunks that a run still misses; returns how many rows were there already."""
    from kvroute.progress import progress_bar

    missing = run.missing
    resumed = run.rows - sum(stop - start for start, stop in missing)
    with progress_bar(label, run.rows, show=show_progress(quiet)) as advance:
        advance(resumed)
        for start, stop in missing:
            run.write(start, work(start, stop))
            advance(stop - start)
    return resumed


def show_progress(quiet: bool) -> bool | None:
    """False where bars are unwanted, None for 'on a terminal'."""
    return False if quiet else None
