"""What calls the dispatcher: pooling, chains and the connector's worker give the same by torch and by the kernels."""

from __future__ import annotations

import pytest
import torch

from kvroute import ChainState, PoolingSpec, pool
from kvroute_kernels import chain_step_triton, paged_pool_triton
from tests.kernels.caches import random_view
from tests.results import assert_same
from tests.unit.serving_steps import Engine

pytestmark = pytest.mark.usefixtures("small_blocks")


@pytest.fixture
def launches(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Names of the launches, in their order."""
    seen: list[str] = []
    for module, name in ((paged_pool_triton, "PagedPool"), (chain_step_triton, "PagedChain")):
        cls = getattr(module, name)

        def launch(self, *args, _real=cls.launch, _name=name):
            seen.append(_name)
            return _real(self, *args)

        monkeypatch.setattr(cls, "launch", launch)
    return seen


@pytest.mark.parametrize("name", ["paper-mteb", "paper-classifier"])
def test_pooling(name: str, monkeypatch: pytest.MonkeyPatch, launches: list[str]) -> None:
    view, spec = random_view([9, 4], layers=4), PoolingSpec.preset(name)
    wanted = pool(view, spec)
    assert launches == []
    monkeypatch.setenv("KVROUTE_KERNELS", "interpret")
    torch.testing.assert_close(pool(view, spec), wanted, rtol=1e-5, atol=1e-6)
    assert launches == ["PagedPool"]


def test_chains(monkeypatch: pytest.MonkeyPatch, launches: list[str]) -> None:
    view = random_view([7, 4], layers=3, heads=1, size=3)
    wanted, found = ChainState(2), ChainState(2)
    for start, stop in (([0, 0], [4, 3]), ([4, 3], [7, 4])):
        wanted.update_view(view, [0, 1], start, stop)
    monkeypatch.setenv("KVROUTE_KERNELS", "interpret")
    for start, stop in (([0, 0], [4, 3]), ([4, 3], [7, 4])):
        found.update_view(view, [0, 1], start, stop)
    for sequence in range(2):
        for name, score in wanted.scores(sequence).items():
            mine = found.scores(sequence)[name]
            assert mine.reason == score.reason
            assert score.value is None or mine.value == pytest.approx(score.value, rel=1e-4, abs=1e-5), name
    assert launches == ["PagedPool", "PagedChain"] * 2


@pytest.mark.parametrize(
    "features",
    [
        {"c": "kv-coe"},
        {"a": {"of": "answer", "layers": [0, 2], "heads": "concat"}, "p": {"of": "prompt", "layers": [1]}},
        {"w": {"of": "answer", "tokens": "sum", "window": 2, "layers": "last:1", "part": "k"}},
        {
            "l": {"of": "answer", "tokens": "last", "layers": [1], "part": "k"},
            "f": {"of": "answer", "tokens": "first", "layers": [1], "part": "v"},
            "p": {"of": "answer", "weights": "position", "layers": [1], "part": "v"},
        },
    ],
    ids=["chains", "sums", "window", "one token, weights"],
)
def test_the_connectors_worker(features: dict, monkeypatch: pytest.MonkeyPatch, launches: list[str]) -> None:
    """Prefill in chunks, decoding, requests side by side, a request that ends while another goes on."""
    boxes = []
    for backend in ("torch", "interpret"):
        monkeypatch.setenv("KVROUTE_KERNELS", backend)
        engine = Engine()
        engine.add("a", 6, 10, features, seed=1)
        engine.add("b", 3, 7, features, seed=2)
        engine.step(("a", 0, 4))
        engine.step(("a", 4, 2), ("b", 0, 3))
        for t in range(3):
            engine.step(("a", 6 + t, 1), ("b", 3 + t, 1))
        engine.step(("a", 9, 1), ("b", 6, 1), end=("a", "b"))
        boxes.append(engine.boxes)
        assert bool(launches) == (backend == "interpret")
    assert boxes[0].keys() == boxes[1].keys() == {"a", "b"}
    for name in boxes[0]:
        assert_same(boxes[1][name], boxes[0][name], rel=1e-4, absolute=1e-5)
