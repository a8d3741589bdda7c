"""``kvroute route`` on a tiny model."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from kvroute import DifficultyHead, Policy, PoolingSpec, Router, TransformersEngine
from kvroute.confidence_maps import LogisticMap
from kvroute.heads.fitting import FITS, SETTINGS, Rows

QUESTIONS = [
    {"id": str(i), "question": f"What is {i} plus {i}?", "answer": str(2 * i), "answer_type": "number"}
    for i in range(7)
]
Run = Callable[..., tuple[int, str, str]]


@pytest.fixture(scope="module")
def model(tiny_folder: Callable[[str], str]) -> str:
    return tiny_folder("qwen3")


@pytest.fixture(scope="module")
def engine(model: str) -> TransformersEngine:
    return TransformersEngine.from_pretrained(model, dtype="float32")


@pytest.fixture(scope="module")
def policy(tmp_path_factory: pytest.TempPathFactory, engine: TransformersEngine) -> Path:
    """A policy and a head that tells some of the questions from the others."""
    folder = tmp_path_factory.mktemp("policies")
    spec = PoolingSpec(layers="last:2", part="v", tokens="last", heads="concat", layer_reduce="mean")
    router = Router(engine, "slow")
    chats = [[{"role": "user", "content": q["question"]}] for q in QUESTIONS]
    base = [router.thinking.layout(engine, c).base for c in chats]
    x = engine.pool(base, [spec], progress=False)[0]
    y = np.linspace(0.0, 1.0, len(x))
    fitted = FITS["ridge"](Rows(x, y), Rows(x, y), SETTINGS["ridge"][0], seed=0, binary=False)
    DifficultyHead(
        spec=spec,
        target="difficulty",
        predictor=fitted.model,
        map=LogisticMap(means=(50.0,), scales=(20.0,), coefficients=(-1.0,), intercept=0.0),
        model=engine.info.name,
        fingerprint=engine.info.fingerprint,
        data_hash="0",
    ).save(folder / "head")
    Policy(kind="one-step", head="head", tau=50.0).save(folder / "mine.json")
    return folder / "mine.json"


@pytest.fixture
def questions(tmp_path: Path) -> Path:
    path = tmp_path / "questions.jsonl"
    path.write_text("".join(json.dumps(q) + "\n" for q in QUESTIONS))
    return path


def rows_of(text: str) -> list[dict[str, Any]]:
    return [json.loads(line) for line in text.splitlines()]


def test_rows_come_back_with_decision_and_check(
    run: Run, questions: Path, policy: Path, model: str, engine: TransformersEngine, tmp_path: Path
) -> None:
    out = tmp_path / "out.jsonl"
    code, printed, _ = run(
        "route", questions, "-p", policy, "-m", model, "-o", out, "--max-tokens", 12, "--dtype", "float32", "--json"
    )
    assert code == 0
    summary = json.loads(printed)
    found = rows_of(out.read_text())
    assert [r["id"] for r in found] == [q["id"] for q in QUESTIONS]
    modes = [r["routed"]["decision"]["mode"] for r in found]
    assert set(modes) == {"fast", "slow"}
    assert summary["modes"] == {m: modes.count(m) for m in ("fast", "slow")}
    assert summary["checked"] == len(QUESTIONS)
    library = Router.load(engine, policy).generate(
        [[{"role": "user", "content": q["question"]}] for q in QUESTIONS], max_tokens=12
    )
    assert [r["routed"]["text"] for r in found] == [a.text for a in library]
    assert [r["routed"]["decision"]["mode"] for r in found] == [a.decision.mode for a in library]
    again = tmp_path / "again.jsonl"
    run("route", questions, "-p", policy, "-m", model, "-o", again, "--max-tokens", 12, "--dtype", "float32")
    assert again.read_bytes() == out.read_bytes()


def test_named_policy_shadow_mode_and_choice_alone(
    run: Run, questions: Path, policy: Path, model: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("KVROUTE_POLICIES", str(policy.parent))
    plain = ("-m", model, "--max-tokens", 4, "--dtype", "float32", "-q")
    _, out, _ = run("route", questions, "-p", "mine", "--decide-only", *plain)
    chosen = [r["routed"]["decision"]["mode"] for r in rows_of(out)]
    assert all("text" not in r["routed"] for r in rows_of(out))
    _, out, _ = run("route", questions, "-p", "mine", "--shadow", *plain)
    decisions = [r["routed"]["decision"] for r in rows_of(out)]
    assert [d["proposed"] for d in decisions] == chosen
    assert {d["mode"] for d in decisions} == {"slow"}
    _, out, _ = run("route", questions, "-p", "mine", "--mode", "fast", *plain)
    assert {r["routed"]["decision"]["why"] for r in rows_of(out)} == {"forced"}


def test_one_question(run: Run, policy: Path, model: str) -> None:
    plain = ("-m", model, "-p", policy, "--max-tokens", 6, "--dtype", "float32")
    code, out, err = run("route", "--ask", "What is 3 plus 3?", *plain)
    assert code == 0
    assert "tokens" in err
    _, as_json, _ = run("route", "--ask", "What is 3 plus 3?", *plain, "--json")
    assert json.loads(as_json)["text"] == out.rstrip("\n")
    _, alone, _ = run("route", "--ask", "What is 3 plus 3?", *plain, "--decide-only")
    assert json.loads(alone)["mode"] in ("fast", "slow")


def test_what_is_wrong_is_said(run: Run, questions: Path, policy: Path, model: str, tmp_path: Path) -> None:
    plain = ("-m", model, "--dtype", "float32")
    for arguments, said in (
        (("route", *plain), "--ask"),
        (("route", questions, "--ask", "x", *plain), "--ask"),
        (("route", questions, "-p", "nowhere", *plain), "KVROUTE_POLICIES"),
        (("route", questions, "-p", tmp_path / "no.json", *plain), "no.json"),
        (("route", questions, "-o", "out.txt", *plain), ".jsonl"),
        (("route", questions, "--mode", "medium", *plain), "medium"),
        (("route", questions, "--prompt", "nothing", *plain), "{question}"),
    ):
        code, _, err = run(*arguments)
        assert code == 2, arguments
        assert said in err
