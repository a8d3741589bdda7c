"""Tiny random models of every architecture that kvroute is shown for, and a tokenizer, all built in code."""

from __future__ import annotations

import copy
from collections.abc import Callable
from functools import cache
from typing import Any

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast

CHAT_TEMPLATE = (
    "{% for message in messages %}{{ '<|im_start|>' + message['role'] + '\n' + message['content'] + '<|im_end|>\n' }}"
    "{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
SPECIAL = ["<|pad|>", "<|bos|>", "<|im_start|>", "<|im_end|>"]
PAD, BOS, OPEN, EOS = range(4)

_CORPUS = [
    "the quick brown fox jumps over the lazy dog and the cat sat on the mat",
    "a language model keeps the keys and values of every token it has read",
    "question and answer, question and answer: what is the capital of the country?",
]


@cache
def _trained_tokenizer() -> str:
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=320,
        special_tokens=SPECIAL,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(_CORPUS * 20, trainer)
    return tokenizer.to_str()


def build_tokenizer() -> PreTrainedTokenizerFast:
    """A byte-level BPE of 320 tokens (so any unicode goes in and comes out), with a ChatML template."""
    return PreTrainedTokenizerFast(
        tokenizer_object=Tokenizer.from_str(_trained_tokenizer()),
        pad_token=SPECIAL[PAD],
        bos_token=SPECIAL[BOS],
        eos_token=SPECIAL[EOS],
        additional_special_tokens=[SPECIAL[OPEN]],
        chat_template=CHAT_TEMPLATE,
        clean_up_tokenization_spaces=False,
    )


VOCAB = 320
_COMMON: dict[str, Any] = {
    "vocab_size": VOCAB,
    "max_position_embeddings": 4096,
    "initializer_range": 0.15,
    "pad_token_id": PAD,
    "bos_token_id": BOS,
    "eos_token_id": EOS,
    "tie_word_embeddings": False,
}


def _llama() -> tuple[str, dict[str, Any]]:  # grouped query attention, odd KV heads
    return "Llama", {"hidden_size": 60, "intermediate_size": 84, "num_hidden_layers": 5} | {
        "num_attention_heads": 6,
        "num_key_value_heads": 3,
    }


def _qwen2() -> tuple[str, dict[str, Any]]:  # biases on q, k, v; a single KV head
    return "Qwen2", {"hidden_size": 56, "intermediate_size": 72, "num_hidden_layers": 4} | {
        "num_attention_heads": 7,
        "num_key_value_heads": 1,
    }


def _qwen3() -> tuple[str, dict[str, Any]]:  # norms on q and k; heads wider than hidden / heads
    return "Qwen3", {"hidden_size": 40, "intermediate_size": 64, "num_hidden_layers": 4} | {
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "head_dim": 18,
    }


def _mistral() -> tuple[str, dict[str, Any]]:  # every layer slides
    return "Mistral", {"hidden_size": 48, "intermediate_size": 64, "num_hidden_layers": 4} | {
        "num_attention_heads": 6,
        "num_key_value_heads": 3,
        "sliding_window": 7,
    }


def _gemma3() -> tuple[str, dict[str, Any]]:  # sliding and full layers, two RoPE bases
    return "Gemma3Text", {"hidden_size": 48, "intermediate_size": 64, "num_hidden_layers": 5} | {
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "head_dim": 14,
        "sliding_window": 5,
        "query_pre_attn_scalar": 14,
        "layer_types": [f"{kind}_attention" for kind in ("sliding", "full", "sliding", "sliding", "full")],
    }


def _phi3() -> tuple[str, dict[str, Any]]:  # fused q, k, v
    return "Phi3", {"hidden_size": 48, "intermediate_size": 64, "num_hidden_layers": 4} | {
        "num_attention_heads": 6,
        "num_key_value_heads": 2,
        "original_max_position_embeddings": 4096,
    }


def _gpt_neox() -> tuple[str, dict[str, Any]]:  # no grouping, partial rotary, parallel residual, biases
    return "GPTNeoX", {"hidden_size": 40, "intermediate_size": 72, "num_hidden_layers": 4} | {
        "num_attention_heads": 5,
        "rotary_pct": 0.5,
    }


def _qwen3_next() -> tuple[str, dict[str, Any]]:  # three linear-attention layers to one with K and V
    return "Qwen3Next", {"hidden_size": 48, "intermediate_size": 64, "num_hidden_layers": 4} | {
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "head_dim": 16,
        "linear_num_key_heads": 2,
        "linear_num_value_heads": 4,
        "linear_key_head_dim": 8,
        "linear_value_head_dim": 8,
        "num_experts": 2,
        "num_experts_per_tok": 1,
        "moe_intermediate_size": 32,
        "shared_expert_intermediate_size": 32,
        "layer_types": ["linear_attention", "full_attention", "linear_attention", "full_attention"],
    }


def _lfm2() -> tuple[str, dict[str, Any]]:  # short convolutions and attention
    return "Lfm2", {"hidden_size": 48, "intermediate_size": 64, "num_hidden_layers": 4} | {
        "num_attention_heads": 6,
        "num_key_value_heads": 3,
        "layer_types": ["conv", "full_attention", "conv", "full_attention"],
    }


def _jamba() -> tuple[str, dict[str, Any]]:  # Mamba and attention, no RoPE
    return "Jamba", {"hidden_size": 48, "intermediate_size": 64, "num_hidden_layers": 4} | {
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "attn_layer_period": 2,
        "attn_layer_offset": 1,
        "expert_layer_period": 2,
        "expert_layer_offset": 1,
        "num_experts": 2,
        "mamba_d_state": 8,
        "mamba_dt_rank": 4,
    }


def _mamba() -> tuple[str, dict[str, Any]]:  # no keys and values at all
    return "Mamba", {"hidden_size": 32, "num_hidden_layers": 2, "state_size": 8, "intermediate_size": 64}


def _falcon_h1() -> tuple[str, dict[str, Any]]:  # attention and Mamba side by side in one layer
    return "FalconH1", {"hidden_size": 48, "intermediate_size": 64, "num_hidden_layers": 2} | {
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "mamba_d_ssm": 48,
        "mamba_n_heads": 6,
        "mamba_d_head": 8,
        "mamba_d_state": 8,
    }


_ARCHITECTURES: dict[str, Callable[[], tuple[str, dict[str, Any]]]] = {
    "llama": _llama,
    "qwen2": _qwen2,
    "qwen3": _qwen3,
    "mistral": _mistral,
    "gemma3": _gemma3,
    "phi3": _phi3,
    "gpt_neox": _gpt_neox,
    "qwen3_next": _qwen3_next,
    "lfm2": _lfm2,
    "jamba": _jamba,
    "mamba": _mamba,
    "falcon_h1": _falcon_h1,
}
STANDARD = ("llama", "qwen2", "qwen3", "mistral", "gemma3", "phi3", "gpt_neox")
"""Every layer keeps keys and values."""
HYBRID = ("qwen3_next", "lfm2", "jamba")
"""Some layers keep a recurrent state instead."""
WINDOWED = ("mistral", "gemma3")
"""Some layers attend to a window that is smaller than the texts of the tests."""


def build_model(architecture: str, *, seed: int = 0, dtype: torch.dtype = torch.float32, **changes: Any) -> Any:
    """A random model, in evaluation mode. ``changes`` override its config.

    Weights are large (standard deviation 0.15), so that greedy answers wander instead of repeating one token.
    """
    import transformers

    name, sizes = _ARCHITECTURES[architecture]()
    config_class = getattr(transformers, f"{name}Config")
    model_class = getattr(transformers, f"{name.removesuffix('Text')}ForCausalLM")
    config = config_class(**(_COMMON | sizes | copy.deepcopy(changes)))
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        model = model_class(config)
    return model.to(dtype).eval()
