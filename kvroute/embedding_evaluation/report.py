"""All methods in one table, one page and one JSON file."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from kvroute._version import __version__
from kvroute.embedding_evaluation.results import GROUPS, MEASURES, Judge, Rows, as_json
from kvroute.files import write_whole
from kvroute.models import name_on_pages
from kvroute.routing_intervals import Estimate

if TYPE_CHECKING:
    from matplotlib.figure import Figure

REPORT, PAGE = "report.json", "report.html"


@dataclass
class Method:
    """One row.

    Attributes:
        name: its label.
        how: what is pooled.
        side: ``kv``, ``hidden`` or ``reference``.
        depth: layers that have to run, or None.
        share: of the model's depth.
        ms: time of the forward pass a text, or None.
        dimension: of its vectors, before the whitening.
        rows: results, whitened like all others or projected.
        raw: results of plain cosines, nothing fitted, or None.
        trained: whether it was trained on pairs or labels.
    """

    name: str
    how: str
    side: str
    depth: int | None
    share: float | None
    ms: float | None
    dimension: int | None
    rows: Rows
    raw: Rows | None = None
    trained: bool = False


class EmbeddingReport:
    """Methods that are judged on the same rows.

    Args:
        judge: draws the rows of the intervals.
        about: what else the JSON shall say: model, rows, settings ...
    """

    def __init__(self, judge: Judge, about: Mapping[str, Any]) -> None:
        self.judge, self.about = judge, dict(about)
        self.methods: dict[str, Method] = {}
        self.figures: dict[str, dict[str, dict[str, Estimate]]] = {}
        self.raw: dict[str, dict[str, dict[str, Estimate]]] = {}
        self.compared: list[tuple[str, str, dict[str, Estimate]]] = []
        self.notes: list[str] = []
        self.left_out: dict[str, str] = {}

    def add(self, method: Method) -> None:
        """A row; a later one of the same name takes its place."""
        self.methods[method.name] = method
        self.figures[method.name] = self.judge.method(method.rows)
        if method.raw is not None:
            self.raw[method.name] = self.judge.method(method.raw)

    def compare(self, a: str, b: str) -> dict[str, Estimate]:
        """``a`` minus ``b``, in pairs."""
        found = self.judge.differences(self.methods[a].rows, self.methods[b].rows)
        self.compared.append((a, b, found))
        return found

    # ------------------------------------------------------------------ files

    def to_dict(self) -> dict[str, Any]:
        """Everything, for JSON."""
        return {
            "kvroute": __version__,
            "about": self.about,
            "rows": next(iter(self.methods.values())).rows.counts() if self.methods else {},
            "measures": MEASURES,
            "methods": {name: self._method(name) for name in self.methods},
            "compared": [{"a": a, "b": b, "difference": as_json(found)} for a, b, found in self.compared],
            "notes": self.notes,
            "left_out": self.left_out,
        }

    def _method(self, name: str) -> dict[str, Any]:
        m = self.methods[name]
        facts = ("how", "side", "depth", "share", "ms", "dimension", "trained")
        found = {fact: getattr(m, fact) for fact in facts}
        found |= as_json(self.figures[name])
        return found | {"raw": as_json(self.raw[name]) if name in self.raw else None}

    def save(self, folder: Path, *, command: str | None = None) -> list[Path]:
        """Write ``report.json`` and ``report.html``."""
        written = [folder / REPORT, folder / PAGE]
        text = json.dumps(self.to_dict(), indent=2, sort_keys=True, allow_nan=False) + "\n"
        write_whole(written[0], text.encode())
        self._write_page(written[1], command)
        return written

    def _write_page(self, path: Path, command: str | None) -> None:
        from kvroute.reports.page import ReportPage

        model = name_on_pages(str(self.about.get("model", "a model")))
        page = ReportPage(f"Embeddings of {model}", summary=self.summary(), command=command, settings=self.about)
        page.add_plot(
            "Mean over classification, STS and retrieval",
            _bars([(n, f["mean"]["mean"]) for n, f in self.figures.items() if f["mean"]]),
            note="95 % intervals by a bootstrap over test rows. All but trained projections are whitened alike.",
        )
        page.add_table("By group", *self.group_table())
        page.add_table("By set", *self.set_table(), note="; ".join(f"{g}: {m}" for g, m in MEASURES.items()) + ".")
        for group in MEASURES:
            shown = [(n, f["groups"][group]) for n, f in self.figures.items() if group in f["groups"]]
            if shown:
                page.add_plot(f"{group.capitalize()}: {MEASURES[group]}", _bars(shown))
        if self.raw:
            page.add_table(
                "Raw cosines, nothing fitted",
                *self.set_table(raw=True),
                note="Classification needs a head, so it is not here.",
            )
        for a, b, found in self.compared:
            rows = [[task, str(_signed(e))] for task, e in found.items()]
            page.add_table(
                f"{a} minus {b}", ["", "difference"], rows, note="In pairs: the same rows are drawn for both."
            )
        if self.notes or self.left_out:
            said = [*self.notes, *(f"Left out: {name} ({why})." for name, why in self.left_out.items())]
            page.add_text("Notes", "\n\n".join(said))
        page.write(path)

    # ------------------------------------------------------------------ tables

    def summary(self) -> str:
        """One sentence: which methods lead."""
        ranked = sorted(
            ((f["mean"]["mean"].value or 0.0, n) for n, f in self.figures.items() if f["mean"]), reverse=True
        )
        told = [f"{name} {value:.3f}" for value, name in ranked[:3]]
        return f"Highest means on test rows: {', '.join(told)}." if told else "Not all groups were measured."

    def group_table(self) -> tuple[list[str], list[list[str | float | int | None]]]:
        """Columns and rows: cost, groups and the mean."""
        groups = [g for g in MEASURES if any(g in f["groups"] for f in self.figures.values())]
        columns = ["", "pooled", "layers run", "of the depth", "ms a text", "dimensions", *groups, "mean"]
        rows: list[list[str | float | int | None]] = []
        for name, m in self.methods.items():
            found = self.figures[name]
            values = [_value(found["groups"].get(g)) for g in groups]
            mean = found["mean"].get("mean")
            share, ms = (None if v is None else round(v, 2) for v in (m.share, m.ms))
            rows.append([name, m.how, m.depth, share, ms, m.dimension, *values, None if mean is None else str(mean)])
        return columns, rows

    def set_table(self, *, raw: bool = False) -> tuple[list[str], list[list[str | float | int | None]]]:
        """Columns and rows: every set with its interval; clusterings without."""
        figures = self.raw if raw else self.figures
        groups = list(GROUPS[1:] if raw else MEASURES)
        tasks: dict[str, str] = {}
        for name in figures:
            m = self.methods[name]
            rows = m.raw if raw and m.raw is not None else m.rows
            tasks |= {t: g for g in groups for t in getattr(rows, g)}
        order = sorted(tasks, key=lambda t: groups.index(tasks[t]))
        found: list[list[str | float | int | None]] = []
        for name, f in figures.items():
            cells = (f["tasks"].get(t) for t in order)
            found.append([name, *(None if e is None else str(e) for e in cells)])
        return ["", *order], found

    def markdown(self) -> str:
        """Tables for a document."""
        parts = [_markdown(*self.group_table()), _markdown(*self._brief(raw=False))]
        if self.raw:
            parts.append("Raw cosines, nothing fitted:\n\n" + _markdown(*self._brief(raw=True)))
        for a, b, found in self.compared:
            rows = [[task, _signed(e)] for task, e in found.items()]
            parts.append(f"{a} minus {b}:\n\n" + _markdown(["", "difference"], rows))
        parts.append("\n".join(f"- {note}" for note in self.notes))
        return "\n\n".join(p for p in parts if p)

    def _brief(self, *, raw: bool) -> tuple[list[str], list[list[Any]]]:
        """The table by set without intervals."""
        columns, rows = self.set_table(raw=raw)
        return columns, [[r[0], *(None if c is None else str(c).split(" ")[0] for c in r[1:])] for r in rows]


def _value(estimate: Estimate | None) -> float | None:
    return None if estimate is None or estimate.value is None else round(estimate.value, 3)


def _signed(e: Estimate) -> str:
    return f"{e.value:+.3f} [{e.low:+.3f}, {e.high:+.3f}]"


def _markdown(columns: Sequence[str], rows: Sequence[Sequence[Any]]) -> str:
    def shown(cell: Any) -> str:
        return "" if cell is None else f"{cell:.3f}" if isinstance(cell, float) and abs(cell) < 1 else str(cell)

    lines = ["| " + " | ".join(columns) + " |", "|" + " --- |" * len(columns)]
    return "\n".join(lines + ["| " + " | ".join(map(shown, row)) + " |" for row in rows])


def _bars(shown: Sequence[tuple[str, Estimate]]) -> Figure:
    """Horizontal bars with intervals, the first on top."""
    from kvroute.reports.plots import COLOURS, new_figure

    figure, axes = new_figure(8.0, 1.2 + 0.32 * max(len(shown), 1))
    names = [name for name, _ in shown]
    values = [e.value or 0.0 for _, e in shown]
    low = [max(v - (e.low if e.low is not None else v), 0.0) for v, (_, e) in zip(values, shown, strict=True)]
    high = [max((e.high if e.high is not None else v) - v, 0.0) for v, (_, e) in zip(values, shown, strict=True)]
    axes.barh(range(len(names)), values, xerr=(low, high), color=COLOURS[0], ecolor="#000000", capsize=2, height=0.7)
    axes.set_yticks(range(len(names)), names)
    axes.invert_yaxis()
    axes.set_xlim(min(0.0, *values) if values else 0.0, max([*values, 0.1]) * 1.15)
    return figure
