"""What is installed: versions, read without importing anything."""

from __future__ import annotations

import importlib.metadata
import platform

from kvroute._version import __version__


def version_of(name: str) -> str | None:
    """Version of a distribution, of ``kvroute`` or of ``python``; None where it is not installed."""
    if name == "kvroute":
        return __version__  # of the code that runs, whatever an older installation says of itself
    if name == "python":
        return platform.python_version()
    try:
        return importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:
        return None


def versions(*names: str) -> dict[str, str]:
    """Versions by name; what is not installed is left out."""
    found = {name: version_of(name) for name in names}
    return {name: version for name, version in found.items() if version is not None}
