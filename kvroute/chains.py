"""Chains: ordered vectors whose geometry scores an answer, kept online.

KV-CoE (arXiv 2601.20326) takes Chain-of-Embedding (arXiv 2410.13640) over the KV cache. For a
chain z_0..z_N, with ``M_i = |z_{i+1} - z_i| / |z_N - z_0|`` and
``A_i = angle(z_{i+1}, z_i) / angle(z_N, z_0)``:

    CoE-R = mean(M) - mean(A)
    CoE-C = sqrt(mean(M cos A)^2 + mean(M sin A)^2)

*Token axis*: z_t is the mean over layers of the concatenation over heads of [K; V] at token t.
*Layer axis*: z_l is the mean over tokens of the same at layer l.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from pydantic import field_validator
from torch import Tensor

from kvroute.errors import NonFiniteCacheError, SpecError, WindowedLayerError
from kvroute.pooling import Spec, check_layers, resolve_layers
from kvroute.scores import Score
from kvroute_kernels import (
    ChainTensors,
    KVView,
    KVViewError,
    WindowError,
    angle_between,
    paged_chain_step,
    paged_pool,
)

NOT_FINITE = "the chain holds values that are not finite"
NO_TOKEN = "the chain has no token yet"

_PIECES = 64
"""Small tensors that CoE-C's floats may lie in before they are joined: a tensor costs more than what is in it."""


class ChainSpec(Spec):
    """Which layers the chains of an answer are built from."""

    layers: tuple[int, ...] | float | str = "all"
    """As in :class:`~kvroute.PoolingSpec`."""

    _check_layers = field_validator("layers", mode="before")(check_layers)

    def resolve(self, num_layers: int) -> tuple[int, ...]:
        """The layer indices, ascending, for a model with that many attention layers."""
        return tuple(sorted(resolve_layers(self.layers, num_layers)))


@dataclass(frozen=True, slots=True)
class ChainScores:
    """Both scores of one chain; ``None`` with a reason where the chain has none.

    Attributes:
        r: CoE-R, any real number; higher means more likely right (arXiv 2410.13640).
        c: CoE-C, at least 0; higher means more likely right (arXiv 2410.13640).
    """

    r: Score
    c: Score


def chain_scores(chain: Tensor) -> ChainScores:
    """Scores of a whole chain, offline.

    Args:
        chain: ``[N + 1, F]``, z_0 to z_N.
    """
    z = chain.double()
    if z.shape[0] < 3:
        return no_score(too_short(z.shape[0]))
    if not bool(torch.isfinite(z).all()):
        return no_score(NOT_FINITE)
    magnitudes = torch.linalg.vector_norm(z[1:] - z[:-1], dim=1)
    angles = angle_between(z[1:], z[:-1])
    return scores_of_steps(magnitudes, angles, z[0], z[-1], bool(torch.isnan(angles).any()))


def too_short(count: int) -> str:
    """Why a chain of so few vectors has no score."""
    return f"the chain has {count} vectors, and fewer than 3 have the same score whatever they are"


def no_score(reason: str) -> ChainScores:
    """Neither score, and why."""
    return ChainScores(Score(None, reason), Score(None, reason))


def scores_of_steps(magnitudes: Tensor, angles: Tensor, first: Tensor, last: Tensor, degenerate: bool) -> ChainScores:
    """Scores from the lengths and angles of a chain's N steps, ``[N]`` each, and its ends ``[F]``.

    ``degenerate`` says that a vector of the chain is zero.
    """
    first, last = first.double(), last.double()
    if degenerate:
        return no_score("a vector of the chain is zero, so an angle is undefined")
    span = float(torch.linalg.vector_norm(last - first))
    turn = float(angle_between(last, first))
    if not math.isfinite(span) or not math.isfinite(turn):
        return no_score(NOT_FINITE)
    if span == 0.0:
        return no_score("the chain ends where it began")
    if turn == 0.0:
        return no_score("the chain's ends point the same way, so its angles have no measure")
    m = magnitudes.double() / span
    a = angles.double() / turn
    r = float(m.mean() - a.mean())
    c = float(torch.hypot((m * torch.cos(a)).mean(), (m * torch.sin(a)).mean()))
    if not math.isfinite(r) or not math.isfinite(c):
        return no_score(NOT_FINITE)
    return ChainScores(Score(r), Score(c))


class ChainState:
    """Both chains of B answers, fed token by token or many tokens at a time.

    A sequence's state is flat in length (z_0, the last z, running sums, one sum a layer) but for CoE-C's two
    floats a token, which are summed when read because its normaliser comes last.

    Args:
        num_sequences: B.
        spec: which layers.
        num_layers: attention layers of the model; by default those of the first view or tensors fed.
    """

    def __init__(self, num_sequences: int = 1, spec: ChainSpec | None = None, num_layers: int | None = None) -> None:
        self.spec = spec or ChainSpec()
        self.num_sequences = num_sequences
        self._num_layers = num_layers
        self._layers: tuple[int, ...] | None = None
        self._token: ChainTensors | None = None
        self._layer_sums: Tensor | None = None
        self._steps: list[list[Tensor]] = [[] for _ in range(num_sequences)]

    def __len__(self) -> int:
        """Tokens fed to the first sequence."""
        return 0 if self._token is None else int(self._token.count[0])

    @property
    def nbytes(self) -> tuple[int, int]:
        """Bytes a sequence: (flat in length, the 8 a token that CoE-C keeps, for all tokens so far)."""
        if self._token is None or self._layer_sums is None:
            return 0, 0
        t = self._token
        flat = sum(x.nbytes for x in (t.first, t.last, t.count, t.sum_magnitude, t.sum_angle, t.degenerate))
        steps = sum(s.nbytes for row in self._steps for s in row)
        return (flat + self._layer_sums.nbytes) // self.num_sequences, steps // self.num_sequences

    def update(self, keys: Tensor, values: Tensor) -> None:
        """Feed new tokens of a single answer.

        Args:
            keys: ``[L, n, H, D]`` keys after RoPE of n new tokens in all attention layers; n may be 1.
            values: ``[L, n, H, Dv]``.

        Raises:
            SpecError: wrong shapes, or the state holds several answers.
            NonFiniteCacheError: NaN or infinity.
        """
        if self.num_sequences != 1:
            raise SpecError("update feeds a state of one answer.", hint="Use update_view for several.")
        if keys.ndim != 4 or values.ndim != 4 or keys.shape[:3] != values.shape[:3]:
            raise SpecError(
                f"keys [L, n, H, D] and values [L, n, H, Dv] expected, not {list(keys.shape)}, {list(values.shape)}."
            )
        if keys.shape[1] == 0:
            return
        view = KVView.from_contiguous(keys.transpose(1, 2)[:, None], values.transpose(1, 2)[:, None], [keys.shape[1]])
        self.update_view(view, [0], [0], [int(keys.shape[1])], position=len(self))

    def update_view(
        self,
        view: KVView,
        rows: Sequence[int],
        start: Sequence[int],
        stop: Sequence[int],
        *,
        position: int | None = None,
    ) -> None:
        """Feed tokens ``start..stop`` of a view's sequences to the answers ``rows``.

        Args:
            view: the cache; sequence i feeds answer ``rows[i]``.
            rows: which answers, one for each sequence of the view.
            start: first new token of each sequence.
            stop: one past the last; equal to start where there is nothing new.
            position: for error messages, the place of the first token where it is not ``start``.

        Raises:
            NonFiniteCacheError: NaN or infinity in the new tokens, with layer and position.
            WindowedLayerError: a layer with a window holds the tokens no more.
        """
        if not rows:
            return
        if self._layers is None:
            self._layers = self.spec.resolve(self._num_layers or len(view.layers))
        layers = self._layers
        try:  # before the states are touched
            sums = paged_pool(view, layers=layers, start=start, stop=stop)
        except WindowError as error:
            raise WindowedLayerError(str(error), hint="Feed the chains while the tokens are still held.") from error
        except KVViewError as error:
            raise SpecError(str(error)) from error
        assert sums.keys is not None
        assert sums.values is not None
        by_layer = torch.cat([sums.keys.flatten(2), sums.values.flatten(2)], dim=2)
        if not bool(torch.isfinite(by_layer).all()):
            fault = view.find_non_finite(layers)
            if fault is not None:
                shift = 0 if position is None else position - start[fault.sequence]
                raise NonFiniteCacheError(rows[fault.sequence], fault.layer, fault.position + shift, fault.part)
        size, held = by_layer[0, 0].numel(), None if self._token is None else self._token.first.shape[1]
        if held is not None and size != held:
            raise SpecError(f"The chain's vectors have {held} numbers, and these tokens make {size}.")
        device = by_layer.device
        if self._token is None or self._layer_sums is None:
            self._token = ChainTensors.empty(self.num_sequences, size, device)
            self._layer_sums = torch.zeros(self.num_sequences, *by_layer.shape[1:], dtype=torch.float64, device=device)
        index = torch.tensor(list(rows), dtype=torch.int64, device=device)
        fresh = (self._token.count[index] == 0).tolist()
        steps = paged_chain_step(view, self._token, rows, start, stop, layers)
        self._layer_sums[index] += by_layer.double()
        pairs = torch.stack([steps.magnitudes, steps.angles]).cpu()
        for row, new, pair in zip(rows, fresh, torch.split(pairs, steps.counts, dim=1), strict=True):
            if pair.shape[1] > new:
                self._steps[row].append(pair[:, 1:].clone() if new else pair.clone())
                if len(self._steps[row]) == _PIECES:
                    self._steps[row] = [torch.cat(self._steps[row], dim=1)]

    def token_scores(self, sequence: int = 0) -> ChainScores:
        """Scores of the token-axis chain so far."""
        count = 0 if self._token is None else int(self._token.count[sequence])
        if count < 3:
            return no_score(too_short(count))
        assert self._token is not None
        steps = self._steps[sequence]
        if len(steps) > 1:  # one tensor from here on
            steps[:] = [torch.cat(steps, dim=1)]
        return scores_of_steps(
            steps[0][0],
            steps[0][1],
            self._token.first[sequence].cpu(),
            self._token.last[sequence].cpu(),
            bool(self._token.degenerate[sequence]),
        )

    def layer_scores(self, sequence: int = 0) -> ChainScores:
        """Scores of the layer-axis chain so far."""
        count = 0 if self._token is None else int(self._token.count[sequence])
        if count == 0:
            return no_score(NO_TOKEN)
        assert self._layer_sums is not None
        return chain_scores(self._layer_sums[sequence].cpu() / count)

    def scores(self, sequence: int = 0) -> dict[str, Score]:
        """All four scores by their names in :data:`kvroute.SCORES`."""
        return named_scores(self.token_scores(sequence), self.layer_scores(sequence))


def named_scores(token: ChainScores, layer: ChainScores) -> dict[str, Score]:
    """The scores of both chains by their names in :data:`kvroute.SCORES`."""
    return {
        "kv_coe_r_token": token.r,
        "kv_coe_c_token": token.c,
        "kv_coe_r_layer": layer.r,
        "kv_coe_c_layer": layer.c,
    }
