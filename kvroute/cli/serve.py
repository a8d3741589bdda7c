"""``kvroute serve``: a vLLM server with kvroute in it."""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path
from typing import Annotated, Any

import typer

from kvroute.errors import InvalidInputError

SETTINGS = {"allow_extra_args": True, "ignore_unknown_options": True}
"""Options that are not ours are vLLM's. Ours have no short names: ``-tp 2`` would be read as ``-t -p 2``."""


def command(
    context: typer.Context,
    model: Annotated[str, typer.Argument(help="smollm2, a local folder or a hub id.")],
    policy: Annotated[
        Path | None, typer.Option("--policy", help="A folder of policies, each known by its file's name.")
    ] = None,
    heads: Annotated[
        Path | None, typer.Option(help="A folder of heads that tell how likely answers are right.")
    ] = None,
    name: Annotated[
        str | None, typer.Option("--name", help="What clients call the model; by default as it is given here.")
    ] = None,
    host: Annotated[str, typer.Option(help="Address to listen at; 0.0.0.0 for all.")] = "127.0.0.1",
    port: Annotated[int, typer.Option(help="Port to listen at.")] = 8000,
    settings: Annotated[
        str | None, typer.Option(help="More of the server's settings, as JSON or the name of a file with it.")
    ] = None,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Print the command, and start nothing.")] = False,
) -> None:
    """Start a vLLM server that embeds, scores and routes what it serves. Further options are handed to vLLM.

    The key of --api-key guards kvroute's routes as well as vLLM's own.
    """
    from kvroute.serving.launching import require_vllm, server_command, shown

    made = server_command(
        model, policies=policy, heads=heads, settings=_settings(settings), name=name, host=host, port=port,
        options=context.args,
    )  # fmt: skip
    typer.echo(shown(made), err=not dry_run)
    if dry_run:
        return
    require_vllm()
    sys.stdout.flush()
    os.execv(made[0], made)  # signals and exit code are the server's own


def _settings(given: str | None) -> dict[str, Any] | None:
    if given is None:
        return None
    text = given if given.lstrip().startswith("{") else _text(given)
    try:
        found = json.loads(text)
    except ValueError as error:
        raise InvalidInputError(f"--settings is no JSON: {error}") from error
    if not isinstance(found, dict):
        raise InvalidInputError("--settings is a JSON object, e.g. '{\"max_features\": 4}'.")
    return found


def _text(name: str) -> str:
    try:
        return Path(name).read_text()
    except OSError as error:
        raise InvalidInputError(f"{name} can't be read: {error.strerror or error}.") from error
