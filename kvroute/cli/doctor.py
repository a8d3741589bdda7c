"""``kvroute doctor``: what works here, and what is wrong."""

from __future__ import annotations

import os
from typing import TYPE_CHECKING, Annotated

import typer

from kvroute.cli.common import Json, names_in, print_json
from kvroute.engines.handle import KEY_VARIABLE
from kvroute.errors import InvalidInputError

if TYPE_CHECKING:
    from rich.table import Table

    from kvroute.doctor import Diagnosis

Servers = Annotated[
    str | None,
    typer.Option("--engine", help="Addresses of vLLM servers to ask too, with commas between. Key: KVROUTE_API_KEY."),
]


def command(engine: Servers = None, as_json: Json = False) -> None:
    """Say what is installed, which engines and kernels will be used, and what is wrong.

    Exit code 1 if something stops kvroute from running a model at all.
    """
    from kvroute.doctor import diagnose

    servers = names_in(engine) or []
    if not all(url.startswith(("http://", "https://")) for url in servers):
        raise InvalidInputError(f"--engine takes addresses of servers, not {engine!r}.")
    found = diagnose(servers, api_key=os.environ.get(KEY_VARIABLE))
    if as_json:
        print_json(found.to_dict())
    else:
        _show(found)
    if not found.ok:
        raise typer.Exit(1)


def _show(found: Diagnosis) -> None:
    from rich.console import Console

    console = Console()
    for table in (_facts(found), _packages(found), _engines(found)):
        if table.row_count:
            console.print(table)
    for problem in found.problems:
        sign = "[red]STOPS[/red]" if problem.stops else "[yellow]NOTE[/yellow]"
        console.print(sign, end=" ", soft_wrap=True)
        console.print(f"{problem.what}\n      -> {problem.mend}", soft_wrap=True, markup=False, highlight=False)
    if found.ok:
        console.print("kvroute can run models here." if found.problems else "kvroute can run models here; all is well.")
    else:
        console.print("kvroute can't run models here.")


def _facts(found: Diagnosis) -> Table:
    from rich.markup import escape
    from rich.table import Table

    table = Table(show_header=False)
    for name, version in found.versions.items():
        table.add_row(name, version)
    table.add_row("system", f"{found.machine['system']}, {found.machine['cores']} cores, {found.machine['cpu']}")
    if found.device is not None:
        table.add_row("device", f"{found.device}: {found.device_name}")
    for kernel in found.kernels:
        table.add_row(f"kernels, {kernel.dtype}", escape(f"{kernel.backend}: {kernel.why}"))
    for folder in found.folders:
        left = "" if folder.free is None else f", {folder.free / 1e9:.0f} GB left"
        table.add_row(folder.what, f"{folder.path} ({'can' if folder.writable else 'CAN NOT'} be written to{left})")
    for name, state in found.models.items():
        table.add_row(f"model {name}", state)
    for group, there in found.plugins.items():
        table.add_row(group, "kvroute is there" if there else "kvroute is not there")
    return table


def _packages(found: Diagnosis) -> Table:
    from rich.table import Table

    table = Table("package", "for", "installed", "asked", "tested with", "")
    for p in found.packages:
        state = "" if p.state == "ok" else p.state
        table.add_row(p.name, ", ".join(p.extras) or "kvroute", p.version or "-", p.asked, p.tested, state)
    return table


def _engines(found: Diagnosis) -> Table:
    from rich.markup import escape
    from rich.table import Table

    table = Table("engine", "usable", "how, or why not")
    for engine in found.engines:
        table.add_row(engine.name, "yes" if engine.usable else "no", escape(engine.why))
    return table
