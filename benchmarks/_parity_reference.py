"""The other side of ``vllm_parity``: each request's features, read alone by transformers."""

from __future__ import annotations

import copy
import math
from collections.abc import Iterable
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np

import _vllm
from _heads import PAPER, costs_head
from kvroute import TransformersEngine
from kvroute.pooling import PRESETS
from kvroute.serving.asks import Ask

FEATURES: dict[str, Any] = {
    **{f"{of}:{preset}": f"{of}:{preset}" for of in ("prompt", "answer") for preset in PRESETS},
    "answer-newest": {"of": "answer", "layers": "last:2", "tokens": "last", "part": "kv"},
    "answer-first": {"of": "answer", "layers": "last:2", "tokens": "first", "part": "k"},
    "answer-window": {"of": "answer", "layers": "last:3", "window": 7, "weights": "position", "layer_reduce": "last"},
    "prompt-window": {"of": "prompt", "layers": "last:3", "window": 16, "weights": "sif", "part": "k"},
    "kv-coe": "kv-coe",
    "length": "length",
}
Array = np.ndarray[Any, np.dtype[np.float64]]


DRAWS = 24
"""Texts at least from which transformers' own error is known: of a score, one text's may be 0 by chance."""


class Reference:
    """A model in transformers, in an engine's dtype and in float64.

    Args:
        folder: the checkpoint.
        dtype: the engine's.
    """

    def __init__(self, folder: Path, dtype: str) -> None:
        same = TransformersEngine.from_pretrained(str(folder), dtype=dtype, device="cpu")
        exact = TransformersEngine(copy.deepcopy(same.model).double(), same.tokenizer, name=same.info.name)
        self._same, self._exact = _vllm.Alone(same), _vllm.Alone(exact)
        spec = PAPER.model_copy(update={"layers": "last:2"})  # which every model here has
        self.head = replace(costs_head(same, 0, kind="ridge", spec=spec), target="correct")
        self._vectors = {**Ask(features=FEATURES).plan.pooled, "confidence": ("answer", spec)}
        self._read: dict[tuple[tuple[int, ...], tuple[int, ...]], dict[str, Array]] = {}
        self._own: dict[str, float] = {}

    def exact(self, prompt: list[int], answer: list[int]) -> dict[str, Array]:
        """Features of a prompt and its answer in float64."""
        key = (tuple(prompt), tuple(answer))
        if key not in self._read:
            same, exact = self._features(self._same, prompt, answer), self._features(self._exact, prompt, answer)
            for name in exact:
                self._own[name] = max(self._own.get(name, 0.0), away(same[name], exact[name]))
            self._read[key] = exact
        return self._read[key]

    def own(self) -> dict[str, float]:
        """By feature, the largest error in the engine's dtype over all texts that were read. Where these are few, more
        are made of them: without their first tokens each is rounded otherwise."""
        texts = [(prompt, answer) for prompt, answer in self._read if len(prompt) > 4]
        for shift in range(1, max(len(p) for p, _ in texts) - 2):
            for prompt, answer in texts:
                if len(self._read) < DRAWS and len(prompt) - shift > 1:
                    self.exact(list(prompt[shift:]), list(answer))
        return self._own

    def _features(self, engine: _vllm.Alone, prompt: list[int], answer: list[int]) -> dict[str, Array]:
        values = engine.features([*prompt, *answer], len(prompt), self._vectors)
        vector = values.pop("confidence", None)
        if vector is not None:
            x = np.asarray(vector)[None]  # in float64 the head's own sums are, too
            values["confidence"] = self.head.map(self.head.predictor(x)[:, None])[0]
        values["length"] = float(len(answer))
        return {name: np.asarray(value, dtype=np.float64) for name, value in values.items()}


def away(found: Any, exact: Array) -> float:
    """How far a feature lies from the exact one: of a vector relative to its largest entry; of a score as it is."""
    scale = float(np.abs(exact).max()) if exact.ndim else 1.0
    return float(np.abs(np.asarray(found, dtype=np.float64) - exact).max()) / (scale or 1.0)


@dataclass
class Compared:
    """How far the answers of a job lie from the exact ones.

    Attributes:
        answers: compared.
        worst: by feature, vLLM's error.
        absent: features that an answer did not get, with the reason.
        cached: prompt tokens found in the cache.
    """

    answers: int = 0
    worst: dict[str, float] = field(default_factory=dict)
    absent: list[str] = field(default_factory=list)
    cached: int = 0

    def times(self, own: dict[str, float]) -> tuple[float, str]:
        """The largest error as a multiple of transformers' own, and whose it is."""
        half = float(np.finfo(np.float32).eps) / 2  # of a number that is sent
        ratios = [(w / (own[n] or half), n) for n, w in self.worst.items()]
        return max(ratios, default=(math.inf, ""))


def compare(answers: Iterable[dict[str, Any]], reference: Reference) -> Compared:
    """Compare what is said of each answer to the same tokens alone."""
    found = Compared()
    for answer in answers:
        found.cached += answer["cached"]
        for result, tokens in zip(answer["results"], answer["answers"], strict=True):
            found.answers += 1
            exact = reference.exact(answer["prompt"], tokens)
            if result is None or result["error"]:
                found.absent.append("no result" if result is None else result["error"])
                continue
            told = {n: f for f in result["faults"] for n in exact if f.startswith(f"{n}: ")}
            found.absent += told.values()
            got = {**result["features"], **_valued(result["scores"])}
            if result["confidence"]:
                got |= _valued({"confidence": result["confidence"]})
            found.absent += [f"{name}: missing" for name in sorted(set(exact) - set(got) - set(told))]
            for name in set(got) & set(exact):
                found.worst[name] = max(found.worst.get(name, 0.0), away(got[name], exact[name]))
    return found


def _valued(scores: dict[str, Any]) -> dict[str, float]:
    return {name: score["value"] for name, score in scores.items() if score["value"] is not None}
