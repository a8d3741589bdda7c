"""Buffers that the ops keep from call to call, for a caller that runs the same ops step after step."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch

from kvroute_kernels.planes import KnownPlanes

if TYPE_CHECKING:
    from kvroute_kernels.chain_step_triton import PagedChain
    from kvroute_kernels.paged_pool_triton import PagedPool


class Workspace:
    """What :func:`~kvroute_kernels.paged_pool` and :func:`~kvroute_kernels.paged_chain_step` keep for their kernels.

    With one, a call that fits in the buffers of the calls before it allocates none on the device, and addresses stay.
    The sums it returns lie in those buffers: they hold until the next call of an op with the same workspace. One
    workspace serves one thread. Torch's code has no use for it; native code looks up in it where caches lie.

    Attributes:
        planes: of the caches that were read.
    """

    def __init__(self) -> None:
        self.planes = KnownPlanes()
        self._pools: dict[torch.device, PagedPool] = {}
        self._chains: dict[torch.device, PagedChain] = {}

    def pool(self, device: torch.device) -> PagedPool:
        """The pool of a device, made at the first call."""
        if device not in self._pools:
            from kvroute_kernels.paged_pool_triton import PagedPool

            self._pools[device] = PagedPool(device)
        return self._pools[device]

    def chain(self, device: torch.device) -> PagedChain:
        """The chains' buffers of a device, made at the first call."""
        if device not in self._chains:
            from kvroute_kernels.chain_step_triton import PagedChain

            self._chains[device] = PagedChain(device)
        return self._chains[device]
