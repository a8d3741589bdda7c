"""A small trained projection of embeddings: texts that belong together are drawn near, others of the batch away.

The loss is InfoNCE with the other pairs of a batch as negatives (van den Oord, Li, Vinyals, arXiv 1807.03748; Henderson
et al., arXiv 1705.00652), both ways. The map is linear, so it is saved and applied as any post-processing: vectors are
whitened, then multiplied by a matrix that starts as the identity and is held near it. How strongly, and for how many
epochs, is chosen on pairs that are held out. Minutes on two cores; the model itself is not touched.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from kvroute.errors import InvalidInputError
from kvroute.postprocess import PostProcessor
from kvroute.progress import progress_bar

PENALTIES = (0.03, 0.1, 0.3)
"""Weights of the mean squared distance of the matrix's columns from where they start."""
TEMPERATURE = 0.05
_PATIENCE = 2
_HELD = 0.07
"""Share of the texts, by a hash of them, whose pairs are held out."""


class TextPair(NamedTuple):
    """Two texts that belong together.

    Attributes:
        a, b: the texts.
        group: pairs of one group (a label, say) are no negatives of each other.
        source: batches hold pairs of one source, so that a source can't be told by its style alone.
    """

    a: str
    b: str
    group: str | None = None
    source: str = ""


class Rows(NamedTuple):
    """Pairs as rows of a matrix of vectors.

    Attributes:
        a, b: ``[n]`` int64, rows.
        group: ``[n]`` int64, -1 for none.
        source: ``[n]`` int64.
    """

    a: Tensor
    b: Tensor
    group: Tensor
    source: Tensor


def split_pairs(pairs: Sequence[TextPair]) -> tuple[list[TextPair], list[TextPair]]:
    """Pairs to train on and pairs to choose on, each of which has a text that is in no pair to train on.

    Raises:
        InvalidInputError: too few pairs for both.
    """
    texts = sorted({t for p in pairs for t in (p.a, p.b)}, key=_digest)
    held_texts = set(texts[: max(round(_HELD * len(texts)), 1)])
    train = [p for p in pairs if p.a not in held_texts and p.b not in held_texts]
    held = [p for p in pairs if p.a in held_texts or p.b in held_texts]
    if len(train) < 8 or len(held) < 2:
        raise InvalidInputError(
            f"{len(pairs)} pairs are too few to train a projection.", hint="Give some hundreds at least."
        )
    return train, held


def _digest(text: str) -> str:
    return hashlib.sha256(f"held:{text}".encode()).hexdigest()


def fit_projection(
    vectors: np.ndarray[Any, Any],
    texts: Sequence[str],
    pairs: Sequence[TextPair],
    *,
    dimension: int | None = None,
    blocks: Sequence[int] | None = None,
    epochs: int = 30,
    batch: int = 128,
    seed: int = 0,
    progress: bool | None = None,
) -> PostProcessor:
    """Train a projection on pairs of texts.

    Args:
        vectors: ``[n, dim]``, pooled vectors of the texts, finite.
        texts: ``[n]``, unique; all texts of the pairs are among them. Others only serve the whitening.
        pairs: what belongs together; some hundreds at least.
        dimension: of the vectors it gives; by default 256, or as many as the vectors allow.
        blocks: sizes of the parts that lie side by side in a vector, see :meth:`PostProcessor.fit`.
        epochs: at most; it ends earlier where the pairs that are held out gain nothing.
        batch: pairs at once.
        seed: of the order.
        progress: whether to show a bar; by default on a terminal.

    Returns:
        post-processing of the method ``contrastive``; its facts say how many pairs it was trained on, and the loss on
        those held out before and after.

    Raises:
        InvalidInputError: too few pairs or texts, a text that has no vector, or vectors that are not finite.
    """
    train, held = split_pairs(pairs)
    place = {t: i for i, t in enumerate(texts)}
    unknown = next((t for p in pairs for t in (p.a, p.b) if t not in place), None)
    if unknown is not None:
        raise InvalidInputError(f"A pair's text has no vector: {unknown!r}.")
    known = np.asarray(vectors)
    trained = {t for p in train for t in (p.a, p.b)}
    held_rows = {place[t] for p in held for t in (p.a, p.b) if t not in trained}
    fitted_on = np.array([i for i in range(len(known)) if i not in held_rows], dtype=int)
    whitening = PostProcessor.fit(known[fitted_on], "whiten", 2 * (dimension or 256), blocks=blocks, fewer=True)
    assert whitening.components is not None
    size = min(dimension or 256, whitening.dimension)
    if dimension is not None and size < dimension:
        raise InvalidInputError(f"{len(known)} texts allow {size} dimensions, and {dimension} were asked for.")
    x = torch.from_numpy(whitening.transform(known))
    matrix, facts = _train(x, _rows(train, place), _rows(held, place), size, epochs, batch, seed, progress)
    return PostProcessor(
        "contrastive",
        whitening.mean,
        components=whitening.components @ matrix.numpy(),
        fitted_on=len(fitted_on),
        facts={"pairs": len(train), "pairs_held_out": len(held), **facts},
    )


def _rows(pairs: Sequence[TextPair], place: dict[str, int]) -> Rows:
    groups = {g: i for i, g in enumerate(dict.fromkeys(p.group for p in pairs if p.group is not None))}
    sources = {s: i for i, s in enumerate(dict.fromkeys(p.source for p in pairs))}
    return Rows(
        torch.tensor([place[p.a] for p in pairs]),
        torch.tensor([place[p.b] for p in pairs]),
        torch.tensor([-1 if p.group is None else groups[p.group] for p in pairs]),
        torch.tensor([sources[p.source] for p in pairs]),
    )


def _train(
    x: Tensor, train: Rows, held: Rows, size: int, epochs: int, batch: int, seed: int, progress: bool | None
) -> tuple[Tensor, dict[str, float]]:
    start = torch.eye(x.shape[1])[:, :size].clone()
    known = _positives(len(x), train, held)
    before = _held_loss(x, held, start, known, batch)
    best, best_loss, chosen = start, before, 0.0
    with progress_bar("Training", len(PENALTIES) * epochs, show=progress) as advance:
        for penalty in PENALTIES:
            generator = torch.Generator().manual_seed(seed)
            matrix = start.clone().requires_grad_()
            optimizer = torch.optim.Adam([matrix], lr=2e-3)
            stale, lowest = 0, before
            for epoch in range(epochs):
                for rows in _batches(train, batch, generator):
                    optimizer.zero_grad()
                    pull = penalty * ((matrix - start) ** 2).sum() / size
                    (_loss(x, rows, matrix, known) + pull).backward()  # type: ignore[no-untyped-call]
                    optimizer.step()
                found = matrix.detach().clone()
                loss = _held_loss(x, held, found, known, batch)
                if loss < best_loss:
                    best, best_loss, chosen = found, loss, penalty
                stale, lowest = (0, loss) if loss < lowest - 1e-3 else (stale + 1, lowest)
                if stale > _PATIENCE:
                    advance(epochs - epoch)
                    break
                advance(1)
    return best, {"penalty": chosen, "loss_before": before, "loss": best_loss}


def _positives(count: int, *parts: Rows) -> Tensor:
    """Pairs that belong together, either way round, as sorted numbers a * count + b; a text belongs to itself."""
    same = torch.arange(count)
    codes = [same * count + same]
    codes += [first * count + second for p in parts for first, second in ((p.a, p.b), (p.b, p.a))]
    found: Tensor = torch.unique(torch.cat(codes))
    return found


def _batches(rows: Rows, batch: int, generator: torch.Generator | None) -> list[Rows]:
    """Batches of one source each, in random order, or in the given one without a generator."""
    out = []
    for source in torch.unique(rows.source).tolist():
        at = (rows.source == source).nonzero()[:, 0]
        if generator is not None:
            at = at[torch.randperm(len(at), generator=generator)]
        pieces = [p for p in at.split(batch) if len(p) > 1]
        out += [Rows(*(column[p] for column in rows)) for p in pieces]
    if generator is not None:
        out = [out[i] for i in torch.randperm(len(out), generator=generator).tolist()]
    return out


def _loss(x: Tensor, rows: Rows, matrix: Tensor, known: Tensor) -> Tensor:
    """Cross-entropy of finding each pair's other half among the batch's, both ways."""
    a, b = (torch.nn.functional.normalize(x[side] @ matrix, dim=1) for side in (rows.a, rows.b))
    logits = a @ b.T / TEMPERATURE
    related = (rows.group[:, None] == rows.group[None]) & (rows.group >= 0)[:, None]
    codes = rows.a[:, None] * len(x) + rows.b[None]
    at = torch.searchsorted(known, codes).clamp(max=len(known) - 1)
    related |= known[at] == codes
    related.fill_diagonal_(False)
    logits = logits.masked_fill(related, float("-inf"))
    target = torch.arange(len(rows.a))
    return (torch.nn.functional.cross_entropy(logits, target) + torch.nn.functional.cross_entropy(logits.T, target)) / 2


@torch.no_grad()
def _held_loss(x: Tensor, held: Rows, matrix: Tensor, known: Tensor, batch: int) -> float:
    losses = [(float(_loss(x, rows, matrix, known)), len(rows.a)) for rows in _batches(held, batch, None)]
    if not losses:
        raise InvalidInputError("No source has two pairs to choose on.", hint="Give more pairs.")
    return sum(loss * n for loss, n in losses) / sum(n for _, n in losses)
