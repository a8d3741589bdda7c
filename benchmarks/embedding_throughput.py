"""Texts a second at full depth beside sentence-transformers around the same model, the same mixed-length texts."""

from __future__ import annotations

from pathlib import Path

import torch

from _harness import finish, start
from _texts import mixed_texts
from kvroute import KVEmbedder, PoolingSpec, TransformersEngine
from kvroute.models import BUNDLED, bundled_path


def main() -> None:
    from sentence_transformers import SentenceTransformer
    from sentence_transformers.models import Pooling, Transformer

    arguments, bench = start("embedding_throughput", __doc__)
    source: str | Path = bundled_path(arguments.model) if arguments.model in BUNDLED else arguments.model
    engine = TransformersEngine.from_pretrained(arguments.model, dtype="float32")
    texts = mixed_texts(24 if arguments.quick else 128, arguments.seed)
    embedder = KVEmbedder(engine, PoolingSpec(layers="all", part="v", heads="concat", layer_reduce="mean"))
    transformer = Transformer(str(source), model_args={"dtype": torch.float32})
    transformer.tokenizer.pad_token = transformer.tokenizer.pad_token or transformer.tokenizer.eos_token
    peer = SentenceTransformer(
        modules=[transformer, Pooling(transformer.get_word_embedding_dimension(), pooling_mode="mean")], device="cpu"
    )

    def ours() -> object:
        return embedder.encode(texts, progress=False)

    def theirs() -> object:
        return peer.encode(texts, batch_size=32, show_progress_bar=False)

    # Time of the peer over our time is our throughput over the peer's.
    bench.ratio(
        "embedding_throughput_ratio", theirs, ours, must=">= 1.0", note="texts/s, kvroute / sentence-transformers"
    )
    print(bench.table())
    finish(
        arguments,
        name=bench.name,
        figures=bench.figures,
        n={"texts": len(texts)},
        baseline="sentence-transformers, mean pooling, batches of 32",
    )


if __name__ == "__main__":
    main()
