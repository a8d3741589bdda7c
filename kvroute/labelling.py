"""Labels by trying: every question is answered in both modes, and the answers are checked.

The label says which mode a question needs: 0 fast is right and short, 25 fast is right but longer, 75 only slow is
right, 100 neither (docs/concepts.md; arXiv 2601.20326, section 4.2). With several samples it is the mean over pairs of
the i-th fast and the i-th slow answer. With ``checkpoints`` a thought is also closed early, at every n-th token, which
says where it knew enough.
"""

from __future__ import annotations

import platform
from collections.abc import Iterator, Mapping, Sequence
from typing import TYPE_CHECKING

from kvroute._version import __version__
from kvroute.checkers import Checker, CheckResult, check, checker_for
from kvroute.errors import InvalidInputError, KVRouteError, MissingExtraError, TextTooLongError
from kvroute.generation import Generation, Message, TokenIds
from kvroute.label_rows import Attempt, Checkpoint, LabelMeta, LabelRow, Part
from kvroute.progress import progress_bar
from kvroute.questions import Question as Question
from kvroute.questions import read_questions as read_questions
from kvroute.rows import digest_of
from kvroute.skeletons import check_shares, part_of, skeleton_digest
from kvroute.thinking import Layout, Mode, ThinkingMode

if TYPE_CHECKING:
    from kvroute.engines.base import Engine

MAX_TOKENS: dict[str, int] = {"fast": 256, "slow": 1024}
"""By mode, the most tokens of an answer."""
SHORT = 128
"""A right fast answer of fewer tokens has label 0, a longer one 25."""
CHUNK = 128
"""Questions that are answered together."""
MODES: tuple[Mode, ...] = ("fast", "slow")


def label_questions(
    engine: Engine,
    questions: Sequence[Question],
    *,
    thinking: ThinkingMode | None = None,
    checkers: Mapping[str, Checker] | None = None,
    max_tokens: Mapping[str, int] | None = None,
    short: int = SHORT,
    samples: int = 1,
    temperature: float = 0.0,
    seed: int = 0,
    checkpoints: int | None = None,
    shares: Mapping[Part, float] | None = None,
    prompt: str = "{question}",
    chunk: int = CHUNK,
    progress: bool | None = None,
) -> Iterator[LabelRow]:
    """Answer questions in both modes, and label them.

    Args:
        engine: the model.
        questions: see :func:`kvroute.questions.read_questions`.
        thinking: how the model thinks; by default read from its chat template.
        checkers: further checkers by type of answer; they come before kvroute's own.
        max_tokens: by mode, the most tokens of an answer; by default :data:`MAX_TOKENS`.
        short: a right fast answer of fewer tokens has label 0, a longer one 25.
        samples: answers a mode; several need a temperature.
        temperature: 0 takes the likeliest tokens.
        seed: of the sampling; sample i is written with ``seed * samples + i``.
        checkpoints: every how many tokens a thought is closed and the answer checked; none by default.
        shares: by part, its share of the skeletons; by default :data:`kvroute.skeletons.SHARES`.
        prompt: the user's message; ``{question}`` stands for the question.
        chunk: questions that are answered together.
        progress: whether to show a bar; by default on a terminal.

    Yields:
        a row for each question, in their order. One that can't be labelled (too long for the context, a checker that
        fails) has an ``error`` and no label.

    Raises:
        InvalidInputError: an option makes no sense. Before anything runs.
        UnsupportedModelError: how the model thinks is not known.
        MissingExtraError: ``latex`` answers without math-verify.
    """
    labeller = Labeller(
        engine,
        thinking=thinking,
        checkers=checkers,
        max_tokens=max_tokens,
        short=short,
        samples=samples,
        temperature=temperature,
        seed=seed,
        checkpoints=checkpoints,
        shares=shares,
        prompt=prompt,
    )
    if chunk < 1:
        raise InvalidInputError(f"A chunk has at least one question, not {chunk}.")
    return labeller.iterate(questions, chunk, progress)


class Labeller:
    """Labels questions chunk by chunk. Arguments as for :func:`label_questions`."""

    def __init__(
        self,
        engine: Engine,
        *,
        thinking: ThinkingMode | None = None,
        checkers: Mapping[str, Checker] | None = None,
        max_tokens: Mapping[str, int] | None = None,
        short: int = SHORT,
        samples: int = 1,
        temperature: float = 0.0,
        seed: int = 0,
        checkpoints: int | None = None,
        shares: Mapping[Part, float] | None = None,
        prompt: str = "{question}",
    ) -> None:
        limits = MAX_TOKENS | dict(max_tokens or {})
        if set(limits) != set(MODES) or any(not isinstance(n, int) or n < 1 for n in limits.values()):
            raise InvalidInputError(f"max_tokens is a positive number for fast and for slow, not {limits}.")
        if "{question}" not in prompt:
            raise InvalidInputError(f"The prompt {prompt!r} has no {{question}} in it.")
        for name, value in (("short", short), ("samples", samples), ("checkpoints", checkpoints)):
            if value is not None and value < 1:
                raise InvalidInputError(f"{name} is at least 1, not {value}.")
        if samples > 1 and temperature == 0:
            raise InvalidInputError(
                f"{samples} samples without a temperature would all be the same.", hint="Pass temperature=0.7, say."
            )
        if seed < 0:
            raise InvalidInputError(f"A seed is at least 0, not {seed}.")
        self.engine = engine
        self.thinking = thinking or ThinkingMode.of(engine)
        self.checkers = dict(checkers or {})
        self.max_tokens = limits
        self.short, self.samples, self.temperature, self.seed = short, samples, temperature, seed
        self.checkpoints, self.prompt = checkpoints, prompt
        self.shares = check_shares(shares)
        self._leave = self.thinking.phrase(engine, "fast")
        self._close: list[int] = []
        if self.thinking.close:
            self._close = engine.tokenize_texts([self.thinking.close.strip()], special_tokens=False)[0]

    def meta(self, questions: Sequence[Question]) -> LabelMeta:
        """The header of a file with these questions' labels."""
        import torch
        import transformers

        return LabelMeta(
            model=self.engine.info.name,
            fingerprint=self.engine.info.fingerprint,
            thinking=self.thinking,
            prompt=self.prompt,
            short=self.short,
            max_tokens=dict(self.max_tokens),
            samples=self.samples,
            temperature=self.temperature,
            seed=self.seed,
            checkpoints=self.checkpoints,
            shares=dict(self.shares),
            questions_digest=digest_of([[q.id, q.question, q.answer, q.answer_type, q.extra] for q in questions]),
            versions={
                "kvroute": __version__,
                "torch": str(torch.__version__),
                "transformers": str(transformers.__version__),
                "python": platform.python_version(),
            },
        )

    def iterate(self, questions: Sequence[Question], chunk: int, progress: bool | None) -> Iterator[LabelRow]:
        """Label questions chunk by chunk."""
        with progress_bar("Labelling", len(questions), show=progress) as advance:
            for start in range(0, len(questions), chunk):
                rows = self.label(questions[start : start + chunk])
                advance(len(rows))
                yield from rows

    def label(self, questions: Sequence[Question]) -> list[LabelRow]:
        """Label questions together. Which ones these are changes no answer but by the rounding of batches."""
        works = [self._prepare(q) for q in questions]
        for sample in range(self.samples):
            for mode in MODES:
                self._answer(works, mode, sample)
        if self.checkpoints is not None:
            self._close_early(works)
        return [work.row(self.short) for work in works]

    # ------------------------------------------------------------------ steps

    def _prepare(self, question: Question) -> _Work:
        digest = skeleton_digest(question.question)
        work = _Work(question, digest, part_of(digest, self.shares))
        try:
            checker_for(question.answer_type, self.checkers)
            if not question.question.strip():
                raise InvalidInputError("The question is blank.")
            text = self.prompt.replace("{question}", question.question)
            chat = bool(getattr(self.engine.tokenizer, "chat_template", None))
            messages: list[Message] = [{"role": "user", "content": text}]
            work.layout = self.thinking.layout(self.engine, messages if chat else text)
            for mode in MODES:
                length = len(work.layout.base) + len(work.layout.suffix(mode))
                room = self.engine.info.context + 1 - self.max_tokens[mode]  # an answer's last token is never run
                if length > room:
                    raise TextTooLongError(0, length, room, hint=f"No room is left for a {mode} answer.")
        except KVRouteError as error:
            work.fail(error)
        return work

    def _answer(self, works: Sequence[_Work], mode: Mode, sample: int) -> None:
        seed = self.seed * self.samples + sample if self.temperature > 0 else None
        open_works = [w for w in works if w.layout is not None and w.error is None]
        prompts = [(*w.layout.base, *w.layout.suffix(mode)) for w in open_works if w.layout is not None]
        for work, found in zip(open_works, self._generate(prompts, self.max_tokens[mode], seed), strict=True):
            if isinstance(found, KVRouteError):
                work.fail(found)
                continue
            answer, thought = self._split(mode, found)
            checked = self._check(work, answer)
            if checked is None:
                continue
            work.attempts[mode].append(
                Attempt(
                    mode=mode,
                    text=found.text,
                    token_ids=tuple(found.token_ids),
                    thought_tokens=thought,
                    answer=checked.answer,
                    correct=checked.correct,
                    readable=checked.readable,
                    finish_reason=found.finish_reason,
                    seed=seed,
                )
            )

    def _close_early(self, works: Sequence[_Work]) -> None:
        for sample in range(self.samples):
            places = [(w, at) for w in works if w.error is None for at in self._places(w, w.attempts["slow"][sample])]
            prompts, seed = [], None
            for work, at in places:
                assert work.layout is not None
                attempt = work.attempts["slow"][sample]
                seed = attempt.seed
                prompts.append((*work.layout.base, *work.layout.slow, *attempt.token_ids[:at], *self._leave))
            points: dict[int, list[Checkpoint]] = {}
            for (work, at), found in zip(places, self._generate(prompts, self.max_tokens["fast"], seed), strict=True):
                if isinstance(found, KVRouteError):
                    work.fail(found)
                    continue
                text = self.thinking.split(self.thinking.leave + found.text, mode="fast")[1]
                checked = self._check(work, text)
                if checked is None:
                    continue
                points.setdefault(id(work), []).append(
                    Checkpoint(
                        at=at,
                        answer=checked.answer,
                        correct=checked.correct,
                        tokens=at + len(self._leave) + len(found.token_ids),
                    )
                )
            for work in works:
                if id(work) in points and work.error is None:
                    attempts = work.attempts["slow"]
                    attempts[sample] = attempts[sample].model_copy(update={"checkpoints": tuple(points[id(work)])})

    def _places(self, work: _Work, attempt: Attempt) -> list[int]:
        """Where a thought is closed: every n-th token while it goes on, as far as the context has room."""
        assert self.checkpoints is not None
        assert work.layout is not None
        end = attempt.thought_tokens if self._close else len(attempt.token_ids)
        if self._close and list(attempt.token_ids[:end][-len(self._close) :]) == self._close:
            end -= len(self._close) - 1  # never within the closing mark
        room = self.engine.info.context + 1 - self.max_tokens["fast"]
        room -= len(work.layout.base) + len(work.layout.slow) + len(self._leave)
        return [at for at in range(self.checkpoints, end, self.checkpoints) if at <= room]

    # ------------------------------------------------------------------ engine and checker

    def _generate(
        self, prompts: Sequence[tuple[int, ...]], limit: int, seed: int | None
    ) -> list[Generation | KVRouteError]:
        """An answer to each prompt, equal ones written once, or why there is none."""
        once = list(dict.fromkeys(prompts))
        found: dict[tuple[int, ...], Generation | KVRouteError] = {}
        if once:
            try:
                found = dict(zip(once, self._run(once, limit, seed), strict=True))
            except KVRouteError:  # one of them is to blame: find it
                for ids in once:
                    try:
                        found[ids] = self._run([ids], limit, seed)[0]
                    except KVRouteError as error:
                        found[ids] = error
        return [found[ids] for ids in prompts]

    def _run(self, prompts: Sequence[tuple[int, ...]], limit: int, seed: int | None) -> list[Generation]:
        asked = [TokenIds(ids) for ids in prompts]
        return self.engine.generate(asked, max_tokens=limit, temperature=self.temperature, seed=seed, progress=False)

    def _split(self, mode: Mode, found: Generation) -> tuple[str, int]:
        """The answer's text, and the tokens of the thought with its closing mark; 0 where nothing marks it."""
        answer = self.thinking.split(found.text, mode=mode)[1]
        if mode == "fast" or not self._close:
            return answer, 0
        tokens, close = found.token_ids, self._close
        for start in range(len(tokens) - len(close), -1, -1):
            if tokens[start : start + len(close)] == close:
                end = start + len(close)
                # The mark may be a special token, which the text leaves out: the tokens say where the answer is.
                return self._decode(tokens[end:]), end
        assert self.thinking.close is not None
        mark = self.thinking.close.strip()
        count = found.text.count(mark)
        if not count:
            return "", len(tokens)
        low, high = 1, len(tokens)  # the mark's characters are within larger tokens
        while low < high:
            middle = (low + high) // 2
            if self._decode(tokens[:middle]).count(mark) >= count:
                high = middle
            else:
                low = middle + 1
        return answer, low

    def _decode(self, tokens: Sequence[int]) -> str:
        return str(self.engine.tokenizer.decode(list(tokens), skip_special_tokens=True)).strip()

    def _check(self, work: _Work, text: str) -> CheckResult | None:
        """What the checker says, or None if it failed."""
        question = work.question
        try:
            return check(text, question.answer, question.answer_type, checkers=self.checkers)
        except MissingExtraError:
            raise
        except Exception as error:  # noqa: BLE001 - a checker of the user's may raise anything; the row says it
            work.fail(error)
            return None


class _Work:
    """A question on its way to a row."""

    def __init__(self, question: Question, digest: str, part: Part) -> None:
        self.question, self.digest, self.part = question, digest, part
        self.layout: Layout | None = None
        self.attempts: dict[Mode, list[Attempt]] = {"fast": [], "slow": []}
        self.error: str | None = None

    def fail(self, error: Exception) -> None:
        """Keep the first error; the row then has no answers."""
        self.error = self.error or f"{type(error).__name__}: {error}"

    def row(self, short: int) -> LabelRow:
        """The finished row."""
        failed = self.error is not None
        fast, slow = (() if failed else tuple(self.attempts[mode]) for mode in MODES)
        labels = [pair_label(f, s, short) for f, s in zip(fast, slow, strict=True)]
        return LabelRow(
            id=self.question.id,
            question=self.question.question,
            answer=self.question.answer,
            answer_type=self.question.answer_type,
            part=self.part,
            skeleton=self.digest,
            prompt_ids=tuple(self.layout.base) if self.layout else (),
            fast=fast,
            slow=slow,
            label=None if failed else sum(labels) / len(labels),
            error=self.error,
            extra=self.question.extra,
        )


def pair_label(fast: Attempt, slow: Attempt, short: int = SHORT) -> float:
    """The label of one fast and one slow answer: 0, 25, 75 or 100; see the module's text."""
    if fast.correct:
        return 0.0 if fast.tokens < short else 25.0
    return 75.0 if slow.correct else 100.0
