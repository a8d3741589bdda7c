"""``kvroute info``: what a model is, to kvroute."""

from __future__ import annotations

from typing import Annotated, Any

import typer

from kvroute.cli.common import Device, Dtype, EngineName, Json, load_engine, print_json


def command(
    model: Annotated[str, typer.Argument(help="smollm2, a local folder or a hub id.")],
    dtype: Dtype = "auto",
    device: Device = None,
    engine_name: EngineName = "transformers",
    as_json: Json = False,
) -> None:
    """Show a model's layers, sizes and fingerprint, and what each preset gives on it."""
    from kvroute import PRESETS, KVRouteError

    info = load_engine(model, dtype, device, engine_name).info
    presets: dict[str, dict[str, Any]] = {}
    for name, spec in PRESETS.items():
        try:
            presets[name] = {"dimension": spec.dimension(info), "layers_run": spec.deepest_layer(info) + 1}
        except KVRouteError as error:
            presets[name] = {"error": str(error)}
    if as_json:
        print_json({**info.model_dump(mode="json"), "fingerprint": info.fingerprint, "presets": presets})
        return
    from rich.console import Console
    from rich.table import Table

    windows = sorted({str(layer.window or "all tokens") for layer in info.layers})
    sizes = sorted({layer.sizes for layer in info.layers})
    facts = {
        "model": info.name,
        "architecture": info.architecture,
        "fingerprint": info.fingerprint,
        "dtype": info.dtype,
        "attention layers": f"{info.num_layers} of {info.model_layers}",
        "KV heads x key size, value size": ", ".join(f"{h} x {k}, {v}" for h, k, v in sizes),
        "layers attend to": ", ".join(windows),
        "context": f"{info.context} tokens",
        "hidden size": str(info.hidden_size),
        "vocabulary": str(info.vocab_size),
    }
    console = Console()
    table = Table(show_header=False)
    for key, value in facts.items():
        table.add_row(key, value)
    console.print(table)
    table = Table("preset", "dimension", "layers run")
    for name, found in presets.items():
        table.add_row(name, str(found.get("dimension", found.get("error"))), str(found.get("layers_run", "")))
    console.print(table)
