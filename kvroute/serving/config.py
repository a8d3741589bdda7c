"""A server's settings, as vLLM hands them over in ``kv_connector_extra_config``."""

from __future__ import annotations

import logging
from pathlib import Path
from typing import TYPE_CHECKING, Any, Self

from pydantic import Field, PrivateAttr, StrictBool

from kvroute.errors import AskError, InvalidInputError
from kvroute.pooling import Spec
from kvroute.serving.asks import Ask, read_ask
from kvroute.serving.catalog import Catalog, shown, suggestion
from kvroute.thinking import ThinkingMode

if TYPE_CHECKING:
    from kvroute.info import ModelInfo

_log = logging.getLogger(__name__)


class ServingConfig(Spec):
    """Which heads and policies are served, what requests that ask nothing get, and how much one may ask.

    Making one reads the folders, once. What can't be used is off and logged. Not even a client's name ever becomes a
    path.

    Raises:
        InvalidInputError: a setting makes no sense, a folder is not there, the default ask is none; with ``strict``
            also a head or policy that can't be used.
    """

    policies: Path | None = None
    """Folder of policies: ``NAME.json`` or ``NAME/policy.json``, each beside the head and the drift reference it
    names, as ``kvroute calibrate`` writes them."""
    heads: Path | None = None
    """Folder of heads that requests name for their confidence: ``NAME/head.json``, as ``kvroute train`` writes them."""
    default: dict[str, Any] = Field(default_factory=dict)
    """The ask of requests that have none; empty for none. A request's ``{"kvroute": {}}`` asks nothing."""
    thinking: ThinkingMode | None = None
    """How the model thinks, where its chat template does not say: a :class:`~kvroute.ThinkingMode` in JSON."""
    strict: StrictBool = False
    """Don't start when a head or policy can't be used."""
    max_features: int = Field(default=8, ge=1, le=64, strict=True)
    """Features one request may ask for."""
    max_vector: int = Field(default=65536, ge=1, strict=True)
    """Numbers one feature may have."""
    max_ask_bytes: int = Field(default=16384, ge=64, le=1 << 20, strict=True)
    """Size of an ask, as JSON."""
    faults_before_off: int = Field(default=20, ge=1, strict=True)
    """Faults one after the other, at which features are turned off."""

    _catalog: Catalog = PrivateAttr(default_factory=Catalog)
    _info: ModelInfo | None = PrivateAttr(default=None)
    _default_ask: Ask | None = PrivateAttr(default=None)

    def __init__(self, **data: Any) -> None:
        super().__init__(**data)
        self._take(Catalog.load(self.policies, self.heads))

    @classmethod
    def read(cls, extra: object) -> Self:
        """From ``kv_connector_extra_config``; None is an empty one.

        Raises:
            InvalidInputError: as the class; an unknown setting is refused and the likely one named.
        """
        if extra is None:
            return cls()
        if not isinstance(extra, dict):
            raise InvalidInputError(f"kv_connector_extra_config is a dict of settings, not a {type(extra).__name__}.")
        for key in extra:
            if key not in cls.model_fields:
                raise InvalidInputError(
                    f"kvroute has no setting {shown(key)}.", hint=suggestion(str(key), cls.model_fields, none="")
                )
        return cls(**extra)

    def for_model(self, info: ModelInfo, *, fingerprints: bool = True) -> Self:
        """The same for a model: heads of another one are off, and asks are checked against its sizes. Reads no file.

        Args:
            info: the model that is served.
            fingerprints: False where only its sizes are known, not its weights.

        Raises:
            InvalidInputError: as the class.
        """
        bound = self.model_copy()
        bound._info = info
        bound._take(self._catalog.for_model(info, fingerprints=fingerprints), known=self._catalog)
        return bound

    @property
    def catalog(self) -> Catalog:
        """Heads and policies by name."""
        return self._catalog

    @property
    def info(self) -> ModelInfo | None:
        """The model, as soon as it is known."""
        return self._info

    @property
    def decides(self) -> bool:
        """Whether requests are to be decided: policies are served, or a default ask names a policy or mode."""
        return self.policies is not None or any(self.default.get(name) is not None for name in ("policy", "mode"))

    @property
    def default_ask(self) -> Ask | None:
        """What requests get that ask nothing.

        Raises:
            AskError: what it names is off.
        """
        if self._default_ask is None and self.default:
            return read_ask({"kvroute": self.default}, self)
        return self._default_ask

    def _take(self, catalog: Catalog, known: Catalog | None = None) -> None:
        self._catalog = catalog
        off = [line for line in catalog.off if known is None or line not in known.off]
        if self.strict and off:
            raise InvalidInputError(" ".join(off), hint="Mend or remove it, or set strict to false.")
        for line in off:
            _log.warning("%s", line)
        self._default_ask = None
        try:
            self._default_ask = read_ask({"kvroute": self.default}, self) if self.default else None
        except AskError as error:
            if (
                self.default.get("policy") in catalog.policies_off
                or self.default.get("confidence") in catalog.heads_off
            ):
                return  # logged above; the requests say so
            raise InvalidInputError(f"The default ask can't be done: {error.message}", hint=error.hint) from error
