"""kvroute's own files: safetensors with checked metadata, written whole or not at all."""

from __future__ import annotations

import hashlib
import json
import os
import re
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from kvroute._version import __version__
from kvroute.errors import FileFormatError

_FORMAT = 1
_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]*")

Array = np.ndarray[Any, Any]


def is_name(text: str) -> bool:
    """Whether a text can name a file in a folder of ours: letters, digits, ``.``, ``-`` and ``_``, and no path."""
    return _NAME.fullmatch(text) is not None


def write_whole(path: str | Path, data: bytes) -> None:
    """Write a file under another name and rename it, so that a kill leaves the old one or the new one."""
    target = Path(path)
    target.parent.mkdir(parents=True, exist_ok=True)
    handle, name = tempfile.mkstemp(dir=target.parent, prefix=f".{target.name}.")
    try:
        with os.fdopen(handle, "wb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        umask = os.umask(0)
        os.umask(umask)
        os.chmod(name, 0o666 & ~umask)
        os.replace(name, target)
    except BaseException:
        Path(name).unlink(missing_ok=True)
        raise


def write_tensors(path: str | Path, kind: str, tensors: Mapping[str, Array], meta: Mapping[str, Any]) -> None:
    """Tensors and JSON metadata in one safetensors file, with format number, kvroute's version and a checksum."""
    from safetensors.numpy import save

    arrays = {name: np.ascontiguousarray(array) for name, array in sorted(tensors.items())}
    text = json.dumps(meta, sort_keys=True, allow_nan=False)
    header = {
        "kind": kind,
        "format": str(_FORMAT),
        "kvroute": __version__,
        "meta": text,
        "checksum": _checksum(kind, arrays, text),
    }
    write_whole(path, save(arrays, metadata=header))


def read_tensors(path: str | Path, kind: str) -> tuple[dict[str, Array], dict[str, Any]]:
    """Read what :func:`write_tensors` wrote.

    Raises:
        FileFormatError: missing, torn, changed, of another kind or of a newer format.
    """
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(str(path), framework="numpy") as file:
            header = file.metadata() or {}
            arrays = {name: file.get_tensor(name) for name in sorted(file.keys())}
    except (SafetensorError, OSError, ValueError, TypeError) as error:
        raise FileFormatError(
            f"{path} can't be read as safetensors: {error}", hint="It is missing, torn or another kind of file."
        ) from error
    check_header(path, header, kind)
    text = header.get("meta", "")
    if header.get("checksum") != _checksum(kind, arrays, text):
        raise FileFormatError(f"{path} has changed since it was written.", hint="Make it anew, or restore it.")
    return arrays, json.loads(text)


def check_header(path: str | Path, header: Mapping[str, Any], kind: str) -> None:
    """Refuse another kind of file and a newer format.

    Raises:
        FileFormatError: naming both sides.
    """
    if header.get("kind") != kind:
        raise FileFormatError(f"{path} holds {header.get('kind') or 'something else'}, not {kind}.")
    number = str(header.get("format", ""))
    if not number.isdigit() or int(number) > _FORMAT:
        raise FileFormatError(
            f"{path} has format {number or 'unknown'} (kvroute {header.get('kvroute')}), and this is kvroute "
            f"{__version__}, which reads up to {_FORMAT}.",
            hint="Install a newer kvroute.",
        )


def write_json(path: str | Path, kind: str, body: Mapping[str, Any]) -> None:
    """A JSON file with kind, format number, kvroute's version and a checksum over its body."""
    text = json.dumps(body, sort_keys=True, allow_nan=False)
    whole = {
        "kind": kind,
        "format": str(_FORMAT),
        "kvroute": __version__,
        "checksum": hashlib.sha256(f"{kind}\n{text}".encode()).hexdigest(),
        "body": body,
    }
    write_whole(path, (json.dumps(whole, indent=2, sort_keys=True, allow_nan=False) + "\n").encode())


def read_json(path: str | Path, kind: str) -> dict[str, Any]:
    """Body of what :func:`write_json` wrote.

    Raises:
        FileFormatError: missing, torn, changed, of another kind or of a newer format.
    """
    try:
        whole = json.loads(Path(path).read_bytes())
    except (OSError, ValueError, RecursionError) as error:
        raise FileFormatError(f"{path} can't be read as JSON: {error}") from error
    if not isinstance(whole, dict) or not isinstance(whole.get("body"), dict):
        raise FileFormatError(f"{path} is not a file of kvroute's.")
    check_header(path, whole, kind)
    text = json.dumps(whole["body"], sort_keys=True)
    if whole.get("checksum") != hashlib.sha256(f"{kind}\n{text}".encode()).hexdigest():
        raise FileFormatError(f"{path} has changed since it was written.", hint="Make it anew, or restore it.")
    body: dict[str, Any] = whole["body"]
    return body


def _checksum(kind: str, arrays: Mapping[str, Array], text: str) -> str:
    digest = hashlib.sha256(f"{kind}\n{text}".encode())
    for name, array in arrays.items():
        digest.update(f"{name}:{array.dtype}:{array.shape}".encode())
        digest.update(array.tobytes())
    return digest.hexdigest()
