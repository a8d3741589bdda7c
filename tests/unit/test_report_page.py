"""Report pages: whole, escaped, without an address, the same to the byte; plots that both schemes can show."""

from __future__ import annotations

import base64
import hashlib
import re
from html.parser import HTMLParser
from pathlib import Path

import numpy as np
import pytest
from matplotlib.figure import Figure

from kvroute._version import __version__
from kvroute.errors import InvalidInputError
from kvroute.reports import ReportPage
from kvroute.reports.plots import COLOURS, new_figure
from kvroute.reports.svg import DARK_CARD, DARK_INK, contrast, dark, inline_svg

NASTY = "<script>alert('x')</script> & \"q\""
VOID = {"meta", "link", "br", "img", "input"}


class Balanced(HTMLParser):
    """Every tag is closed by its own end; ids are counted, and what points at them."""

    def __init__(self, page: str) -> None:
        super().__init__()
        self.open: list[str] = []
        self.ids: list[str] = []
        self.pointed: list[str] = []
        self.feed(page)
        self.close()

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        found = dict(attrs)
        if tag not in VOID:
            self.open.append(tag)
        if found.get("id"):
            self.ids.append(found["id"] or "")
        for value in found.values():
            self.pointed += re.findall(r"url\(#([^)]+)\)", value or "")
        if (found.get("href") or "").startswith("#"):
            self.pointed.append((found["href"] or "")[1:])

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.handle_starttag(tag, attrs)
        if tag not in VOID:
            self.open.pop()

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag


def curve(colour: str = COLOURS[0]) -> Figure:
    figure, axes = new_figure(6.0, 4.0)
    axes.plot([0, 1, 2], [0.2, 0.5, 0.4], color=colour, marker="o", label="a & b")
    axes.set_title("Accuracy < 1")
    axes.legend()
    return figure


def page() -> ReportPage:
    made = ReportPage(
        f"Title {NASTY}", summary=f"First.\n\nSecond {NASTY}.", command=f"kvroute evaluate {NASTY}",
        settings={"seed": 3, "model": NASTY, "layers": [1, 2], "folder": Path("a/b")},
    )  # fmt: skip
    made.add_text(f"Text {NASTY}", f"One.\n\nTwo {NASTY}.")
    made.add_table(f"Table {NASTY}", ["name", NASTY], [[NASTY, 0.5], ["b", None]], note=NASTY)
    made.add_plot(f"Plot {NASTY}", curve(), note=NASTY)
    made.add_plot("Another", curve(COLOURS[1]))
    return made


def test_page_is_whole_escaped_and_asks_nobody() -> None:
    html = page().to_html()
    parsed = Balanced(html)
    assert parsed.open == []
    assert len(parsed.ids) == len(set(parsed.ids))
    assert set(parsed.pointed) <= set(parsed.ids)
    assert html.count("<script") == 1  # the page's own
    assert "alert('x')" not in html
    assert "://" not in html
    assert not re.search(r"\b(src|srcset|action)=|@import|url\((?!#)", html)
    for part in ("Text", "Table", "Plot", "Another", "How it was made"):
        assert f"{part} &lt;script&gt;" in html or f">{part}</h2>" in html


def test_policy_allows_the_pages_script_alone() -> None:
    html = page().to_html()
    script = re.search(r"<script>(.*?)</script>", html, re.DOTALL)
    assert script is not None
    digest = base64.b64encode(hashlib.sha256(script[1].encode()).digest()).decode()
    assert f"default-src 'none'; script-src 'sha256-{digest}'" in html


def test_same_contents_give_the_same_bytes(tmp_path: Path) -> None:
    for name in ("a", "b"):
        page().write(tmp_path / f"{name}.html")
    assert (tmp_path / "a.html").read_bytes() == (tmp_path / "b.html").read_bytes()
    assert [p.name for p in sorted(tmp_path.iterdir())] == ["a.html", "b.html"]


def test_versions_and_settings_stand_at_the_end() -> None:
    end = page().to_html().split("How it was made</h2>")[1]
    assert "kvroute evaluate &lt;script" in end
    for name, value in (("seed", "3"), ("layers", "[1, 2]"), ("folder", "a/b"), ("kvroute", __version__)):
        assert f'<th scope="row">{name}</th><td>{value}</td>' in end
    for name in ("torch", "transformers", "python"):
        assert f'<th scope="row">{name}</th>' in end


def cells(rows: list[list[str | float | int | None]]) -> list[tuple[str, str, str]]:
    """Class, attributes and text of the first column's cells."""
    made = ReportPage("t")
    made.add_table("h", [str(k) for k in range(len(rows[0]))], rows)
    found = re.findall(r"<tr><td class=\"(\w+)\"([^>]*)>(.*?)</td>", made.to_html())
    return [(kind, more.strip(), text) for kind, more, text in found]


def test_numbers_are_shown_alike_and_sort_by_their_value() -> None:
    assert [c[2] for c in cells([[0.98], [0.5], [0.00012], [None], [float("nan")]])] == [
        "0.980", "0.500", "0.00012", "–", "–",
    ]  # fmt: skip
    assert [c[2] for c in cells([[1234.5], [3.25]])] == ["1,234", "3"]
    assert [c[2] for c in cells([[np.float32(63.72)], [np.int64(12345)]])] == ["63.7", "12,345"]  # type: ignore[list-item]
    assert [c[2] for c in cells([[0.0], [-0.25]])] == ["0.000", "-0.250"]
    assert cells([["0.79 [0.75, 0.83]"], ["12,345"], [None]]) == [
        ("number", 'data-number="0.79000000000000004"', "0.79 [0.75, 0.83]"),
        ("number", 'data-number="12345"', "12,345"),
        ("number", "data-none", "–"),
    ]
    assert cells([["a1"], ["7b"], [True]]) == [("label", "", "a1"), ("label", "", "7b"), ("label", "", "yes")]
    assert [c[0] for c in cells([["word"], ["a text that is long enough to be broken"]])] == ["text", "text"]


def test_columns_sort_by_a_button_that_says_how() -> None:
    made = ReportPage("t")
    made.add_table("h", ["a", "b"], [["x", 1]])
    html = made.to_html()
    assert html.count('aria-sort="none"><button type="button">') == 2
    assert 'class="scroll" role="group" aria-label="h" tabindex="0"' in html
    made.add_table("empty", ["a"], [])
    with pytest.raises(InvalidInputError, match="Row 1 of the table 'h' has 1 cells for 2 columns"):
        made.add_table("h", ["a", "b"], [["x", 1], ["y"]])


def test_plot_colours_follow_the_scheme() -> None:
    drawn = inline_svg(curve(), "p1")
    assert not drawn.fixed
    assert drawn.text.startswith("<svg viewBox=")
    assert "var(--c0072b2)" in drawn.text
    assert not re.search(r"(fill|stroke): #", drawn.text)
    assert drawn.colours["--c0072b2"] == ("#0072b2", dark("#0072b2"))
    made = ReportPage("t")
    made.add_plot("h", curve())
    assert f":root{{--c0072b2:{dark('#0072b2')}" in made.to_html() or f"--c0072b2:{dark('#0072b2')};" in made.to_html()


def test_dark_colours_can_be_read() -> None:
    assert dark("#000000") == DARK_INK
    assert dark("#ffffff") == DARK_CARD
    for colour in (*COLOURS, "#333333", "#ff0000", "#0000ff", "#800080"):
        assert contrast(dark(colour), DARK_CARD) >= 4.5, colour
    assert dark("#e69f00") == "#e69f00"  # bright enough as it is
    assert contrast("#000000", "#ffffff") == pytest.approx(21)
    css = (Path(__file__).parents[2] / "kvroute/reports/page.css").read_text()
    assert f"--card: {DARK_CARD}; --ink: {DARK_INK};" in css


def test_pixels_keep_their_colours() -> None:
    figure, axes = new_figure(3.0, 3.0)
    axes.imshow(np.arange(16.0).reshape(4, 4))
    drawn = inline_svg(figure, "p1")
    assert drawn.fixed
    assert drawn.colours == {}
    made = ReportPage("t")
    made.add_plot("h", figure)
    assert 'class="plot fixed"' in made.to_html()
    assert "://" not in made.to_html()
