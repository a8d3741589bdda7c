"""The command that starts a vLLM server with kvroute in it."""

from __future__ import annotations

import importlib.metadata
import importlib.util
import json
import shlex
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Final

from kvroute.errors import InvalidInputError, MissingExtraError
from kvroute.serving.config import ServingConfig
from kvroute.serving.plugin import NAME
from kvroute.serving.unreadable import require_readable, unreadable_by

MIDDLEWARE: Final = (
    "kvroute.serving.endpoints.KVRouteEndpoints",
    "kvroute.serving.middleware.KVRouteMiddleware",  # the last one is outermost: it sees every answer
)
_FORCING: Final = "kvroute.serving.logits_processor:ForcedTokens"
_ASYNC: Final = ("--async-scheduling", "--no-async-scheduling")
_DETAILS: Final = ("--enable-prompt-tokens-details", "--no-enable-prompt-tokens-details")
_OURS: Final = ("--kv-transfer-config", "--kv_transfer_config")


def server_command(
    model: str,
    *,
    policies: Path | None = None,
    heads: Path | None = None,
    settings: Mapping[str, Any] | None = None,
    name: str | None = None,
    host: str = "127.0.0.1",
    port: int = 8000,
    options: Sequence[str] = (),
    python: str = sys.executable,
) -> list[str]:
    """The words of the command, checked as far as they can be without starting it.

    Args:
        model: hub id, local folder, or the name of a model kvroute brings.
        policies: folder of policies; a policy's file stands for its folder.
        heads: folder of heads that tell a confidence.
        settings: more of :class:`~kvroute.serving.config.ServingConfig`.
        name: that clients know the model by; by default ``model``.
        host: address to listen at.
        port: port to listen at.
        options: handed to vLLM as they are.
        python: that runs it.

    Raises:
        InvalidInputError: a folder is not there, a setting makes no sense, an option is ours to give, or policies are
            to be served by an engine that nothing can be read from.
    """
    from kvroute.models import BUNDLED, bundled_path

    clash = next((o for o in options if o.split("=")[0] in _OURS), None)
    if clash is not None:
        raise InvalidInputError(
            f"{clash.split('=')[0]} is given by kvroute serve.",
            hint="For other connectors beside kvroute's, take the command of --dry-run and write a MultiConnector.",
        )
    extra = dict(settings or {})
    if policies is not None:
        folder = policies.parent if policies.suffix == ".json" and policies.is_file() else policies
        extra["policies"] = str(folder.resolve())
    if heads is not None:
        extra["heads"] = str(heads.resolve())
    config = ServingConfig.read(extra or None)
    unread = unreadable_by(options)
    require_readable(config, unread)
    transfer: dict[str, Any] = {"kv_connector": NAME, "kv_role": "kv_producer"}
    command = [python, "-m", "vllm.entrypoints.openai.api_server"]
    command += ["--model", str(bundled_path(model)) if model in BUNDLED else model]
    command += ["--served-model-name", model if name is None else name, "--host", host, "--port", str(port)]
    for middleware in MIDDLEWARE:
        command += ["--middleware", middleware]
    if not importlib.metadata.entry_points(group="vllm.general_plugins", name="kvroute"):
        # kvroute lies on the path and is not installed, so vLLM does not find its parts by itself.
        transfer["kv_connector_module_path"] = "kvroute.serving.connector"
        if unread is None:  # under speculative decoding vLLM does not start with any
            command += ["--logits-processors", _FORCING]
    if not any(o in _DETAILS for o in options):
        command.append(_DETAILS[0])  # else usage says nothing of tokens that came from the prefix cache
    if looks_twice(config) and not any(o.split("=")[0] in _ASYNC for o in options):
        command.append("--no-async-scheduling")
    if extra:
        transfer["kv_connector_extra_config"] = extra
    return [*command, "--kv-transfer-config", json.dumps(transfer), *options]


def looks_twice(config: ServingConfig) -> bool:
    """Whether a policy looks at tokens in mid-answer, which an engine that schedules ahead of them has not yet."""
    return any(served.policy.kind == "two-step" for served in config.catalog.policies.values())


def shown(command: Sequence[str]) -> str:
    """The command as a shell takes it, an option a line."""
    lines = [shlex.quote(command[0])]
    for word in command[1:]:
        quoted = shlex.quote(word)
        if word.startswith("--"):
            lines.append(quoted)
        else:
            lines[-1] += f" {quoted}"
    return " \\\n  ".join(lines)


def require_vllm() -> None:
    """Refuse a Python without vLLM.

    Raises:
        MissingExtraError: it is not installed.
    """
    if importlib.util.find_spec("vllm") is None:
        raise MissingExtraError("vllm", "vllm")
