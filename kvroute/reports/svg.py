"""A matplotlib figure as SVG inside of a page: no clash of ids, no address, colours that the dark scheme changes."""

from __future__ import annotations

import colorsys
import re
from dataclasses import dataclass
from typing import TYPE_CHECKING

from kvroute.reports.plots import rendered

if TYPE_CHECKING:
    from matplotlib.figure import Figure

DARK_CARD, DARK_INK = "#1b1f26", "#e4e7ec"
"""What white and black of a plot become in the dark scheme; the page's CSS has the same."""
_READABLE = 4.5
"""Least contrast of a colour on the dark card (WCAG 2.2, level AA for text)."""
_GREY = 0.08
"""Colours whose channels differ by less are greys."""
_HEX = re.compile(r"#[0-9a-fA-F]{6}\b")
_ID = re.compile(r'\b(id=")([^"]+)"|(href="#)([^"]+)"|(url\(#)([^)]+)\)')


@dataclass(frozen=True, slots=True)
class InlineSVG:
    """A figure for a page.

    Attributes:
        text: the ``<svg>`` element.
        colours: by the name of a CSS variable, its value in the light and in the dark scheme.
        fixed: whether it holds pixels, which keep their colours: it must stand on white in both schemes.
    """

    text: str
    colours: dict[str, tuple[str, str]]
    fixed: bool


def inline_svg(figure: Figure, prefix: str) -> InlineSVG:
    """A figure as an ``<svg>`` element.

    Args:
        figure: the figure.
        prefix: of all its ids, one that no other figure of the page has.
    """
    text = rendered(figure, "svg", facecolor="none").decode()
    fixed = "<image" in text
    text = text[text.index("<svg") :].strip()
    text = re.sub(r"<metadata>.*?</metadata>", "", text, count=1, flags=re.DOTALL)
    text = re.sub(r'<style type="text/css">.*?</style>', "", text, flags=re.DOTALL)
    text = re.sub(r"<!--.*?-->\n?\s*", "", text, flags=re.DOTALL)
    opening = re.match(r"<svg[^>]*>", text)
    box = re.search(r'viewBox="[^"]+"', opening[0] if opening else "")
    if opening is None or box is None:  # pragma: no cover - matplotlib always writes both
        raise ValueError("matplotlib wrote no <svg> with a viewBox")
    text = f"<svg {box[0]}>" + text[opening.end() :].replace("xlink:href=", "href=")
    text = _ID.sub(lambda m: _prefixed(m, prefix), text)
    colours: dict[str, tuple[str, str]] = {}
    if not fixed:

        def variable(match: re.Match[str]) -> str:
            light = match[0].lower()
            name = f"--c{light[1:]}"
            colours[name] = (light, dark(light))
            return f"var({name})"

        text = re.sub(r'style="[^"]*"', lambda m: _HEX.sub(variable, m[0]), text)
    return InlineSVG(text, colours, fixed)


def _prefixed(match: re.Match[str], prefix: str) -> str:
    kind = next(k for k in (1, 3, 5) if match[k])
    return f"{match[kind]}{prefix}-{match[kind + 1]}" + (")" if kind == 5 else '"')


def dark(colour: str) -> str:
    """A colour of a plot on white on the dark card: greys turn over, others get lighter until readable."""
    r, g, b = _channels(colour)
    if max(r, g, b) - min(r, g, b) < _GREY:
        share = (r + g + b) / 3
        ends = zip(_channels(DARK_INK), _channels(DARK_CARD), strict=True)
        return _hex([ink + share * (card - ink) for ink, card in ends])
    hue, light, saturation = colorsys.rgb_to_hls(r, g, b)
    while contrast(_hex(colorsys.hls_to_rgb(hue, light, saturation)), DARK_CARD) < _READABLE:
        light = min(1.0, light + 0.02)
    return _hex(colorsys.hls_to_rgb(hue, light, saturation))


def contrast(a: str, b: str) -> float:
    """WCAG's contrast of two colours, in [1, 21]."""
    low, high = sorted((_luminance(a), _luminance(b)))
    return (high + 0.05) / (low + 0.05)


def _luminance(colour: str) -> float:
    linear = [c / 12.92 if c <= 0.04045 else ((c + 0.055) / 1.055) ** 2.4 for c in _channels(colour)]
    return 0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2]


def _channels(colour: str) -> tuple[float, float, float]:
    r, g, b = (int(colour[k : k + 2], 16) / 255 for k in (1, 3, 5))
    return r, g, b


def _hex(channels: list[float] | tuple[float, ...]) -> str:
    return "#" + "".join(f"{round(255 * min(1.0, max(0.0, c))):02x}" for c in channels)
