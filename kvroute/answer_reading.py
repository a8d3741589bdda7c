"""Finding the final answer in a text, and reading the numbers in it."""

from __future__ import annotations

import re
from dataclasses import dataclass
from fractions import Fraction

MAX_TEXT = 20_000
"""Only the last so many characters of a text are looked at; an answer stands at the end."""
_MAX_DIGITS = 1000
_MAX_EXPONENT = 400

_PHRASE = re.compile(r"(?:\banswer\s*(?:\*\*)?\s*(?:is|are|:|=)(?:\*\*)?|####)\s*:?\s*", re.IGNORECASE)
_SENTENCE_END = re.compile(r"\n|[.!?](?=\s|$)")


@dataclass(frozen=True, slots=True)
class Part:
    """Where the final answer stands.

    Attributes:
        text: it, with what surrounds it.
        how: ``boxed``, ``phrase`` ("The answer is ...") or ``whole`` (nothing marks it).
    """

    text: str
    how: str


def final_part(text: str) -> Part:
    r"""The part of a text that holds the final answer: the last ``\boxed{}``, else what follows the last "The answer
    is", to the end of its sentence, else the whole text."""
    text = text[-MAX_TEXT:]
    boxed = last_boxed(text)
    if boxed is not None:
        return Part(boxed, "boxed")
    for match in reversed(list(_PHRASE.finditer(text))):
        rest = text[match.end() :]
        end = _SENTENCE_END.search(rest)
        part = (rest[: end.start()] if end else rest).strip()
        if part.strip("*:_`$ "):
            return Part(part, "phrase")
    return Part(text, "whole")


def last_boxed(text: str) -> str | None:
    r"""What the last complete, non-empty ``\boxed{...}`` or ``\fbox{...}`` holds; braces may be nested."""
    openings = [m.end() for m in re.finditer(r"\\f?boxed\s*\{", text)] + [
        m.end() for m in re.finditer(r"\\fbox\s*\{", text)
    ]
    for start in sorted(openings, reverse=True)[:50]:
        depth = 1
        for at in range(start, len(text)):
            char = text[at]
            if text[at - 1] == "\\":
                continue
            depth += (char == "{") - (char == "}")
            if depth == 0:
                if text[start:at].strip():
                    return text[start:at].strip()
                break
    return None


# ---------------------------------------------------------------------- numbers

_DIGITS = r"(?:\d{1,3}(?:,\d{3})+(?!\d)|\d+)(?:\.\d+)?|\.\d+"
_NUMBER = re.compile(
    rf"""
    (?P<sign>(?<![\w)\]}}.])(?:[-−–+]|(?<![\w)\]}}]\s)[-−–+]\s)(?=[$€£¥]?\s?(?:\.?\d|\\[dt]?frac)))?  # no difference
    (?<![A-Za-z_\d\\])(?:[$€£¥]\s?)?(?P<late>(?<=[$€£¥])[-−–])?
    (?:
      (?:(?P<whole>\d+)\s*)?\\[dt]?frac\s*\{{\s*(?P<top>-?\d+)\s*\}}\s*\{{\s*(?P<bottom>\d+)\s*\}}
      | \\[dt]?frac\s*(?P<top1>\d)\s*(?P<bottom1>\d)
      | (?P<mixed>\d+)\s+(?P<mtop>\d+)\s*/\s*(?P<mbottom>\d+)
      | (?P<number>{_DIGITS})
        (?: \s*(?:\\times|\\cdot|[*x×·])\s*10\s*(?:\^|\*\*)\s*\{{?\s*(?P<ten>[-−+]?\d+)\s*\}}?
          | [eE](?P<e>[-+]?\d+)
          | \s*(?:\^|\*\*)\s*\{{?\s*(?P<power>[-−+]?\d+)\s*\}}?
          | \s*/\s*(?P<over>{_DIGITS})
        )?
    )
    (?P<percent>\s*\\?%|\s+percent\b)?
    """,
    re.VERBOSE,
)
_UNIT_POWER = re.compile(r"(?<=[A-Za-z}])\s*\^\s*\{?\s*[-−]?\d+\s*\}?")
_TEXT = re.compile(r"\\(?:text|mathrm|textbf|mathbf|mbox)\s*\{([^{}]*)\}")


@dataclass(frozen=True, slots=True)
class Number:
    """A number as it was read.

    Attributes:
        value: exactly.
        text: as it stood.
        percent: whether a percent sign follows; ``value`` is then that of the number before the sign.
    """

    value: Fraction
    text: str
    percent: bool = False


def numbers_in(text: str) -> list[Number]:
    """The numbers in a text, in their order: signs, commas between thousands, decimals, fractions, mixed numbers,
    powers and powers of ten are understood; a digit within a word (``x1``) and a unit's power (``cm^2``) are none."""
    text = re.sub(r"(?<=\d)(?:\{,\}|,?\\!|\\,)(?=,?\d{3})", ",", text)
    text = text.replace("\\$", "$").replace("\\left", "").replace("\\right", "")
    text = _UNIT_POWER.sub("", _TEXT.sub(r" \1 ", text))
    text = re.sub(r"\^\s*\{?\s*\\(?:circ|degree)\s*\}?", " ", text)
    found = []
    for match in _NUMBER.finditer(text):
        value = _value(match)
        if value is not None:
            found.append(Number(value, match.group().strip(), match["percent"] is not None))
    return found


def final_number(text: str) -> Number | None:
    """The number a text ends up with: in the box, else the one after "The answer is", else the last in the text.

    Behind "The answer is", and in a box, it is the first number, or the first behind the last equals sign.
    None where there is none, also where a box or a stated answer holds none.
    """
    part = final_part(text)
    if part.how == "whole":
        found = numbers_in(part.text)
        return found[-1] if found else None
    tail = part.text.rpartition("=")[2]
    found = numbers_in(tail) or numbers_in(part.text)
    return found[0] if found else None


def as_number(text: str) -> Number | None:
    """A text that is one number, whatever unit stands around it; None where it is not."""
    found = numbers_in(text)
    return found[0] if len(found) == 1 else None


def same_number(found: Number, expected: Number, tolerance: float) -> bool:
    """Whether two numbers agree within a relative tolerance; whole numbers and zero agree only exactly if the
    tolerance is under 1e-3. A percentage agrees with its number and with its hundredth."""
    values = {found.value, found.value / 100} if found.percent else {found.value}
    wanted = {expected.value, expected.value / 100} if expected.percent and not found.percent else {expected.value}
    if found.percent and expected.percent:
        values = {found.value}
    return any(_close(a, b, tolerance) for a in values for b in wanted)


def _close(found: Fraction, expected: Fraction, tolerance: float) -> bool:
    if found == expected:
        return True
    if tolerance < 1e-3 and found.denominator == 1 and expected.denominator == 1:
        return False
    return abs(found - expected) <= Fraction(tolerance) * abs(expected)


def _value(match: re.Match[str]) -> Fraction | None:
    if len(match.group()) > _MAX_DIGITS:
        return None
    try:
        value = _unsigned(match)
    except ZeroDivisionError:
        return None
    if value is None:
        return None
    minus = (match["sign"] or match["late"] or "").strip() in ("-", "−", "–")
    return -value if minus else value


def _unsigned(match: re.Match[str]) -> Fraction | None:
    if match["top"] is not None:
        return Fraction(int(match["whole"] or 0)) + Fraction(int(match["top"]), int(match["bottom"]))
    if match["top1"] is not None:
        return Fraction(int(match["top1"]), int(match["bottom1"]))
    if match["mixed"] is not None:
        return int(match["mixed"]) + Fraction(int(match["mtop"]), int(match["mbottom"]))
    value = _decimal(match["number"])
    if match["over"] is not None:
        return value / _decimal(match["over"])
    power = match["ten"] or match["e"] or match["power"]
    if power is None:
        return value
    exponent = int(power.replace("−", "-"))
    if abs(exponent) > _MAX_EXPONENT:
        return None
    return value**exponent if match["power"] is not None else value * Fraction(10) ** exponent


def _decimal(text: str) -> Fraction:
    return Fraction(text.replace(",", ""))
