"""Which engine: the fields that kvroute's chat model and embeddings share, and what is kept behind them."""

from __future__ import annotations

import threading
from collections.abc import Callable, Sequence
from typing import Any, Literal, Self, TypeVar, cast

from langchain_core.utils import secret_from_env
from pydantic import BaseModel, ConfigDict, Field, PrivateAttr, SecretStr, model_validator

from kvroute import KEY_VARIABLE, EngineHandle, EngineName, InvalidInputError, KVRouteError

T = TypeVar("T")


class EngineState:
    """A model's engine and what was made for it once. Thread-safe; copies and pickles keep the engine's name alone.

    Args:
        handle: of the engine.
    """

    def __init__(self, handle: EngineHandle) -> None:
        self.handle = handle
        self._lock = threading.RLock()
        self._kept: dict[str, tuple[Any, Any]] = {}

    def kept(self, name: str, key: Any, make: Callable[[], T]) -> T:
        """What was made under a name, made anew where the key is another one."""
        with self._lock:
            found = self._kept.get(name)
            if found is None or found[0] != key:
                found = self._kept[name] = (key, make())
            return cast(T, found[1])

    def __eq__(self, other: object) -> bool:
        if not isinstance(other, EngineState):
            return NotImplemented
        return self.handle is other.handle or (self.handle.name is not None and self.handle.name == other.handle.name)

    __hash__ = None  # type: ignore[assignment]

    def __copy__(self) -> EngineState:
        return EngineState(self.handle)

    def __deepcopy__(self, memo: dict[int, Any]) -> EngineState:
        return EngineState(self.handle)

    def __reduce__(self) -> tuple[Any, ...]:
        return EngineState, (self.handle,)


class EngineFields(BaseModel):
    """An engine that is given, or opened by name at its first use."""

    model_config = ConfigDict(extra="forbid", arbitrary_types_allowed=True, hide_input_in_errors=True)

    engine: Any = Field(default=None, exclude=True, repr=False)
    """A live engine: :class:`kvroute.TransformersEngine`, :class:`kvroute.VLLMEngine` or :class:`kvroute.VLLMClient`.
    Copies share it; it can't be pickled or serialised: name the model for that."""
    model: str | None = None
    """In place of an engine: hub id, local folder, or the name of a model kvroute brings (``"smollm2"``). With
    ``base_url``: where the server's tokenizer is, which chat templates, tools and policies need."""
    kind: Literal["transformers", "vllm"] = "transformers"
    """What runs a named model in this process; a server is told by ``base_url``."""
    base_url: str | Sequence[str] | None = None
    """Address of a vLLM server such as ``http://host:8000``, or of several that serve the same model."""
    served_model_name: str | None = None
    """The model by the name that the server gives it; None takes its first."""
    api_key: SecretStr | None = Field(default_factory=secret_from_env(KEY_VARIABLE, default=None))
    """Of the server; by default that of the environment variable ``KVROUTE_API_KEY``. Pickles leave it out."""
    timeout: float | None = None
    """Seconds until a server's answer must be there, or of a stream its next piece; None is 600."""
    max_retries: int | None = None
    """How often a request that a server did not answer is sent again; None is 3."""
    dtype: str = "auto"
    """Of a named model in this process, such as ``float32``; ``auto`` takes the checkpoint's own."""
    device: str | None = None
    """Of a named transformers model; None takes a GPU if there is one."""

    _state: EngineState = PrivateAttr()

    @model_validator(mode="after")
    def _engine_or_name(self) -> Self:
        self._hold_engine()
        return self

    def _hold_engine(self) -> None:
        """Keep the engine, or how to open it.

        Raises:
            InvalidInputError: fields that don't go together.
        """
        named = self.model is not None or self.base_url is not None
        if (self.engine is not None) == named:
            raise InvalidInputError(
                "Give an engine, or the name of a model (of a server, its base_url): one of them.",
                hint='For example engine=engine, or model="smollm2".',
            )
        if self.engine is not None and (self.timeout is not None or self.max_retries is not None):
            raise InvalidInputError(
                "A live engine has its timeouts and retries already.", hint="Give them to the VLLMClient."
            )
        try:
            self._state = EngineState(EngineHandle(self.engine) if self.engine is not None else self._named())
        except KVRouteError as error:
            raise InvalidInputError(error.message, hint=error.hint) from error

    def _named(self) -> EngineHandle:
        urls = (self.base_url,) if isinstance(self.base_url, str) else tuple(self.base_url or ())
        name = EngineName(
            model=self.model,
            kind="server" if urls else self.kind,
            urls=urls,
            dtype=self.dtype,
            device=self.device,
            served=self.served_model_name,
            timeout=self.timeout,
            retries=self.max_retries,
        )
        return EngineHandle(name=name, api_key=None if self.api_key is None else self.api_key.get_secret_value())

    # ------------------------------------------------------------------ copies

    def __deepcopy__(self, memo: dict[int, Any] | None = None) -> Self:
        memo = {} if memo is None else memo
        if self.engine is not None:
            memo[id(self.engine)] = self.engine
        return super().__deepcopy__(memo)

    def __getstate__(self) -> dict[Any, Any]:
        if self.engine is not None:
            self._state.handle.__reduce__()  # says why it can't be
        state = super().__getstate__()
        return {**state, "__dict__": {**state["__dict__"], "api_key": None}}

    # ------------------------------------------------------------------ names

    @property
    def lc_secrets(self) -> dict[str, str]:
        """Fields that serialisation replaces by the name of an environment variable."""
        return {"api_key": KEY_VARIABLE}

    def opened(self) -> Any:
        """The engine, opened where this is its first use.

        Raises:
            ModelLoadError, ServerError, MissingExtraError: it can't be opened.
        """
        return self._state.handle.get()

    def batches_inside(self) -> bool:
        """Whether the engine is vLLM's, which batches what it gets by itself; opens nothing."""
        return bool(self.base_url) or self.kind == "vllm" or decides_inside(self.engine)

    def known_name(self) -> str:
        """What to call the model in traces; asks no server."""
        named = self.served_model_name or self.model
        if named is not None:
            return named
        if self.engine is not None and not decides_inside(self.engine):
            return str(self.engine.info.name)
        return "a vLLM server's" if self.engine is None else repr(self.engine)

    def answering_name(self) -> str:
        """The model as its engine calls it; a server is asked once. An engine that can't say costs no answer."""

        def ask() -> str:
            engine = self.opened()
            try:
                return str(engine.model if isinstance(getattr(engine, "model", None), str) else engine.info.name)
            except KVRouteError:
                return self.known_name()

        return self._state.kept("name", None, ask)


def decides_inside(engine: Any) -> bool:
    """Whether an engine decides by policies of its own, as vLLM's do."""
    return bool(getattr(engine, "decides_inside", False))
