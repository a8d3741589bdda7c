"""A router that is given, or opened by name at its first use: what a chain keeps in a config or a pickle."""

from __future__ import annotations

import threading
from dataclasses import dataclass
from typing import Any, Self
from weakref import WeakValueDictionary

from kvroute import EngineHandle, EngineName, InvalidInputError, Policy, Router


@dataclass(frozen=True, slots=True)
class RouterName:
    """What it takes to open a router. Holds no secret.

    Attributes:
        engine: of which model.
        policy: a kind, a file, a name, or a policy's JSON.
        head: folder of the head; None takes the policy's.
        targets: further names that the policy may choose.
    """

    engine: EngineName
    policy: str
    head: str | None = None
    targets: tuple[str, ...] = ()

    def open(self, engine: Any) -> Router:
        """The router on an engine.

        Raises:
            KVRouteError: policy or head can't be read, or do not fit the model.
        """
        policy: Any = Policy.model_validate_json(self.policy) if self.policy.startswith("{") else self.policy
        further: Any = dict.fromkeys(self.targets) or None  # they answer elsewhere; here they are only chosen
        return Router(engine, policy, head=self.head, targets=further)


class _Shared:
    """The routers on one engine, by name. They live as long as a handle does that may open one of them."""

    def __init__(self, engine: EngineHandle) -> None:
        self.engine = engine
        self.routers: dict[RouterName, Router] = {}
        self.lock = threading.Lock()

    def get(self, name: RouterName) -> Router:
        with self.lock:
            found = self.routers.get(name)
            if found is None:
                found = self.routers[name] = name.open(self.engine.get())
            return found


_lock = threading.Lock()
_shared: WeakValueDictionary[tuple[EngineName, str | None], _Shared] = WeakValueDictionary()


class RouterHandle:
    """A router that is given, or opened at its first use. Thread-safe.

    Handles of one name share one router in a process. Copies share it too; a pickle carries the name alone, and no key.

    Args:
        router: that is there already.
        name: how to open it.
        api_key: of servers.
    """

    def __init__(self, router: Any = None, *, name: RouterName | None = None, api_key: str | None = None) -> None:
        if (router is None) == (name is None):
            raise InvalidInputError("Give a router, or the name of a model and a policy.")
        self._router = router
        self.name = name
        if name is not None:
            with _lock:
                key = (name.engine, api_key)
                found = _shared.get(key)
                if found is None:
                    found = _shared[key] = _Shared(EngineHandle(name=name.engine, api_key=api_key))
                self._group = found

    def get(self) -> Any:
        """The router.

        Raises:
            KVRouteError: engine, policy or head can't be had.
        """
        return self._router if self.name is None else self._group.get(self.name)

    def __copy__(self) -> Self:
        return self

    def __deepcopy__(self, memo: dict[int, Any]) -> Self:
        return self

    def __reduce__(self) -> tuple[Any, ...]:
        if self.name is None:
            raise InvalidInputError(
                "A router can't be pickled: its engine holds a model, or connections.",
                hint="Give model= and policy= by name; they are opened where the pickle is loaded.",
            )
        return _named, (self.name,)


def _named(name: RouterName) -> RouterHandle:
    return RouterHandle(name=name)
