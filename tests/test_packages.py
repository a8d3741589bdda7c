"""Wheel and sdist hold everything, and what they hold works where it is installed, far from the checkout."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import sysconfig
import tarfile
import venv
import zipfile
from importlib.util import find_spec
from pathlib import Path

import pytest

import kvroute

ROOT = Path(__file__).resolve().parents[1]
PACKAGES = ("kvroute", "kvroute_kernels", "langchain_kvroute", "llama_index")
CODE = {
    "kvroute": ROOT / "kvroute",
    "kvroute_kernels": ROOT / "kernels" / "kvroute_kernels",
    "langchain_kvroute": ROOT / "integrations" / "langchain_kvroute",
    "llama_index": ROOT / "integrations" / "llama_index",
    "kvroute/_recipes": ROOT / "recipes",
}
NAMES = "kvroute", "kvroute_kernels", "langchain_kvroute", "llama_index.embeddings.kvroute"

pytestmark = [pytest.mark.docs, pytest.mark.skipif(find_spec("hatchling") is None, reason="pip install hatchling")]


def run(*command: object, cwd: Path, **variables: str) -> str:
    """A command's standard output; it must succeed."""
    environment = {k: v for k, v in os.environ.items() if k not in ("PYTHONPATH", "PYTHONHOME")} | variables
    ran = subprocess.run(
        [str(c) for c in command], cwd=cwd, env=environment, capture_output=True, text=True, check=False
    )
    assert ran.returncode == 0, f"{ran.stdout[-1500:]}\n{ran.stderr[-3000:]}"
    return ran.stdout


@pytest.fixture(scope="module")
def built(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path, Path]:
    """An sdist of the checkout, the folder that it unpacks to, and a wheel that was built from that folder."""
    out = tmp_path_factory.mktemp("dist")
    run(sys.executable, "-m", "hatchling", "build", "-t", "sdist", "-d", out, cwd=ROOT)
    (sdist,) = out.glob("*.tar.gz")
    with tarfile.open(sdist) as archive:
        archive.extractall(out, filter="data")
    folder = out / sdist.name.removesuffix(".tar.gz")
    run(sys.executable, "-m", "hatchling", "build", "-t", "wheel", "-d", out, cwd=folder)
    (wheel,) = out.glob("*.whl")
    return sdist, folder, wheel


@pytest.fixture(scope="module")
def python(built: tuple[Path, Path, Path], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An environment of its own with the wheel; what kvroute depends on is taken from ours."""
    folder = tmp_path_factory.mktemp("clean")
    venv.create(folder, with_pip=False)
    made = folder / "bin" / "python"
    place = Path(run(made, "-c", "import sysconfig; print(sysconfig.get_path('purelib'))", cwd=folder).strip())
    # A line of a .pth is a path alone: the checkout that ours was installed from is not followed.
    (place / "ours.pth").write_text(sysconfig.get_path("purelib"))
    pip = [sys.executable, "-m", "pip", "--python", made, "install", "--no-index", "--no-deps"]
    run(*pip, "--ignore-installed", "--quiet", "--disable-pip-version-check", built[2], cwd=folder)
    return made


def expected() -> set[str]:
    """All files of the packages, as they lie in a wheel."""
    found = set()
    for name, folder in CODE.items():
        for path in folder.rglob("*"):
            if path.is_file() and "__pycache__" not in path.parts:
                found.add(f"{name}/{path.relative_to(folder).as_posix()}")
    return found


def test_wheel_holds_the_packages_and_nothing_else(built: tuple[Path, Path, Path]) -> None:
    with zipfile.ZipFile(built[2]) as wheel:
        inside = {n for n in wheel.namelist() if ".dist-info/" not in n}
        points = next(n for n in wheel.namelist() if n.endswith("entry_points.txt"))
        assert "kvroute.serving.plugin:register" in wheel.read(points).decode()
    assert inside == expected()
    # What is not Python, by name: types for users, and the source that is compiled where it is used.
    assert {f"{n}/py.typed" for n in PACKAGES[:3]} | {"llama_index/embeddings/kvroute/py.typed"} <= inside
    compiled = ("paged_pool_native.cpp", "chain_step_native.cpp", "native_numbers.h")
    assert {f"kvroute_kernels/{name}" for name in compiled} <= inside
    assert {"kvroute/ui/static/index.html", "kvroute/ui/static/main.js", "kvroute/ui/static/style.css"} <= inside
    # llama_index and llama_index.embeddings belong to many distributions.
    assert not {"llama_index/__init__.py", "llama_index/embeddings/__init__.py"} & inside


def test_sdist_holds_what_a_contributor_needs(built: tuple[Path, Path, Path]) -> None:
    folder = built[1]
    for name in ("README.md", "LICENSE", "CHANGELOG.md", "CONTRIBUTING.md", "SECURITY.md", "CITATION.cff", "Makefile"):
        assert (folder / name).is_file(), name
    for name in ("tests/conftest.py", "benchmarks/_harness.py", "docs/index.md", "mkdocs.yml", "docs/assets/flow.svg"):
        assert (folder / name).is_file(), name
    assert (folder / "examples" / "tiny_thinker" / "model" / "model.safetensors").is_file()


def test_what_is_installed_works(python: Path, tmp_path: Path) -> None:
    code = (
        "import importlib, importlib.metadata, json\n"
        f"places = {{n: importlib.import_module(n).__file__ for n in {NAMES!r}}}\n"
        "import kvroute, kvroute_kernels, langchain_kvroute, llama_index.core\n"
        "for package in (kvroute, kvroute_kernels):\n"
        "    for name in package.__all__: getattr(package, name)\n"
        "print(json.dumps([places, importlib.metadata.version('kvroute'), kvroute.__version__]))"
    )
    places, version, own = json.loads(run(python, "-c", code, cwd=tmp_path).splitlines()[-1])
    home = str(python.parents[1])
    assert all(place.startswith(home) for place in places.values()), places
    assert version == own == kvroute.__version__


def test_the_command_is_there(python: Path, tmp_path: Path) -> None:
    model = ROOT / "examples" / "tiny_thinker" / "model"
    said = run(python.parent / "kvroute", "info", model, "--json", cwd=tmp_path, HF_HUB_OFFLINE="1")
    assert json.loads(said)["fingerprint"]
