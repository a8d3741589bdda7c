"""The kernels on a GPU: bandwidth against a device copy and against torch.compile, and vLLM's throughput with kvroute
in it.

- Pooling 64 requests of 4k tokens, 4 layers of 8 heads of 128 in bfloat16: bytes a second / those of a device copy
(which
  reads and writes; both are counted), and the time of torch.compile of the reference's formula over the same pages.
- The chain step of 64 requests, and a captured CUDA graph of both, replayed against launches one by one.
- Kernels against the reference on the device, first: a benchmark of wrong sums is none.
- With vllm installed: an 8B-sized model with random weights, CUDA graphs on, throughput with the connector / without.

Where there is no GPU it says so and measures nothing.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import torch

from _harness import Figure, exact, figure_table, finish, parse_arguments, summarise
from kvroute_kernels import ChainTensors, KVView, paged_chain_step, paged_pool

REQUESTS, TOKENS, LAYERS, HEADS, SIZE, PAGE = 64, 4096, 4, 8, 128, 16
MODEL = {
    "architectures": ["LlamaForCausalLM"],
    "model_type": "llama",
    "hidden_size": 4096,
    "intermediate_size": 14336,
    "num_hidden_layers": 32,
    "num_attention_heads": 32,
    "num_key_value_heads": 8,
    "head_dim": 128,
    "vocab_size": 128256,
    "max_position_embeddings": 8192,
    "rms_norm_eps": 1e-5,
    "rope_theta": 500000.0,
    "torch_dtype": "bfloat16",
    "bos_token_id": 128000,
    "eos_token_id": 128001,
    "tie_word_embeddings": False,
    "hidden_act": "silu",
}
"""Llama-3.1-8B's sizes."""


def timed(work: Callable[[], object], rounds: int) -> list[float]:
    """Seconds of each round, by the device's clock, between two rounds of something that empties its cache."""
    flush = torch.empty(256 << 20, dtype=torch.int8, device="cuda")
    for _ in range(3):
        work()
    found = []
    for _ in range(rounds):
        flush.zero_()
        begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        begin.record()
        work()
        end.record()
        end.synchronize()
        found.append(begin.elapsed_time(end) / 1e3)
    return found


def cache(seed: int, requests: int, tokens: int) -> KVView:
    """A paged cache of random numbers as vLLM lays it out, keys beside values, pages shuffled."""
    g = torch.Generator(device="cuda").manual_seed(seed)
    columns = -(-tokens // PAGE)
    both = torch.randn(
        LAYERS, requests * columns, PAGE, HEADS, 2 * SIZE, generator=g, device="cuda", dtype=torch.bfloat16
    )
    both = both.transpose(2, 3)
    table = torch.randperm(requests * columns, generator=g, device="cuda").view(requests, columns)
    return KVView.from_pages(both[..., :SIZE], both[..., SIZE:], table, [tokens] * requests)


def kernels(arguments) -> dict[str, Figure]:
    from kvroute_kernels.chain_step_triton import PagedChain
    from kvroute_kernels.paged_pool_triton import PagedPool

    device = torch.device("cuda")
    figures: dict[str, Figure] = {}
    small = cache(arguments.seed, 3, 700)
    mine, theirs = (paged_pool(small, start=[5, 0, 699], backend=b) for b in ("triton", "torch"))
    assert mine.keys is not None
    assert theirs.keys is not None
    error = float((mine.keys - theirs.keys).abs().max() / theirs.keys.abs().max())
    states = [ChainTensors.empty(3, 2 * HEADS * SIZE, device) for _ in range(2)]
    for state, backend in zip(states, ("triton", "torch"), strict=True):
        paged_chain_step(small, state, [0, 1, 2], [0, 0, 0], [9, 1, 70], backend=backend)
    gap = (states[0].sum_angle - states[1].sum_angle).abs().max() / states[1].sum_angle.abs().max()
    figures["difference_from_reference"] = exact(max(error, float(gap)), "<= 0.0001")

    rounds = 20 if arguments.quick else 100
    view = cache(arguments.seed, REQUESTS, TOKENS)
    needed = REQUESTS * TOKENS * LAYERS * HEADS * 2 * SIZE * 2
    pool = PagedPool(device)
    pool.stage(view, list(range(LAYERS)), [0] * REQUESTS, [TOKENS] * REQUESTS)
    pooled = timed(pool.launch, rounds)
    source = torch.empty(needed // 2, dtype=torch.int8, device="cuda")
    target = torch.empty_like(source)
    copied = timed(lambda: target.copy_(source), rounds)
    pairs = [b / a for a, b in zip(sorted(pooled), sorted(copied), strict=True)]  # needed bytes move in both
    figures["bandwidth_over_copy"] = summarise(pairs, ">= 0.9", seed=arguments.seed)
    figures["pool_gb_s"] = exact(needed / sorted(pooled)[len(pooled) // 2] / 1e9, None)

    group = view.groups[0]
    pages = group.table.pages

    def formula(keys: torch.Tensor, values: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        return keys[:, pages].float().sum((2, 4)), values[:, pages].float().sum((2, 4))

    compiled = torch.compile(formula)
    inductor = timed(lambda: compiled(group.keys, group.values), rounds)
    figures["compile_over_kernel"] = summarise(
        [b / a for a, b in zip(sorted(pooled), sorted(inductor), strict=True)], None, seed=arguments.seed
    )

    state, chain = ChainTensors.empty(REQUESTS, 2 * HEADS * SIZE, device), PagedChain(device)
    chain.stage(view, list(range(REQUESTS)), [TOKENS - 1] * REQUESTS, [TOKENS] * REQUESTS, list(range(LAYERS)), state)
    figures["chain_step_us"] = exact(sorted(timed(lambda: chain.launch(state), rounds))[rounds // 2] * 1e6, None)

    window = PagedPool(device, room=REQUESTS)
    window.stage(view, list(range(LAYERS)), [TOKENS - 64] * REQUESTS, [TOKENS] * REQUESTS)
    window.launch()
    wanted = window.rows().clone()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        window.launch()
        chain.launch(state)
    window.rows().zero_()
    graph.replay()
    torch.cuda.synchronize()
    figures["graph_replays_the_same_bits"] = exact(float(torch.equal(window.rows(), wanted)), ">= 1")
    figures["graph_us"] = exact(sorted(timed(graph.replay, rounds))[rounds // 2] * 1e6, None)
    return figures


def serve(on: bool, arguments) -> float:
    """Tokens a second of an offline engine with random weights, in a process of its own."""
    command = [sys.executable, __file__, "--serve", "on" if on else "off", "--seed", str(arguments.seed)]
    done = subprocess.run(
        [*command, *(["--quick"] if arguments.quick else [])], capture_output=True, text=True, check=True
    )
    return float(json.loads(done.stdout.splitlines()[-1])["tokens_per_second"])


def serve_once(on: bool, quick: bool) -> None:
    """What :func:`serve` runs."""
    from vllm import LLM, SamplingParams

    with tempfile.TemporaryDirectory() as folder:
        Path(folder, "config.json").write_text(json.dumps(MODEL))
        transfer = {
            "kv_connector": "KVRouteConnector",
            "kv_connector_module_path": "kvroute.serving.connector",
            "kv_role": "kv_both",
        }
        more = {"kv_transfer_config": transfer} if on else {}
        llm = LLM(
            folder, load_format="dummy", skip_tokenizer_init=True, max_model_len=4096, enforce_eager=False, **more
        )
        count, length = (64, 64) if quick else (256, 256)
        asks = {"kvroute": {"features": ["prompt:paper-mteb", "answer:paper-mteb", "kv-coe"]}}
        params = SamplingParams(
            max_tokens=length,
            ignore_eos=True,
            detokenize=False,
            extra_args={"kv_transfer_params": asks} if on else None,
        )
        prompts = [{"prompt_token_ids": [(i * 7919 + j) % 120000 for j in range(512)]} for i in range(count)]
        llm.generate(prompts[:8], params, use_tqdm=False)
        began = time.perf_counter()
        llm.generate(prompts, params, use_tqdm=False)
        print(json.dumps({"tokens_per_second": count * length / (time.perf_counter() - began)}))


def main() -> None:
    if "--serve" in sys.argv:
        serve_once(sys.argv[sys.argv.index("--serve") + 1] == "on", "--quick" in sys.argv)
        return
    arguments = parse_arguments(__doc__)
    figures: dict[str, Figure] = {}
    if not torch.cuda.is_available():
        print("No GPU here: nothing was measured. Run this where torch.cuda.is_available() is true.\n")
        figures["gpus"] = exact(0, None)
    else:
        print(f"{torch.cuda.get_device_name(0)}, torch {torch.__version__}, pid {os.getpid()}\n")
        figures |= kernels(arguments)
        try:
            import vllm  # noqa: F401
        except ImportError:
            print("vllm is not installed: its throughput was not measured.\n")
        else:
            rounds = 2 if arguments.quick else 6
            ratios = []
            for turn in range(rounds):
                sides = [turn % 2 == 0, turn % 2 == 1]
                speed = {on: serve(on, arguments) for on in sides}
                ratios.append(speed[True] / speed[False])
            figures["throughput_on_over_off"] = summarise(ratios, ">= 0.99", seed=arguments.seed)
    print(figure_table(figures))
    finish(
        arguments,
        name="kernel_gpu",
        figures=figures,
        baseline="a device copy; vLLM without kvroute",
        n={"requests": REQUESTS, "tokens": TOKENS},
    )


if __name__ == "__main__":
    main()
