"""Compiled C++ for a CPU: twins of ops whose reference in torch would copy pages together and convert them first.

The sources are compiled at the first use, for this machine, and kept in the user's cache folder; without a compiler
there are no such twins and torch does the work.
"""

from __future__ import annotations

import ctypes
import functools
import hashlib
import itertools
import logging
import os
import platform
import shutil
import subprocess
import tempfile
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from kvroute_kernels.view import KVView

_log = logging.getLogger(__name__)
_HERE = Path(__file__).parent
SOURCES = tuple(_HERE / name for name in ("paged_pool_native.cpp", "chain_step_native.cpp"))
HEADER = _HERE / "native_numbers.h"
FLAGS = ("-std=c++17", "-O3", "-march=native", "-ffp-contract=off", "-shared", "-fPIC")
"""No contraction to fused operations: a sum must not depend on how a loop was compiled."""
KINDS = {torch.float32: 0, torch.bfloat16: 1, torch.float16: 2, torch.float8_e4m3fn: 3, torch.float8_e5m2: 3}
MOST = 1024
"""Entries a head at most."""
_ALONE = 1 << 18
"""Bytes up to which a second thread costs more than it saves."""


def compiler() -> str | None:
    """The C++ compiler that is used: ``CXX``, ``g++`` or ``clang++``."""
    return os.environ.get("CXX") or shutil.which("g++") or shutil.which("clang++")


def folder() -> Path:
    """Where compiled code is kept."""
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "kvroute" / "kernels"


@functools.cache
def library() -> ctypes.CDLL | None:
    """The compiled library, built at the first call; None where it can't be, which is said once."""
    found = compiler()
    if found is None:
        _log.info("No C++ compiler: reading caches on the CPU is torch's.")
        return None
    try:
        return _loaded(found)
    except (OSError, subprocess.SubprocessError) as error:
        detail = getattr(error, "stderr", None) or error
        _log.warning("The CPU's kernels can't be compiled, so torch does it: %s", str(detail).strip()[-500:])
        return None


def _loaded(chosen: str) -> ctypes.CDLL:
    texts = [path.read_bytes() for path in (HEADER, *SOURCES)]
    digest = hashlib.sha256(b"\0".join([*texts, chosen.encode(), " ".join(FLAGS).encode(), _cpu()])).hexdigest()[:16]
    path = folder() / f"kernels_{digest}.so"
    if not path.exists():
        folder().mkdir(parents=True, exist_ok=True, mode=0o700)
        with tempfile.TemporaryDirectory(dir=folder()) as place:
            made = Path(place) / "made.so"
            command = [chosen, *FLAGS, *map(str, SOURCES), "-o", str(made)]
            subprocess.run(command, check=True, capture_output=True, text=True, timeout=300)
            os.replace(made, path)
    found = ctypes.CDLL(str(path))
    pointer, integer, kind = ctypes.c_void_p, ctypes.c_int64, ctypes.c_int
    found.kvroute_paged_pool.argtypes = [
        *(pointer, pointer, integer, integer, pointer, pointer, pointer, integer),
        *(kind, pointer, integer, integer),
    ]
    found.kvroute_paged_pool.restype = kind
    found.kvroute_chain_step.argtypes = [
        *(pointer, pointer, integer, integer, pointer),
        *(pointer, pointer, pointer, pointer, pointer, pointer, integer),
        *(pointer, pointer, kind, pointer, integer, integer),
    ]
    found.kvroute_chain_step.restype = kind
    found.kvroute_feed_layers.argtypes = [pointer, pointer, pointer, integer, integer, integer, pointer, pointer]
    found.kvroute_feed_layers.restype = None
    return found


def _cpu() -> bytes:
    """What this machine's CPU is called and can do: a home folder may be shared with others."""
    try:
        with open("/proc/cpuinfo", encoding="utf-8") as file:
            told = sorted({line for line in file if line.startswith(("model name", "flags", "Features"))})
    except OSError:
        told = [platform.processor()]
    return "".join([*told, platform.machine()]).encode()


@functools.cache
def _threads(count: int) -> ThreadPoolExecutor:
    return ThreadPoolExecutor(count, thread_name_prefix="kvroute-native")


@functools.cache
def float8_numbers(dtype: torch.dtype) -> Tensor | None:
    """``[256]`` float32, the number of every byte; None for a dtype that needs no table."""
    if KINDS[dtype] != 3:
        return None
    return torch.arange(256, dtype=torch.int16).to(torch.uint8).view(dtype).float()


def can_read(view: KVView, layers: Sequence[int]) -> bool:
    """Whether compiled code reads the layers."""
    groups = view.groups_of(layers)
    same = {g.keys.dtype for g in groups} | {g.values.dtype for g in groups}
    sizes = [size for g in groups for size in (g.keys.shape[4], g.values.shape[4])]
    return len(same) == 1 and same <= KINDS.keys() and max(sizes) <= MOST and library() is not None


def shares(size: np.ndarray[Any, Any], tasks: int, size_bytes: int) -> list[tuple[int, int]]:
    """Spans of tasks for threads, of about as many tokens each; a task's result does not depend on them.

    Args:
        size: tokens of each sequence.
        tasks: of each sequence.
        size_bytes: that are read in all.
    """
    count = min(torch.get_num_threads(), max(size_bytes // _ALONE, 1))
    whole = np.repeat(size, tasks).cumsum() if count > 1 else size
    if count == 1 or whole[-1] == 0:
        return [(0, len(size) * tasks)]
    edges = [0, *np.searchsorted(whole, whole[-1] * np.arange(1, count) / count).tolist(), len(whole)]
    return [(b, e) for b, e in itertools.pairwise(edges) if e > b]


def run_spans(work: Callable[[int, int], int], spans: Sequence[tuple[int, int]]) -> None:
    """Run a span each on threads, the first on this one."""
    if len(spans) == 1:
        done = [work(*spans[0])]
    else:
        others = [_threads(len(spans) - 1).submit(work, *span) for span in spans[1:]]
        done = [work(*spans[0]), *(other.result() for other in others)]
    assert not any(done)
