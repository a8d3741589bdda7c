"""The harness of the benchmarks: what it judges, when it stops, and what it prints."""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parents[2] / "benchmarks"))

from _harness import JUDGED_FROM, Figure, Ratio, exact, figure_table, finish, judge, measure, summarise


class Machine:
    """A clock that only moves when work is done."""

    def __init__(self) -> None:
        self.now = 0.0
        self.order: list[str] = []

    def __call__(self) -> float:
        return self.now

    def work(self, name: str, seconds: float, jitter: tuple[float, ...] = (1.0,)) -> object:
        def run() -> None:
            self.order.append(name)
            self.now += seconds * jitter[len(self.order) % len(jitter)]

        return run


@pytest.mark.parametrize(
    ("low", "high", "must", "ok"),
    [
        (0.9, 1.02, "<= 1.02", True),
        (1.03, 1.2, "<= 1.02", False),
        (1.01, 1.03, "<= 1.02", None),
        (1.8, 2.0, ">= 1.8", True),
        (1.0, 1.79, ">= 1.8", False),
        (1.7, 1.9, ">= 1.8", None),
        (1.0, 1.0, None, None),
    ],
)
def test_judged_by_the_whole_interval(low: float, high: float, must: str | None, ok: bool | None) -> None:
    assert judge(low, high, must) is ok


def test_a_must_that_cannot_be_read_is_refused() -> None:
    with pytest.raises(ValueError, match="must is"):
        judge(0, 1, "about 1")


def test_both_sides_run_in_both_orders_and_a_clear_ratio_ends_early() -> None:
    machine = Machine()
    sides = {"a": machine.work("a", 3.0), "b": machine.work("b", 2.0)}
    found = measure(
        sides,  # type: ignore[arg-type]
        {"slower": Ratio("a", "b", "<= 1.02")},
        seconds=1e9,
        warmup=0,
        clock=machine,
        cpu_clock=machine,
    )
    figure = found.figures["slower"]
    assert figure.value == pytest.approx(1.5)
    assert figure.ok is False
    assert figure.rounds == JUDGED_FROM
    assert machine.order[:8] == ["a", "b", "b", "a", "b", "a", "a", "b"]


def test_time_ends_what_stays_undecided() -> None:
    machine = Machine()
    sides = {"a": machine.work("a", 1.0, (0.8, 1.3, 1.0, 0.9, 1.1)), "b": machine.work("b", 1.0, (1.2, 0.7, 1.0))}
    found = measure(
        sides,  # type: ignore[arg-type]
        {"even": Ratio("a", "b", "<= 1.0")},
        seconds=60,
        warmup=0,
        clock=machine,
        cpu_clock=machine,
    )
    assert machine.now <= 60
    assert found.figures["even"].ok is None


def test_few_rounds_are_not_judged() -> None:
    assert summarise([1.0] * (JUDGED_FROM - 1), "<= 1.02").ok is None
    assert summarise([1.0] * JUDGED_FROM, "<= 1.02").ok is True


@pytest.mark.parametrize(("oks", "whole"), [((True, True), True), ((True, None), None), ((None, False), False)])
def test_the_last_line_is_one_json_object(
    oks: tuple[bool | None, bool | None], whole: bool | None, capsys: pytest.CaptureFixture[str]
) -> None:
    figures = {f"figure_{i}": Figure(1.0, 0.9, 1.1, "<= 1.02", ok, 7) for i, ok in enumerate(oks)}
    print(figure_table(figures))
    finish(argparse.Namespace(json=True, seed=3), name="x", figures=figures, baseline="y", n={"texts": 1})
    found = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert set(found) == {"name", "figures", "ok", "baseline", "n", "versions", "machine", "seed"}
    assert found["figures"]["figure_0"] == {"value": 1.0, "low": 0.9, "high": 1.1, "must": "<= 1.02", "ok": oks[0]}
    assert found["ok"] is whole
    assert found["machine"]["cores"] >= 1


def test_an_exact_figure_has_no_width() -> None:
    figure = exact(8.0, "<= 8.0")
    assert (figure.low, figure.high, figure.ok) == (8.0, 8.0, True)
