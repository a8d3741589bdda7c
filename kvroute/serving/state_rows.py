"""State tensors of a worker's requests: a row each."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor


class StateRows:
    """Named state tensors with one row a request; rows are reused and set to zero when given out."""

    def __init__(self) -> None:
        self.tensors: dict[str, Tensor] = {}
        self._free: list[int] = []
        self._size = 0

    def take(self) -> int:
        """A row of zeros."""
        if not self._free:
            more = max(16, self._size)
            self._free = list(range(self._size, self._size + more))[::-1]
            self._size += more
        row = self._free.pop()
        for tensor in self.tensors.values():
            if row < tensor.shape[0]:
                tensor[row] = 0
        return row

    def give(self, row: int) -> None:
        """Give a row back."""
        self._free.append(row)

    def get(self, name: str, shape: Sequence[int], dtype: torch.dtype, device: torch.device) -> Tensor:
        """``[rows, *shape]``: all rows' state of a name; zeros where it is new."""
        have = self.tensors.get(name)
        if have is None or have.shape[0] < self._size:
            grown = torch.zeros(self._size, *shape, dtype=dtype, device=device)
            if have is not None:
                grown[: have.shape[0]] = have
            self.tensors[name] = have = grown
        return have
