"""Kept keys and values of a prompt's beginning."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from kvroute.engines.slab import SlabCache


@dataclass(frozen=True, slots=True)
class Prefix:
    """Tokens whose keys and values are kept, for prompts that begin with them.

    Made by :meth:`kvroute.TransformersEngine.prefix`. Read-only: any number of generations, in any threads,
    may continue it at once.
    """

    token_ids: tuple[int, ...]
    cache: SlabCache
    fingerprint: str
    name: str

    def common(self, ids: Sequence[int]) -> int:
        """How many of its tokens a prompt begins with."""
        count = 0
        for mine, theirs in zip(self.token_ids, ids, strict=False):
            if mine != theirs:
                break
            count += 1
        return count
