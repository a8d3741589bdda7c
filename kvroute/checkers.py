r"""Is an answer right? By the type of the expected one, or by a function of the user's.

``number``, ``latex`` (with math-verify), ``choice`` (a letter), ``bool`` and ``list`` are known. An answer that can't
be read is wrong, and is counted apart. What is read is the final answer: in the last ``\boxed{}``, else behind "The
answer is", else by type the last number, letter, word or list in the text.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass

from kvroute.answer_reading import Number, as_number, final_number, final_part, numbers_in, same_number
from kvroute.errors import InvalidInputError

NUMBER_TOLERANCE = 1e-6
"""Relative, for numbers that are not whole: an answer is written with few digits."""


@dataclass(frozen=True, slots=True)
class CheckResult:
    """What a checker found.

    Attributes:
        answer: as it was read, or None.
        correct: whether it is right.
        readable: whether it could be read; one that could not is wrong.
    """

    answer: str | None
    correct: bool
    readable: bool

    @classmethod
    def unreadable(cls) -> CheckResult:
        """No answer was found."""
        return cls(None, False, False)


Checker = Callable[[str, str], bool | CheckResult]
"""``(text, expected answer) -> right, or a CheckResult``."""


def check(
    text: str,
    answer: str,
    answer_type: str,
    checker: Checker | None = None,
    *,
    checkers: Mapping[str, Checker] | None = None,
) -> CheckResult:
    """Whether a text's final answer is the expected one.

    Args:
        text: what a model wrote, without its thought.
        answer: the expected answer.
        answer_type: a name in :data:`CHECKERS`, or in ``checkers``.
        checker: used instead of the one for the type.
        checkers: further ones by type; they come before those in :data:`CHECKERS`.

    Returns:
        what was read and whether it is right. A checker that gives a bool counts as having read the text.

    Raises:
        InvalidInputError: a type that is not known, or an expected answer that is none of its type.
        MissingExtraError: ``latex`` without math-verify.
    """
    chosen = checker or checker_for(answer_type, checkers)
    result = chosen(text, answer)
    if isinstance(result, CheckResult):
        if result.correct and not result.readable:
            raise InvalidInputError("A checker called an answer right that it could not read.")
        return result
    if isinstance(result, bool):
        return CheckResult(text.strip(), result, True)
    raise InvalidInputError(
        f"The checker for {answer_type!r} gave {type(result).__name__}, neither a bool nor a CheckResult."
    )


def checker_for(answer_type: str, checkers: Mapping[str, Checker] | None = None) -> Checker:
    """The checker for a type of answer.

    Raises:
        InvalidInputError: a type that is not known.
    """
    chosen = (checkers or {}).get(answer_type) or CHECKERS.get(answer_type)
    if chosen is None:
        raise InvalidInputError(
            f"There is no checker for answers of type {answer_type!r}.",
            hint=f"Use {', '.join(CHECKERS)}, or pass a function (text, answer) -> bool of your own.",
        )
    return chosen


# ---------------------------------------------------------------------- numbers


def check_number(text: str, answer: str, *, tolerance: float = NUMBER_TOLERANCE) -> CheckResult:
    """Numbers: ``05`` is 5, ``1,000`` is 1000, ``1/2`` is 0.5, ``50%`` is 50 and 0.5; units don't count.

    Args:
        text: what a model wrote.
        answer: the expected number.
        tolerance: relative to it; TheoremQA allows 0.04.

    Raises:
        InvalidInputError: the expected answer is no number.
    """
    expected = _expected_number(answer)
    found = final_number(text)
    if found is None:
        return CheckResult.unreadable()
    return CheckResult(found.text, same_number(found, expected, tolerance), True)


def number_within(tolerance: float) -> Checker:
    """A checker for numbers, and for lists of them, that allows a relative error, such as 0.04 for TheoremQA.

    Raises:
        InvalidInputError: a tolerance outside [0, 1).
    """
    if not 0 <= tolerance < 1:
        raise InvalidInputError(f"A relative tolerance is at least 0 and under 1, not {tolerance}.")

    def checker(text: str, answer: str) -> CheckResult:
        if answer.strip().startswith("["):
            return check_list(text, answer, tolerance=tolerance)
        return check_number(text, answer, tolerance=tolerance)

    return checker


def _expected_number(answer: str) -> Number:
    expected = as_number(answer)
    if expected is None:
        raise InvalidInputError(f"The expected answer {answer!r} is not one number.")
    return expected


# ---------------------------------------------------------------------- choices

_LETTER_FIRST = re.compile(r"^\W*(?:(?:option|choice)\s+)?\(?([A-Z])\b(?=\s*(?:[).:,*\]]|$|-\s|\\))", re.IGNORECASE)
_LETTER_MARKED = re.compile(r"\(\s*(?:\\text\s*\{)?([A-Z])\}?\s*\)|\b(?:[Oo]ption|[Cc]hoice)\s+\(?([A-Za-z])(?![\w'’])")
_LETTER_CAPITAL = re.compile(r"(?<![\w'’])([B-HJ-Z])(?![\w'’])")
_LETTER_STATED = re.compile(r"^\W*([A-Z])(?![\w'’])")


def check_choice(text: str, answer: str) -> CheckResult:
    """Choices by letter, in either case: ``C``, ``(C)``, ``C. because``, ``The answer is C``, ``option C``.

    Raises:
        InvalidInputError: the expected answer is no letter.
    """
    wanted = _lone_letter(answer)
    if wanted is None:
        raise InvalidInputError(f"The expected answer {answer!r} is no letter of a choice.")
    found = _choice(text)
    if found is None:
        return CheckResult.unreadable()
    return CheckResult(found, found == wanted, True)


def _lone_letter(text: str) -> str | None:
    """The letter of a text that holds nothing else."""
    words = re.findall(r"\w+", text)
    if len(words) == 2 and words[0].lower() in ("option", "choice", "answer"):
        words = words[1:]
    return words[0].upper() if len(words) == 1 and re.fullmatch("[A-Za-z]", words[0]) else None


def _choice(text: str) -> str | None:
    part = final_part(text)
    stated = part.text.replace("\\text", "").replace("\\mathrm", "")
    alone = _lone_letter(stated)
    if alone:
        return alone
    if part.how != "whole":
        first = _LETTER_FIRST.match(stated) or _LETTER_STATED.match(stated)
        # 'The answer is A good idea' and 'I think' state no letter.
        if first and not (first[1] in "AI" and re.match(r"^\W*[AI]\s+[a-z]", stated)):
            return first[1].upper()
    else:
        first = _LETTER_FIRST.match(stated)
        if first:
            return first[1].upper()
    marked = ["".join(groups) for groups in _LETTER_MARKED.findall(stated)]
    letters = marked or _LETTER_CAPITAL.findall(stated)
    return str(letters[-1]).upper() if letters else None


# ---------------------------------------------------------------------- truth values

_TRUTH = {"true": True, "yes": True, "correct": True, "false": False, "no": False, "incorrect": False}
_TRUTH_WORD = re.compile(r"\b(not\s+)?(true|false|yes|no|correct|incorrect)\b", re.IGNORECASE)


def check_bool(text: str, answer: str) -> CheckResult:
    """Truth values: ``True``, ``yes``, ``no``, ``not correct`` and the like.

    Raises:
        InvalidInputError: the expected answer is no truth value.
    """
    wanted = _TRUTH.get(answer.strip().lower())
    if wanted is None:
        raise InvalidInputError(f"The expected answer {answer!r} is no truth value.", hint="Use True or False.")
    part = final_part(text)
    words = list(_TRUTH_WORD.finditer(part.text))
    if not words:
        return CheckResult.unreadable()
    leads = not re.search(r"\w", part.text[: words[0].start()])
    word = words[0] if leads or part.how != "whole" else words[-1]
    found = _TRUTH[word[2].lower()] != bool(word[1])
    return CheckResult(str(found), found == wanted, True)


# ---------------------------------------------------------------------- lists

_LIST = re.compile(r"[\[({]([^\[\](){}]*)[\])}]")


def check_list(text: str, answer: str, *, tolerance: float = NUMBER_TOLERANCE) -> CheckResult:
    """Lists, in their order: ``[1, -1]``, ``(1, -1)`` or, where one is stated, ``1, -1``. Numbers are compared as
    numbers, other members without regard to case and quotes.

    Raises:
        InvalidInputError: the expected answer is empty.
    """
    wanted = _members(answer)
    if not wanted:
        raise InvalidInputError(f"The expected answer {answer!r} is no list.")
    part = final_part(text)
    stated = part.text.replace("\\left", "").replace("\\right", "").replace("\\{", "{").replace("\\}", "}")
    bare = ", ".join(n.text for n in numbers_in(stated)) if part.how != "whole" else ""
    bracketed = [m for m in _LIST.findall(stated) if m.strip()]
    square = re.findall(r"\[([^\[\]]*)\]", stated)
    inner = (square or bracketed or ([stated] if part.how != "whole" else []))[-1:]
    if not inner or not inner[0].strip():
        return CheckResult.unreadable()
    found = _members(inner[0])
    if not bracketed and not square and len(found) < 2 <= len(wanted) and bare:
        found = _members(bare)  # '1 and -1'
    return CheckResult(
        f"[{', '.join(found)}]",
        len(found) == len(wanted) and all(_same_member(f, w, tolerance) for f, w in zip(found, wanted, strict=True)),
        True,
    )


def _members(text: str) -> list[str]:
    inner = text.strip().strip("[](){}$").strip()
    return [m.strip().strip("'\"`").strip() for m in inner.split(",") if m.strip()] if inner else []


def _same_member(found: str, wanted: str, tolerance: float) -> bool:
    if found.casefold() == wanted.casefold():
        return True
    left, right = as_number(found), as_number(wanted)
    return left is not None and right is not None and same_number(left, right, tolerance)


def _check_latex(text: str, answer: str) -> CheckResult:
    from kvroute.latex_checker import check_latex

    return check_latex(text, answer)


CHECKERS: dict[str, Checker] = {
    "number": check_number,
    "latex": _check_latex,
    "choice": check_choice,
    "bool": check_bool,
    "list": check_list,
}
"""By the type of the expected answer."""
