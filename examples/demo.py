"""Embeddings and a self-evaluated answer from one real model: what ``make demo`` runs.

Reads a dozen sentences once, at part of the model's depth, and shows each one's nearest neighbour; then answers
a question while streaming and prints the answer's scores, read from the KV cache that wrote it, and their cost.
"""

from __future__ import annotations

import argparse
import time

import numpy as np
from rich.console import Console
from rich.table import Table

from kvroute import SCORES, KVEmbedder, TransformersEngine

SENTENCES = [
    "A cat is sleeping on the sofa.",
    "The kitten naps on the couch.",
    "Two dogs are chasing a ball in the park.",
    "Puppies run after a toy on the grass.",
    "The central bank raised interest rates again.",
    "Borrowing money became more expensive this month.",
    "How do I reset my password?",
    "I can't log in to my account any more.",
    "The recipe needs two eggs and some flour.",
    "Whisk the eggs, then add flour and sugar.",
    "The train to the coast leaves at nine.",
    "Our railway journey starts in the morning.",
]
QUESTION = "In one or two sentences: why does ice float on water?"


def show_neighbours(engine: TransformersEngine, console: Console) -> None:
    """Embed the sentences and print who is nearest to whom."""
    embedder = KVEmbedder(engine)
    began = time.perf_counter()
    vectors = embedder.encode(SENTENCES)
    seconds = time.perf_counter() - began
    similarity = embedder.similarity(vectors - vectors.mean(axis=0), vectors - vectors.mean(axis=0))
    np.fill_diagonal(similarity, -1)
    table = Table(title=f"Nearest neighbours ({embedder.dimension} dimensions)", title_justify="left")
    table.add_column("sentence")
    table.add_column("nearest")
    table.add_column("cosine", justify="right")
    for i, sentence in enumerate(SENTENCES):
        j = int(similarity[i].argmax())
        table.add_row(sentence, SENTENCES[j], f"{similarity[i, j]:.2f}")
    console.print(table)
    depth = embedder.spec.deepest_layer(engine.info) + 1
    console.print(
        f"{len(SENTENCES)} sentences in {seconds:.2f} s, {depth} of {engine.info.num_layers} layers run. "
        "Cosines are of mean-free vectors.\n"
    )


def answer(engine: TransformersEngine, console: Console, max_tokens: int) -> None:
    """Answer a question while streaming, then print the answer's scores and what they cost."""
    console.print(f"[bold]{QUESTION}[/bold]")
    chat = [{"role": "user", "content": QUESTION}]
    prompt = chat if engine.tokenizer.chat_template else f"Question: {QUESTION}\nAnswer:"
    generation = None
    for chunk in engine.stream(prompt, features=["kv-coe", "logits"], max_tokens=max_tokens):
        console.print(chunk.text, end="", soft_wrap=True, highlight=False, markup=False)
        generation = chunk.generation or generation
    assert generation is not None
    console.print("\n")
    table = Table(title="Self-evaluation, from the cache that wrote the answer", title_justify="left")
    table.add_column("score")
    table.add_column("value", justify="right")
    table.add_column("what")
    for name, score in generation.scores.items():
        value = f"{score.value:.3f}" if score.value is not None else f"none: {score.reason}"
        table.add_row(name, value, SCORES[name].what)
    console.print(table)
    t, u = generation.timings, generation.usage
    console.print(
        f"{u.prompt} prompt and {u.generated} answer tokens in {t.total:.2f} s, {u.computed} tokens computed; "
        f"scores took {t.features * 1000:.1f} ms of it ({t.features / t.total:.1%}). "
        "They are not calibrated: `kvroute calibrate` turns them into a confidence."
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--model", default="smollm2", help="smollm2, a local folder or a hub id")
    parser.add_argument("--max-tokens", type=int, default=80)
    arguments = parser.parse_args()
    console = Console()
    began = time.perf_counter()
    engine = TransformersEngine.from_pretrained(arguments.model)
    info = engine.info
    console.print(
        f"{info.name}: {info.num_layers} attention layers, {info.layers[0].kv_heads} KV heads of "
        f"{info.layers[0].key_size}, loaded in {time.perf_counter() - began:.1f} s\n"
    )
    show_neighbours(engine, console)
    answer(engine, console, arguments.max_tokens)


if __name__ == "__main__":
    main()
