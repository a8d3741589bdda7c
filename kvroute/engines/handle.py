"""An engine by name: what adapters keep in a config, a pickle or a serialised chain in place of the engine itself."""

from __future__ import annotations

import os
import threading
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any, Literal, Self
from weakref import WeakValueDictionary

from kvroute.errors import InvalidInputError

if TYPE_CHECKING:
    from kvroute.engines.base import Engine

KEY_VARIABLE = "KVROUTE_API_KEY"
"""The environment variable with the key of servers whose key is not given."""


@dataclass(frozen=True, slots=True)
class EngineName:
    """What it takes to open an engine. Holds no secret.

    Attributes:
        model: hub id, local folder, or the name of a model kvroute brings; of a server, where its tokenizer is (None
            leaves tokenizing to the server).
        kind: ``transformers``, ``vllm`` (in this process) or ``server``.
        urls: of servers.
        dtype: as ``float32``; ``auto`` takes the checkpoint's own.
        device: for transformers; None takes a GPU if there is one.
        served: the model by the name that servers give it; None takes their first.
        timeout: of servers, seconds until an answer must be there; None is the client's own.
        retries: of servers, how often a request without an answer is sent again; None is the client's own.
    """

    model: str | None = None
    kind: Literal["transformers", "vllm", "server"] = "transformers"
    urls: tuple[str, ...] = ()
    dtype: str = "auto"
    device: str | None = None
    served: str | None = None
    timeout: float | None = None
    retries: int | None = None

    def __post_init__(self) -> None:
        if self.kind not in ("transformers", "vllm", "server"):
            raise InvalidInputError(f"An engine is transformers, vllm or server, not {self.kind!r}.")
        if (self.kind == "server") != bool(self.urls):
            raise InvalidInputError("A server has an address, and other engines have none.")
        if self.kind != "server" and (self.timeout is not None or self.retries is not None):
            raise InvalidInputError("Only servers have timeouts and retries.", hint="Leave them out, or name a server.")
        if self.kind != "server" and not self.model:
            raise InvalidInputError("No model was named.", hint="Name a hub id, a local folder, or 'smollm2'.")

    def to_dict(self) -> dict[str, Any]:
        """JSON-able."""
        return asdict(self) | {"urls": list(self.urls)}

    @classmethod
    def from_dict(cls, found: dict[str, Any]) -> Self:
        """Of :meth:`to_dict`."""
        return cls(**found | {"urls": tuple(found.get("urls") or ())})


class EngineHandle:
    """An engine that is given, or opened at its first use. Thread-safe.

    Handles of one name share one engine in a process, as long as somebody holds it. Copies share it too; a pickle
    carries the name alone, and no key.

    Args:
        engine: that is there already.
        name: how to open it; needed where there is none, and for pickles.
        api_key: of the servers; by default that of the environment variable ``KVROUTE_API_KEY``.

    Raises:
        InvalidInputError: neither was given.
    """

    def __init__(
        self, engine: Engine | None = None, *, name: EngineName | None = None, api_key: str | None = None
    ) -> None:
        if engine is None and name is None:
            raise InvalidInputError("Give an engine, or the name of a model.")
        self.name = name
        self._engine = engine
        self._api_key = api_key

    def __repr__(self) -> str:
        return f"EngineHandle({self._engine if self.name is None else self.name!r})"

    @property
    def opened(self) -> bool:
        """Whether the engine is there."""
        return self._engine is not None

    def get(self) -> Any:
        """The engine.

        Raises:
            ModelLoadError, ServerError, MissingExtraError: it can't be opened.
        """
        if self._engine is None:
            assert self.name is not None
            self._engine = _open(self.name, self._api_key)
        return self._engine

    def __copy__(self) -> Self:
        return self

    def __deepcopy__(self, memo: dict[int, Any]) -> Self:
        return self

    def __reduce__(self) -> tuple[Any, ...]:
        if self.name is None:
            raise InvalidInputError(
                "An engine can't be pickled: it holds a model, or connections.",
                hint="Name the model instead of giving an engine; it is opened where the pickle is loaded.",
            )
        return _named, (self.name,)


def _named(name: EngineName) -> EngineHandle:
    return EngineHandle(name=name)


_lock = threading.Lock()
_shared: WeakValueDictionary[tuple[EngineName, str | None], Any] = WeakValueDictionary()


def _open(name: EngineName, api_key: str | None) -> Any:
    api_key = (api_key or os.environ.get(KEY_VARIABLE)) if name.kind == "server" else None
    key = (name, api_key)
    with _lock:
        found = _shared.get(key)
        if found is None:
            found = _shared[key] = _new(name, api_key)
        return found


def _new(name: EngineName, api_key: str | None) -> Any:
    if name.kind == "server":
        from kvroute.serving.client import VLLMClient

        more = {n: v for n, v in (("timeout", name.timeout), ("retries", name.retries)) if v is not None}
        return VLLMClient(list(name.urls), model=name.served, tokenizer=name.model, api_key=api_key, **more)  # type: ignore[arg-type]
    assert name.model is not None
    if name.kind == "vllm":
        from kvroute.engines.vllm_engine import VLLMEngine

        return VLLMEngine(name.model, dtype=name.dtype)
    from kvroute.engines.transformers_engine import TransformersEngine

    return TransformersEngine.from_pretrained(name.model, dtype=name.dtype, device=name.device)
