"""When a thought is over does not depend on how many tokens are looked at once."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from kvroute.route_steering import ClosingMark, Request
from kvroute.thinking import Layout

PIECES = [b"</", b"think", b">", b"<", b"/", b"</think", b"</think>", b" ", "é".encode()[:1], "é".encode()[1:], b"ab"]


class _Bytes:
    """Decodes as a byte-level BPE does: a character's bytes may lie in two tokens."""

    def decode(self, ids: list[int], **_: Any) -> str:
        return b"".join(PIECES[i] for i in ids).decode(errors="replace")


def mark_of(ids: list[int]) -> ClosingMark:
    engine: Any = SimpleNamespace(tokenizer=_Bytes(), tokenize_texts=lambda *_, **__: [ids])
    return ClosingMark(engine, "</think>" if ids else None)


def request() -> Request:
    return Request(Layout([], [], []))


@pytest.mark.parametrize("ids", [[0, 1, 2], [6], []], ids=["several tokens", "one token", "none"])
@given(tokens=st.lists(st.integers(0, len(PIECES) - 1), max_size=40), cuts=st.sets(st.integers(0, 40)))
@example(tokens=[8, 3, 4, 1, 2, 9], cuts=set())
def test_tokens_may_come_in_any_pieces(ids: list[int], tokens: list[int], cuts: set[int]) -> None:
    mark, one, other = mark_of(ids), request(), request()
    closed_at = {}
    for end in range(1, len(tokens) + 1):
        one.follow(tokens[:end], mark)
        closed_at[end] = one.closed
    for end in sorted(c for c in {*cuts, len(tokens)} if 0 < c <= len(tokens)):
        other.follow(tokens[:end], mark)
        assert other.closed == closed_at[end]
        assert other.seen == end
    found = mark.find(tokens)
    assert one.closed == (found is not None)
    if found is not None:
        assert closed_at[found]
        assert not closed_at.get(found - 1, False)
