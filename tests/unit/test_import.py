"""import kvroute is light, and its public names are what __all__ says."""

from __future__ import annotations

import json
import statistics
import subprocess
import sys

import pytest

import kvroute

HEAVY = (
    "transformers",
    "vllm",
    "triton",
    "sklearn",
    "langchain",
    "langchain_core",
    "llama_index",
    "gguf",
    "rich.progress",
)


def run(code: str) -> str:
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    return done.stdout.strip().splitlines()[-1]


@pytest.mark.parametrize(
    "code", ["import kvroute", "from kvroute import PoolingSpec, ChainState, KVView, pool, SCORES, SamplingOptions"]
)
def test_it_loads_no_framework(code: str) -> None:
    loaded = json.loads(run(f"{code}\nimport sys, json; print(json.dumps(sorted(sys.modules)))"))
    assert not [name for name in loaded if name.split(".")[0] in HEAVY]


def test_it_adds_under_a_second_to_torch() -> None:
    code = (
        "import time, torch\nstart = time.perf_counter()\nimport kvroute\n"
        "kvroute.PoolingSpec, kvroute.ChainState\nprint(time.perf_counter() - start)"
    )
    seconds = [float(run(code)) for _ in range(3)]
    assert statistics.median(seconds) < 1.0, seconds


def test_the_kernels_know_torch_alone() -> None:
    loaded = json.loads(run("import kvroute_kernels, sys, json; print(json.dumps(sorted(sys.modules)))"))
    assert not [n for n in loaded if n.split(".")[0] in (*HEAVY, "kvroute", "pydantic")]


def test_every_public_name_is_there() -> None:
    assert len(set(kvroute.__all__)) == len(kvroute.__all__)
    for name in kvroute.__all__:
        assert getattr(kvroute, name) is not None, name
    assert dir(kvroute) == sorted(kvroute.__all__)
    with pytest.raises(AttributeError, match="nonsense"):
        _ = kvroute.nonsense


def test_every_error_shares_the_root_and_says_what_to_do() -> None:
    errors = [getattr(kvroute, n) for n in kvroute.__all__ if n.endswith("Error")]
    assert all(issubclass(e, kvroute.KVRouteError) for e in errors)
    made = [
        kvroute.EmptyTextError(3),
        kvroute.TextTooLongError(3, 10, 5),
        kvroute.NonFiniteCacheError(1, 2, 3, "keys"),
        kvroute.MissingExtraError("gguf", "demo"),
        kvroute.SpecError("wrong", hint="do this"),
    ]
    for error in made:
        assert error.hint
        assert str(error) == f"{error.message} {error.hint}"
