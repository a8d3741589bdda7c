"""On paper: what pooling and the chain step cost beside the model's own decode step, on four cards.

Time of a kernel: launches * launch time + max(bytes / bandwidth, waves of programs * the time of one). Time of one
program is a chain of loads that wait for each other, counted from the kernel's loops, each `LATENCY` long. Bytes:
keys and values that are asked for, once (as `kernel_codegen.py` counts), with tables and partial rows. Time of a
decode step: weights once, and the keys and values of all requests once, at the same bandwidth; so it is a lower bound
of what a server needs, and shares are upper bounds. A prompt is pooled in the step that computed its last tokens, so
its share of its own prefill is given, too. Nothing here was measured on a card.

Cases: pooling one prompt of that length; pooling those of all requests at once (a server admits far fewer in a step);
pooling the last 64 tokens of every request (a checkpoint); the chain step with its sums by layer, for every request.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch

from _harness import Figure, exact, figure_table, finish, parse_arguments, table
from _kernels import Launch, compile_launch, launches_of, meta_view


@dataclass(frozen=True)
class Card:
    """Bytes a second of memory, multiprocessors, target of the compiler, bytes of memory, dense bfloat16 operations a
    second."""

    bandwidth: float
    units: int
    target: str
    memory: float
    peak: float


@dataclass(frozen=True)
class Model:
    """Parameters, attention layers, KV heads, head size; bfloat16."""

    parameters: float
    layers: int
    heads: int
    size: int

    @property
    def token(self) -> int:
        """Bytes of a token's keys and values in all layers."""
        return self.layers * self.heads * self.size * 2 * 2


CARDS = {
    "A100": Card(2.04e12, 108, "sm_80", 80e9, 312e12),
    "H100": Card(3.35e12, 132, "sm_90", 80e9, 989e12),
    "B200": Card(8.0e12, 148, "sm_100", 180e9, 2250e12),
    "MI300X": Card(5.3e12, 304, "gfx942", 192e9, 1307e12),
}
"""From the makers' data sheets: memory bandwidth, SMs or CUs, memory, dense bfloat16 (A100 and H100: SXM, 80 GB)."""
MODELS = {"Llama-3.1-8B": Model(8.03e9, 32, 8, 128), "Qwen3-32B": Model(32.8e9, 64, 8, 128)}
EFFICIENCY = 0.9
"""Of the bandwidth that a kernel or a step reaches."""
LAUNCH, LATENCY = 4e-6, 0.8e-6
"""Seconds of a launch (host side and start), and of a load that waits for memory."""


def occupancy(launch: Launch, card: Card) -> int:
    """Programs that a multiprocessor holds at once."""
    code = compile_launch(launch, card.target)
    if code.error:
        raise RuntimeError(f"{launch.name} does not compile for {card.target}: {code.error}")
    most = 64 * 32 if card.target.startswith("sm_") else 32 * 64
    return max(1, round(code.occupancy * most / code.threads))


def seconds(card: Card, launches: int, bytes_read: float, programs: int, resident: int, waits: int) -> float:
    """Time of a kernel with so many programs, each a chain of ``waits`` loads."""
    waves = math.ceil(programs / (card.units * resident))
    return launches * LAUNCH + max(bytes_read / (card.bandwidth * EFFICIENCY), waves * waits * LATENCY)


def pooling(card: Card, model: Model, resident: int, requests: int, tokens: int, layers: int) -> float:
    """Pool ``tokens`` of each request, keys and values of ``layers`` layers."""
    from kvroute_kernels.paged_pool_triton import SPLIT

    runs = math.ceil(tokens / SPLIT)
    data = requests * tokens * model.token * layers / model.layers
    rows = requests * (runs if runs > 1 else 0) * model.heads * model.size * 2 * layers * 4
    programs = requests * runs * layers * 2 * model.heads
    waits = 4 + 2 * math.ceil(min(tokens, SPLIT) / 32)  # items, plane, table; then page and numbers of each tile
    return seconds(card, 1 + (runs > 1), data + 2 * rows + programs * 200, programs, resident, waits)


def chains(card: Card, model: Model, resident: int, requests: int) -> float:
    """The chain step of one new token of each request, with its sums by layer, which are written in float32."""
    width = model.heads * model.size * 2
    data = requests * (model.token + width * 4 * 3 + model.layers * width * 4)
    pieces = 2 * model.heads * math.ceil(model.layers / 32)
    return seconds(card, 1, data, requests, resident, 4 + 3 * pieces)


def prefill(card: Card, model: Model, tokens: int) -> float:
    """A prompt's own prefill, at half of the card's dense bfloat16 peak, attention left out."""
    return 2 * model.parameters * tokens / (card.peak / 2)


def decode(card: Card, model: Model, requests: int, tokens: int) -> float:
    """The model's own decode step."""
    return (model.parameters * 2 + requests * tokens * model.token) / (card.bandwidth * EFFICIENCY)


def main() -> None:
    arguments = parse_arguments(__doc__)
    batches = (1, 8, 64, 512)
    lengths = (1024, 8192, 32768, 131072)
    view = meta_view([600], layers=32, heads=8, size=128, dtype=torch.bfloat16)
    pool_launch, chain_launch = launches_of("paged_pool", view)[0], launches_of("chain_step", view)[0]
    rows = []
    figures: dict[str, Figure] = {}
    for card_name in ("H100",) if arguments.quick else CARDS:
        card = CARDS[card_name]
        pool_at, chain_at = occupancy(pool_launch, card), occupancy(chain_launch, card)
        for model_name, model in MODELS.items():
            worst = {"prompt": 0.0, "prompt_of_prefill": 0.0, "checkpoint": 0.0, "chains": 0.0}
            for requests in batches:
                for tokens in lengths:
                    fits = model.parameters * 2 + requests * tokens * model.token <= card.memory
                    step = decode(card, model, requests, tokens)
                    one = pooling(card, model, pool_at, 1, tokens, 4)
                    every = pooling(card, model, pool_at, requests, tokens, 4)
                    window = pooling(card, model, pool_at, requests, 64, 4)
                    chain = chains(card, model, chain_at, requests)
                    shares = [x / step for x in (one, every, window, chain)]
                    rows.append(
                        (
                            card_name,
                            model_name,
                            requests,
                            f"{tokens // 1024}k",
                            f"{step * 1e3:.2f}{'' if fits else ' *'}",
                            f"{one / prefill(card, model, tokens):.3%}",
                            *(
                                f"{x * 1e6:.0f} ({share:.2%}){' >1 %' if share > 0.01 else ''}"
                                for x, share in zip((one, every, window, chain), shares, strict=True)
                            ),
                        )
                    )
                    if fits:
                        worst = {
                            "prompt": max(worst["prompt"], shares[0]),
                            "prompt_of_prefill": max(worst["prompt_of_prefill"], one / prefill(card, model, tokens)),
                            "checkpoint": max(worst["checkpoint"], shares[2]),
                            "chains": max(worst["chains"], shares[3]),
                        }
            for name, share in worst.items():
                figures[f"share_{name}_{card_name}_{model_name}"] = exact(round(share, 5), None)
    print(
        table(
            (
                "card",
                "model",
                "requests",
                "tokens each",
                "decode step, ms",
                "one prompt / its prefill",
                "pool one prompt, us (share)",
                "pool every prompt",
                "pool 64 tokens of each",
                "chains, every step",
            ),
            rows,
        )
    )
    print(
        "\n`*`: more than one card's memory holds. Pooling reads 4 layers, keys and values; chains read all layers.\n"
    )
    print(figure_table(figures))
    finish(
        arguments,
        name="kernel_roofline",
        figures=figures,
        baseline="the model's decode step at the same bandwidth",
        n={"cases": len(rows)},
    )


if __name__ == "__main__":
    main()
