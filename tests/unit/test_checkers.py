"""Checkers: what is read from a text, what agrees with what, and that no text can break or hold them."""

from __future__ import annotations

import importlib.util
import time
from fractions import Fraction
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from kvroute.answer_reading import final_number, final_part, numbers_in
from kvroute.checkers import CHECKERS, CheckResult, check, number_within
from kvroute.errors import InvalidInputError, MissingExtraError
from kvroute.latex_checker import LatexChecker, final_math, normal

# ---------------------------------------------------------------------- where the answer stands


def test_box_comes_before_phrase_before_last() -> None:
    text = r"First 1. \boxed{2} or \boxed{\frac{3}{4}}. The answer is 5. And 6"
    assert final_part(text).text == r"\frac{3}{4}"
    assert final_number(text).value == Fraction(3, 4)  # type: ignore[union-attr]
    assert final_part("First 1. The answer is 4. No: the answer is 5 apples. And 6").text == "5 apples"
    assert final_number("The answer is 5 apples out of 9.").value == 5  # type: ignore[union-attr]
    assert final_number("The answer is 3 + 4 = 7.").value == 7  # type: ignore[union-attr]
    assert final_number("First 1, then 6").value == 6  # type: ignore[union-attr]
    assert final_number("#### 12").value == 12  # type: ignore[union-attr]


def test_a_box_or_phrase_that_holds_nothing_is_passed_over() -> None:
    assert final_number(r"7 \boxed{ } \boxed{8").value == 8  # type: ignore[union-attr]
    assert final_number("5 + 6 = 11. The answer is").value == 11  # type: ignore[union-attr]


def test_a_stated_answer_without_a_number_is_not_made_up_from_another_place() -> None:
    assert final_number("We had 7. The answer is unknown.") is None
    assert final_number(r"We had 7. \boxed{\text{none}}") is None


# ---------------------------------------------------------------------- numbers


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ("05", "5"),
        ("007.50", "7.5"),
        ("1,234,567", "1234567"),
        ("1{,}000", "1000"),
        (r"10,\!000", "10000"),
        ("-3", "-3"),
        ("−3", "-3"),
        ("x = - 3", "-3"),
        ("-$5", "-5"),
        ("$-5", "-5"),
        ("$1,234.50", "1234.5"),
        (r"\$18", "18"),
        ("8 - 3", "3"),
        ("8-3", "3"),
        ("x-5", "5"),
        ("1/2", "0.5"),
        ("-1/4", "-0.25"),
        ("1 1/2", "1.5"),
        (r"\frac{3}{4}", "0.75"),
        (r"-\dfrac{3}{4}", "-0.75"),
        (r"\frac12", "0.5"),
        (r"2\frac{1}{2}", "2.5"),
        ("3.5e-08", "0.000000035"),
        (r"2 \times 10^{3}", "2000"),
        ("10^5", "100000"),
        (".5", "0.5"),
        ("5.", "5"),
        ("12 cm^2", "12"),
        (r"12\text{ cm}^2", "12"),
        ("106^\\circ", "106"),
        ("**72**", "72"),
        ("H2O weighs 18", "18"),
    ],
)
def test_numbers(text: str, value: str) -> None:
    found = final_number(text)
    assert found is not None
    assert found.value == Fraction(value)
    assert check(text, value, "number").correct


def test_percent_is_its_number_and_its_hundredth() -> None:
    for text, answer in (
        ("50%", "50"),
        ("50%", "0.5"),
        (r"50\%", "0.5"),
        ("0.5", "50%"),
        ("50", "50%"),
        ("50%", "50%"),
    ):
        assert check(text, answer, "number").correct, (text, answer)
    assert not check("50%", "5", "number").correct
    assert not check("0.5%", "50%", "number").correct


def test_tolerance() -> None:
    assert not check("103", "100", "number").correct
    assert check("0.3333333", "1/3", "number").correct
    assert not check("1000001", "1000000", "number").correct
    theorem = number_within(0.04)
    assert check("103", "100", "number", theorem).correct
    assert check("-96.1", "-100", "number", theorem).correct
    assert not check("105", "100", "number", theorem).correct
    assert not check("0.01", "0", "number", theorem).correct
    assert check("[1.03, 2]", "[1, 2]", "list", theorem).correct
    with pytest.raises(InvalidInputError, match="tolerance"):
        number_within(1.5)


def test_what_cannot_be_read_is_wrong_and_says_so() -> None:
    for kind, answer in (("number", "5"), ("choice", "C"), ("bool", "True"), ("list", "[1, 2]")):
        for text in ("", "  \n", "...", "hmm well"):
            assert check(text, answer, kind) == CheckResult(None, False, False), (kind, text)
    assert check("6", "5", "number") == CheckResult("6", False, True)
    assert not check("1" * 5000, "5", "number").readable
    assert not check("10^99999999", "5", "number").correct
    assert not check("1/0", "5", "number").correct


@given(
    st.integers(-(10**12), 10**12), st.integers(0, 3), st.sampled_from(["{}", "The answer is {}.", "so 3, 4, {} kg"])
)
def test_whole_numbers_in_any_form(value: int, zeros: int, frame: str) -> None:
    sign = "-" if value < 0 else ""
    for written in (f"{value}", f"{value:,}", f"{sign}{'0' * zeros}{abs(value)}", f"${value}$", f"{value}.0"):
        assert check(frame.format(written), str(value), "number").correct, frame.format(written)
    assert not check(frame.format(value + 1), str(value), "number").correct


@given(st.decimals(-(10**6), 10**6, places=3, allow_nan=False))
def test_decimals(value: Any) -> None:
    assert check(f"It is {value} m.", str(value), "number").correct
    assert check(rf"\boxed{{{value}}}", f"{value}", "number").correct


# ---------------------------------------------------------------------- choices, truth values, lists


@pytest.mark.parametrize(
    "text",
    [
        *("C", "c", "(C)", "C.", "C) long", "**C**", "C: long", "(C) because A is wrong", "option C", "Option (c)."),
        *(
            "The answer is C.",
            "The answer is (C) long",
            "the correct answer is: **C**",
            r"\boxed{C}",
            r"\boxed{\text{(C)}}",
        ),
        *("Answer: C", "I think it is C", "A is wrong, so it must be (C)", "It can't be (A) or (B). It is option C"),
    ],
)
def test_choices(text: str) -> None:
    assert check(text, "C", "choice") == CheckResult("C", True, True)
    assert check(text, "(c)", "choice").correct
    assert not check(text, "B", "choice").correct


def test_words_are_no_choices() -> None:
    assert not check("The answer is A good idea", "A", "choice").readable
    assert not check("I think so", "I", "choice").readable
    assert not check("a cat", "A", "choice").readable


@pytest.mark.parametrize(
    ("text", "found"),
    [
        *(
            ("True", True),
            ("yes.", True),
            ("The answer is No, since it is true that", False),
            ("Yes, there is no x", True),
        ),
        *(
            (r"\boxed{\text{False}}", False),
            ("It is true. So the claim is not true", False),
            ("I say: incorrect", False),
        ),
        ("**No**, yes is wrong", False),
    ],
)
def test_truth_values(text: str, found: bool) -> None:
    assert check(text, "True", "bool") == CheckResult(str(found), found, True)
    assert check(text, "no", "bool").correct is not found


@pytest.mark.parametrize(
    ("text", "right"),
    [
        *(
            ("[1, -1]", True),
            ("The list is (1, -1).", True),
            ("The answer is 1, -1", True),
            ("The answer is 1 and -1", True),
        ),
        *((r"\boxed{[1, -1]}", True), (r"\boxed{\left(1,-1\right)}", True), ("[2, 3] no, [1.0,-1]", True)),
        *(("[-1, 1]", False), ("[1]", False), ("[1, -1, 0]", False), ("['a', 'b']", False)),
    ],
)
def test_lists(text: str, right: bool) -> None:
    result = check(text, "[1, -1]", "list")
    assert (result.correct, result.readable) == (right, True)
    assert check("['b', \"A\"]", "[b, a]", "list").correct


# ---------------------------------------------------------------------- the user's own, and misuse


def test_checkers_of_the_users() -> None:
    assert check(" Paris ", "Paris", "city", lambda text, answer: answer in text) == CheckResult("Paris", True, True)
    own = {"city": lambda text, answer: CheckResult.unreadable(), "number": lambda text, answer: True}
    assert not check("Paris", "Paris", "city", checkers=own).readable
    assert check("6", "5", "number", checkers=own).correct
    with pytest.raises(InvalidInputError, match="neither a bool nor a CheckResult"):
        check("a", "b", "city", lambda text, answer: "yes")  # type: ignore[arg-type, return-value]
    with pytest.raises(InvalidInputError, match="could not read"):
        check("a", "b", "city", lambda text, answer: CheckResult(None, True, False))


def test_misuse() -> None:
    with pytest.raises(InvalidInputError, match=r"'city'.*number, latex, choice"):
        check("a", "b", "city")
    for kind, answer in (("number", "x"), ("number", "1 2"), ("choice", "AB"), ("bool", "maybe"), ("list", "[]")):
        with pytest.raises(InvalidInputError, match="expected answer"):
            check("1", answer, kind)


@settings(max_examples=300, deadline=None)
@given(
    st.lists(
        st.sampled_from(
            [
                *(
                    "\\boxed{",
                    "}",
                    "{",
                    "$",
                    "-",
                    "−",
                    "1",
                    "0",
                    "23",
                    ",",
                    ".",
                    "/",
                    "^",
                    "e5",
                    "%",
                    " ",
                    "\n",
                    "\\frac",
                ),
                *(
                    "The answer is ",
                    "(C)",
                    "true",
                    "not ",
                    "[",
                    "]",
                    "(",
                    ")",
                    "x",
                    "\\text{",
                    "\\times 10",
                    "=",
                    "é",
                    "\x00",
                ),
            ]
        ),
        max_size=40,
    ).map("".join)
    | st.text(max_size=200)
)
def test_any_text_is_read_or_called_unreadable(text: str) -> None:
    for kind, answer in (("number", "23"), ("choice", "C"), ("bool", "True"), ("list", "[1, 23]")):
        result = CHECKERS[kind](text, answer)
        assert isinstance(result, CheckResult)
        assert result.readable == (result.answer is not None)
        assert result.readable or not result.correct
    final_math(text)
    normal(text)


@pytest.mark.parametrize(
    "piece",
    [
        "1",
        "-",
        "1,234,",
        "\\boxed{",
        "{",
        "\\frac{1}",
        "the answer is ",
        "(a",
        "[1,",
        "$",
        " ",
        "not ",
        "1/",
        "\n",
        "a^{2",
    ],
)
def test_long_texts_take_no_long_time(piece: str) -> None:
    text = piece * (100_000 // len(piece))
    began = time.perf_counter()
    for kind, answer in (("number", "23"), ("choice", "C"), ("bool", "True"), ("list", "[1, 23]")):
        check(text, answer, kind)
    final_math(text)
    normal(text[:2000])
    assert time.perf_counter() - began < 10
    assert len(numbers_in("1 " * 1000)) == 1000


# ---------------------------------------------------------------------- formulas


@pytest.fixture(scope="module")
def latex() -> Any:
    checker = LatexChecker()
    yield checker
    checker.close()


@pytest.mark.parametrize(
    ("text", "answer", "right"),
    [
        (r"\boxed{\frac12}", "0.5", True),
        (r"So it is $\dfrac{1}{2}$.", r"\frac{1}{2}", True),
        ("The answer is $-q + p$.", "p - q", True),
        ("The answer is 2x+5", "5+2x", True),
        ("The answer is 2x+5", "5", False),
        ("The answer is 5 apples", "5", True),
        ("So we get x = 5", "5", True),
        (r"\boxed{\text{Evelyn}}", r"\text{Evelyn}", True),
        (r"\boxed{\text{Bob}}", r"\text{Evelyn}", False),
        (r"\boxed{(-\infty, 3) \cup (3, \infty)}", r"(-\infty,3) \cup (3,\infty)", True),
        (r"we pay $\$5.50$", r"\$5.50", True),
        (r"\boxed{6}", "5", False),
    ],
)
def test_formulas(latex: LatexChecker, text: str, answer: str, right: bool) -> None:
    result = latex(text, answer)
    assert (result.correct, result.readable) == (right, True)


def test_formulas_that_cannot_be_read(latex: LatexChecker) -> None:
    for text in ("", "hmm", "\\boxed{", "x" * 3000):
        assert latex(text, "5") == CheckResult.unreadable()
    with pytest.raises(InvalidInputError, match="empty"):
        latex("5", " ")


def test_a_formula_that_takes_forever_is_stopped_and_the_next_one_is_read() -> None:
    checker = LatexChecker(time_limit=1.0)
    assert checker(r"\boxed{1+1}", "2").correct  # the worker has started
    for endless in (r"\boxed{9^{9^{9^{9}}}}", r"\boxed{100000000!}"):
        began = time.perf_counter()
        assert checker(endless, "5") == CheckResult.unreadable()
        assert time.perf_counter() - began < 60  # it has to start anew within, on a machine that may be busy
    assert checker(r"\boxed{\frac{2}{4}}", "0.5").correct
    checker.close()
    assert checker(r"\boxed{\frac{2}{4}}", "0.5").correct  # starts anew
    checker.close()


def test_a_worker_that_dies_is_replaced() -> None:
    checker = LatexChecker()
    assert checker(r"\boxed{1+1}", "2").correct
    assert checker._worker is not None
    checker._worker.kill()
    checker._worker.wait()
    assert checker(r"\boxed{1+2}", "3").correct
    checker.close()


def test_formulas_need_math_verify(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(MissingExtraError, match=r"math-verify.*kvroute\[eval\]"):
        LatexChecker()


def test_limits_are_checked() -> None:
    with pytest.raises(InvalidInputError, match="positive"):
        LatexChecker(time_limit=0)
