"""Scores of answers from what reading them gave."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from kvroute.chains import ChainState, chain_scores
from kvroute.errors import KVRouteError, NonFiniteCacheError
from kvroute.scores import Score, family, logit_scores

if TYPE_CHECKING:
    from kvroute.engines.reading import Reading
    from kvroute_kernels import KVView

Span = tuple[int, int]


def reading_scores(reading: Reading, spans: Sequence[Span]) -> list[dict[str, Score]]:
    """The scores that a reading has the makings of; one that an answer does not have is None with a reason.

    Args:
        reading: a batch of answers.
        spans: where each answer begins and one past its last token.
    """
    found: list[dict[str, Score]] = [{} for _ in spans]
    if reading.view is not None:
        for b, scored in enumerate(_chain_scores(reading.view, spans)):
            found[b] |= scored
    if reading.logits is not None:
        for b, noted in enumerate(reading.logits):
            found[b] |= logit_scores(noted.mean(dim=0).tolist())
    if reading.hidden is not None:
        for b, ((start, stop), layers) in enumerate(zip(spans, reading.hidden, strict=True)):
            if stop - start < 2:
                reason = "the answer has one token, and its last token has no hidden state"
                found[b] |= {n: Score(None, reason) for n in family("hidden-coe")}
            elif not bool(layers.isfinite().all()):
                found[b] |= {n: Score(None, "the hidden states are not finite") for n in family("hidden-coe")}
            else:
                both = chain_scores(layers)
                found[b] |= {"hidden_coe_r": both.r, "hidden_coe_c": both.c}
    return found


def _chain_scores(view: KVView, spans: Sequence[Span]) -> list[dict[str, Score]]:
    state = ChainState(len(spans))
    try:
        state.update_view(view, range(len(spans)), [a for a, _ in spans], [b - 1 for _, b in spans])
        return [state.scores(b) for b in range(len(spans))]
    except NonFiniteCacheError as error:
        if len(spans) > 1:  # the fault of one answer: the others have scores
            return [_chain_scores(view.select_sequences([b]), [span])[0] for b, span in enumerate(spans)]
        reason = f"the {error.part} of layer {error.layer} at token {error.position} are not finite"
    except KVRouteError as error:
        reason = str(error)
    return [{n: Score(None, reason) for n in family("kv-coe")} for _ in spans]
