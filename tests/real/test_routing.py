"""From questions to a router, for real: the tiny thinker whole, and SmolLM2 through the same commands."""

from __future__ import annotations

import json
import random
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from kvroute import Policy, Router, SamplingOptions, TransformersEngine
from kvroute.checkers import check
from kvroute.generation import TokenIds
from kvroute.label_rows import read_labels

pytestmark = pytest.mark.real

FOLDER = Path(__file__).resolve().parents[2] / "examples" / "tiny_thinker"
sys.path.insert(0, str(FOLDER))
OPTIONS = SamplingOptions(max_tokens=192)


def kvroute(*arguments: object, cwd: Path) -> str:
    command = [sys.executable, "-m", "kvroute.cli", *map(str, arguments)]
    ran = subprocess.run(command, capture_output=True, text=True, check=False, cwd=cwd)
    assert ran.returncode == 0, ran.stderr[-2000:]
    return ran.stdout


@pytest.fixture(scope="module")
def thinker() -> TransformersEngine:
    return TransformersEngine.from_pretrained(FOLDER / "model", dtype="float32", token_budget=8192)


@pytest.fixture(scope="module")
def asked() -> list[Any]:
    from questions import make_question

    rng = random.Random("never trained on")
    return [make_question(rng) for _ in range(300)]


@pytest.fixture(scope="module")
def chats(asked: list[Any]) -> list[Any]:
    return [[{"role": "user", "content": q.question}] for q in asked]


@pytest.fixture(scope="module")
def shipped(thinker: TransformersEngine) -> Router:
    return Router(thinker, FOLDER / "policy.json", options=OPTIONS)


def right(asked: list[Any], answers: list[Any]) -> np.ndarray[Any, Any]:
    return np.array([check(a.answer, q.answer, "number").correct for q, a in zip(asked, answers, strict=True)])


def test_thinking_helps_and_the_router_saves(
    asked: list[Any], chats: list[Any], shipped: Router, thinker: TransformersEngine
) -> None:
    slow = Router(thinker, "slow", options=OPTIONS).generate(chats)
    fast = Router(thinker, "fast", options=OPTIONS).generate(chats)
    routed = shipped.generate(chats)
    assert right(asked, slow).mean() > right(asked, fast).mean() + 0.2
    assert right(asked, routed).mean() > right(asked, slow).mean() - 0.05
    tokens = [sum(a.usage.generated for a in answers) for answers in (routed, slow)]
    assert tokens[0] < 0.8 * tokens[1]
    assert shipped.health()["faults"] == 0


def test_a_switched_answer_is_that_of_a_run_by_hand(
    chats: list[Any], shipped: Router, thinker: TransformersEngine
) -> None:
    """Token for token, and each token computed once."""
    policy = Policy(kind="two-step", tau=50, tau_fast=25, tau_slow=60, every=4)
    router = Router(thinker, policy, head=shipped.head, options=OPTIONS)
    routed = [r for r in router.generate(chats[:120]) if r.decision.switch is not None]
    assert {r.decision.switch.to for r in routed if r.decision.switch} >= {"fast"}
    for one in routed:
        assert one.decision.switch is not None
        kept = one.decision.switch.token + one.decision.switch.forced
        tokens = one.generation.token_ids
        assert tokens[one.decision.switch.token : kept] == router.phrases[one.decision.switch.to]
        by_hand = thinker.generate(
            TokenIds((*one.generation.prompt_token_ids, *tokens[:kept])),  # type: ignore[arg-type]
            max_tokens=192 - kept,
        )
        assert by_hand.token_ids == tokens[kept:]  # type: ignore[attr-defined]
        assert one.usage.cached == 0
        assert one.usage.computed == one.usage.prompt + one.usage.generated - 1


def test_tool_calls(thinker: TransformersEngine) -> None:
    """It calls the calculator it is given, in the template's format, and says what came back."""
    from questions import CALCULATOR, make_tool_chat

    rng = random.Random(5)
    router = Router(thinker, "fast", options=OPTIONS)
    asked = said = 0
    for _ in range(20):
        chat, result = make_tool_chat(rng)
        call = router.generate(chat[:1], template={"tools": [CALCULATOR]})
        found = re.fullmatch(r"<tool_call>\n(\{.*\})\n</tool_call>", call.answer)
        assert found is not None
        assert json.loads(found[1])["name"] == "calculator"
        asked += json.loads(found[1])["arguments"] == chat[1]["tool_calls"][0]["function"]["arguments"]
        said += router.generate(chat[:3], template={"tools": [CALCULATOR]}).answer == f"it gives {result}."
    assert asked >= 18
    assert said >= 18


@pytest.mark.long  # the README's four commands are run in CI
def test_from_questions_to_a_router(tmp_path: Path, thinker: TransformersEngine) -> None:
    """The four commands, on questions made here."""
    from questions import make_questions

    (tmp_path / "q.jsonl").write_text("".join(json.dumps(q) + "\n" for q in make_questions(400, 77)))
    plain = ("--model", FOLDER / "model", "--dtype", "float32", "-q")
    kvroute(
        "label",
        "q.jsonl",
        "-o",
        "l.jsonl",
        *plain,
        "--checkpoints",
        8,
        "--max-fast",
        48,
        "--max-slow",
        192,
        cwd=tmp_path,
    )
    rows, meta = read_labels(tmp_path / "l.jsonl")
    assert len(rows) == 400
    assert meta.fingerprint == thinker.info.fingerprint
    assert {r.label for r in rows} >= {0.0, 75.0, 100.0}
    kvroute("train", "l.jsonl", "-o", "head", *plain, "--quick", "--kind", "ridge", cwd=tmp_path)
    kvroute(
        "calibrate",
        "--routing",
        "l.jsonl",
        "--head",
        "head",
        "-o",
        "policy.json",
        "--max-loss",
        10,
        *plain,
        cwd=tmp_path,
    )
    found = json.loads(
        kvroute(
            "route",
            "q.jsonl",
            "-p",
            "policy.json",
            "-o",
            "r.jsonl",
            *plain,
            "--max-tokens",
            192,
            "--json",
            cwd=tmp_path,
        )
    )
    assert found["rows"] == found["checked"] == 400
    assert found["faults"] == 0
    assert found["right"] > np.mean([r.slow_right for r in rows]) - 0.15


def test_smollm2_runs_through_label_train_and_route(tmp_path: Path) -> None:
    """A model without thinking tokens, by instructions; its gain may be nil."""
    # Different words, or all questions would share a skeleton and so a part.
    things = [
        "apples",
        "books",
        "cats",
        "dogs",
        "eggs",
        "forks",
        "goats",
        "hats",
        "jars",
        "keys",
        "lamps",
        "maps",
        "nuts",
    ]
    things += ["owls", "pens", "rings", "socks", "toys", "vans", "webs", "bricks", "cakes", "drums", "flags", "kites"]
    asked = [
        {
            "id": f"{thing} {more}",
            "question": f"Tom has {n} {thing} and gets {more} more. How many {thing} has he?",
            "answer": str(n + more),
            "answer_type": "number",
        }
        for n, thing in enumerate(things, 2)
        for more in (2, 5)
    ]
    (tmp_path / "q.jsonl").write_text("".join(json.dumps(q) + "\n" for q in asked))
    plain = ("--model", "smollm2", "-q")
    limits = ("--max-fast", 8, "--max-slow", 32, "--shares", "0.5,0.5,0,0")
    kvroute("label", "q.jsonl", "-o", "l.jsonl", *plain, *limits, cwd=tmp_path)
    rows, meta = read_labels(tmp_path / "l.jsonl")
    assert len(rows) == len(asked)
    assert all(r.error is None for r in rows)
    assert meta.thinking.in_question
    kvroute("train", "l.jsonl", "-o", "head", *plain, "--quick", "--kind", "ridge", cwd=tmp_path)
    Policy(kind="one-step", head="head").save(tmp_path / "policy.json")
    found = json.loads(
        kvroute(
            "route", "q.jsonl", "-p", "policy.json", "-o", "r.jsonl", *plain, "--max-tokens", 32, "--json", cwd=tmp_path
        )
    )
    assert found["rows"] == len(asked)
    assert found["faults"] == 0
