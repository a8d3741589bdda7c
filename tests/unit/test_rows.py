"""Rows in files: faults name their line, and a run that is cut anywhere ends with the same bytes."""

from __future__ import annotations

import io
import json
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from kvroute.errors import InvalidInputError, KVRouteError
from kvroute.rows import PartialRun, digest_of, parse_jsonl, parse_lines, read_text, text_field


def test_blank_lines_are_named_or_counted() -> None:
    with pytest.raises(InvalidInputError, match=r"f\.txt, line 2: blank"):
        parse_lines("a\n \nb\n", "f.txt")
    assert parse_lines("a\n\nb\n\n", "f.txt", skip_empty=True) == (["a", "b"], 2)


def test_only_line_feeds_end_a_line() -> None:
    assert parse_lines("a\u2028b\x0cc\r\nd", "f") == (["a\u2028b\x0cc", "d"], 0)
    assert parse_jsonl('{"text": "a\u2028b"}\n', "f") == [(1, {"text": "a\u2028b"})]


@pytest.mark.parametrize(
    ("text", "what"),
    [
        ('{"a": NaN}', "line 1: not JSON"),
        ('{"a": "\\ud800"}', "line 1: not JSON"),
        ('{"a": 1}\n{', "line 2: not JSON"),
        ("[1]\n", "line 1: list"),
        ("\n\n7", "line 3: int"),
    ],
)
def test_bad_rows_name_their_line(text: str, what: str) -> None:
    with pytest.raises(InvalidInputError, match=what):
        parse_jsonl(text, "rows.jsonl")


def test_missing_and_mistyped_fields_say_what_there_is() -> None:
    with pytest.raises(InvalidInputError, match=r"no field 'text'. It has: body, id"):
        text_field({"id": 1, "body": "x"}, "text", "f", 3)
    with pytest.raises(InvalidInputError, match="field 'text' is int"):
        text_field({"text": 1}, "text", "f", 3)


def test_bytes_that_are_no_utf8_name_their_line(tmp_path: Path) -> None:
    (tmp_path / "f").write_bytes(b"good\nbad \xff\n")
    with pytest.raises(InvalidInputError, match="line 2: not UTF-8"):
        read_text(tmp_path / "f", io.BytesIO())
    with pytest.raises(InvalidInputError, match="can't be read"):
        read_text(tmp_path / "none", io.BytesIO())
    assert read_text("-", io.BytesIO(b"\xef\xbb\xbfhi")) == "hi"


@settings(max_examples=200, deadline=None)
@given(st.binary(max_size=200))
def test_arbitrary_bytes_give_rows_or_our_error(data: bytes) -> None:
    try:
        text = read_text("-", io.BytesIO(data))
        for number, row in parse_jsonl(text, "-"):
            text_field(row, "text", "-", number)
        parse_lines(text, "-")
    except KVRouteError:
        pass


def _work(run: PartialRun, stop_after: int | None) -> bool:
    for done, (start, stop) in enumerate(run.missing):
        if done == stop_after:
            return False
        run.write(start, b"".join(b"%d\n" % i for i in range(start, stop)))
    run.finish()
    return True


@settings(max_examples=40, deadline=None)
@given(rows=st.integers(1, 40), chunk=st.integers(1, 9), cuts=st.lists(st.integers(0, 5), max_size=6))
def test_a_run_that_is_cut_anywhere_ends_with_the_same_bytes(
    tmp_path_factory: pytest.TempPathFactory, rows: int, chunk: int, cuts: list[int]
) -> None:
    out = tmp_path_factory.mktemp("run") / "out.jsonl"
    finished = False
    for cut in [*cuts, None]:
        if finished:
            break
        with PartialRun(out, {"a": 1}, rows, chunk=chunk) as run:
            finished = _work(run, cut)
        assert out.exists() == finished
    assert out.read_bytes() == b"".join(b"%d\n" % i for i in range(rows))
    assert list(out.parent.iterdir()) == [out]


def test_another_input_is_refused_until_restarted(tmp_path: Path) -> None:
    out = tmp_path / "o.jsonl"
    with PartialRun(out, {"input": digest_of(["a"])}, 4, chunk=2) as run:
        run.write(0, b"old\n")
    with (
        pytest.raises(InvalidInputError, match=r"another run.*--restart"),
        PartialRun(out, {"input": digest_of(["b"])}, 4, chunk=2),
    ):
        pass
    with PartialRun(out, {"input": digest_of(["b"])}, 4, chunk=2, restart=True) as run:
        assert run.missing == [(0, 2), (2, 4)]


def test_an_output_that_is_there_is_kept(tmp_path: Path) -> None:
    out = tmp_path / "o.jsonl"
    out.write_text("mine")
    with pytest.raises(InvalidInputError, match="--force"), PartialRun(out, {}, 1, chunk=1):
        pass
    assert out.read_text() == "mine"
    with PartialRun(out, {}, 1, chunk=1, force=True) as run:
        run.write(0, b"new")
        run.finish()
    assert out.read_text() == "new"


def test_two_runs_do_not_write_one_output(tmp_path: Path) -> None:
    out = tmp_path / "o.jsonl"
    with (
        PartialRun(out, {}, 1, chunk=1),
        pytest.raises(InvalidInputError, match="Another run"),
        PartialRun(out, {}, 1, chunk=1),
    ):
        pass
    with PartialRun(out, {}, 1, chunk=1):
        pass


def test_a_damaged_header_is_said(tmp_path: Path) -> None:
    out = tmp_path / "o.jsonl"
    with PartialRun(out, {}, 1, chunk=1) as run:
        (run.folder / "run.json").write_text(json.dumps({"torn": True})[:-3])
    with pytest.raises(InvalidInputError, match=r"damaged.*--restart"), PartialRun(out, {}, 1, chunk=1):
        pass


@pytest.mark.parametrize("how", ["header first", "chunks first"])
def test_a_deletion_that_was_cut_short_leaves_nothing_that_counts(tmp_path: Path, how: str) -> None:
    out = tmp_path / "o.jsonl"
    with PartialRun(out, {"input": "old"}, 2, chunk=1) as run:
        run.write(0, b"old 0\n")
        run.write(1, b"old 1\n")
    if how == "header first":  # as _drop deletes
        (run.folder / "run.json").unlink()
    else:
        (run.folder / f"{0:012d}").unlink()
    restart = how == "chunks first"
    with PartialRun(out, {"input": "new"}, 2, chunk=1, restart=restart) as run:
        assert run.missing == [(0, 1), (1, 2)]
        run.write(0, b"new 0\n")
        run.write(1, b"new 1\n")
        run.finish()
    assert out.read_bytes() == b"new 0\nnew 1\n"
