"""Rows in files: reading with line numbers, and writing that is killed at any moment and goes on where it was.

A long run is cut into chunks of consecutive rows. Each chunk is computed on its own and written whole under its
number beside the output; what a killed run has finished is there when it starts again, and nothing else is. At
the end the chunks are joined and put in the output's place by a rename, so the output is there whole or not at all,
and is the same to the byte whether the run was disturbed or not.
"""

from __future__ import annotations

import hashlib
import json
import shutil
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, BinaryIO, Self

from kvroute._version import __version__
from kvroute.errors import FileFormatError, InvalidInputError
from kvroute.files import read_json, write_json, write_whole

_KIND = "kvroute.partial"


def read_text(source: str | Path, stdin: BinaryIO) -> str:
    """All of a UTF-8 file, or of standard input for ``-``.

    Raises:
        InvalidInputError: it can't be read, or is not UTF-8.
    """
    try:
        data = stdin.read() if str(source) == "-" else Path(source).read_bytes()
    except OSError as error:
        raise InvalidInputError(f"{source} can't be read: {error.strerror or error}.") from error
    try:
        return data.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        line = data[: error.start].count(b"\n") + 1
        raise InvalidInputError(f"{source}, line {line}: not UTF-8.", hint="Convert it to UTF-8 first.") from error


def parse_lines(text: str, source: object, *, skip_empty: bool = False) -> tuple[list[str], int]:
    """Texts, one a line, and how many blank lines were skipped.

    Raises:
        InvalidInputError: a blank line, naming it, unless they are skipped.
    """
    texts, skipped = [], 0
    for number, line in enumerate(_lines(text), 1):
        if line.strip():
            texts.append(line)
        elif skip_empty:
            skipped += 1
        else:
            raise InvalidInputError(f"{source}, line {number}: blank.", hint="Remove it, or pass --skip-empty.")
    return texts, skipped


def parse_jsonl(text: str, source: object) -> list[tuple[int, dict[str, Any]]]:
    """Objects, one a line, each with its line number; blank lines are passed over.

    Raises:
        InvalidInputError: a line that is no JSON object, naming it.
    """
    rows = []
    for number, line in enumerate(_lines(text), 1):
        if not line.strip():
            continue
        try:
            row = json.loads(line, parse_constant=_no_constant)
            json.dumps(row, ensure_ascii=False).encode()  # a lone surrogate could not be written again
        except (ValueError, RecursionError) as error:
            raise InvalidInputError(f"{source}, line {number}: not JSON ({error}).") from error
        if not isinstance(row, dict):
            raise InvalidInputError(f"{source}, line {number}: {type(row).__name__}, not a JSON object.")
        rows.append((number, row))
    return rows


def text_field(row: Mapping[str, Any], field: str, source: object, number: int) -> str:
    """A row's text.

    Raises:
        InvalidInputError: it is missing or no text, naming the line and the fields there are.
    """
    if field not in row:
        known = ", ".join(sorted(map(str, row))) or "none"
        raise InvalidInputError(f"{source}, line {number}: no field {field!r}.", hint=f"It has: {known}.")
    value = row[field]
    if not isinstance(value, str):
        raise InvalidInputError(f"{source}, line {number}: field {field!r} is {type(value).__name__}, not a text.")
    return value


def messages_in(row: Mapping[str, Any], source: object, number: int) -> list[dict[str, Any]] | None:
    """A row's chat, or None where it has none.

    Raises:
        InvalidInputError: it is no list of objects, naming the line.
    """
    if "messages" not in row:
        return None
    messages = row["messages"]
    if not isinstance(messages, list) or not messages or not all(isinstance(m, dict) for m in messages):
        raise InvalidInputError(f"{source}, line {number}: messages is not a list of objects.")
    return messages


def _no_constant(name: str) -> None:
    raise ValueError(f"{name} is no JSON value")


def _lines(text: str) -> list[str]:
    # str.splitlines also cuts at characters that may stand within a text or a JSON string.
    lines = text.replace("\r\n", "\n").split("\n")
    return lines[:-1] if lines and lines[-1] == "" else lines


class PartialRun:
    """Chunks of a run that writes one output.

    Args:
        out: the output.
        identity: everything the output depends on (input, options, model); JSON-able.
        rows: how many rows there are.
        chunk: rows a chunk.
        restart: drop what an earlier run left.
        force: an output that is there already may be replaced.

    Raises:
        InvalidInputError: the output is there, another run is at work on it, or what an earlier run left belongs to
            another input or other options.
    """

    def __init__(
        self,
        out: Path,
        identity: Mapping[str, Any],
        rows: int,
        *,
        chunk: int,
        restart: bool = False,
        force: bool = False,
    ) -> None:
        self.out = out
        self.folder = out.with_name(f"{out.name}.partial")
        self.rows = rows
        self.chunk = chunk
        text = json.dumps({**identity, "rows": rows, "chunk": chunk, "kvroute": __version__}, sort_keys=True)
        self._identity = hashlib.sha256(text.encode()).hexdigest()
        self._restart, self._force = restart, force
        self._lock: Any = None

    def __enter__(self) -> Self:
        from filelock import FileLock, Timeout

        if self.out.exists() and not self._force:
            raise InvalidInputError(f"{self.out} is there already.", hint="Pass --force to replace it.")
        try:
            self.out.parent.mkdir(parents=True, exist_ok=True)
            self._lock = FileLock(str(self.folder) + ".lock", timeout=0)
            self._lock.acquire()
        except Timeout as error:
            raise InvalidInputError(f"Another run is writing {self.out}.", hint="Wait for it, or stop it.") from error
        except OSError as error:
            raise InvalidInputError(f"{self.out} can't be written: {error.strerror or error}.") from error
        try:
            self._open()
        except BaseException:
            self._lock.release()
            raise
        return self

    def _open(self) -> None:
        header = self.folder / "run.json"
        if self._restart or not header.exists():
            # Without its header a folder is the rest of one that was being deleted: nothing in it may count.
            self._drop()
        if header.exists():
            try:
                found = read_json(header, _KIND).get("identity")
            except FileFormatError as error:
                raise InvalidInputError(f"{header} is damaged.", hint="Pass --restart to begin anew.") from error
            if found != self._identity:
                raise InvalidInputError(
                    f"{self.folder} holds a part of another run: the input, an option, the model or kvroute changed.",
                    hint="Pass --restart to begin anew, or give the same input and options to go on.",
                )
        else:
            write_json(header, _KIND, {"identity": self._identity})

    def _drop(self) -> None:
        """Delete the folder; the header goes first, so that one that is cut short never looks whole."""
        try:
            (self.folder / "run.json").unlink(missing_ok=True)
            if self.folder.exists():
                shutil.rmtree(self.folder)
        except OSError as error:
            raise InvalidInputError(f"{self.folder} can't be deleted: {error.strerror or error}.") from error

    def __exit__(self, *_error: object) -> None:
        # The file goes while the lock is held: who comes later makes and locks a new one.
        Path(str(self.folder) + ".lock").unlink(missing_ok=True)
        self._lock.release()

    def _file(self, start: int) -> Path:
        return self.folder / f"{start:012d}"

    @property
    def starts(self) -> list[int]:
        """First rows of the chunks."""
        return list(range(0, self.rows, self.chunk))

    @property
    def missing(self) -> list[tuple[int, int]]:
        """(first row, one past the last) of the chunks that are still to be done."""
        return [(s, min(s + self.chunk, self.rows)) for s in self.starts if not self._file(s).exists()]

    def write(self, start: int, data: bytes) -> None:
        """A chunk's result, whole or not at all."""
        write_whole(self._file(start), data)

    def finish(self, join: Callable[[Iterator[bytes]], Iterable[bytes]] | None = None) -> None:
        """Join the chunks and put the output in its place.

        Args:
            join: turns the chunks' bytes, in order, into those of the output; by default as they are.
        """
        chunks = (self._file(s).read_bytes() for s in self.starts)
        write_whole(self.out, b"".join(join(chunks) if join else chunks))
        self._drop()


def digest_of(texts: Sequence[Any]) -> str:
    """Digest of an input, for :class:`PartialRun`."""
    return hashlib.sha256(json.dumps(list(texts), ensure_ascii=True).encode()).hexdigest()
