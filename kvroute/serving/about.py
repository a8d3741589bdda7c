"""``GET /v1/kvroute/info``: what a server runs, so that a client need not be told. No path is in it."""

from __future__ import annotations

import threading
from collections.abc import Mapping
from dataclasses import dataclass, field
from types import SimpleNamespace
from typing import Any, Final

from pydantic import BaseModel, ConfigDict, ValidationError

from kvroute._version import __version__
from kvroute.errors import KVRouteError, ServerError
from kvroute.info import ModelInfo
from kvroute.policy import Policy
from kvroute.pooling import PRESETS
from kvroute.serving.answers import public_text
from kvroute.serving.asks import FEATURES
from kvroute.serving.catalog import Catalog
from kvroute.serving.config import ServingConfig
from kvroute.serving.plugin import NAME
from kvroute.thinking import ThinkingMode

PATH: Final = "/v1/kvroute/info"
_UNSAID: Final = {"head", "drift", "guarantee"}
"""Fields of a policy that name files, and a long one."""


@dataclass(frozen=True)
class About:
    """What a server says of itself.

    Attributes:
        version: of the kvroute that runs in it.
        connector: whether kvroute runs in its engine.
        model: what it serves, by its served name; None where that can't be told.
        model_error: why.
        vocabulary: :func:`~kvroute.token_weights.vocabulary_digest` of its tokenizer, or None.
        thinking: how its model thinks, or None.
        policies: by name, without the files they name.
        heads: what each named head tells, ``difficulty`` or ``correct``.
        off: by name, the policies and heads that can't be used, and why.
        limits: what one request may ask.
    """

    version: str
    connector: bool
    model: ModelInfo | None = None
    model_error: str | None = None
    vocabulary: str | None = None
    thinking: ThinkingMode | None = None
    policies: Mapping[str, Policy] = field(default_factory=dict)
    heads: Mapping[str, str] = field(default_factory=dict)
    off: Mapping[str, str] = field(default_factory=dict)
    limits: Mapping[str, int] = field(default_factory=dict)

    def to_dict(self) -> dict[str, Any]:
        """JSON-able."""
        return {
            "object": "kvroute.info",
            "version": self.version,
            "connector": self.connector,
            "model": None
            if self.model is None
            else {**self.model.model_dump(mode="json"), "fingerprint": self.model.fingerprint},
            "model_error": self.model_error,
            "vocabulary": self.vocabulary,
            "thinking": None if self.thinking is None else self.thinking.model_dump(mode="json"),
            "policies": {n: p.model_dump(mode="json", exclude=_UNSAID) for n, p in self.policies.items()},
            "heads": dict(self.heads),
            "off": dict(self.off),
            "features": list(FEATURES),
            "presets": list(PRESETS),
            "limits": dict(self.limits),
        }

    @classmethod
    def from_dict(cls, body: object) -> About:
        """What :meth:`to_dict` gave, on the client's side. What a newer server adds is passed over.

        Raises:
            ServerError: it is none.
        """
        try:
            wire = _Wire.model_validate(body)
            return cls(
                wire.version,
                wire.connector,
                None if wire.model is None else ModelInfo(**_fields(ModelInfo, wire.model)),
                wire.model_error,
                wire.vocabulary,
                None if wire.thinking is None else ThinkingMode(**_fields(ThinkingMode, wire.thinking)),
                {
                    n: Policy(**{k: v for k, v in p.items() if k in Policy.model_fields})
                    for n, p in wire.policies.items()
                },
                wire.heads,
                wire.off,
                wire.limits,
            )
        except (ValidationError, ValueError, TypeError) as error:
            raise ServerError(
                "What the server says of itself can't be read.", hint="Does it run this version of kvroute?"
            ) from error


class _Wire(BaseModel):
    model_config = ConfigDict(extra="ignore")

    version: str
    connector: bool
    model: dict[str, Any] | None = None
    model_error: str | None = None
    vocabulary: str | None = None
    thinking: dict[str, Any] | None = None
    policies: dict[str, dict[str, Any]] = {}
    heads: dict[str, str] = {}
    off: dict[str, str] = {}
    limits: dict[str, int] = {}


def _fields(kind: type[BaseModel], body: dict[str, Any]) -> dict[str, Any]:
    return {k: v for k, v in body.items() if k in kind.model_fields}


# ---------------------------------------------------------------------- on the server


class ServerAbout:
    """Finds out once what a server runs, at the first question, from vLLM's config. Thread-safe."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._found: About | None = None

    def of(self, vllm_config: Any, name: str | None = None) -> About:
        """What it runs. Reads the model's files, so it takes a moment; raises nothing.

        Args:
            vllm_config: vLLM's.
            name: the model as the server calls it.
        """
        with self._lock:
            if self._found is None:
                self._found = about(vllm_config, name)
            return self._found


def about(vllm_config: Any, name: str | None = None) -> About:
    """What a vLLM config serves; see :class:`ServerAbout`."""
    model_config = vllm_config.model_config
    extra = connector_settings(vllm_config)
    if extra is None:
        return About(__version__, connector=False)
    info, why, vocabulary, thinking = None, None, None, None
    catalog, limits = Catalog(), {}
    try:
        info = model_info(vllm_config, name)
    except Exception as error:  # noqa: BLE001 - told to the client
        why = public_text(error)
    try:
        config = ServingConfig.read(extra or None)
        limits = {n: int(getattr(config, n)) for n in ("max_features", "max_vector", "max_ask_bytes")}
        catalog = config.catalog if info is None else config.for_model(info).catalog
        own = getattr(config, "thinking", None)
        thinking = None if own is None else ThinkingMode(**dict(own))
    except Exception as error:  # noqa: BLE001 - the engine would not have started with it
        why = why or public_text(error)
    try:
        from transformers import AutoTokenizer

        from kvroute.token_weights import vocabulary_digest

        tokenizer = AutoTokenizer.from_pretrained(
            model_config.tokenizer,
            revision=model_config.tokenizer_revision,
            trust_remote_code=model_config.trust_remote_code,
        )
        vocabulary = vocabulary_digest(tokenizer)
        if thinking is None:
            stand_in: Any = SimpleNamespace(tokenizer=tokenizer, info=SimpleNamespace(name=name or "the model"))
            thinking = ThinkingMode.of(stand_in)
    except KVRouteError:
        pass  # how it thinks is not known: None
    except Exception as error:  # noqa: BLE001 - told to the client
        why = why or public_text(error)
    off = {**catalog.policies_off, **catalog.heads_off}
    return About(
        __version__,
        connector=True,
        model=info,
        model_error=why,
        vocabulary=vocabulary,
        thinking=thinking,
        policies={n: served.policy for n, served in catalog.policies.items()},
        heads={n: head.target for n, head in catalog.heads.items()},
        off={n: reason.public for n, reason in off.items()},
        limits=limits,
    )


def model_info(vllm_config: Any, name: str | None = None) -> ModelInfo:
    """The model that a vLLM config serves, from its checkpoint; ``context`` is what vLLM takes.

    Raises:
        ModelLoadError, UnsupportedModelError: its files don't tell.
    """
    from kvroute.engines.checkpoint import describe_checkpoint

    model = vllm_config.model_config
    info = describe_checkpoint(model.model, revision=model.revision, name=name)
    dtype = str(model.dtype).removeprefix("torch.")
    # vLLM counts an answer's last token too, which never runs: one prompt token less than elsewhere.
    return info.model_copy(update={"dtype": dtype, "context": min(info.context, int(model.max_model_len) - 1)})


def connector_settings(vllm_config: Any) -> dict[str, Any] | None:
    """The settings of kvroute's connector, alone or among others; None where it is not loaded."""
    transfer = getattr(vllm_config, "kv_transfer_config", None)
    if transfer is None:
        return None
    extra = dict(transfer.kv_connector_extra_config or {})
    if transfer.kv_connector == NAME:
        return extra
    for child in extra.get("connectors") or []:
        if isinstance(child, Mapping) and child.get("kv_connector") == NAME:
            return dict(child.get("kv_connector_extra_config") or {})
    return None
