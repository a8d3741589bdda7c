"""kvroute's connector in a real vLLM engine on CPU: what requests get is what transformers' cache gives.

Every request's tokens are run through transformers alone, in one piece, and pooled from there.
"""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch
import transformers

from kvroute.chains import ChainState
from kvroute.models import bundled_path
from kvroute.pooling import PRESETS, pool
from kvroute.token_weights import FrequencyTable
from kvroute_kernels import KVView
from tests.serving.processes import run_module

pytestmark = pytest.mark.vllm
PROMPTS = [[(7 * i * i + 3 * i + n) % 4000 + 100 for i in range(size)] for n, size in enumerate((300, 33, 140, 5))]
FEATURES = [*(f"{of}:{p}" for of in ("prompt", "answer") for p in PRESETS if p != "fast"), "kv-coe", "length"]


class Alone:
    """The same tokens through transformers."""

    def __init__(self, folder: Path) -> None:
        self.model = transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
        self.table = FrequencyTable.from_vocabulary(transformers.AutoTokenizer.from_pretrained(folder))

    def check(self, got: dict, answer: list[int], result: dict) -> None:
        prompt = got["prompt"]
        ids = [*prompt, *answer][: len(prompt) + len(answer) - 1]
        cache = transformers.DynamicCache()
        with torch.no_grad():
            self.model(torch.tensor([ids]), past_key_values=cache, use_cache=True)
        view = KVView.from_contiguous([x.keys for x in cache.layers], [x.values for x in cache.layers], [len(ids)])
        assert result["error"] is None
        assert result["tokens"] == {"prompt": len(prompt), "answer": len(answer), "thought": None}
        for name in FEATURES[:-2]:
            of, _, preset = name.partition(":")
            start, stop = (0, len(prompt)) if of == "prompt" else (len(prompt), len(ids))
            if start == stop:
                assert name not in result["features"]
                continue
            spec = PRESETS[preset]
            sif = [torch.from_numpy(self.table.weights(spec.sif_a)[ids])]
            expected = pool(view, spec, start=[start], stop=[stop], sif_weights=sif)[0].numpy()
            found = np.array(result["features"][name], dtype=np.float32)
            np.testing.assert_allclose(found, expected, rtol=0, atol=3e-5 * np.abs(expected).max(), err_msg=name)
        chain = ChainState(1)
        chain.update_view(view, [0], [len(prompt)], [len(ids)])
        for name, score in chain.scores().items():
            if score.value is None:
                assert result["scores"][name]["value"] is None
                assert result["scores"][name]["reason"] == score.reason
            else:
                assert result["scores"][name]["value"] == pytest.approx(score.value, rel=3e-4, abs=3e-5), name
        assert result["scores"]["length"]["value"] == len(answer)


@pytest.fixture(scope="module")
def alone() -> Alone:
    return Alone(bundled_path("smollm2"))


def serve(folder: Path, engine: dict, jobs: list[dict]) -> list[list[dict]]:
    out = folder / "out.json"
    job = json.dumps({"engine": engine, "jobs": jobs})
    run_module("tests.serving.run_connector", str(bundled_path("smollm2")), str(out), job)
    return json.loads(out.read_text())


def test_requests_get_what_transformers_gives(tmp_path, alone):
    jobs = [
        {"prompts": PROMPTS, "params": {"max_tokens": 20}, "features": FEATURES},
        {"prompts": PROMPTS, "params": {"max_tokens": 80}, "features": FEATURES},  # prefix hits
        {"prompts": PROMPTS[:2], "params": {"max_tokens": 1}, "features": FEATURES},
        {"prompts": PROMPTS[:1], "params": {"max_tokens": 6, "n": 2, "temperature": 1.0}, "features": FEATURES},
        {"prompts": PROMPTS[:1], "params": {"max_tokens": 4}, "features": ["no such feature"]},
    ]
    # a budget of 128 tokens a step cuts the longer prompts in chunks
    cold, warm, single, two, wrong = serve(tmp_path, {"max_num_batched_tokens": 128, "block_size": 32}, jobs)
    assert all(got["cached"] == 0 for got in cold)
    assert warm[0]["cached"] >= 256
    for got in [*cold, *warm, *single]:
        alone.check(got, got["answers"][0], got["result"])
    first, second = two[0]["answers"]
    assert first != second
    matches = 0
    for answer in (first, second):  # vLLM gives the result of the one that ended last
        try:
            alone.check(two[0], answer, two[0]["result"])
            matches += 1
        except AssertionError:
            pass
    assert matches == 1
    assert "no such feature" in wrong[0]["result"]["error"]
    assert len(wrong[0]["answers"][0]) == 4
