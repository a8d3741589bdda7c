"""The report: what stands in it, and files that are the same to the byte."""

from __future__ import annotations

import builtins
import json
import xml.etree.ElementTree as ET
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from rich.console import Console

from kvroute import RoutingReport
from kvroute.errors import InvalidInputError, MissingExtraError
from kvroute.routing_curves import Modes, Outcome, hull_thresholds
from kvroute.routing_intervals import Resamples
from kvroute.routing_metrics import difficulty_figures
from label_data import label_rows


def report(*, seed: int = 0) -> RoutingReport:
    rows = label_rows(120, seed=5)
    modes = Modes.of(rows)
    made = RoutingReport(modes, Resamples(len(rows), 120, seed=seed), points=2.0, about={"model": "tiny"})
    labels = np.array([r.label for r in rows], dtype=float)
    noise = np.random.default_rng(1).normal(size=len(rows))
    for name, spread in (("head", 10.0), ("length", 60.0)):
        difficulty = np.clip(labels + spread * noise, 0, 100)
        made.add_sweep(
            name, modes.sweep(difficulty), chosen=modes.sweep(difficulty, hull_thresholds(modes, difficulty))
        )
        made.add_point(name, modes.one_step(difficulty, 50))
        made.add_difficulty(name, difficulty_figures(rows, difficulty, 1 - difficulty / 100, made.resamples))
    made.compare("head", "length")
    return made


def test_json_says_what_the_objects_say() -> None:
    made = report()
    found = json.loads(json.dumps(made.to_dict(), allow_nan=False))
    assert found["about"] == {"model": "tiny"}
    assert list(found["policies"]) == ["always fast", "always slow", "oracle", "head", "length", "random"]
    oracle = found["policies"]["oracle"]["point"]
    assert oracle["accuracy"]["value"] == pytest.approx(made.modes.oracle().accuracy)
    assert oracle["of_oracle"] == {"value": 1.0, "low": 1.0, "high": 1.0}
    assert found["policies"]["always slow"]["point"]["accuracy_gain"] == {"value": 0.0, "low": 0.0, "high": 0.0}
    curve = found["policies"]["head"]["curve"]
    assert curve["accuracy"] == pytest.approx(made.curves["head"].accuracy.tolist())
    for low, value, high in zip(curve["accuracy_low"], curve["accuracy"], curve["accuracy_high"], strict=True):
        assert low <= value <= high
    assert found["compared"][0]["gap_recovered_difference"]["value"] == pytest.approx(
        found["policies"]["head"]["gap_recovered"]["value"] - found["policies"]["length"]["gap_recovered"]["value"]
    )
    assert found["difficulties"]["head"]["reliability"][0]["rows"] > 0


def test_tables_show_every_policy_and_difficulty() -> None:
    made = report()
    console = Console(width=200, record=True, file=open("/dev/null", "w"))  # noqa: SIM115
    for table in made.tables():
        console.print(table)
    console.file.close()
    text = console.export_text()
    for name in made.to_dict()["policies"]:
        assert name in text
    assert f"{made.modes.oracle().accuracy:.3f} [" in text
    assert "AUROC" in text


def test_files_are_the_same_to_the_byte(tmp_path: Path) -> None:
    names = ["report.json", "curves.png", "curves.svg", "reliability.png", "reliability.svg"]
    written = [report().save(tmp_path / folder) for folder in ("a", "b")]
    assert [p.name for p in written[0]] == names
    for name in names:
        first, second = ((tmp_path / folder / name).read_bytes() for folder in ("a", "b"))
        assert first == second, name
    other = report(seed=9)
    other.save(tmp_path / "c")
    assert (tmp_path / "c/report.json").read_bytes() != (tmp_path / "a/report.json").read_bytes()
    assert (tmp_path / "a/curves.png").read_bytes().startswith(b"\x89PNG")
    ET.fromstring((tmp_path / "a/curves.svg").read_text())


def test_plot_draws_what_was_measured() -> None:
    from kvroute.routing_report import plot_curves, plot_reliability

    made = report()
    axes = plot_curves(made).axes[0]
    drawn = {str(line.get_label()): line for line in axes.lines}
    for name, curve in made.curves.items():
        np.testing.assert_allclose(np.asarray(drawn[name].get_ydata()), curve.accuracy)
        np.testing.assert_allclose(np.asarray(drawn[name].get_xdata()), curve.mean_tokens)
    styles = [(drawn[n].get_color(), drawn[n].get_linestyle()) for n in made.curves]
    assert len({c for c, _ in styles}) == len(styles)  # told apart by colour and, without it, by line
    labels = [text.get_text() for text in axes.get_legend().get_texts()]
    assert {"always fast", "always slow", "oracle", "random", "head", "length"} <= set(labels)
    bins = made.difficulties["head"].reliability
    said = {str(c.get_label()): c for c in plot_reliability(made.difficulties).axes[0].containers}["head"]
    np.testing.assert_allclose(np.asarray(said.lines[0].get_ydata(), dtype=float), [b.right for b in bins])


def test_without_a_difficulty_there_is_no_reliability_plot(tmp_path: Path) -> None:
    modes = Modes(Outcome(np.ones(5), np.ones(5)), Outcome(np.ones(5), np.full(5, 9.0)))
    made = RoutingReport(modes, Resamples(5, 100))
    assert [p.name for p in made.save(tmp_path)] == ["report.json", "curves.png", "curves.svg"]
    assert json.loads((tmp_path / "report.json").read_text())["policies"]["random"]["gap_recovered"]["value"] is None


def test_a_name_is_taken_once() -> None:
    made = report()
    with pytest.raises(InvalidInputError, match="'head'"):
        made.add_point("head", made.modes.fast)
    with pytest.raises(InvalidInputError, match="'random'"):
        made.add_sweep("random", made.modes.random())


def test_without_matplotlib_the_extra_is_named(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    real = builtins.__import__

    def without(name: str, *rest: Any, **more: Any) -> Any:
        if name.startswith("matplotlib"):
            raise ImportError(name)
        return real(name, *rest, **more)

    made = report()
    monkeypatch.setattr(builtins, "__import__", without)
    with pytest.raises(MissingExtraError, match="eval"):
        made.save(tmp_path)
    assert not list(tmp_path.iterdir())
