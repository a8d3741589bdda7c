"""Which texts run together: by length, under a token budget, with little padding."""

from __future__ import annotations

from collections.abc import Sequence

READING_WASTE = 0.08
"""Share of a batch that may be padding where texts are only read: padding is computed like text."""
WRITING_WASTE = 0.4
"""The same where answers are written: padding is computed once, and a second batch costs every step again."""
_SMALL = 128


def plan_batches(lengths: Sequence[int], budget: int, *, waste: float = READING_WASTE) -> list[list[int]]:
    """Batches of indices, longest texts first.

    A batch is padded to its longest text and computes at most ``budget`` tokens, padding included (a text
    longer than the budget runs alone). It closes before padding passes ``waste`` of it, unless it is so
    small (128 tokens) that the time of a call outweighs the padding.

    Args:
        lengths: tokens of each text, at least 1.
        budget: padded tokens a batch, at least 1.
        waste: share of a batch that may be padding.
    """
    order = sorted(range(len(lengths)), key=lambda i: (-lengths[i], i))
    batches: list[list[int]] = []
    real = 0
    for index in order:
        length = lengths[index]
        if batches:
            batch = batches[-1]
            longest = lengths[batch[0]]
            padded = longest * (len(batch) + 1)
            padding = padded - real - length
            if padded <= budget and (padding <= waste * padded or padded <= _SMALL):
                batch.append(index)
                real += length
                continue
        batches.append([index])
        real = length
    return batches
