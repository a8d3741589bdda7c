"""The scores of an answer, by name: what each one is, its range, its direction and its source.

A score is an *uncalibrated* number; :mod:`kvroute.calibration` turns scores into a confidence.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal


@dataclass(frozen=True, slots=True)
class Score:
    """One score of one answer: a finite value, or None and the reason why there is none."""

    value: float | None
    reason: str | None = None

    def __post_init__(self) -> None:
        if (self.value is None) == (self.reason is None):
            raise ValueError("A score has a value or a reason why it has none, one of the two.")
        if self.value is not None and not math.isfinite(self.value):
            raise ValueError(f"A score is finite, not {self.value}.")


@dataclass(frozen=True, slots=True)
class ScoreInfo:
    """What a score means.

    Attributes:
        name: its key wherever scores are given.
        family: what it is computed from; scores of a family come together.
        low: smallest possible value.
        high: largest possible value.
        direction: ``higher`` if its source says that a higher value means more likely right. What holds on a given
            model is measured, not assumed: a calibrator finds the direction from labelled answers.
        what: one line.
        source: paper and section.
    """

    name: str
    family: Literal["kv-coe", "logits", "p-true", "length", "hidden-coe"]
    low: float
    high: float
    direction: Literal["higher", "lower"]
    what: str
    source: str


_INF = math.inf
_KV = "arXiv 2601.20326 (KV-CoE), formula of arXiv 2410.13640, section 3"
_COE = "arXiv 2410.13640, section 3"

SCORES: dict[str, ScoreInfo] = {
    s.name: s
    for s in (
        ScoreInfo(
            "kv_coe_r_token", "kv-coe", -_INF, _INF, "higher", "CoE-R of the keys and values, token by token", _KV
        ),
        ScoreInfo("kv_coe_c_token", "kv-coe", 0.0, _INF, "higher", "CoE-C of the keys and values, token by token", _KV),
        ScoreInfo(
            "kv_coe_r_layer", "kv-coe", -_INF, _INF, "higher", "CoE-R of the keys and values, layer by layer", _KV
        ),
        ScoreInfo("kv_coe_c_layer", "kv-coe", 0.0, _INF, "higher", "CoE-C of the keys and values, layer by layer", _KV),
        ScoreInfo(
            "mean_logprob",
            "logits",
            -_INF,
            0.0,
            "higher",
            "mean log-probability of the answer's tokens",
            "arXiv 2410.13640, section 4 (baseline: perplexity)",
        ),
        ScoreInfo(
            "entropy",
            "logits",
            0.0,
            _INF,
            "lower",
            "mean entropy of the next-token distribution, in nats",
            "arXiv 2410.13640, section 4 (baseline: entropy)",
        ),
        ScoreInfo(
            "max_probability",
            "logits",
            0.0,
            1.0,
            "higher",
            "mean probability of the likeliest next token",
            "arXiv 2410.13640, section 4 (baseline: maximum softmax probability)",
        ),
        ScoreInfo(
            "p_true",
            "p-true",
            0.0,
            1.0,
            "higher",
            "probability that the model, asked whether the answer is true, says A (true) and not B (false)",
            "arXiv 2207.05221, section 3 (P(True))",
        ),
        ScoreInfo("length", "length", 0.0, _INF, "lower", "tokens of the answer", "cheap baseline"),
        ScoreInfo(
            "hidden_coe_r", "hidden-coe", -_INF, _INF, "higher", "CoE-R of the hidden states, layer by layer", _COE
        ),
        ScoreInfo(
            "hidden_coe_c", "hidden-coe", 0.0, _INF, "higher", "CoE-C of the hidden states, layer by layer", _COE
        ),
    )
}
"""Every score kvroute knows, by name."""


def family(name: str) -> tuple[str, ...]:
    """Names of the scores of a family."""
    return tuple(s.name for s in SCORES.values() if s.family == name)


COMBINATIONS: dict[str, tuple[str, ...]] = {
    "logits combined": family("logits"),
    "kv-coe combined": family("kv-coe"),
    "all combined": tuple(SCORES),
}
"""Scores that a logistic map puts together, wherever scores are judged."""


def logit_scores(means: Sequence[float]) -> dict[str, Score]:
    """The scores of the family ``logits``.

    Args:
        means: means over the answer's tokens of log-probability, entropy and largest probability.
    """
    reason = "the model's logits are not finite"
    return {
        name: Score(mean) if math.isfinite(mean) else Score(None, reason)
        for name, mean in zip(family("logits"), means, strict=True)
    }
