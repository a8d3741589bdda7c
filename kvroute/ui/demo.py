"""What ``kvroute ui`` shows where no model is named: the tiny thinker of a checkout."""

from __future__ import annotations

from pathlib import Path
from typing import Final

import kvroute
from kvroute.ui.desk import Example

_PLACE: Final = Path("examples", "tiny_thinker")


def demo_folder() -> Path | None:
    """Folder of the tiny thinker, with ``model``, ``policy.json`` and ``confidence``; None outside a checkout."""
    for root in (Path(kvroute.__file__).resolve().parents[1], Path.cwd()):
        if (root / _PLACE / "model").is_dir() and (root / _PLACE / "policy.json").is_file():
            return root / _PLACE
    return None


THINKER_QUESTIONS: Final = (
    Example("arrows to follow", "map next right:j>36,m>j,n>30,f>h,h>44,e>d,k>m,d>26 from m"),
    Example("steps, much left to compute", "run ok well a=9 b=0;7a=2;8b=5;9b*8;0b*7;1a*3;2b*5 ok"),
    Example("steps, little left to compute", "run a=0 b=1;5a+5;6a*b;7b=6;8a+8;9a=6 so"),
    Example("the largest number", "top please 82,08,17,79,40,55,27,24,13,64 ok"),
    Example("what nobody can know", "draw next 69,75,11,72,81,09,80,91,56,98 from a hat"),
)
"""Questions of its kinds (``examples/tiny_thinker/questions.py``)."""
THINKER_PAIR: Final = (
    "map next right:j>36,m>j,n>30,f>h,h>44,e>d,k>m,d>26 from m",
    "map so:c>e,d>k,e>g,f>h,g>19,h>70,j>c,m>42,n>08 from c",
)
"""Texts of its world: it knows no English."""
