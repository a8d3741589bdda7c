"""``kvroute ask``: one answer, streamed, and what its cache says of it."""

from __future__ import annotations

import sys
from dataclasses import asdict
from typing import Annotated, Any

import typer

from kvroute.cli.common import Device, Dtype, EngineName, Head, Json, Model, load_calibrator, load_engine, print_json
from kvroute.errors import InvalidInputError
from kvroute.rows import read_text


def command(
    question: Annotated[str, typer.Argument(help="The question, or - for standard input.")],
    model: Model = "smollm2",
    system: Annotated[str | None, typer.Option(help="A system message.")] = None,
    raw: Annotated[bool, typer.Option("--raw", help="Continue the text as it stands, without chat template.")] = False,
    max_tokens: Annotated[int, typer.Option(help="At most so many tokens.")] = 256,
    temperature: Annotated[float, typer.Option(help="0 takes the likeliest token.")] = 0.0,
    top_p: Annotated[float, typer.Option(help="Sample from the likeliest tokens with this much probability.")] = 1.0,
    seed: Annotated[int | None, typer.Option(help="Fixes the sampling.")] = None,
    scores: Annotated[bool, typer.Option("--scores/--no-scores", help="Whether to score the answer.")] = True,
    calibrator: Annotated[str | None, typer.Option(help="A calibrator's name or file, for a confidence.")] = None,
    head: Head = None,
    dtype: Dtype = "auto",
    device: Device = None,
    engine_name: EngineName = "transformers",
    as_json: Json = False,
) -> None:
    """Answer a question while streaming, then show the answer's scores and what they cost."""
    from kvroute import SCORES, SelfEvaluator

    text = read_text("-", sys.stdin.buffer).rstrip("\n") if question == "-" else question
    if raw and system is not None:
        raise InvalidInputError("--raw has no chat, so it takes no --system.")
    engine = load_engine(model, dtype, device, engine_name)
    messages = ([{"role": "system", "content": system}] if system else []) + [{"role": "user", "content": text}]
    prompt: Any = text if raw else messages
    evaluator = SelfEvaluator(engine, calibrator=load_calibrator(calibrator, engine.info), head=head)
    generation = None
    for chunk in engine.stream(
        prompt,
        features=evaluator.features if scores else None,
        max_tokens=max_tokens,
        temperature=temperature,
        top_p=top_p,
        seed=seed,
    ):
        if not as_json:
            sys.stdout.write(chunk.text)
            sys.stdout.flush()
        generation = chunk.generation or generation
    assert generation is not None
    confidence, reason = evaluator.confidence(generation) if scores else (None, "the answer was not scored")
    if as_json:
        print_json(
            {
                "text": generation.text,
                "finish_reason": generation.finish_reason,
                "scores": {n: s.value for n, s in generation.scores.items()},
                "reasons": {n: s.reason for n, s in generation.scores.items() if s.reason},
                "confidence": confidence,
                "confidence_reason": reason,
                "usage": asdict(generation.usage),
                "timings": {**asdict(generation.timings), "total": generation.timings.total},
            }
        )
        return
    sys.stdout.write("\n")
    if not scores:
        return
    from rich.console import Console
    from rich.table import Table

    table = Table("score", "value", "range", "more likely right when", "what")
    for name, score in generation.scores.items():
        known = SCORES[name]
        value = f"{score.value:.4f}" if score.value is not None else f"none: {score.reason}"
        low, high = (f"{x:g}".replace("inf", "\u221e") for x in (known.low, known.high))
        table.add_row(name, value, f"{low} to {high}", known.direction, known.what)
    console = Console()
    console.print()
    console.print(table)
    t, u = generation.timings, generation.usage
    said = f"{confidence:.2f}" if confidence is not None else f"none: {reason}"
    console.print(
        f"Confidence: {said}\n{u.prompt} prompt and {u.generated} answer tokens, {u.computed} computed, "
        f"in {t.total:.2f} s; the scores took {t.features * 1000:.1f} ms of it ({t.features / t.total:.1%}).",
        highlight=False,
    )
