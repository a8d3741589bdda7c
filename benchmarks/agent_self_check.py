"""A real agent loop with and without self-evaluation: answers right, tokens written, tokens run.

The agent is LangChain's ``create_agent`` over the tiny thinker, with its calculator. Half of the questions need the
tool, half are such as it must think about (or not). The same questions are asked of four agents: one that answers at
once, one that thinks always, one that answers at once and, where ``SelfEvaluationMiddleware`` finds the confidence
below one half, thinks (``self_check``), and one that routes by difficulty before it answers (``routed``). Tokens are
those of all model calls, answers that were not kept included. Nothing was trained or chosen on these questions; the
threshold is one half because a confidence is a probability.
"""

from __future__ import annotations

import random
import sys
from dataclasses import dataclass
from typing import Any

import numpy as np
from langchain.agents import create_agent
from langchain_core.tools import tool
from langgraph.errors import GraphRecursionError

import _thinker
from _harness import Figure, figure_table, finish, table
from kvroute import DifficultyHead
from kvroute.checkers import check
from kvroute.confidence_maps import auroc
from kvroute.routing_intervals import Resamples
from langchain_kvroute import ChatKVRoute, SelfEvaluationCallbackHandler, SelfEvaluationMiddleware, self_evaluation

THRESHOLD = 0.5
ARMS = ("fast", "slow", "self_check", "routed")


@dataclass(frozen=True)
class Run:
    """One question asked of one agent."""

    right: bool
    written: int
    computed: int
    confidence: float | None
    retried: bool
    called: bool


@tool
def calculator(expression: str) -> str:
    """Multiplies and adds whole numbers."""
    left, sign, right = expression.partition("+") if "+" in expression else expression.partition("*")
    return str(int(left) + int(right) if sign == "+" else int(left) * int(right))


def agent(thinker: Any, head: DifficultyHead, arm: str) -> Any:
    """The agent of one arm."""
    policy = _thinker.FOLDER / "policy.json" if arm == "routed" else None
    mode: Any = None if arm == "routed" else "slow" if arm == "slow" else "fast"
    model = ChatKVRoute(
        engine=thinker, mode=mode, policy=policy, confidence=head, max_tokens=_thinker.MAX_TOKENS["slow"]
    )
    check_self = [SelfEvaluationMiddleware(threshold=THRESHOLD, action="retry")] if arm == "self_check" else []
    return create_agent(model, tools=[calculator], middleware=check_self)


def ask(runner: Any, question: str, answer: str) -> Run:
    """One question."""
    watch = SelfEvaluationCallbackHandler()
    last = None
    try:
        found = runner.invoke({"messages": question}, {"callbacks": [watch], "recursion_limit": 16})
        last = found["messages"][-1]
    except GraphRecursionError:
        print(f"no end was found for {question!r}", file=sys.stderr)
    records = watch.records
    about = None if last is None else self_evaluation(last)
    return Run(
        right=last is not None and check(str(last.text), answer, "number").correct,
        written=sum(r.tokens["answer"] for r in records),
        computed=sum(r.tokens["computed"] for r in records),
        confidence=records[-1].confidence,
        retried=about is not None and len(about["attempts"]) > 1,
        called=any(r.tool_calls for r in records),
    )


def asked(count: int, seed: int) -> list[tuple[str, str, str]]:
    """Kind, question, answer: as many with as without the tool, mixed."""
    rows = [(str(q.extra["kind"]), q.question, q.answer) for q in _thinker.questions(count - count // 2, seed + 31)]
    from questions import make_tool_chat  # _thinker.questions has put the folder on the path

    rng = random.Random(f"agent {seed}")
    for _ in range(count // 2):
        chat, result = make_tool_chat(rng)
        rows.append(("tool", chat[0]["content"], result))
    rng.shuffle(rows)
    return rows


def area(values: list[float], right: list[bool], seed: int) -> Figure | None:
    """AUROC with a bootstrap interval; None where all are right or all wrong."""
    x, y = np.array(values), np.array(right)
    if y.all() or not y.any():
        return None
    rng = np.random.default_rng(seed)
    drawn = [auroc(x[i], y[i]) for i in rng.integers(0, len(y), (1000, len(y))) if 0 < y[i].sum() < len(y)]
    return Figure(auroc(x, y), *(float(q) for q in np.quantile(drawn, [0.025, 0.975])), None, None, len(y))


def main() -> None:
    arguments = _thinker.argument_parser(__doc__).parse_args()
    thinker = _thinker.engine(arguments.thinker)
    head = DifficultyHead.load(_thinker.FOLDER / "confidence", thinker.info)
    rows = asked(24 if arguments.quick else 600, arguments.seed)
    agents = {arm: agent(thinker, head, arm) for arm in ARMS}
    runs: dict[str, list[Run]] = {arm: [] for arm in ARMS}
    for _, question, answer in rows:
        for arm in ARMS:
            runs[arm].append(ask(agents[arm], question, answer))
    right = {arm: np.array([r.right for r in found], float) for arm, found in runs.items()}
    written = {arm: np.array([r.written for r in found], float) for arm, found in runs.items()}
    computed = {arm: np.array([r.computed for r in found], float) for arm, found in runs.items()}
    drawn, n = Resamples(len(rows), seed=arguments.seed), len(rows)

    def figure(of: Any, must: str | None = None) -> Figure:
        return _thinker.figure(drawn.estimate(of), must, n)

    figures: dict[str, Figure] = {}
    for arm in ARMS:
        figures[f"answers_right_{arm}"] = _thinker.share([r.right for r in runs[arm]])
        figures[f"tokens_written_{arm}"] = figure(lambda mean, a=arm: mean(written[a]))
        figures[f"tokens_computed_{arm}"] = figure(lambda mean, a=arm: mean(computed[a]))
    figures["answers_right_gain_self_check"] = figure(lambda mean: mean(right["self_check"] - right["fast"]), ">= 0")
    figures["answers_right_self_check_minus_slow"] = figure(lambda mean: mean(right["self_check"] - right["slow"]))
    for kind, tokens in (("written", written), ("computed", computed)):
        figures[f"tokens_{kind}_self_check_of_slow"] = figure(
            lambda mean, t=tokens: mean(t["self_check"]) / mean(t["slow"])
        )
    figures["retried"] = _thinker.share([r.retried for r in runs["self_check"]])
    figures["right_answers_retried"] = _thinker.share(
        [r.retried for r, f in zip(runs["self_check"], runs["fast"], strict=True) if f.right]
    )
    for name, kept in (("agent", {k for k, *_ in rows}), ("thinking_questions", {"run", "map", "top", "draw"})):
        first = [r for (k, *_), r in zip(rows, runs["fast"], strict=True) if k in kept and r.confidence is not None]
        found = area([float(r.confidence or 0) for r in first], [r.right for r in first], arguments.seed)
        if found is not None:
            figures[f"confidence_auroc_{name}"] = found
    tools = [r for (k, *_), r in zip(rows, runs["fast"], strict=True) if k == "tool"]
    figures["tool_answers_below_threshold"] = _thinker.share(
        [r.confidence is None or r.confidence < THRESHOLD for r in tools]
    )
    figures["tool_called_where_needed"] = _thinker.share([r.called for r in tools])
    kinds = sorted({k for k, *_ in rows})
    print(figure_table(figures), "\n")
    print(
        table(
            ("kind", "n", *(f"{arm}: right, written" for arm in ARMS), "retried"),
            [
                (
                    k,
                    sum(row[0] == k for row in rows),
                    *(
                        f"{np.mean([right[arm][i] for i in at]):.3f}, {np.mean([written[arm][i] for i in at]):.1f}"
                        for arm in ARMS
                    ),
                    f"{np.mean([runs['self_check'][i].retried for i in at]):.2f}",
                )
                for k in kinds
                for at in [[i for i, row in enumerate(rows) if row[0] == k]]
            ],
        )
    )
    finish(
        arguments,
        name="agent_self_check",
        figures=figures,
        n={"questions": n, "with_tool": sum(k == "tool" for k, *_ in rows)},
        baseline="the same agent without the middleware",
    )


if __name__ == "__main__":
    main()
