"""Tensors that live from step to step: their addresses change when they grow, and at no other time."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from torch import Tensor

_AHEAD = 4
"""Uploads that may be on their way before the host waits for the oldest."""


class Buffers:
    """Named tensors of one device, and what carries a step's numbers to it.

    A tensor is made with room for twice what was asked the first time it does not fit, so it grows rarely.
    """

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self.grown = 0
        self._tensors: dict[str, Tensor] = {}
        self._staged: dict[str, list[Tensor]] = {}
        self._sent: dict[str, list[Any]] = {}
        self._turn: dict[str, int] = {}

    def get(self, name: str, size: int, dtype: torch.dtype) -> Tensor:
        """At least ``size`` numbers, not cleared. The same tensor until a larger one is asked for."""
        have = self._tensors.get(name)
        if have is None or have.numel() < size:
            room = 64
            while room < size:
                room *= 2
            have = self._tensors[name] = torch.zeros(room, dtype=dtype, device=self.device)
            self.grown += 1
        return have

    def send(self, name: str, numbers: np.ndarray[Any, Any]) -> Tensor:
        """The numbers in the buffer of that name, flat; the device's stream does the copying, the host goes on."""
        source = torch.from_numpy(np.ascontiguousarray(numbers)).view(-1)
        target = self.get(name, source.numel(), source.dtype)
        if self.device.type == "cpu":
            target[: source.numel()] = source
            return target
        staged = self._staged.setdefault(name, [])
        sent = self._sent.setdefault(name, [])
        turn = self._turn[name] = (self._turn.get(name, -1) + 1) % _AHEAD
        if turn == len(staged):
            staged.append(torch.empty(target.numel(), dtype=source.dtype, pin_memory=True))
            sent.append(torch.cuda.Event())  # type: ignore[no-untyped-call]
        elif staged[turn].numel() < target.numel():
            sent[turn].synchronize()
            staged[turn] = torch.empty(target.numel(), dtype=source.dtype, pin_memory=True)
        else:
            sent[turn].synchronize()
        held = staged[turn][: source.numel()]
        held.copy_(source)
        target[: source.numel()].copy_(held, non_blocking=True)
        sent[turn].record()
        return target
