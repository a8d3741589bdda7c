"""A recipe on a tiny random model: all its steps, killed between and within them, changed, and limited."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from kvroute import TransformersEngine
from kvroute.errors import InvalidInputError
from kvroute.label_files import write_labels
from kvroute.recipes import Recipe, read_recipe
from kvroute.reproduction import Engines, Source, reproduce
from kvroute.reproduction.embeddings import accuracy, experiments
from kvroute.reproduction.scores import score_figures
from kvroute.reproduction.steps import Steps

RECIPE = """
name: tiny
about: a random model that is never right
source: nowhere
model: tiny
chunk: 32
routing:
  train: [{name: train, maker: sums, rows: 100, seed: 1}]
  test: [{name: held, maker: sums, rows: 12, seed: 2}]
  fast_instruction: Now.
  slow_instruction: Think.
  max_tokens: {fast: 3, slow: 6}
  validation: 0.35
  calibration: 0.25
  head: {spec: {layers: all, part: v, tokens: mean}, kinds: [ridge], bare: false, quick: true}
scores:
  test: [{name: answers, maker: sums, rows: 6, seed: 3}]
  max_tokens: 4
  scores: [kv_coe_r_token, mean_logprob]
embeddings:
  spec: paper-mteb
  experiments: 3
  sets:
    - {name: topics, maker: topics, rows: 10}
    - {name: absent, file: nowhere, optional: true}
published:
  held.slow.accuracy: 0.25
  held.fast.accuracy: null
"""


@pytest.fixture
def recipe(tmp_path: Path) -> Recipe:
    path = tmp_path / "tiny.yaml"
    path.write_text(RECIPE)
    return read_recipe(path)


class Tries:
    """Opens the engine, and counts how often."""

    def __init__(self, engine: TransformersEngine) -> None:
        self.engine, self.opened = engine, 0

    def __call__(self) -> TransformersEngine:
        self.opened += 1
        return self.engine


def test_whole_killed_and_changed(
    recipe: Recipe, tmp_path: Path, tiny_engine: TransformersEngine, monkeypatch: pytest.MonkeyPatch
) -> None:
    source = Source(tmp_path)
    whole = reproduce(recipe, tmp_path / "whole", Engines(lambda: tiny_engine), source)
    steps = ["label-train", "label-held", "answer-answers", "train", "calibrate", "evaluate-held", "score-answers",
             "embed-topics"]  # fmt: skip
    assert list(whole.done) == steps
    figures = {r.figure: r for r in whole.rows}
    assert set(figures) == set(recipe.figures())
    assert figures["held.slow.accuracy"].ours is not None
    assert figures["held.slow.accuracy"].difference == pytest.approx(figures["held.slow.accuracy"].ours - 0.25)
    assert figures["absent.accuracy"].ours is None
    assert 0 <= (figures["topics.accuracy"].ours or -1) <= 1
    assert json.loads((tmp_path / "whole" / "steps" / "label-train.json").read_text())["body"]["whole"] is True

    # Killed within the labels and again behind the head: nothing that is whole is done again, and all comes out alike.
    out, killed = tmp_path / "killed", {"chunks": 0}

    def dies(labeller: Any, questions: Any) -> Any:
        killed["chunks"] += 1
        if killed["chunks"] == 3:
            raise KeyboardInterrupt
        return label(labeller, questions)

    from kvroute.labelling import Labeller

    label = Labeller.label
    monkeypatch.setattr(Labeller, "label", dies)
    with pytest.raises(KeyboardInterrupt):
        reproduce(recipe, out, Engines(lambda: tiny_engine), source)
    with pytest.raises(KeyboardInterrupt):
        reproduce(recipe, out, Engines(lambda: tiny_engine), source, say=stop_behind("train: done"))
    assert killed["chunks"] == 3 + 2 + 1  # two lots of the training set were kept
    tries = Tries(tiny_engine)
    again = reproduce(recipe, out, Engines(tries), source)
    assert list(again.skipped) == steps[:4]
    assert again.to_dict() == whole.to_dict()
    again.save(out)
    first = (out / "reproduction.json").read_bytes()
    assert tries.opened == 1

    # All is there: no model is opened.
    done = reproduce(recipe, out, Engines(tries), source)
    assert (list(done.skipped), list(done.done), tries.opened) == (steps, [], 1)
    done.save(out)
    assert (out / "reproduction.json").read_bytes() == first
    page = (out / "reproduction.html").read_text()
    assert "Published and ours" in page
    assert "not known here" in page

    # A changed recipe is noticed, and what it does not concern stays.
    assert recipe.routing is not None
    changed = recipe.model_copy(update={"routing": recipe.routing.model_copy(update={"max_loss": 2.0})})
    with pytest.raises(InvalidInputError, match=r"calibrate .*--redo"):
        reproduce(changed, out, Engines(tries), source)
    redone = reproduce(changed, out, Engines(tries), source, redo=True)
    assert list(redone.done) == ["calibrate", "evaluate-held"]


def stop_behind(step: str) -> Callable[[str], None]:
    def say(text: str) -> None:
        if text == step:
            raise KeyboardInterrupt

    return say


def test_a_step_that_was_cut_short_is_done_anew(tmp_path: Path) -> None:
    steps = Steps(tmp_path)

    def fails(_fresh: bool) -> dict[str, Any]:
        raise RuntimeError

    with pytest.raises(RuntimeError):
        steps.run("one", 1, fails)
    assert Steps(tmp_path).run("one", 1, lambda fresh: {"fresh": fresh}) == {"fresh": False}
    with pytest.raises(InvalidInputError, match="another recipe"):
        Steps(tmp_path).run("one", 2, lambda fresh: {"fresh": fresh})
    assert Steps(tmp_path, redo=True).run("one", 2, lambda fresh: {"fresh": fresh}) == {"fresh": True}
    (tmp_path / "one.json").write_text("torn")
    with pytest.raises(InvalidInputError, match="another recipe"):
        Steps(tmp_path).run("one", 2, lambda fresh: {"fresh": fresh})


def test_the_writer_is_closed_before_the_reader_opens(tiny_engine: TransformersEngine) -> None:
    order: list[str] = []

    class Writer:
        def close(self) -> None:
            order.append("closed")

    def read() -> TransformersEngine:
        order.append("opened")
        return tiny_engine

    engines = Engines(Writer, read)  # type: ignore[arg-type]
    engines.writer()
    assert engines.reader() is engines.reader() is tiny_engine
    assert order == ["closed", "opened"]


def test_another_run_at_work_is_refused(recipe: Recipe, tmp_path: Path, tiny_engine: TransformersEngine) -> None:
    from filelock import FileLock

    out = tmp_path / "out"
    out.mkdir()
    with FileLock(str(out / ".lock")), pytest.raises(InvalidInputError, match="at work"):
        reproduce(recipe, out, Engines(lambda: tiny_engine), Source(tmp_path))


def test_scores_and_classification() -> None:
    truth = np.array([True] * 20 + [False] * 20)
    told = np.where(truth, 1.0, 0.0) + np.linspace(0, 0.1, 40)
    found = score_figures("a", {"mean_logprob": told, "entropy": told}, truth)
    assert found["a.mean_logprob.auroc"]["value"] == 1.0
    assert found["a.mean_logprob.fpr95"]["value"] == 0.0
    assert found["a.entropy.auroc"]["value"] == 0.0  # lower entropy is to mean right
    assert score_figures("a", {"entropy": told}, np.ones(40, dtype=bool))["a.entropy.auroc"]["value"] is None

    rng = np.random.default_rng(0)
    labels = ["x", "y"] * 50
    vectors = np.where(np.array(labels) == "x", 1.0, -1.0)[:, None] + rng.normal(0, 0.1, (100, 4))
    right = experiments(
        vectors.astype(np.float32), labels, vectors.astype(np.float32), labels, samples_per_label=8, count=4, seed=1
    )
    assert right.shape == (4, 100)
    assert accuracy(right, 0) == {"value": 1.0, "low": 1.0, "high": 1.0}
    coin = accuracy(rng.random((4, 200)) < 0.5, 0)
    assert coin["low"] is not None
    assert coin["high"] is not None
    assert coin["low"] < 0.5 < coin["high"]


def test_labels_are_written_by_one_path(tiny_engine: TransformersEngine, tmp_path: Path, recipe: Recipe) -> None:
    """The file is the same to the byte whatever the chunk it was killed behind."""
    from kvroute.labelling import Labeller
    from kvroute.thinking import ThinkingMode

    assert recipe.routing is not None
    asked = Source(tmp_path).questions(recipe.routing.test[0])
    labeller = Labeller(tiny_engine, thinking=ThinkingMode.instructions(), max_tokens={"fast": 2, "slow": 3})
    assert write_labels(labeller, asked, tmp_path / "a.jsonl", chunk=5) == 0
    with pytest.raises(InvalidInputError, match="there already"):
        write_labels(labeller, asked, tmp_path / "a.jsonl", chunk=5)
