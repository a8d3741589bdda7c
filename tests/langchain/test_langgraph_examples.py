"""The examples of self-evaluation run, print what they promise, and a killed graph goes on where it was."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from langgraph.checkpoint.memory import InMemorySaver

EXAMPLES = Path(__file__).resolve().parents[2] / "examples"
CONFIG: Any = {"configurable": {"thread_id": "t"}}


def run(name: str, *arguments: str, cwd: Path, code: int = 0) -> str:
    ran = subprocess.run(
        [sys.executable, str(EXAMPLES / name), *arguments], capture_output=True, text=True, check=False, cwd=cwd
    )
    assert ran.returncode == code, ran.stderr[-2000:]
    return ran.stdout


def test_an_agent_that_doubts(tmp_path: Path) -> None:
    out = run("agent_self_check.py", "--questions", "12", cwd=tmp_path)
    lines = out.splitlines()
    assert len(lines) == 14
    assert any(" thought about " in line for line in lines[:12])
    assert any(" kept " in line for line in lines[:12])
    rights = [int(re.search(r": (\d+) of 12 right", line)[1]) for line in lines[12:]]  # type: ignore[index]
    assert rights[1] > rights[0]
    assert sum(line.endswith(" right") for line in lines[:12]) == rights[1]


def test_a_killed_graph_goes_on_and_answers_nothing_again(tmp_path: Path) -> None:
    killed = run("langgraph_self_check.py", "--die", cwd=tmp_path, code=9)
    assert killed.split() == ["begins", "ran:", "answer"]
    resumed = run("langgraph_self_check.py", cwd=tmp_path).splitlines()
    assert resumed[0] == "goes on before: check"
    assert "ran: answer" not in resumed
    whole = run("langgraph_self_check.py", "--database", "other.sqlite", cwd=tmp_path).splitlines()
    assert whole[:2] == ["begins", "ran: answer"]
    assert whole[2:] == resumed[1:], "the same as if nothing had happened"


@pytest.mark.parametrize(
    ("threshold", "ran"), [(0.0, ["answer", "check"]), (1.0, ["answer", "check", "think", "check"])]
)
def test_the_graph_thinks_again_once(threshold: float, ran: list[str]) -> None:
    sys.path.insert(0, str(EXAMPLES))
    from langgraph_self_check import build

    graph = build(InMemorySaver(), threshold)  # type: ignore[arg-type]
    question = "top 12,47,31,05,88,23,64,70,19"
    updates = list(graph.stream({"messages": question}, CONFIG, stream_mode="updates"))
    assert [name for update in updates for name in update] == ran
    messages = graph.get_state(CONFIG).values["messages"]
    assert [m.type for m in messages] == ["human", "ai"]
    assert messages[1].text.endswith("88.")
    assert graph.get_graph().draw_mermaid()


@pytest.mark.real
def test_a_cascade_from_a_small_model_to_a_larger_one(tmp_path: Path) -> None:
    *lines, small, larger = run("cascade.py", "--questions", "4", cwd=tmp_path).splitlines()
    assert len(lines) == 8
    assert "Paris" in next(line for line in lines if line.startswith("What is the capital of France?"))
    assert all(" small " in line for line in lines if line.startswith("top "))
    assert small.startswith("small: answered 4 of 8, wrote ")
    assert larger.startswith("larger: answered 4 of 8, wrote ")
