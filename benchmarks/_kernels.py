"""What the kernels' benchmarks share: launches as they are made, caches of a model's shape, and how a launch
compiles."""

from __future__ import annotations

import contextlib
import os
import re
import subprocess
import tempfile
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

import torch

from kvroute_kernels import ChainTensors, KVView, MLPHead

CPU = torch.device("cpu")
OPS = ("paged_pool", "chain_step", "difficulty_head")
TARGETS = {"sm_80": "A100", "sm_90": "H100", "sm_100": "B200", "gfx942": "MI300X"}
"""By architecture a card that has it."""


@dataclass
class Launch:
    """One launch of a kernel, as its host code makes it.

    Attributes:
        kernel: the jitted function.
        grid: programs.
        arguments: by name, what is passed at run time.
        constants: what is compiled in.
        options: of the compiler.
    """

    kernel: Any
    grid: tuple[int, ...]
    arguments: dict[str, Any]
    constants: dict[str, Any]
    options: dict[str, Any]

    @property
    def name(self) -> str:
        return str(self.kernel.__name__)


@contextlib.contextmanager
def caught_launches() -> Iterator[list[Launch]]:
    """Launches are noted instead of made: there need be no GPU."""
    from kvroute_kernels import chain_step_triton, difficulty_head_triton, paged_pool_triton

    made: list[Launch] = []
    before = []

    class Catcher:
        def __init__(self, kernel: Any) -> None:
            self.kernel = kernel

        def __getitem__(self, grid: tuple[int, ...]) -> Any:
            def launch(*args: Any, **keywords: Any) -> None:
                names = [p.name for p in self.kernel.params]
                options = {k: keywords.pop(k) for k in list(keywords) if k not in names}
                made.append(Launch(self.kernel, grid, dict(zip(names, args, strict=False)), keywords, options))

            return launch

    for module in (paged_pool_triton, chain_step_triton, difficulty_head_triton):
        for name in [n for n in vars(module) if n.endswith("_kernel")]:
            before.append((module, name, getattr(module, name)))
            setattr(module, name, Catcher(getattr(module, name)))
    try:
        yield made
    finally:
        for module, name, kernel in before:
            setattr(module, name, kernel)


def meta_view(
    lengths: list[int], *, layers: int, heads: int, size: int, dtype: torch.dtype, page: int = 16, beside: bool = True
) -> KVView:
    """A paged cache of a model's shape as vLLM lays it out on a GPU, keys beside values; small, all sequences in the
    same pages: its addresses and strides are real, its numbers are zeros."""
    columns = max(-(-max(lengths) // page), 1)
    both = torch.zeros(layers, 2, page, heads, 2 * size, dtype=dtype).transpose(2, 3)
    if not beside:
        both = torch.zeros(layers, 2, heads, 2 * size, page, dtype=dtype).transpose(3, 4)
    pages = torch.zeros(len(lengths), columns, dtype=torch.int64)
    return KVView.from_pages(both[..., :size], both[..., size:], pages, lengths)


def launches_of(op: str, view: KVView | None = None, **asked: Any) -> list[Launch]:
    """The launches of one step of an op."""
    from kvroute_kernels.chain_step_triton import PagedChain
    from kvroute_kernels.difficulty_head_triton import HeadStack
    from kvroute_kernels.paged_pool_triton import PagedPool

    with caught_launches() as made:
        if op == "paged_pool":
            assert view is not None
            pool = PagedPool(CPU)
            stop = asked.get("stop", view.host_lengths)
            start = asked.get("start", [0] * view.num_sequences)
            layers = asked.get("layers", list(view.layers))
            pool.stage(view, layers, start, stop, part=asked.get("part", "kv"), weights=asked.get("weights"))
            pool.launch()
        elif op == "chain_step":
            assert view is not None
            group = view.groups[0]
            width = group.keys.shape[2] * (group.keys.shape[4] + group.values.shape[4])
            state = ChainTensors.empty(view.num_sequences, width)
            chain = PagedChain(CPU)
            start = asked.get("start", [n - 1 for n in view.host_lengths])
            rows, sums = list(range(view.num_sequences)), bool(asked.get("sums"))
            chain.stage(view, rows, start, view.host_lengths, list(view.layers), state, sums=sums)
            chain.launch(state)
        else:
            dim, hidden = asked.get("dim", 4096), asked.get("hidden", 512)
            shapes = ((dim,), (dim,), (hidden, dim), (hidden,), (hidden,))
            stack = HeadStack([MLPHead(*(torch.zeros(s) for s in shapes), 0.0)], CPU)
            requests = asked.get("requests", 1)
            stack.stage([0] * requests, [50.0] * requests)
            stack.launch(torch.zeros(requests, dim))
    return made


# ---------------------------------------------------------------------- machine code


@dataclass
class Code:
    """What a launch compiles to on one target.

    Attributes:
        registers: a thread.
        spills: bytes a thread.
        shared: bytes a program.
        loads: by width in bytes, load instructions from global memory.
        threads: of a program.
        occupancy: share of the threads that a multiprocessor can hold.
        error: what the compiler said, where it could not.
    """

    registers: int = 0
    spills: int = 0
    shared: int = 0
    loads: Counter[int] = field(default_factory=Counter)
    threads: int = 0
    occupancy: float = 0.0
    error: str | None = None


_TYPES = {
    torch.float32: "fp32",
    torch.float64: "fp64",
    torch.int64: "i64",
    torch.int8: "i8",
    torch.bool: "i1",
}


def compile_launch(launch: Launch, target: str) -> Code:
    """Compile a launch ahead of time.

    Args:
        launch: caught.
        target: a key of :data:`TARGETS`.
    """
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    cuda = target.startswith("sm_")
    gpu = GPUTarget("cuda", int(target[3:]), 32) if cuda else GPUTarget("hip", target, 64)
    signature = {}
    for param in launch.kernel.params:
        value = launch.arguments.get(param.name)
        if param.name in launch.constants:
            signature[param.name] = "constexpr"
        else:
            signature[param.name] = "*" + _TYPES[value.dtype] if isinstance(value, torch.Tensor) else "i32"
    options = {name: value for name, value in launch.options.items() if cuda or name != "maxnreg"}
    if launch.name == "chain_step_kernel":
        from kvroute_kernels.chain_step_triton import warps_of

        options["num_warps"] = warps_of(launch.constants, gpu.warp_size)
    source = ASTSource(fn=launch.kernel, signature=signature, constexprs=dict(launch.constants))
    try:
        made = triton.compile(source, target=gpu, options=options)
    except Exception as error:  # noqa: BLE001 - printed in the table
        return Code(error=str(error).strip().splitlines()[-1][:120])
    return _nvidia(made, gpu.arch) if cuda else _amd(made)


_SHARED = {80: 164, 90: 228, 100: 228}
"""KiB of shared memory a multiprocessor."""


def _nvidia(made: Any, arch: int) -> Code:
    from triton.backends.nvidia.compiler import get_ptxas

    ptx = made.asm["ptx"]
    found = re.search(r"\.target\s+(sm_\w+)", ptx)
    assert found is not None
    with tempfile.TemporaryDirectory() as folder:
        path = os.path.join(folder, "kernel.ptx")
        with open(path, "w", encoding="utf-8") as file:
            file.write(ptx)
        fused = [] if made.metadata.enable_fp_fusion else ["--fmad=false"]
        command = [
            get_ptxas(arch).path,
            "-v",
            "--regAllocOptLevel=2",  # as Triton calls it
            *fused,
            f"--gpu-name={found[1]}",
            path,
            "-o",
            os.path.join(folder, "out"),
        ]
        said = subprocess.run(command, capture_output=True, text=True, check=True).stderr
    registers = int(re.search(r"Used (\d+) registers", said)[1])  # type: ignore[index]
    spills = sum(int(n) for n in re.findall(r"(\d+) bytes spill", said))
    loads: Counter[int] = Counter()
    for vector, bits in re.findall(r"\bld\.global[.\w:]*?(?:\.(v\d))?\.[bufs](\d+)\b", ptx):
        loads[int(vector[1:] or 1) * int(bits) // 8 if vector else int(bits) // 8] += 1
    threads, shared = made.metadata.num_warps * 32, made.metadata.shared
    by_registers = 65536 // (-(-registers * 32 // 256) * 256) // made.metadata.num_warps
    by_shared = _SHARED[arch] * 1024 // (shared + 1024)
    programs = min(32, 64 // made.metadata.num_warps, by_registers, by_shared)
    return Code(registers, spills, shared, loads, threads, programs * made.metadata.num_warps / 64)


def _amd(made: Any) -> Code:
    text = made.asm["amdgcn"]
    numbers = {
        name: int(n)
        for name, n in re.findall(
            r"\.(vgpr_count|vgpr_spill_count|sgpr_spill_count|private_segment_fixed_size):\s+(\d+)", text
        )
    }
    # Scalar registers that are kept in lanes of vector registers touch no memory, and have no private segment.
    spills = 4 * numbers["vgpr_spill_count"] + numbers["private_segment_fixed_size"]
    widths = {
        "ubyte": 1,
        "sbyte": 1,
        "ushort": 2,
        "sshort": 2,
        "short_d16": 2,
        "short_d16_hi": 2,
        "ubyte_d16": 1,
        "ubyte_d16_hi": 1,
        "dword": 4,
        "dwordx2": 8,
        "dwordx3": 12,
        "dwordx4": 16,
    }
    loads: Counter[int] = Counter()
    for kind in re.findall(r"\b(?:global|buffer|flat)_load_(\w+)", text):
        loads[widths[kind]] += 1
    waves = min(8, 512 // (-(-numbers["vgpr_count"] // 8) * 8))
    shared = made.metadata.shared
    programs = min(waves * 4 // made.metadata.num_warps, 65536 // max(shared, 1))
    return Code(
        numbers["vgpr_count"],
        spills,
        shared,
        loads,
        made.metadata.num_warps * 64,
        programs * made.metadata.num_warps / 32,
    )
