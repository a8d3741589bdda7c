"""Engines that kvroute reads nothing from: found at the start, and refused there where the settings need features.

vLLM is not imported: its config object is handed over.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Final

from kvroute.errors import InvalidInputError
from kvroute.serving.config import ServingConfig

SPECULATIVE: Final = (
    "kvroute reads no features and decides nothing under speculative decoding: drafted tokens may be taken back."
)
PIPELINE: Final = "kvroute reads no features and decides nothing in a pipeline: a rank has only some of the layers."
_SPECULATIVE_OPTIONS: Final = ("--speculative-config", "-sc", "--spec-method", "--spec-model", "--spec-tokens")
_PIPELINE_OPTIONS: Final = ("--pipeline-parallel-size", "-pp")


def unreadable(vllm_config: Any) -> str | None:
    """Why nothing can be read from an engine, or None.

    Args:
        vllm_config: vLLM's ``VllmConfig``.
    """
    if vllm_config.speculative_config is not None:
        return SPECULATIVE
    return None if vllm_config.parallel_config.pipeline_parallel_size == 1 else PIPELINE


def unreadable_by(options: Sequence[str]) -> str | None:
    """The same, as far as a server's options tell.

    Args:
        options: the words that vLLM gets.
    """
    found = None
    for place, word in enumerate(options):
        name, equals, value = word.partition("=")
        name = name.split(".")[0].replace("_", "-")  # vLLM takes --speculative-config.method and --speculative_config
        if name in _SPECULATIVE_OPTIONS:
            return SPECULATIVE
        if name in _PIPELINE_OPTIONS:
            value = value if equals else "".join(options[place + 1 : place + 2])
            found = None if value.strip() == "1" else PIPELINE
    return found


def require_readable(config: ServingConfig, why: str | None) -> None:
    """Refuse an engine that nothing can be read from, where the settings need that.

    Args:
        config: the settings.
        why: nothing can be read, or None.

    Raises:
        InvalidInputError: there are policies, or a default ask that decides, or the settings are strict.
    """
    if why is not None and (config.strict or config.decides):
        raise InvalidInputError(
            f"{why} Its settings {'serve policies or a mode' if config.decides else 'are strict'}.",
            hint="Start the engine without it; or leave policies, a default ask that decides and 'strict' out of "
            "kvroute's settings, and each answer to an ask says what is off.",
        )
