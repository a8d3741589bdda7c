"""Texts a second at full depth beside sentence-transformers around the same model, the same mixed-length texts.

The peer runs with the batch size that is fastest for it. Our side ends with the keys and values of the last layer: its
attention and MLP are not needed for them.
"""

from __future__ import annotations

import time
from pathlib import Path

import torch

from _harness import Ratio, figure_table, finish, measure, parse_arguments
from _texts import mixed_texts
from kvroute import KVEmbedder, PoolingSpec, TransformersEngine
from kvroute.models import BUNDLED, bundled_path


def main() -> None:
    from sentence_transformers import SentenceTransformer
    from sentence_transformers.sentence_transformer.modules import Pooling, Transformer

    arguments = parse_arguments(__doc__)
    source: str | Path = bundled_path(arguments.model) if arguments.model in BUNDLED else arguments.model
    engine = TransformersEngine.from_pretrained(arguments.model, dtype="float32")
    texts = mixed_texts(10 if arguments.quick else 32, arguments.seed)
    embedder = KVEmbedder(engine, PoolingSpec(layers="all", part="v", heads="concat", layer_reduce="mean"))
    transformer = Transformer(str(source), model_kwargs={"dtype": torch.float32})
    transformer.tokenizer.pad_token = transformer.tokenizer.pad_token or transformer.tokenizer.eos_token
    peer = SentenceTransformer(
        modules=[transformer, Pooling(transformer.get_embedding_dimension(), pooling_mode="mean")], device="cpu"
    )

    def ours() -> object:
        return embedder.encode(texts, progress=False)

    def peer_with(batch_size: int) -> float:
        began = time.perf_counter()
        peer.encode(texts, batch_size=batch_size, show_progress_bar=False)
        return time.perf_counter() - began

    peer_with(8)  # warm up
    batch_size = min((4, 8, 16, 32), key=peer_with)

    def theirs() -> object:
        return peer.encode(texts, batch_size=batch_size, show_progress_bar=False)

    # Time of the peer over our time is our throughput over the peer's.
    rounds = measure(
        {"kvroute": ours, "sentence-transformers": theirs},
        {"embedding_throughput_ratio": Ratio("sentence-transformers", "kvroute", ">= 1.0")},
        seconds=arguments.seconds,
        seed=arguments.seed,
    )
    for side in rounds.seconds:
        print(f"{side}: {len(texts) / rounds.median(side):.1f} texts/s")
    print("\n" + figure_table(rounds.figures))
    finish(
        arguments,
        name="embedding_throughput",
        figures=rounds.figures,
        n={"texts": len(texts)},
        baseline=f"sentence-transformers, mean pooling, batches of {batch_size} (its fastest of 4, 8, 16, 32)",
    )


if __name__ == "__main__":
    main()
