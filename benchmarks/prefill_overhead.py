"""Prefill with features / prefill alone, both at full depth on the same model, texts of 256 and 1,024 tokens.

The baseline runs the model with the engine's own cache, which is the faster one; the time of transformers' DynamicCache
is given beside it. Features: the default embedding, every layer's keys and values, both chains.

Features are read from the cache once it is there, so the time of one call splits into prefill and features; the figures
compare the whole with its first part, which a busy machine disturbs alike. `_apart` compares calls with and without
features, `_to_stock` calls with features and transformers' own prefill: both are blurred by the noise between calls.
"""

from __future__ import annotations

import time
from collections.abc import Callable

import torch

from _harness import Figure, Ratio, Side, figure_table, finish, measure, parse_arguments, summarise
from _texts import token_rows
from kvroute import ChainSpec, ChainState, PoolingSpec, TransformersEngine, pool
from kvroute.engines.slab import SlabCache
from kvroute_kernels import KVView


def main() -> None:
    arguments = parse_arguments(__doc__)
    figures: dict[str, Figure] = {}
    engine = TransformersEngine.from_pretrained(arguments.model, dtype="float32")
    model, layers = engine.model, engine.info.num_layers
    every = PoolingSpec(layers="all", part="kv", heads="concat", layer_reduce="concat")
    default = PoolingSpec.preset("best")
    lengths = (64,) if arguments.quick else (256, 1024)
    for length in lengths:
        ids = torch.tensor(token_rows(1, length, engine.info.vocab_size, arguments.seed))
        weights = [engine.sif_weights(default.sif_a)[ids[0]]]

        @torch.inference_mode()
        def prefill(ids: torch.Tensor = ids, length: int = length) -> KVView:
            cache = SlabCache(model.config, capacity=length)
            model(input_ids=ids, past_key_values=cache, use_cache=True, logits_to_keep=1)
            return cache.view(torch.tensor([length]))

        @torch.inference_mode()
        def stock(ids: torch.Tensor = ids) -> None:
            model(input_ids=ids, use_cache=True, logits_to_keep=1)

        def chains(view: KVView, length: int = length) -> None:
            state = ChainState(1, ChainSpec(), layers)
            state.update_view(view, [0], [0], [length])
            state.scores()

        features: dict[str, Callable[[KVView], object]] = {
            "embedding": lambda view, w=weights: pool(view, default, num_layers=layers, sif_weights=w),  # type: ignore[misc]
            "all_layers": lambda view: pool(view, every, num_layers=layers),
            "chains": chains,
        }
        within: dict[str, list[float]] = {name: [] for name in features}
        sides: dict[str, Side] = {"plain": prefill, "stock": stock}
        ratios = {}
        for name, feature in features.items():

            def with_feature(feature: Callable[[KVView], object] = feature, noted: list[float] = within[name]) -> None:
                with torch.inference_mode():
                    began = time.perf_counter()
                    view = prefill()
                    prefilled = time.perf_counter()
                    feature(view)
                    noted.append((time.perf_counter() - began) / (prefilled - began))

            sides[name] = with_feature
            ratios[f"prefill_ratio_{name}_{length}_apart"] = Ratio(name, "plain")
            ratios[f"prefill_ratio_{name}_{length}_to_stock"] = Ratio(name, "stock")
        rounds = measure(sides, ratios, seconds=arguments.seconds * length / sum(lengths), seed=arguments.seed)
        for name, values in within.items():
            figures[f"prefill_ratio_{name}_{length}"] = summarise(values[1:], "<= 1.02", seed=arguments.seed)
        figures |= rounds.figures
    print(figure_table(figures))
    finish(
        arguments,
        name="prefill_overhead",
        figures=figures,
        n={"texts": 1},
        baseline="the same prefill without features",
    )


if __name__ == "__main__":
    main()
