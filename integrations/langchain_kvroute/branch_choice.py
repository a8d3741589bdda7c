"""Which branch a prompt takes: the decision, what it cost, what the branch may go on from. A fault takes the default.

Nothing of a prompt is logged: a fault is logged once by its kind, and told in full in the metadata.
"""

from __future__ import annotations

import dataclasses
import logging
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

from langchain_core.prompts import BasePromptTemplate
from langchain_core.runnables import Runnable

from kvroute import (
    Decision,
    InvalidInputError,
    KVRouteError,
    Prefilled,
    ServerTimeoutError,
    ServerUnreachableError,
    Usage,
)
from langchain_kvroute.continuing import View, holds_chats
from langchain_kvroute.handover import Handover
from langchain_kvroute.metadata import KVRouteMetadata, of_decision
from langchain_kvroute.rendering import as_messages, continues_texts, fill, template_of
from langchain_kvroute.router_handle import RouterHandle

logger = logging.getLogger("kvroute.langchain")
_told: set[str] = set()


def warn_once(what: str, error: Exception) -> None:
    """Log a fault by its kind: the first one as a warning, and those that follow for who debugs."""
    line = f"{what}: {type(error).__name__}"
    logger.log(logging.DEBUG if line in _told else logging.WARNING, "kvroute: %s. Logged once of each kind.", line)
    _told.add(line)


@dataclass(frozen=True)
class Chosen:
    """A branch for one input.

    Attributes:
        branch: its name.
        decision: why.
        usage: tokens that the decision cost; None where nothing is known of them.
        handover: what a chat model in the branch may go on from, or None.
    """

    branch: str
    decision: Decision
    usage: Usage | None = None
    handover: Handover | None = None

    @cached_property
    def metadata(self) -> KVRouteMetadata:
        """In the form that answers carry."""
        return of_decision(self.decision, self.usage)

    @cached_property
    def run_metadata(self) -> dict[str, Any]:
        """For the branch's run: the whole, and beside it what traces are searched by."""
        return {
            "kvroute": self.metadata,
            "kvroute_branch": self.branch,
            "kvroute_difficulty": self.decision.difficulty,
            "kvroute_why": self.decision.why,
        }


@dataclass
class Chooser:
    """Chooses among branches.

    Attributes:
        handle: the router.
        branches: by name.
        default: the branch where a decision fails; None takes the policy's fallback.
    """

    handle: RouterHandle
    branches: Mapping[str, Runnable[Any, Any]]
    default: str | None
    _engine: Any = field(default=None, repr=False)
    _view: View = field(default_factory=View, repr=False)

    def __getstate__(self) -> dict[str, Any]:
        return self.__dict__ | {"_engine": None, "_view": View()}  # copies and pickles hold no engine

    @cached_property
    def _default_first(self) -> list[Runnable[Any, Any]]:
        first = self.default or "slow"
        return [self.branches[n] for n in sorted(self.branches, key=lambda n: n != first)]

    @cached_property
    def template(self) -> BasePromptTemplate[Any] | None:
        """What turns an input into a prompt: that of the default branch, else the first there is."""
        found = (template_of(branch) for branch in self._default_first)
        return next((template for template in found if template is not None), None)

    @cached_property
    def text(self) -> bool:
        """Whether a text stays one."""
        return continues_texts(self._default_first)

    @cached_property
    def _chats(self) -> bool:
        return holds_chats(self._default_first)

    def prompt(self, given: Any, *, rendered: bool) -> Any:
        """The prompt of an input.

        Args:
            given: the input, or what ``prompt=`` made of it.
            rendered: whether it is that.

        Returns:
            a text, messages, or the exception that stands in its way.
        """
        try:
            if not rendered and self.template is not None:
                given = fill(self.template, given)
            return as_messages(given, text=self.text)
        except Exception as error:  # noqa: BLE001 - costs the decision, not the answer
            return error

    def choose(self, prompts: Sequence[Any]) -> list[Chosen]:
        """Decide prompts, in one run.

        Args:
            prompts: each a text, messages, or an exception.
        """
        router: Any = None
        try:
            router = self.handle.get()
            view = self.view(router.engine)
        except Exception as error:  # noqa: BLE001 - costs the decision, not the answer
            return [self._chosen(router, p if isinstance(p, Exception) else error) for p in prompts]
        found = [_seen(view, p) for p in prompts]
        good = [i for i, p in enumerate(found) if not isinstance(p, Exception)]
        for i, one in zip(good, _each(router, [found[i] for i in good], view), strict=True):
            found[i] = one
        return [self._chosen(router, one, keep=view.keep) for one in found]

    def forced(self, mode: Any) -> Chosen:
        """A branch that was demanded. Nothing is run for it; a chat model in it is told the mode.

        Raises:
            InvalidInputError: there is none of that name.
        """
        if mode not in self.branches:
            raise InvalidInputError(f"kvroute_mode is one of {list(self.branches)}, not {mode!r}.")
        decision = Decision(mode, why="forced")
        handover = None
        if self._chats:
            try:
                engine = self.handle.get().engine
                handover = Handover(engine, None, decision) if self.view(engine).keep else None
            except Exception as error:  # noqa: BLE001 - the branch is known all the same
                warn_once("the router can't be opened", error)
        return Chosen(mode, decision, Usage(0, 0, 0, 0), handover)

    def view(self, engine: Any) -> View:
        """The prompt as a chat model sees it that a branch holds on this engine."""
        if self._engine is not engine:
            name = None if self.handle.name is None else self.handle.name.engine
            self._view = View.of(self._default_first, engine, name)
            self._engine = engine
        return self._view

    def _chosen(self, router: Any, found: Prefilled | Exception, *, keep: bool = False) -> Chosen:
        if isinstance(found, Exception):
            branch = self.fallback(router)
            warn_once(f"no decision, so the branch {branch!r} is taken", found)
            kind = "" if router is None else router.policy.kind
            return Chosen(branch, Decision(branch, why="fault", policy=kind, fault=fault_text(found)))
        decision = found.decision
        branch = decision.mode
        if decision.why == "fault":
            branch = self.fallback(router)
        elif branch not in self.branches:
            branch = self.fallback(router)
            fault = f"The policy chose {decision.mode!r}, and there is no such branch."
            decision = dataclasses.replace(decision, why="fault", fault=fault)
            warn_once(f"no branch as chosen, so {branch!r} is taken", InvalidInputError(fault))
        if branch != decision.mode:
            decision = dataclasses.replace(decision, mode=branch)
        handover = Handover(router.engine, found.prefix, decision) if keep else None
        return Chosen(branch, decision, found.usage, handover)

    def fallback(self, router: Any) -> str:
        """The branch where a decision fails."""
        wanted = self.default or ("slow" if router is None else router.policy.fallback)
        return wanted if wanted in self.branches else list(self.branches)[-1]


def _seen(view: View, prompt: Any) -> Any:
    try:
        return prompt if isinstance(prompt, Exception) else view.prompt(prompt)
    except Exception as error:  # noqa: BLE001 - costs the decision, not the answer
        return error


def _each(router: Any, prompts: list[Any], view: View) -> list[Prefilled | Exception]:
    """All in one run or, where that fails, each alone: a fault stays with its prompt. That of a server is everyone's,
    and each would wait for it as long as all did."""
    if not prompts:
        return []
    try:
        return list(router.prefill_many(prompts, template=view.template, keep=view.keep))
    except Exception as error:  # noqa: BLE001 - costs the decision, not the answer
        if len(prompts) == 1 or isinstance(error, ServerUnreachableError | ServerTimeoutError):
            return [error] * len(prompts)
    return [_each(router, [prompt], view)[0] for prompt in prompts]


def fault_text(error: Exception) -> str:
    """A fault in words, for a result; never for a log."""
    return str(error) if isinstance(error, KVRouteError) else f"{type(error).__name__}: {error}"
