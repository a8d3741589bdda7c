"""Pooling on the CPU's cache layout / a plain read of the same bytes, all layers in one call, on every core there is.

The cache is as vLLM lays it out on a CPU: for each page and head the keys ``[D, N]``, then the values ``[N, D]``,
pages of 128 tokens. Eight sequences of shuffled pages take up all of it, so that pooling reads exactly the bytes that
the plain read reads: the largest of all 32-bit words, which torch finds with vector instructions on all threads.
Beside it the torch reference, once, and what one call costs when there is next to nothing to read.
"""

from __future__ import annotations

import os
import time

import torch

from _harness import Figure, Ratio, exact, figure_table, finish, measure, parse_arguments
from kvroute_kernels import KVView, paged_pool

LAYERS, HEADS, SIZE, PAGE = 30, 3, 64, 128
"""SmolLM2-135M."""


def cpu_cache(pages: int, sequences: int, dtype: torch.dtype, seed: int) -> tuple[KVView, torch.Tensor]:
    """Sequences over all pages of one allocation, and that allocation."""
    g = torch.Generator().manual_seed(seed)
    area = torch.randn(LAYERS, pages, HEADS, 2 * PAGE * SIZE, generator=g).to(dtype)
    keys = area[..., : PAGE * SIZE].unflatten(-1, (SIZE, PAGE)).transpose(3, 4)
    values = area[..., PAGE * SIZE :].unflatten(-1, (PAGE, SIZE))
    table = torch.randperm(pages, generator=g).view(sequences, -1)
    return KVView.from_pages(keys, values, table, [table.shape[1] * PAGE] * sequences), area


def main() -> None:
    arguments = parse_arguments(__doc__, seconds=90.0, quick_seconds=20.0)
    torch.set_num_threads(len(os.sched_getaffinity(0)))
    figures: dict[str, Figure] = {}
    pages = 16 if arguments.quick else 64
    dtypes = {"float32": torch.float32, "bfloat16": torch.bfloat16}
    size = 0
    for name, dtype in dtypes.items():
        view, area = cpu_cache(pages, 8, dtype, arguments.seed)
        words, size = area.view(torch.int32), area.nbytes
        sides = {"read": lambda words=words: words.amax(), "pool": lambda view=view: paged_pool(view)}
        ratio = {f"read_over_pool_{name}": Ratio("read", "pool", ">= 0.7")}
        rounds = measure(sides, ratio, seconds=arguments.seconds / len(dtypes), seed=arguments.seed)
        figures |= rounds.figures
        figures[f"read_gb_s_{name}"] = exact(round(size / rounds.median("read") / 1e9, 2), None)
        figures[f"pool_gb_s_{name}"] = exact(round(size / rounds.median("pool") / 1e9, 2), None)
        began = time.perf_counter()
        reference = paged_pool(view, backend="torch")
        figures[f"torch_reference_gb_s_{name}"] = exact(round(size / (time.perf_counter() - began) / 1e9, 2), None)
        found = paged_pool(view)
        assert reference.keys is not None
        assert found.keys is not None
        error = (found.keys - reference.keys).abs().max() / reference.keys.abs().max()
        figures[f"difference_from_reference_{name}"] = exact(float(error), "<= 0.00001")
    tiny, _ = cpu_cache(8, 8, torch.float32, arguments.seed)
    began = time.perf_counter()
    for _ in range(100):
        paged_pool(tiny, layers=[29], start=[0] * 8, stop=[1] * 8, part="v")
    figures["microseconds_of_a_call_for_8_tokens"] = exact(round((time.perf_counter() - began) * 1e4, 1), None)
    print(figure_table(figures))
    finish(
        arguments,
        name="kernel_cpu",
        figures=figures,
        baseline="a plain read of the same bytes (torch, all threads)",
        n={"bytes": size, "sequences": 8, "threads": torch.get_num_threads()},
    )


if __name__ == "__main__":
    main()
