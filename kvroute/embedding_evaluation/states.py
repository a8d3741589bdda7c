"""One pass of a model over every text: pooled keys, values and hidden states of every layer, kept as float16 on disk.

A forward pass is the cost. What is read from it is chosen later, without another one. A text is read in one of three
forms: as it is; within a prompt that asks for its meaning (PromptEOL, arXiv 2307.16645: the last token gathers it); or
twice, the second copy seeing the whole of the first (Echo embeddings, arXiv 2402.15449).
"""

from __future__ import annotations

import hashlib
import json
import shutil
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor

from kvroute.embedding_evaluation.measures import Array
from kvroute.engines.batching import plan_batches
from kvroute.engines.reading import run_decoder
from kvroute.engines.slab import SlabCache
from kvroute.errors import InvalidInputError, UnsupportedModelError
from kvroute.files import write_whole
from kvroute.progress import progress_bar
from kvroute_kernels import paged_pool

if TYPE_CHECKING:
    from kvroute.engines.transformers_engine import TransformersEngine

SIF_A = (1e-3, 1e-4)
_LARGEST = 65504.0
"""Of float16: a hidden state beyond it is cut there."""
_CHUNK = 256
_LATER = ", no first token"


def sif_name(a: float) -> str:
    """What the weights a / (a + p) are called."""
    return f"sif {a:g}"


_MEANS = ("mean", "position", *(sif_name(a) for a in SIF_A))


@dataclass(frozen=True)
class Form:
    """How a text is put to the model, and how its tokens are weighed.

    Attributes:
        name: what tables say.
        before, between, after: what stands around the text. With ``between`` it is there twice.
        kv: weights for keys and values. All but ``last`` are of the text's tokens (of its second copy); ``last`` is the
            last token of all.
        hidden: weights for hidden states, also without the first token, on which much of a model's attention rests.
    """

    name: str
    before: str = ""
    between: str | None = None
    after: str = ""
    kv: tuple[str, ...] = ("mean", sif_name(1e-4), "last")
    hidden: tuple[str, ...] = ("mean", sif_name(1e-4), "last")


FORMS = {
    "plain": Form(
        "plain",
        kv=(*_MEANS, "last"),
        hidden=(*_MEANS, "last", *(f"{w}{_LATER}" for w in _MEANS if w != "position")),
    ),
    "prompt": Form("prompt", 'This sentence: "', None, '" means in one word: "'),
    "twice": Form("twice", "Rewrite the sentence: ", ", rewritten sentence: "),
}
"""By name. ``plain`` is what presets read."""


@dataclass
class States:
    """What was read of each text in one form.

    Attributes:
        form: how.
        texts: short texts and then documents.
        short, document: rows by text.
        heads: KV heads.
        kv: ``[weights, L, 2, n, H * D]`` float16, keys and then values.
        hidden: ``[weights, L + 1, n, E]`` float16; 0 is the embedding.
    """

    form: Form
    texts: list[str]
    short: dict[str, int]
    document: dict[str, int]
    heads: int
    kv: Array = field(repr=False)
    hidden: Array = field(repr=False)


class Reader:
    """Reads texts into a folder of states; a later call goes on where it was stopped.

    Args:
        engine: the model.
        short, documents: the texts.
        limits: tokens that short texts and documents are cut to.
        folder: where to keep the states.

    Raises:
        UnsupportedModelError: layers that differ in their sizes.
        InvalidInputError: a text without a token.
    """

    def __init__(
        self,
        engine: TransformersEngine,
        short: Sequence[str],
        documents: Sequence[str],
        *,
        limits: tuple[int, int],
        folder: Path,
    ) -> None:
        self.engine, self.folder = engine, folder
        sizes = {layer.sizes for layer in engine.info.layers}
        if (
            len(sizes) > 1
            or engine.info.num_layers != engine.model.config.get_text_config(decoder=True).num_hidden_layers
        ):
            raise UnsupportedModelError(
                f"{engine.info.name} has layers that differ from each other, and they are compared side by side here.",
                hint="Measure a model whose layers are all alike.",
            )
        self._heads, key, value = sizes.pop()
        if key != value:
            raise UnsupportedModelError(f"Keys and values of {engine.info.name} differ in size.")
        self._width = self._heads * key
        self.texts = [*short, *documents]
        self.short = {t: i for i, t in enumerate(short)}
        self.document = {t: len(short) + i for i, t in enumerate(documents)}
        ids = engine.tokenize_texts(self.texts, special_tokens=False)
        self._ids = [i[: limits[0] if row < len(short) else limits[1]] for row, i in enumerate(ids)]
        for row, listed in enumerate(self._ids):
            if not listed:
                raise InvalidInputError(f"A text without a token: {self.texts[row]!r}.")
        self._sif = {sif_name(a): engine.sif_weights(a) for a in SIF_A}
        self._limits = limits

    def read(self, form: Form, *, seconds: float | None = None, progress: bool | None = None) -> States | None:
        """States of all texts in a form, or None if ``seconds`` were over first; what was read is kept."""
        ends = None if seconds is None else time.monotonic() + seconds
        path = self.folder / self._digest(form)
        kv, hidden = self._arrays(path, form)
        done = set(json.loads((path / "done.json").read_text())) if (path / "done.json").is_file() else set()
        missing = [s for s in range(0, len(self.texts), _CHUNK) if s not in done]
        with progress_bar(f"Reading ({form.name})", len(missing) * _CHUNK, show=progress) as advance:
            for start in missing:
                if ends is not None and time.monotonic() > ends:
                    return None
                self._chunk(form, range(start, min(start + _CHUNK, len(self.texts))), kv, hidden)
                kv.flush()
                hidden.flush()
                done.add(start)
                write_whole(path / "done.json", json.dumps(sorted(done)).encode())
                advance(_CHUNK)
        return States(form, self.texts, self.short, self.document, self._heads, kv, hidden)

    def _digest(self, form: Form) -> str:
        """Of everything that the states depend on."""
        frequencies = [hashlib.sha256(t.cpu().numpy().tobytes()).hexdigest() for t in self._sif.values()]
        info = self.engine.info
        facts = [info.fingerprint, info.dtype, repr(form), self._limits, frequencies, self.texts, len(self.short)]
        return hashlib.sha256(json.dumps(facts).encode()).hexdigest()[:16]

    def _arrays(self, path: Path, form: Form) -> tuple[Any, Any]:
        info, count = self.engine.info, len(self.texts)
        shapes = {
            "kv": (len(form.kv), info.num_layers, 2, count, self._width),
            "hidden": (len(form.hidden), info.num_layers + 1, count, info.hidden_size),
        }
        files = [path / f"{name}.npy" for name in shapes]
        if not all(f.is_file() for f in files):
            shutil.rmtree(path, ignore_errors=True)
            path.mkdir(parents=True)
            for file, shape in zip(files, shapes.values(), strict=True):
                np.lib.format.open_memmap(file, mode="w+", dtype=np.float16, shape=shape).flush()
        kv, hidden = (np.lib.format.open_memmap(file, mode="r+") for file in files)
        return kv, hidden

    @torch.inference_mode()
    def _chunk(self, form: Form, rows: range, kv: Array, hidden: Array) -> None:
        tokenize = self.engine.tokenize_texts
        head = tokenize([form.before])[0]  # with what the tokenizer puts before a text
        between = [] if form.between is None else tokenize([form.between], special_tokens=False)[0]
        after = tokenize([form.after], special_tokens=False)[0] if form.after else []
        ids, spans = [], []
        for row in rows:
            text = self._ids[row]
            front = head if form.between is None else [*head, *text, *between]
            ids.append([*front, *text, *after])
            # As an embedder pools them: a text that stands alone with all its tokens, the tokenizer's own included.
            spans.append((0 if form.name == "plain" else len(front), len(front) + len(text)))
        self.engine.check_lengths(ids)
        info = self.engine.info
        for batch in plan_batches([len(i) for i in ids], self.engine.token_budget):
            chosen, at = [ids[i] for i in batch], [rows[i] for i in batch]
            cache = SlabCache(self.engine.model.config, capacity=max(map(len, chosen)))
            lengths, _, output = run_decoder(self.engine.model, chosen, cache, hidden_states=True)
            view = cache.view(lengths)
            weights = {w: self._weights(w, chosen, [spans[i] for i in batch]) for w in {*form.kv, *form.hidden}}
            for place, name in enumerate(form.kv):
                given = [row[: len(i)] for row, i in zip(weights[name], chosen, strict=True)]
                sums = paged_pool(view, layers=range(info.num_layers), weights=given)
                for half, total in enumerate((sums.keys, sums.values)):
                    assert total is not None
                    kv[place, :, half, at] = _halved(total.flatten(2))
            together = torch.stack([weights[name] for name in form.hidden], dim=1)
            for layer, states in enumerate(output.hidden_states):
                pooled = torch.bmm(together.to(states.device), states.float())
                hidden[:, layer, at] = _halved(pooled).swapaxes(0, 1)

    def _weights(self, name: str, ids: Sequence[Sequence[int]], spans: Sequence[tuple[int, int]]) -> Tensor:
        """``[B, T]`` float32, each row summing to 1."""
        out = torch.zeros(len(ids), max(map(len, ids)))
        kind = name.removesuffix(_LATER)
        for row, (listed, (start, stop)) in enumerate(zip(ids, spans, strict=True)):
            if kind == "last":
                out[row, len(listed) - 1] = 1.0
                continue
            if name != kind and stop - start > 1:
                start += 1
            if kind == "mean":
                out[row, start:stop] = 1.0
            elif kind == "position":
                out[row, start:stop] = torch.arange(start + 1, stop + 1, dtype=torch.float32)
            else:
                out[row, start:stop] = self._sif[kind].cpu()[torch.tensor(listed[start:stop])]
        return (out / out.sum(dim=1, keepdim=True)).to(self.engine.model.device)


def _halved(values: Tensor) -> Array:
    return values.float().clamp(-_LARGEST, _LARGEST).to(torch.float16).cpu().numpy()
