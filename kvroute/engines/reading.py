"""Running tokens that are there already: prefills, answers written by somebody else, questions with fixed answers.

Everything here is one forward of one batch, padded on the right (which a causal model needs no mask for) unless
said otherwise. The LM head sees the positions whose logits are asked for, a few at a time, and no others.
"""

from __future__ import annotations

import copy
import itertools
from collections.abc import Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor, nn

from kvroute.engines.session_features import logit_statistics
from kvroute.engines.slab import SlabCache, StopForwardError
from kvroute.errors import UnsupportedModelError
from kvroute_kernels import KVView

Want = Literal["kv", "logits", "hidden"]
"""``kv`` the cache, ``logits`` what the logit scores are made of, ``hidden`` mean hidden states by layer."""

_LOGITS = 2**23
"""Logits computed at once: 32 MiB in float32."""


@dataclass(frozen=True, slots=True)
class Reading:
    """What reading a batch of answers gives, in the batch's order. What was not asked for is None.

    The last token of an answer is not run: during generation it has no keys and values either.

    Attributes:
        view: the cache of prompts and answers, valid until the next batch is read.
        logits: by answer ``[n, 3]`` float64 on the CPU for its n tokens, the last one included: log-probability of
            the token, entropy in nats, probability of the likeliest token.
        hidden: by answer ``[layers + 1, hidden]`` float64 on the CPU, mean over its tokens but the last of the
            embeddings and of each layer's hidden state; NaN if it has one token only.
    """

    view: KVView | None = None
    logits: list[Tensor] | None = None
    hidden: list[Tensor] | None = None


@torch.inference_mode()
def prefill_batch(
    model: Any, token_ids: Sequence[Sequence[int]], keep: frozenset[int], padding: Literal["left", "right"]
) -> KVView:
    """The cache of some texts in the layers ``keep``; nothing above the deepest of them is run."""
    cache = SlabCache(model.config, keep=keep, stop_after=max(keep), capacity=max(len(ids) for ids in token_ids))
    lengths, pads, _ = run_decoder(model, token_ids, cache, padding=padding)
    return cache.view(lengths, pads)


@torch.inference_mode()
def read_batch(
    model: Any,
    token_ids: Sequence[Sequence[int]],
    start: Sequence[int],
    want: frozenset[Want],
    keep: frozenset[int],
) -> Reading:
    """Read answers that exist.

    Args:
        model: a transformers causal model.
        token_ids: prompt and answer of each, a token of each at least.
        start: where each answer begins, at least 1.
        want: what to give.
        keep: attention layers of the cache to keep.
    """
    run = [ids[:-1] for ids in token_ids]
    whole = "logits" in want or "hidden" in want
    cache = SlabCache(
        model.config,
        keep=keep if "kv" in want else frozenset(),
        stop_after=None if whole else max(keep),
        capacity=max(len(ids) for ids in run),
    )
    lengths, _, output = run_decoder(model, run, cache, hidden_states="hidden" in want)
    view = cache.view(lengths) if "kv" in want else None
    logits = hidden = None
    spans = list(zip(start, map(len, token_ids), strict=True))
    if "logits" in want:
        states = torch.cat([output.last_hidden_state[b, s - 1 : n - 1] for b, (s, n) in enumerate(spans)])
        answers = torch.tensor([t for ids, (s, _) in zip(token_ids, spans, strict=True) for t in ids[s:]])
        noted = [
            logit_statistics(logprobs, logprobs.gather(1, chosen[:, None])[:, 0]).double().cpu()
            for logprobs, chosen in _logprobs(model, states, answers.to(states.device))
        ]
        logits = list(torch.split(torch.cat(noted), [n - s for s, n in spans]))
    if "hidden" in want:
        hidden = [
            torch.stack([layer[b, s : n - 1].double().mean(dim=0).cpu() for layer in output.hidden_states])
            for b, (s, n) in enumerate(spans)
        ]
    return Reading(view, logits, hidden)


@torch.inference_mode()
def choice_logprobs_batch(model: Any, token_ids: Sequence[Sequence[int]], choices: Tensor) -> Tensor:
    """Log-probability that each of some tokens comes next: ``[B, choices]`` float64 on the CPU.

    Args:
        model: a transformers causal model.
        token_ids: the texts.
        choices: ``[B, choices]`` int64, the tokens.
    """
    cache = SlabCache(model.config, keep=frozenset(), capacity=1)
    lengths, _, output = run_decoder(model, token_ids, cache)
    last = output.last_hidden_state[torch.arange(len(token_ids), device=lengths.device), lengths - 1]
    found = [p.gather(1, asked).double().cpu() for p, asked in _logprobs(model, last, choices.to(last.device))]
    return torch.cat(found)


def run_decoder(
    model: Any,
    token_ids: Sequence[Sequence[int]],
    cache: SlabCache,
    *,
    padding: Literal["left", "right"] = "right",
    hidden_states: bool = False,
) -> tuple[Tensor, Tensor | None, Any]:
    """One forward of the decoder: lengths, padding tokens on the left or None, output (None if it was left early)."""
    device = model.device
    lengths = torch.tensor([len(ids) for ids in token_ids], device=device)
    width = max(len(ids) for ids in token_ids)
    left = padding == "left"
    rows = [[0] * (width - len(i)) + list(i) if left else list(i) + [0] * (width - len(i)) for i in token_ids]
    pads = (width - lengths) if left else None
    mask = positions = None
    if pads is not None:
        slots = torch.arange(width, device=device)[None]
        mask = (slots >= pads[:, None]).long()
        positions = (slots - pads[:, None]).clamp_min(0)
    output = None
    decoder = _twin(model.get_decoder()) if hidden_states else model.get_decoder()
    with suppress(StopForwardError):
        output = decoder(
            input_ids=torch.tensor(rows, device=device),
            attention_mask=mask,
            position_ids=positions,
            past_key_values=cache,
            use_cache=True,
            **({"output_hidden_states": True} if hidden_states else {}),
        )
    return lengths, pads, output


def _twin(decoder: nn.Module) -> nn.Module:
    """New modules around the same tensors.

    transformers hooks itself into the layers of a model that is asked for hidden states, and stays there; the user's
    model is to be as it was.
    """
    shared = {id(t): t for t in itertools.chain(decoder.parameters(), decoder.buffers())}
    return copy.deepcopy(decoder, {**shared, id(decoder.config): decoder.config})


# ------------------------------------------------------------------ LM head


def _logprobs(model: Any, states: Tensor, beside: Tensor) -> Iterator[tuple[Tensor, Tensor]]:
    """Log-probabilities ``[m, vocab]`` float32 of hidden states ``[n, hidden]``, m at a time, with their ``beside``."""
    head = _LMHead(model)
    rows = max(1, _LOGITS // int(model.config.get_text_config(decoder=True).vocab_size))
    for at in range(0, states.shape[0], rows):
        logits = head(states[at : at + rows]).float()
        yield torch.log_softmax(logits, dim=-1), beside[at : at + rows]


class _LMHead:
    """What a model does after its decoder, scaling and soft caps included, for chosen positions.

    It is the model's own ``forward``, run on a shallow copy whose decoder is replaced by one that gives hidden states
    computed before. The model itself is not touched.

    Raises:
        UnsupportedModelError: no LM head beside a decoder.
    """

    def __init__(self, model: Any) -> None:
        head, decoder = model.get_output_embeddings(), model.get_decoder()
        # The model may be wrapped (compiled, with adapters): its own class is the one that holds the head.
        owner = next((m for m in model.modules() if any(c is head for c in m.children())), None)
        name = None
        if owner is not None:
            name = next((n for n, c in owner.named_children() if any(m is decoder for m in c.modules())), None)
        if owner is None or name is None:
            raise UnsupportedModelError(
                f"{type(model).__name__} keeps no LM head beside its decoder, so the logits of an answer that exists "
                "can't be read.",
                hint="Ask for scores that need none: kv-coe, length, hidden-coe.",
            )
        self._given = _GivenStates()
        self._copy = copy.copy(owner)
        self._copy.__dict__.pop("forward", None)  # a hook's wrapper, bound to the original
        self._copy._modules = {**owner._modules, name: self._given}

    def __call__(self, states: Tensor) -> Tensor:
        self._given.states = states[None]
        return self._copy.forward(logits_to_keep=0, use_cache=False).logits[0]  # type: ignore[no-any-return]


class _GivenStates(nn.Module):
    """Stands where a decoder stood."""

    states: Tensor

    def forward(self, *_args: Any, **_kwargs: Any) -> Any:
        from transformers.modeling_outputs import MoeModelOutputWithPast

        return MoeModelOutputWithPast(last_hidden_state=self.states)
