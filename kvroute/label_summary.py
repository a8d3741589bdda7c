"""Labelled questions in a few figures, by part and by kind."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any

from kvroute.label_rows import PARTS, LabelRow, usable
from kvroute.labelling import SHORT, pair_label

if TYPE_CHECKING:
    from rich.table import Table


@dataclass(frozen=True, slots=True)
class Group:
    """Some labelled questions.

    Attributes:
        name: of the part or kind.
        rows: with a label.
        failed: without one.
        fast_right, slow_right: share of right answers, in [0, 1].
        fast_tokens, slow_tokens: of an answer, on the mean.
        unreadable: answers of both modes that could not be read; they count as wrong.
        labels: how many pairs of answers have which label.
    """

    name: str
    rows: int
    failed: int
    fast_right: float
    slow_right: float
    fast_tokens: float
    slow_tokens: float
    unreadable: int
    labels: dict[str, int]

    @classmethod
    def of(cls, name: str, rows: Sequence[LabelRow], short: int = SHORT) -> Group:
        """The figures of some rows."""
        good = usable(rows)
        pairs = [pair_label(f, s, short) for r in good for f, s in zip(r.fast, r.slow, strict=True)]
        return cls(
            name=name,
            rows=len(good),
            failed=len(rows) - len(good),
            fast_right=_mean(r.fast_right for r in good),
            slow_right=_mean(r.slow_right for r in good),
            fast_tokens=_mean(r.fast_tokens for r in good),
            slow_tokens=_mean(r.slow_tokens for r in good),
            unreadable=sum(not a.readable for r in good for a in (*r.fast, *r.slow)),
            labels={f"{label:g}": pairs.count(label) for label in (0.0, 25.0, 75.0, 100.0)},
        )


def kind_of(row: LabelRow) -> str:
    """A question's kind: its field ``kind``, else ``subject``, else the type of its answer."""
    return str(row.extra.get("kind") or row.extra.get("subject") or row.answer_type)


def summarise(rows: Sequence[LabelRow], short: int = SHORT) -> dict[str, list[Group]]:
    """Figures of all rows, by part and by kind.

    Args:
        rows: labelled questions, failed ones included.
        short: as they were labelled with.
    """
    kinds = sorted({kind_of(r) for r in rows})
    parts = [p for p in PARTS if any(r.part == p for r in rows)]
    return {
        "all": [Group.of("all", rows, short)],
        "parts": [Group.of(p, [r for r in rows if r.part == p], short) for p in parts],
        "kinds": [Group.of(k, [r for r in rows if kind_of(r) == k], short) for k in kinds],
    }


def summary_dict(groups: dict[str, list[Group]]) -> dict[str, Any]:
    """The same, JSON-able."""
    return {name: [asdict(g) for g in members] for name, members in groups.items()}


def summary_table(groups: dict[str, list[Group]], *, most_kinds: int = 12) -> Table:
    """The same, for a terminal; of many kinds the largest are shown."""
    from rich.table import Column, Table

    table = Table(Column("", overflow="ellipsis", no_wrap=True, max_width=16))
    for name in ("rows", "failed", "right\nfast  slow", "tokens\nfast slow", "unread", "labels\n0/25/75/100"):
        table.add_column(name, justify="right", no_wrap=True, min_width=len(name.split("\n")[-1]))
    kinds = sorted(groups["kinds"], key=lambda g: (-g.rows, g.name))[:most_kinds]
    for members in (kinds if len(groups["kinds"]) > 1 else [], groups["parts"], groups["all"]):
        for g in members:
            right = f"{g.fast_right:.3f} {g.slow_right:.3f}"
            tokens = f"{g.fast_tokens:.0f} {g.slow_tokens:.0f}"
            labels = "/".join(map(str, g.labels.values()))
            table.add_row(g.name, str(g.rows), str(g.failed), right, tokens, str(g.unreadable), labels)
        table.add_section()
    return table


def _mean(values: Iterable[float]) -> float:
    found = list(values)
    return sum(found) / len(found) if found else 0.0
