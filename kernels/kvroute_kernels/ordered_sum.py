"""A sum whose order is fixed by its length alone, so its bits do not depend on how the data lies in memory.

``Tensor.sum`` adds in an order that follows strides, the sizes of other dimensions and the number of threads:
the same tokens read from pages and from one piece then differ in their last bits. Here the upper half
is added to the lower half until one row is left; every addition is elementwise.
"""

from __future__ import annotations

import torch
from torch import Tensor


def ordered_sum(x: Tensor, dim: int, dtype: torch.dtype) -> Tensor:
    """Sum of ``x`` over ``dim``, accumulated in ``dtype``; zeros where there is nothing to sum."""
    count = x.shape[dim]
    if count == 0:
        return x.sum(dim=dim, dtype=dtype)
    if count == 1:
        return x.select(dim, 0).to(dtype)
    while count > 1:
        half = count // 2
        halves = torch.add(x.narrow(dim, 0, half).to(dtype), x.narrow(dim, half, half))
        if count % 2:
            halves.narrow(dim, 0, 1).add_(x.narrow(dim, count - 1, 1))
        x, count = halves, half
    return x.select(dim, 0)
