"""Extra bytes a sequence that features keep while an answer is written, at 512, 2,048 and 8,192 tokens.

Counted are all tensors that are alive beyond those of the plain engine; C's 8 bytes a token are given apart. Flat means
that the longest answer keeps what the shortest does.
"""

from __future__ import annotations

import gc

import torch

from _harness import Figure, exact, figure_table, finish, parse_arguments
from kvroute import ChainSpec, ChainState, TransformersEngine
from kvroute_kernels import KVView


def live_bytes() -> int:
    """Bytes of the storages of all tensors that are alive."""
    gc.collect()
    storages = {}
    for thing in gc.get_objects():
        if type(thing) is torch.Tensor:
            storage = thing.untyped_storage()
            storages[storage.data_ptr()] = storage.nbytes()
    return sum(storages.values())


def measure(engine: TransformersEngine, tokens: int) -> tuple[int, int, int]:
    """(tensor bytes beyond the cache, the state's own count of its flat part, of C's part) after ``tokens`` tokens."""
    info = engine.info
    heads, key_size, value_size = info.layers[0].sizes
    generator = torch.Generator().manual_seed(tokens)
    before = live_bytes()
    state = ChainState(1, ChainSpec(), info.num_layers)
    step = 32
    for start_token in range(0, tokens, step):
        keys = torch.randn(info.num_layers, 1, heads, step, key_size, generator=generator)
        values = torch.randn(info.num_layers, 1, heads, step, value_size, generator=generator)
        view = KVView.from_contiguous(keys, values, [step])
        state.update_view(view, [0], [0], [step], position=start_token)
        del keys, values, view
    extra = live_bytes() - before
    flat, per_token = state.nbytes
    state.scores()
    return extra, flat, per_token


def main() -> None:
    arguments = parse_arguments(__doc__)
    figures: dict[str, Figure] = {}
    engine = TransformersEngine.from_pretrained(arguments.model, dtype="float32")
    lengths = (64, 256) if arguments.quick else (512, 2048, 8192)
    measured = {length: measure(engine, length) for length in lengths}
    shortest = measured[lengths[0]]
    print("| tokens | tensors alive, C's 8 bytes a token apart | state's own count | C's part |")
    print("| --- | --- | --- | --- |")
    for length, (extra, flat, per_token) in measured.items():
        print(f"| {length} | {extra - per_token} | {flat} | {per_token} |")
    for length in lengths[1:]:
        extra, flat, per_token = measured[length]
        ratio = (extra - per_token) / (shortest[0] - shortest[2])
        figures[f"memory_ratio_{length}_to_{lengths[0]}"] = exact(ratio, "<= 1.0")
        figures[f"bytes_a_token_{length}"] = exact(per_token / length, "<= 8.0")
    print("\n" + figure_table(figures))
    finish(
        arguments,
        name="memory",
        figures=figures,
        n={"bytes": {str(k): v[0] - v[2] for k, v in measured.items()}},
        baseline="the shortest answer",
    )


if __name__ == "__main__":
    main()
