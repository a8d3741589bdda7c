"""Mistakes planted in the kernels, each of a kind that kernels really have, and small cases that must catch them.

Run as a program it plants every one in a copy of its module, runs that module's cases in Triton's interpreter, and
prints what was caught, one JSON object as the last line; without a mutant all cases must pass. The cases are as
small as can be, so that all mutants take seconds; the tests beside this file cover the same ground broadly.
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import os
import sys
import tempfile
import types
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

if __name__ == "__main__":
    os.environ["TRITON_INTERPRET"] = "1"

import torch

import kvroute_kernels
from kvroute_kernels import ChainTensors, KVGroup, KVView, MLPHead, PageTable
from kvroute_kernels.chain_step import paged_chain_step_reference
from kvroute_kernels.difficulty_head import difficulty_head_reference
from kvroute_kernels.paged_pool import paged_pool_reference
from tests.kernels.caches import bytes_within, random_view, recorded

CPU = torch.device("cpu")
SOURCES = Path(kvroute_kernels.__file__).parent
BLOCKS = {
    "paged_pool_triton": {"SPLIT": 8, "BLOCK_ELEMENTS": 512, "JOIN_T": 2, "JOIN_D": 16},
    "chain_step_triton": {"RUN": 2, "TILE_BYTES": 512, "BLOCK_L_STRIDED": 2, "BLOCK_F": 8},
    "difficulty_head_triton": {"BLOCK_H": 2, "BLOCK_K": 8, "BLOCK_SHARES": 2},
}


PARTS = {"chain_step_triton": ("chain_kernels_triton",)}
"""Modules that hold a part of one, and are planted with it."""


@dataclass(frozen=True)
class Mutant:
    """One mistake: in ``module``, ``old`` (which is there once) becomes ``new``; ``kind`` is its class."""

    module: str
    kind: str
    old: str
    new: str


POOL, CHAIN, HEAD = "paged_pool_triton", "chain_step_triton", "difficulty_head_triton"
MUTANTS = (
    Mutant(POOL, "mask tail of tokens", "live = token < count", "live = token < count + 1"),
    Mutant(POOL, "mask tail of entries", "inside = entry < size\n", "inside = entry < size + 1\n"),
    Mutant(
        POOL,
        "page crossing",
        "page = tl.load(table + place, mask=held",
        "page = tl.load(table + tl.min(place, axis=0), mask=held",
    ),
    Mutant(
        POOL,
        "page size",
        "token_in_page = (slot - place * page_size.to(tl.int32))",
        "token_in_page = (slot - place * 4)",
    ),
    Mutant(POOL, "head stride", "head_stride = tl.load(plane + 2)", "head_stride = tl.load(plane + 3)"),
    Mutant(POOL, "token stride", "token_stride = tl.load(plane + 3)", "token_stride = tl.load(plane + 5)"),
    Mutant(
        POOL,
        "entry stride",
        "entries = base + head * head_stride + entry * entry_stride",
        "entries = base + head * head_stride + entry",
    ),
    Mutant(POOL, "window start", "slot = (first + token + offset)", "slot = (token + offset)"),
    Mutant(POOL, "padding", "slot = (first + token + offset)", "slot = (first + token)"),
    Mutant(POOL, "reduction axis", "total = tl.sum(sums, axis=0) *", "total = tl.max(sums, axis=0) *"),
    Mutant(POOL, "wrong layer", "plane_at = column // (heads * chunks)", "plane_at = column // heads // (chunks + 1)"),
    Mutant(POOL, "wrong head", "head = (column // chunks) % heads", "head = column % heads"),
    Mutant(POOL, "chunks of a head", "entry = (column % chunks) * BLOCK_D +", "entry = 0 * BLOCK_D +"),
    Mutant(POOL, "sequence of another row", "+ sequence * tl.load(plane + 9)", "+ 0 * tl.load(plane + 9)"),
    Mutant(POOL, "scale left out", "* tl.load(scales + plane_at)", "* 1.0"),
    Mutant(POOL, "weights of another sequence", "tl.load(item + 4) + token", "token"),
    Mutant(POOL, "absent page is page 0", "other=-1)\n", "other=0)\n            page = tl.maximum(page, 0)\n"),
    Mutant(POOL, "32-bit offsets", "start = page * page_stride +", "start = (page * page_stride).to(tl.int32) +"),
    Mutant(
        POOL,
        "accumulation in the cache's dtype",
        "sums += x\n",
        "sums += x\n            sums = sums.to(tl.bfloat16).to(tl.float32)\n",
    ),
    Mutant(
        POOL,
        "a partial row too few",
        "for begin in range(0, count, BLOCK_T):\n            partial",
        "for begin in range(0, count - 1, BLOCK_T):\n            partial",
    ),
    Mutant(POOL, "partial rows of the neighbour", "(first + partial)[:, None]", "(first + partial + 1)[:, None]"),
    Mutant(POOL, "tail of a row of sums", "place = (program % blocks) * BLOCK_D", "place = 0 * BLOCK_D"),
    Mutant(POOL, "runs that overlap", "low[sequence] + run * SPLIT", "low[sequence] + run * (SPLIT - 1)"),
    Mutant(
        POOL,
        "read twice",
        "sums += x\n",
        "sums += x + 0 * load_numbers(entries[None, :] + start[:, None], held[:, None] & inside[None, :], E4M3_BITS)\n",
    ),
    Mutant(
        CHAIN,
        "layers beyond the tile",
        "for low in range(0, layers, BLOCK_L):",
        "for low in range(0, BLOCK_L, BLOCK_L):",
    ),
    Mutant(CHAIN, "mean of another count", "total / layers.to(tl.float32)", "total / BLOCK_L"),
    Mutant(CHAIN, "sums of the last token alone", "x += tl.load(at_sum", "x += 0 * tl.load(at_sum"),
    Mutant(CHAIN, "sums of another sequence", "sums + (sequence * layers + layer)", "sums + layer"),
    Mutant(CHAIN, "mask tail of layers", "real = layer < layers\n", "real = layer < layers + 1\n"),
    Mutant(CHAIN, "keys for values", "plane_at = tl.where(is_values, layers, 0) + layer", "plane_at = layer"),
    Mutant(CHAIN, "the vector before", "old = z\n", "old = old\n"),
    Mutant(CHAIN, "a chain's first vector is a step", "place >= tl.where(known, 0, 1)", "place >= 0"),
    Mutant(
        CHAIN, "another chain's state", "old = tl.load(last + state * width", "old = tl.load(last + sequence * width"
    ),
    Mutant(CHAIN, "the first vector is overwritten", "mask=entry < tl.where(fresh, size, 0))", "mask=inside)"),
    Mutant(CHAIN, "count of one", "old_count + tokens)", "old_count + 1)"),
    Mutant(CHAIN, "obtuse angles", "2.0 * tl.where(wide, 1.57079632679489661923 - half, half)", "2.0 * half"),
    Mutant(CHAIN, "zero vectors", "undefined = (side == 0.0) | (other == 0.0) |", "undefined = (side != side) |"),
    Mutant(CHAIN, "page of another layer's table", "+= sequence * tl.load(plane + 9", "+= 0 * tl.load(plane + 9"),
    Mutant(
        CHAIN,
        "step between runs",
        "before = ends + ((row + run - 1) * 2 + 1) * width",
        "before = ends + (row + run - 1) * 2 * width",
    ),
    Mutant(
        CHAIN,
        "the newest vector of a chunk",
        "ends + ((row + runs - 1) * 2 + 1) * width",
        "ends + (row + runs - 1) * 2 * width",
    ),
    Mutant(
        CHAIN,
        "sums of a run left out",
        "angle_sum += angle + tl.load(partial",
        "angle_sum += angle + 0 * tl.load(partial",
    ),
    Mutant(HEAD, "units beyond the tile", "unit = block * BLOCK_H +", "unit = 0 * BLOCK_H +"),
    Mutant(HEAD, "reduction axis", "tl.sum(sums, axis=1) +", "tl.max(sums, axis=1) +"),
    Mutant(HEAD, "no ReLU", "active = tl.where(before > 0.0, before, before * 0.0)", "active = before"),
    Mutant(
        HEAD,
        "another request's head",
        "head = heads + tl.load(requests + request * 2) * 8\n    mean",
        "head = heads\n    mean",
    ),
    Mutant(HEAD, "at the threshold", "tl.where(score > threshold, 1, 0)", "tl.where(score >= threshold, 1, 0)"),
    Mutant(HEAD, "infinity taken for a number", 'x = tl.where(tl.abs(x) < float("inf"), x, float("nan"))', "x = x"),
    Mutant(
        HEAD, "shares beyond the tile", "for low in range(0, used, BLOCK_S):", "for low in range(0, BLOCK_S, BLOCK_S):"
    ),
)


# ---------------------------------------------------------------------- cases


def _close(found: torch.Tensor, wanted: torch.Tensor) -> None:
    torch.testing.assert_close(found.double(), wanted.double(), rtol=1e-5, atol=1e-5)


def pool_cases(m: types.ModuleType) -> None:
    """What a wrong pooling gets wrong."""
    for asked in (
        {"page": 4, "shift": 3, "layout": "heads first"},
        {"page": 8, "layout": "with gaps", "size": 3, "dtype": torch.bfloat16},
        {"page": 1, "layout": "tokens first"},
        {"page": 4, "layout": "heads first", "dtype": torch.float8_e5m2, "scales": (0.5, 3.0), "heads": 1, "layers": 1},
    ):
        view = random_view([13, 2], **({"layers": 2, "heads": 2, "size": 4} | asked))
        low, high = [5, 0], [13, 2]
        weights = [torch.rand(8), torch.rand(2)]
        found = m.paged_pool_triton(view, list(view.layers), low, high, "kv", weights)
        wanted = paged_pool_reference(view, list(view.layers), low, high, "kv", weights)
        for mine, theirs in ((found.keys, wanted.keys), (found.values, wanted.values), (found.weight, wanted.weight)):
            _close(mine, theirs)
    wide = random_view([19], layers=1, heads=2, size=130, page=16)
    _close(
        m.paged_pool_triton(wide, [0], [0], [19], "k", None).keys,
        paged_pool_reference(wide, [0], [0], [19], "k", None).keys,
    )
    ones = torch.ones(1, 1, 1, 1100, 2, dtype=torch.bfloat16)
    long = KVView.from_contiguous(ones, ones, [1100])
    m.SPLIT = 2048
    assert m.paged_pool_triton(long, [0], [0], [1100], "k", None).keys.flatten().tolist() == [1100, 1100]
    m.SPLIT = 8
    pool = m.PagedPool(CPU)
    pool.stage(wide, [0], [0], [4])
    with recorded() as seen:
        pool.launch()
    read = bytes_within(seen, [wide.groups[0].keys, wide.groups[0].values])
    assert len(read) == len(set(read)) == 4 * 2 * 2 * 130 * 4
    hole = wide.groups[0]
    table = PageTable(torch.full_like(hole.table.pages, -1), hole.table.offset, hole.table.first)
    pool.stage(
        KVView([KVGroup(hole.layers, torch.zeros_like(hole.keys), hole.values, table)], wide.lengths), [0], [0], [2]
    )
    pool.launch()
    assert torch.isnan(pool.sums().keys).all()
    planes = pool.buffers.get("planes", 0, torch.int64)
    pool.stage(wide, [0], [0], [1])
    planes[0], planes[1], planes[7] = 1 << 44, 3_000_000_008, 1 << 40
    wide.groups[0].table.pages[0, 0] = 77
    with recorded(fake=True) as seen:
        pool.launch()
    assert any((a == (1 << 44) + 4 * 77 * 3_000_000_008).any() for a, _ in seen)


def chain_cases(m: types.ModuleType) -> None:
    """What a wrong chain gets wrong."""
    view = random_view([5, 2], layers=3, heads=2, size=2, value_size=3, page=2, layout="keys beside values")
    turned = view.groups[0]
    turned.keys[:, turned.table.pages[0, 0], :, 1] = -turned.keys[:, turned.table.pages[0, 0], :, 0]
    turned.values[:, turned.table.pages[0, 0], :, 1] = -turned.values[:, turned.table.pages[0, 0], :, 0]
    mine, theirs = ChainTensors.empty(3, 10), ChainTensors.empty(3, 10)
    for low, high in (([0, 0], [1, 2]), ([1, 2], [5, 2])):
        found = m.paged_chain_step_triton(view, mine, [2, 0], low, high, [0, 1, 2], True)
        wanted = paged_chain_step_reference(view, theirs, [2, 0], low, high, [0, 1, 2], layer_sums=True)
        for name in ("magnitudes", "angles", "squares", "layer_sums"):
            _close(getattr(found, name), getattr(wanted, name))
        for name in ("first", "last", "count", "sum_magnitude", "sum_angle", "degenerate"):
            _close(getattr(mine, name), getattr(theirs, name))
    zero = random_view([2], layers=1, heads=1, size=2)
    for part in (zero.groups[0].keys, zero.groups[0].values):
        part[:, zero.groups[0].table.pages[0, 0]] = 0
    state = ChainTensors.empty(1, 4)
    m.paged_chain_step_triton(zero, state, [0], [0], [2], [0], False)
    assert bool(state.degenerate[0])
    assert int(state.count[0]) == 2


def head_cases(m: types.ModuleType) -> None:
    """What a wrong head gets wrong."""
    g = torch.Generator().manual_seed(2)

    def head(dim: int, hidden: int, bias: float, above: float) -> MLPHead:
        made = [torch.randn(*s, generator=g) for s in ((dim,), (dim,), (hidden, dim), (hidden,), (hidden,))]
        made[1][0] = 0
        return MLPHead(made[0], made[1], made[2] / dim, made[3] + above, made[4] / hidden / 9, bias)  # clips nothing

    heads = [head(13, 9, 0.4, 0.0), head(4, 1, 0.6, 3.0)]
    x = torch.randn(5, 13, generator=g)
    x[3, 0] = float("nan")
    x[4, 1] = torch.copysign(torch.tensor(torch.inf), heads[1].hidden_weight[0, 1] * heads[1].inverse[1])
    which, at = [0, 1, 0, 0, 1], [0.0] * 5
    at[0] = float(difficulty_head_reference(x, heads, which, at).difficulty[0])
    found, wanted = m.difficulty_head_triton(x, heads, which, at), difficulty_head_reference(x, heads, which, at)
    torch.testing.assert_close(found.difficulty, wanted.difficulty, rtol=1e-5, atol=1e-3, equal_nan=True)
    assert found.flags[1:].tolist() == wanted.flags[1:].tolist()
    never = MLPHead(*(torch.zeros(s) for s in ((2,), (2,), (1, 2), (1,), (1,))), 2.0)  # clipped to 100
    assert m.difficulty_head_triton(torch.zeros(1, 2), [never], [0], [100.0]).flags.tolist() == [0]


CASES: dict[str, Callable[[types.ModuleType], None]] = {POOL: pool_cases, CHAIN: chain_cases, HEAD: head_cases}


# ---------------------------------------------------------------------- planting


def planted(name: str, mutant: Mutant | None, folder: Path, number: int) -> types.ModuleType:
    """A copy of a kernel's module and its parts, with a mistake or without, and with small blocks."""
    parts = PARTS.get(name, ())
    texts = {part: (SOURCES / f"{part}.py").read_text() for part in (*parts, name)}
    if mutant is not None:
        times = sum(text.count(mutant.old) for text in texts.values())
        if times != 1:
            raise ValueError(f"{mutant.kind}: {mutant.old!r} is {times} times in {name}")
        texts = {part: text.replace(mutant.old, mutant.new) for part, text in texts.items()}
    for part in parts:
        texts[name] = texts[name].replace(f"from kvroute_kernels.{part} import", f"from {part}_{number} import")
    module = None
    for part, text in texts.items():  # the module itself comes last
        path = folder / f"{part}_{number}.py"
        path.write_text(text)
        spec = importlib.util.spec_from_file_location(path.stem, path)
        assert spec is not None
        assert spec.loader is not None
        module = importlib.util.module_from_spec(spec)
        sys.modules[path.stem] = module
        spec.loader.exec_module(module)
    assert module is not None
    for constant, value in BLOCKS[name].items():
        setattr(module, constant, value)
    return module


def start(name: str, mutant: Mutant | None, folder: Path, number: int) -> int:
    """Run the cases on it in a process of its own, for a mistake may read anywhere; it leaves a file if they
    noticed."""
    child = os.fork()
    if child == 0:
        try:
            torch.manual_seed(0)
            CASES[name](planted(name, mutant, folder, number))
        except BaseException as error:  # an error in the interpreter is a catch, too
            (folder / f"{number}.txt").write_text(f"{type(error).__name__}: {error}".strip().splitlines()[0][:100])
        finally:
            os._exit(0)
    return child


def mutants_of(module: str, half: int | None = None) -> tuple[Mutant, ...]:
    """Those of a module, or every second one of them."""
    found = tuple(m for m in MUTANTS if m.module == module)
    return found if half is None else found[half::2]


def main() -> int:
    """0 if every mutant was caught, and nothing where none was planted. ``--half 0`` and ``--half 1`` take every second
    one."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("modules", nargs="*", default=list(CASES), help="by default all")
    parser.add_argument("--half", type=int, choices=(0, 1))
    asked = parser.parse_args()
    jobs = [(name, mutant) for name in asked.modules for mutant in (None, *mutants_of(name, asked.half))]
    running: dict[int, int] = {}
    caught: dict[int, str | None] = {}
    with tempfile.TemporaryDirectory() as place:
        folder = Path(place)

        def finish() -> None:
            child, status = os.wait()
            number = running.pop(child)
            said = folder / f"{number}.txt"
            noticed = said.read_text() if said.exists() else None
            caught[number] = f"signal {os.WTERMSIG(status)}" if os.WIFSIGNALED(status) else noticed

        for number, (name, mutant) in enumerate(jobs):
            if len(running) == (os.cpu_count() or 1):
                finish()
            running[start(name, mutant, folder, number)] = number
        while running:
            finish()
    lines = [
        {"module": name, "kind": mutant.kind if mutant else "no mutant", "caught": caught[number]}
        for number, (name, mutant) in enumerate(jobs)
    ]
    for line in lines:
        print(line)
    print(json.dumps(lines))
    return 0 if all((line["caught"] is None) == (line["kind"] == "no mutant") for line in lines) else 1


if __name__ == "__main__":
    sys.exit(main())
