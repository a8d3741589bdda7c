"""Plots of a :class:`~kvroute.score_report.ScoreReport`: AUROC, risk and coverage, calibration, distributions."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np

from kvroute.reports.plots import COLOURS, MARKERS, line_style, new_figure, require_matplotlib
from kvroute.routing_metrics import reliability
from kvroute.score_judging import WITH_CONFIDENCE
from kvroute.score_metrics import RiskCoverage
from kvroute.self_evaluation import CONFIDENCE

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

    from kvroute.score_report import ScoreReport

_COLUMNS = 3
_CURVES = 6
_BINS = 24
_GREY = "#7f7f7f"


def _grid(count: int, width: float, height: float) -> tuple[Figure, list[Axes]]:
    """Small plots beside each other, in the style of the others."""
    require_matplotlib()
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    columns = min(count, _COLUMNS)
    rows = -(-count // columns)
    figure = Figure(figsize=(width * columns, height * rows), layout="constrained")
    FigureCanvasAgg(figure)
    drawn: list[Any] = list(np.ravel(figure.subplots(rows, columns, squeeze=False)))
    for axes in drawn[count:]:
        axes.set_visible(False)
    for axes in drawn[:count]:
        axes.grid(color="#dddddd", linewidth=0.6)
        axes.set_axisbelow(True)
        for side in ("top", "right"):
            axes.spines[side].set_visible(False)
    return figure, drawn[:count]


def leading(report: ScoreReport, count: int = _CURVES) -> list[str]:
    """What plots with room for few show: the trained confidence, the best KV-CoE, the best of other kinds."""
    from kvroute.scores import SCORES

    raw = [n for n in report.names if n in SCORES and SCORES[n].family == "kv-coe"]
    chosen = [n for n in (CONFIDENCE, WITH_CONFIDENCE, *raw[:1]) if n in report.names]
    for name in report.names:
        kind = SCORES[name].family if name in SCORES else name
        if kind not in {SCORES[c].family if c in SCORES else c for c in chosen}:
            chosen.append(name)
    return chosen[:count]


def plot_auroc(report: ScoreReport) -> Figure:
    """AUROC of every score: the mean over sets with its interval, and each set."""
    names = report.names[::-1]
    figure, axes = new_figure(7.5, 1.2 + 0.3 * len(names))
    axes.axvline(0.5, color=_GREY, linestyle=(0, (1, 2)), linewidth=1)
    for place, s in enumerate(report.sets):
        axes.plot(
            [s.drawn[n].value["auroc"] for n in names], range(len(names)), linestyle="none", alpha=0.7,
            marker=MARKERS[(place + 1) % len(MARKERS)], markersize=4, color=_GREY,
            label=s.name if len(report.sets) > 1 else None,
        )  # fmt: skip
    for y, name in enumerate(names):
        e = report.mean(name).estimates()["auroc"]
        arms = None
        if e.value is not None and e.low is not None and e.high is not None:
            arms = [[max(0.0, e.value - e.low)], [max(0.0, e.high - e.value)]]
        colour = COLOURS[0] if name in report.baselines else COLOURS[1]
        axes.errorbar(
            [e.value or 0.0], [y], xerr=arms, color=colour, marker="o", markersize=6, elinewidth=1.4, capsize=2
        )
    axes.set_yticks(range(len(names)), names)
    axes.set_xlabel("AUROC (orange: reads keys and values; blue: does not)")
    if len(report.sets) > 1:
        axes.legend(fontsize=8, loc="center left", bbox_to_anchor=(1.01, 0.5), frameon=False)
    return figure


def plot_risk_coverage(report: ScoreReport) -> Figure:
    """Errors among the answers kept, over the share kept; a plot a set."""
    figure, drawn = _grid(len(report.sets), 4.0, 3.2)
    names = leading(report)
    for axes, s in zip(drawn, report.sets, strict=True):
        ideal = RiskCoverage.of(s.truth.astype(np.float64) - np.arange(len(s)) * 1e-9, s.truth)
        axes.plot(ideal.coverage, ideal.risk, color="#000000", linewidth=1, linestyle=(0, (1, 1)), label="oracle")
        axes.axhline(1 - s.right, color=_GREY, linestyle=(0, (1, 2)), linewidth=1, label="at random")
        for place, name in enumerate(names):
            colour, line = line_style(place)
            curve = RiskCoverage.of(s.values[name], s.truth)
            shown = curve.coverage >= min(0.05, float(curve.coverage.max()))
            axes.plot(
                curve.coverage[shown], curve.risk[shown], color=colour, linestyle=line, linewidth=1.5, label=name
            )  # fmt: skip
        axes.set_title(s.name, fontsize=10)
        axes.set_xlabel("share of answers kept")
        axes.set_ylabel("errors among them")
    handles, labels = drawn[0].get_legend_handles_labels()
    figure.legend(handles, labels, fontsize=8, loc="outside lower center", ncols=4, frameon=False)
    return figure


def plot_calibration(report: ScoreReport) -> Figure:
    """Share of right answers over the probability that was said, all sets together."""
    figure, axes = new_figure(7.0, 5.0)
    axes.plot([0, 1], [0, 1], color=_GREY, linestyle=(0, (1, 2)), linewidth=1, label="as said")
    truth = np.concatenate([s.truth for s in report.sets]).astype(np.float64)
    for place, name in enumerate(leading(report)):
        colour, line = line_style(place)
        bins = reliability(np.concatenate([s.probability[name] for s in report.sets]), truth)
        arms = [[max(0.0, b.right - b.right_low) for b in bins], [max(0.0, b.right_high - b.right) for b in bins]]
        axes.errorbar(
            [b.probability for b in bins], [b.right for b in bins], yerr=arms if place == 0 else None, color=colour,
            linestyle=line, linewidth=1.5, marker=MARKERS[place % len(MARKERS)], markersize=5, elinewidth=1, capsize=2,
            label=name,
        )  # fmt: skip
    axes.set_xlim(-0.02, 1.02)
    axes.set_ylim(-0.02, 1.02)
    axes.set_xlabel("probability that the answer is right, as said")
    axes.set_ylabel("share of right answers")
    axes.legend(fontsize=8, loc="center left", bbox_to_anchor=(1.01, 0.5), frameon=False)
    return figure


def plot_distributions(report: ScoreReport) -> Figure:
    """How right and wrong answers spread over each score, all sets together; the outer 1 % is cut off."""
    names = leading(report)
    figure, drawn = _grid(len(names), 4.0, 2.6)
    truth = np.concatenate([s.truth for s in report.sets])
    for axes, name in zip(drawn, names, strict=True):
        values = np.concatenate([s.values[name] for s in report.sets])
        low, high = np.quantile(values, [0.005, 0.995])
        edges = np.linspace(low, high if high > low else low + 1, _BINS + 1)
        for place, (kind, mask) in enumerate((("right", truth), ("wrong", ~truth))):
            axes.hist(
                np.clip(values[mask], edges[0], edges[-1]), bins=list(edges), density=True, histtype="stepfilled",
                alpha=0.45, color=COLOURS[place], edgecolor=COLOURS[place], linewidth=1.2, label=kind,
            )  # fmt: skip
        axes.set_title(name, fontsize=10)
        axes.set_yticks([])
    handles, labels = drawn[0].get_legend_handles_labels()
    figure.legend(handles, labels, fontsize=8, loc="outside lower center", ncols=2, frameon=False)
    return figure
