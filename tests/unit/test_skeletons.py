"""Skeletons put near-duplicates together; parts depend on nothing but the skeleton."""

from __future__ import annotations

import random
import string

import pytest
from hypothesis import given
from hypothesis import strategies as st

from kvroute.errors import InvalidInputError
from kvroute.label_rows import PARTS
from kvroute.skeletons import SHARES, part_of, skeleton, skeleton_digest


def test_numbers_and_names_are_masked() -> None:
    one = "Natalia sold clips to 48 of her friends in April. How many did Natalia sell for $1,200.50?"
    other = "Mary Ann sold clips to twelve of her friends in June.  How many did Mary sell for $ 7"
    assert skeleton(one) == skeleton(other) == "@ sold clips to # of her friends in @ how many did @ sell for #"
    assert skeleton_digest(one) == skeleton_digest(other)


@pytest.mark.parametrize(
    ("one", "other", "same"),
    [
        ("Tom has 3 cats.", "Ann has 14 cats", True),
        ("Tom's cat is 3", "Ann’s cat is 3.5", True),
        ("How many cats has Tom?", "how many cats has tom?", False),  # in lower case a name can't be told
        ("What is 3 + 4?", "What is 5 + 6?", True),
        ("What is 3 + 4?", "What is 3 - 4?", False),
        ("WHAT IS THE SUM OF 3 AND 4", "WHAT IS THE SUM OF 5 AND 6", True),
        ("WHAT IS THE SUM OF 3 AND 4", "WHAT IS THE PRODUCT OF 3 AND 4", False),
        ("Find x if x + 3 = 4.", "Find y if y + 3 = 4.", False),
        ("Which is hot?\nChoices:\n(A) fire\n(B) ice", "Which is hot?\nChoices:\n(A) fire\n(B) snow", False),
        ("Is it so?", "Is it  so ?", True),
    ],
)
def test_which_questions_are_alike(one: str, other: str, same: bool) -> None:
    assert (skeleton(one) == skeleton(other)) is same


@given(st.text(max_size=100))
def test_any_text_has_a_skeleton_and_a_part(text: str) -> None:
    assert skeleton(text) == skeleton(text + " ")
    assert part_of(skeleton_digest(text)) in PARTS


@given(st.integers(0, 10**9), st.integers(0, 10**9))
def test_numbers_do_not_matter(one: int, other: int) -> None:
    frame = "A farmer has {} cows and sells half of them for {:,} dollars."
    assert skeleton(frame.format(one, other)) == skeleton(frame.format(other, one))


def _many(count: int) -> list[str]:
    rng = random.Random(0)
    return ["".join(rng.choices(string.ascii_lowercase, k=12)) for _ in range(count)]


def test_parts_have_their_shares() -> None:
    found = [part_of(s) for s in _many(20_000)]
    for part, share in SHARES.items():
        assert abs(found.count(part) / len(found) - share) < 0.02
    assert {part_of(s, {"test": 1.0}) for s in _many(200)} == {"test"}
    assert "calibration" not in {part_of(s, {"train": 0.5, "validation": 0.5}) for s in _many(200)}


def test_a_part_is_a_function_of_skeleton_shares_and_seed() -> None:
    skeletons = _many(500)
    assert [part_of(s) for s in skeletons] == [part_of(s, dict(SHARES), 0) for s in skeletons]
    assert [part_of(s) for s in skeletons] != [part_of(s, seed=1) for s in skeletons]
    # Written down, so that a change that would move the rows of files that exist is seen.
    assert [part_of(s) for s in ("a", "b", "c", "d", "e", "f")] == PINNED


PINNED = ["train", "train", "test", "train", "calibration", "validation"]


@pytest.mark.parametrize(
    "shares", [{"train": 0.5}, {"train": 1.5, "test": -0.5}, {"train": float("nan"), "test": 1.0}, {"trial": 1.0}]
)
def test_shares_that_make_no_sense(shares: dict[str, float]) -> None:
    with pytest.raises(InvalidInputError):
        part_of("a", shares)  # type: ignore[arg-type]
