"""Features of a batch that is being written: pooled vectors, chains, logit sums; their faults cost no answer."""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Sequence
from typing import Any, Protocol

import numpy as np
import torch
from torch import Tensor

from kvroute.chains import ChainState
from kvroute.errors import fault_text
from kvroute.features import FeaturePlan
from kvroute.pooling import PoolingSpec, pool
from kvroute.scores import Score, family, logit_scores
from kvroute_kernels import KVView

logger = logging.getLogger(__name__)

Vectors = np.ndarray[Any, np.dtype[np.float32]]


class WrittenRow(Protocol):
    """A row's tokens."""

    prompt: list[int]
    tokens: list[int]


class ReadSession(Protocol):
    """What features are read from."""

    @property
    def rows(self) -> Sequence[WrittenRow]:
        """Prompts and answers."""
        ...

    def view(self, rows: Sequence[int]) -> KVView:
        """The cache of some rows."""
        ...

    def written(self, row: int) -> int:
        """Tokens of an answer in the cache that belong to features."""
        ...


class SessionFeatures:
    """What a plan asks of a batch.

    Args:
        session: the batch; its rows do not change in number.
        plan: features to compute.
        num_layers: attention layers of the model.
        sif_weights: SIF weight of every token for an ``a``, for pooled features that need them.

    Attributes:
        pooled: by row the vectors, by name.
        errors: by row why a feature is missing, by name.
        seconds: spent here.
    """

    def __init__(
        self,
        session: ReadSession,
        plan: FeaturePlan,
        num_layers: int,
        sif_weights: Callable[[float], Tensor] | None,
    ) -> None:
        count = len(session.rows)
        self._session, self._plan, self._num_layers, self._sif_weights = session, plan, num_layers, sif_weights
        self._chain = ChainState(count, plan.chain, num_layers) if plan.chain else None
        self._fed = [0] * count  # answer tokens whose keys and values the chains have
        self._noted = [0] * count  # tokens that were chosen, not forced: those of the logit sums
        self._logit_sums: list[Tensor | None] = [None] * count
        self.pooled: list[dict[str, Vectors]] = [{} for _ in session.rows]
        self.errors: list[dict[str, str]] = [{} for _ in session.rows]
        self.seconds = 0.0

    def scores(self, r: int) -> dict[str, Score]:
        """Those of a row that has ended."""
        scores: dict[str, Score] = {}
        if self._chain is not None:
            if "kv-coe" in self.errors[r]:
                scores.update({n: Score(None, self.errors[r]["kv-coe"]) for n in family("kv-coe")})
            else:
                scores.update(self._chain.scores(r))
        if self._plan.logits:
            sums = self._logit_sums[r]
            if sums is None or "logits" in self.errors[r]:
                reason = self.errors[r].get("logits", "the answer has no token")
                scores.update({n: Score(None, reason) for n in family("logits")})
            else:
                scores.update(logit_scores((sums / self._noted[r]).tolist()))
        if self._plan.length:
            scores["length"] = Score(float(len(self._session.rows[r].tokens)))
        return scores

    def not_begun(self, r: int) -> None:
        """The work on a row was cancelled before its prompt was run."""
        self.errors[r] = dict.fromkeys(self._plan.pooled, "The work was cancelled before it began.")

    # ------------------------------------------------------------------ reading

    def read_prompts(self) -> None:
        """The prompts have been run: their vectors."""
        rows = self._session.rows
        for name, (of, spec) in self._plan.pooled.items():
            if of == "prompt":

                def work(some: list[int], name: str = name, spec: PoolingSpec = spec) -> None:
                    self._pool(name, spec, some, [0] * len(some), [len(rows[r].prompt) for r in some])

                self._guard(range(len(rows)), name, work)

    def close(self, ended: list[int]) -> None:
        """Answers that have just ended: what is left to read of them, while their keys and values are there."""
        self.feed_chains(ended)
        empty = [r for r in ended if self._session.written(r) == 0]
        full = [r for r in ended if self._session.written(r) > 0]
        for name, (of, spec) in self._plan.pooled.items():
            if of != "answer":
                continue
            for r in empty:
                self.errors[r][name] = "The answer has no token with keys and values."
            if full:

                def work(some: list[int], name: str = name, spec: PoolingSpec = spec) -> None:
                    start = [len(self._session.rows[r].prompt) for r in some]
                    stop = [s + self._session.written(r) for s, r in zip(start, some, strict=True)]
                    self._pool(name, spec, some, start, stop)

                self._guard(full, name, work)

    def feed_chains(self, rows: Sequence[int]) -> None:
        """Give the chains the tokens that came since the last time."""
        chain = self._chain
        due = [r for r in rows if self._fed[r] < self._session.written(r) and "kv-coe" not in self.errors[r]]
        if chain is None or not due:
            return

        def work(some: list[int]) -> None:
            prompts = [len(self._session.rows[r].prompt) for r in some]
            start = [n + self._fed[r] for n, r in zip(prompts, some, strict=True)]
            stop = [n + self._session.written(r) for n, r in zip(prompts, some, strict=True)]
            chain.update_view(self._session.view(some), some, start, stop)
            for r, n, s in zip(some, prompts, stop, strict=True):
                self._fed[r] = s - n

        self._guard(due, "kv-coe", work)

    def note_logits(self, logits: Tensor, due: Sequence[int], tokens: Sequence[int]) -> None:
        """Add up what the logit scores are made of.

        Args:
            logits: ``[due, vocab]``.
            due: rows that a token was chosen for.
            tokens: those tokens.
        """
        if not self._plan.logits:
            return
        place = {r: i for i, r in enumerate(due)}
        for r in due:
            self._noted[r] += 1

        def work(some: list[int]) -> None:
            index = torch.tensor([place[r] for r in some], device=logits.device)
            logprobs = torch.log_softmax(logits if len(some) == len(place) else logits[index], dim=-1)
            taken = torch.tensor(tokens, device=logits.device)[index]
            noted = logit_statistics(logprobs, logprobs.gather(1, taken[:, None])[:, 0]).double().cpu()
            for r, statistics in zip(some, noted, strict=True):
                sums = self._logit_sums[r]
                self._logit_sums[r] = statistics if sums is None else sums + statistics

        self._guard(due, "logits", work)

    def pool_rows(self, rows: Sequence[int], spec: PoolingSpec, start: list[int], stop: list[int]) -> Vectors:
        """Pooled vectors ``[rows, dim]`` of spans of some rows."""
        weights = None
        if spec.weights == "sif" and self._sif_weights is not None:
            table = self._sif_weights(spec.sif_a)
            ids = [self._session.rows[r].prompt + self._session.rows[r].tokens for r in rows]
            weights = [table[torch.tensor(i, device=table.device)] for i in ids]
        view = self._session.view(rows)
        vectors = pool(view, spec, num_layers=self._num_layers, start=start, stop=stop, sif_weights=weights)
        return vectors.float().cpu().numpy()

    # ------------------------------------------------------------------ parts

    def _pool(self, name: str, spec: PoolingSpec, rows: list[int], start: list[int], stop: list[int]) -> None:
        for r, vector in zip(rows, self.pool_rows(rows, spec, start, stop), strict=True):
            self.pooled[r][name] = vector

    def _guard(self, rows: Sequence[int], name: str, work: Callable[[list[int]], None]) -> None:
        """Run feature work on some rows: a fault is noted and costs neither an answer nor its neighbours' features."""
        began = time.perf_counter()
        try:
            work(list(rows))
        except Exception as error:  # noqa: BLE001 - an answer is worth more than its features
            if len(rows) > 1:
                for r in rows:
                    self._guard([r], name, work)
                return
            message = fault_text(error)
            logger.warning("The feature %r is missing: %s", name, message)
            self.errors[rows[0]].setdefault(name, message)
        self.seconds += time.perf_counter() - began


def logit_statistics(logprobs: Tensor, chosen: Tensor) -> Tensor:
    """Per position: log-probability of the chosen token, entropy in nats, probability of the likeliest token.

    Args:
        logprobs: ``[n, vocab]``.
        chosen: ``[n]``, log-probability of the token that was taken.

    Returns:
        ``[n, 3]``, in the order of ``family("logits")``.
    """
    probabilities = logprobs.exp()
    entropy = torch.special.entr(probabilities).sum(dim=-1)
    return torch.stack([chosen, entropy, probabilities.amax(dim=-1)], dim=1)
