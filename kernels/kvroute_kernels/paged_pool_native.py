"""Sums of keys and values over tokens on a CPU, compiled: the twin of the reference in ``paged_pool.py``.

Maths: there. ``paged_pool_native.cpp`` says how it adds. One call reads all sequences and layers where they lie, each
number once; torch's own ops would copy pages together and convert them first. The source is compiled at the first
use, for this machine, and kept in the user's cache folder; without a compiler there is no such twin and torch does
the work.
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
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor

from kvroute_kernels.checks import check_held, check_ranges
from kvroute_kernels.paged_pool import PooledSums
from kvroute_kernels.planes import planes_of
from kvroute_kernels.view import KVView

_log = logging.getLogger(__name__)
SOURCE = Path(__file__).with_suffix(".cpp")
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
        _log.info("No C++ compiler: pooling on the CPU is torch's.")
        return None
    try:
        return _loaded(found)
    except (OSError, subprocess.SubprocessError) as error:
        detail = getattr(error, "stderr", None) or error
        _log.warning("The CPU's pooling can't be compiled, so torch does it: %s", str(detail).strip()[-500:])
        return None


def _loaded(chosen: str) -> ctypes.CDLL:
    source = SOURCE.read_bytes()
    digest = hashlib.sha256(b"\0".join([source, chosen.encode(), " ".join(FLAGS).encode(), _cpu()])).hexdigest()[:16]
    path = folder() / f"paged_pool_{digest}.so"
    if not path.exists():
        folder().mkdir(parents=True, exist_ok=True, mode=0o700)
        with tempfile.TemporaryDirectory(dir=folder()) as place:
            made = Path(place) / "made.so"
            command = [chosen, *FLAGS, str(SOURCE), "-o", str(made)]
            subprocess.run(command, check=True, capture_output=True, text=True, timeout=300)
            os.replace(made, path)
    found = ctypes.CDLL(str(path))
    pointer, integer = ctypes.c_void_p, ctypes.c_int64
    found.kvroute_paged_pool.argtypes = [
        *(pointer, pointer, integer, integer, pointer, pointer, pointer, integer),
        *(ctypes.c_int, pointer, integer, integer),
    ]
    found.kvroute_paged_pool.restype = ctypes.c_int
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
    return ThreadPoolExecutor(count, thread_name_prefix="kvroute-pool")


@functools.cache
def _float8(dtype: torch.dtype) -> Tensor:
    """``[256]`` float32, the number of every byte."""
    return torch.arange(256, dtype=torch.int16).to(torch.uint8).view(dtype).float()


def can_pool(view: KVView, layers: Sequence[int]) -> bool:
    """Whether this twin reads the layers."""
    groups = [view.group_of(layer)[0] for layer in layers]
    same = {g.keys.dtype for g in groups} | {g.values.dtype for g in groups}
    sizes = [size for g in groups for size in (g.keys.shape[4], g.values.shape[4])]
    return len(same) == 1 and same <= KINDS.keys() and max(sizes) <= MOST and library() is not None


def paged_pool_native(
    view: KVView,
    layers: Sequence[int],
    start: Sequence[int],
    stop: Sequence[int],
    part: Literal["k", "v", "kv"],
    weights: Sequence[Tensor] | None,
) -> PooledSums:
    """:func:`~kvroute_kernels.paged_pool` on a CPU, compiled."""
    planes = planes_of(view, layers, part)
    low, high = np.asarray(start, dtype=np.int64), np.asarray(stop, dtype=np.int64)
    check_ranges(view, low, high, weights)
    check_held(view, layers, low, high)
    size = high - low
    ranges = np.ascontiguousarray(np.stack([low, size, np.cumsum(size) - size], axis=1))
    flat, weight = None, torch.from_numpy(size).float()
    if weights is not None:
        flat = torch.cat([w.detach().float() for w in weights] + [torch.zeros(1)]).contiguous()
        weight = torch.stack([w.sum(dtype=torch.float32) for w in weights]) if len(weights) else weight
    out = torch.empty(len(low), planes.width, dtype=torch.float32)
    table = _float8(planes.dtype) if KINDS[planes.dtype] == 3 else None
    found = library()
    assert found is not None

    def work(begin: int, end: int) -> int:
        return int(
            found.kvroute_paged_pool(
                planes.rows.ctypes.data,
                planes.scales.ctypes.data,
                len(planes.rows),
                planes.heads,
                ranges.ctypes.data,
                None if flat is None else flat.data_ptr(),
                out.data_ptr(),
                planes.width,
                KINDS[planes.dtype],
                None if table is None else table.data_ptr(),
                begin,
                end,
            )
        )

    tasks = len(low) * len(planes.rows) * planes.heads
    share = _shares(size, len(planes.rows) * planes.heads, int(size.sum()) * planes.width * planes.dtype.itemsize)
    if len(share) == 1:
        done = [work(0, tasks)]
    else:
        others = [_threads(len(share) - 1).submit(work, *span) for span in share[1:]]
        done = [work(*share[0]), *(other.result() for other in others)]
    assert not any(done)
    parts: list[Tensor | None] = []
    at = 0
    for entries in planes.sizes:
        end = at + planes.layers * planes.heads * entries
        parts.append(out[:, at:end].view(len(low), planes.layers, planes.heads, entries) if entries else None)
        at = end
    return PooledSums(parts[0], parts[1], weight)


def _shares(size: np.ndarray[Any, Any], tasks: int, size_bytes: int) -> list[tuple[int, int]]:
    """Spans of tasks for threads, of about as many tokens each; a task's result does not depend on them."""
    count = min(torch.get_num_threads(), max(size_bytes // _ALONE, 1))
    whole = np.repeat(size, tasks).cumsum() if count > 1 else size
    if count == 1 or whole[-1] == 0:
        return [(0, len(size) * tasks)]
    edges = [0, *np.searchsorted(whole, whole[-1] * np.arange(1, count) / count).tolist(), len(whole)]
    return [(b, e) for b, e in itertools.pairwise(edges) if e > b]
