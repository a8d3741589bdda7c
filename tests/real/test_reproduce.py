"""Recipes that run here, whole: the tiny thinker's, killed between its steps, and SmolLM2's, by the command."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest

from kvroute.reproduction.steps import Steps

pytestmark = pytest.mark.real

Run = Callable[..., tuple[int, str, str]]


def test_the_tiny_thinker(run: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Killed behind the labels, it goes on with the head; thinking helps, and the policy of one step saves tokens."""
    asked = ("reproduce", "tiny-thinker", "--out", tmp_path / "out", "--quiet")
    whole = Steps.run

    def dies(self: Steps, name: str, *rest: object, **more: object) -> object:
        if name == "train":
            raise KeyboardInterrupt
        return whole(self, name, *rest, **more)  # type: ignore[arg-type]

    with monkeypatch.context() as patched:
        patched.setattr(Steps, "run", dies)
        assert run(*asked)[0] != 0
    code, text, err = run(*asked, "--json")
    assert code == 0, err
    found = json.loads(text)
    assert found["skipped"] == ["label-thinker-train", "label-thinker", "answer-thinker-answers"]
    figures = {name: figure["ours"] for name, figure in found["figures"].items()}
    assert figures["thinker.slow.accuracy"] > figures["thinker.fast.accuracy"] + 0.2
    assert figures["thinker.one-step.tokens"] < figures["thinker.slow.tokens"]
    assert figures["thinker.two-step.tokens"] < figures["thinker.slow.tokens"]
    assert figures["thinker.auroc-fast-is-right"] > 0.6
    assert found["figures"]["thinker.auroc-fast-is-right"]["published"] == 0.917
    assert (tmp_path / "out" / "reproduction.html").stat().st_size > 10_000


def test_smollm2(run: Run, tmp_path: Path) -> None:
    asked = ("reproduce", "smollm2", "--out", tmp_path / "out", "--quiet")
    code, text, err = run(*asked)
    assert code == 0, err
    assert "sums.slow.accuracy" in text
    report = json.loads((tmp_path / "out" / "reproduction.json").read_text())
    assert report["figures"]["sums.fast.tokens"]["ours"] <= 3
    assert report["figures"]["topics.accuracy"]["ours"] > 0.5
    assert run(*asked)[2].count("there already") == 8
