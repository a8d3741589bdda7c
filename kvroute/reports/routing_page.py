"""A routing report as a page: curve, tables, difficulty of each kind of question, calibration."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np

from kvroute.reports.page import Cell, ReportPage
from kvroute.reports.plots import new_figure
from kvroute.routing_report import plot_curves, plot_reliability

if TYPE_CHECKING:
    from matplotlib.figure import Figure

    from kvroute.routing_intervals import Estimate
    from kvroute.routing_metrics import DifficultyCounts
    from kvroute.routing_report import RoutingReport

PAGE = "report.html"
_KINDS = (("fast", "fast is right", "#56B4E9"), ("only_slow", "only slow is right", "#E69F00"),
          ("neither", "neither is right", "#7f7f7f"))  # fmt: skip
_LEFT_OUT = "left_out"


def routing_page(report: RoutingReport, *, command: str | None = None) -> ReportPage:
    """The page of a report.

    Args:
        report: with all its policies.
        command: that made it.

    Raises:
        MissingExtraError: matplotlib is not installed.
    """
    settings = {k: v for k, v in report.about.items() if k != _LEFT_OUT}
    settings |= {"rows": len(report.modes), "resamples": report.resamples.count, "points": report.points}
    name = report.about.get("head", {}).get("name")
    title = f"Routing by difficulty: {name}" if name else "Routing policies"
    page = ReportPage(title, summary=_summary(report, name), command=command, settings=settings)
    level = f"{100 * report.resamples.level:g} % intervals"
    page.add_plot(
        "Accuracy over tokens", plot_curves(report, legend="below"),
        note=f"A curve is a policy at all its thresholds, the band its {level}. Up and to the left is better; the grey "
        "line is what choosing at random gets.",
    )  # fmt: skip
    columns, rows = report.policy_rows()
    page.add_table(
        "Policies", columns, rows,
        note=f"In brackets {level} (paired bootstrap over rows). Thresholds were chosen on validation rows. Tokens at "
        f"slow - {report.points:g} pt: what a policy needs for the accuracy of always slow minus "
        f"{_points(report.points)}. Gap recovered: area under the curve between always fast and always "
        "slow; random has 0.5.",
    )  # fmt: skip
    if report.compared:
        page.add_table(
            "Side by side", *_compared(report.compared),
            note=f"Paired {level}. Ratio and difference are of the tokens at the accuracy of always slow minus "
            f"{_points(report.points)}: a ratio whose interval lies below 1 means fewer tokens.",
        )  # fmt: skip
    if report.difficulties:
        columns, rows = report.difficulty_rows()
        page.add_table(
            "How well the difficulty tells questions apart", columns, rows,
            note="AUROC: the probability that a question of the one kind has the lower (fast is right) or higher (only "
            "slow is right) difficulty than one of another kind; 0.5 is chance. MAE against the labels, of 100. "
            "Calibration error of the probability that fast is right, over 10 bins.",
        )  # fmt: skip
        first = next(iter(report.difficulties))
        page.add_plot(
            f"Difficulty of right and wrong, by {first}", plot_counts(report.difficulties[first].counts),
            note="Rows by difficulty, and what is right on them. The better the difficulty, the less colours overlap.",
        )  # fmt: skip
    if any(f.reliability for f in report.difficulties.values()):
        page.add_plot(
            "Calibration: is fast right as often as was said?", plot_reliability(report.difficulties, legend="below"),
            note="Share of right fast answers over the probability that the difficulty stands for; on the dotted line "
            "both agree. Bars are Wilson's intervals of the first curve.",
        )  # fmt: skip
    if report.about.get(_LEFT_OUT):
        page.add_text("Left out", "\n\n".join(f"{k}: {why}" for k, why in report.about[_LEFT_OUT].items()))
    return page


def plot_counts(counts: DifficultyCounts) -> Figure:
    """Rows over their difficulty, stacked by what is right on them.

    Raises:
        MissingExtraError: matplotlib is not installed.
    """
    figure, axes = new_figure(6.6, 3.6)
    edges = np.array(counts.edges)
    floor = np.zeros(len(edges) - 1)
    for kind, label, colour in _KINDS:
        height = np.array(getattr(counts, kind), dtype=float)
        axes.bar(
            edges[:-1], height, np.diff(edges), floor, align="edge", color=colour, edgecolor="white", linewidth=0.5,
            label=f"{label} ({int(height.sum())})",
        )  # fmt: skip
        floor += height
    axes.set_xlim(edges[0], edges[-1])
    axes.set_xlabel("difficulty")
    axes.set_ylabel("rows")
    figure.legend(loc="outside lower center", ncols=3, fontsize=9, frameon=False)
    return figure


def _summary(report: RoutingReport, name: str | None) -> str:
    fast, slow = report.figures["always fast"], report.figures["always slow"]
    told = [
        f"On {len(report.modes):,} rows that nothing was fitted to, always fast is right in {_said(fast.accuracy, 3)} "
        f"with {_said(fast.tokens, 1)} tokens a question, always slow in {_said(slow.accuracy, 3)} with "
        f"{_said(slow.tokens, 1)}."
    ]
    if name is not None and name in report.figures:
        point = report.figures[name]
        told.append(
            f"{name} is right in {_said(point.accuracy, 3)} with {_said(point.tokens, 1)} tokens, "
            f"{_said(point.of_oracle, 2)} of the oracle's."
        )
        for word, verdict in (("fewer", _FEWER), ("more", _MORE), ("neither clearly fewer nor more", _ALIKE)):
            others = [c["b"] for c in report.compared if c["a"] == name and _verdict(c["tokens_ratio"]) == verdict]
            if others:
                told.append(
                    f"At the accuracy of always slow minus {_points(report.points)} it needs {word} tokens than "
                    f"{', '.join(others)}."
                )
    return " ".join(told)


def _said(estimate: Estimate, digits: int) -> str:
    return "?" if estimate.value is None else f"{estimate.value:.{digits}f}"


_FEWER, _MORE, _ALIKE = "fewer tokens", "more tokens", "not told apart"


def _verdict(ratio: dict[str, float | None]) -> str | None:
    low, high = ratio["low"], ratio["high"]
    if low is None or high is None:
        return None
    return _FEWER if high < 1 else _MORE if low > 1 else _ALIKE


def _compared(found: list[dict[str, Any]]) -> tuple[list[str], list[list[Cell]]]:
    columns = ["policy", "against", "ratio of tokens", "difference of tokens", "difference of gap recovered", "verdict"]
    rows: list[list[Cell]] = [
        [
            c["a"], c["b"], _interval(c["tokens_ratio"], 2), _interval(c["tokens_difference"], 1),
            _interval(c["gap_recovered_difference"], 3), _verdict(c["tokens_ratio"]),
        ]
        for c in found
    ]  # fmt: skip
    return columns, rows


def _interval(told: dict[str, float | None], digits: int) -> str | None:
    value, low, high = told["value"], told["low"], told["high"]
    if value is None:
        return None
    return f"{value:.{digits}f}" + ("" if low is None or high is None else f" [{low:.{digits}f}, {high:.{digits}f}]")


def _points(points: float) -> str:
    return f"{points:g} point" + ("" if points == 1 else "s")
