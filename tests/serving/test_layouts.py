"""kvroute's layouts against the caches of a real vLLM engine on CPU.

What is read through block ids must be what transformers keeps for the same tokens. Models are tiny and random.
"""

from __future__ import annotations

import json

import pytest
import torch
import transformers

from kvroute.serving.cpu_layout import PartStrides, find_area
from kvroute.serving.vllm_facts import cpu_writer
from tests.serving.checkpoints import build
from tests.serving.processes import run_module

pytestmark = pytest.mark.vllm

PROMPTS = [[(7 * i * i + 3 * i + n) % 300 + 5 for i in range(length)] for n, length in enumerate((150, 33, 64, 1))]


@pytest.mark.parametrize(
    ("name", "dtype", "engine"),
    [
        ("llama", torch.float32, {"block_size": 32}),
        ("llama_80", torch.float32, {"block_size": 96}),
        ("qwen3", torch.bfloat16, {"block_size": 128}),
        ("gemma3", torch.float32, {"block_size": 32, "max_num_batched_tokens": 64, "max_num_seqs": 4}),
        ("deepseek_v2", torch.float32, {}),
        ("deepseek_v3", torch.float32, {}),
    ],
)
def test_pages_hold_what_transformers_keeps(tmp_path, name, dtype, engine):
    model = build(name, tmp_path / "model", dtype)
    job = {"prompts": PROMPTS, "max_tokens": 4, "engine": engine | {"dtype": str(dtype).removeprefix("torch.")}}
    run_module("tests.serving.read_caches", str(tmp_path / "model"), str(tmp_path / "read.pt"), json.dumps(job))
    saved = torch.load(tmp_path / "read.pt", weights_only=True)
    windows = [p["window"] for p in saved["pages"]]
    assert windows == ([40, None, 40, 40] if name == "gemma3" else [None] * 4)
    # rounding: different kernels compute the same layers
    tolerance = 2e-4 if dtype == torch.float32 else 0.06
    for prompt, read in zip(PROMPTS, saved["read"], strict=True):
        assert read["tokens"] == len(prompt) + 3  # the last sampled token has no K and V yet
        ids = torch.tensor([read["ids"][: read["tokens"]]])
        # an own cache without windows: transformers' windowed layers would keep the window alone
        cache = transformers.DynamicCache()
        with torch.no_grad():
            model(ids, past_key_values=cache, use_cache=True)
        assert len(cache.layers) == len(read["layers"])
        for layer, kept, window in zip(read["layers"], cache.layers, windows, strict=True):
            first = layer["first"]
            assert first == 0 or (window is not None and read["tokens"] - first >= window - 1)
            assert (first > 0) == (window is not None and len(prompt) == 150)
            for part in ("keys", "values"):
                expected, got = getattr(kept, part)[0][:, first:].float(), layer[part].float()
                assert got.shape == expected.shape
                scale = float(expected.abs().max())
                assert float((got - expected).abs().max()) <= tolerance * scale


@pytest.mark.parametrize(
    ("isa", "dtype", "tokens", "size"),
    [
        ("vec", torch.float32, 32, 64),
        ("vec", torch.bfloat16, 128, 96),
        ("vec", torch.float16, 64, 32),
        ("vec16", torch.float32, 16, 80),
        ("vec16", torch.bfloat16, 48, 112),
    ],
)
def test_the_engines_own_op_shows_its_layout(isa, dtype, tokens, size):
    import vllm.platforms

    assert vllm.platforms.current_platform.is_cpu(), "needs vLLM's CPU build"
    keys, values = find_area(cpu_writer(), heads=3, tokens=tokens, size=size, dtype=dtype, isa=isa)
    assert keys == PartStrides(0, 1, tokens)  # the keys of a block are transposed
    assert values == PartStrides(tokens * size, size, 1)
