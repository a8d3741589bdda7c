"""A chain router that thinks only where it must: the difficulty read from a prompt's KV cache picks the branch."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Callable, Iterator, Mapping, Sequence
from contextlib import suppress
from functools import reduce
from operator import or_
from typing import Any, Self, TypedDict
from uuid import UUID

from langchain_core.runnables import ConfigurableFieldSpec, Runnable, RunnableConfig, RunnableSerializable
from langchain_core.runnables.base import coerce_to_runnable
from langchain_core.runnables.config import (
    ensure_config,
    get_async_callback_manager_for_config,
    get_callback_manager_for_config,
    patch_config,
)
from langchain_core.runnables.graph import Graph
from langchain_core.runnables.utils import AddableDict, Input, Output, get_unique_config_specs
from pydantic import ConfigDict, Field, PrivateAttr, field_validator, model_validator

from kvroute import InvalidInputError
from langchain_kvroute.branch_choice import Chooser, Chosen, warn_once
from langchain_kvroute.handover import hand_over
from langchain_kvroute.metadata import KVRouteMetadata
from langchain_kvroute.router_batch import abatch, batch
from langchain_kvroute.router_fields import RouterFields

MODE = "kvroute_mode"
"""What a config's ``configurable`` demands a branch by."""


class RoutedOutput(TypedDict):
    """What comes out with ``include_decision``; a stream gives ``kvroute`` first, then pieces of ``output``."""

    output: Any
    """The branch's."""
    kvroute: KVRouteMetadata
    """The decision."""


class KVRouteRouter(RouterFields, RunnableSerializable[Input, Output]):
    """Calls one of its branches, as :class:`~langchain_core.runnables.RunnableBranch` does; difficulty decides.

    A branch's run is a child run with the tags ``branch:<name>`` and ``kvroute:<name>`` and the metadata ``kvroute`` (a
    :class:`~langchain_kvroute.KVRouteMetadata`), ``kvroute_branch``, ``kvroute_difficulty`` and ``kvroute_why``, which
    all runs below it carry too. Where a branch holds a chat model of kvroute's on the router's engine, the decision
    keeps the prompt's cache and the model goes on from it.

    A decision that fails takes the default branch; the metadata says why, and one warning of each kind is logged.
    A call may demand a branch: ``config={"configurable": {"kvroute_mode": "slow"}}``.

    Args:
        router: decides. Or ``model=`` and ``policy=`` by name, opened at the first use; that can be pickled and
            serialised.
        fast: the branch for easy prompts.
        slow: the branch for hard ones.
        fields: see below.

    Raises:
        pydantic.ValidationError: the arguments do not fit together.
    """

    fast: Runnable[Any, Any] | None = None
    """For easy prompts."""
    slow: Runnable[Any, Any] | None = None
    """For hard prompts."""
    targets: dict[str, Runnable[Any, Any]] = Field(default_factory=dict)
    """More branches, by the names of the policy's ``targets``."""
    prompt: Runnable[Any, Any] | None = None
    """From the input to a text, messages or prompt value: a template or a function. By default the template that the
    default branch begins with; without one the input is the prompt."""
    default: str | None = None
    """The branch where a decision fails; None takes the policy's fallback."""
    include_decision: bool = False
    """Give a :class:`RoutedOutput` in place of the branch's output."""
    on_decision: Callable[[UUID, KVRouteMetadata], Any] | None = None
    """Called with the router's run id and each decision. What it raises is logged and costs nothing."""

    model_config = ConfigDict(arbitrary_types_allowed=True, extra="forbid")

    _chooser: Chooser = PrivateAttr()

    def __init__(self, router: Any = None, fast: Any = None, slow: Any = None, **fields: Any) -> None:
        super().__init__(router=router, fast=fast, slow=slow, **fields)

    # ------------------------------------------------------------------ what it is made of

    @field_validator("fast", "slow", "prompt", mode="before")
    @classmethod
    def _runnable(cls, given: Any) -> Any:
        return None if given is None else coerce_to_runnable(given)

    @field_validator("targets", mode="before")
    @classmethod
    def _runnables(cls, given: Any) -> Any:
        return {name: coerce_to_runnable(r) for name, r in given.items()} if isinstance(given, Mapping) else given

    @model_validator(mode="after")
    def _fits_together(self) -> Self:
        twice = [n for n in ("fast", "slow") if getattr(self, n) is not None and n in self.targets]
        if twice:
            raise InvalidInputError(f"The branches {twice} were given twice.")
        names = list(self.branches)
        if len(names) < 2:
            raise InvalidInputError("A router has at least two branches.", hint="Pass fast= and slow=.")
        if self.default is not None and self.default not in names:
            raise InvalidInputError(f"The default is one of the branches {names}, not {self.default!r}.")
        if self.router is not None and self.model is not None:
            raise InvalidInputError("A router has its engine, policy and head already.")
        handle = self._router_handle([n for n in names if n not in ("fast", "slow")])
        if self.router is not None:
            missing = [t for t in self.router.policy.targets if t not in names]
            if missing:
                raise InvalidInputError(f"The policy chooses among branches that are missing: {missing}.")
        self._chooser = Chooser(handle, self.branches, self.default)
        return self

    @property
    def branches(self) -> dict[str, Runnable[Any, Any]]:
        """All branches by name."""
        own = {"fast": self.fast, "slow": self.slow}
        return {n: b for n, b in own.items() if b is not None} | self.targets

    # ------------------------------------------------------------------ copies

    def __deepcopy__(self, memo: dict[int, Any] | None = None) -> Self:
        memo = {} if memo is None else memo
        memo[id(self.on_decision)] = self.on_decision
        return super().__deepcopy__(memo)

    @classmethod
    def is_lc_serializable(cls) -> bool:
        """It is; one with a live router can be dumped, and not be loaded."""
        return True

    # ------------------------------------------------------------------ schemas and graph

    @property
    def InputType(self) -> Any:  # noqa: N802 - LangChain's name
        """That of the first branch which tells."""
        for branch in self.branches.values():
            with suppress(TypeError):
                return branch.InputType
        return Any

    @property
    def OutputType(self) -> Any:  # noqa: N802 - LangChain's name
        """The union of the branches'."""
        if self.include_decision:
            return RoutedOutput
        try:
            return reduce(or_, (branch.OutputType for branch in self.branches.values()))
        except TypeError:
            return Any

    def get_input_schema(self, config: RunnableConfig | None = None) -> Any:
        """That of the first branch which says what it takes."""
        for branch in self.branches.values():
            if branch.get_input_jsonschema(config).get("type") is not None:
                return branch.get_input_schema(config)
        return super().get_input_schema(config)

    @property
    def config_specs(self) -> list[ConfigurableFieldSpec]:
        """Those of the branches, and the demanded branch."""
        own = ConfigurableFieldSpec(
            id=MODE, annotation=str | None, name="Branch", description="Take this branch.", default=None
        )
        parts = [*self.branches.values(), *([self.prompt] if self.prompt is not None else [])]
        return get_unique_config_specs([own, *(spec for part in parts for spec in part.config_specs)])

    def get_graph(self, config: RunnableConfig | None = None) -> Graph:
        """Input, router, an edge to each branch by its name, output."""
        graph = Graph()
        given = graph.add_node(self.get_input_schema(config))
        router = graph.add_node(self, metadata=dict(config["metadata"]) if config and "metadata" in config else None)
        output = graph.add_node(self.get_output_schema(config))
        graph.add_edge(given, router)
        for name, branch in self.branches.items():
            inner = branch.get_graph(config)
            inner.trim_first_node()
            inner.trim_last_node()
            first, last = graph.extend(inner, prefix=name)
            if first is None or last is None:
                raise InvalidInputError(f"The branch {name!r} has no first or no last node to draw.")
            graph.add_edge(router, first, data=name, conditional=True)
            graph.add_edge(last, output)
        return graph

    # ------------------------------------------------------------------ deciding

    def _choose(self, given: Any, rendered: bool) -> Chosen:
        return self._chooser.choose([self._chooser.prompt(given, rendered=rendered)])[0]

    def _decided(self, given: Any, config: RunnableConfig, manager: Any) -> Chosen:
        mode = self._demanded(config)
        if mode is not None:
            return self._told(manager, self._chooser.forced(mode))
        if self.prompt is not None:
            child = patch_config(config, callbacks=manager.get_child("prompt"))
            try:
                given = self.prompt.invoke(given, child)
            except Exception as error:  # noqa: BLE001 - costs the decision, not the answer
                return self._told(manager, self._chooser.choose([error])[0])
        return self._told(manager, self._choose(given, self.prompt is not None))

    async def _adecided(self, given: Any, config: RunnableConfig, manager: Any) -> Chosen:
        mode = self._demanded(config)
        if mode is not None:
            return self._told(manager, self._chooser.forced(mode))
        if self.prompt is not None:
            child = patch_config(config, callbacks=manager.get_child("prompt"))
            try:
                given = await self.prompt.ainvoke(given, child)
            except Exception as error:  # noqa: BLE001 - costs the decision, not the answer
                return self._told(manager, self._chooser.choose([error])[0])
        chosen = await asyncio.to_thread(self._choose, given, self.prompt is not None)
        return self._told(manager, chosen)

    def _demanded(self, config: RunnableConfig) -> Any:
        return config.get("configurable", {}).get(MODE)

    def _prompt_configs(self, configs: Sequence[RunnableConfig], managers: Sequence[Any]) -> list[RunnableConfig]:
        return [patch_config(c, callbacks=m.get_child("prompt")) for c, m in zip(configs, managers, strict=True)]

    def _told(self, manager: Any, chosen: Chosen) -> Chosen:
        if self.on_decision is not None:
            try:
                self.on_decision(manager.run_id, chosen.metadata)
            except Exception as error:  # noqa: BLE001 - a hook costs no answer
                warn_once("on_decision failed", error)
        return chosen

    def _child(self, config: RunnableConfig, manager: Any, chosen: Chosen) -> RunnableConfig:
        callbacks = manager.get_child(f"branch:{chosen.branch}")
        callbacks.add_tags([f"kvroute:{chosen.branch}"], inherit=False)
        callbacks.add_metadata(chosen.run_metadata)
        return patch_config(config, callbacks=callbacks)

    def _output(self, chosen: Chosen, output: Any) -> Any:
        return {"output": output, "kvroute": chosen.metadata} if self.include_decision else output

    def _run_name(self, config: RunnableConfig) -> str:
        return config.get("run_name") or self.get_name()

    # ------------------------------------------------------------------ calls

    def invoke(self, input: Input, config: RunnableConfig | None = None, **kwargs: Any) -> Output:
        """Decide, then call a branch; ``kwargs`` are the branch's."""
        config = ensure_config(config)
        manager = get_callback_manager_for_config(config).on_chain_start(
            None, input, name=self._run_name(config), run_id=config.pop("run_id", None)
        )
        try:
            chosen = self._decided(input, config, manager)
            with hand_over(chosen.handover):
                found = self.branches[chosen.branch].invoke(input, self._child(config, manager, chosen), **kwargs)
            output = self._output(chosen, found)
        except BaseException as error:
            manager.on_chain_error(error)
            raise
        manager.on_chain_end(output)
        return output  # type: ignore[no-any-return]

    async def ainvoke(self, input: Input, config: RunnableConfig | None = None, **kwargs: Any) -> Output:
        """:meth:`invoke`; the decision is taken in a thread. Cancelling the task cancels the branch."""
        config = ensure_config(config)
        manager = await get_async_callback_manager_for_config(config).on_chain_start(
            None, input, name=self._run_name(config), run_id=config.pop("run_id", None)
        )
        try:
            chosen = await self._adecided(input, config, manager)
            branch = self.branches[chosen.branch]
            with hand_over(chosen.handover):
                found = await branch.ainvoke(input, self._child(config, manager, chosen), **kwargs)
            output = self._output(chosen, found)
        except BaseException as error:
            await manager.on_chain_error(error)
            raise
        await manager.on_chain_end(output)
        return output  # type: ignore[no-any-return]

    def batch(
        self,
        inputs: list[Input],
        config: RunnableConfig | list[RunnableConfig] | None = None,
        *,
        return_exceptions: bool = False,
        **kwargs: Any | None,
    ) -> list[Output]:
        """Decide all in one run, then call each branch with its inputs. Outputs are in the inputs' order."""
        return batch(self, inputs, config, return_exceptions=return_exceptions, **kwargs)

    async def abatch(
        self,
        inputs: list[Input],
        config: RunnableConfig | list[RunnableConfig] | None = None,
        *,
        return_exceptions: bool = False,
        **kwargs: Any | None,
    ) -> list[Output]:
        """:meth:`batch`; the decisions are taken in a thread."""
        return await abatch(self, inputs, config, return_exceptions=return_exceptions, **kwargs)

    def stream(self, input: Input, config: RunnableConfig | None = None, **kwargs: Any | None) -> Iterator[Output]:
        """Decide, then stream a branch. Closing the iterator closes the branch's."""
        config = ensure_config(config)
        manager = get_callback_manager_for_config(config).on_chain_start(
            None, input, name=self._run_name(config), run_id=config.pop("run_id", None)
        )
        whole = _Sum()
        try:
            chosen = self._decided(input, config, manager)
            for first in self._first(chosen):
                yield whole.add(first)
            pieces = self.branches[chosen.branch].stream(input, self._child(config, manager, chosen), **kwargs)
            try:
                while True:
                    with hand_over(chosen.handover):  # only while the branch runs: the caller's context is not ours
                        piece = next(pieces, _END)
                    if piece is _END:
                        break
                    yield whole.add(self._piece(piece))
            finally:
                if hasattr(pieces, "close"):
                    pieces.close()
        except BaseException as error:
            manager.on_chain_error(error)
            raise
        manager.on_chain_end(whole.value)

    async def astream(
        self,
        input: Input,
        config: RunnableConfig | None = None,
        **kwargs: Any | None,
    ) -> AsyncIterator[Output]:
        """:meth:`stream`; the decision is taken in a thread."""
        config = ensure_config(config)
        manager = await get_async_callback_manager_for_config(config).on_chain_start(
            None, input, name=self._run_name(config), run_id=config.pop("run_id", None)
        )
        whole = _Sum()
        try:
            chosen = await self._adecided(input, config, manager)
            for first in self._first(chosen):
                yield whole.add(first)
            pieces = self.branches[chosen.branch].astream(input, self._child(config, manager, chosen), **kwargs)
            try:
                while True:
                    with hand_over(chosen.handover):
                        piece = await anext(pieces, _END)
                    if piece is _END:
                        break
                    yield whole.add(self._piece(piece))
            finally:
                if hasattr(pieces, "aclose"):
                    await pieces.aclose()
        except BaseException as error:
            await manager.on_chain_error(error)
            raise
        await manager.on_chain_end(whole.value)

    def _first(self, chosen: Chosen) -> list[Any]:
        return [AddableDict(kvroute=chosen.metadata)] if self.include_decision else []

    def _piece(self, piece: Any) -> Any:
        return AddableDict(output=piece) if self.include_decision else piece


_END: Any = object()


class _Sum:
    """All pieces of a stream as one, for the trace; None where they do not add up."""

    def __init__(self) -> None:
        self.value: Any = None
        self._adds = True

    def add(self, piece: Any) -> Any:
        if self._adds:
            try:
                self.value = piece if self.value is None else self.value + piece
            except TypeError:
                self.value, self._adds = None, False
        return piece
