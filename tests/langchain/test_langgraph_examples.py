"""The examples of self-evaluation run, print what they promise, and a killed graph goes on where it was."""

from __future__ import annotations

import importlib
import re
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from langgraph.checkpoint.memory import InMemorySaver

EXAMPLES = Path(__file__).resolve().parents[2] / "examples"
CONFIG: Any = {"configurable": {"thread_id": "t"}}
Run = Callable[..., list[str]]


@pytest.fixture
def run(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path) -> Run:
    """Runs an example in this process and an empty folder; the lines it printed."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(str(EXAMPLES))

    def example(name: str, *arguments: str) -> list[str]:
        monkeypatch.setattr(sys, "argv", [f"{name}.py", *arguments])
        importlib.import_module(name).main()
        return capsys.readouterr().out.splitlines()

    return example


def test_an_agent_that_doubts(run: Run) -> None:
    lines = run("agent_self_check", "--questions", "12")
    assert len(lines) == 14
    assert any(" thought about " in line for line in lines[:12])
    assert any(" kept " in line for line in lines[:12])
    rights = [int(re.search(r": (\d+) of 12 right", line)[1]) for line in lines[12:]]  # type: ignore[index]
    assert rights[1] > rights[0]
    assert sum(line.endswith(" right") for line in lines[:12]) == rights[1]


def test_a_killed_graph_goes_on_and_answers_nothing_again(run: Run, tmp_path: Path) -> None:
    """Killed in a process of its own, after its answer and before it is checked; gone on with in this one."""
    killed = subprocess.run(
        [sys.executable, str(EXAMPLES / "langgraph_self_check.py"), "--die"],
        capture_output=True, text=True, check=False, cwd=tmp_path,
    )  # fmt: skip
    assert killed.returncode == 9, killed.stderr[-2000:]
    assert killed.stdout.splitlines() == ["begins", "ran: answer"]
    resumed = run("langgraph_self_check")
    assert resumed[:2] == ["goes on before: check", "ran: check"]
    whole = run("langgraph_self_check", "--database", "other.sqlite")
    assert whole[:2] == ["begins", "ran: answer"]
    assert whole[2:] == resumed[1:], "the same as if nothing had happened"


@pytest.mark.parametrize(
    ("threshold", "ran"), [(0.0, ["answer", "check"]), (1.0, ["answer", "check", "think", "check"])]
)
def test_the_graph_thinks_again_once(run: Run, threshold: float, ran: list[str]) -> None:
    build = importlib.import_module("langgraph_self_check").build
    graph = build(InMemorySaver(), threshold)
    question = "top 12,47,31,05,88,23,64,70,19"
    updates = list(graph.stream({"messages": question}, CONFIG, stream_mode="updates"))
    assert [name for update in updates for name in update] == ran
    messages = graph.get_state(CONFIG).values["messages"]
    assert [m.type for m in messages] == ["human", "ai"]
    assert messages[1].text.endswith("88.")
    assert {"answer", "check", "think"} <= set(graph.get_graph().nodes)


@pytest.mark.real
def test_a_cascade_from_a_small_model_to_a_larger_one(run: Run) -> None:
    *lines, small, larger = run("cascade", "--questions", "4")
    assert len(lines) == 8
    assert "Paris" in next(line for line in lines if line.startswith("What is the capital of France?"))
    assert all(" small " in line for line in lines if line.startswith("top "))
    assert small.startswith("small: answered 4 of 8, wrote ")
    assert larger.startswith("larger: answered 4 of 8, wrote ")


@pytest.mark.parametrize("name", ["agent_self_check", "langgraph_self_check", "cascade"])
def test_examples_are_short(name: str) -> None:
    assert len((EXAMPLES / f"{name}.py").read_text().splitlines()) < 80
