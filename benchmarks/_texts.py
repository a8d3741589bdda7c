"""Made-up text of given lengths, from a seed: costs depend on lengths, not on meaning."""

from __future__ import annotations

import random

WORDS = """
time year people way day man thing woman life child world school state family student group country problem hand part
place case week company system program question work government number night point home water room mother area money
story fact month lot right study book eye job word business issue side kind head house service friend father power hour
game line end member law car city community name president team minute idea body information
""".split()  # noqa: SIM905


def text_of(words: int, rng: random.Random) -> str:
    """Text of so many words (one token each, as a rule)."""
    return " ".join(rng.choice(WORDS) for _ in range(words))


def mixed_texts(count: int, seed: int, *, low: int = 4, high: int = 128) -> list[str]:
    """Texts whose lengths spread evenly on a logarithmic scale."""
    rng = random.Random(seed)
    return [text_of(int(low * (high / low) ** rng.random()), rng) for _ in range(count)]


def token_rows(count: int, length: int, vocabulary: int, seed: int) -> list[list[int]]:
    """Rows of random token ids."""
    rng = random.Random(seed)
    return [[rng.randrange(100, vocabulary) for _ in range(length)] for _ in range(count)]
