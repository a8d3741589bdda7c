"""``kvroute route``: questions answered with as much thinking as each needs."""

from __future__ import annotations

import json
import sys
import time
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from kvroute.cli.common import (
    Device,
    Dtype,
    EngineName,
    Force,
    Json,
    Model,
    Quiet,
    Restart,
    load_engine,
    messages_in,
    print_json,
    work_to_run,
    work_to_stdout,
)
from kvroute.errors import InvalidInputError
from kvroute.rows import PartialRun, digest_of, parse_jsonl, read_text, text_field

if TYPE_CHECKING:
    from kvroute import Routed, Router
    from kvroute.generation import Prompt

_CHUNK = 32


def command(
    file: Annotated[
        str | None,
        typer.Argument(help="JSON Lines with question (or messages), or - for standard input."),
    ] = None,
    policy: Annotated[
        str, typer.Option("--policy", "-p", help="A policy's .json file, its name in KVROUTE_POLICIES, fast or slow.")
    ] = "slow",
    ask: Annotated[str | None, typer.Option(help="One question, in place of a file; the answer is streamed.")] = None,
    out: Annotated[str, typer.Option("--out", "-o", help="A .jsonl file; - for standard output.")] = "-",
    model: Model = "smollm2",
    head: Annotated[str | None, typer.Option(help="A head, in place of the one the policy names.")] = None,
    confidence: Annotated[str | None, typer.Option(help="A folder with a head for answers: a confidence each.")] = None,
    mode: Annotated[str | None, typer.Option(help="Demand fast or slow.")] = None,
    prompt: Annotated[str, typer.Option(help="The user's message.")] = "{question}",
    max_tokens: Annotated[
        int | None, typer.Option(help="At most so many tokens an answer; by default 1,024, or half the context.")
    ] = None,
    temperature: Annotated[float, typer.Option(help="0 takes the likeliest tokens.")] = 0.0,
    seed: Annotated[int, typer.Option(help="Of the sampling.")] = 0,
    shadow: Annotated[bool, typer.Option("--shadow", help="Decide and say so, and change nothing.")] = False,
    explain: Annotated[bool, typer.Option("--explain", help="Name the nearest labelled questions.")] = False,
    decide_only: Annotated[bool, typer.Option("--decide-only", help="The choice alone, no answer.")] = False,
    dtype: Dtype = "auto",
    device: Device = None,
    engine_name: EngineName = "transformers",
    restart: Restart = False,
    force: Force = False,
    quiet: Quiet = False,
    as_json: Json = False,
) -> None:
    """Answer questions, fast or slow as the policy says. Rows with answer and answer_type are checked too."""
    from kvroute import DifficultyHead, Policy, Router, SamplingOptions

    if (file is None) == (ask is None):
        raise InvalidInputError("Give a file or --ask, one of the two.")
    if out != "-" and Path(out).suffix != ".jsonl":
        raise InvalidInputError(f"{out!r} does not end in .jsonl.")
    if "{question}" not in prompt:
        raise InvalidInputError(f"The prompt {prompt!r} has no {{question}} in it.")
    rows = [] if file is None else parse_jsonl(read_text(file, sys.stdin.buffer), file)
    if file is not None and not rows:
        raise InvalidInputError(f"{file} holds no question.")
    prompts = [_prompt(row, prompt, file, number) for number, row in rows]
    engine = load_engine(model, dtype, device, engine_name, policy=policy)
    max_tokens = min(1024, engine.info.context // 2) if max_tokens is None else max_tokens
    router = Router(
        engine,
        policy,
        head=head,
        confidence=None if confidence is None else DifficultyHead.load(confidence, engine.info),
        options=SamplingOptions(max_tokens=max_tokens, temperature=temperature, seed=seed),
    )
    if shadow:
        router.policy = Policy(**{**router.policy.model_dump(), "shadow": True})
    if ask is not None:
        _ask(router, prompt.replace("{question}", ask), mode, explain, decide_only, as_json)
        return
    began = time.perf_counter()

    def work(start: int, stop: int) -> bytes:
        part = prompts[start:stop]
        if decide_only:
            found: list[Any] = [{"decision": d.to_dict()} for d in router.decide_many(part, mode=mode, explain=explain)]
        else:
            found = [r.to_dict() for r in router.generate(part, mode=mode, explain=explain, progress=False)]
        lines = []
        for (_, row), result in zip(rows[start:stop], found, strict=True):
            result["decision"].pop("seconds")  # differs from run to run, and the file shall not
            lines.append(json.dumps({**row, "routed": {**result, **_checked(row, result)}}, allow_nan=False))
        return ("\n".join(lines) + "\n").encode()

    if out == "-":
        work_to_stdout("Routing", len(rows), _CHUNK, work, quiet=quiet)
        return
    identity = {
        "command": "route",
        "input": digest_of([row for _, row in rows]),
        "fingerprint": engine.info.fingerprint,
        "dtype": engine.info.dtype,
        "policy": router.policy.model_dump(mode="json"),
        "heads": [None if h is None else h.data_hash for h in (router.head, router.confidence)],
        "options": [prompt, mode, explain, decide_only, max_tokens, temperature, seed],
    }
    with PartialRun(Path(out), identity, len(rows), chunk=_CHUNK, restart=restart, force=force) as run:
        resumed = work_to_run("Routing", run, work, quiet=quiet)
        run.finish()
    written = [row for _, row in parse_jsonl(Path(out).read_text(), out)]
    _report(written, out, resumed, time.perf_counter() - began, router, as_json)


def _prompt(row: dict[str, Any], template: str, file: str | None, number: int) -> Prompt:
    messages = messages_in(row, file, number)
    if messages is not None:
        return messages
    question = text_field(row, "question", file, number)
    return [{"role": "user", "content": template.replace("{question}", question)}]


def _checked(row: dict[str, Any], result: dict[str, Any]) -> dict[str, Any]:
    from kvroute.checkers import CHECKERS, check

    if "answer" not in result or row.get("answer_type") not in CHECKERS or not isinstance(row.get("answer"), str):
        return {}
    found = check(result["answer"] or result["text"], row["answer"], row["answer_type"])
    return {"read": found.answer, "correct": found.correct}


def _ask(router: Router, question: str, mode: str | None, explain: bool, decide_only: bool, as_json: bool) -> None:
    asked = [{"role": "user", "content": question}]
    if decide_only:
        print_json(router.decide(asked, mode=mode, explain=explain).to_dict())
        return
    routed: Routed | None = None
    for chunk in router.stream(asked, mode=mode, explain=explain):
        if not as_json:
            sys.stdout.write(chunk.text)
            sys.stdout.flush()
        routed = chunk.routed or routed
    assert routed is not None
    if as_json:
        print_json(routed.to_dict())
        return
    d = routed.decision
    sys.stdout.write("\n")
    difficulty = "" if d.difficulty is None else f", difficulty {d.difficulty:.0f}"
    switched = "" if d.switch is None else f", {d.switch.to} from token {d.switch.token}"
    typer.echo(f"{d.mode}{switched} ({d.why}{difficulty}), {routed.usage.generated} tokens.", err=True)
    for near in d.nearest:
        typer.echo(f"  label {near.label:.0f}: {near.question}", err=True)


def _report(rows: list[dict[str, Any]], out: str, resumed: int, seconds: float, router: Router, as_json: bool) -> None:
    found = [row["routed"] for row in rows]
    modes = [r["decision"]["mode"] for r in found]
    checked = [r["correct"] for r in found if "correct" in r]
    tokens = [r["usage"]["generated"] for r in found if "usage" in r]
    summary: dict[str, Any] = {
        "out": out,
        "rows": len(rows),
        "resumed": resumed,
        "modes": {m: modes.count(m) for m in sorted(set(modes))},
        "switched": sum(r["decision"]["switch"] is not None for r in found),
        "tokens": sum(tokens) / len(tokens) if tokens else None,
        "checked": len(checked),
        "right": sum(checked) / len(checked) if checked else None,
        "faults": router.counts["faults"],
        "seconds": seconds,
    }
    if as_json:
        print_json(summary)
        return
    counted = ", ".join(f"{n} {m}" for m, n in summary["modes"].items())
    typer.echo(f"{len(rows)} questions in {out}: {counted}, {summary['switched']} switched in mid-answer.")
    if tokens:
        typer.echo(f"{summary['tokens']:.1f} tokens an answer.")
    if checked:
        typer.echo(f"{summary['right']:.3f} of {len(checked)} are right.")
