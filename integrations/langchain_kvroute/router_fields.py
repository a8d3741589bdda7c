"""Which router decides: the fields that what is routed here shares, and what is kept behind them."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal, Self

from langchain_core.utils import secret_from_env
from pydantic import BaseModel, ConfigDict, Field, SecretStr, field_validator

from kvroute import KEY_VARIABLE, EngineName, InvalidInputError, Policy, Router
from langchain_kvroute.router_handle import RouterHandle, RouterName


class RouterFields(BaseModel):
    """A router that is given, or opened by name at its first use."""

    model_config = ConfigDict(hide_input_in_errors=True)  # a key may be in it

    router: Any = Field(default=None, repr=False)
    """A :class:`kvroute.Router`. Copies share it; it can't be pickled or serialised: name model and policy for that."""
    model: str | None = None
    """In place of a router: hub id, local folder, or the name of a model kvroute brings. With ``base_url``: where the
    server's tokenizer is."""
    policy: str | None = None
    """Of a named model: a policy's kind, ``.json`` file, name or JSON; a :class:`kvroute.Policy` is taken too."""
    head: str | None = None
    """Folder of the head; None takes the policy's."""
    kind: Literal["transformers", "vllm"] = "transformers"
    """What runs a named model in this process; a server is told by ``base_url``."""
    base_url: str | Sequence[str] | None = None
    """Address of a vLLM server, or of several that serve the same model."""
    served_model_name: str | None = None
    """The model by the name that the server gives it; None takes its first."""
    api_key: SecretStr | None = Field(default_factory=secret_from_env(KEY_VARIABLE, default=None), repr=False)
    """Of the server; by default that of the environment variable ``KVROUTE_API_KEY``. Pickles leave it out."""
    dtype: str = "auto"
    """Of a named model in this process, such as ``float32``; ``auto`` takes the checkpoint's own."""
    device: str | None = None
    """Of a named transformers model; None takes a GPU if there is one."""

    @field_validator("policy", "head", "model", mode="before")
    @classmethod
    def _named(cls, given: Any) -> Any:
        if isinstance(given, Policy):
            return given.model_dump_json(exclude_defaults=True)
        return str(given) if isinstance(given, Path) else given

    def _router_handle(self, further: Sequence[str] = ()) -> RouterHandle:
        """The router behind the fields; nothing is opened.

        Args:
            further: targets beside ``fast`` and ``slow`` that are answered for.

        Raises:
            InvalidInputError: the fields do not fit together.
        """
        if self.router is not None:
            if self.policy is not None or self.head is not None or self.base_url is not None:
                raise InvalidInputError("A router has its engine, policy and head already.")
            if not isinstance(self.router, Router) and not hasattr(self.router, "prefill_many"):
                raise InvalidInputError(f"A kvroute.Router decides, not a {type(self.router).__name__}.")
            return RouterHandle(self.router)
        if self.policy is None or not (self.model or self.base_url):
            raise InvalidInputError("Give a router, or model= and policy= by name.")
        urls = (self.base_url,) if isinstance(self.base_url, str) else tuple(self.base_url or ())
        kind = "server" if urls else self.kind
        engine = EngineName(self.model or None, kind, urls, self.dtype, self.device, self.served_model_name)
        key = None if self.api_key is None else self.api_key.get_secret_value()
        return RouterHandle(name=RouterName(engine, self.policy, self.head, tuple(further)), api_key=key)

    def __deepcopy__(self, memo: dict[int, Any] | None = None) -> Self:
        memo = {} if memo is None else memo
        memo[id(self.router)] = self.router  # an engine is not to be there twice
        return super().__deepcopy__(memo)

    def __getstate__(self) -> dict[Any, Any]:
        if self.router is not None:
            RouterHandle(self.router).__reduce__()  # says why it can't be
        state = super().__getstate__()
        return {**state, "__dict__": {**state["__dict__"], "api_key": None}}

    @property
    def lc_secrets(self) -> dict[str, str]:
        """Fields that serialisation replaces by the name of an environment variable."""
        return {"api_key": KEY_VARIABLE}
