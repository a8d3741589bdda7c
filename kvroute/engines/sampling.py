"""The next token, from logits."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from kvroute.generation import SamplingOptions


class Sampler:
    """Chooses tokens for the prompts of one batch. Each prompt draws from a random stream of its own.

    Args:
        options: how.
        streams: by prompt a number that, with a seed, fixes its random stream: see :func:`random_streams`.
        repetition_penalty: 1 for none.
    """

    def __init__(self, options: SamplingOptions, streams: Sequence[int], repetition_penalty: float) -> None:
        self.options = options
        self.penalty = repetition_penalty
        self._generators: list[torch.Generator] = []
        if options.temperature > 0:
            for stream in streams:
                generator = torch.Generator()
                if options.seed is None:
                    generator.seed()
                else:
                    generator.manual_seed((options.seed * 1_000_003 + stream) % 2**63)
                self._generators.append(generator)

    def choose(self, logits: Tensor, rows: Sequence[int], contexts: Sequence[Sequence[int]]) -> list[int]:
        """Next tokens.

        Args:
            logits: ``[R, vocab]`` float32.
            rows: which prompts of the batch.
            contexts: their tokens so far, prompt included.
        """
        if self.penalty != 1.0:
            logits = self._penalised(logits, contexts)
        if self.options.temperature == 0:
            return [int(t) for t in logits.argmax(dim=-1)]
        probabilities = torch.softmax(logits / self.options.temperature, dim=-1)
        ordered, tokens = probabilities.sort(dim=-1, descending=True, stable=True)
        below = ordered.cumsum(dim=-1)
        if self.options.top_p < 1:
            ordered = ordered.masked_fill(below - ordered >= self.options.top_p, 0.0)
            below = ordered.cumsum(dim=-1)
        draws = torch.stack([torch.rand((), generator=self._generators[r]) for r in rows]).to(logits.device)
        point = draws[:, None] * below[:, -1:]
        place = torch.searchsorted(below, point, right=True).clamp_max(below.shape[1] - 1)
        # A draw that rounds up to the total must not pick a token of probability 0.
        # Where the logits are NaN nothing has a probability; the answer goes on, as a greedy one does.
        place = torch.minimum(place, (ordered > 0).sum(dim=-1, keepdim=True) - 1).clamp_min(0)
        return [int(t) for t in tokens.gather(1, place)[:, 0]]

    def _penalised(self, logits: Tensor, contexts: Sequence[Sequence[int]]) -> Tensor:
        logits = logits.clone()
        for row, context in enumerate(contexts):
            seen = torch.tensor(sorted(set(context)), device=logits.device)
            score = logits[row, seen]
            logits[row, seen] = torch.where(score < 0, score * self.penalty, score / self.penalty)
        return logits


def random_streams(prompts: Sequence[Sequence[int]]) -> list[int]:
    """A number for each prompt that depends on its tokens, and on how many equal prompts come before it.

    So an answer with a seed does not depend on the other prompts, their order or the batches, and prompts that are
    asked several times over get different answers.
    """
    seen: dict[bytes, int] = {}
    streams = []
    for prompt in prompts:
        digest = hashlib.sha256(",".join(map(str, prompt)).encode()).digest()[:7]
        streams.append(int.from_bytes(digest) + seen.get(digest, 0))
        seen[digest] = seen.get(digest, 0) + 1
    return streams


def end_tokens(model: Any, tokenizer: Any) -> frozenset[int]:
    """Tokens that end an answer, as ``model.generate`` has them, else the tokenizer's."""
    configured = getattr(getattr(model, "generation_config", None), "eos_token_id", None)
    if configured is None:
        configured = getattr(tokenizer, "eos_token_id", None)
    if configured is None:
        return frozenset()
    return frozenset([configured] if isinstance(configured, int) else configured)
