"""The tiny thinker on a vLLM server under a policy: accuracy, tokens by the server's own count, requests a second.

Questions are sent as chats to one server, 64 in flight: always slow, always fast, under the policy beside the model and
under the one-step policy with its thresholds. They come in blocks; in each block all four run, in an order that turns.
Tokens are ``usage.completion_tokens``, so a mode's tokens count. Beside it, what the same policies give on
TransformersEngine, on the same questions.

Runs where vLLM is installed: ``.venv-vllm/bin/python benchmarks/vllm_routing.py``.
"""

from __future__ import annotations

import functools
import json
import shutil
import time
import urllib.request
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

import _vllm
from _harness import Figure, figure_table, finish, judge, summarise, table
from _thinker import FOLDER, argument_parser, engine, questions
from kvroute import Policy, Router, SamplingOptions, ThinkingMode
from kvroute.checkers import check
from kvroute.questions import Question

MAX_TOKENS = 200
"""More than any answer of the thinker has."""
IN_FLIGHT = 64
SIDES: dict[str, dict[str, Any]] = {
    "always slow": {"mode": "slow"},
    "always fast": {"mode": "fast"},
    "one step": {"policy": "one-step"},
    "two steps": {"policy": "two-step"},
}


@dataclass(frozen=True, slots=True)
class Answered:
    """One answer: whether it is right, tokens written, tokens of the prompt, and what was decided."""

    right: bool
    tokens: int
    prompt: int
    mode: str
    switched: bool
    text: str


def policies_in(folder: Path) -> dict[str, Policy]:
    """The policy of the example, and the same in one step, as a server's folder of policies."""
    both = {"two-step": Policy.load(FOLDER / "policy.json")}
    assert both["two-step"].kind == "two-step"
    both["one-step"] = both["two-step"].model_copy(update={"kind": "one-step"})
    shutil.copytree(FOLDER / "head", folder / "head")
    shutil.copy(FOLDER / "policy.drift.safetensors", folder)
    for name, policy in both.items():
        policy.save(folder / f"{name}.json")
    return both


def answer_of(thinking: ThinkingMode, content: str, mode: str) -> str:
    """What stands behind the thought; the mode's tokens are in a server's text."""
    if mode == "fast":
        return thinking.split(content.removeprefix(thinking.fast), mode="fast")[1]
    return thinking.split(content.removeprefix(thinking.slow), mode="slow")[1]


def ask(url: str, question: Question, *, wanted: Mapping[str, Any], thinking: ThinkingMode) -> Answered:
    """One chat, and what came of it."""
    body = {
        "model": "model",
        "messages": [{"role": "user", "content": question.question}],
        "max_tokens": MAX_TOKENS,
        "temperature": 0,
        "kv_transfer_params": {"kvroute": dict(wanted)},
    }
    sent = urllib.request.Request(
        f"{url}/v1/chat/completions", json.dumps(body).encode(), {"Content-Type": "application/json"}
    )
    with urllib.request.urlopen(sent, timeout=600) as page:
        got = json.load(page)
    result = got["kv_transfer_params"]["kvroute"]
    decision = result["decision"]
    if result["error"] or decision is None or decision["fault"]:
        raise AssertionError(f"Nothing was decided: {result}")
    content = got["choices"][0]["message"]["content"] or ""
    switch = decision["switch"]
    switched = switch is not None and switch["forced"] > 0
    text = answer_of(thinking, content, switch["to"] if switched else decision["mode"])
    right = check(text, question.answer, question.answer_type).correct
    usage = got["usage"]
    return Answered(right, usage["completion_tokens"], usage["prompt_tokens"], decision["mode"], switched, text)


def mean_figure(values: Sequence[float], must: str | None, seed: int) -> Figure:
    """Mean over questions, with a bootstrap over them."""
    x = np.asarray(values, dtype=np.float64)
    picks = np.random.default_rng(seed).integers(0, len(x), (2000, len(x)))
    low, high = np.percentile(x[picks].mean(axis=1), [2.5, 97.5])
    return Figure(float(x.mean()), float(low), float(high), must, judge(low, high, must), len(x))


def ratio_figure(top: Sequence[float], bottom: Sequence[float], must: str | None, seed: int) -> Figure:
    """Sum over sum, with a bootstrap over questions."""
    a, b = np.asarray(top, dtype=np.float64), np.asarray(bottom, dtype=np.float64)
    picks = np.random.default_rng(seed).integers(0, len(a), (2000, len(a)))
    low, high = np.percentile(a[picks].sum(axis=1) / b[picks].sum(axis=1), [2.5, 97.5])
    return Figure(float(a.sum() / b.sum()), float(low), float(high), must, judge(low, high, must), len(a))


def on_server(
    url: str, blocks: Sequence[Sequence[Question]], thinking: ThinkingMode
) -> tuple[dict[str, list[Answered]], dict[str, list[float]]]:
    """By side, all answers, and by block the requests finished a second."""
    found: dict[str, list[Answered]] = {name: [] for name in SIDES}
    rates: dict[str, list[float]] = {name: [] for name in SIDES}
    names = list(SIDES)
    with ThreadPoolExecutor(IN_FLIGHT) as threads:
        warm = functools.partial(ask, url, wanted=SIDES["two steps"], thinking=thinking)
        list(threads.map(warm, blocks[0][:IN_FLIGHT]))
        for number, block in enumerate(blocks):
            turn = number % len(names)
            for name in names[turn:] + names[:turn]:
                began = time.perf_counter()
                work = functools.partial(ask, url, wanted=SIDES[name], thinking=thinking)
                found[name] += threads.map(work, block)
                rates[name].append(len(block) / (time.perf_counter() - began))
    return found, rates


def on_transformers(
    asked: Sequence[Question], policies: Mapping[str, Policy], folder: Path, thinker: str | None
) -> dict[str, list[Answered]]:
    """The same on TransformersEngine."""
    here = engine(thinker)
    options = SamplingOptions(max_tokens=MAX_TOKENS)
    chats = [[{"role": "user", "content": q.question}] for q in asked]
    kinds = {"always slow": Policy(kind="slow"), "always fast": Policy(kind="fast")}
    kinds |= {"one step": policies["one-step"], "two steps": policies["two-step"]}
    found: dict[str, list[Answered]] = {}
    for name, policy in kinds.items():
        head = folder / "head" if policy.reads_difficulty else None
        router = Router(here, policy, head=head, options=options)
        found[name] = [
            Answered(
                check(one.answer, q.answer, q.answer_type).correct, one.usage.generated, one.usage.prompt,
                one.decision.mode, one.decision.switch is not None, one.answer,
            )
            for q, one in zip(asked, router.generate(chats), strict=True)
        ]  # fmt: skip
    return found


def summary(
    server: Mapping[str, Sequence[Answered]],
    rates: Mapping[str, Sequence[float]],
    here: Mapping[str, Sequence[Answered]],
) -> str:
    """One row a side."""
    rows = []
    for name, answers in server.items():
        same = np.mean([a.text == b.text for a, b in zip(answers, here[name], strict=True)])
        rows.append(
            (
                name,
                f"{np.mean([a.right for a in answers]):.4f}",
                f"{np.mean([a.tokens for a in answers]):.2f}",
                f"{np.mean([a.mode == 'slow' for a in answers]):.3f}",
                f"{np.mean([a.switched for a in answers]):.3f}",
                f"{np.mean(rates[name]):.1f}",
                f"{np.mean([a.right for a in here[name]]):.4f}",
                f"{same:.4f}",
            )
        )
    header = (
        "on the server", "accuracy", "tokens", "began slow", "switched", "requests/s", "accuracy on transformers",
        "same answers",
    )  # fmt: skip
    return table(header, rows)


def main() -> None:
    parser = argument_parser(__doc__)
    parser.add_argument("--rows", type=int, help="questions, by default 1,600")
    parser.add_argument("--logs", type=Path, help="folder for the server's log; by default it is thrown away")
    arguments = parser.parse_args()
    _vllm.prepare()
    from tests.serving.http_server import CONNECTOR, serving

    count = arguments.rows or (128 if arguments.quick else 1600)
    asked = questions(count, arguments.seed + 7)
    size = max(count // 8, min(count, IN_FLIGHT))
    blocks = [asked[i : i + size] for i in range(0, count, size)]
    model = Path(arguments.thinker or FOLDER / "model")
    with _vllm.scratch() as scratch:
        folder = Path(scratch) / "policies"
        folder.mkdir()
        policies = policies_in(folder)
        here = on_transformers(asked, policies, folder, arguments.thinker)
        thinking = ThinkingMode.of(engine(arguments.thinker))
        settings = {"policies": str(folder), "strict": True}
        logs = arguments.logs or Path(scratch)
        logs.mkdir(parents=True, exist_ok=True)
        options = ("--max-num-seqs", str(IN_FLIGHT), "--no-enable-prefix-caching")
        transfer = {**CONNECTOR, "kv_connector_extra_config": settings}
        with serving(model, logs / "routing.log", *options, transfer=transfer) as url:
            found, rates = on_server(url, blocks, thinking)
    slow = found["always slow"]
    figures: dict[str, Figure] = {}
    for name, key in (("one step", "one_step"), ("two steps", "two_step")):
        answers = found[name]
        points = [100.0 * (a.right - b.right) for a, b in zip(answers, slow, strict=True)]
        figures[f"{key}_accuracy_points"] = mean_figure(points, ">= -1.0", arguments.seed)
        figures[f"{key}_tokens_of_slow"] = ratio_figure(
            [a.tokens for a in answers], [a.tokens for a in slow], "<= 1.0", arguments.seed
        )
        figures[f"{key}_requests_a_second_over_slow"] = summarise(
            [a / b for a, b in zip(rates[name], rates["always slow"], strict=True)], None, seed=arguments.seed
        )
        figures[f"{key}_same_answers_as_transformers"] = mean_figure(
            [float(a.text == b.text) for a, b in zip(answers, here[name], strict=True)], ">= 0.99", arguments.seed
        )
    print(summary(found, rates, here) + "\n")
    print(figure_table(figures))
    finish(
        arguments,
        name="vllm_routing",
        figures=figures,
        baseline="always slow on the same server; the same policies on TransformersEngine",
        n={"questions": count, "in_flight": IN_FLIGHT},
    )


if __name__ == "__main__":
    main()
