"""A cascade: answer with the cheapest step, score the answer, and ask the next step where the confidence is too low
(arXiv 2305.05176, section 3; here the score is read from the cache that the answer leaves behind)."""

from __future__ import annotations

import logging
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any, Literal, overload

from kvroute.decisions import Decision, Routed
from kvroute.engines.threads import call_in_thread
from kvroute.errors import InvalidInputError, KVRouteError, fault_text
from kvroute.generation import (
    CancelToken,
    Generation,
    Message,
    Prompt,
    SamplingOptions,
    TokenIds,
    Usage,
    as_prompts,
)
from kvroute.router import Router
from kvroute.router_parts import Answering
from kvroute.scores import SCORES
from kvroute.self_evaluation import SelfEvaluator

logger = logging.getLogger(__name__)

Judge = Callable[[Routed], float | None]
"""An answer in, the probability that it is right out; None where that can't be told."""
_FREE = frozenset({"kv-coe", "logits", "length"})
"""Families of scores that come out of the passes that write the answer."""


@dataclass(frozen=True, slots=True)
class CascadeStep:
    """One step.

    Attributes:
        name: what results call it.
        target: a router or an engine.
        mode: that a router is to take; None where its policy decides.
    """

    name: str
    target: Answering
    mode: str | None = None


@dataclass(frozen=True, slots=True)
class CascadeAttempt:
    """One step's answer.

    Attributes:
        name: the step's.
        routed: the answer.
        confidence: that decided, in [0, 1]; None where there is none.
        reason: why there is none.
        threshold: that it had to reach; None at the last step.
        why: ``confident`` (it stays), ``unsure`` (below the threshold), ``no confidence`` (escalated or kept, as the
            cascade's ``missing`` says), ``last``, or ``cancelled`` (it stays as it is).
    """

    name: str
    routed: Routed
    confidence: float | None
    reason: str | None
    threshold: float | None
    why: Literal["confident", "unsure", "no confidence", "last", "cancelled"]


@dataclass(frozen=True, slots=True)
class Cascaded:
    """The answer of a cascade, and how it was come by.

    Attributes:
        attempts: every step's answer, in order; the last one counts.
    """

    attempts: list[CascadeAttempt]

    @property
    def routed(self) -> Routed:
        """The answer that counts."""
        return self.attempts[-1].routed

    @property
    def step(self) -> str:
        """The name of the step that gave it."""
        return self.attempts[-1].name

    @property
    def answer(self) -> str:
        """It, without its thought."""
        return self.routed.answer

    @property
    def confidence(self) -> float | None:
        """In it."""
        return self.attempts[-1].confidence

    @property
    def usage(self) -> Usage:
        """Tokens of all attempts together."""
        parts = [a.routed.usage for a in self.attempts]
        return Usage(
            prompt=sum(u.prompt for u in parts),
            cached=sum(u.cached for u in parts),
            computed=sum(u.computed for u in parts),
            generated=sum(u.generated for u in parts),
        )

    def to_dict(self) -> dict[str, Any]:
        """JSON-able, without features."""
        return {
            "step": self.step,
            "answer": self.answer,
            "usage": asdict(self.usage),
            "attempts": [
                {
                    "name": a.name,
                    "confidence": a.confidence,
                    "reason": a.reason,
                    "threshold": a.threshold,
                    "why": a.why,
                    "routed": a.routed.to_dict(),
                }
                for a in self.attempts
            ],
        }


class Cascade:
    """Asks one step after the other until an answer is trusted.

    Where two steps that follow one another run on the same engine, a single prompt's cache is continued, so the prompt
    is computed once.

    Args:
        steps: at least two, cheapest first: :class:`CascadeStep`, or (name, router or engine), or (name, router, mode).
        confidence: an answer with less is asked for again of the next step; one for all steps, or one for each but the
            last; in [0, 1].
        judge: where an answer's confidence comes from, for all steps or by name. By default the router's own
            (:attr:`kvroute.Routed.confidence`, from a head trained with ``target="correct"``). A
            :class:`~kvroute.SelfEvaluator` gives its confidence: for answers of its own engine out of the passes that
            wrote them, for those of another by reading them. The last step's answer is not judged.
        missing: what happens to an answer without a confidence; ``escalate`` by default, or ``stop``. A judge that
            fails counts as one that can't tell.

    Raises:
        InvalidInputError: under two steps, names that are not unique, thresholds outside [0, 1] or too many of them, a
            mode for an engine, or no judge for a router without a confidence head or for an engine.
    """

    def __init__(
        self,
        steps: Sequence[CascadeStep | tuple[str, Answering] | tuple[str, Answering, str | None]],
        *,
        confidence: float | Sequence[float],
        judge: Judge | SelfEvaluator | Mapping[str, Judge | SelfEvaluator] | None = None,
        missing: Literal["escalate", "stop"] = "escalate",
    ) -> None:
        self.steps = [s if isinstance(s, CascadeStep) else CascadeStep(*s) for s in steps]
        names = [s.name for s in self.steps]
        if len(self.steps) < 2 or len(set(names)) != len(names):
            raise InvalidInputError(f"A cascade has two or more steps with names of their own, not {names}.")
        given = [confidence] * (len(names) - 1) if isinstance(confidence, int | float) else list(confidence)
        if len(given) != len(names) - 1 or not all(0 <= t <= 1 for t in given):
            raise InvalidInputError(
                f"{len(names)} steps have {len(names) - 1} thresholds in [0, 1], not {given}.",
                hint="Give one for all, or one for each step but the last.",
            )
        self.thresholds: list[float | None] = [*map(float, given), None]
        if missing not in ("escalate", "stop"):
            raise InvalidInputError(f"missing is 'escalate' or 'stop', not {missing!r}.")
        self.missing = missing
        judges = judge if isinstance(judge, Mapping) else dict.fromkeys(names[:-1], judge)
        unknown = set(judges) - set(names)
        if unknown:
            raise InvalidInputError(f"There are judges for {sorted(unknown)}, and the steps are {names}.")
        self.judges: dict[str, Judge | SelfEvaluator | None] = {n: judges.get(n) for n in names}
        for step in self.steps:
            if step.mode is not None and not isinstance(step.target, Router):
                raise InvalidInputError(f"The step {step.name!r} has a mode, which only a router can take.")
        for step in self.steps[:-1]:
            if self.judges[step.name] is None and getattr(step.target, "confidence", None) is None:
                raise InvalidInputError(
                    f"The answers of the step {step.name!r} have no confidence.",
                    hint="Give its router a head trained with target='correct' (confidence=), or pass judge=.",
                )

    def __repr__(self) -> str:
        return f"Cascade({[s.name for s in self.steps]}, confidence={self.thresholds[:-1]})"

    @overload
    def generate(self, prompts: str | TokenIds, **kwargs: Any) -> Cascaded: ...
    @overload
    def generate(self, prompts: Sequence[Message], **kwargs: Any) -> Cascaded: ...
    @overload
    def generate(self, prompts: Sequence[Prompt], **kwargs: Any) -> list[Cascaded]: ...
    def generate(
        self,
        prompts: Any,
        *,
        options: SamplingOptions | None = None,
        cancel: CancelToken | None = None,
        progress: bool | None = None,
        **sampling: Any,
    ) -> Cascaded | list[Cascaded]:
        """Answer, and ask again what is not trusted: of many prompts only those, together.

        Args:
            prompts: a text, the messages of a chat, or a list of such.
            options, cancel, progress, sampling: as in :meth:`kvroute.Router.generate`, for every step.

        Returns:
            a :class:`Cascaded` for one prompt, a list in their order for many.

        Raises:
            As the steps' ``generate``. A judge's fault is no error: see ``missing``.
        """
        listed, single = as_prompts(prompts)
        written = {**sampling} if options is None else {**sampling, "options": options}
        attempts: list[list[CascadeAttempt]] = [[] for _ in listed]
        kept: Any = None
        due = list(range(len(listed)))
        for place, step in enumerate(self.steps):
            if not due:
                break
            same = single and place > 0 and _engine(step.target) is _engine(self.steps[place - 1].target)
            follows = single and place + 1 < len(self.steps)
            keep = follows and _engine(step.target) is _engine(self.steps[place + 1].target)
            answers = self._ask(
                step,
                [listed[i] for i in due],
                {
                    **written,
                    **({"prefix": kept} if same and kept is not None else {}),
                    **({"keep_cache": True} if keep else {}),
                    "cancel": cancel,
                    "progress": False if single else progress,
                },
            )
            kept = answers[0].generation.prefix
            answers = [replace(a, generation=replace(a.generation, prefix=None)) for a in answers]
            threshold = self.thresholds[place]
            judged = self._judge(step, [(listed[i], a) for i, a in zip(due, answers, strict=True)], threshold)
            for i, routed, (confidence, reason) in zip(due, answers, judged, strict=True):
                why = _why(routed, confidence, threshold)
                attempts[i].append(CascadeAttempt(step.name, routed, confidence, reason, threshold, why))
            onward = {"unsure"} | ({"no confidence"} if self.missing == "escalate" else set())
            due = [i for i in due if attempts[i][-1].why in onward]
        found = [Cascaded(a) for a in attempts]
        return found[0] if single else found

    async def agenerate(self, prompts: Any, **kwargs: Any) -> Cascaded | list[Cascaded]:
        """:meth:`generate` in a thread. Cancelling the task ends the work."""
        found: Cascaded | list[Cascaded] = await call_in_thread(lambda **how: self.generate(prompts, **how), kwargs)
        return found

    # ------------------------------------------------------------------ parts

    def _ask(self, step: CascadeStep, prompts: list[Prompt], how: dict[str, Any]) -> list[Routed]:
        judge = self.judges[step.name]
        if isinstance(judge, SelfEvaluator) and _reads_along(judge, step.target):
            how = {**how, "features": judge.features}
        if isinstance(step.target, Router) and step.mode is not None:
            how = {**how, "mode": step.mode}
        return [_as_routed(found, step.name) for found in step.target.generate(prompts, **how)]

    def _judge(
        self, step: CascadeStep, rows: list[tuple[Prompt, Routed]], threshold: float | None
    ) -> list[tuple[float | None, str | None]]:
        judge = self.judges[step.name]
        if judge is None or threshold is None:
            return [(r.confidence, r.confidence_reason) for _, r in rows]
        if not isinstance(judge, SelfEvaluator):
            return [_asked(step, judge, r) for _, r in rows]
        if _reads_along(judge, step.target):
            return [judge.confidence(r.generation) for _, r in rows]
        same = _engine(step.target) is judge.engine
        try:
            scored = judge.score_many([(p, r.generation if same else r.text) for p, r in rows], progress=False)
        except KVRouteError as error:
            if len(rows) == 1:
                return [(None, str(error))]
            return [self._judge(step, [row], threshold)[0] for row in rows]  # one answer's fault is not the others'
        return [(s.confidence, s.confidence_reason) for s in scored]


def _why(
    routed: Routed, confidence: float | None, threshold: float | None
) -> Literal["confident", "unsure", "no confidence", "last", "cancelled"]:
    if routed.generation.finish_reason == "cancelled":
        return "cancelled"
    if threshold is None:
        return "last"
    if confidence is None:
        return "no confidence"
    return "confident" if confidence >= threshold else "unsure"


def _engine(target: Any) -> Any:
    return target.engine if isinstance(target, Router) else target


def _reads_along(judge: SelfEvaluator, target: Any) -> bool:
    """Whether the passes that write an answer give all that the judge needs."""
    if _engine(target) is not judge.engine:
        return False
    if judge.head is not None:
        return True
    return judge.calibrator is not None and {SCORES[n].family for n in judge.calibrator.names} <= _FREE


def _asked(step: CascadeStep, judge: Judge, routed: Routed) -> tuple[float | None, str | None]:
    try:
        found = judge(routed)
    except Exception as error:  # noqa: BLE001 - an answer is worth more than its confidence
        text = fault_text(error)
        logger.warning("The judge of the step %r failed (%s).", step.name, text)
        return None, f"the judge failed: {text}"
    if found is None:
        return None, "the judge can't tell"
    if not math.isfinite(found):
        return None, f"the judge gave {found}"
    return float(found), None


def _as_routed(found: Any, name: str) -> Routed:
    if isinstance(found, Routed):
        return found
    if isinstance(found, Generation):
        decision = Decision(mode=name, policy="cascade")
        return Routed(found.text, "", found.text, decision, found, None, "an engine gives no confidence")
    raise InvalidInputError(f"A step answers with a Generation or a Routed, not {type(found).__name__}.")
