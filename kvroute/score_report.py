"""All scores in one table, one page and one JSON file: :class:`ScoreReport`.

The JSON is the same to the byte for the same answers and seed.
"""

from __future__ import annotations

import json
from collections.abc import Collection, Mapping, Sequence
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

from kvroute._version import __version__
from kvroute.errors import InvalidInputError
from kvroute.files import write_whole
from kvroute.routing_intervals import Estimate
from kvroute.score_judging import BASELINES, ENOUGH, Comparison, JudgedSet, compare
from kvroute.score_metrics import MAP_FIGURES, RANK_FIGURES, Drawn

if TYPE_CHECKING:
    from rich.table import Table

    from kvroute.reports.page import ReportPage

REPORT, PAGE = "report.json", "report.html"
FIGURES = {"auroc": "AUROC", "aupr": "AUPR", "fpr95": "FPR95", "aurc": "AURC", "brier": "Brier", "ece": "ECE"}
"""As they are headed."""
NOTE = (
    "AUROC: probability that a right answer scores above a wrong one, .5 is chance. AUPR: average precision for right "
    "answers, chance is their share. FPR95: share of wrong answers that pass where 95 % of the right ones do. AURC: "
    "error among the answers kept, averaged over how many are kept. Brier and ECE are of the probability that a score "
    "gives, by a logistic map that was not fitted on the answer it is judged on. Of FPR95, AURC, Brier and ECE less is "
    "better."
)


class ScoreReport:
    """What each score is worth on some sets of answers.

    Args:
        sets: judged sets, one at least.
        about: what else the JSON shall say: model, head, seed ...
        baselines: scores that need no keys and values, which the others are compared with.
    """

    def __init__(
        self,
        sets: Sequence[JudgedSet],
        *,
        about: Mapping[str, Any] | None = None,
        baselines: Collection[str] = BASELINES,
    ) -> None:
        if not sets or len({s.name for s in sets}) < len(sets):
            raise InvalidInputError("A report needs sets of answers with different names.")
        self.sets = list(sets)
        self.about = dict(about or {})
        self._baselines = tuple(baselines)

    @cached_property
    def names(self) -> list[str]:
        """Scores that all sets have, the best mean AUROC first."""
        shared = [n for n in self.sets[0].drawn if all(n in s.drawn for s in self.sets)]
        return sorted(shared, key=lambda n: -self.mean(n).value["auroc"])

    @cached_property
    def baselines(self) -> list[str]:
        """Of these, what needs no keys and values, the best first."""
        return [n for n in self.names if n in self._baselines]

    @cached_property
    def others(self) -> list[str]:
        """Of these, what reads keys and values, the best first."""
        return [n for n in self.names if n not in self._baselines]

    @cached_property
    def compared(self) -> list[Comparison]:
        """Every score that reads keys and values against every one that does not."""
        return [compare(a, b, self.sets) for a in self.others for b in self.baselines]

    def mean(self, name: str) -> Drawn:
        """A score's figures, the mean over sets."""
        if name not in self._means:
            self._means[name] = Drawn.mean({s.name: s.drawn[name] for s in self.sets})
        return self._means[name]

    @cached_property
    def _means(self) -> dict[str, Drawn]:
        return {}

    def against(self, a: str, b: str) -> Comparison:
        """One of :attr:`compared`."""
        return next(c for c in self.compared if (c.a, c.b) == (a, b))

    # ------------------------------------------------------------------ showing

    @property
    def summary(self) -> str:
        """What was found, in a few sentences."""
        answers = sum(map(len, self.sets))
        best = self.names[0]
        told = [
            f"{answers} answers in {len(self.sets)} {'set' if len(self.sets) == 1 else 'sets'}. "
            f"The best score is {best}, AUROC {shown(self.mean(best).estimates()['auroc'])}"
            f"{' on the mean over sets' if len(self.sets) > 1 else ''}."
        ]
        ours = self.others
        if ours and self.baselines:
            c = self.against(ours[0], self.baselines[0])
            told.append(
                f"The best that reads keys and values ({c.a}) minus the best that does not ({c.b}): "
                f"{shown(c.auroc, sign=True)}{'' if c.p is None else f', p = {c.p:.2g}'}; both were chosen as the "
                "best on these answers."
            )
        worse = [n for n in self.names if (e := self.mean(n).estimates()["auroc"]).high is not None and e.high < 0.5]
        if worse:
            told.append(f"Below chance, against what their sources say: {', '.join(worse)}.")
        few = [s.name for s in self.sets if min(s.truth.sum(), (~s.truth).sum()) < ENOUGH]
        if few:
            told.append(f"Fewer than {ENOUGH} right or wrong answers: {', '.join(few)}.")
        return " ".join(told)

    def to_dict(self) -> dict[str, Any]:
        """Everything, for JSON."""
        drawn = self.sets[0].drawn[self.names[0]].resamples
        return {
            "kvroute": __version__,
            "about": self.about,
            "summary": self.summary,
            "resamples": drawn.count,
            "level": drawn.level,
            "mean": {n: {f: e.to_dict() for f, e in self.mean(n).estimates().items()} for n in self.names},
            "sets": {s.name: s.to_dict() for s in self.sets},
            "compared": [c.to_dict() for c in self.compared],
        }

    def mean_rows(self) -> tuple[list[str], list[list[str]]]:
        """Headings and cells of the figures, mean over sets."""
        names = [f for f in (*RANK_FIGURES, *MAP_FIGURES) if f in self.mean(self.names[0]).value]
        rows = []
        for n in self.names:
            found = self.mean(n).estimates()
            rows.append([n, *(shown(found[f]) for f in names)])
        return ["score", *(FIGURES[f] for f in names)], rows

    def set_rows(self, figure: str = "auroc") -> tuple[list[str], list[list[str]]]:
        """Headings and cells of one figure by set."""
        rows = [[n, *(shown(s.drawn[n].estimates()[figure]) for s in self.sets)] for n in self.names]
        return ["score", *(s.name for s in self.sets)], rows

    def compared_rows(self) -> tuple[list[str], list[list[str]]]:
        """Headings and cells of the comparisons with the best baseline."""
        heads = ["score", "against", "AUROC gained", "p", "AURC gained (less is better)"]
        if not self.baselines:
            return heads, []
        best = self.baselines[0]
        rows = [
            [c.a, c.b, shown(c.auroc, sign=True), "-" if c.p is None else f"{c.p:.2g}", shown(c.aurc, sign=True)]
            for c in self.compared
            if c.b == best
        ]
        return heads, rows

    def answers_rows(self) -> tuple[list[str], list[list[str]]]:
        """Headings and cells of what each set holds."""
        heads = ["set", "answers", "right", "left out", "maps fitted on", "scores left out"]
        return heads, [
            [
                s.name,
                str(len(s)),
                f"{s.right:.3f}",
                str(s.left_out),
                f"{s.fitted_on} open answers" if s.fitted_on else "the other folds",
                ", ".join(f"{n} ({share:.0%} miss it)" for n, share in s.missing.items()) or "-",
            ]
            for s in self.sets
        ]

    def tables(self) -> list[Table]:
        """For a terminal."""
        from rich.table import Table

        found = []
        for title, (heads, rows) in {
            "Answers": self.answers_rows(),
            "Figures, mean over sets" if len(self.sets) > 1 else "Figures": self.mean_rows(),
            **({"AUROC by set": self.set_rows()} if len(self.sets) > 1 else {}),
            "Against the best score that needs no keys and values": self.compared_rows(),
        }.items():
            if rows:
                table = Table(title=title)
                for heading in heads:
                    table.add_column(heading, overflow="fold")
                for row in rows:
                    table.add_row(*row)
                found.append(table)
        return found

    def page(self, *, command: str | None = None) -> ReportPage:
        """The report as one page.

        Raises:
            MissingExtraError: matplotlib is not installed.
        """
        from kvroute import score_plots as plots
        from kvroute.reports.page import ReportPage

        page = ReportPage(
            "What scores of answers are worth", summary=self.summary, command=command, settings=self.about
        )
        page.add_plot(
            "AUROC", plots.plot_auroc(self), note="Bars: 95 % of the mean over sets. Small marks: single sets."
        )
        page.add_table("Figures, mean over sets", *self.mean_rows(), note=NOTE)
        page.add_table("AUROC by set", *self.set_rows())
        page.add_table(
            "Against the best score that needs no keys and values",
            *self.compared_rows(),
            note="Paired: differences on the same answers, with paired bootstrap intervals; p by DeLong's variances.",
        )
        page.add_plot(
            "Risk and coverage",
            plots.plot_risk_coverage(self),
            note="Errors among the answers that are kept when those of the lowest scores are refused.",
        )
        page.add_plot("Calibration", plots.plot_calibration(self), note="All sets together, with Wilson's intervals.")
        page.add_plot("Distributions", plots.plot_distributions(self), note="All sets together; each its own range.")
        page.add_table("Answers", *self.answers_rows())
        return page

    def save(self, folder: str | Path, *, command: str | None = None) -> list[Path]:
        """Write ``report.json`` and ``report.html``.

        Raises:
            MissingExtraError: matplotlib is not installed.
        """
        target = Path(folder)
        text = json.dumps(self.to_dict(), indent=1, sort_keys=True, allow_nan=False, ensure_ascii=False)
        written = [target / REPORT, target / PAGE]
        page = self.page(command=command)
        write_whole(written[0], (text + "\n").encode())
        page.write(written[1])
        return written


def shown(estimate: Estimate, digits: int = 3, *, sign: bool = False) -> str:
    """A figure and its interval, without the nought before the point."""
    if estimate.value is None:
        return "-"
    mark = "+" if sign else ""

    def number(value: float) -> str:
        return f"{value:{mark}.{digits}f}".replace("0.", ".", 1) if abs(value) < 1 else f"{value:{mark}.{digits}f}"

    if estimate.low is None or estimate.high is None:
        return number(estimate.value)
    return f"{number(estimate.value)} [{number(estimate.low)}, {number(estimate.high)}]"
