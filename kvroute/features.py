"""What a caller may ask an engine for, by name or by spec.

=====================  ====================================================================
``"prompt:<preset>"``  the prompt's pooled vector, e.g. ``"prompt:paper-mteb"``
``"answer:<preset>"``  the answer's pooled vector (its tokens but the last, which has no K and V)
``"kv-coe"``           the four chain scores of the answer
``"logits"``           mean log-probability, entropy and maximum probability of the answer
``"length"``           tokens of the answer
a ``PoolingSpec``      the prompt's pooled vector by that spec
an ``AnswerPooling``   the answer's pooled vector by its spec
=====================  ====================================================================
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Literal

from kvroute.chains import ChainSpec
from kvroute.errors import SpecError
from kvroute.pooling import PRESETS, PoolingSpec

Of = Literal["prompt", "answer"]


@dataclass(frozen=True, slots=True)
class AnswerPooling:
    """Asks for the pooled vector of the answer's tokens but the last; give it under a name of your own."""

    spec: PoolingSpec


FeatureRequest = str | PoolingSpec | AnswerPooling | ChainSpec
Features = FeatureRequest | Sequence[FeatureRequest] | Mapping[str, FeatureRequest] | None


@dataclass(frozen=True)
class FeaturePlan:
    """Features resolved: what a run has to compute.

    Attributes:
        pooled: by the caller's name, of what and how.
        chain: the chains' spec, or None.
        logits: whether the logit scores are asked for.
        length: whether the length score is asked for.
    """

    pooled: dict[str, tuple[Of, PoolingSpec]] = field(default_factory=dict)
    chain: ChainSpec | None = None
    logits: bool = False
    length: bool = False

    @property
    def empty(self) -> bool:
        """Nothing asked for."""
        return not (self.pooled or self.chain or self.logits or self.length)


def named_features(features: Features) -> dict[str, FeatureRequest]:
    """What was asked for, by its names.

    Raises:
        SpecError: two have the same name, or neither names nor specs.
    """
    if features is None:
        return {}
    if isinstance(features, str | PoolingSpec | AnswerPooling | ChainSpec):
        features = [features]
    if isinstance(features, Mapping):
        return dict(features)
    if not isinstance(features, Sequence):
        raise SpecError(f"features are names and specs, not {type(features).__name__}.", hint=_HINT)
    named: dict[str, FeatureRequest] = {}
    for feature in features:
        name = _name(feature)
        if name in named and not (isinstance(feature, str | ChainSpec) and named[name] == feature):
            raise SpecError(f"Two features are named {name!r}.", hint="Give them as a dict with names of your own.")
        named[name] = feature
    return named


def plan_features(features: Features) -> FeaturePlan:
    """Resolve what was asked for.

    Raises:
        SpecError: an unknown name; the message lists what there is.
    """
    pooled: dict[str, tuple[Of, PoolingSpec]] = {}
    chain: ChainSpec | None = None
    logits = length = False
    for name, feature in named_features(features).items():
        if isinstance(feature, PoolingSpec):
            pooled[name] = ("prompt", feature)
        elif isinstance(feature, AnswerPooling):
            pooled[name] = ("answer", feature.spec)
        elif isinstance(feature, ChainSpec) or feature == "kv-coe":
            asked = feature if isinstance(feature, ChainSpec) else ChainSpec()
            if chain is not None and chain != asked:
                raise SpecError("The chain scores were asked for by two different specs.", hint="Ask for one of them.")
            chain = asked
        elif feature == "logits":
            logits = True
        elif feature == "length":
            length = True
        elif isinstance(feature, str) and feature.startswith(("prompt:", "answer:")):
            of, _, preset = feature.partition(":")
            if preset not in PRESETS:
                raise SpecError(f"No preset is named {preset!r}.", hint=f"There are: {', '.join(PRESETS)}.")
            pooled[name] = ("answer" if of == "answer" else "prompt", PRESETS[preset])
        else:
            raise SpecError(f"No feature is named {feature!r}.", hint=_HINT)
    return FeaturePlan(pooled, chain, logits, length)


_HINT = (
    "Ask for 'kv-coe', 'logits', 'length', 'prompt:<preset>', 'answer:<preset>', a PoolingSpec, an AnswerPooling or a "
    "ChainSpec; or a dict of them under names of your own."
)


def _name(feature: object) -> str:
    if isinstance(feature, str):
        return feature
    if isinstance(feature, PoolingSpec):
        return "prompt"
    if isinstance(feature, AnswerPooling):
        return "answer"
    if isinstance(feature, ChainSpec):
        return "kv-coe"
    raise SpecError(f"features are names and specs, not {type(feature).__name__}.", hint=_HINT)
