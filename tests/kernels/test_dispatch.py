"""Which implementation runs, and what happens where it can't."""

from __future__ import annotations

import logging

import pytest
import torch

from kvroute_kernels import KernelsUnavailableError, KVViewError, choose, dispatch, paged_pool
from kvroute_kernels import paged_pool_triton as kernels
from tests.kernels.caches import random_view

CPU, GPU = torch.device("cpu"), torch.device("cuda")


@pytest.fixture(autouse=True)
def _fresh(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(dispatch, "_WORKED", set())
    monkeypatch.setattr(dispatch, "_BROKEN", {})


def test_auto_is_triton_on_a_gpu_and_torch_elsewhere(monkeypatch: pytest.MonkeyPatch) -> None:
    assert choose(CPU, torch.bfloat16) == "torch"
    assert choose(GPU, torch.bfloat16) == "triton"
    assert choose(GPU, torch.float64) == "torch"
    monkeypatch.setattr(dispatch, "_has_triton", lambda: False)
    assert choose(GPU, torch.bfloat16) == "torch"


def test_the_variable_and_the_argument_that_outweighs_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("KVROUTE_KERNELS", "torch")
    assert choose(GPU, torch.bfloat16) == "torch"
    assert choose(GPU, torch.bfloat16, "triton") == "triton"
    assert choose(CPU, torch.bfloat16, "interpret") == "interpret"
    monkeypatch.setenv("KVROUTE_KERNELS", "interpret")
    assert choose(CPU, torch.bfloat16) == "interpret"
    assert choose(CPU, torch.bfloat16, "auto") == "torch"
    monkeypatch.setenv("KVROUTE_KERNELS", "")
    assert choose(CPU, torch.bfloat16) == "torch"


def test_a_wish_that_can_not_be_met_is_an_error(monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(KernelsUnavailableError, match=r"lie on cpu, and Triton runs on a GPU. Use 'auto'"):
        choose(CPU, torch.bfloat16, "triton")
    with pytest.raises(KernelsUnavailableError, match=r"do not read torch.float64"):
        choose(CPU, torch.float64, "interpret")
    monkeypatch.setenv("KVROUTE_KERNELS", "fast")
    with pytest.raises(
        KernelsUnavailableError, match="KVROUTE_KERNELS is one of auto, torch, native, triton, interpret, not 'fast'"
    ):
        paged_pool(random_view([1]))
    monkeypatch.setenv("KVROUTE_KERNELS", "triton")
    with pytest.raises(KernelsUnavailableError, match="KVROUTE_KERNELS asks for 'triton'"):
        paged_pool(random_view([1]))
    monkeypatch.setattr(dispatch, "_interpreting", lambda: False)
    with pytest.raises(KernelsUnavailableError, match="Set TRITON_INTERPRET=1 before the process starts"):
        choose(CPU, torch.bfloat16, "interpret")
    monkeypatch.setattr(dispatch, "_has_triton", lambda: False)
    with pytest.raises(KernelsUnavailableError, match=r"pip install 'kvroute\[triton\]'"):
        choose(GPU, torch.bfloat16, "triton")


def _as_on_a_gpu(monkeypatch: pytest.MonkeyPatch, work) -> None:
    monkeypatch.setattr(dispatch, "_why_not", lambda *_: None)
    monkeypatch.setattr(kernels, "paged_pool_triton", work)


def test_a_failure_at_first_use_is_torchs_from_then_on_and_said_once(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    calls = []

    def fails(*_: object) -> None:
        calls.append(1)
        raise RuntimeError("no such architecture")

    _as_on_a_gpu(monkeypatch, fails)
    view = random_view([5])
    for _ in range(3):
        assert torch.equal(paged_pool(view).keys, paged_pool(view, backend="torch").keys)
    assert len(calls) == 1
    (said,) = caplog.records
    assert said.levelno == logging.ERROR
    assert "paged_pool failed at their first use" in said.getMessage()
    assert "no such architecture" in str(said.exc_info)
    with pytest.raises(RuntimeError, match="no such architecture"):
        paged_pool(view, backend="triton")  # by name: no other way


def test_what_fails_later_or_by_the_callers_fault_is_raised(monkeypatch: pytest.MonkeyPatch) -> None:
    answers: list[object] = ["fine", RuntimeError("illegal address")]

    def works_once(*_: object) -> object:
        answer = answers.pop(0)
        if isinstance(answer, Exception):
            raise answer
        return answer

    _as_on_a_gpu(monkeypatch, works_once)
    view = random_view([5])
    assert paged_pool(view) == "fine"
    with pytest.raises(RuntimeError, match="illegal address"):
        paged_pool(view)

    def asked_too_much(*_: object) -> None:
        raise KVViewError("outside")

    _as_on_a_gpu(monkeypatch, asked_too_much)
    monkeypatch.setattr(dispatch, "_WORKED", set())
    with pytest.raises(KVViewError, match="outside"):
        paged_pool(view)
    assert not dispatch._BROKEN


def test_the_interpreter_really_runs_the_kernel(monkeypatch: pytest.MonkeyPatch) -> None:
    launched = []
    real = kernels.PagedPool.launch
    monkeypatch.setattr(kernels.PagedPool, "launch", lambda self: (launched.append(self.grid), real(self))[1])
    monkeypatch.setenv("KVROUTE_KERNELS", "interpret")
    paged_pool(random_view([3], layers=1, heads=2))
    assert launched == [4]  # one item, two heads, keys and values


# ---------------------------------------------------------------- native code


def test_native_code_is_the_cpus_where_it_can_be_built(monkeypatch: pytest.MonkeyPatch) -> None:
    from kvroute_kernels import native_library

    view = random_view([40, 3], page=8)
    native = paged_pool(view, backend="native")
    assert torch.equal(paged_pool(view).keys, native.keys)
    wanted = paged_pool(view, backend="torch")
    torch.testing.assert_close(native.keys, wanted.keys, rtol=1e-6, atol=1e-5)
    with pytest.raises(KernelsUnavailableError, match="the tensors lie on cuda"):
        choose(GPU, torch.float32, "native")
    monkeypatch.setattr(native_library, "library", lambda: None)
    assert torch.equal(paged_pool(view).keys, wanted.keys)
    with pytest.raises(KernelsUnavailableError, match="no C\\+\\+ compiler"):
        paged_pool(view, backend="native")


def test_a_compiler_that_fails_is_said_once_and_torch_does_it(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture, tmp_path
) -> None:
    from kvroute_kernels import native_library

    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.setenv("CXX", "/bin/false")
    native_library.library.cache_clear()
    try:
        view = random_view([5])
        for _ in range(2):
            assert torch.equal(paged_pool(view).keys, paged_pool(view, backend="torch").keys)
        (said,) = caplog.records
        assert "can't be compiled" in said.getMessage()
    finally:
        native_library.library.cache_clear()
