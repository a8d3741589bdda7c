"""What a router is given, checked before anything runs: heads, targets, and the modes that a call demands."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any, Protocol

from kvroute.choosing import unmet_need
from kvroute.errors import InvalidInputError
from kvroute.route_steering import Request

if TYPE_CHECKING:
    from kvroute.engines.base import Engine
    from kvroute.generation import Prompt
    from kvroute.heads.head import DifficultyHead
    from kvroute.policy import Policy
    from kvroute.router import Router
    from kvroute.serving.vllm_base import VLLMBase


class Answering(Protocol):
    """What another target must offer: an engine or a router."""

    def generate(self, prompts: Any, **kwargs: Any) -> Any:
        """Answer one prompt."""
        ...


def check_parts(
    policy: Policy,
    head: DifficultyHead | None,
    confidence: DifficultyHead | None,
    targets: Mapping[str, Answering],
    engine: Engine | VLLMBase,
    *,
    inside: bool,
) -> None:
    """Refuse what does not go together.

    Args:
        policy: what is done with a difficulty.
        head: gives it.
        confidence: judges answers.
        targets: further models by name.
        engine: runs the model that heads were trained on.
        inside: whether the engine decides by itself, with a head of its own.

    Raises:
        ModelMismatchError: a head was trained on another model.
        InvalidInputError: the policy has no head, a head is of another kind, or a target is missing.
    """
    need = None if inside else unmet_need(policy, head)
    if need is not None:
        raise InvalidInputError(need[0], hint=need[1])
    for given, target in ((head, "difficulty"), (confidence, "correct")):
        if given is not None:
            given.require(engine.info)
            if given.target != target:
                raise InvalidInputError(f"A head with target {given.target!r} was given in place of {target!r}.")
    missing = [t for t in policy.targets if t not in ("fast", "slow") and t not in targets]
    if missing:
        raise InvalidInputError(
            f"The policy names the targets {missing}, which the router was not given.",
            hint="Pass targets={name: ...}.",
        )


def prompt_requests(
    router: Router,
    prompts: Sequence[Prompt],
    mode: str | Sequence[str | None] | None,
    last: str | None,
    template: Mapping[str, Any] | None,
) -> list[Request]:
    """Prompts in tokens, each with the mode that is demanded of it.

    Raises:
        ChatTemplateError, InvalidInputError: a prompt that can't be tokenized, or a mode that there is not.
    """
    modes = [mode] * len(prompts) if mode is None or isinstance(mode, str) else list(mode)
    if len(modes) != len(prompts):
        raise InvalidInputError(f"{len(prompts)} prompts, and {len(modes)} modes.")
    for given in modes:
        if given not in (None, "fast", "slow", *router.targets):
            raise InvalidInputError(f"A mode is one of {['fast', 'slow', *router.targets]}, not {given!r}.")
    layouts = [router.thinking.layout(router.engine, p, template=template) for p in prompts]
    return [Request(layout, forced=m, last=last) for layout, m in zip(layouts, modes, strict=True)]
