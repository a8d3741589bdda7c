"""Many inputs at once: one run decides them all, then each branch takes its own. A fault stays with its input.

A branch whose ``batch`` is its own gets its inputs together; LangChain's default would invoke it for each in a thread,
which is done here, in one pool for all branches.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Sequence
from concurrent.futures import Future
from functools import partial
from typing import TYPE_CHECKING, Any, Literal

from langchain_core.runnables import Runnable, RunnableConfig
from langchain_core.runnables.config import (
    get_async_callback_manager_for_config,
    get_callback_manager_for_config,
    get_config_list,
    get_executor_for_config,
)
from langchain_core.runnables.utils import gather_with_concurrency

from langchain_kvroute.branch_choice import Chosen
from langchain_kvroute.handover import hand_over

if TYPE_CHECKING:
    from langchain_kvroute.router import KVRouteRouter


def batch(
    router: KVRouteRouter[Any, Any], inputs: list[Any], config: Any, *, return_exceptions: bool, **kwargs: Any
) -> list[Any]:
    """:meth:`KVRouteRouter.batch`."""
    if not inputs:
        return []
    configs = get_config_list(config, len(inputs))
    managers = [
        get_callback_manager_for_config(c).on_chain_start(
            None, given, name=router._run_name(c), run_id=c.pop("run_id", None)
        )
        for c, given in zip(configs, inputs, strict=True)
    ]
    try:
        rendered = None
        if router.prompt is not None:
            children = router._prompt_configs(configs, managers)
            rendered = router.prompt.batch(inputs, children, return_exceptions=True)
        work = _Work(router, inputs, configs, managers, rendered)
        work.decide()

        def alone(row: int) -> None:
            with hand_over(work.of(row).handover):
                branch = router.branches[work.of(row).branch]
                work.found[row] = _tried(lambda: branch.invoke(inputs[row], work.child(row), **kwargs))

        def together(name: str, rows: list[int]) -> None:
            children = [work.child(row) for row in rows]
            given = [inputs[row] for row in rows]
            outputs = router.branches[name].batch(given, children, return_exceptions=True, **kwargs)
            for row, output in zip(rows, outputs, strict=True):
                work.found[row] = output

        limited = bool(configs[0].get("max_concurrency"))
        with get_executor_for_config(configs[0]) as executor:
            waiting: list[Future[Any]] = []
            for name, rows in work.groups():
                if work.apart(name, rows, "batch"):
                    waiting += [executor.submit(alone, row) for row in rows]
                else:
                    waiting.append(executor.submit(together, name, rows))
                if limited:  # the limit is on all branches together
                    _all(waiting)
                    waiting = []
            _all(waiting)
        outputs = work.outputs()
    except BaseException as error:
        for manager in managers:
            manager.on_chain_error(error)
        raise
    for manager, output in zip(managers, outputs, strict=True):
        if isinstance(output, Exception):
            manager.on_chain_error(output)
        else:
            manager.on_chain_end(output)
    return _given(outputs, return_exceptions)


async def abatch(
    router: KVRouteRouter[Any, Any], inputs: list[Any], config: Any, *, return_exceptions: bool, **kwargs: Any
) -> list[Any]:
    """:meth:`KVRouteRouter.abatch`."""
    if not inputs:
        return []
    configs = get_config_list(config, len(inputs))
    managers = await asyncio.gather(
        *(
            get_async_callback_manager_for_config(c).on_chain_start(
                None, given, name=router._run_name(c), run_id=c.pop("run_id", None)
            )
            for c, given in zip(configs, inputs, strict=True)
        )
    )
    try:
        rendered = None
        if router.prompt is not None:
            children = router._prompt_configs(configs, managers)
            rendered = await router.prompt.abatch(inputs, children, return_exceptions=True)
        work = _Work(router, inputs, configs, managers, rendered)
        await asyncio.to_thread(work.decide)

        async def alone(row: int) -> None:  # in a task, and so in a context, of its own
            with hand_over(work.of(row).handover):
                try:
                    branch = router.branches[work.of(row).branch]
                    work.found[row] = await branch.ainvoke(inputs[row], work.child(row), **kwargs)
                except Exception as error:  # noqa: BLE001 - belongs to its input
                    work.found[row] = error

        async def together(name: str, rows: list[int]) -> None:
            children = [work.child(row) for row in rows]
            given = [inputs[row] for row in rows]
            outputs = await router.branches[name].abatch(given, children, return_exceptions=True, **kwargs)
            for row, output in zip(rows, outputs, strict=True):
                work.found[row] = output

        limit = configs[0].get("max_concurrency")
        tasks = [
            [alone(row) for row in rows] if work.apart(name, rows, "abatch") else [together(name, rows)]
            for name, rows in work.groups()
        ]
        if limit:  # the limit is on all branches together
            for group in tasks:
                await gather_with_concurrency(limit, *group)
        else:
            await asyncio.gather(*(task for group in tasks for task in group))
        outputs = work.outputs()
    except BaseException as error:
        for manager in managers:
            await manager.on_chain_error(error)
        raise
    for manager, output in zip(managers, outputs, strict=True):
        if isinstance(output, Exception):
            await manager.on_chain_error(output)
        else:
            await manager.on_chain_end(output)
    return _given(outputs, return_exceptions)


class _Work:
    """Inputs on their way to outputs.

    Attributes:
        found: by input what its branch gave, or an exception.
    """

    def __init__(
        self,
        router: KVRouteRouter[Any, Any],
        inputs: Sequence[Any],
        configs: Sequence[RunnableConfig],
        managers: Sequence[Any],
        rendered: Sequence[Any] | None,
    ) -> None:
        self.router, self.configs, self.managers = router, configs, managers
        self.inputs = inputs if rendered is None else rendered
        self.rendered = rendered is not None
        self.chosen: list[Chosen | None] = [None] * len(inputs)
        self.found: list[Any] = [None] * len(inputs)

    def decide(self) -> None:
        """Choose the branches: in one run for all that demand none."""
        chooser, open_rows = self.router._chooser, []
        for row, config in enumerate(self.configs):
            mode = self.router._demanded(config)
            if mode is None:
                open_rows.append(row)
                continue
            self.found[row] = _tried(partial(chooser.forced, mode))
            if isinstance(self.found[row], Chosen):
                self.chosen[row] = self.found[row]
        prompts = [
            self.inputs[row]
            if isinstance(self.inputs[row], Exception)
            else chooser.prompt(self.inputs[row], rendered=self.rendered)
            for row in open_rows
        ]
        for row, chosen in zip(open_rows, chooser.choose(prompts) if prompts else [], strict=True):
            self.chosen[row] = chosen
        for row, known in enumerate(self.chosen):
            if known is not None:
                self.router._told(self.managers[row], known)

    def of(self, row: int) -> Chosen:
        """The choice of an input that has one."""
        chosen = self.chosen[row]
        assert chosen is not None
        return chosen

    def child(self, row: int) -> RunnableConfig:
        """The config of a branch's run."""
        return self.router._child(self.configs[row], self.managers[row], self.of(row))

    def groups(self) -> list[tuple[str, list[int]]]:
        """Branches with their inputs."""
        found: dict[str, list[int]] = {}
        for row, chosen in enumerate(self.chosen):
            if chosen is not None:
                found.setdefault(chosen.branch, []).append(row)
        return list(found.items())

    def apart(self, name: str, rows: Sequence[int], method: Literal["batch", "abatch"]) -> bool:
        """Whether a branch takes its inputs one by one: an input has a cache of its own to go on from, or the branch's
        way with many is LangChain's default."""
        handed = any(self.of(row).handover is not None for row in rows)
        return handed or getattr(type(self.router.branches[name]), method) is getattr(Runnable, method)

    def outputs(self) -> list[Any]:
        """What the router gives."""
        return [
            found if isinstance(found, Exception) or chosen is None else self.router._output(chosen, found)
            for found, chosen in zip(self.found, self.chosen, strict=True)
        ]


def _all(tasks: Sequence[Future[Any]]) -> None:
    for task in tasks:
        task.result()


def _tried(work: Callable[[], Any]) -> Any:
    try:
        return work()
    except Exception as error:  # noqa: BLE001 - belongs to its input
        return error


def _given(outputs: list[Any], return_exceptions: bool) -> list[Any]:
    if not return_exceptions:
        for output in outputs:
            if isinstance(output, Exception):
                raise output
    return outputs
