"""A report as one self-contained HTML file.

The page asks no host for anything: style, script and plots are in it, and its content security policy forbids the
rest. It follows the reader's dark or light scheme, fits a phone, and its tables sort by click and by keyboard. Given
the same contents it is the same to the byte: it holds no date.
"""

from __future__ import annotations

import base64
import hashlib
import json
import math
import re
from collections.abc import Mapping, Sequence
from html import escape
from importlib.resources import files
from numbers import Integral, Real
from pathlib import Path
from typing import TYPE_CHECKING, Literal

from kvroute.errors import InvalidInputError
from kvroute.files import write_whole
from kvroute.installed import versions
from kvroute.reports.svg import inline_svg

if TYPE_CHECKING:
    from matplotlib.figure import Figure

Cell = str | float | int | None
"""What stands in a table; None is a cell without a value."""
_NONE = "–"
_LEADING = re.compile(r"\s*([-+−]?\d[\d,]*(?:\.\d+)?(?:[eE][-+]?\d+)?|[-+−]?\.\d+)(?![\w.])")
_REM = 7
"""Width of a plot's inch on a page that is wide enough."""
_LABEL = 24
"""Characters up to which a column's texts are not broken."""
_DIGITS = 3
"""Significant digits of a column's largest number."""


class ReportPage:
    """One page: a title, parts in the order in which they are added, at the end versions and settings.

    All texts are plain: they are escaped, and blank lines part paragraphs.

    Args:
        title: of the page.
        summary: what the report found, in a few sentences.
        command: the command line that made it.
        settings: what it was made with: model, seed, rows ...
    """

    def __init__(
        self, title: str, *, summary: str = "", command: str | None = None, settings: Mapping[str, object] | None = None
    ) -> None:
        self.title, self.summary, self.command = title, summary, command
        self.settings = dict(settings or {})
        self._parts: list[tuple[str, str]] = []
        self._colours: dict[str, tuple[str, str]] = {}

    # ------------------------------------------------------------------ adding

    def add_text(self, heading: str, text: str) -> None:
        """Paragraphs."""
        self._add(heading, _paragraphs(text))

    def add_table(
        self, heading: str, columns: Sequence[str], rows: Sequence[Sequence[Cell]], *, note: str = ""
    ) -> None:
        """A table that sorts.

        Args:
            heading: of the part.
            columns: their names.
            rows: a cell a column. Numbers are shown with as many decimals as fit their column; a text that begins
                with a number (``0.79 [0.75, 0.83]``) sorts by it; None and NaN are shown as a dash and stay last.
            note: below the table.

        Raises:
            InvalidInputError: a row has more or fewer cells than there are columns.
        """
        for place, row in enumerate(rows):
            if len(row) != len(columns):
                raise InvalidInputError(
                    f"Row {place} of the table {heading!r} has {len(row)} cells for {len(columns)} columns."
                )
        told = [[_valued(row[c]) for row in rows] for c in range(len(columns))]
        classes = [_kind(column) for column in told]
        decimals = [_decimals(column) for column in told]
        head = "".join(
            f'<th scope="col" class="{kind}" aria-sort="none"><button type="button">{escape(name)}</button></th>'
            for name, kind in zip(columns, classes, strict=True)
        )
        body = "\n".join(
            "<tr>" + "".join(_cell(told[c][r], classes[c], decimals[c]) for c in range(len(columns))) + "</tr>"
            for r in range(len(rows))
        )
        table = f'<table class="sorts"><thead><tr>{head}</tr></thead>\n<tbody>\n{body}\n</tbody></table>'
        self._add(heading, _scrolling(heading, table) + _note(note))

    def add_plot(self, heading: str, figure: Figure, *, note: str = "") -> None:
        """A matplotlib figure, as SVG.

        In the dark scheme black and white turn over and colours are lightened until they can be read. A figure that
        holds pixels (``imshow``) keeps its colours, on white.

        Args:
            heading: of the part, and what a screen reader says of the plot.
            figure: the figure; later changes of it are not seen.
            note: below the plot.
        """
        drawn = inline_svg(figure, f"p{len(self._parts) + 1}")
        self._colours.update(drawn.colours)
        width = f"{figure.get_figwidth() * _REM:g}rem"
        svg = drawn.text.replace("<svg ", f'<svg role="img" aria-label="{escape(heading)}" ', 1)
        kind = "plot fixed" if drawn.fixed else "plot"
        shown = _scrolling(heading, f'<div class="{kind}" style="--width: {width}">{svg}</div>')
        caption = f"<figcaption>{_note(note)}</figcaption>" if note else ""
        self._add(heading, f"<figure>{shown}{caption}</figure>")

    def _add(self, heading: str, body: str) -> None:
        self._parts.append((heading, body))

    # ------------------------------------------------------------------ writing

    def write(self, path: Path) -> None:
        """Write the page; versions of kvroute, torch, transformers and python and the settings stand at the end.

        The file appears whole or not at all.
        """
        write_whole(path, self.to_html().encode())

    def to_html(self) -> str:
        """The page."""
        parts = [*self._parts, ("How it was made", self._made())]
        sections = "\n".join(
            f'<section id="part-{n}" aria-labelledby="part-{n}-name">\n'
            f'<h2 id="part-{n}-name">{escape(heading)}</h2>\n{body}\n</section>'
            for n, (heading, body) in enumerate(parts, start=1)
        )
        links = "".join(
            f'<li><a href="#part-{n}">{escape(heading)}</a></li>' for n, (heading, _) in enumerate(parts, start=1)
        )
        script, style = _asset("page.js"), _asset("page.css") + self._colour_rules()
        digest = base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()
        policy = (
            f"default-src 'none'; script-src 'sha256-{digest}'; style-src 'unsafe-inline'; img-src data:; "
            "base-uri 'none'; form-action 'none'"
        )
        return (
            '<!doctype html>\n<html lang="en">\n<head>\n<meta charset="utf-8">\n'
            f'<meta http-equiv="Content-Security-Policy" content="{policy}">\n'
            '<meta name="viewport" content="width=device-width, initial-scale=1">\n'
            '<meta name="color-scheme" content="light dark">\n<link rel="icon" href="data:,">\n'
            f"<title>{escape(self.title)}</title>\n<style>\n{style}</style>\n</head>\n<body>\n"
            f"<header>\n<h1>{escape(self.title)}</h1>\n{_paragraphs(self.summary)}\n</header>\n"
            f'<nav aria-label="Parts of this page"><ul>{links}</ul></nav>\n'
            f"<main>\n{sections}\n</main>\n<script>{script}</script>\n</body>\n</html>\n"
        )

    def _made(self) -> str:
        found = ""
        if self.command is not None:
            found += f'<pre tabindex="0"><code>{escape(self.command)}</code></pre>\n'
        if self.settings:
            found += "<h3>Settings</h3>\n" + _facts({k: _told(v) for k, v in self.settings.items()})
        return found + "<h3>Versions</h3>\n" + _facts(versions("kvroute", "torch", "transformers", "python"))

    def _colour_rules(self) -> str:
        if not self._colours:
            return ""
        light, dark = (
            "".join(f"{name}:{pair[scheme]};" for name, pair in sorted(self._colours.items())) for scheme in (0, 1)
        )
        return f":root{{{light}}}\n@media (prefers-color-scheme: dark){{:root{{{dark}}}}}\n"


# ---------------------------------------------------------------------- pieces


def _asset(name: str) -> str:
    return files("kvroute.reports").joinpath(name).read_text(encoding="utf-8")


def _paragraphs(text: str) -> str:
    return "\n".join(f"<p>{escape(p.strip())}</p>" for p in re.split(r"\n\s*\n", text) if p.strip())


def _note(note: str) -> str:
    return f'<p class="note">{escape(note)}</p>' if note else ""


def _scrolling(heading: str, body: str) -> str:
    """What may be wider than the page scrolls in a box of its own, by keyboard too."""
    return f'<div class="scroll" role="group" aria-label="{escape(heading)}" tabindex="0">{body}</div>'


def _facts(facts: Mapping[str, str]) -> str:
    rows = "".join(f'<tr><th scope="row">{escape(k)}</th><td>{escape(v)}</td></tr>' for k, v in facts.items())
    return f'<table class="facts"><tbody>{rows}</tbody></table>\n'


def _told(value: object) -> str:
    """A setting in words."""
    if isinstance(value, str):
        return value
    if isinstance(value, Path):
        return str(value)
    return json.dumps(value, ensure_ascii=False, default=str)


# ---------------------------------------------------------------------- cells


def _valued(cell: object) -> Cell:
    """numpy's numbers as Python's, NaN and infinity as no value."""
    if cell is None or isinstance(cell, str):
        return cell
    if isinstance(cell, bool):
        return "yes" if cell else "no"
    if isinstance(cell, Integral):
        return int(cell)
    if isinstance(cell, Real):
        return float(cell) if math.isfinite(cell) else None
    return str(cell)


def _number(cell: Cell) -> float | None:
    """What a cell sorts by, or None where it sorts as a text."""
    if isinstance(cell, int | float):
        return float(cell)
    found = _LEADING.match(cell or "")
    return None if found is None else float(found[1].replace(",", "").replace("−", "-"))


def _kind(column: Sequence[Cell]) -> Literal["number", "label", "text"]:
    """How a column is set: numbers to the right, short texts unbroken, others broken where they must be."""
    held = [cell for cell in column if cell is not None]
    if held and all(_number(cell) is not None for cell in held):
        return "number"
    return "label" if all(len(str(cell)) <= _LABEL for cell in held) else "text"


def _decimals(column: Sequence[Cell]) -> int:
    largest = max((abs(cell) for cell in column if isinstance(cell, float)), default=0.0)
    return 0 if largest == 0 else max(0, _DIGITS - 1 - math.floor(math.log10(largest)))


def _shown(cell: Cell, decimals: int) -> str:
    if cell is None:
        return _NONE
    if isinstance(cell, float):
        text = f"{cell:,.{decimals}f}"
        return f"{cell:.2g}" if cell and not float(text.replace(",", "")) else text
    return f"{cell:,}" if isinstance(cell, int) else cell


def _cell(cell: Cell, kind: str, decimals: int) -> str:
    number = _number(cell)
    key = " data-none" if cell is None else "" if number is None else f' data-number="{number:.17g}"'
    return f'<td class="{kind}"{key}>{escape(_shown(cell, decimals))}</td>'
