"""Answers of a model in both modes to rows of several sets, and what it holds of their prompts; kept in a folder."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from _questions import question_set
from kvroute import TransformersEngine
from kvroute.files import read_tensors, write_tensors
from kvroute.heads.features import Reach, SumStore
from kvroute.heads.search import layer_sets
from kvroute.label_files import write_labels
from kvroute.label_rows import LabelRow, meta_path, read_labels, usable
from kvroute.labelling import Labeller
from kvroute.pooling import PRESETS, PoolingSpec
from kvroute.progress import progress_bar
from kvroute.questions import Question
from kvroute.routing_baselines import minilm_vectors
from kvroute.thinking import ThinkingMode
from kvroute_kernels import paged_pool


@dataclass(frozen=True)
class TwoWays:
    """How a set is asked in both modes.

    Attributes:
        thinking: what makes the model answer at once, or step by step.
        limits: tokens of an answer at most, by mode.
    """

    thinking: ThinkingMode
    limits: dict[str, int]

    @classmethod
    def expressions(cls, slow: int, fast: int = 16) -> TwoWays:
        """For an answer that is a number or an expression: kvroute's own pair of instructions."""
        return cls(ThinkingMode.instructions(), {"fast": fast, "slow": slow})

    @classmethod
    def choices(cls) -> TwoWays:
        """For a letter among choices."""
        thinking = ThinkingMode.instructions(
            fast="\nAnswer at once, without any explanation. Write (<letter>) alone.",
            slow="\nThink step by step in short sentences, without code, then end with: The answer is (<letter>).",
        )
        return cls(thinking, {"fast": 16, "slow": 112})


SETS = {
    "multiarith": TwoWays.expressions(224),
    "svamp": TwoWays.expressions(224),
    "gsm8k": TwoWays.expressions(256),
    "math": TwoWays.expressions(320, fast=32),
    "arc_easy": TwoWays.choices(),
    "commonsenseqa": TwoWays.choices(),
}
_KIND = "kvroute.benchmark-prompts"
_REACHES: tuple[Reach, ...] = (("all", None), ("last", None), ("window", 64))
_CHUNK = 64


def questions(folder: Path, name: str, count: int) -> list[Question]:
    """The first rows of a set in the order of a hash of their ids, which no one chose."""
    rows = question_set(folder, name)
    return sorted(rows, key=lambda q: hashlib.sha256(f"order:{q.id}".encode()).hexdigest())[:count]


def both_answers(
    engine: TransformersEngine, asked: Mapping[str, Sequence[Question]], cache: Path
) -> dict[str, list[LabelRow]]:
    """Both answers to every question, by set; what a former run has written is read."""
    found = {}
    for name, part in asked.items():
        way = SETS[name]
        labeller = Labeller(engine, thinking=way.thinking, max_tokens=way.limits, shares={"test": 1.0})
        meta = labeller.meta(part).model_dump(mode="json") | {"dtype": engine.info.dtype}
        key = hashlib.sha256(json.dumps(meta, sort_keys=True).encode()).hexdigest()[:16]
        path = cache / f"{name}-{key}.jsonl"
        if not (path.is_file() and meta_path(path).is_file()):
            write_labels(labeller, part, path, chunk=_CHUNK)
        found[name] = usable(read_labels(path)[0])
    return found


@dataclass(frozen=True)
class Prompts:
    """What is known of prompts before an answer is begun.

    Attributes:
        store: sums of keys and values over all tokens, the last, and the last 64.
        hidden: ``[n, layers + 1, hidden]`` states of the last token.
        length: ``[n]`` tokens.
        minilm: ``[n, 384]``.
    """

    store: SumStore
    hidden: np.ndarray[Any, Any]
    length: np.ndarray[Any, Any]
    minilm: np.ndarray[Any, Any]

    def candidates(self) -> dict[str, list[tuple[str, np.ndarray[Any, Any]]]]:
        """By feature, the vectors ``[n, dim]`` that are chosen from, each with its name; one where nothing is."""
        store, layers = self.store, len(self.store.layers)
        specs = [
            PoolingSpec(layers=chosen, part=part, heads="concat", tokens=tokens)
            for chosen in layer_sets(store.layers, store.num_layers)
            for part in ("kv", "v", "k")
            for tokens in ("mean", "last")
        ]
        length = np.stack([self.length, np.log(self.length)], axis=1).astype(np.float32)
        states = [(f"layer {i}", self.hidden[:, i]) for i in range(1, layers + 1)]
        return {
            "keys and values": [(_named(s), store.vectors(s)) for s in specs],
            "keys and values, paper's pooling": [("paper-classifier", store.vectors(PRESETS["paper-classifier"]))],
            "question length": [("length", length)],
            "MiniLM": [("minilm", self.minilm)],
            "last hidden state": [states[-1]],
            "hidden state, layer chosen": states,
        }


def _named(spec: PoolingSpec) -> str:
    return f"{spec.part.upper()} {spec.layers}, {spec.tokens}"


def read_prompts(engine: TransformersEngine, rows: Sequence[LabelRow], cache: Path) -> Prompts:
    """One forward a prompt for keys, values and hidden states together; kept in a file."""
    facts = [engine.info.fingerprint, engine.info.dtype, [list(r.prompt_ids) for r in rows]]
    path = cache / f"prompts-{hashlib.sha256(json.dumps(facts).encode()).hexdigest()[:16]}.safetensors"
    layers = SumStore.usable_layers(engine.info, max(len(r.prompt_ids) for r in rows))
    if not path.is_file():
        write_tensors(path, _KIND, _read(engine, rows, layers), {"layers": layers})
    tensors, _ = read_tensors(path, _KIND)
    store = SumStore(layers, engine.info.num_layers)
    for index, reach in enumerate(_REACHES):
        store.keys[reach], store.values[reach] = tensors[f"keys-{index}"], tensors[f"values-{index}"]
        store.counts[reach] = tensors[f"counts-{index}"]
    length = np.array([len(r.prompt_ids) for r in rows], dtype=np.float64)
    return Prompts(store, tensors["hidden"], length, minilm_vectors([r.question for r in rows]))


def _read(
    engine: TransformersEngine, rows: Sequence[LabelRow], layers: Sequence[int]
) -> dict[str, np.ndarray[Any, Any]]:
    heads, key_size, value_size = engine.info.layers[layers[0]].sizes
    n = len(rows)
    out: dict[str, np.ndarray[Any, Any]] = {}
    for index in range(len(_REACHES)):
        out[f"keys-{index}"] = np.empty((n, len(layers), heads, key_size), dtype=np.float32)
        out[f"values-{index}"] = np.empty((n, len(layers), heads, value_size), dtype=np.float32)
        out[f"counts-{index}"] = np.empty(n, dtype=np.float32)
    texts = [list(r.prompt_ids) for r in rows]
    asked = [[*ids, ids[-1]] for ids in texts]  # the last token is not run; the one before it is the prompt's last
    with progress_bar("Reading prompts", n) as advance:
        for batch, reading in engine.read(
            asked, [len(ids) - 1 for ids in texts], want=("kv", "hidden"), layers=layers, progress=False
        ):
            assert reading.view is not None
            assert reading.hidden is not None
            lengths = np.array([len(texts[i]) for i in batch])
            hidden = np.stack([h.float().numpy() for h in reading.hidden])
            out.setdefault("hidden", np.empty((n, *hidden.shape[1:]), dtype=np.float32))[batch] = hidden
            for index, (kind, size) in enumerate(_REACHES):
                width = {"all": lengths, "last": np.ones_like(lengths)}.get(kind, np.minimum(lengths, size or 0))
                sums = paged_pool(
                    reading.view, layers=list(layers), start=(lengths - width).tolist(), stop=lengths.tolist()
                )
                assert sums.keys is not None
                assert sums.values is not None
                out[f"keys-{index}"][batch] = sums.keys.float().cpu().numpy()
                out[f"values-{index}"][batch] = sums.values.float().cpu().numpy()
                out[f"counts-{index}"][batch] = sums.weight.float().cpu().numpy()
            advance(len(batch))
    return out
