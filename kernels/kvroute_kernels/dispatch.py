"""Which implementation of an op runs: torch, or Triton on a GPU."""

from __future__ import annotations

import functools
import importlib.util
import logging
import os
from collections.abc import Callable
from typing import Literal, TypeVar, get_args

import torch

from kvroute_kernels.errors import KVViewError

Backend = Literal["auto", "torch", "native", "triton", "interpret"]
"""``triton`` needs a GPU; ``interpret`` runs the same kernels in Triton's interpreter, slowly, to show what they do.
``native`` is compiled C++ on a CPU, for ops that have it; ``torch`` is the reference."""

VARIABLE = "KVROUTE_KERNELS"
"""Environment variable that stands in for an argument that is not given."""
INTERPRET = "TRITON_INTERPRET"
"""Triton's own: must be 1 before triton is imported for its interpreter to run anything."""
DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float8_e4m3fn, torch.float8_e5m2)
"""Dtypes of a cache that the kernels read; others are torch's."""

_log = logging.getLogger(__name__)
_T = TypeVar("_T")
_WORKED: set[str] = set()
_BROKEN: dict[str, str] = {}
"""Ops whose kernels failed at their first use, and how; they are torch's from then on."""


class KernelsUnavailableError(RuntimeError):
    """A backend was asked for by name, and it can't run here."""


def choose(device: torch.device, dtype: torch.dtype, backend: Backend | None = None) -> Backend:
    """The backend that runs an op.

    Args:
        device: where the tensors lie.
        dtype: of the cache.
        backend: ``torch``, ``native``, ``triton`` or ``interpret``; ``auto`` is Triton on a GPU, and elsewhere native
            code where an op has it and it can be built, else torch. By default what ``KVROUTE_KERNELS``
            says, else ``auto``.

    Returns:
        ``torch``, ``native``, ``triton`` or ``interpret``; ``torch`` stands for "native if there is any" where ``auto``
        was asked for.

    Raises:
        KernelsUnavailableError: what was asked for by name can't run; the message says why and what to do.
    """
    asked, by = (backend, "The backend") if backend is not None else (_wished(), VARIABLE)
    if asked not in get_args(Backend):
        raise KernelsUnavailableError(f"{by} is one of {', '.join(get_args(Backend))}, not {asked!r}.")
    if asked == "torch":
        return "torch"
    if asked == "native" and device.type != "cpu":
        raise KernelsUnavailableError(f"{by} asks for 'native', and the tensors lie on {device.type}. Use 'auto'.")
    if asked == "native":
        return "native"
    reason = _why_not(asked, device, dtype)
    if asked == "auto":
        return "torch" if reason else "triton"
    if reason:
        raise KernelsUnavailableError(f"{by} asks for {asked!r}: {reason}")
    return asked


def explain(device: torch.device, dtype: torch.dtype) -> tuple[Backend, str]:
    """What :func:`choose` gives where no backend is named, and why, in a sentence. May compile (see :func:`prepare`).

    Raises:
        KernelsUnavailableError: as :func:`choose`.
    """
    chosen = choose(device, dtype)
    if _wished() != "auto":
        return chosen, f"{VARIABLE} asks for it."
    if chosen == "triton":
        return chosen, "There is a GPU, and triton is installed."
    if device.type == "cpu":
        from kvroute_kernels.native_library import compiler, library

        if compiler() is None:
            return "torch", "There is no GPU, and no C++ compiler (set CXX, or install g++ or clang++)."
        if library() is None:
            return "torch", f"There is no GPU, and {compiler()} can't compile the kernels (the log says why)."
        return "native", f"There is no GPU; pooling and chains are compiled by {compiler()}, all else is torch's."
    return chosen, f"The tensors lie on {device.type}, and {_why_not('auto', device, dtype)}"


def prepare(device: torch.device) -> None:
    """Build what the ops compile on a device, so that no first call waits for it (some seconds, once a machine)."""
    if device.type == "cpu" and _wished() in ("auto", "native"):
        from kvroute_kernels.native_library import library

        library()


def _wished() -> Backend:
    """What the environment says; it may be nonsense, which :func:`choose` refuses."""
    return os.environ.get(VARIABLE) or "auto"  # type: ignore[return-value]


def _why_not(backend: str, device: torch.device, dtype: torch.dtype) -> str | None:
    """Why the kernels can't run, or None."""
    if backend != "interpret" and device.type != "cuda":
        return f"the tensors lie on {device.type}, and Triton runs on a GPU. Use 'auto' or 'torch'."
    if dtype not in DTYPES:
        return f"the kernels do not read {dtype}. Use 'auto' or 'torch'."
    if not _has_triton():
        return "triton is not installed. Install it with: pip install 'kvroute[triton]'"
    if backend == "interpret" and not _interpreting():
        return f"Triton's interpreter is off. Set {INTERPRET}=1 before the process starts."
    return None


@functools.cache
def _has_triton() -> bool:
    return importlib.util.find_spec("triton") is not None


def _interpreting() -> bool:
    from triton.runtime.interpreter import InterpretedFunction

    from kvroute_kernels.paged_pool_triton import paged_pool_kernel

    return isinstance(paged_pool_kernel, InterpretedFunction)


def run(
    op: str,
    device: torch.device,
    dtype: torch.dtype,
    backend: Backend | None,
    *,
    triton: Callable[[], _T],
    torch_: Callable[[], _T],
    native: Callable[[], _T | None] | None = None,
) -> _T:
    """An op by the backend that is chosen. Under ``auto`` an op whose kernels fail the first time they are used is
    torch's from then on, which is logged as an error once; later failures, and all under a name, are raised.

    Raises:
        KernelsUnavailableError: as :func:`choose`.
    """
    chosen = choose(device, dtype, backend)
    automatic = (backend or _wished()) == "auto"
    if native is not None and device.type == "cpu" and (chosen == "native" or (automatic and chosen == "torch")):
        done = native()
        if done is not None:
            return done
        if not automatic:
            raise KernelsUnavailableError(
                f"{op} has no native code for this cache ({dtype}), or no C++ compiler is there. Use 'auto'."
            )
    if chosen in ("torch", "native"):
        return torch_()
    if automatic and op in _BROKEN:
        return torch_()
    try:
        found = triton()
    except KVViewError:  # what was asked can't be answered, by torch as little
        raise
    except Exception as error:
        if not automatic or op in _WORKED:
            raise
        _BROKEN[op] = repr(error)
        _log.error("The Triton kernels of %s failed at their first use; torch does it from now on.", op, exc_info=True)
        return torch_()
    _WORKED.add(op)
    return found
