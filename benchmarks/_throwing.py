"""Exceptions thrown inside kvroute: which functions of ours there are, which a run calls, and one that throws."""

from __future__ import annotations

import contextlib
import inspect
import itertools
import sys
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from types import FunctionType
from typing import Any

OURS = ("kvroute", "kvroute_kernels")
"""Packages of which every function may throw."""
ENTRIES = ("KVRouteConnector", "KVRouteStats", "KVRouteMetrics", "ForcedTokens", "StepMessage", "StepAnswer")
"""Classes whose public methods vLLM calls itself: an exception is thrown inside them, not in their place."""


class InjectedError(RuntimeError):
    """Thrown by these scripts."""


@dataclass(frozen=True)
class Point:
    """A function of ours, and who has it.

    Attributes:
        module: a module's name.
        owner: a class in it, or None where the function is the module's own or was imported into it.
        name: the function's.
    """

    module: str
    owner: str | None
    name: str

    def __str__(self) -> str:
        return ".".join(filter(None, (self.module.removeprefix("kvroute."), self.owner, self.name)))

    @contextlib.contextmanager
    def replaced(self, wrap: Callable[[Any], Any]) -> Iterator[None]:
        """With ``wrap(function)`` in its place."""
        holder: Any = sys.modules[self.module]
        if self.owner is not None:
            holder = getattr(holder, self.owner)
        there = inspect.getattr_static(holder, self.name)
        put = wrap(_function(there))
        setattr(holder, self.name, put if isinstance(there, FunctionType) else type(there)(put))
        try:
            yield
        finally:
            setattr(holder, self.name, there)


def points() -> list[Point]:
    """Every function, method and property of ours in this process, where a call finds it; none that Python makes."""
    found = []
    for name in sorted(name for name in sys.modules if name.split(".")[0] in OURS):
        for key, value in vars(sys.modules[name]).items():
            if inspect.isclass(value) and value.__module__ == name and value.__name__ == key:
                found += [Point(name, key, method) for method in _methods(value)]
            elif isinstance(value, FunctionType) and _is_ours(value):
                found.append(Point(name, None, key))
    return found


def _methods(owner: type) -> Iterator[str]:
    for name, there in vars(owner).items():
        function = _function(there)
        if function is None or not _is_ours(function):
            continue
        if owner.__name__ not in ENTRIES or (name.startswith("_") and not name.startswith("__")):
            yield name


def _function(there: Any) -> FunctionType | None:
    """What a name in a class or module calls; None where that is no function."""
    if isinstance(there, staticmethod | classmethod):
        there = there.__func__
    elif type(there) is property:
        there = there.fget
    return there if isinstance(there, FunctionType) else None


def _is_ours(function: FunctionType) -> bool:
    inside: Any = inspect.unwrap(function)
    made = inside.__code__.co_filename == "<string>"  # by dataclass and its like
    return not made and str(inside.__globals__.get("__name__", "")).split(".")[0] in OURS


@dataclass
class Calls:
    """Of one run.

    Attributes:
        count: calls by function.
        inside: of those that were called inside of a watched function, the number of the first such call.
    """

    count: Counter[Point] = field(default_factory=Counter)
    inside: dict[Point, int] = field(default_factory=dict)
    _depth: int = 0

    @contextlib.contextmanager
    def counted(self, places: Iterable[Point], watched: Mapping[Point, Callable[..., bool]]) -> Iterator[None]:
        """Count all calls within.

        Args:
            places: the functions.
            watched: tells of a call's arguments whether that call is looked into, by function.
        """
        with contextlib.ExitStack() as stack:
            for point in places:
                stack.enter_context(point.replaced(lambda f, point=point: self._counting(f, point)))
            for point, looks in watched.items():
                stack.enter_context(point.replaced(lambda f, looks=looks: self._watching(f, looks)))
            yield

    def _counting(self, function: Callable[..., Any], point: Point) -> Callable[..., Any]:
        def counted(*args: Any, **kwargs: Any) -> Any:
            if self._depth:
                self.inside.setdefault(point, self.count[point])
            self.count[point] += 1
            return function(*args, **kwargs)

        return counted

    def _watching(self, function: Callable[..., Any], looks: Callable[..., bool]) -> Callable[..., Any]:
        def watched(*args: Any, **kwargs: Any) -> Any:
            into = looks(*args, **kwargs)
            self._depth += into
            try:
                return function(*args, **kwargs)
            finally:
                self._depth -= into

        return watched


@contextlib.contextmanager
def throwing(point: Point, at: int, thrown: list[int]) -> Iterator[None]:
    """With an exception in place of a function's call number ``at``, which is noted in ``thrown``."""
    with point.replaced(lambda f: _throwing(f, at, thrown)):
        yield


@contextlib.contextmanager
def broken(point: Point) -> Iterator[None]:
    """With an exception in place of every call."""

    def wrap(_: Any) -> Callable[..., Any]:
        def always(*_: Any, **__: Any) -> Any:
            raise InjectedError("thrown by the benchmark")

        return always

    with point.replaced(wrap):
        yield


def _throwing(function: Callable[..., Any], at: int, thrown: list[int]) -> Callable[..., Any]:
    calls = itertools.count()

    def once(*args: Any, **kwargs: Any) -> Any:
        if next(calls) == at:
            thrown.append(at)
            raise InjectedError("thrown by the benchmark")
        return function(*args, **kwargs)

    return once
