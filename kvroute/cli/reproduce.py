"""``kvroute reproduce``: a recipe from its questions to a table of published figures and ours."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from kvroute.cli.common import (
    Device,
    Dtype,
    EngineName,
    Json,
    Quiet,
    command_line,
    load_engine,
    print_json,
    show_progress,
)
from kvroute.errors import InvalidInputError

if TYPE_CHECKING:
    from kvroute import TransformersEngine
    from kvroute.engines.base import Engine


def command(
    recipe: Annotated[str, typer.Argument(help="A recipe's name, or a .yaml file.")],
    out: Annotated[Path, typer.Option("--out", "-o", help="A folder for all results.")],
    data: Annotated[Path | None, typer.Option(help="The folder that the recipe's sets lie in.")] = None,
    limit: Annotated[int | None, typer.Option(help="At most so many rows of each set.")] = None,
    redo: Annotated[
        bool, typer.Option("--redo", help="Do anew what a changed recipe or changed data concerns.")
    ] = False,
    dtype: Dtype = "auto",
    device: Device = None,
    engine_name: EngineName = "transformers",
    quiet: Quiet = False,
    as_json: Json = False,
) -> None:
    """Label, train, calibrate and evaluate as a recipe says, and set what was published beside what came out.

    A run may be killed at any moment and goes on where it was. With --engine vllm the answers are written by vLLM,
    which is closed before transformers loads the model to read its caches.
    """
    from kvroute.recipes import load_recipe
    from kvroute.reproduction import Engines, Source, reproduce

    if limit is not None and limit < 1:
        raise InvalidInputError(f"--limit is at least 1, not {limit}.")
    if data is not None and not data.is_dir():
        raise InvalidInputError(f"{data} is no folder.")
    found, folder = load_recipe(recipe)
    local = folder / found.model
    model = str(local) if local.is_dir() else found.model
    kind = found.dtype if dtype == "auto" else dtype
    found = found.model_copy(update={"dtype": kind})  # what was run, not what might have been
    served = engine_name.startswith(("http://", "https://"))

    def write() -> Engine:
        return load_engine(
            model, "auto" if served else kind, device if engine_name == "transformers" else None, engine_name
        )

    def read() -> TransformersEngine:
        return load_engine(model, kind, device)

    result = reproduce(
        found, out, Engines(write, None if engine_name == "transformers" else read), Source(folder, data, limit),
        redo=redo, progress=show_progress(quiet), say=lambda text: typer.echo(text, err=True),
    )  # fmt: skip
    written = result.save(out, command_line())
    if as_json:
        print_json(result.to_dict() | {"files": [str(p) for p in written], "done": list(result.done),
                                       "skipped": list(result.skipped)})  # fmt: skip
        return
    from rich.console import Console

    console = Console()
    if not console.is_terminal:
        console.width = 120
    console.print(result.table())
    sys.stdout.flush()
    typer.echo(f"Written: {', '.join(str(p) for p in written)}.", err=True)
