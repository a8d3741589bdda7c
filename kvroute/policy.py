"""Policies: what is done with a difficulty. Plain JSON, kept beside the head they use."""

from __future__ import annotations

import math
import os
from pathlib import Path
from typing import Any, Literal, Self, cast, get_args

from pydantic import Field, ValidationError, model_validator

from kvroute.errors import FileFormatError, InvalidInputError
from kvroute.files import is_name, read_json, write_json
from kvroute.pooling import Spec
from kvroute.thinking import Mode

FOLDER_VARIABLE = "KVROUTE_POLICIES"
"""The environment variable that names the folder of policies found by name."""
_KIND = "kvroute.policy"

PolicyKind = Literal["one-step", "two-step", "fast", "slow", "random", "length", "budget"]


class Policy(Spec):
    """When to think (docs/concepts.md; arXiv 2601.20326, section 4.2).

    Difficulties lie in [0, 100]; higher is harder.
    """

    kind: PolicyKind = "one-step"
    """``one-step`` decides before the first token; ``two-step`` looks again at checkpoints and may switch once;
    ``budget`` thinks about the hardest requests, a ``share`` of the last ``window``; ``fast``, ``slow``, ``random`` (a
    share) and ``length`` (prompts longer than ``length``) read no difficulty."""
    head: str | None = None
    """Folder of the head, beside the policy's file or absolute."""
    tau: float = Field(default=50.0, ge=-1, le=101)
    """At the start: slow above it."""
    give_up: float | None = Field(default=None, ge=-1, le=101)
    """At the start: fast above it, where thinking is not likely to help either."""
    thresholds: tuple[float, ...] = ()
    """For more than two targets: rising difficulties, above each the next target; in place of ``tau``."""
    targets: tuple[str, ...] = ("fast", "slow")
    """Easiest first: ``fast``, ``slow`` and names of the router's other targets; one more than ``thresholds``."""
    tau_fast: float = Field(default=30.0, ge=-1, le=101)
    """At a checkpoint in a thought: below it the thought is closed."""
    tau_slow: float = Field(default=70.0, ge=-1, le=101)
    """At a checkpoint in a fast answer: above it a thought is opened."""
    every: int = Field(default=16, ge=1, strict=True)
    """Tokens between checkpoints."""
    share: float = Field(default=0.5, ge=0, le=1)
    """Of slow, for ``random`` and ``budget``."""
    window: int = Field(default=256, ge=1, strict=True)
    """Requests that a ``budget`` looks back on."""
    length: int = Field(default=64, ge=0, strict=True)
    """Tokens of the prompt, for ``length``."""
    margin: float = Field(default=5.0, ge=0, le=100)
    """In a conversation: how far the difficulty must lie beyond a threshold to leave the last turn's mode."""
    fallback: Mode = "slow"
    """Where the difficulty can't be had."""
    shadow: bool = False
    """Decide and log, and let every request take ``fallback``."""
    seed: int = Field(default=0, ge=0, strict=True)
    """Of ``random``."""
    guarantee: dict[str, Any] | None = None
    """What calibration promised and how it was found."""
    drift: str | None = None
    """File beside the policy that holds what its calibration rows looked like."""

    @model_validator(mode="after")
    def _fits_together(self) -> Self:
        if self.thresholds:
            if len(self.targets) != len(self.thresholds) + 1:
                raise ValueError("targets are one more than thresholds")
            if not all(map(math.isfinite, self.thresholds)) or list(self.thresholds) != sorted(self.thresholds):
                raise ValueError("thresholds rise")
        elif self.targets != ("fast", "slow"):
            raise ValueError("give thresholds for targets other than fast and slow")
        return self

    @property
    def reads_difficulty(self) -> bool:
        """Whether it needs a head."""
        return self.kind in ("one-step", "two-step", "budget")

    def target_of(self, difficulty: float) -> tuple[str, float]:
        """Target of a difficulty at the start, and the threshold that decided."""
        if self.thresholds:
            place = sum(difficulty > t for t in self.thresholds)
            return self.targets[place], self.thresholds[max(place - 1, 0)]
        if self.give_up is not None and difficulty > self.give_up:
            return "fast", self.give_up
        return ("slow" if difficulty > self.tau else "fast"), self.tau

    def targets_near(self, difficulty: float) -> set[str]:
        """Targets of all difficulties within the margin."""
        low, high = difficulty - self.margin, difficulty + self.margin
        cuts = self.thresholds or tuple(t for t in (self.tau, self.give_up) if t is not None)
        inside = [c for c in cuts if low < c < high]
        return {
            self.target_of(d)[0] for d in (low, difficulty, high, *inside, *(math.nextafter(c, 999) for c in inside))
        }

    # ------------------------------------------------------------------ files

    def save(self, path: str | Path) -> None:
        """Write it as JSON."""
        write_json(path, _KIND, self.model_dump(mode="json"))

    @classmethod
    def load(cls, path: str | Path) -> Self:
        """Read what :meth:`save` wrote.

        Raises:
            FileFormatError: missing, torn, changed, newer, or no policy.
        """
        body = read_json(path, _KIND)
        try:
            return cls.model_validate(body)
        except ValidationError as error:
            raise FileFormatError(f"{path} is no policy: {error}") from error


def find_policy(policy: str) -> tuple[Policy, Path | None]:
    """A policy by kind, by file or by name; and the folder of its file.

    Raises:
        as :func:`policy_path` and :meth:`Policy.load`.
    """
    if policy in get_args(PolicyKind):
        return Policy(kind=cast(PolicyKind, policy)), None
    path = policy_path(policy)
    return Policy.load(path), path.parent


def policy_path(name: str) -> Path:
    """The file of a policy: a path to a ``.json`` file, or a name in the folder ``KVROUTE_POLICIES``.

    Raises:
        InvalidInputError: neither.
    """
    if name.endswith(".json"):
        return Path(name)
    folder = os.environ.get(FOLDER_VARIABLE)
    if not folder:
        raise InvalidInputError(
            f"The policy {name!r} is no .json file, and no folder of policies is set.", hint=f"Set {FOLDER_VARIABLE}."
        )
    return named_policy(folder, name)


def named_policy(folder: str | Path, name: str) -> Path:
    """The file of a named policy in a folder. A name holds no path.

    Raises:
        InvalidInputError: not a name, or no such policy; the message lists those there are.
    """
    if not is_name(name):
        raise InvalidInputError(f"{name!r} is not a name.", hint="Letters, digits, '.', '-' and '_', no path.")
    path = Path(folder) / f"{name}.json"
    if not path.is_file():
        there = ", ".join(sorted(p.stem for p in Path(folder).glob("*.json"))) or "none"
        raise InvalidInputError(f"No policy is named {name!r}.", hint=f"There are: {there}.")
    return path
