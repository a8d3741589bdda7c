"""The command line: one module a command. Heavy imports happen inside the commands."""

from __future__ import annotations

import sys
from typing import Annotated

import typer

from kvroute._version import __version__
from kvroute.cli import ask, calibrate, doctor, embed, evaluate, info, label, reproduce, route, score, serve, train, ui
from kvroute.cli.common import close_engines, remember_command
from kvroute.errors import KVRouteError

app = typer.Typer(
    name="kvroute",
    help="Embeddings, self-evaluation and thinking-mode routing from the KV cache a language model already keeps.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode="rich",
)
app.command("info")(info.command)
app.command("doctor")(doctor.command)
app.command("embed")(embed.command)
app.command("label")(label.command)
app.command("route")(route.command)
app.command("score")(score.command)
app.command("ask")(ask.command)
app.command("calibrate")(calibrate.command)
app.add_typer(evaluate.app, name="evaluate")
app.command("train")(train.command)
app.command("ui")(ui.command)
app.command("reproduce")(reproduce.command)
app.command("serve", context_settings=serve.SETTINGS)(serve.command)


_debugging = False


def _version(wanted: bool) -> None:
    if wanted:
        typer.echo(__version__)
        raise typer.Exit


@app.callback()
def _options(
    _show_version: Annotated[
        bool, typer.Option("--version", help="Print the version.", callback=_version, is_eager=True)
    ] = False,
    debug: Annotated[bool, typer.Option("--debug", help="Show the traceback of an error.")] = False,
) -> None:
    """Options that stand before the command."""
    global _debugging
    _debugging = debug


def main(arguments: list[str] | None = None) -> None:
    """Run a command. Exit codes: 0 done, 2 an input or an option that can't be used, 130 interrupted."""
    given = sys.argv[1:] if arguments is None else arguments
    remember_command([str(word) for word in given])
    try:
        app(given)
    except KVRouteError as error:
        if _debugging:
            raise
        typer.echo(f"kvroute: {error}", err=True)
        sys.exit(2)
    finally:
        close_engines()
