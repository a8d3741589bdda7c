"""What a model on disk is, without loading it: its config, and the few weights that the fingerprint is made of.

An engine that serves a model elsewhere (another process, other ranks) has no parameters to look at here; its
checkpoint says the same.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from kvroute.engines.loading import describe
from kvroute.errors import KVRouteError, ModelLoadError
from kvroute.info import DIGEST_COLUMNS, DIGEST_ROWS, ModelInfo, is_digested

_INDEX, _SINGLE = "model.safetensors.index.json", "model.safetensors"


def describe_checkpoint(id_or_path: str | Path, *, revision: str | None = None, name: str | None = None) -> ModelInfo:
    """As :func:`~kvroute.engines.loading.describe` of the loaded model; nothing is downloaded.

    Reads the config and, of a few matrices, a corner: milliseconds, whatever the model's size. ``dtype`` is the
    checkpoint's own.

    Args:
        id_or_path: a local folder, or the hub id of a model that is in the local cache.
        revision: branch, tag or commit on the hub.
        name: what to call it; by default ``id_or_path``.

    Raises:
        ModelLoadError: it is not here or not in safetensors, or transformers has other names for its weights.
        UnsupportedModelError: it keeps no KV cache that can be read.
    """
    try:
        from transformers import AutoConfig, AutoModelForCausalLM

        config = AutoConfig.from_pretrained(
            id_or_path, revision=revision, local_files_only=True, trust_remote_code=False
        )
        with torch.device("meta"):
            model = AutoModelForCausalLM.from_config(config, trust_remote_code=False).eval()
        dtype = getattr(config.get_text_config(decoder=True), "dtype", None) or torch.float32
        weights = dict(_weights(id_or_path, revision, model))
    except KVRouteError:
        raise
    except Exception as error:
        raise ModelLoadError(
            f"What the model {id_or_path} is can't be read from its files: {error}",
            hint="kvroute reads folders with config.json and safetensors, and such models in the hub's local cache.",
        ) from error
    wanted = {n for n, p in model.named_parameters() if p.ndim == 2 and is_digested(n)}
    missing = sorted(wanted - weights.keys())
    if missing:
        raise ModelLoadError(
            f"The files of {id_or_path} have no {missing[0]}, of which the fingerprint is made.",
            hint="Give the model's own safetensors checkpoint.",
        )
    info = describe(model, name=name or str(id_or_path), revision=revision, weights=weights.items())
    return info.model_copy(update={"dtype": str(dtype).removeprefix("torch.")})


def _weights(id_or_path: str | Path, revision: str | None, model: Any) -> Iterator[tuple[str, Tensor]]:
    """Corners of the matrices that the fingerprint is made of, by the model's names for them."""
    from safetensors import safe_open

    names = {name for name, _ in model.named_parameters()}
    prefix = getattr(model, "base_model_prefix", "")
    for file, keys in _files(id_or_path, revision).items():
        with safe_open(file, framework="pt") as tensors:
            for key in keys or tensors.keys():
                name = _known(key, names, prefix) if is_digested(key) else None
                if name is None:
                    continue
                part = tensors.get_slice(key)
                if len(part.get_shape()) == 2:
                    yield name, part[:DIGEST_ROWS, :DIGEST_COLUMNS]


def _known(key: str, names: set[str], prefix: str) -> str | None:
    """The model's name for a tensor of the file: files may leave out the outermost module, or hold others around it."""
    parts = key.split(".")
    for at in range(len(parts)):
        rest = ".".join(parts[at:])
        found = next((n for n in (rest, f"{prefix}.{rest}") if n in names), None)
        if found is not None:
            return found
    return None


def _files(id_or_path: str | Path, revision: str | None) -> Mapping[str, list[str]]:
    """The checkpoint's files, and which tensors are in each (none where it is a single one)."""
    from transformers.utils import cached_file

    def find(name: str) -> str | None:
        found: str | None = cached_file(
            str(id_or_path),
            name,
            revision=revision,
            local_files_only=True,
            _raise_exceptions_for_missing_entries=False,
            _raise_exceptions_for_connection_errors=False,
        )
        return found

    single = find(_SINGLE)
    if single is not None:
        return {single: []}
    index = find(_INDEX)
    if index is None:
        raise ModelLoadError(f"{id_or_path} has no {_SINGLE} here.", hint="kvroute reads checkpoints in safetensors.")
    files: dict[str, list[str]] = {}
    for key, file in json.loads(Path(index).read_text())["weight_map"].items():
        if is_digested(key):
            files.setdefault(str(Path(index).parent / file), []).append(key)
    return files
