"""Texts a second at full depth beside sentence-transformers around the same model, the same mixed-length texts."""

from __future__ import annotations

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
    texts = mixed_texts(24 if arguments.quick else 128, arguments.seed)
    embedder = KVEmbedder(engine, PoolingSpec(layers="all", part="v", heads="concat", layer_reduce="mean"))
    transformer = Transformer(str(source), model_kwargs={"dtype": torch.float32})
    transformer.tokenizer.pad_token = transformer.tokenizer.pad_token or transformer.tokenizer.eos_token
    peer = SentenceTransformer(
        modules=[transformer, Pooling(transformer.get_embedding_dimension(), pooling_mode="mean")], device="cpu"
    )

    def ours() -> object:
        return embedder.encode(texts, progress=False)

    def theirs() -> object:
        return peer.encode(texts, batch_size=32, show_progress_bar=False)

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
        baseline="sentence-transformers, mean pooling, batches of 32",
    )


if __name__ == "__main__":
    main()
