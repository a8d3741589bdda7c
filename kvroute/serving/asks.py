"""What a request asks of kvroute: ``kv_transfer_params["kvroute"]``, which anybody who reaches the server can write.

    {"features": ["prompt:paper-mteb", "kv-coe"], "policy": "support", "confidence": "right", "shadow": true}
    {"features": {"mine": {"of": "answer", "layers": "last:2", "part": "v"}}, "mode": "fast"}

It becomes an :class:`Ask`, or an :class:`~kvroute.errors.AskError` that says what was wrong. No file is touched.
"""

from __future__ import annotations

import math
import re
from functools import cached_property
from typing import TYPE_CHECKING, Any, Final, Literal, Self

from pydantic import Field, StrictBool

from kvroute.errors import AskError, SpecError
from kvroute.features import AnswerPooling, FeaturePlan, FeatureRequest, Of, plan_features
from kvroute.pooling import PRESETS, PoolingSpec, Spec
from kvroute.serving.catalog import shown, suggestion
from kvroute.thinking import Mode

if TYPE_CHECKING:
    from kvroute.serving.config import ServingConfig

KEY: Final = "kvroute"
"""Our key in ``kv_transfer_params``; those of other connectors are not looked at."""
FEATURES: Final = ("kv-coe", "length", *(f"{of}:{preset}" for of in ("prompt", "answer") for preset in PRESETS))
"""Features by name. ``logits`` is none of them: a server gives log-probabilities itself."""

CONFIDENCE: Final = "/confidence"
"""Name of the vector that a confidence is read from; no feature of a request's can have it."""

_DEPTH: Final = 4  # ask, features, spec, layers
_TEXT: Final = 64
"""Characters a text in an ask may have: all are names."""
_WHOLE: Final = 2**53
"""Whole numbers stay below it, as JSON's do."""
_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._:-]*")
_SIF = {PoolingSpec().sif_a, *(spec.sif_a for spec in PRESETS.values())}
_FORM = f"It looks like {{'{KEY}': {{'features': ['prompt:paper-mteb', 'kv-coe'], 'policy': 'name'}}}}."


class PooledFeature(PoolingSpec):
    """A pooled vector by a spec of the request's own."""

    of: Literal["prompt", "answer"] = "prompt"
    """Which tokens; of an answer all but the last, which has no keys and values."""

    @property
    def request(self) -> PoolingSpec | AnswerPooling:
        """As an engine takes it."""
        spec = PoolingSpec(**self.model_dump(exclude={"of"}))
        return spec if self.of == "prompt" else AnswerPooling(spec)


class Ask(Spec):
    """What one request wants."""

    features: dict[str, str | PooledFeature] = Field(default_factory=dict)
    """By the request's name for it, one of :data:`FEATURES` or a spec."""
    policy: str | None = None
    """Name of the policy that decides how to think."""
    mode: Mode | None = None
    """Demanded; then nothing is decided."""
    shadow: StrictBool = False
    """Decide, say so, and change nothing."""
    confidence: str | None = None
    """Name of the head that says how likely the answer is right."""
    answer_from: int | None = Field(default=None, ge=1, strict=True)
    """The prompt holds an answer that exists already, all of it but its last token, from this token on: what is read of
    an answer is read there, and what is read of the prompt, before it."""

    @cached_property
    def plan(self) -> FeaturePlan:
        """The features resolved."""
        asked: dict[str, FeatureRequest] = {
            name: feature.request if isinstance(feature, PooledFeature) else feature
            for name, feature in self.features.items()
        }
        return plan_features(asked)

    @property
    def empty(self) -> bool:
        """Nothing is asked."""
        return not self.features and self.policy is None and self.mode is None and self.confidence is None

    def to_dict(self) -> dict[str, Any]:
        """JSON-able and small, for the way to the workers."""
        return self.model_dump(mode="json", exclude_defaults=True)

    @classmethod
    def from_dict(cls, body: dict[str, Any]) -> Self:
        """What :meth:`to_dict` gave."""
        return cls.model_validate(body)


def vectors_of(ask: Ask, config: ServingConfig) -> dict[str, tuple[Of, PoolingSpec]]:
    """The pooled vectors that an ask needs, by name: its features and, under :data:`CONFIDENCE`, its head's.

    Raises:
        AskError: the head is off.
    """
    vectors = dict(ask.plan.pooled)
    if ask.confidence is not None:
        vectors[CONFIDENCE] = ("answer", config.catalog.head(ask.confidence).spec)
    return vectors


def read_ask(kv_transfer_params: object, config: ServingConfig) -> Ask | None:
    """What a request asks of kvroute.

    Takes time that grows with ``config.max_ask_bytes``, whatever the size of what was sent.

    Args:
        kv_transfer_params: the request's, of any type.
        config: the server's limits, names and default ask.

    Returns:
        the ask; None where nothing is asked.

    Raises:
        AskError: anything that is no ask of this server's; it repeats at most 200 characters of it.
    """
    if kv_transfer_params is None:
        return config.default_ask
    if not isinstance(kv_transfer_params, dict):
        raise AskError(f"kv_transfer_params is an object, not {shown(kv_transfer_params)}.", hint=_FORM)
    asked = kv_transfer_params.get(KEY)
    if asked is None:
        return config.default_ask
    _check_size(asked, config.max_ask_bytes)
    if not isinstance(asked, dict):
        raise AskError(f"'{KEY}' in kv_transfer_params is an object, not {shown(asked)}.", hint=_FORM)
    for key in asked:
        if key not in Ask.model_fields:
            raise AskError(f"An ask has no field {shown(key)}.", hint=suggestion(key, Ask.model_fields, none=""))
    try:
        ask = Ask(**{**asked, "features": _features(asked.get("features"), config)})
        plan = ask.plan
    except SpecError as error:
        text = re.sub(r"^Not a (Ask|PooledFeature)", "The ask is wrong", error.message)
        raise AskError(_cut(text), hint=error.hint or _FORM) from error
    for name, (_, spec) in plan.pooled.items():
        _check_spec(name, spec, config)
    _check_decision(ask, config)
    return None if ask.empty else ask


def _check_decision(ask: Ask, config: ServingConfig) -> None:
    if ask.policy is not None:
        config.catalog.policy(ask.policy)
    if ask.confidence is not None and config.catalog.head(ask.confidence).target != "correct":
        raise AskError(
            f"The head {ask.confidence!r} reads a difficulty, not whether an answer is right.",
            hint="It belongs to a policy: name that one.",
        )
    if ask.answer_from is not None and (ask.policy is not None or ask.mode is not None):
        raise AskError("An answer that exists needs no decision.", hint="Drop 'policy' and 'mode', or 'answer_from'.")
    if ask.shadow and ask.policy is None:
        raise AskError("A shadow is of a policy's decision, and no policy is named.", hint="Add 'policy': 'name'.")
    if ask.shadow and ask.mode is not None:
        raise AskError("A demanded mode leaves nothing to decide in shadow.", hint="Drop 'mode' or 'shadow'.")


def _features(asked: object, config: ServingConfig) -> dict[str, str | PooledFeature]:
    if asked is None:
        return {}
    if not isinstance(asked, list | tuple | dict):
        raise AskError(f"'features' is a list of names or an object, not {shown(asked)}.", hint=_FORM)
    if len(asked) > config.max_features:
        raise AskError(f"{len(asked)} features are asked for.", hint=f"Ask for at most {config.max_features}.")
    if isinstance(asked, dict):
        return {_feature_name(name): _feature(feature, own=True) for name, feature in asked.items()}
    found = [_feature(feature, own=False) for feature in asked]
    return {feature: feature for feature in found if isinstance(feature, str)}


def _feature_name(name: str) -> str:
    if not _NAME.fullmatch(name):
        raise AskError(f"{shown(name)} is no name for a feature.", hint="Letters, digits, '.', ':', '-' and '_'.")
    return name


def _feature(asked: object, *, own: bool) -> str | PooledFeature:
    if isinstance(asked, str):
        if asked == "logits":
            raise AskError("A server reads no logits for kvroute.", hint="Ask the server itself for 'logprobs'.")
        if asked not in FEATURES:
            raise AskError(f"No feature is named {shown(asked)}.", hint=suggestion(asked, FEATURES, none=""))
        return asked
    if not own or not isinstance(asked, dict):
        raise AskError(
            f"A feature is a name, not {shown(asked)}.",
            hint="A spec has a name of your own: {'features': {'mine': {'of': 'prompt', 'layers': 'last:4'}}}.",
        )
    unknown = next((key for key in asked if key not in PooledFeature.model_fields), None)
    if unknown is not None:
        hint = suggestion(unknown, PooledFeature.model_fields, none="")
        raise AskError(f"A feature's spec has no field {shown(unknown)}.", hint=hint)
    return PooledFeature(**asked)


def _check_spec(name: str, spec: PoolingSpec, config: ServingConfig) -> None:
    if spec.weights == "sif" and spec.sif_a not in _SIF:
        # Each value is a table as long as the vocabulary: what clients may choose freely would fill the memory.
        listed = ", ".join(map(str, sorted(_SIF)))
        raise AskError(f"{shown(name)} asks for a sif_a that is not served.", hint=f"Served are: {listed}.")
    if config.info is None:
        return
    try:
        layers = spec.resolve(config.info.num_layers)
    except SpecError as error:
        raise AskError(_cut(error.message), hint=error.hint) from error
    try:
        size = spec.dimension(config.info)
    except SpecError as error:
        raise AskError(
            f"The {len(layers)} layers of {shown(name)} differ in heads or head size.", hint="Choose layers alike."
        ) from error
    if size > config.max_vector:
        raise AskError(
            f"{shown(name)} would have {size} numbers, and the limit is {config.max_vector}.",
            hint="Ask for fewer layers, or for their mean or that of the heads.",
        )


def _check_size(asked: object, limit: int) -> None:
    """Refuse what is too large, too deep or no JSON, before anything else looks at it."""
    left = limit
    waiting: list[tuple[object, int]] = [(asked, 0)]
    while waiting:
        value, depth = waiting.pop()
        kind = type(value)
        if isinstance(value, str):
            if len(value) > _TEXT:
                raise AskError(f"A text of {len(value)} characters is in the ask.", hint=f"At most {_TEXT} are taken.")
            left -= len(value) + 3
        elif isinstance(value, dict | list | tuple) and kind in (dict, list, tuple):
            if depth == _DEPTH:
                raise AskError(f"The ask is nested deeper than {_DEPTH}.", hint=_FORM)
            left -= len(value) + 2
            if left >= 0:
                waiting += [(item, depth + 1) for item in value]
                if isinstance(value, dict):
                    if not all(type(key) is str for key in value):
                        raise AskError("The ask has a key that is no text.", hint=_FORM)
                    waiting += [(item, depth + 1) for item in value.values()]
        elif kind is float:
            if not math.isfinite(value):  # type: ignore[arg-type]
                raise AskError("The ask holds a number that is not finite.", hint="NaN and infinity are not taken.")
            left -= 20
        elif kind is int:
            if not -_WHOLE < value < _WHOLE:  # type: ignore[operator]
                raise AskError("The ask holds a whole number beyond 2^53.", hint="Such a number means nothing here.")
            left -= 8
        elif kind is bool or value is None:
            left -= 5
        else:
            raise AskError(f"The ask holds {shown(value)}, which is not JSON.", hint=_FORM)
        if left < 0:
            raise AskError(f"The ask is larger than {limit} bytes.", hint="Ask for less at a time.")


def _cut(text: str) -> str:
    """An error text that may repeat the input, made safe to send."""
    safe = text.encode("ascii", "backslashreplace").decode()
    return safe if len(safe) <= 200 else f"{safe[:196]}..."
