"""Published figures beside ours: a table, JSON and a page."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from kvroute.files import write_whole
from kvroute.recipes import POLICIES, Recipe

if TYPE_CHECKING:
    from matplotlib.figure import Figure
    from rich.table import Table

REPORT, PAGE = "reproduction.json", "reproduction.html"
COLUMNS = ("figure", "published", "ours", "difference", "95 % interval", "published is in it")
_UNKNOWN = "not known here"


@dataclass(frozen=True, slots=True)
class Row:
    """One figure.

    Attributes:
        figure: its name.
        published: what was published, or None where it is not known here.
        ours: what this run gave, or None where it has no value.
        low, high: the 95 % interval of ours.
        stated: whether the recipe names the figure as a published one, known or not.
    """

    figure: str
    published: float | None
    ours: float | None
    low: float | None
    high: float | None
    stated: bool

    @property
    def difference(self) -> float | None:
        """Ours minus the published one."""
        return None if self.ours is None or self.published is None else self.ours - self.published

    @property
    def agrees(self) -> bool | None:
        """Whether the published figure lies in our interval."""
        if self.published is None or self.low is None or self.high is None:
            return None
        return self.low <= self.published <= self.high


@dataclass(frozen=True)
class Reproduction:
    """What a run of a recipe gave.

    Attributes:
        recipe: what was run.
        rows: its figures, in the recipe's order.
        notes: what each step said beside its figures, by step.
        done, skipped: steps that were done now, and that were there already.
        limit: rows a set at most, or None.
    """

    recipe: Recipe
    rows: tuple[Row, ...]
    notes: dict[str, Any]
    done: tuple[str, ...]
    skipped: tuple[str, ...]
    limit: int | None = None

    @classmethod
    def of(
        cls, recipe: Recipe, figures: Mapping[str, Mapping[str, float | None]], notes: Mapping[str, Any],
        done: list[str], skipped: list[str], limit: int | None,
    ) -> Reproduction:  # fmt: skip
        """From the figures by name."""
        rows = []
        for name in recipe.figures():
            ours = figures.get(name, {})
            rows.append(
                Row(name, recipe.published.get(name), ours.get("value"), ours.get("low"), ours.get("high"),
                    name in recipe.published)
            )  # fmt: skip
        return cls(recipe, tuple(rows), dict(notes), tuple(done), tuple(skipped), limit)

    def to_dict(self) -> dict[str, Any]:
        """For JSON; the same whether steps were done in one run or in several."""
        return {
            "recipe": self.recipe.model_dump(mode="json"),
            "limit": self.limit,
            "figures": {
                r.figure: {**{k: v for k, v in asdict(r).items() if k not in ("figure", "stated")},
                           "difference": r.difference, "agrees": r.agrees}
                for r in self.rows
            },
            "notes": self.notes,
        }  # fmt: skip

    def table(self) -> Table:
        """For a terminal."""
        from rich.table import Table

        table = Table(title=f"{self.recipe.name}: {self.recipe.model}")
        for heading in COLUMNS:
            table.add_column(heading, overflow="fold")
        for row in self.rows:
            table.add_row(*("-" if cell is None else cell for cell in _cells(row)))
        return table

    def save(self, folder: Path, command: str | None = None) -> list[Path]:
        """Write ``reproduction.json`` and ``reproduction.html``.

        Raises:
            MissingExtraError: matplotlib is not installed.
        """
        from kvroute.reports.page import ReportPage

        text = json.dumps(self.to_dict(), indent=1, sort_keys=True, allow_nan=False, ensure_ascii=False)
        write_whole(folder / REPORT, (text + "\n").encode())
        compared = [r for r in self.rows if r.difference is not None]
        agreed = sum(bool(r.agrees) for r in compared)
        limited = f" At most {self.limit} rows a set were used." if self.limit is not None else ""
        page = ReportPage(
            f"Reproduction of {self.recipe.name}",
            summary=f"{self.recipe.about}\n\n{len(compared)} of {len(self.rows)} figures have a published one beside "
            f"them; {agreed} of these lie in our 95 % interval.{limited}",
            command=command,
            settings={"model": self.recipe.model, "source": self.recipe.source, "limit": self.limit,
                      "recipe": self.recipe.model_dump(mode="json", exclude_defaults=True, exclude={"about"})},
        )  # fmt: skip
        page.add_table(
            "Published and ours",
            COLUMNS,
            [_cells(row) for row in self.rows],
            note="Accuracies, AUROC and FPR95 lie in [0, 1]; tokens are those of an answer on the mean.",
        )
        for part in () if self.recipe.routing is None else self.recipe.routing.test:
            page.add_plot(
                f"{part.name}: accuracy over tokens", plot_policies(part.name, self.rows),
                note="Full marks are ours with 95 % intervals, hollow ones were published.",
            )  # fmt: skip
        page.add_text("Steps", "\n\n".join(f"{name}: {json.dumps(note)}" for name, note in self.notes.items()))
        page.write(folder / PAGE)
        return [folder / REPORT, folder / PAGE]


def plot_policies(name: str, rows: tuple[Row, ...]) -> Figure:
    """Accuracy over tokens of each policy on a set.

    Raises:
        MissingExtraError: matplotlib is not installed.
    """
    from kvroute.reports.plots import COLOURS, MARKERS, new_figure

    known = {r.figure: r for r in rows}
    figure, axes = new_figure(7.0, 4.2)
    for place, policy in enumerate(POLICIES):
        right, tokens = (known.get(f"{name}.{policy}.{what}") for what in ("accuracy", "tokens"))
        if right is None or tokens is None:
            continue
        colour, shape = COLOURS[place % len(COLOURS)], MARKERS[place % len(MARKERS)]
        if right.ours is not None and tokens.ours is not None:
            arms = [_arms(tokens), _arms(right)]
            axes.errorbar([tokens.ours], [right.ours], xerr=arms[0], yerr=arms[1], color=colour, marker=shape,
                          markersize=8, linestyle="none", elinewidth=1, label=policy)  # fmt: skip
        if right.published is not None and tokens.published is not None:
            axes.plot([tokens.published], [right.published], color=colour, marker=shape, markersize=9,
                      fillstyle="none", linestyle="none", label=f"{policy}, published")  # fmt: skip
    axes.set_xlabel("tokens a question")
    axes.set_ylabel("accuracy")
    axes.legend(fontsize=8, loc="center left", bbox_to_anchor=(1.01, 0.5), frameon=False)
    return figure


def _cells(row: Row) -> list[str | None]:
    """A row of the table; a figure that was published and is not known here is said to be so in the last column."""
    digits = 1 if row.figure.endswith(".tokens") else 3

    def shown(value: float | None, sign: str = "") -> str | None:
        return None if value is None else f"{value:{sign}.{digits}f}"

    interval = None if row.low is None else f"{shown(row.low)} to {shown(row.high)}"
    agrees = {True: "yes", False: "no", None: None}[row.agrees]
    if row.stated and row.published is None:
        agrees = _UNKNOWN
    return [row.figure, shown(row.published), shown(row.ours), shown(row.difference, "+"), interval, agrees]


def _arms(row: Row) -> list[list[float]] | None:
    """How far the interval reaches below and above our figure."""
    if row.ours is None or row.low is None or row.high is None:
        return None
    return [[max(0.0, row.ours - row.low)], [max(0.0, row.high - row.ours)]]
