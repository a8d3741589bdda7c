"""One step of the online chains, in Triton: the kernels, which ``chain_step_triton.py`` launches.

Maths: ``z_t`` = mean over layers of the concatenation over heads of keys, then values, at token t. For every new token
``m_t = |z_t - z_{t-1}|``, ``a_t = angle(z_t, z_{t-1})``; the state takes z_0, the newest z and the sums of m and a
(arXiv 2601.20326; arXiv 2410.13640, section 3). The squared lengths are added up in float64 from z in float32, and the
angle follows from the three sides of the triangle (0, z_{t-1}, z_t) by Kahan's formula, which keeps its digits
where an arc cosine loses them; so z is read once and never divided by its length.

Grid: one program an item, a run of at most RUN new tokens of one sequence, counted from the call's own start. It goes
through the vector in pieces of BLOCK_D numbers: a tile ``[BLOCK_L, BLOCK_D]`` holds the layers of one token, so that
one launch reads the newest keys and values of all layers and requests, each number once, and updates all states.

More than RUN new tokens (a prompt's chunk): each run leaves its first and its last z, and a second launch takes the
steps between runs and sums in the runs' order. No atomics; the same bits on every run and in every batch.

Memory: 32 bytes a new token; for runs that are joined 2 F float32 each.
"""

from __future__ import annotations

import triton
import triton.language as tl

from kvroute_kernels.reading_triton import load_numbers


@triton.jit
def reciprocal(x):
    """1 / x in float64 for x in float32's range, without the call that a float64 division is (it spills registers)."""
    y = (1.0 / x.to(tl.float32)).to(tl.float64)
    y = y * (2.0 - x * y)
    return y * (2.0 - x * y)


@triton.jit
def square_root(x):
    """Of x >= 0 in float64; 0 below float32's range, infinity above it."""
    narrow = x.to(tl.float32)
    usable = (narrow > 1e-37) & (narrow < float("inf"))
    safe = tl.where(usable, x, 1.0)
    y = tl.rsqrt(safe.to(tl.float32)).to(tl.float64)
    y = y * (1.5 - 0.5 * safe * y * y)
    y = y * (1.5 - 0.5 * safe * y * y)
    return tl.where(usable, safe * y, tl.where(narrow <= 1e-37, 0.0, narrow.to(tl.float64)))


@triton.jit
def atan_of_unit(x):
    """Arc tangent of x in [0, 1] in float64 (Cephes: a rational function after reduction to [-0.21, 0.66])."""
    large = x > 0.66
    reduced = tl.where(large, (x - 1.0) * reciprocal(x + 1.0), x)
    z = reduced * reduced
    p = -8.750608600031904122785e-1 * z - 1.615753718733365076637e1
    p = p * z - 7.500855792314704667340e1
    p = p * z - 1.228866684490136173410e2
    p = p * z - 6.485021904942025371773e1
    q = z + 2.485846490142306297962e1
    q = q * z + 1.650270098316988542046e2
    q = q * z + 4.328810604912902668951e2
    q = q * z + 4.853903996359136964868e2
    q = q * z + 1.945506571482613964425e2
    return tl.where(large, 0.785398163397448309616, 0.0) + (reduced * (z * p * reciprocal(q)) + reduced)


@triton.jit
def angle_of_sides(before, after, between):
    """Angle at 0 of the triangle with the sides |z_{t-1}|, |z_t|, |z_t - z_{t-1}|, by Kahan's formula for
    tan^2(angle / 2); the first two are > 0."""
    longest = tl.maximum(before, after)
    scale = reciprocal(tl.where(longest > 0.0, longest, 1.0))  # an angle has no size
    a = longest * scale
    b = tl.minimum(before, after) * scale
    c = tl.minimum(between * scale, a + b)
    inner = tl.maximum(tl.where(b >= c, c - (a - b), b - (a - c)), 0.0)
    sine = tl.maximum((a - b) + c, 0.0) * inner  # together they are 4 a b
    cosine = (a + (b + c)) * tl.maximum((a - c) + b, 0.0)
    wide = sine > cosine
    below = tl.where(wide, sine, cosine)
    tangent = square_root(tl.where(wide, cosine, sine) * reciprocal(tl.where(below > 1e-37, below, 1.0)))
    half = atan_of_unit(tl.minimum(tangent, 1.0))
    return 2.0 * tl.where(wide, 1.57079632679489661923 - half, half)


@triton.jit
def step_of_squares(before, after, between):
    """Length and angle of a step from squared sides, and whether the angle is undefined (then it is 0)."""
    magnitude = square_root(between)
    side = square_root(before)
    other = square_root(after)
    angle = angle_of_sides(side, other, magnitude)
    undefined = (side == 0.0) | (other == 0.0) | (angle != angle)
    return magnitude, tl.where(undefined, 0.0, angle), undefined


@triton.jit(
    do_not_specialize=["layers", "heads", "key_chunks", "value_chunks", "width"],
    do_not_specialize_on_alignment=[
        "planes",
        "scales",
        "items",
        "first",
        "last",
        "count",
        "magnitudes",
        "angles",
        "degenerate",
        "steps",
        "ends",
        "partial",
        "sums",
    ],
)
def chain_step_kernel(
    planes,  # [2 * layers, 16] int64, keys of all layers, then values; see planes.py
    scales,  # [2 * layers] float32
    items,  # [items, 7] int64: sequence, state, first token, tokens, first step, run of its sequence, row of ends or -1
    first,  # [states, width] float32, z_0
    last,  # [states, width] float32, the newest z
    count,  # [states] int64
    magnitudes,  # [states] float64
    angles,  # [states] float64
    degenerate,  # [states] bool
    steps,  # [tokens, 4] float64: magnitude, angle, squared magnitude, squared norm
    ends,  # [rows, 2, width] float32: first and last z of a run that is joined
    partial,  # [rows, 3] float64: sums of its magnitudes and angles, undefined angles
    sums,  # [sequences, layers, width] float32: by layer the sums over the new tokens of sequences of one run
    layers,
    heads,
    key_chunks,  # of BLOCK_D entries a head of keys
    value_chunks,
    width,  # numbers of z: heads * (key size + value size)
    DTYPE: tl.constexpr,
    E4M3_BITS: tl.constexpr,
    VECTOR: tl.constexpr,
    SUMS: tl.constexpr,  # whether sums are wanted
    BLOCK_L: tl.constexpr,
    BLOCK_D: tl.constexpr,
    RUN: tl.constexpr,
):
    item = items + tl.program_id(0).to(tl.int64) * 7
    sequence = tl.load(item)
    if sequence >= 0:
        state = tl.load(item + 1)
        begin = tl.load(item + 2)
        tokens = tl.load(item + 3)
        run = tl.load(item + 5)
        joined = tl.load(item + 6)
        seen = tl.load(count + state)
        fresh = (seen == 0) & (run == 0)  # the first token begins the chain
        known = (seen != 0) & (run == 0)  # the state holds the token before
        place = tl.arange(0, RUN)
        moved = tl.zeros([RUN], tl.float64)
        norms = tl.zeros([RUN], tl.float64)
        norms_before = tl.zeros([RUN], tl.float64)
        if VECTOR:
            width = tl.multiple_of(width, 128 // DTYPE.primitive_bitwidth)
            sums = tl.multiple_of(sums, 16)
        key_size = tl.load(planes + 5)
        value_size = tl.load(planes + layers * 16 + 5)
        for piece in range(0, heads * (key_chunks + value_chunks)):
            is_values = piece >= heads * key_chunks
            at = tl.where(is_values, piece - heads * key_chunks, piece)
            chunks = tl.where(is_values, value_chunks, key_chunks)
            size = tl.where(is_values, value_size, key_size)
            head = at // chunks
            if VECTOR:
                step: tl.constexpr = 128 // DTYPE.primitive_bitwidth
                size = tl.multiple_of(size, step)
            entry = (at % chunks) * BLOCK_D + tl.arange(0, BLOCK_D)
            inside = entry < size
            end_size = tl.where(joined >= 0, size, 0)
            number = tl.where(is_values, heads * key_size, 0) + head * size + entry
            old = tl.load(last + state * width + number, mask=entry < tl.where(known, size, 0), other=0.0)
            for j in range(0, tokens):
                total = tl.zeros([BLOCK_D], tl.float32)
                for low in range(0, layers, BLOCK_L):
                    layer = low + tl.arange(0, BLOCK_L)
                    real = layer < layers
                    plane_at = tl.where(is_values, layers, 0) + layer
                    plane = planes + plane_at * 16
                    base = tl.load(plane, mask=real, other=0).to(tl.pointer_type(DTYPE))
                    page_stride = tl.load(plane + 1, mask=real, other=0)
                    head_stride = tl.load(plane + 2, mask=real, other=0)
                    token_stride = tl.load(plane + 3, mask=real, other=0)
                    entry_stride = tl.load(plane + 4, mask=real, other=0)
                    page_size = tl.load(plane + 6, mask=real, other=1).to(tl.int32)
                    num_pages = tl.load(plane + 7, mask=real, other=0)
                    table = tl.load(plane + 8, mask=real, other=0).to(tl.pointer_type(tl.int64))
                    table += sequence * tl.load(plane + 9, mask=real, other=0)
                    table_columns = tl.load(plane + 10, mask=real, other=0)
                    offsets = tl.load(plane + 11, mask=real, other=0).to(tl.pointer_type(tl.int64))
                    scale = tl.load(scales + plane_at, mask=real, other=0.0)
                    slot = (begin + j + tl.load(offsets + sequence, mask=real, other=0)).to(tl.int32)
                    column = slot // page_size
                    held = real & (slot >= 0) & (column < table_columns)
                    page = tl.load(table + column, mask=held, other=-1)
                    held = held & (page >= 0) & (page < num_pages)
                    token_in_page = (slot - column * page_size).to(tl.int64)
                    start = page * page_stride + head * head_stride + token_in_page * token_stride
                    if VECTOR:
                        rows = tl.multiple_of(base, [16]) + tl.multiple_of(start, [step])
                        pointers = rows[:, None] + entry[None, :]
                    else:
                        pointers = (base + start)[:, None] + entry[None, :] * entry_stride[:, None]
                    x = load_numbers(pointers, held[:, None] & inside[None, :], E4M3_BITS)
                    x = tl.where((real & (held == 0))[:, None], float("nan"), x * scale[:, None])
                    total += tl.sum(x, axis=0)
                    if SUMS:
                        summed = tl.where(joined < 0, layers, 0)
                        at_sum = sums + (sequence * layers + layer)[:, None] * width + number[None, :]
                        again = (layer < tl.where(j > 0, summed, 0))[:, None] & inside[None, :]
                        tl.debug_barrier()  # what the token before wrote
                        x += tl.load(at_sum, mask=again, other=0.0)
                        tl.store(at_sum, x, mask=(layer < summed)[:, None] & inside[None, :])
                z = tl.where(inside, total / layers.to(tl.float32), 0.0)
                wide = z.to(tl.float64)
                wide_old = old.to(tl.float64)
                move = wide - wide_old
                here = place == j
                norms += tl.where(here, tl.sum(wide * wide, axis=0), 0.0)
                norms_before += tl.where(here, tl.sum(wide_old * wide_old, axis=0), 0.0)
                moved += tl.where(here, tl.sum(move * move, axis=0), 0.0)
                if j == 0:
                    tl.store(first + state * width + number, z, mask=entry < tl.where(fresh, size, 0))
                    tl.store(ends + joined * 2 * width + number, z, mask=entry < end_size)
                old = z
            tl.debug_barrier()  # all have read the old z before anyone writes the new one
            tl.store(last + state * width + number, old, mask=entry < size - end_size)
            tl.store(ends + (joined * 2 + 1) * width + number, old, mask=entry < end_size)
        real_step = (place < tokens) & (place >= tl.where(known, 0, 1))
        moved = tl.where(real_step, moved, 0.0)
        magnitude, angle, undefined = step_of_squares(norms_before, norms, moved)
        angle = tl.where(real_step, angle, 0.0)
        undefined = (undefined & real_step).to(tl.int32)
        row = steps + (tl.load(item + 4) + place) * 4
        live = place < tokens
        tl.store(row, magnitude, mask=live)
        tl.store(row + 1, angle, mask=live)
        tl.store(row + 2, moved, mask=live)
        tl.store(row + 3, norms, mask=live)
        magnitude_sum = tl.sum(magnitude, axis=0)
        angle_sum = tl.sum(angle, axis=0)
        faults = tl.sum(undefined, axis=0)
        if joined < 0:
            old_count = tl.load(count + state)
            old_magnitude = tl.load(magnitudes + state)
            old_angle = tl.load(angles + state)
            old_fault = tl.load(degenerate + state).to(tl.int32)
            tl.debug_barrier()
            tl.store(count + state, old_count + tokens)
            tl.store(magnitudes + state, old_magnitude + magnitude_sum)
            tl.store(angles + state, old_angle + angle_sum)
            tl.store(degenerate + state, (old_fault + faults) > 0)
        else:
            tl.store(partial + joined * 3, magnitude_sum)
            tl.store(partial + joined * 3 + 1, angle_sum)
            tl.store(partial + joined * 3 + 2, faults.to(tl.float64))


@triton.jit(
    do_not_specialize=["width"],
    do_not_specialize_on_alignment=[
        "joins",
        "last",
        "count",
        "magnitudes",
        "angles",
        "degenerate",
        "steps",
        "ends",
        "partial",
    ],
)
def chain_step_join_kernel(
    joins,  # [joins, 5] int64: state, first row of ends, runs, tokens, first step; 0 runs: nothing to do
    last,  # [states, width] float32
    count,  # [states] int64
    magnitudes,  # [states] float64
    angles,  # [states] float64
    degenerate,  # [states] bool
    steps,  # [tokens, 4] float64
    ends,  # [rows, 2, width] float32
    partial,  # [rows, 3] float64
    width,
    BLOCK_F: tl.constexpr,
    RUN: tl.constexpr,
):
    join = joins + tl.program_id(0).to(tl.int64) * 5
    state = tl.load(join)
    row = tl.load(join + 1)
    runs = tl.load(join + 2)
    if runs > 0:
        step = tl.load(join + 4)
        magnitude_sum = tl.load(partial + row * 3)
        angle_sum = tl.load(partial + row * 3 + 1)
        faults = tl.load(partial + row * 3 + 2)
        for run in range(1, runs):
            before = ends + ((row + run - 1) * 2 + 1) * width
            after = ends + (row + run) * 2 * width
            moved = tl.zeros([BLOCK_F], tl.float64)
            norms_before = tl.zeros([BLOCK_F], tl.float64)
            norms = tl.zeros([BLOCK_F], tl.float64)
            for low in range(0, width, BLOCK_F):
                number = low + tl.arange(0, BLOCK_F)
                inside = number < width
                x = tl.load(before + number, mask=inside, other=0.0).to(tl.float64)
                y = tl.load(after + number, mask=inside, other=0.0).to(tl.float64)
                moved += (y - x) * (y - x)
                norms_before += x * x
                norms += y * y
            square = tl.sum(moved, axis=0)
            magnitude, angle, undefined = step_of_squares(tl.sum(norms_before, axis=0), tl.sum(norms, axis=0), square)
            at = steps + (step + run * RUN) * 4
            tl.store(at, magnitude)
            tl.store(at + 1, angle)
            tl.store(at + 2, square)
            magnitude_sum += magnitude + tl.load(partial + (row + run) * 3)
            angle_sum += angle + tl.load(partial + (row + run) * 3 + 1)
            faults += undefined.to(tl.float64) + tl.load(partial + (row + run) * 3 + 2)
        for low in range(0, width, BLOCK_F):
            number = low + tl.arange(0, BLOCK_F)
            inside = number < width
            newest = tl.load(ends + ((row + runs - 1) * 2 + 1) * width + number, mask=inside, other=0.0)
            tl.store(last + state * width + number, newest, mask=inside)
        old_count = tl.load(count + state)
        old_magnitude = tl.load(magnitudes + state)
        old_angle = tl.load(angles + state)
        old_fault = tl.load(degenerate + state).to(tl.int32)
        tl.debug_barrier()
        tl.store(count + state, old_count + tl.load(join + 3))
        tl.store(magnitudes + state, old_magnitude + magnitude_sum)
        tl.store(angles + state, old_angle + angle_sum)
        tl.store(degenerate + state, (old_fault > 0) | (faults > 0.0))
