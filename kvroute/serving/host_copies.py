"""What a step read, brought to the host: many small copies, one wait."""

from __future__ import annotations

import torch
from torch import Tensor

from kvroute.serving.messages import Array


class HostCopies:
    """Copies tensors to the host; on a GPU none of them is there before :meth:`wait`."""

    def __init__(self) -> None:
        self._devices: set[torch.device] = set()

    def take(self, x: Tensor) -> Array:
        """A tensor's numbers; on a CPU they are its own, not copied."""
        if x.device.type == "cpu":
            return x.numpy()
        held = torch.empty(x.shape, dtype=x.dtype, pin_memory=True)
        held.copy_(x, non_blocking=True)
        self._devices.add(x.device)
        return held.numpy()

    def wait(self) -> None:
        """Until all that was taken is there."""
        for device in self._devices:
            torch.cuda.current_stream(device).synchronize()
        self._devices.clear()
