"""The kernels' tests run in Triton's interpreter, with small blocks, so that small cases cross every edge."""

from __future__ import annotations

import os
from collections.abc import Iterator

import pytest

_before = os.environ.get("TRITON_INTERPRET")
os.environ["TRITON_INTERPRET"] = "1"  # read when a kernel is defined
try:
    from kvroute_kernels import chain_step_triton, difficulty_head_triton, paged_pool_triton
finally:
    if _before is None:
        del os.environ["TRITON_INTERPRET"]
    else:
        os.environ["TRITON_INTERPRET"] = _before

SMALL = (
    (paged_pool_triton, {"SPLIT": 16, "BLOCK_ELEMENTS": 512, "JOIN_T": 2, "JOIN_D": 64}),
    (chain_step_triton, {"RUN": 4, "TILE_BYTES": 1024, "BLOCK_L_STRIDED": 4, "BLOCK_F": 32}),
    (difficulty_head_triton, {"BLOCK_H": 4, "BLOCK_K": 16, "BLOCK_SHARES": 4}),
)


@pytest.fixture(autouse=True)
def _interpreter(monkeypatch: pytest.MonkeyPatch) -> None:
    from triton.runtime.interpreter import InterpretedFunction

    assert isinstance(paged_pool_triton.paged_pool_kernel, InterpretedFunction), "triton was imported before this file"
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    monkeypatch.delenv("KVROUTE_KERNELS", raising=False)


@pytest.fixture
def small_blocks() -> Iterator[None]:
    """Runs and tiles of a few tokens. A fixture of the module would not do: hypothesis wants one that never changes."""
    with pytest.MonkeyPatch.context() as patch:
        for module, constants in SMALL:
            for name, value in constants.items():
                patch.setattr(module, name, value)
        yield
