"""Tiny random checkpoints of several families, with sizes that vLLM's CPU attention takes.

Head sizes begin at 32, MLA is of 512 + 64.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
import transformers

_COMMON = {
    "vocab_size": 320,
    "hidden_size": 96,
    "intermediate_size": 96,
    "num_hidden_layers": 4,
    "num_attention_heads": 6,
    "num_key_value_heads": 3,
    "max_position_embeddings": 512,
    "initializer_range": 0.1,
    "tie_word_embeddings": False,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "pad_token_id": 0,
}
_LATENT = {
    "num_attention_heads": 2,
    "num_key_value_heads": 2,
    "q_lora_rank": None,
    "kv_lora_rank": 512,
    "qk_rope_head_dim": 64,
    "qk_nope_head_dim": 32,
    "v_head_dim": 32,
    "first_k_dense_replace": 4,
    "n_routed_experts": 4,
    "num_experts_per_tok": 2,
    "moe_intermediate_size": 32,
    "n_group": 1,
    "topk_group": 1,
    # vLLM 0.32 rotates plain RoPE of MLA wrongly on CPU: its in-place op takes the rope keys, a view into rows of
    # 576, for rows of 64, and gives token t the position 9 t. Published models scale RoPE, which takes another path.
    "rope_parameters": {
        "rope_type": "yarn",
        "rope_theta": 10000.0,
        "factor": 4.0,
        "original_max_position_embeddings": 128,
        "mscale": 1.0,
        "mscale_all_dim": 1.0,
        "beta_fast": 32,
        "beta_slow": 1,
    },
}
MODELS = {
    "llama": ("Llama", {"head_dim": 32}),
    "llama_80": ("Llama", {"head_dim": 80}),  # no multiple of 32: the instruction set vec16
    "llama_2": ("Llama", {"head_dim": 32, "num_key_value_heads": 2}),  # can be shared by two ranks
    "qwen3": ("Qwen3", {"head_dim": 64}),
    "gemma3": (
        "Gemma3",
        {"head_dim": 32, "sliding_window": 40, "query_pre_attn_scalar": 32}
        | {"layer_types": [f"{kind}_attention" for kind in ("sliding", "full", "sliding", "sliding")]},
    ),
    "deepseek_v2": ("DeepseekV2", _LATENT | {"topk_method": "greedy"}),
    "deepseek_v3": ("DeepseekV3", _LATENT),
}


def build(name: str, folder: Path, dtype: torch.dtype, **sizes: Any) -> torch.nn.Module:
    """Save a checkpoint of :data:`MODELS` and return its model; ``sizes`` are other entries of its config."""
    kind, changes = MODELS[name]
    config_name = f"{kind}TextConfig" if kind == "Gemma3" else f"{kind}Config"
    config = getattr(transformers, config_name)(**(_COMMON | changes | sizes))
    torch.manual_seed(0)
    model = getattr(transformers, f"{kind}ForCausalLM")(config).to(dtype).eval()
    model.save_pretrained(folder)
    return model
