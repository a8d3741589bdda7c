"""Which part of the data a question belongs to: by a hash of its skeleton, with numbers and names masked.

Questions that differ only in numbers, names, case, spaces or punctuation share a skeleton, hence a part, so none of
them is trained on while another is tested on. A part is a function of skeleton, shares and seed alone: a file may
grow or be shuffled, and no row moves.
"""

from __future__ import annotations

import hashlib
import re
import unicodedata
from collections.abc import Mapping, Sequence

from kvroute.errors import InvalidInputError
from kvroute.label_rows import PARTS, Part

SHARES: dict[Part, float] = {"train": 0.5, "validation": 0.15, "calibration": 0.2, "test": 0.15}
"""By part, the share of the skeletons."""


def _words(text: str) -> frozenset[str]:
    return frozenset(text.split())


_NUMBER_WORDS = _words(
    "zero one two three four five six seven eight nine ten eleven twelve thirteen fourteen fifteen sixteen seventeen "
    "eighteen nineteen twenty thirty forty fifty sixty seventy eighty ninety hundred thousand million billion"
)
_OPENERS = _words(
    "a an the this that these those there here it its he she they we you i his her their our your my who whose whom "
    "what which when where why how if in on at to from for of by with without within after before during while until "
    "since as and or but so then now also each every all any some many much most more both either neither no not yes "
    "one is are was were be been do does did has have had can could will would shall should may might must let suppose "
    "given find compute calculate determine evaluate solve simplify express assume consider choices passage question "
    "answer"
)
"""Words that open sentences and are no names."""
_TOKEN = re.compile(r"\d+(?:[.,:/]\d+)*|[^\W\d_]+(?:['’][^\W\d_]+)?|[^\w\s]|_")
_SENTENCE_ENDS = frozenset(".!?:")
_KEPT_MARKS = frozenset("+-*/=<>^%")
"""Marks that change what is asked; the others are dropped."""


def skeleton(question: str) -> str:
    """A question with its numbers as ``#`` and its names as ``@``, in lower case.

    A number is digits, or a number word. A name is a capitalised word of two letters or more; where one stands within
    a sentence, all its occurrences are names, and at a sentence's beginning it is none if it is a common word there
    ("How", "Find"). A run of names, or of numbers, counts as one, so that "Mary Ann" and "Tom" are alike. A question in
    capitals, or a single letter (a variable, a choice), has no names.

    Args:
        question: any text.

    Returns:
        words, masks and marks of arithmetic, with one space between.
    """
    text = unicodedata.normalize("NFKC", question).replace("\n", " . ")
    tokens = _TOKEN.findall(text)
    names, places = _names(tokens)
    kept: list[str] = []
    for place, token in enumerate(tokens):
        word = _bare(token).casefold()
        if token[0].isdigit() or word in _NUMBER_WORDS:
            mask = "#"
        elif word in names or place in places:
            mask = "@"
        elif token[0].isalpha() or token in _KEPT_MARKS:
            kept.append(word)
            continue
        else:
            continue
        if not kept or kept[-1] != mask:
            kept.append(mask)
    return " ".join(kept)


def _names(tokens: Sequence[str]) -> tuple[set[str], set[int]]:
    """The words that stand capitalised within a sentence, in lower case, and the places of those that open one and
    are no common word."""
    words = [t for t in tokens if t[0].isalpha() and len(t) > 1]
    if sum(w.isupper() for w in words) * 2 > len(words):
        return set(), set()
    names: set[str] = set()
    places: set[int] = set()
    opens = True
    for place, token in enumerate(tokens):
        bare = _bare(token)
        if token in _SENTENCE_ENDS:
            opens = True
        elif token[0].isalpha() and len(bare) > 1:  # the letter of '(A) To allow ...' leaves the sentence to begin
            if bare[0].isupper() and bare[1:].islower():
                if not opens:
                    names.add(bare.casefold())
                elif bare.casefold() not in _OPENERS:
                    places.add(place)
            opens = False
    return names - _OPENERS, places


def _bare(token: str) -> str:
    return token.removesuffix("'s").removesuffix("’s")


def skeleton_digest(question: str) -> str:
    """A question's skeleton as 32 hexadecimal digits."""
    return hashlib.sha256(skeleton(question).encode("utf-8", "surrogatepass")).hexdigest()[:32]


def part_of(skeleton: str, shares: Mapping[Part, float] | None = None, seed: int = 0) -> Part:
    """The part of a skeleton.

    Args:
        skeleton: it, or its digest; use one of them throughout.
        shares: by part, its share; those not named get none. By default :data:`SHARES`.
        seed: gives another division.

    Raises:
        InvalidInputError: shares that are negative, unknown or don't add up to 1.
    """
    checked = check_shares(shares)
    digest = hashlib.sha256(f"{seed}\n{skeleton}".encode("utf-8", "surrogatepass")).digest()
    place = int.from_bytes(digest[:8], "big") / 2**64
    bound = 0.0
    for part in PARTS:
        bound += checked.get(part, 0.0)
        if place < bound:
            return part
    return [p for p in PARTS if checked.get(p, 0.0) > 0][-1]  # a sum that rounds below the place


def check_shares(shares: Mapping[Part, float] | None) -> dict[Part, float]:
    """Shares of all parts.

    Raises:
        InvalidInputError: as :func:`part_of`.
    """
    if shares is None:
        return dict(SHARES)
    unknown = sorted(set(shares) - set(PARTS))
    if unknown:
        raise InvalidInputError(f"There is no part {unknown[0]!r}.", hint=f"The parts are {', '.join(PARTS)}.")
    found = {part: float(shares.get(part, 0.0)) for part in PARTS}
    if any(not 0 <= s <= 1 for s in found.values()) or abs(sum(found.values()) - 1) > 1e-6:
        raise InvalidInputError(
            f"The shares {list(found.values())} are not four numbers of at least 0 that add up to 1.",
            hint="Give train, validation, calibration and test, such as 0.5,0.15,0.2,0.15.",
        )
    return found
