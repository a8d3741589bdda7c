"""Options and helpers that commands share."""

from __future__ import annotations

import json
import os
import shlex
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, cast

import typer

from kvroute.engines.handle import KEY_VARIABLE
from kvroute.errors import InvalidInputError, ModelMismatchError
from kvroute.rows import messages_in as messages_in

if TYPE_CHECKING:
    from kvroute import ConfidenceCalibrator, ModelInfo, PoolingSpec, TransformersEngine, VLLMClient, VLLMEngine
    from kvroute.rows import PartialRun

Model = Annotated[str, typer.Option("--model", "-m", help="smollm2, a local folder or a hub id.")]
Dtype = Annotated[str, typer.Option(help="float32, bfloat16, float16 or auto.")]
Device = Annotated[str | None, typer.Option(help="cpu, cuda, ...; by default a GPU if there is one.")]
EngineName = Annotated[
    str,
    typer.Option(
        "--engine",
        help="transformers, vllm (in this process), or the address of a vLLM server that kvroute serve started; "
        "several with commas between. Its key is read from KVROUTE_API_KEY.",
    ),
]
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


def load_engine(
    model: str, dtype: str, device: str | None, engine: str = "transformers", *, policy: str | None = None
) -> TransformersEngine:
    """The engine that a command works with, loaded without transformers' own progress bars.

    Those of vLLM's have the same interface as far as the commands use it; they are closed when the command ends. vLLM
    in this process decides under the policies that lie beside ``policy``; a server has its own.

    Raises:
        InvalidInputError: no such engine, or an option that it does not take.
        ModelMismatchError: the server has another model's tokens.
    """
    from transformers.utils import logging as transformers_logging

    transformers_logging.disable_progress_bar()
    if engine != "transformers":
        found: Any = _vllm(model, dtype, device, engine, policy)
        _open.append(found)
        return cast("TransformersEngine", found)
    from kvroute import TransformersEngine

    return TransformersEngine.from_pretrained(model, dtype=dtype, device=device)


def _vllm(model: str, dtype: str, device: str | None, engine: str, policy: str | None) -> VLLMEngine | VLLMClient:
    if device is not None:
        raise InvalidInputError(
            "--device is for --engine transformers.", hint="vLLM takes the device it was built for."
        )
    if engine == "vllm":
        from kvroute import VLLMEngine

        os.environ.setdefault("VLLM_LOGGING_STREAM", "ext://sys.stderr")  # standard output is for what was asked for
        return VLLMEngine(model, policies=None if policy is None else _policies_beside(policy), dtype=dtype)
    urls = names_in(engine) or []
    if not all(url.startswith(("http://", "https://")) for url in urls) or not urls:
        raise InvalidInputError(f"The engine is transformers, vllm or an address, not {engine!r}.")
    if dtype != "auto":
        raise InvalidInputError("--dtype is the server's own affair.", hint="Give it to kvroute serve.")
    from kvroute import VLLMClient
    from kvroute.token_weights import vocabulary_digest

    client = VLLMClient(urls, tokenizer=model, api_key=os.environ.get(KEY_VARIABLE))
    try:
        theirs, ours = client.about.vocabulary, vocabulary_digest(client.tokenizer)
        if theirs is not None and theirs != ours:
            raise ModelMismatchError(
                f"The server runs {client.info.name}, whose tokens are not those of {model}.",
                hint="Give the served model, or the folder of its tokenizer, as --model.",
            )
    except BaseException:
        client.close()
        raise
    return client


def _policies_beside(policy: str) -> Path | None:
    """The folder of a policy's file, which is read in another process; None for a mode."""
    from kvroute.policy import find_policy

    folder = find_policy(policy)[1]
    return None if folder is None else folder.resolve()


_open: list[VLLMEngine | VLLMClient] = []


def close_engines() -> None:
    """Let go of the engines that commands have loaded."""
    while _open:
        _open.pop().close()


def require_caches(engine: str, what: str) -> None:
    """Refuse an engine that hands out no caches.

    Raises:
        InvalidInputError: it is one of vLLM's.
    """
    if engine != "transformers":
        raise InvalidInputError(
            f"{what} reads caches that vLLM does not hand out.", hint="Use --engine transformers for it."
        )


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


_words: list[str] = []


def remember_command(words: Sequence[str]) -> None:
    """Keep the words that kvroute was called with, for reports."""
    _words[:] = words


def command_line() -> str:
    """The command that runs, as a shell takes it."""
    return shlex.join(["kvroute", *_words])


def print_json(value: Any) -> None:
    """One JSON object on standard output."""
    sys.stdout.write(json.dumps(value, ensure_ascii=False, allow_nan=False) + "\n")


def names_in(text: str | None) -> list[str] | None:
    """Names with commas between, or None for the default."""
    return None if text is None else [name.strip() for name in text.split(",") if name.strip()]


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
