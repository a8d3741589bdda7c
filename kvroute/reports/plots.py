"""What all plots share: colours, an empty figure, and bytes that are the same for the same figure."""

from __future__ import annotations

import io
from typing import TYPE_CHECKING, Any

from kvroute.errors import MissingExtraError

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000")
"""Okabe and Ito's palette, which colour-blind readers can tell apart; line styles and markers differ besides."""
LINES = ("-", "--", "-.", ":", (0, (5, 1, 1, 1, 1, 1)), (0, (3, 3)), (0, (1, 1)))
MARKERS = ("o", "s", "^", "D", "v", "P", "X")


def require_matplotlib() -> None:
    """Ask for the plots' package before long work.

    Raises:
        MissingExtraError: matplotlib is not installed.
    """
    try:
        import matplotlib  # noqa: F401
    except ImportError as error:
        raise MissingExtraError("matplotlib", "eval") from error


def new_figure(width: float, height: float) -> tuple[Figure, Axes]:
    """A figure of one plot with a grid, in inches, that no window and no global state of matplotlib's knows of.

    Raises:
        MissingExtraError: matplotlib is not installed.
    """
    require_matplotlib()
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(width, height), layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.add_subplot()
    axes.grid(color="#dddddd", linewidth=0.6)
    axes.set_axisbelow(True)
    for side in ("top", "right"):
        axes.spines[side].set_visible(False)
    return figure, axes


def line_style(place: int) -> tuple[str, Any]:
    """Colour and line of the curve at a place, beginning anew after seven."""
    return COLOURS[place % len(COLOURS)], LINES[place % len(LINES)]


def rendered(figure: Figure, suffix: str, *, facecolor: str = "auto") -> bytes:
    """A figure as ``png`` or ``svg``, without a date: the same figure gives the same bytes.

    Args:
        figure: the figure.
        suffix: ``png`` or ``svg``.
        facecolor: of the ground; ``none`` for no ground, by default the figure's own.
    """
    import matplotlib as mpl

    out = io.BytesIO()
    metadata = {"Software": None} if suffix == "png" else {"Date": None, "Creator": None}
    with mpl.rc_context({"svg.hashsalt": "kvroute"}):
        figure.savefig(out, format=suffix, dpi=150, metadata=metadata, facecolor=facecolor)
    return out.getvalue()
