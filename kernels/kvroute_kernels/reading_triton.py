"""Reading numbers of a cache's dtype in a kernel."""

from __future__ import annotations

import torch
import triton
import triton.language as tl

TRITON_DTYPES = {
    torch.float32: tl.float32,
    torch.bfloat16: tl.bfloat16,
    torch.float16: tl.float16,
    torch.float8_e4m3fn: tl.float8e4nv,
    torch.float8_e5m2: tl.float8e5,
}
"""The dtypes that the kernels read."""


def needs_e4m3_bits(device: torch.device) -> bool:
    """Whether the device has no conversion of e4m3, so that a kernel takes the bits apart."""
    return device.type == "cuda" and torch.version.hip is None and torch.cuda.get_device_capability(device) < (8, 9)


def at_most(registers: int) -> dict[str, int]:
    """Compiler option: registers a thread. ptxas otherwise aims at an occupancy of its own and spills to reach it;
    AMD's compiler has no such option and needs none."""
    return {} if torch.version.hip else {"maxnreg": registers}


@triton.jit
def load_numbers(pointers, mask, E4M3_BITS: tl.constexpr):
    """Numbers of the cache in float32; 0 where masked."""
    if (
        E4M3_BITS
    ):  # e4m3 where the hardware has no conversion: as float16 with the exponent's bias 15, which is 2^8 too small
        bits = tl.load(pointers, mask=mask, other=0).to(tl.uint16)
        half = (((bits & 0x7F) << 7) | ((bits & 0x80) << 8)).to(tl.float16, bitcast=True)
        return tl.where((bits & 0x7F) == 0x7F, float("nan"), half.to(tl.float32) * 256.0)
    return tl.load(pointers, mask=mask, other=0.0).to(tl.float32)
