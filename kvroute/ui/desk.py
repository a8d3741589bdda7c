"""What the page may ask: an answer, a comparison, the labelled file. Knows no server."""

from __future__ import annotations

import threading
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Annotated, Any, Final, Literal

from pydantic import BaseModel, ConfigDict, Field, StringConstraints

from kvroute._version import __version__
from kvroute.engines.base import Engine, decides_inside
from kvroute.errors import InvalidInputError
from kvroute.generation import CancelToken, Prompt, SamplingOptions
from kvroute.models import name_on_pages
from kvroute.ui.layers import LayerComparison
from kvroute.ui.watching import Event, Watcher

if TYPE_CHECKING:
    from kvroute.heads.head import DifficultyHead
    from kvroute.router import Router
    from kvroute.ui.labelled import Labelled

LONGEST: Final = 8_000
"""Characters of a text."""
_MOST_TOKENS: Final = 2_048
_TOKENS: Final = 512
_THRESHOLDS: Final = ("kind", "tau", "give_up", "tau_fast", "tau_slow", "every", "shadow", "fallback")

Text = Annotated[str, StringConstraints(min_length=1, max_length=LONGEST, pattern=r"\S")]


class _Wanted(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True)


class Question(_Wanted):
    """What is to be answered, and how."""

    question: Text
    mode: Literal["policy", "fast", "slow"] = "policy"
    """Who decides: the policy, or the reader."""
    beside: bool = True
    """Whether it is answered a second time, always slow, beside the first."""
    max_tokens: int = Field(default=_TOKENS, ge=1, le=_MOST_TOKENS)
    temperature: float = Field(default=0.0, ge=0, le=2, allow_inf_nan=False)
    seed: int | None = Field(default=None, ge=0, lt=2**63)


class Pair(_Wanted):
    """Two texts to compare."""

    first: Text
    second: Text


@dataclass(frozen=True, slots=True)
class Example:
    """A question to begin with, and a name for it."""

    name: str
    question: str


@dataclass
class Desk:
    """An engine and what is known of it, for one page.

    Attributes:
        engine: the model.
        router: decides how hard to think, or None.
        no_router: why there is none.
        confidence: a trained confidence that is at hand, or None.
        labelled: a labelled file, or None.
        examples: questions to begin with.
        pair: texts to compare at first.
    """

    engine: Engine
    router: Router | None = None
    no_router: str | None = None
    confidence: DifficultyHead | None = None
    labelled: Labelled | None = None
    examples: Sequence[Example] = ()
    pair: tuple[str, str] = ("A cat is sleeping on the sofa.", "The kitten naps on the couch.")
    _work: threading.Lock = field(default_factory=threading.Lock, repr=False)
    _columns: dict[str, Any] | None = field(default=None, repr=False)

    def __post_init__(self) -> None:
        self._watcher = Watcher(self.engine, self.router, self.confidence)
        self._layers = LayerComparison(self.engine)

    @property
    def most_tokens(self) -> int:
        """Of an answer: the context has to hold a prompt too."""
        return max(1, min(_MOST_TOKENS, self.engine.info.context // 2))

    def about(self) -> dict[str, Any]:
        """JSON-able: the model, the policy, the heads, limits and examples."""
        info, router = self.engine.info, self.router
        policy = None
        if router is not None:
            policy = {n: v for n, v in router.policy.model_dump(mode="json").items() if n in _THRESHOLDS}
            policy["served"] = router.served is not None
            policy["guarantee"] = (router.policy.guarantee or {}).get("text")
        served = None if router is None else router.served_confidence
        return {
            "version": __version__,
            "model": {
                "name": name_on_pages(info.name),
                "architecture": info.architecture,
                "layers": info.num_layers,
                "context": info.context,
            },
            "engine": "vllm" if decides_inside(self.engine) else "transformers",
            "policy": policy,
            "no_router": self.no_router,
            "confidence": self.confidence is not None or served is not None,
            "labels": None if self.labelled is None else self.labelled.name,
            "examples": [{"name": e.name, "question": e.question} for e in self.examples],
            "pair": list(self.pair),
            "limits": {
                "characters": LONGEST,
                "tokens": self.most_tokens,
                "default_tokens": min(_TOKENS, self.most_tokens),
            },
        }

    def ask(self, wanted: Question, cancel: CancelToken) -> Iterator[Event]:
        """Answer a question as events (:mod:`kvroute.ui.watching`), once another one's work is done.

        Raises:
            KVRouteError: it can't be answered; before the first event where it can be told.
        """
        modes: list[str | None] = [None if wanted.mode == "policy" else wanted.mode]
        if wanted.beside and self.router is not None and "slow" not in (wanted.mode, self._always(wanted.mode)):
            modes.append("slow")
        options = SamplingOptions(
            max_tokens=min(wanted.max_tokens, self.most_tokens), temperature=wanted.temperature, seed=wanted.seed
        )
        with self._work:
            if not cancel.cancelled:
                yield from self._watcher.watch(self._prompt(wanted.question), options, modes=modes, cancel=cancel)

    def compare(self, pair: Pair) -> dict[str, Any]:
        """Two texts by layer: see :class:`~kvroute.ui.layers.LayerComparison`."""
        with self._work:
            return self._layers.compare(pair.first, pair.second)

    def curve(self) -> dict[str, Any]:
        """The labelled file as columns; read once.

        Raises:
            InvalidInputError: there is none.
        """
        if self.labelled is None:
            raise InvalidInputError(
                "No labelled file was given.", hint="Start kvroute ui with --labels FILE (kvroute label writes it)."
            )
        with self._work:
            if self._columns is None:
                self._columns = self.labelled.columns(self.engine)
            return self._columns

    def _always(self, mode: str) -> str | None:
        """The one mode that the policy knows, where it decides."""
        return self.router.policy.kind if self.router is not None and mode == "policy" else None

    def _prompt(self, question: str) -> Prompt:
        chat = bool(getattr(self.engine.tokenizer, "chat_template", None))
        return [{"role": "user", "content": question}] if chat else question
