"""Steps whose results are files: those that are whole are skipped, and a changed recipe is noticed."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from kvroute._version import __version__
from kvroute.errors import FileFormatError, InvalidInputError
from kvroute.files import read_json, write_json
from kvroute.rows import digest_of

if TYPE_CHECKING:
    from kvroute.engines.base import Engine
    from kvroute.engines.transformers_engine import TransformersEngine

Work = Callable[[bool], Mapping[str, Any]]
"""Does a step; told whether to drop what an earlier try left. Gives what is kept of it, JSON-able."""

_KIND = "kvroute.reproduction-step"


class Steps:
    """The steps of one reproduction.

    Args:
        folder: where their records lie, one JSON file a step. A record is written before the work, and again, with the
            result, when the step's files are whole.
        redo: do steps anew that a change concerns; without it a change is refused.
        say: told of each step that is done or skipped.
    """

    def __init__(self, folder: Path, *, redo: bool = False, say: Callable[[str], None] = lambda _: None) -> None:
        self.folder, self.redo, self.say = folder, redo, say
        self.identities: dict[str, str] = {}
        self.results: dict[str, dict[str, Any]] = {}
        self.done: list[str] = []
        self.skipped: list[str] = []

    def run(self, name: str, facts: object, work: Work, *, after: tuple[str, ...] = ()) -> dict[str, Any]:
        """Do a step, or read what it gave.

        Args:
            name: of the step, and of its record.
            facts: all that the result depends on, JSON-able, beside the steps before.
            work: does it.
            after: names of the steps whose results it takes.

        Raises:
            InvalidInputError: it was done, or begun, from other facts, and ``redo`` is off.
        """
        identity = digest_of([name, facts, [self.identities[a] for a in after], __version__])
        self.identities[name] = identity
        path = self.folder / f"{name}.json"
        known = self._read(path)
        fresh = known is not None and known.get("identity") != identity
        if known is not None and not fresh and known.get("whole"):
            self.skipped.append(name)
            self.say(f"{name}: there already")
            self.results[name] = known["result"]
            return self.results[name]
        if fresh and not self.redo:
            raise InvalidInputError(
                f"The step {name} in {self.folder} is of another recipe, other data or another kvroute.",
                hint="Pass --redo to do what has changed anew, or choose another folder.",
            )
        write_json(path, _KIND, {"identity": identity, "whole": False, "result": {}})
        found = dict(work(fresh))
        write_json(path, _KIND, {"identity": identity, "whole": True, "result": found})
        self.done.append(name)
        self.results[name] = found
        self.say(f"{name}: done")
        return found

    def _read(self, path: Path) -> dict[str, Any] | None:
        if not path.exists():
            return None
        try:
            return read_json(path, _KIND)
        except FileFormatError:
            return {}  # damaged: of no known identity


class Engines:
    """The engine that writes answers, and the one that caches are read from; each opened when it is first needed.

    Args:
        write: opens the former.
        read: opens the latter, where it is another one; the first is closed before, so that both need no room at once.
    """

    def __init__(self, write: Callable[[], Engine], read: Callable[[], TransformersEngine] | None = None) -> None:
        self._write, self._read = write, read
        self._writer: Engine | None = None
        self._reader: TransformersEngine | None = None

    def writer(self) -> Engine:
        """Writes answers."""
        if self._writer is None:
            self._writer = self._write()
        return self._writer

    def reader(self) -> TransformersEngine:
        """Reads caches."""
        if self._read is None:
            return self.writer()  # type: ignore[return-value]
        if self._reader is None:
            close = getattr(self._writer, "close", None)
            if close is not None:
                close()
            self._writer = None
            self._reader = self._read()
        return self._reader
