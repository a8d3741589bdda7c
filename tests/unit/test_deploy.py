"""docs/deploy.md and its Kubernetes manifest: figures and words are what the code gives."""

from __future__ import annotations

import importlib.metadata
import re
import shlex
import sys
import tomllib
from pathlib import Path
from typing import Any

import pytest
import yaml
from typer.testing import CliRunner

from kvroute.cli import app

ROOT = Path(__file__).resolve().parents[2]
MANIFEST = ROOT / "docs" / "kubernetes" / "kvroute.yaml"
PAGE = ROOT / "docs" / "deploy.md"
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
sys.path.insert(0, str(ROOT / "benchmarks"))

import rank_bytes  # noqa: E402

# ---------------------------------------------------------------------- the manifest


@pytest.fixture(scope="module")
def manifest() -> dict[str, Any]:
    """By kind and name."""
    return {f"{d['kind']}/{d['metadata']['name']}": d for d in yaml.safe_load_all(MANIFEST.read_text())}


@pytest.fixture(scope="module")
def pod(manifest: dict[str, Any]) -> dict[str, Any]:
    return manifest["StatefulSet/kvroute"]["spec"]["template"]["spec"]


def said_command() -> list[str]:
    """The words of ``kvroute serve`` in the manifest's first comment."""
    text = "".join(line.removeprefix("#") for line in MANIFEST.read_text().splitlines(True) if line.startswith("#"))
    found = re.search(r"^ +(kvroute serve (?:.*\\\n)*.*)$", text, re.MULTILINE)
    assert found is not None
    return shlex.split(found[1].replace("\\\n", " "))


def test_args_are_those_that_kvroute_serve_prints(pod, tmp_path, monkeypatch):
    [server] = pod["containers"]
    words = said_command()
    assert words[:2] == ["kvroute", "serve"]
    assert "--dry-run" in words
    folder = words[words.index("--policy") + 1]
    # here, as in the image, kvroute is installed
    monkeypatch.setattr(importlib.metadata, "entry_points", lambda **_: ("kvroute",))
    ran = CliRunner().invoke(app, [str(tmp_path) if w == folder else w for w in words[1:]])
    assert ran.exit_code == 0, ran.output
    printed = shlex.split(ran.output.replace("\\\n", " "))
    printed = [w.replace(str(tmp_path.resolve()), folder) for w in printed]
    assert server["command"] == ["python3"]
    assert server["args"] == printed[1:]
    assert folder in [m["mountPath"] for m in server["volumeMounts"]]


def test_ports_probes_and_resources_belong_together(manifest, pod):
    [server] = pod["containers"]
    args = server["args"]
    ports = {p["name"]: p["containerPort"] for p in server["ports"]}
    assert ports["http"] == int(args[args.index("--port") + 1])
    assert args[args.index("--host") + 1] == "0.0.0.0"  # else a probe would not reach it
    for probe in ("startupProbe", "readinessProbe", "livenessProbe"):
        assert server[probe]["httpGet"] == {"path": "/health", "port": "http"}
    start = server["startupProbe"]
    assert start["periodSeconds"] * start["failureThreshold"] >= 600
    ranks = args[args.index("--tensor-parallel-size") + 1]
    for kind in ("requests", "limits"):
        assert server["resources"][kind]["nvidia.com/gpu"] == ranks
    assert server["resources"]["requests"]["memory"] == server["resources"]["limits"]["memory"]
    for name in ("kvroute", "kvroute-pods"):
        service = manifest[f"Service/{name}"]["spec"]
        assert service["selector"] == manifest["StatefulSet/kvroute"]["spec"]["template"]["metadata"]["labels"]
        assert [(p["port"], p["targetPort"]) for p in service["ports"]] == [(ports["http"], "http")]
    stateful = manifest["StatefulSet/kvroute"]["spec"]
    assert stateful["selector"]["matchLabels"].items() <= stateful["template"]["metadata"]["labels"].items()
    assert manifest[f"Service/{stateful['serviceName']}"]["spec"]["clusterIP"] == "None"


def test_every_mount_has_its_volume(manifest, pod):
    [server] = pod["containers"]
    claimed = {c["metadata"]["name"] for c in manifest["StatefulSet/kvroute"]["spec"]["volumeClaimTemplates"]}
    assert {m["name"] for m in server["volumeMounts"]} == {v["name"] for v in pod["volumes"]} | claimed


def test_the_image_gets_what_kvroute_needs():
    needed = {re.match(r"[a-z-]+", d)[0] for d in PROJECT["dependencies"]} - {"torch", "transformers"}
    [installed] = re.findall(r"^RUN .* && pip install (.*)$", PAGE.read_text(), re.MULTILINE)
    assert set(installed.split()) == needed  # torch and transformers are vLLM's to choose


# ---------------------------------------------------------------------- the bytes


@pytest.mark.parametrize(
    "sizes",
    [
        rank_bytes.Sizes(tokens=64),
        rank_bytes.Sizes(layers=5, heads=4, size=16, ranks=4, tokens=33),
        rank_bytes.Sizes(layers=12, heads=2, size=64, ranks=4, tokens=40),  # each head lies on two ranks
    ],
    ids=["qwen3-8b", "small", "replicated"],
)
def test_what_crosses_is_what_the_formulas_say(sizes):
    found, formula = rank_bytes.measure(sizes), rank_bytes.expected(sizes)
    assert found.gathered == formula.gathered
    assert found.sums == formula.sums
    assert found.chain == formula.chain
    assert found.kept == formula.kept


def test_a_steps_bytes_do_not_grow_with_the_length():
    short, long = (rank_bytes.measure(rank_bytes.Sizes(layers=5, heads=2, size=8, tokens=t)) for t in (64, 2048))
    assert (short.gathered, short.sums, short.chain, short.kept) == (long.gathered, long.sums, long.chain, long.kept)
    assert long.up[1] - short.up[1] <= 16  # a number that needs more digits
    assert long.down[1] - short.down[1] <= 16


def test_the_page_shows_what_the_script_prints():
    sizes = rank_bytes.Sizes()
    shown = {line for line in PAGE.read_text().splitlines() if line.startswith("|")}
    for what, when, how, count in rank_bytes.rows(sizes, rank_bytes.measure(sizes)):
        if "pickled" not in what:  # those follow the versions of Python and numpy
            assert f"| {what} | {when} | {how} | {count:,} |" in shown
