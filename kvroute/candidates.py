"""Policies on labelled rows: what each would have answered, and at how many tokens."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np

from kvroute.confidence_maps import Floats
from kvroute.errors import InvalidInputError
from kvroute.label_rows import LabelMeta, LabelRow
from kvroute.routing_curves import Modes, Outcome

if TYPE_CHECKING:
    from kvroute.checkers import Checker
    from kvroute.router import Router


@dataclass(frozen=True, slots=True)
class Candidate(Outcome):
    """What a policy that may be chosen gets.

    Attributes:
        slow: ``[n]`` in [0, 1], whether (or how much of) the row was thought about slowly.
        policy: its settings or its name.
    """

    slow: Floats
    policy: dict[str, Any] | str


def one_step_candidate(
    difficulty: Any,
    rows: Sequence[LabelRow],
    tau: float,
    give_up: float | None = None,
    policy: Mapping[str, Any] | None = None,
) -> Candidate:
    """The one-step policy on labelled rows: the slow answer where ``tau < difficulty``, else the fast one.

    Args:
        difficulty: ``[n]`` the head's difficulties of the rows.
        rows: the labelled rows, both answers known.
        tau: threshold.
        give_up: above it the fast answer again, where thinking is not likely to help either; None for never.
        policy: further settings to state.

    Raises:
        InvalidInputError: another number of difficulties than of rows.
    """
    d = np.asarray(difficulty, dtype=np.float64)
    if d.shape != (len(rows),):
        raise InvalidInputError(f"{len(rows)} rows have difficulties of shape {d.shape}.")
    settings = {"kind": "one-step", **(policy or {}), "tau": float(tau), "give_up": give_up}
    slow = slow_rows(d, tau, give_up)
    found = Modes.of(rows).chosen(slow)
    return Candidate(found.right, found.tokens, slow, settings)


def slow_rows(d: Floats, tau: float, give_up: float | None) -> Floats:
    """``[n]``: 1 where the one-step policy thinks, above ``tau`` and up to ``give_up``, else 0."""
    return ((d > tau) & (d <= (np.inf if give_up is None else give_up))).astype(np.float64)


def quantile_thresholds(difficulties: Any, k: int = 60) -> list[float]:
    """Thresholds to try, ascending: quantiles of difficulties of **validation** rows, and 100 (always fast).

    Taken from the calibration rows they would void the guarantee.

    Args:
        difficulties: ``[n]`` of validation rows, in [0, 100].
        k: how many at most; equal ones are taken once.
    """
    d = np.asarray(difficulties, dtype=np.float64)
    if d.ndim != 1 or not len(d) or not np.isfinite(d).all() or k < 1:
        raise InvalidInputError("A grid needs finite difficulties, one a row, and at least one threshold.")
    quantiles = np.quantile(d, np.arange(1, k) / k) if k > 1 else np.array([])
    return [*(float(q) for q in np.unique(quantiles) if q < 100), 100.0]


def one_step_grid(difficulty: Any, rows: Sequence[LabelRow], k: int = 60) -> list[tuple[float, float | None]]:
    """Pairs (tau, give_up) to try, the safest first, found on labelled **validation** rows.

    Of all pairs of quantiles those are kept that lose least among the pairs that save as many tokens; at most ``k``
    of these, evenly by the tokens that they save.

    Args:
        difficulty: ``[n]`` of validation rows.
        rows: the validation rows.
        k: how many at most.
    """
    best = best_pairs(difficulty, Modes.of(rows), 2 * k)
    tokens = np.array([pair.tokens for pair in best])
    spread = np.linspace(tokens[-1], tokens[0], k)
    picked = dict.fromkeys(int(np.abs(tokens - at).argmin()) for at in spread)
    return [(best[i].tau, best[i].give_up) for i in picked]


class ThresholdPair(NamedTuple):
    """What a one-step policy of two thresholds does on labelled rows.

    Attributes:
        tokens: mean of an answer.
        lost: accuracy of always slow minus the policy's, in [-1, 1].
        tau: difficulty above which it thinks.
        give_up: difficulty above which it no longer thinks; None if there is none.
    """

    tokens: float
    lost: float
    tau: float
    give_up: float | None


def best_pairs(difficulty: Any, modes: Modes, k: int) -> list[ThresholdPair]:
    """The pairs of quantiles that lose least among those that save as many tokens, the boldest first.

    Args:
        difficulty: ``[n]`` in [0, 100].
        modes: what each mode got for the same rows.
        k: thresholds to try.
    """
    d = np.asarray(difficulty, dtype=np.float64)
    ends = [None, *(float(q) for q in np.unique(np.quantile(d, [0.7, 0.8, 0.85, 0.9, 0.95, 0.98])))]
    found: list[ThresholdPair] = []
    for tau in quantile_thresholds(d, k):
        for give_up in ends:
            if give_up is None or give_up > tau:
                c = modes.chosen(slow_rows(d, tau, give_up))
                found.append(ThresholdPair(c.mean_tokens, modes.slow.accuracy - c.accuracy, tau, give_up))
    best: list[ThresholdPair] = []
    for pair in sorted(found, key=lambda f: (*f[:3], f.give_up is not None)):  # fewest tokens first
        if not best or pair.lost < best[-1].lost:
            best.append(pair)
    return best


def two_step_grid(difficulty: Any, rows: Sequence[LabelRow], k: int = 6) -> list[dict[str, Any]]:
    """Settings of two-step policies to try, the safest first, from labelled **validation** rows.

    The start is that of :func:`one_step_grid`; with it, from the safest to the boldest, thoughts are closed more
    readily (``tau_fast`` 5 to 50) and opened in mid-answer less readily (``tau_slow`` 50 to 90).

    Args:
        difficulty: ``[n]`` of validation rows.
        rows: the validation rows.
        k: how many at most.
    """
    pairs = one_step_grid(difficulty, rows, k)
    bold = np.linspace(0, 1, len(pairs)) if len(pairs) > 1 else np.array([0.5])
    return [
        {"tau": tau, "give_up": give_up, "tau_fast": float(5 + 45 * b), "tau_slow": float(50 + 40 * b)}
        for (tau, give_up), b in zip(pairs, bold, strict=True)
    ]


def run_candidate(
    router: Router,
    rows: Sequence[LabelRow],
    meta: LabelMeta,
    *,
    checkers: Mapping[str, Checker] | None = None,
    chunk: int = 128,
    progress: bool | None = None,
) -> Candidate:
    """A policy run on the questions of labelled rows: what a two-step policy does can't be told from the labels.

    Args:
        router: with the policy.
        rows: labelled rows.
        meta: their header: prompt, temperature, seed, and the limit of tokens (the larger of both modes').
        checkers: as for labelling.
        chunk: questions that are answered together.
        progress: whether to show a bar; by default on a terminal.

    Returns:
        ``slow`` is 1 where there was a thought at any time.
    """
    from kvroute.checkers import check
    from kvroute.progress import progress_bar

    chat = bool(getattr(router.engine.tokenizer, "chat_template", None))
    right, tokens, slow = np.zeros(len(rows)), np.zeros(len(rows)), np.zeros(len(rows))
    with progress_bar(router.policy.kind, len(rows), show=progress) as advance:
        for start in range(0, len(rows), chunk):
            part = rows[start : start + chunk]
            texts = [meta.prompt.replace("{question}", row.question) for row in part]
            prompts: list[Any] = [[{"role": "user", "content": t}] for t in texts] if chat else list(texts)
            found = router.generate(
                prompts,
                max_tokens=max(meta.max_tokens.values()),
                temperature=meta.temperature,
                seed=meta.seed if meta.temperature > 0 else None,
                progress=False,
            )
            for i, (row, routed) in enumerate(zip(part, found, strict=True), start):
                if routed.decision.fault is not None:
                    raise InvalidInputError(f"Question {row.id!r} could not be routed: {routed.decision.fault}.")
                switch = routed.decision.switch
                right[i] = check(routed.answer, row.answer, row.answer_type, checkers=checkers or {}).correct
                tokens[i] = len(routed.generation.token_ids)
                slow[i] = routed.decision.mode == "slow" or (switch is not None and switch.to == "slow")
            advance(len(part))
    return Candidate(right, tokens, slow, router.policy.model_dump(mode="json", exclude={"guarantee", "drift"}))
