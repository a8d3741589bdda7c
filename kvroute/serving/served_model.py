"""The model that a vLLM server serves, as far as kvroute needs it: tokenizer, thinking tokens, sizes, fingerprint.

Everything is read at its first use. vLLM is not imported: its config object is handed over.
"""

from __future__ import annotations

import logging
from functools import cached_property
from typing import TYPE_CHECKING, Any

from kvroute.errors import KVRouteError
from kvroute.info import LayerInfo, ModelInfo
from kvroute.pooling import PRESETS
from kvroute.serving.messages import Array
from kvroute.serving.thinking_tokens import ThinkingTokens
from kvroute.serving.vllm_facts import layer_sizes
from kvroute.token_weights import FrequencyTable

if TYPE_CHECKING:
    from kvroute.serving.config import ServingConfig

_log = logging.getLogger(__name__)


class ServedModel:
    """What is served.

    Args:
        vllm_config: vLLM's ``VllmConfig``.
        kv_cache_config: vLLM's ``KVCacheConfig``.
    """

    def __init__(self, vllm_config: Any, kv_cache_config: Any) -> None:
        self._config = vllm_config
        self._cache = kv_cache_config
        self._tables: dict[float, Array] = {}

    @cached_property
    def tokenizer(self) -> Any:
        """The model's tokenizer."""
        from transformers import AutoTokenizer

        model = self._config.model_config
        return AutoTokenizer.from_pretrained(
            model.tokenizer, revision=model.tokenizer_revision, trust_remote_code=model.trust_remote_code
        )

    @cached_property
    def _frequencies(self) -> FrequencyTable:
        return FrequencyTable.from_vocabulary(self.tokenizer)

    def sif(self, a: float) -> Array:
        """SIF weight of every token ``[vocab]`` float32."""
        if a not in self._tables:
            self._tables[a] = self._frequencies.weights(a)
        return self._tables[a]

    def prepare(self) -> None:
        """Load the tokenizer and make the tables of the presets' SIF weights: half a second that the first request
        would cost every one that is running. Raises nothing: what can't be had is told to the requests that need it.
        """
        try:
            for spec in PRESETS.values():
                if spec.weights == "sif":
                    self.sif(spec.sif_a)
        except Exception as error:  # noqa: BLE001 - a tokenizer of the user's own may raise anything
            _log.info("No frequencies of tokens can be had: %s", error)

    def thinking(self, config: ServingConfig) -> ThinkingTokens:
        """How it thinks, in tokens.

        Raises:
            UnsupportedModelError: that is not known.
        """
        return ThinkingTokens.of(self.tokenizer, config.thinking, str(self._config.model_config.model))

    def bind(self, config: ServingConfig) -> ServingConfig:
        """The config for this model: heads and policies of another one are off.

        Where the checkpoint's own files can't be read, only sizes are compared.

        Raises:
            InvalidInputError: as :class:`~kvroute.serving.config.ServingConfig`.
        """
        from kvroute.engines.checkpoint import describe_checkpoint

        if config.policies is None and config.heads is None:  # no weights to compare; sizes limit what may be asked
            return config.for_model(self._sizes(), fingerprints=False)
        model = self._config.model_config
        try:
            return config.for_model(describe_checkpoint(model.model, revision=model.revision))
        except KVRouteError as error:
            if config.strict:
                raise
            _log.info("The model's fingerprint can't be had, so heads are compared by their sizes: %s", error)
        return config.for_model(self._sizes(), fingerprints=False)

    def _sizes(self) -> ModelInfo:
        """Of the running model; its fingerprint means nothing."""
        model = self._config.model_config
        text = model.hf_text_config
        return ModelInfo(
            name=str(model.model),
            revision=model.revision,
            architecture=str(model.architectures[0]),
            hidden_size=int(text.hidden_size),
            vocab_size=int(text.vocab_size),
            context=int(model.max_model_len),
            layers=tuple(
                LayerInfo(model_layer=number, kv_heads=heads, key_size=key, value_size=value)
                for number, heads, key, value in layer_sizes(self._config, self._cache)
            ),
            model_layers=int(model.get_total_num_hidden_layers()),
            rope="{}",
            weights_digest="",
            dtype=str(model.dtype).removeprefix("torch."),
        )
