"""What the kernels compile to on sm_80, sm_90, sm_100 and gfx942, and what they read: no GPU is needed.

Registers and spills are ptxas's own report on Triton's PTX (for gfx942 the assembler's); the width of every load from
global memory is read off PTX or assembly. Occupancy is the formula of registers, shared memory and warps. Bytes read
are counted in two ways: from tile and launch (loads of 16 bytes a thread times threads against the numbers of a
tile), and in Triton's interpreter, which notes every address that is loaded. Bytes that locate the cache (tables,
items) are given apart.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import torch

from _harness import exact, figure_table, finish, parse_arguments, table
from _kernels import TARGETS, Launch, compile_launch, launches_of, meta_view

FLOAT8 = (torch.float8_e4m3fn, torch.float8_e5m2)


def cases(quick: bool) -> list[tuple[str, Launch]]:
    """Launches by what they are: every kernel, every dtype, every way it is compiled."""
    found: list[tuple[str, Launch]] = []
    wanted = [(torch.bfloat16, 128, True)]
    if not quick:
        wanted += [(torch.bfloat16, 64, True), (torch.bfloat16, 128, False), (torch.float16, 128, True)]
        wanted += [(dtype, size, True) for dtype in (torch.float32, *FLOAT8) for size in (64, 128)]
    for dtype, size, beside in wanted:
        view = meta_view([600, 3], layers=4, heads=2, size=size, dtype=dtype, beside=beside)
        label = f"{str(dtype).removeprefix('torch.')}, head size {size}{'' if beside else ', any strides'}"
        pool, chain = launches_of("paged_pool", view), launches_of("chain_step", view, start=[500, 2])
        if not found:
            found += [("", pool[1]), ("", chain[1])]
            if not quick:
                weights = [torch.ones(600), torch.ones(3)]
                found.append((f"{label}, weighted", launches_of("paged_pool", view, weights=weights)[0]))
                sums = launches_of("chain_step", view, start=[599, 2], sums=True)
                found.append((f"{label}, with sums", sums[0]))
        found += [(label, pool[0]), (label, chain[0])]
    found += [("", launch) for launch in launches_of("difficulty_head")]
    return found


def tile_bytes(launch: Launch) -> int:
    """Bytes of the cache (of the head's weights) in one tile."""
    c = launch.constants
    if "DTYPE" in c:
        return int(c.get("BLOCK_T", c.get("BLOCK_L")) * c["BLOCK_D"] * c["DTYPE"].primitive_bitwidth // 8)
    return int(c["BLOCK_H"] * c["BLOCK_K"] * 4) if "BLOCK_K" in c else 0


def main() -> None:
    arguments = parse_arguments(__doc__)
    rows, spills, narrow, ratios = [], [], [], []
    for label, launch in cases(arguments.quick):
        vector = bool(launch.constants.get("VECTOR"))
        for target in TARGETS:
            asked = launch
            if target == "sm_80" and "float8_e4m3fn" in label:  # the A100 has no conversion: the bits are taken apart
                import triton.language as tl

                asked = Launch(
                    launch.kernel,
                    launch.grid,
                    launch.arguments,
                    launch.constants | {"DTYPE": tl.uint8, "E4M3_BITS": True},
                    launch.options,
                )
            code = compile_launch(asked, target)
            if code.error:
                rows.append((launch.name, label, target, code.error, "", "", "", "", ""))
                spills.append(-1)
                continue
            spills.append(code.spills)
            size = tile_bytes(asked)
            ratio = ""
            if vector and size:
                read = code.loads[16] * 16 * code.threads
                ratio = f"{read / size:.2f}"
                narrow.append(0 if code.loads[16] else 1)
                if "DTYPE" in asked.constants:
                    ratios.append(read / size)
            widths = ", ".join(f"{n} x {w} B" for w, n in sorted(code.loads.items(), reverse=True))
            rows.append(
                (
                    launch.name,
                    label,
                    target,
                    code.registers,
                    code.spills,
                    code.shared,
                    widths,
                    ratio,
                    f"{code.occupancy:.0%}",
                )
            )
    print(
        table(
            (
                "kernel",
                "variant",
                "target",
                "registers",
                "spill bytes",
                "shared bytes",
                "global loads",
                "tile read / tile",
                "occupancy",
            ),
            rows,
        )
    )
    counted = interpreted()
    print(
        "\nIn the interpreter, by address: "
        + "; ".join(
            f"{k}: {v['read']} bytes of the cache read, {v['needed']} needed, {v['tables']} of tables"
            for k, v in counted.items()
        )
    )
    figures = {
        "compiled": exact(len([s for s in spills if s >= 0]) / len(spills), ">= 1"),
        "spill_bytes_max": exact(max(spills), "<= 0"),
        "variants_without_16_byte_loads": exact(sum(narrow), "<= 0"),
        "tile_read_over_tile": exact(max(ratios), "<= 1"),
        "launches_pooling": exact(counted["paged_pool"]["launches"], "<= 1"),
        "launches_chains": exact(counted["chain_step"]["launches"], "<= 1"),
        **{f"bytes_read_over_needed_{k}": exact(v["read"] / v["needed"], "<= 1") for k, v in counted.items()},
    }
    print("\n" + figure_table(figures))
    finish(
        arguments, name="kernel_codegen", figures=figures, baseline="what is needed", n={"compilations": len(spills)}
    )


def interpreted() -> dict[str, dict[str, Any]]:
    """Bytes and launches of one step of pooling and of chains, all layers, in a process whose kernels are
    interpreted."""
    root = Path(__file__).parents[1]
    paths = [str(root), str(root / "kernels"), *filter(None, [os.environ.get("PYTHONPATH")])]
    environment = os.environ | {"TRITON_INTERPRET": "1", "PYTHONPATH": os.pathsep.join(paths)}
    done = subprocess.run(
        [sys.executable, __file__, "--count"], env=environment, capture_output=True, text=True, check=True
    )
    found: dict[str, dict[str, Any]] = json.loads(done.stdout.splitlines()[-1])
    return found


def count() -> None:
    """What :func:`interpreted` runs."""
    from kvroute_kernels import ChainTensors
    from kvroute_kernels.chain_step_triton import PagedChain
    from kvroute_kernels.paged_pool_triton import PagedPool
    from tests.kernels.caches import bytes_within, random_view, recorded

    cpu = torch.device("cpu")
    view = random_view(
        [70, 33, 1], layers=4, heads=2, size=16, page=16, layout="keys beside values", dtype=torch.bfloat16
    )
    group = view.groups[0]
    token = 4 * 2 * 32 * 2
    found = {}
    pool = PagedPool(cpu)
    pool.stage(view, list(view.layers), [7, 0, 0], [70, 33, 1])
    with recorded() as seen:
        pool.launch()
    found["paged_pool"] = {"needed": (63 + 33 + 1) * token, "launches": pool.launches, "seen": seen}
    state = ChainTensors.empty(3, 64)
    chain = PagedChain(cpu)
    chain.stage(view, [0, 1, 2], [69, 32, 0], [70, 33, 1], list(view.layers), state)
    with recorded() as seen:
        chain.launch(state)
    found["chain_step"] = {"needed": 3 * token, "launches": chain.launches, "seen": seen}
    for counted in found.values():
        everything = sum(len(addresses) * width for addresses, width in counted["seen"])
        counted["read"] = len(bytes_within(counted.pop("seen"), [group.keys]))
        counted["tables"] = everything - counted["read"]
    print(json.dumps(found))


if __name__ == "__main__":
    count() if "--count" in sys.argv else main()
