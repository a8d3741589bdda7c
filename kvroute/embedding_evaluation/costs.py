"""What a vector costs: time of the forward pass a text, as deep as the vector needs."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING

import torch

from kvroute.embedding_evaluation.candidates import Way
from kvroute.embedding_evaluation.states import FORMS
from kvroute.engines.reading import run_decoder
from kvroute.engines.slab import SlabCache

if TYPE_CHECKING:
    from kvroute.engines.transformers_engine import TransformersEngine


class Costs:
    """Times of forward passes, each measured once.

    Args:
        engine: the model.
        texts: what to run; the shorter ones of a measurement, in batches under the engine's token budget.
        rounds: the median over so many is taken.
    """

    def __init__(self, engine: TransformersEngine, texts: Sequence[str], rounds: int = 3) -> None:
        self.engine, self.texts, self.rounds = engine, list(texts), rounds
        self._known: dict[tuple[int, bool, str], float] = {}

    def milliseconds(self, way: Way) -> float:
        """A text's share of the forward pass, up to the deepest layer that is read. A hidden state is left as early as
        keys and values are, so that both are had at their best."""
        layers = self.engine.info.num_layers
        hidden = any(m.side == "hidden" for m in way.pieces())
        # Hidden state m is what attention layer m is given: its keys and values come right behind it.
        stop = min(way.depth + (1 if hidden else 0), layers)
        whole = hidden and way.depth == layers
        form = way.form
        if (stop, whole, form) not in self._known:
            self._known[stop, whole, form] = self._measured(stop, whole, form)
        return self._known[stop, whole, form]

    def _measured(self, stop: int, whole: bool, form: str) -> float:
        shape = FORMS[form]
        again = "" if shape.between is None else "{text}" + shape.between
        ids = self.engine.tokenize_texts(
            [shape.before + again.replace("{text}", t) + t + shape.after for t in self.texts]
        )
        ids = [listed[: self.engine.info.context] for listed in ids]

        def run() -> None:
            if whole:
                self._decoder(ids)
            else:
                for _ in self.engine.prefill(ids, layers=[stop - 1], progress=False):
                    pass

        return 1000 * median_seconds(run, self.rounds) / max(len(ids), 1)

    @torch.inference_mode()
    def _decoder(self, ids: Sequence[Sequence[int]]) -> None:
        from kvroute.engines.batching import plan_batches

        for batch in plan_batches([len(i) for i in ids], self.engine.token_budget):
            chosen = [ids[i] for i in batch]
            cache = SlabCache(self.engine.model.config, keep=frozenset(), capacity=1)
            run_decoder(self.engine.model, chosen, cache)


def median_seconds(run: Callable[[], object], rounds: int = 3) -> float:
    """Median time of some runs, after one that is not counted."""
    run()
    taken = []
    for _ in range(rounds):
        began = time.perf_counter()
        run()
        taken.append(time.perf_counter() - began)
    return statistics.median(taken)
