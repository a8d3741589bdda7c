"""The heads and policies of a server, by name: read from its folders once, before the first request.

A name whose files can't be used is off, with a reason; the others are served. Requests name things and never bring a
path: nothing here touches a file after :meth:`Catalog.load`.
"""

from __future__ import annotations

import difflib
import re
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Self, TypeVar

from kvroute.choosing import unmet_need
from kvroute.drift import DriftMonitor
from kvroute.errors import AskError, FileFormatError, InvalidInputError, ModelMismatchError, fault_text
from kvroute.heads.head import CONFIG, DifficultyHead
from kvroute.policy import Policy

if TYPE_CHECKING:
    from kvroute.info import ModelInfo

POLICY = "policy.json"
"""A policy in a folder of its own, which then has the policy's name."""
_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,63}")
_LISTED = 10
_T = TypeVar("_T")


@dataclass(frozen=True, slots=True)
class Off:
    """Why a name is not served.

    Attributes:
        reason: in full, for the server's log; it may name files.
        public: for clients.
    """

    reason: str
    public: str


@dataclass(frozen=True, slots=True)
class ServedPolicy:
    """A policy with what it needs; a :class:`~kvroute.choosing.Chooser` takes the three.

    Attributes:
        policy: what is done with a difficulty.
        head: reads it; None where the policy reads none.
        drift: watches its requests, or None.
    """

    policy: Policy
    head: DifficultyHead | None = None
    drift: DriftMonitor | None = None


@dataclass(frozen=True)
class Catalog:
    """What a server has.

    Attributes:
        policies, heads: by name.
        policies_off, heads_off: those that can't be used.
    """

    policies: Mapping[str, ServedPolicy] = field(default_factory=dict)
    heads: Mapping[str, DifficultyHead] = field(default_factory=dict)
    policies_off: Mapping[str, Off] = field(default_factory=dict)
    heads_off: Mapping[str, Off] = field(default_factory=dict)

    # ------------------------------------------------------------------ look up

    def policy(self, name: str) -> ServedPolicy:
        """A policy by name.

        Raises:
            AskError: there is none, or it is off; with the names there are.
        """
        return _look_up("policy", name, self.policies, self.policies_off)

    def head(self, name: str) -> DifficultyHead:
        """A head by name.

        Raises:
            AskError: as :meth:`policy`.
        """
        return _look_up("head", name, self.heads, self.heads_off)

    @property
    def off(self) -> list[str]:
        """One line for each name that is off, for the server's log."""
        pairs = [("policy", n, o) for n, o in self.policies_off.items()]
        pairs += [("head", n, o) for n, o in self.heads_off.items()]
        return [f"The {kind} {name!r} is off: {o.reason}" for kind, name, o in pairs]

    # ------------------------------------------------------------------ make

    @classmethod
    def load(cls, policies: Path | None, heads: Path | None) -> Self:
        """Read the folders.

        Args:
            policies: holds ``NAME.json``, or ``NAME/policy.json``; beside each what it names, as ``kvroute calibrate``
                leaves it.
            heads: holds folders ``NAME`` as ``kvroute train`` leaves them.

        Raises:
            InvalidInputError: a folder is not there or can't be listed. A file in it that can't be used raises nothing:
                its name is off.
        """
        read: dict[Path, DifficultyHead] = {}

        def head_in(folder: Path) -> DifficultyHead:
            place = folder.resolve()
            if place not in read:
                read[place] = DifficultyHead.load(folder)
            return read[place]

        found_policies = {} if policies is None else _found(policies, POLICY, files=True)
        found_heads = {} if heads is None else _found(heads, CONFIG, files=False)
        good, bad = _each(found_policies, lambda path: _load_policy(path, head_in))
        good_heads, bad_heads = _each(found_heads, lambda path: head_in(path.parent))
        return cls(good, good_heads, bad, bad_heads)

    def for_model(self, info: ModelInfo, *, fingerprints: bool = True) -> Catalog:
        """What of it fits a model; the rest is off.

        Args:
            info: the model that is served.
            fingerprints: False where only the model's sizes are known and not its weights (no part of an engine that
                schedules has them).
        """

        def fitting(served: ServedPolicy) -> ServedPolicy:
            if served.head is not None:
                _require(served.head, info, fingerprints=fingerprints)
            if fingerprints and served.drift is not None and served.drift.fingerprint is not None:
                info.require(served.drift.fingerprint, "The drift reference")
            return served

        def fitting_head(head: DifficultyHead) -> DifficultyHead:
            _require(head, info, fingerprints=fingerprints)
            return head

        good, bad = _each(self.policies, fitting)
        good_heads, bad_heads = _each(self.heads, fitting_head)
        return Catalog(good, good_heads, {**self.policies_off, **bad}, {**self.heads_off, **bad_heads})


class _UnfitError(InvalidInputError):
    """It was read and can't be served. Its text names no file."""


def _load_policy(path: Path, head_in: Callable[[Path], DifficultyHead]) -> ServedPolicy:
    policy = Policy.load(path)
    others = [t for t in policy.targets if t not in ("fast", "slow")]
    if others:
        raise _UnfitError("it names targets other than fast and slow, and a server has no others")
    head = head_in(path.parent / policy.head) if policy.reads_difficulty and policy.head is not None else None
    need = unmet_need(policy, head)
    if need is not None:
        raise _UnfitError(need[0][0].lower() + need[0][1:].rstrip("."))
    drift = None if policy.drift is None or head is None else DriftMonitor.load(path.parent / policy.drift)
    return ServedPolicy(policy, head, drift)


def _require(head: DifficultyHead, info: ModelInfo, *, fingerprints: bool) -> None:
    for part in (head, head.windows):
        if part is None:
            continue
        if fingerprints:
            part.require(info)
        size = part.spec.dimension(info)
        if size != part.predictor.dim:
            raise _UnfitError(f"its head takes {part.predictor.dim} numbers, and this model gives {size}")


def _found(folder: Path, inside: str, *, files: bool) -> dict[str, Path]:
    """Files by name: ``NAME/<inside>`` and, with ``files``, ``NAME.json``, which comes first."""
    try:
        there = sorted(folder.expanduser().iterdir())
    except OSError as error:
        raise InvalidInputError(
            f"The folder {folder} can't be listed: {error.strerror or error}.",
            hint="Give the folder's path as the server sees it.",
        ) from error
    found = {p.name: p / inside for p in there if _NAME.fullmatch(p.name) and (p / inside).is_file()}
    if files:
        found |= {p.stem: p for p in there if p.suffix == ".json" and _NAME.fullmatch(p.stem) and p.is_file()}
    return dict(sorted(found.items()))


_A = TypeVar("_A")


def _each(items: Mapping[str, _A], work: Callable[[_A], _T]) -> tuple[dict[str, _T], dict[str, Off]]:
    """What ``work`` makes of each, and why it makes nothing of the others."""
    good: dict[str, _T] = {}
    bad: dict[str, Off] = {}
    for name, item in items.items():
        try:
            good[name] = work(item)
        except Exception as error:  # noqa: BLE001 - a torn file can fail anywhere, and must cost no other name
            bad[name] = Off(fault_text(error), _public(error))
    return good, bad


def _public(error: Exception) -> str:
    if isinstance(error, _UnfitError):
        return error.message
    if isinstance(error, FileFormatError):
        return "its files can't be read"
    if isinstance(error, ModelMismatchError):
        return "it was made for another model"
    return "it can't be used"


def _look_up(what: str, name: str, there: Mapping[str, _T], off: Mapping[str, Off]) -> _T:
    if name in there:
        return there[name]
    if name in off:
        raise AskError(f"The {what} {name!r} is off: {off[name].public}.", hint="The server's log says more.")
    plural = "policies" if what == "policy" else f"{what}s"
    raise AskError(
        f"No {what} is named {shown(name)}.", hint=suggestion(name, there, none=f"The server has no {plural}.")
    )


# ---------------------------------------------------------------------- words


def shown(value: object) -> str:
    """A value in an error text: at most 80 ASCII characters of a text, of anything else its type."""
    if not isinstance(value, str):
        return f"a {type(value).__name__}"
    text = ascii(value[:60])
    return text if len(value) <= 60 and len(text) <= 80 else f"{text[:76]}..."


def suggestion(name: str, known: Iterable[str], none: str) -> str:
    """A hint: the name that may have been meant, and those there are."""
    names = sorted(known)
    if not names:
        return none
    near = difflib.get_close_matches(name[:64], names, n=1)
    listed = ", ".join(names[:_LISTED]) + (", ..." if len(names) > _LISTED else "")
    return f"Did you mean {near[0]!r}? There are: {listed}." if near else f"There are: {listed}."
