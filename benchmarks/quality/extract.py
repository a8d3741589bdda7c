"""One pass of the model over every text: pooled keys, values and hidden states of every layer, kept as float16.

A forward pass is the cost; what is pooled from it is chosen later, from the store, without another one.
"""

from __future__ import annotations

import hashlib
import json
from pathlib import Path

import numpy as np
import torch

from kvroute import TransformersEngine
from kvroute.engines.batching import plan_batches
from kvroute.engines.slab import SlabCache
from kvroute.progress import progress_bar
from kvroute.token_weights import FrequencyTable

SIF_A = (1e-3, 1e-4)


def sif_name(a: float) -> str:
    """What the weights a / (a + p) are called."""
    return f"sif {a:g}"


WEIGHTS = ("mean", "position", *(sif_name(a) for a in SIF_A))
CHUNK = 256


class Store:
    """Arrays by text: ``kv [n, W, L, 2, F]``, ``hidden [n, 2 first, W, L + 1, E]`` (the axis ``first``: with and
    without the first token), or the last token's ``kv_last [n, L, 2, F]``, ``hidden_last [n, L + 1, E]``."""

    def __init__(self, folder: Path, texts: list[str], heads: int) -> None:
        self.folder = folder
        self.heads = heads
        self.texts = texts
        self.row = {t: i for i, t in enumerate(texts)}
        self.arrays: dict[str, np.ndarray] = {}

    def chunk_file(self, start: int) -> Path:
        return self.folder / f"{start:06d}.npz"

    def missing(self) -> list[int]:
        return [s for s in range(0, len(self.texts), CHUNK) if not self.chunk_file(s).is_file()]

    def load(self) -> None:
        parts: dict[str, list[np.ndarray]] = {}
        for start in range(0, len(self.texts), CHUNK):
            with np.load(self.chunk_file(start)) as chunk:
                for name in chunk.files:
                    parts.setdefault(name, []).append(chunk[name])
        self.arrays = {name: np.concatenate(p) for name, p in parts.items()}

    def rows(self, texts: list[str]) -> list[int]:
        return [self.row[t] for t in texts]


def store_for(
    folder: Path, engine: TransformersEngine, texts: list[str], *, limit: int, before: str, after: str, last: bool
) -> Store:
    """The store of these texts, in a folder named after everything it depends on."""
    weights = [] if last else [_tables(engine).numpy().tobytes().hex()]
    facts = [
        engine.info.fingerprint,
        limit,
        before,
        after,
        last,
        *weights,
        hashlib.sha256("\0".join(texts).encode()).hexdigest(),
    ]
    name = hashlib.sha256(json.dumps(facts).encode()).hexdigest()[:16]
    (folder / name).mkdir(parents=True, exist_ok=True)
    return Store(folder / name, texts, engine.info.layers[0].kv_heads)


@torch.inference_mode()
def extract(
    store: Store,
    engine: TransformersEngine,
    *,
    limit: int,
    before: str = "",
    after: str = "",
    last: bool = False,
    seconds: float | None = None,
) -> bool:
    """Fill the store; stops after about ``seconds`` (whole chunks) and says whether it is full."""
    import time

    began = time.perf_counter()
    table = _tables(engine)
    missing = store.missing()
    with progress_bar("Reading chunks", len(missing)) as advance:
        for start in missing:
            if seconds is not None and time.perf_counter() - began > seconds:
                return False
            _extract_chunk(store, engine, start, table, limit, before, after, last)
            advance(1)
    return True


def _tables(engine: TransformersEngine) -> torch.Tensor:
    """SIF weights of every token for each a, ``[len(SIF_A), vocab]``."""
    frequencies = FrequencyTable.from_vocabulary(engine.tokenizer)
    return torch.stack([torch.from_numpy(frequencies.weights(a)) for a in SIF_A])


def _extract_chunk(
    store: Store,
    engine: TransformersEngine,
    start: int,
    table: torch.Tensor,
    limit: int,
    before: str,
    after: str,
    last: bool,
) -> None:
    texts = store.texts[start : start + CHUNK]
    tokenizer = engine.tokenizer
    head = tokenizer(before, add_special_tokens=False)["input_ids"] if before else []
    tail = tokenizer(after, add_special_tokens=False)["input_ids"] if after else []
    ids = [head + tokenizer(t, add_special_tokens=False)["input_ids"][:limit] + tail for t in texts]
    out: dict[str, np.ndarray] = {}
    for batch in plan_batches([len(i) for i in ids], 2048):
        width = max(len(ids[i]) for i in batch)
        rows = torch.tensor([ids[i] + [0] * (width - len(ids[i])) for i in batch])
        lengths = torch.tensor([len(ids[i]) for i in batch])
        cache = SlabCache(engine.model.config, capacity=width)
        output = engine.model.get_decoder()(
            input_ids=rows, past_key_values=cache, use_cache=True, output_hidden_states=True
        )
        slab = cache.slabs[0][0]
        assert slab.keys is not None
        assert slab.values is not None
        kv = torch.stack([slab.keys[:, :, :, :width], slab.values[:, :, :, :width]])  # [2, L, B, H, T, D]
        kv = kv.permute(2, 4, 1, 0, 3, 5).flatten(4)  # [B, T, L, 2, H*D]
        hidden = torch.stack(output.hidden_states).permute(1, 2, 0, 3)  # [B, T, L+1, E]
        found: dict[str, torch.Tensor] = {}
        if last:
            at = torch.arange(len(batch))
            found["kv_last"], found["hidden_last"] = kv[at, lengths - 1], hidden[at, lengths - 1]
        else:
            places = torch.arange(width)[None]
            real = (places < lengths[:, None]).float()
            sif = [real * t[rows] for t in table]
            weights = torch.stack([real, real * (places + 1), *sif], dim=1)  # [B, W, T]
            without = weights.clone()
            without[lengths > 1, :, 0] = 0
            both = torch.stack([weights, without], dim=1)  # [B, 2, W, T]
            both = both / both.sum(dim=-1, keepdim=True)
            found["kv"] = torch.einsum("bwt,btlpd->bwlpd", both[:, 0], kv)
            found["hidden"] = torch.einsum("bfwt,btle->bfwle", both, hidden)
        for name, value in found.items():
            array = value.to(torch.float16).numpy()
            out.setdefault(name, np.empty((len(texts), *array.shape[1:]), np.float16))[batch] = array
    work = store.folder / f"{start:06d}.tmp.npz"
    np.savez(work, **out)
    work.rename(store.chunk_file(start))
