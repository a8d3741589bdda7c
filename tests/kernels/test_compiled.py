"""What the kernels compile to: ahead of time, in processes whose kernels are not interpreted."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parents[2]

SPECIALIZATIONS = """
import json, random
import torch
from triton.backends.compiler import GPUTarget
from triton.compiler import make_backend
from triton.runtime.jit import create_function_from_signature
from _kernels import launches_of, meta_view

backend = make_backend(GPUTarget("cuda", 90, 32))
binders, keys = {}, {}
random.seed(0)
pick = random.choice
for _ in range(120):
    dtype = pick([torch.bfloat16, torch.float32, torch.float8_e5m2])
    lengths = [random.randint(1, 1500) for _ in range(pick([1, 2, 16, 64]))]
    shape = {"layers": pick([1, 16, 17]), "heads": pick([1, 2, 8]), "size": pick([64, 80, 128, 256])}
    view = meta_view(lengths, dtype=dtype, page=pick([1, 16, 32]), beside=random.random() < 0.7, **shape)
    weights = [torch.ones(n) for n in lengths] if random.random() < 0.5 else None
    launches = launches_of("paged_pool", view, weights=weights)
    launches += launches_of("chain_step", view, start=[max(n - pick([1, 40]), 0) for n in lengths])
    sizes = {"dim": pick([16, 17, 512]), "hidden": pick([1, 16, 33]), "requests": pick([1, 16])}
    launches += launches_of("difficulty_head", **sizes)
    for launch in launches:
        kernel = launch.kernel
        if launch.name not in binders:
            binders[launch.name] = create_function_from_signature(kernel.signature, kernel.params, backend)
        keywords = launch.constants | launch.options
        _, specialization, options = binders[launch.name](*launch.arguments.values(), **keywords)
        keys.setdefault(launch.name, set()).add(str((specialization, sorted(options.items()))))
print(json.dumps({name: len(found) for name, found in keys.items()}))
"""


def run(*command: str) -> str:
    paths = [str(ROOT), str(ROOT / "kernels"), str(ROOT / "benchmarks"), *filter(None, [os.environ.get("PYTHONPATH")])]
    environment = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    environment |= {"PYTHONPATH": os.pathsep.join(paths), "OMP_NUM_THREADS": "1"}
    done = subprocess.run(
        [sys.executable, *command], env=environment, cwd=ROOT, capture_output=True, text=True, timeout=550, check=False
    )
    assert done.returncode == 0, done.stderr[-3000:]
    return done.stdout.splitlines()[-1]


def test_nothing_but_dtype_alignment_weights_and_size_class_compiles_anew() -> None:
    """Triton's own key of 120 steps of any shape: lengths, batches, strides, heads, layers and page sizes are not in
    it."""
    found = json.loads(run("-c", SPECIALIZATIONS))
    assert found.pop("paged_pool_kernel") <= 3 * 2 * 2 * 2
    assert found.pop("chain_step_kernel") <= 3 * 2 * 2
    assert found.pop("difficulty_head_kernel") <= 2
    assert found == {"paged_pool_join_kernel": 1, "chain_step_join_kernel": 1, "difficulty_head_join_kernel": 1}


def test_the_codegen_benchmark() -> None:
    found = json.loads(run("benchmarks/kernel_codegen.py", "--quick", "--json"))
    assert found["name"] == "kernel_codegen"
    assert found["ok"] is True, {k: v for k, v in found["figures"].items() if v["ok"] is not True}


def test_the_roofline_benchmark() -> None:
    found = json.loads(run("benchmarks/kernel_roofline.py", "--quick", "--json"))
    assert found["name"] == "kernel_roofline"
    assert all(0 < figure["value"] < 1 for figure in found["figures"].values())


def test_the_cpu_benchmark() -> None:
    found = json.loads(run("benchmarks/kernel_cpu.py", "--quick", "--json", "--seconds", "2"))
    assert found["figures"]["difference_from_reference_bfloat16"]["ok"] is True
    assert found["figures"]["read_over_pool_float32"]["must"] == ">= 0.7"


def test_the_gpu_benchmark_says_that_there_is_none() -> None:
    import torch

    if not torch.cuda.is_available():
        assert json.loads(run("benchmarks/kernel_gpu.py", "--quick", "--json"))["figures"]["gpus"]["value"] == 0
