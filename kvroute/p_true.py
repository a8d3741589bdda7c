"""P(True): the model is asked whether an answer is true (arXiv 2207.05221, section 3).

The question is theirs, with the options A (true) and B (false); the score is the probability of A over that of A and B
together, so what else the model might say does not matter. Chat models are asked in their chat template, others in
plain text.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from kvroute.errors import ChatTemplateError
from kvroute.generation import Message, Prompt, TokenIds
from kvroute.progress import progress_bar
from kvroute.scores import Score

if TYPE_CHECKING:
    from kvroute.engines.base import Engine

_QUESTION = """Question: {question}
Proposed answer: {answer}
Is the proposed answer:
A) True
B) False"""
_IN_CHAT = "\nAnswer with A or B only."
_IN_TEXT = "\nThe proposed answer is:"


@dataclass(frozen=True, slots=True)
class TrueQuestion:
    """A question to the model, and the tokens that answer it.

    Attributes:
        token_ids: the question; the next token is the answer.
        choices: the token of A (true) and that of B (false).
    """

    token_ids: list[int]
    choices: tuple[int, int]


def true_question(engine: Engine, prompt: Prompt, answer: str) -> TrueQuestion | str:
    """The question whether an answer is true, or the reason why it can't be asked."""
    if isinstance(prompt, TokenIds):
        return "P(True) asks about a text, and the prompt is given by its tokens"
    text = _QUESTION.format(question=_as_text(prompt).strip(), answer=answer.strip())
    try:
        ids = engine.tokenize([{"role": "user", "content": text + _IN_CHAT}])
    except ChatTemplateError:  # a base model: plain text
        return _in_text(engine, text + _IN_TEXT)
    choices = [found[0] for found in engine.tokenize_texts(["A", "B"], special_tokens=False) if found]
    if len(choices) != 2 or choices[0] == choices[1]:
        return _NO_CHOICE
    return TrueQuestion(ids, (choices[0], choices[1]))


def _in_text(engine: Engine, text: str) -> TrueQuestion | str:
    # The tokens that follow the text are those in which its two continuations differ, whatever the tokenizer merges.
    true, false = engine.tokenize_texts([f"{text} A", f"{text} B"])
    for at, (a, b) in enumerate(zip(true, false, strict=False)):
        if a != b:
            return TrueQuestion(true[:at], (a, b)) if at else _NO_CHOICE
    return _NO_CHOICE


_NO_CHOICE = "the tokenizer has no tokens that tell A from B"


def _as_text(prompt: str | Sequence[Message]) -> str:
    if isinstance(prompt, str):
        return prompt
    lines = [(str(m.get("role", "")), _content(m.get("content"))) for m in prompt]
    if len(lines) == 1:
        return lines[0][1]
    return "\n".join(f"{role}: {content}" for role, content in lines)


def _content(content: object) -> str:
    if isinstance(content, list | tuple):  # the parts of a message: the texts among them
        return "\n".join(str(p["text"]) for p in content if isinstance(p, Mapping) and "text" in p)
    return "" if content is None else str(content)


def probability_of_first(first: float, second: float) -> Score:
    """Probability of the first of two choices, from their log-probabilities."""
    difference = first - second
    if not math.isfinite(difference):
        return Score(None, "the model gives neither A nor B a probability")
    if difference >= 0:
        return Score(1 / (1 + math.exp(-difference)))
    return Score(math.exp(difference) / (1 + math.exp(difference)))


def p_true_scores(
    engine: Engine, asked: Sequence[tuple[Prompt, str]], *, progress: bool | None = None
) -> list[tuple[Score, int]]:
    """P(True) of answers.

    Args:
        engine: the model.
        asked: the prompt, or the question alone, and the text of each answer.
        progress: whether to show bars; by default on a terminal.

    Returns:
        the score of each, None with a reason where it can't be asked, and the tokens that went through the model.
    """
    questions: dict[int, TrueQuestion] = {}
    found: list[tuple[Score, int]] = [(Score(None, "not asked"), 0)] * len(asked)
    context = engine.info.context
    with progress_bar("Writing questions", len(asked), show=progress) as advance:
        for index, (prompt, answer) in enumerate(asked):
            question = true_question(engine, prompt, answer)
            if isinstance(question, str):
                found[index] = Score(None, question), 0
            elif len(question.token_ids) > context:
                reason = f"the question has {len(question.token_ids)} tokens, and the context holds {context}"
                found[index] = Score(None, reason), 0
            else:
                questions[index] = question
            advance(1)
    if questions:
        logprobs = engine.choice_logprobs(
            [q.token_ids for q in questions.values()], [q.choices for q in questions.values()], progress=progress
        )
        for (index, question), (true, false) in zip(questions.items(), logprobs.tolist(), strict=True):
            found[index] = probability_of_first(true, false), len(question.token_ids)
    return found
