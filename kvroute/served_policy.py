"""The policy and the thinking tokens of an engine that decides by itself, as a router over it is given them."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

from kvroute.errors import InvalidInputError, UnsupportedModelError
from kvroute.policy import Policy
from kvroute.thinking import Mode, ThinkingMode

if TYPE_CHECKING:
    from kvroute.serving.vllm_base import VLLMBase

MODES: Final[tuple[Mode, ...]] = ("fast", "slow")
"""Policies that every engine has."""
_NOT_HERE: Final = {"head": None, "drift": None, "guarantee": None}
"""What of a policy a server does not tell, and an engine in this process does."""


@dataclass(frozen=True, slots=True)
class EnginePolicy:
    """A policy of the engine's.

    Attributes:
        policy: what it is, as far as the engine tells.
        name: by which the engine knows it; None for a fixed mode, which needs none.
    """

    policy: Policy
    name: str | None = None

    @classmethod
    def of(cls, engine: VLLMBase, policy: Policy | str | Path) -> EnginePolicy:
        """What a router was given.

        Args:
            engine: where it is to be loaded.
            policy: ``fast`` or ``slow``, a name of the engine's, or a policy (or its file) that the engine has too.

        Raises:
            InvalidInputError: the engine has no such policy; with those that it has.
        """
        if isinstance(policy, str) and policy in MODES:
            return cls(Policy(kind=policy))
        there = engine.about.policies
        if isinstance(policy, str) and policy in there:
            return cls(there[policy], policy)
        given = policy
        if not isinstance(policy, Policy):
            path = Path(policy)
            if path.suffix != ".json" or not path.is_file():
                off = engine.about.off.get(str(policy))
                raise InvalidInputError(
                    f"The engine has no policy {str(policy)!r}." if off is None else f"{str(policy)!r} is off: {off}.",
                    hint=_listed(there),
                )
            policy = Policy.load(path)
        if policy.kind in MODES and not policy.shadow:
            return cls(policy)
        plain = policy.model_copy(update=_NOT_HERE)
        same = [name for name, other in there.items() if other.model_copy(update=_NOT_HERE) == plain]
        if not same:
            raise InvalidInputError(
                f"{'This policy' if isinstance(given, Policy) else given} is not loaded in the engine, which decides "
                "by itself.",
                hint=f"Start it with the policy's folder (`kvroute serve MODEL --policy DIR`). {_listed(there)}",
            )
        stem = "" if isinstance(given, Policy) else Path(given).stem
        return cls(there[stem if stem in same else same[0]], stem if stem in same else same[0])


def _listed(there: Any) -> str:
    return f"It has: {', '.join(sorted({*MODES, *there}))}."


def served_thinking(engine: VLLMBase, given: ThinkingMode | None, served: EnginePolicy) -> ThinkingMode:
    """How the engine's model thinks.

    Raises:
        InvalidInputError: the engine thinks otherwise than was given.
        UnsupportedModelError: how it thinks is not known, or is said where the engine can't decide.
    """
    own = engine.about.thinking
    found = given or own or ThinkingMode.of(engine)
    if served.name is not None:
        if found.in_question:
            raise UnsupportedModelError(
                "How hard this model thinks is said in the question, which is whole when the engine gets it, so no "
                "policy can decide it there.",
                hint="Demand 'fast' or 'slow', or use TransformersEngine.",
            )
        if own is not None and given is not None and given.model_copy(update={"name": own.name}) != own:
            raise InvalidInputError(
                "The engine's model thinks by other tokens than the ThinkingMode that was given.",
                hint="Give it to the engine: its setting 'thinking'.",
            )
    return found


def refuse(**given: object) -> None:
    """Say that something can't be used where the engine decides.

    Raises:
        InvalidInputError: something was given.
    """
    for name, value in given.items():
        if value:
            raise InvalidInputError(
                f"{name}= was given, and vLLM decides with what it has loaded.",
                hint=f"Leave {name}= out, or use TransformersEngine.",
            )
