"""Scores of an answer that exists already, and a confidence: :class:`SelfEvaluator`."""

from __future__ import annotations

import asyncio
import operator
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from kvroute.engines.base import decides_inside
from kvroute.engines.threads import call_in_thread
from kvroute.errors import EmptyTextError, InvalidInputError, TextTooLongError
from kvroute.evaluation import Evaluation
from kvroute.features import AnswerPooling, FeatureRequest
from kvroute.generation import CancelToken, FinishReason, Generation, Prompt, Usage, as_prompts
from kvroute.heads.confidence import pooled_confidences, vector_confidence
from kvroute.p_true import p_true_scores
from kvroute.reading_scores import reading_scores
from kvroute.scores import SCORES, Score, family
from kvroute.served_scores import served_scores

if TYPE_CHECKING:
    from kvroute.calibration import ConfidenceCalibrator
    from kvroute.engines.base import Engine
    from kvroute.engines.reading import Want
    from kvroute.heads.head import DifficultyHead

Answer = str | Sequence[int] | Generation
"""A text, the answer's token ids as they stand, or what an engine wrote."""

DEFAULT_SCORES = (*family("kv-coe"), *family("logits"), *family("length"))
"""What one pass over the answer gives."""

CONFIDENCE = "confidence"
"""The feature that a head reads, by name."""

_FAMILIES = tuple(dict.fromkeys(s.family for s in SCORES.values()))
_NO_CALIBRATOR = (
    "there is no head and no calibrator, and a score is not a confidence: fit one on answers known to be right or "
    "wrong (kvroute train --target correct, kvroute calibrate, or ConfidenceCalibrator.fit)"
)


class SelfEvaluator:
    """Scores answers by what the model that reads them makes of them.

    The answer is run once, behind its prompt. The chains cover all its tokens but the last, the one that has no
    keys and values during generation either, so the scores are those of ``engine.generate(...,
    features=["kv-coe", "logits", "length"])`` for the same tokens.

    Args:
        engine: the model.
        calibrator: turns scores into a confidence; a calibrator, or its name (see
            :meth:`~kvroute.ConfidenceCalibrator.by_name`). The scores that it reads are always computed.
        head: a trained confidence (``kvroute train --target correct``), or its folder. It reads the answer's keys and
            values, and is the confidence that is given where there is a calibrator too.
        scores: names of scores or of their families (``kv-coe``, ``logits``, ``p-true``, ``length``,
            ``hidden-coe``); by default ``kv-coe``, ``logits`` and ``length``, which one pass gives. Nothing
            else is computed.

    Raises:
        ModelMismatchError: the calibrator or the head was fitted on another model.
        InvalidInputError: an unknown score, and the message lists what there is; a head for another target.
    """

    def __init__(
        self,
        engine: Engine,
        *,
        calibrator: ConfidenceCalibrator | str | None = None,
        scores: Sequence[str] | None = None,
        head: DifficultyHead | str | Path | None = None,
    ) -> None:
        if isinstance(calibrator, str):
            from kvroute.calibration import ConfidenceCalibrator

            calibrator = ConfidenceCalibrator.by_name(calibrator, engine.info)
        if calibrator is not None:
            calibrator.require(engine.info)
        if isinstance(head, str | Path):
            from kvroute.heads.head import DifficultyHead

            head = DifficultyHead.load(head, engine.info)
        if head is not None:
            head.require(engine.info)
            if head.target != "correct":
                raise InvalidInputError(
                    f"The head has the target {head.target!r}, and a confidence needs one with the target 'correct'.",
                    hint="Train one with: kvroute train --target correct",
                )
        self.engine = engine
        self.calibrator = calibrator
        self.head = head
        self.scores = DEFAULT_SCORES if scores is None else score_names(scores)

    def __repr__(self) -> str:
        return f"SelfEvaluator({self.engine.info.name!r}, calibrator={self.calibrator!r})"

    def score(
        self,
        prompt: Prompt,
        answer: Answer,
        *,
        scores: Sequence[str] | None = None,
        finish_reason: FinishReason = "stop",
    ) -> Evaluation:
        """Score one answer.

        Args:
            prompt: the text that it continues, or the messages of the chat.
            answer: a text, token ids as they stand, or a :class:`~kvroute.Generation`, whose tokens are taken.
            scores: names of scores or families; by default as the evaluator was made.
            finish_reason: of an answer given as a text: ``stop`` closes it with the model's end token, as it would
                have been written; ``length`` and ``cancelled`` leave it open.

        Raises:
            EmptyTextError: the answer is empty.
            TextTooLongError: prompt and answer do not fit the context together.
            InvalidInputError: an unknown score, an empty prompt, tokens that the model does not have.
            ChatTemplateError: messages, and no chat template.
        """
        return self.score_many([(prompt, answer)], scores=scores, finish_reason=finish_reason, progress=False)[0]

    def score_many(
        self,
        rows: Sequence[tuple[Prompt, Answer]],
        *,
        scores: Sequence[str] | None = None,
        finish_reason: FinishReason | Sequence[FinishReason] = "stop",
        progress: bool | None = None,
    ) -> list[Evaluation]:
        """Score many answers, in batches of like length under the engine's token budget.

        Args:
            rows: prompt and answer of each, as in :meth:`score`.
            scores: names of scores or families; by default as the evaluator was made.
            finish_reason: for all answers, or one for each.
            progress: whether to show a bar; by default on a terminal.

        Returns:
            evaluations in the order of the rows. A score that an answer does not have is None with a reason and
            costs the others nothing.

        Raises:
            as :meth:`score`, naming the row, before anything is run.
        """
        return self._evaluate(rows, scores, finish_reason, progress, None)

    async def ascore(
        self,
        prompt: Prompt,
        answer: Answer,
        *,
        scores: Sequence[str] | None = None,
        finish_reason: FinishReason = "stop",
    ) -> Evaluation:
        """:meth:`score` in a thread."""
        found = await self.ascore_many([(prompt, answer)], scores=scores, finish_reason=finish_reason, progress=False)
        return found[0]

    async def ascore_many(
        self,
        rows: Sequence[tuple[Prompt, Answer]],
        *,
        scores: Sequence[str] | None = None,
        finish_reason: FinishReason | Sequence[FinishReason] = "stop",
        progress: bool | None = None,
    ) -> list[Evaluation]:
        """:meth:`score_many` in a thread. Cancelling the task ends the work after the batch that is being run."""
        return await call_in_thread(lambda cancel: self._evaluate(rows, scores, finish_reason, progress, cancel), {})

    @property
    def features(self) -> dict[str, FeatureRequest]:
        """What to ask of ``engine.generate(..., features=evaluator.features)`` so that :meth:`confidence` can tell."""
        names = ("kv-coe", "length") if decides_inside(self.engine) else ("kv-coe", "logits", "length")
        asked: dict[str, FeatureRequest] = {name: name for name in names}
        return asked if self.head is None else {**asked, CONFIDENCE: AnswerPooling(self.head.spec)}

    def confidence(self, generation: Generation) -> tuple[float | None, str | None]:
        """How likely an answer is right that was written with ``features=evaluator.features``: nothing is computed
        again. It is the head's confidence where there is a head, else the calibrator's.

        Returns:
            the confidence in [0, 1] and None, or None and the reason why there is none.
        """
        if self.head is None:
            return self._confidence(generation.scores)
        vector = generation.features.get(CONFIDENCE)
        if vector is None:
            why = generation.feature_errors.get(
                CONFIDENCE, "the answer was written without features=evaluator.features"
            )
            return None, f"the answer's vector is missing: {why}"
        return vector_confidence(self.head, vector)

    # ------------------------------------------------------------------ parts

    def _confidence(self, scores: Mapping[str, Score]) -> tuple[float | None, str | None]:
        if self.calibrator is None:
            return None, _NO_CALIBRATOR
        return self.calibrator.confidence(scores)

    def _evaluate(
        self,
        rows: Sequence[tuple[Prompt, Answer]],
        scores: Sequence[str] | None,
        finish_reason: FinishReason | Sequence[FinishReason],
        progress: bool | None,
        cancel: CancelToken | None,
    ) -> list[Evaluation]:
        asked = self.scores if scores is None else score_names(scores)
        names = tuple(dict.fromkeys((*asked, *(self.calibrator.names if self.calibrator else ()))))
        families = {SCORES[n].family for n in names}
        if not rows:
            return []
        work = self._prepare(rows, finish_reason)
        found = [{"length": Score(float(w.answer_length))} for w in work]
        computed, seconds = [0] * len(work), [0.0] * len(work)
        want: list[Want] = [w for w, f in _WANTS if f in families or (w == "kv" and self.head is not None)]
        trained: list[tuple[float | None, str | None]] = [(None, None)] * len(work)
        ids, start = [w.token_ids for w in work], [w.start for w in work]
        if want and decides_inside(self.engine):  # caches stay where the engine is, and are read there
            began = time.perf_counter()
            inside: Any = self.engine
            read = served_scores(inside, ids, start, families=families, head=self.head, progress=progress)
            for place, (scored, one) in enumerate(read):
                found[place] |= scored
                trained[place] = one
                computed[place] += len(ids[place]) - 1
            seconds = [time.perf_counter() - began] * len(work)
        elif want:
            layers = None
            if self.head is not None and "kv-coe" not in families:  # the head alone reads the cache
                layers = self.head.spec.resolve(self.engine.info.num_layers)
            began = time.perf_counter()
            for batch, reading in self.engine.read(ids, start, want=want, layers=layers, progress=progress):
                if self.head is not None and reading.view is not None:
                    spans = [(work[i].start, len(ids[i]) - 1) for i in batch]
                    found_here = pooled_confidences(self.head, reading.view, spans, self.engine.info.num_layers)
                    for place, one in zip(batch, found_here, strict=True):
                        trained[place] = one
                    if layers is not None:
                        reading = replace(reading, view=None)
                for place, scored in zip(
                    batch, reading_scores(reading, [(work[i].start, len(ids[i])) for i in batch]), strict=True
                ):
                    found[place] |= scored
                    computed[place] += len(ids[place]) - 1
                now = time.perf_counter()
                for place in batch:
                    seconds[place] += now - began
                began = now
                if cancel is not None and cancel.cancelled:
                    raise asyncio.CancelledError
        if "p-true" in families:
            began = time.perf_counter()
            for place, (score, tokens) in enumerate(self._p_true(rows, work, progress)):
                found[place]["p_true"] = score
                computed[place] += tokens
            spent = time.perf_counter() - began
            seconds = [s + spent for s in seconds]
        out = []
        for w, every, tokens, took, (p, why) in zip(work, found, computed, seconds, trained, strict=True):
            confidence, reason = self._confidence(every)
            side_by_side = {}
            if self.head is not None:
                both = {"head": p, "calibrator": confidence}
                side_by_side = {name: value for name, value in both.items() if value is not None}
                confidence, reason = p, why
            usage = Usage(prompt=w.start, cached=0, computed=tokens, generated=w.answer_length)
            scored = {n: every[n] for n in names}
            out.append(Evaluation(scored, confidence, reason, usage, took, side_by_side))
        return out

    def _prepare(
        self, rows: Sequence[tuple[Prompt, Answer]], finish_reason: FinishReason | Sequence[FinishReason]
    ) -> list[_Row]:
        """Check and tokenize everything before anything is run."""
        for index, row in enumerate(rows):
            if isinstance(row, str) or not isinstance(row, Sequence) or len(row) != 2:
                raise InvalidInputError(f"Row {index} is not a pair of prompt and answer.")
        prompts, _ = as_prompts([prompt for prompt, _ in rows])
        finish = [finish_reason] * len(rows) if isinstance(finish_reason, str) else list(finish_reason)
        if len(finish) != len(rows) or not all(f in ("stop", "length", "cancelled") for f in finish):
            raise InvalidInputError("finish_reason is stop, length or cancelled, for all rows or one for each row.")
        answers = self._answers([answer for _, answer in rows], finish)
        plain = self.engine.tokenize_texts([p if isinstance(p, str) else "" for p in prompts])
        context = self.engine.info.context
        work = []
        for index, (prompt, answer) in enumerate(zip(prompts, answers, strict=True)):
            ids = plain[index] if isinstance(prompt, str) else self.engine.tokenize(prompt)
            if not ids:
                raise InvalidInputError(
                    f"The prompt of row {index} is empty, so nothing stands before the answer's first token.",
                    hint="Give the question that was answered, or a text such as a begin token.",
                )
            if len(ids) + len(answer) - 1 > context:
                raise TextTooLongError(
                    index,
                    len(ids) + len(answer) - 1,
                    context,
                    hint="That is prompt and answer together, which the context must hold: shorten the prompt, or "
                    "score the beginning of the answer with finish_reason='length'.",
                )
            work.append(_Row([*ids, *answer], len(ids)))
        return work

    def _answers(self, answers: list[Answer], finish: list[FinishReason]) -> list[list[int]]:
        texts = self.engine.tokenize_texts([a if isinstance(a, str) else "" for a in answers], special_tokens=False)
        end = self.engine.end_token
        found = []
        for index, answer in enumerate(answers):
            if isinstance(answer, str):
                ids = texts[index]
                if ids and finish[index] == "stop" and end is not None:
                    ids = [*ids, end]
            else:
                ids = self._given_ids(index, answer)
            if not ids:
                raise EmptyTextError(index)
            found.append(ids)
        return found

    def _given_ids(self, index: int, answer: object) -> list[int]:
        given = answer.token_ids if isinstance(answer, Generation) else answer
        try:
            ids = [operator.index(t) for t in given]  # type: ignore[attr-defined]
        except TypeError as error:
            raise InvalidInputError(
                f"The answer of row {index} is {type(answer).__name__}, not a text, token ids or a Generation."
            ) from error
        outside = next((t for t in ids if not 0 <= t < self.engine.info.vocab_size), None)
        if outside is not None:
            raise InvalidInputError(
                f"The answer of row {index} has token {outside}, and the model has 0 to "
                f"{self.engine.info.vocab_size - 1}."
            )
        return ids

    def _p_true(
        self, rows: Sequence[tuple[Prompt, Answer]], work: Sequence[_Row], progress: bool | None
    ) -> list[tuple[Score, int]]:
        """The score of each row, and the tokens that went through the model for it."""
        asked = [(prompt, self._text(answer, row)) for (prompt, answer), row in zip(rows, work, strict=True)]
        return p_true_scores(self.engine, asked, progress=progress)

    def _text(self, answer: Answer, row: _Row) -> str:
        if isinstance(answer, str):
            return answer
        if isinstance(answer, Generation):
            return answer.text
        return str(self.engine.tokenizer.decode(row.token_ids[row.start :], skip_special_tokens=True))


@dataclass(frozen=True, slots=True)
class _Row:
    token_ids: list[int]
    start: int

    @property
    def answer_length(self) -> int:
        return len(self.token_ids) - self.start


_WANTS: tuple[tuple[Want, str], ...] = (("kv", "kv-coe"), ("logits", "logits"), ("hidden", "hidden-coe"))


def score_names(scores: Sequence[str]) -> tuple[str, ...]:
    """Names of scores, with those of families spelled out.

    Raises:
        InvalidInputError: an unknown name; the message lists what there is.
    """
    if isinstance(scores, str):
        scores = [scores]
    names: list[str] = []
    for name in scores:
        if name in SCORES:
            names.append(name)
        elif name in _FAMILIES:
            names.extend(family(name))
        else:
            raise InvalidInputError(
                f"No score is named {name!r}.",
                hint=f"There are: {', '.join(SCORES)}; and the families {', '.join(_FAMILIES)}.",
            )
    return tuple(dict.fromkeys(names))
