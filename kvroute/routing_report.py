"""All policies in one table, one plot and one JSON file.

Files are the same to the byte for the same rows and seed: no times, no machine, and plots without dates.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from kvroute._version import __version__
from kvroute.errors import InvalidInputError
from kvroute.files import write_whole
from kvroute.reports.plots import MARKERS, line_style, new_figure, rendered
from kvroute.routing_curves import Modes, Outcome, Sweep
from kvroute.routing_intervals import (
    EqualAccuracy,
    Estimate,
    PointFigures,
    Resamples,
    at_equal_accuracy,
    compare_at_equal_accuracy,
    compare_gaps,
    gap_recovered,
    point_figures,
)
from kvroute.routing_metrics import DifficultyFigures

if TYPE_CHECKING:
    from matplotlib.figure import Figure
    from rich.table import Table

REPORT, CURVES, RELIABILITY = "report.json", "curves", "reliability"


class RoutingReport:
    """Collects policies that are judged on the same rows.

    Always fast, always slow, random and the oracle are there from the beginning.

    Args:
        modes: what each mode gets on the rows.
        resamples: of these rows.
        points: tokens are compared at the accuracy of always slow minus so many points.
        about: what else the JSON shall say: model, head, rows, seed ...
    """

    def __init__(
        self, modes: Modes, resamples: Resamples, *, points: float = 1.0, about: Mapping[str, Any] | None = None
    ) -> None:
        self.modes, self.resamples, self.points, self.about = modes, resamples, points, dict(about or {})
        self.outcomes: dict[str, Outcome] = {}
        self.figures: dict[str, PointFigures] = {}
        self.curves: dict[str, Sweep] = {}
        self.settings: dict[str, Sweep] = {}
        self.equal: dict[str, EqualAccuracy] = {}
        self.gaps: dict[str, Estimate] = {}
        self.difficulties: dict[str, DifficultyFigures] = {}
        self.compared: list[dict[str, Any]] = []
        for name, outcome in (
            ("always fast", modes.fast), ("always slow", modes.slow), ("oracle", modes.oracle()),
        ):  # fmt: skip
            self.add_point(name, outcome)
        self.add_sweep("random", modes.random())

    # ------------------------------------------------------------------ collecting

    def add_point(self, name: str, outcome: Outcome) -> None:
        """A policy as it was chosen on other rows: one accuracy, one number of tokens."""
        self._new(name, self.outcomes)
        self.outcomes[name] = outcome
        self.figures[name] = point_figures(outcome, self.modes, self.resamples)

    def add_sweep(self, name: str, curve: Sweep, *, chosen: Sweep | None = None) -> None:
        """A policy at many settings.

        Args:
            name: of the policy.
            curve: all settings, for the plot and the area under it.
            chosen: settings that were chosen on other rows (``modes.sweep(difficulty, hull_thresholds(...))``), for
                tokens at equal accuracy; by default those of ``curve``.
        """
        self._new(name, self.curves)
        self.curves[name] = curve
        self.settings[name] = curve if chosen is None else chosen
        self.equal[name] = at_equal_accuracy(self.settings[name], self.modes, self.resamples, self.points)
        self.gaps[name] = gap_recovered(curve, self.modes, self.resamples)

    def add_difficulty(self, name: str, figures: DifficultyFigures) -> None:
        """How good a policy's difficulty is."""
        self._new(name, self.difficulties)
        self.difficulties[name] = figures

    def compare(self, a: str, b: str) -> dict[str, Any]:
        """Two sweeps, paired: tokens at equal accuracy and the gap recovered; kept for the JSON."""
        difference, ratio = compare_at_equal_accuracy(
            self.settings[a], self.settings[b], self.modes, self.resamples, self.points
        )
        gap = compare_gaps(self.curves[a], self.curves[b], self.modes, self.resamples)
        found = {
            "a": a,
            "b": b,
            "tokens_difference": difference.to_dict(),
            "tokens_ratio": ratio.to_dict(),
            "gap_recovered_difference": gap.to_dict(),
        }
        self.compared.append(found)
        return found

    def _new(self, name: str, known: Mapping[str, object]) -> None:
        if name in known:
            raise InvalidInputError(f"The report has a policy {name!r} already.")

    # ------------------------------------------------------------------ showing

    def to_dict(self) -> dict[str, Any]:
        """Everything, for JSON."""
        r = self.resamples
        return {
            "kvroute": __version__,
            "about": self.about,
            "rows": len(self.modes),
            "resamples": r.count,
            "level": r.level,
            "points": self.points,
            "policies": {name: self._policy(name) for name in self._names()},
            "difficulties": {name: figures.to_dict() for name, figures in self.difficulties.items()},
            "compared": self.compared,
        }

    def _policy(self, name: str) -> dict[str, Any]:
        found: dict[str, Any] = {}
        if name in self.figures:
            found["point"] = self.figures[name].to_dict()
        if name in self.curves:
            found["at_equal_accuracy"] = self.equal[name].to_dict()
            found["gap_recovered"] = self.gaps[name].to_dict()
            found["curve"] = _curve(self.curves[name], self.resamples)
        return found

    def policy_rows(self) -> tuple[list[str], list[list[str | None]]]:
        """Columns and rows of the table of policies; None where a figure is not defined."""
        at = f"tokens at slow - {self.points:g} pt"
        columns = ["policy", "accuracy", "tokens", "of the oracle's", at, "of the oracle's", "gap recovered"]
        rows = []
        for name in self._names():
            point, equal, gap = self.figures.get(name), self.equal.get(name), self.gaps.get(name)
            rows.append(
                [
                    name,
                    None if point is None else _shown(point.accuracy, 3),
                    None if point is None else _shown(point.tokens, 1),
                    None if point is None else _shown(point.of_oracle, 2),
                    None if equal is None else _shown(equal.tokens, 1),
                    None if equal is None else _shown(equal.of_oracle, 2),
                    None if gap is None else _shown(gap, 3),
                ]
            )
        return columns, rows

    def difficulty_rows(self) -> tuple[list[str], list[list[str | None]]]:
        """Columns and rows of the table of difficulties, as :meth:`policy_rows`."""
        columns = ["difficulty", "AUROC fast is right", "AUROC only slow is right", "MAE", "calibration error"]
        rows = [
            [
                name,
                _shown(f.auroc_fast_right, 3),
                _shown(f.auroc_only_slow_right, 3),
                _shown(f.mae, 1),
                None if f.calibration_error is None else f"{f.calibration_error:.3f}",
            ]
            for name, f in self.difficulties.items()
        ]
        return columns, rows

    def tables(self) -> list[Table]:
        """For a terminal: policies, and difficulties where there are any."""
        from rich.table import Table

        title = f"Policies on {len(self.modes)} rows, {100 * self.resamples.level:g} % intervals"
        shown = [(title, *self.policy_rows())]
        if self.difficulties:
            shown.append(("How well the difficulty tells", *self.difficulty_rows()))
        tables = []
        for title, columns, rows in shown:
            table = Table(title=title)
            for heading in columns:
                table.add_column(heading, overflow="fold")
            for row in rows:
                table.add_row(*("" if cell is None else cell for cell in row))
            tables.append(table)
        return tables

    def save(self, folder: str | Path) -> list[Path]:
        """Write ``report.json``, and the plots as PNG and SVG.

        Raises:
            MissingExtraError: matplotlib is not installed.
        """
        target = Path(folder)
        plots = {CURVES: plot_curves(self)}
        if any(f.reliability for f in self.difficulties.values()):
            plots[RELIABILITY] = plot_reliability(self.difficulties)
        text = json.dumps(self.to_dict(), indent=1, sort_keys=True, allow_nan=False, ensure_ascii=False)
        write_whole(target / REPORT, (text + "\n").encode())
        written = [target / REPORT]
        for name, figure in plots.items():
            for suffix in ("png", "svg"):
                written.append(target / f"{name}.{suffix}")
                write_whole(written[-1], rendered(figure, suffix))
        return written

    def _names(self) -> list[str]:
        """Policies in the order they came, sweeps and points together."""
        return list(dict.fromkeys([*self.outcomes, *self.curves]))


def _curve(curve: Sweep, resamples: Resamples) -> dict[str, list[float] | None]:
    low, high = resamples.band(curve.right)
    return {
        "settings": curve.settings.tolist(),
        "slow": None if curve.slow is None else curve.slow.tolist(),
        "accuracy": curve.accuracy.tolist(),
        "accuracy_low": low.tolist(),
        "accuracy_high": high.tolist(),
        "tokens": curve.mean_tokens.tolist(),
    }


def _shown(estimate: Estimate, digits: int) -> str | None:
    if estimate.value is None:
        return None
    if estimate.low is None or estimate.high is None:
        return f"{estimate.value:.{digits}f}"
    return f"{estimate.value:.{digits}f} [{estimate.low:.{digits}f}, {estimate.high:.{digits}f}]"


# ---------------------------------------------------------------------- plots


Legend = Literal["right", "below"]
"""Where a plot's legend stands: beside it, or under it, which suits narrow pages."""


def plot_curves(report: RoutingReport, *, legend: Legend = "right") -> Figure:
    """Accuracy over tokens a question: curves with bands, points with bars.

    Raises:
        MissingExtraError: matplotlib is not installed.
    """
    figure, axes = new_figure(*((8.0, 5.4) if legend == "right" else (6.6, 5.4)))
    for place, (name, curve) in enumerate(report.curves.items()):
        colour, line = ("#7f7f7f", (0, (1, 2))) if name == "random" else line_style(place - 1)
        low, high = report.resamples.band(curve.right)
        axes.fill_between(curve.mean_tokens, low, high, color=colour, alpha=0.10, linewidth=0)
        axes.plot(curve.mean_tokens, curve.accuracy, color=colour, linestyle=line, linewidth=1.7, label=name)
    labelled = False
    for place, (name, figures) in enumerate(report.figures.items()):
        x, y = figures.tokens, figures.accuracy
        chosen = name in report.curves
        colour = line_style(list(report.curves).index(name) - 1)[0] if chosen else "#333333"
        label = name if not chosen else None if labelled else "circles: threshold chosen on other rows"
        labelled = labelled or chosen
        axes.errorbar(
            [x.value or 0.0], [y.value or 0.0], xerr=_arms(x), yerr=_arms(y), color=colour,
            marker="o" if chosen else MARKERS[1 + place % (len(MARKERS) - 1)], markersize=7, markeredgecolor="white",
            linestyle="none", elinewidth=1, label=label, zorder=5,
        )  # fmt: skip
    axes.set_xlabel("tokens a question")
    axes.set_ylabel("accuracy")
    axes.set_title(f"Accuracy over tokens, {len(report.modes)} rows, {100 * report.resamples.level:g} % intervals")
    _legend(figure, legend)
    return figure


def plot_reliability(difficulties: Mapping[str, DifficultyFigures], *, legend: Legend = "right") -> Figure:
    """Share of right fast answers over the probability that was said, with Wilson's intervals.

    Raises:
        MissingExtraError: matplotlib is not installed.
    """
    figure, axes = new_figure(*((7.0, 5.0) if legend == "right" else (6.0, 5.0)))
    axes.plot([0, 1], [0, 1], color="#7f7f7f", linestyle=(0, (1, 2)), linewidth=1, label="as said")
    shown = [(name, f) for name, f in difficulties.items() if f.reliability]
    for place, (name, f) in enumerate(shown):
        colour, line = line_style(place)
        x, y = [b.probability for b in f.reliability], [b.right for b in f.reliability]
        arms = [[b.right - b.right_low for b in f.reliability], [b.right_high - b.right for b in f.reliability]]
        axes.errorbar(
            x, y, yerr=_positive(arms) if place == 0 else None, color=colour, linestyle=line, linewidth=1.5,
            marker=MARKERS[place % len(MARKERS)], markersize=5, elinewidth=1, capsize=2, label=name,
        )  # fmt: skip
    axes.set_xlim(-0.02, 1.02)
    axes.set_ylim(-0.02, 1.02)
    axes.set_xlabel("probability that fast is right, as said")
    axes.set_ylabel("share of right fast answers")
    _legend(figure, legend)
    return figure


def _legend(figure: Figure, place: Legend) -> None:
    axes = figure.axes[0]
    if place == "right":
        axes.legend(fontsize=8, loc="center left", bbox_to_anchor=(1.01, 0.5), frameon=False)
    else:
        handles, labels = axes.get_legend_handles_labels()
        figure.legend(handles, labels, loc="outside lower center", ncols=3, fontsize=9, frameon=False)


def _arms(estimate: Estimate) -> list[list[float]] | None:
    if estimate.value is None or estimate.low is None or estimate.high is None:
        return None
    return _positive([[estimate.value - estimate.low], [estimate.high - estimate.value]])


def _positive(arms: Sequence[Sequence[float]]) -> list[list[float]]:
    return [[max(0.0, a) for a in side] for side in arms]
