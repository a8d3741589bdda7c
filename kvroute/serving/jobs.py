"""Requests to an engine of vLLM's, in this process or elsewhere, checked before anything is sent."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from kvroute.errors import EmptyTextError, InvalidInputError

if TYPE_CHECKING:
    from kvroute.generation import SamplingOptions, TokenIds
    from kvroute.serving.asks import Ask
    from kvroute.thinking import Mode


@dataclass(frozen=True, slots=True)
class Decide:
    """What is to be decided about a request inside the engine, by what it has loaded.

    Attributes:
        policy: name of the policy that decides how hard to think.
        mode: demanded; then nothing is decided.
        shadow: decide, say so, and change nothing.
        confidence: name of the head that says how likely the answer is right.
        reserve: tokens that the answer may have beyond ``max_tokens``: those of its mode, which count there.
    """

    policy: str | None = None
    mode: Mode | None = None
    shadow: bool = False
    confidence: str | None = None
    reserve: int = 0


@dataclass(frozen=True, slots=True)
class Job:
    """One request: its place among the prompts, the prompt, and what is wanted.

    Attributes:
        choices: tokens whose log-probability of coming next is wanted.

    Raises:
        EmptyTextError: the prompt holds nothing.
        InvalidInputError: it is no Unicode.
    """

    index: int
    prompt: str | TokenIds
    ask: Ask | None
    options: SamplingOptions
    seed: int | None = None
    choices: tuple[int, ...] = ()

    def __post_init__(self) -> None:
        check_text(self.index, self.prompt)
        if not (self.prompt if isinstance(self.prompt, str) else self.prompt.ids):
            raise EmptyTextError(self.index)


def check_text(index: int, prompt: object) -> None:
    """Refuse a text that is no Unicode.

    Raises:
        InvalidInputError: it holds a lone surrogate.
    """
    if not isinstance(prompt, str):
        return
    try:
        prompt.encode()
    except UnicodeEncodeError as error:
        raise InvalidInputError(
            f"Text {index} can't be sent: {error.reason} at character {error.start}.",
            hint="Clean it first, e.g. with text.encode('utf-8', 'replace').decode().",
        ) from error
