"""Routing, embeddings and a self-evaluated answer: what ``make demo`` runs.

First the main job: a dozen questions go through the router of a model that can think (the tiny thinker beside this
file), each with as much thinking as it needs, beside always thinking. Then one real model: it reads a dozen sentences
once, at part of its depth, and shows each one's nearest neighbour; then it answers a question while streaming and
prints the answer's scores, read from the KV cache that wrote it, and their cost.
"""

from __future__ import annotations

import argparse
import random
import sys
import time
from pathlib import Path

import numpy as np
from rich.console import Console
from rich.table import Table

from kvroute import SCORES, KVEmbedder, Router, TransformersEngine
from kvroute.checkers import check

THINKER = Path(__file__).parent / "tiny_thinker"

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


def show_routing(console: Console, count: int, seed: int) -> None:
    """Route some questions through the tiny thinker, beside always thinking, and print both."""
    sys.path.insert(0, str(THINKER))
    from questions import make_question

    rng = random.Random(seed)
    questions = [make_question(rng) for _ in range(count)]
    chats = [[{"role": "user", "content": q.question}] for q in questions]
    engine = TransformersEngine.from_pretrained(THINKER / "model")
    router = Router.load(engine, THINKER / "policy.json")
    router.generate(chats[0], max_tokens=8)  # the first run of a process is slower
    began = time.perf_counter()
    routed = router.generate(chats, max_tokens=192, progress=False)
    seconds = time.perf_counter() - began
    began = time.perf_counter()
    always = router.generate(chats, mode="slow", max_tokens=192, progress=False)
    seconds_slow = time.perf_counter() - began
    table = Table(title=f"{count} questions, {router.policy.kind} policy beside always thinking", title_justify="left")
    table.add_column("question", max_width=18, no_wrap=True)
    for name in ("mode", "d", "tokens", "right", "slow:\ntokens", "right"):
        table.add_column(name, justify="right", no_wrap=True)
    marks = {True: "[green]yes[/green]", False: "[red]no[/red]"}
    sums = [0, 0, 0, 0]
    for q, one, two in zip(questions, routed, always, strict=True):
        right = [check(a.answer, q.answer, "number").correct for a in (one, two)]
        switch = one.decision.switch
        mode = one.decision.mode
        if switch is not None:
            mode = f"{'closed' if switch.to == 'fast' else 'opened'} at {switch.token}"
        tokens = [a.usage.generated for a in (one, two)]
        sums = [a + b for a, b in zip(sums, [tokens[0], right[0], tokens[1], right[1]], strict=True)]
        table.add_row(
            q.question, mode, f"{one.decision.difficulty:.0f}", str(tokens[0]), marks[right[0]], str(tokens[1]),
            marks[right[1]],
        )  # fmt: skip
    table.add_section()
    table.add_row("all", "", "", str(sums[0]), str(sums[1]), str(sums[2]), str(sums[3]))
    console.print(table)
    console.print(
        f"{sums[2] - sums[0]} of {sums[2]} tokens saved ({1 - sums[0] / sums[2]:.0%}), {seconds:.2f} s instead of "
        f"{seconds_slow:.2f} s. The difficulty was read from each prompt's KV cache; no token was computed twice.\n"
    )


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
    parser.add_argument("--questions", type=int, default=12, help="for the router")
    parser.add_argument("--seed", type=int, default=0, help="of the questions")
    arguments = parser.parse_args()
    console = Console()
    show_routing(console, arguments.questions, arguments.seed)
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
