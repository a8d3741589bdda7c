"""How a served model thinks, in tokens: what a mode puts behind a prompt, and what a text shows of one."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from types import SimpleNamespace
from typing import Any, cast

from kvroute.engines.base import Engine
from kvroute.errors import AskError, UnsupportedModelError
from kvroute.route_steering import ClosingMark
from kvroute.thinking import Layout, Mode, ThinkingMode


@dataclass(frozen=True, slots=True)
class ThinkingTokens:
    """How the served model thinks, in tokens.

    Attributes:
        suffixes: by mode, what follows a prompt.
        phrases: by mode, what enters it in mid-answer.
        mark: ends a thought.
        rest: what the fast suffix holds behind the slow one, where its text begins with it; else None.
    """

    suffixes: dict[Mode, list[int]]
    phrases: dict[Mode, list[int]]
    mark: ClosingMark
    rest: list[int] | None

    @classmethod
    def of(cls, tokenizer: Any, thinking: ThinkingMode | None = None, name: str = "the model") -> ThinkingTokens:
        """From the model's tokenizer and, if there is one, the user's own pair of modes.

        Raises:
            UnsupportedModelError: how it thinks is not known, or can't be forced.
        """
        engine = _alone(tokenizer, name)
        pair = ThinkingMode.of(engine) if thinking is None else thinking
        if pair.in_question:
            raise UnsupportedModelError(
                f"How hard {name} thinks is said in the user's message, and a server gets that whole: nothing can be "
                "put into it any more.",
                hint="Give the setting 'thinking' with tokens that stand in the model's turn.",
            )
        fast, slow = engine.tokenize_texts([pair.fast, pair.slow], special_tokens=False)
        rest: list[int] | None = None
        if slow and fast[: len(slow)] == slow:
            rest = fast[len(slow) :]
        elif pair.slow and pair.fast.startswith(pair.slow):
            rest = engine.tokenize_texts([pair.fast.removeprefix(pair.slow)], special_tokens=False)[0]
        phrases: dict[Mode, list[int]] = {"fast": pair.phrase(engine, "fast"), "slow": pair.phrase(engine, "slow")}
        return cls({"fast": fast, "slow": slow}, phrases, ClosingMark(engine, pair.close), rest)

    def layout(self, prompt: Sequence[int]) -> tuple[Layout, Mode | None]:
        """What of a prompt both modes share, and the tokens that a mode still needs.

        Returns:
            the layout, and the mode where the prompt sets it already (its template was told not to think).

        Raises:
            AskError: the prompt opens a thought itself, and this model's fast mode does not continue from there.
        """
        fast, slow = self.suffixes["fast"], self.suffixes["slow"]
        if _ends_with(prompt, fast):
            return Layout(list(prompt[: len(prompt) - len(fast)]), [], []), "fast"
        if _ends_with(prompt, slow):
            if self.rest is None:
                raise AskError(
                    "The prompt opens a thought, and this model's fast mode does not go on from there.",
                    hint="Send the prompt without it (add_generation_prompt alone).",
                )
            return Layout(list(prompt[: len(prompt) - len(slow)]), self.rest, []), None
        return Layout(list(prompt), fast, slow), None

    def shown(self, answer: Sequence[int], opened: bool) -> tuple[Mode, int] | None:
        """The mode that an answer shows by itself and how many tokens that took; None where it is too short to tell.

        Args:
            answer: its tokens so far.
            opened: whether the prompt opened a thought.
        """
        if opened:
            return "slow", 0
        fast, slow = self.suffixes["fast"], self.suffixes["slow"]
        for mode, suffix in sorted((("fast", fast), ("slow", slow)), key=lambda pair: -len(pair[1])):
            if suffix and list(answer[: len(suffix)]) == suffix:
                return cast(Mode, mode), len(suffix)
        if any(len(answer) < len(s) and list(answer) == s[: len(answer)] for s in (fast, slow)):
            return None
        return "fast", 0


def _ends_with(tokens: Sequence[int], ending: Sequence[int]) -> bool:
    return bool(ending) and list(tokens[-len(ending) :]) == list(ending)


def _alone(tokenizer: Any, name: str) -> Engine:
    """A tokenizer in the form in which :class:`ThinkingMode` asks an engine."""

    def tokenize_texts(texts: Sequence[str], *, special_tokens: bool = True) -> list[list[int]]:
        return [list(ids) for ids in tokenizer(list(texts), add_special_tokens=special_tokens)["input_ids"]]

    return cast(
        Engine, SimpleNamespace(tokenizer=tokenizer, tokenize_texts=tokenize_texts, info=SimpleNamespace(name=name))
    )
