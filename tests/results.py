"""Results of requests, compared."""

from __future__ import annotations

from typing import Any

import pytest


def assert_same(found: Any, wanted: Any, *, rel: float, absolute: float) -> None:
    """Equal in types and values, but for the time that was taken and the rounding of numbers.

    Args:
        found, wanted: what JSON can hold.
        rel, absolute: how far numbers may lie apart, as in :func:`pytest.approx`.
    """
    assert type(found) is type(wanted)
    if isinstance(wanted, dict):
        assert found.keys() == wanted.keys()
        for key in wanted.keys() - {"seconds"}:
            assert_same(found[key], wanted[key], rel=rel, absolute=absolute)
    elif isinstance(wanted, list):
        assert len(found) == len(wanted)
        for mine, theirs in zip(found, wanted, strict=True):
            assert_same(mine, theirs, rel=rel, absolute=absolute)
    elif isinstance(wanted, float):
        assert found == pytest.approx(wanted, rel=rel, abs=absolute)
    else:
        assert found == wanted
