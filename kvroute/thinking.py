"""How a model family thinks: a :class:`ThinkingMode` is what makes it answer at once (fast) or think first (slow).

A prompt is laid out so that what decides comes first and the mode's own tokens come last: both modes continue the
same cache, so the choice can be read from the prompt's keys and values before a token is written (docs/concepts.md;
arXiv 2601.20326, section 4.2).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal, Self

from kvroute.errors import ChatTemplateError, UnsupportedModelError
from kvroute.generation import Prompt, TokenIds
from kvroute.pooling import Spec

if TYPE_CHECKING:
    from kvroute.engines.base import Engine

Mode = Literal["fast", "slow"]

OPEN, CLOSE = "<think>", "</think>"
_MARK = "\u241ekvroute\u241e"
_HOW = (
    "Define the pair yourself: ThinkingMode(fast='<text that makes it answer at once>', slow='<text that opens a "
    "thought>', leave='<text that closes a thought>', enter='<text that opens one in an answer>', "
    "close='<text that ends every thought>'), or take ThinkingMode.instructions() for a model without such tokens."
)


@dataclass(frozen=True, slots=True)
class Layout:
    """One prompt's tokens.

    Attributes:
        base: what both modes begin with; features that decide are read here.
        fast, slow: the mode's own tokens, which follow.
    """

    base: list[int]
    fast: list[int]
    slow: list[int]

    def suffix(self, mode: Mode) -> list[int]:
        """The tokens of a mode."""
        return self.fast if mode == "fast" else self.slow


class ThinkingMode(Spec):
    """The texts that put a model into fast or slow thinking, at the start and in flight.

    :meth:`of` reads them from a model's chat template.
    """

    name: str = "custom"
    """What it was read from."""
    fast: str
    """Follows the prompt and makes the model answer at once; may be empty."""
    slow: str
    """Follows the prompt and makes it think first."""
    leave: str
    """Written into a thought that goes on, it closes the thought; the answer follows."""
    enter: str
    """Written into an answer that goes on, it opens a thought."""
    close: str | None = None
    """Ends every thought, so that thought and answer can be told apart; None where nothing does."""
    in_question: bool = False
    """Whether ``fast`` and ``slow`` are instructions at the end of the user's last message instead of tokens in the
    model's turn."""

    # ------------------------------------------------------------------ which one

    @classmethod
    def of(cls, engine: Engine) -> Self:
        """The pair of a model, from its chat template.

        Templates with ``enable_thinking`` in the manner of Qwen3, templates that open the thought themselves
        (DeepSeek-R1) and tokenizers with ``<think>`` and ``</think>`` give control tokens. A chat template
        that knows no thinking gives the pair of instructions.

        Raises:
            UnsupportedModelError: no chat template, or one that changes the prompt elsewhere than at its end; the
                message shows how to define a pair.
        """
        tokenizer = engine.tokenizer
        if not getattr(tokenizer, "chat_template", None):
            raise UnsupportedModelError(
                f"The tokenizer of {engine.info.name} has no chat template, so how it thinks is not known.", hint=_HOW
            )
        asked = [{"role": "user", "content": _MARK}]
        on = _render(tokenizer, asked, enable_thinking=True)
        off = _render(tokenizer, asked, enable_thinking=False)
        if on != off:
            return cls._of_flag(on, off, engine.info.name)
        if on.rstrip().endswith(OPEN):  # DeepSeek-R1: the template opens the thought
            opened = on[on.rindex(OPEN) :]
            blank = opened.removeprefix(OPEN) or "\n"
            return cls(name="template that opens the thought", slow=opened, **_tags(blank))
        if OPEN in _vocabulary(tokenizer) and CLOSE in _vocabulary(tokenizer):
            return cls(name="think tokens", slow=f"{OPEN}\n", **_tags("\n"))
        return cls.instructions()

    @classmethod
    def _of_flag(cls, on: str, off: str, model: str) -> Self:
        shared = 0
        while shared < min(len(on), len(off)) and on[shared] == off[shared]:
            shared += 1
        thinking, blank = on[shared:], off[shared:]
        asked_at = on.find(_MARK)
        if (
            0 <= asked_at < shared and OPEN in on[asked_at:shared]
        ):  # both open it: the tags are the model's all the same
            at = on.rindex(OPEN, asked_at, shared)
            thinking, blank = on[at:], off[at:]
        if not 0 <= asked_at < shared or (OPEN not in blank and OPEN not in thinking):
            raise UnsupportedModelError(
                f"The chat template of {model} takes enable_thinking, and what it changes stands before the question "
                f"or is not {OPEN}.",
                hint=_HOW,
            )
        return cls(
            name="enable_thinking",
            **(_tags("\n") | {"fast": blank or f"{OPEN}\n\n{CLOSE}\n\n", "slow": thinking or f"{OPEN}\n"}),
        )

    @classmethod
    def instructions(
        cls,
        fast: str = "\nAnswer at once, with the answer alone.",
        slow: str = "\nThink step by step, then give the answer after 'The answer is'.",
        *,
        leave: str = "\nThe answer is ",
        enter: str = "\nLet me think step by step. ",
    ) -> Self:
        """The pair for a model that has no thinking of its own: two instructions behind the user's last message."""
        return cls(name="instructions", fast=fast, slow=slow, leave=leave, enter=enter, in_question=True)

    # ------------------------------------------------------------------ prompts

    def layout(self, engine: Engine, prompt: Prompt, *, template: Mapping[str, Any] | None = None) -> Layout:
        """The tokens of a prompt: the part that both modes share, and what each puts behind it.

        Args:
            engine: the model.
            prompt: a text, or the messages of a chat.
            template: further variables of the chat template, such as ``tools``.

        Raises:
            ChatTemplateError: messages, and no chat template (or it refuses them); or, with instructions, messages
                that do not end with the user's.
        """
        if isinstance(prompt, TokenIds):
            return Layout(list(prompt.ids), *engine.tokenize_texts([self.fast, self.slow], special_tokens=False))
        if isinstance(prompt, str):
            fast, slow = engine.tokenize_texts([self.fast, self.slow], special_tokens=False)
            return Layout(engine.tokenize_texts([prompt])[0], fast, slow)
        messages = [dict(m) for m in prompt]
        if self.in_question:
            if messages[-1].get("role") != "user" or not isinstance(messages[-1].get("content"), str):
                raise ChatTemplateError(
                    "A pair of instructions stands behind a message of the user's, and the last message is none.",
                    hint="End the messages with one of role 'user', or use a model with thinking tokens.",
                )
            messages[-1]["content"] += _MARK
            shared, _, tail = _render(engine.tokenizer, messages, **(template or {})).rpartition(_MARK)
            texts = [shared, self.fast + tail, self.slow + tail]
        else:
            shared = _render(engine.tokenizer, messages, **(template or {}))
            opened = next((text for text in (self.slow, self.fast) if text and shared.endswith(text)), "")
            texts = [shared.removesuffix(opened), self.fast, self.slow]
        return Layout(*engine.tokenize_texts(texts, special_tokens=False))

    def phrase(self, engine: Engine, to: Mode) -> list[int]:
        """The tokens that switch in flight: ``fast`` closes a thought, ``slow`` opens one."""
        return engine.tokenize_texts([self.leave if to == "fast" else self.enter], special_tokens=False)[0]

    # ------------------------------------------------------------------ answers

    def split(self, text: str, *, mode: Mode) -> tuple[str, str]:
        """Thought and answer of what was written behind the mode's tokens.

        Args:
            text: what was written.
            mode: the mode it ended in. A slow one whose thought was never closed has no answer, unless nothing marks
                a thought's end.
        """
        if self.close is None:
            return "", text
        opening = self.enter.strip()
        thought, closed, answer = text.rpartition(self.close.strip())
        if closed:
            return _behind(thought, opening), answer.strip()
        return (_behind(text, opening), "") if mode == "slow" else ("", text.strip())


def _behind(text: str, opening: str) -> str:
    """What follows the last opening of a thought: an answer that was broken off to think is part of neither."""
    return (text.rpartition(opening)[2] if opening else text).strip()


def _tags(blank: str) -> dict[str, str]:
    return {
        "fast": f"{OPEN}{blank}{blank}{CLOSE}\n\n",
        "leave": f"\n{CLOSE}\n\n",
        "enter": f"\n{OPEN}\n",
        "close": CLOSE,
    }


def _vocabulary(tokenizer: Any) -> Mapping[str, int]:
    found: Mapping[str, int] = tokenizer.get_vocab()
    return found


def _render(tokenizer: Any, messages: Sequence[Mapping[str, Any]], **variables: Any) -> str:
    try:
        return str(
            tokenizer.apply_chat_template(list(messages), tokenize=False, add_generation_prompt=True, **variables)
        )
    except Exception as error:
        raise ChatTemplateError(
            f"The chat template refused the messages: {error}",
            hint="A message is {'role': ..., 'content': ...} with a role the template knows.",
        ) from error
