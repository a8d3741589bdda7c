"""A paged cache and the two sides of kvroute, driven step by step as an engine would."""

from __future__ import annotations

import numpy as np
import torch

from kvroute.serving.config import ServingConfig
from kvroute.serving.mailbox import WAITS
from kvroute.serving.messages import StepResults
from kvroute.serving.pages import LayerPages
from kvroute.serving.scheduler import SchedulerSide
from kvroute.serving.worker import WorkerSide
from kvroute_kernels import KVView

LAYERS, HEADS, SIZE, BLOCK, BLOCKS, VOCAB = 5, 4, 6, 4, 200, 50
SIF = np.linspace(0.1, 1.0, VOCAB, dtype=np.float32)


class Engine:
    """An engine of simulated steps; ``ranks`` share the heads. ``near``: the worker is at hand, so answers can wait;
    ``late``: clients can wait for results until the next step, in which the pages of what ended are written anew."""

    def __init__(self, ranks: int = 1, near: bool = False, late: bool = False, **config) -> None:
        self.memory = torch.zeros(LAYERS, BLOCKS, HEADS, BLOCK, 2 * SIZE)
        self.workers = []
        for rank in range(ranks):
            heads = slice(rank * HEADS // ranks, (rank + 1) * HEADS // ranks)
            pages = [
                LayerPages(i, f"l{i}", self.memory[i, :, heads, :, :SIZE], self.memory[i, :, heads, :, SIZE:], 0)
                for i in range(LAYERS)
            ]
            self.workers.append(WorkerSide(pages))
        self.read = 0  # requests that the worker was sent to read
        reader = (lambda: self.workers[0]) if near else None
        self.late = late
        self.side = SchedulerSide(
            ServingConfig(**config), [BLOCK], lambda a: SIF / (1 + a), reader=reader, holds_pages=late
        )
        self.ended: list[str] = []
        self.free = torch.randperm(BLOCKS - 1, generator=torch.Generator().manual_seed(0)).add(1).tolist()
        self.data: dict[str, tuple[torch.Tensor, list[int], int]] = {}
        self.blocks: dict[str, list[int]] = {}
        self.boxes: dict[str, dict] = {}

    def add(
        self, name: str, prompt: int, total: int, features, seed: int = 0, like: str | None = None, more: int = 0
    ) -> None:
        """A request whose tokens and cache are decided beforehand; it might have written ``more`` tokens."""
        g = torch.Generator().manual_seed(seed)
        cache = torch.randn(LAYERS, HEADS, total, 2 * SIZE, generator=g)
        ids = torch.randint(VOCAB, (total + 1,), generator=g).tolist()
        if like is not None:  # the same tokens, and so the same cache
            cache, ids = self.data[like][0][:, :, :total], self.data[like][1][: total + 1]
        self.data[name] = (cache, ids, prompt)
        self.blocks[name] = []
        limit = total + 1 - prompt + more
        self.side.on_request(self.id(name), {"kvroute": {"features": features}}, prompt, ids, limit=limit)

    def id(self, name: str) -> str:
        """The engine's own."""
        return f"{name}-{WAITS}" if self.late else name

    def preempt(self, name: str) -> None:
        for block in self.blocks[name]:
            self.memory[:, block] = torch.nan  # someone else's now
        self.free += self.blocks[name]
        self.blocks[name] = []

    def share(self, name: str, other: str, blocks: int) -> None:
        """A prefix hit."""
        self.blocks[name] = self.blocks[other][:blocks]

    def step(
        self,
        *scheduled: tuple[str, int, int],
        end: tuple[str, ...] = (),
        abort: dict[str, int] | None = None,
        preempt: tuple[str, ...] = (),
        hooks: int = 4,
    ) -> None:
        """One step. ``abort``: ended from outside while it runs, with so many tokens; ``preempt``: they lose their
        blocks for it."""
        rows = []
        for name, start, count in scheduled:
            table = self.blocks[name]
            while len(table) * BLOCK < start + count:
                table.append(self.free.pop())
            if self.side.asked(self.id(name)):
                rows.append((self.id(name), start, count, [list(table)]))
        meta = self.side.step(rows, [self.id(name) for name in preempt])
        for worker in self.workers:
            worker.begin(meta)
        for name in [*preempt, *(self.ended if self.late else ())]:
            self.preempt(name)
        self.ended = []
        for name, start, count in scheduled:
            table, cache = self.blocks[name], self.data[name][0]
            for t in range(start, start + count):
                self.memory[:, table[t // BLOCK], :, t % BLOCK] = cache[:, :, t]
        self.read += len(meta.requests)
        merged: StepResults | None = None
        for worker in self.workers:
            for _ in range(hooks):
                worker.step(meta)
            got = worker.results()
            merged = got if merged is None or got is None else merged.merge(got)
        for name, answer in (abort or {}).items():
            self.end(name, answer, aborted=True)
        for name in end:  # the engine ends a request before it hands over what the workers said
            cache, _, prompt = self.data[name]
            self.end(name, cache.shape[2] + 1 - prompt)
        self.side.merge(merged)
        if self.late:  # such a result goes to who waits for it
            self.boxes |= {id.removesuffix(f"-{WAITS}"): box for id, box in self.side.tally._results.items()}

    def end(self, name: str, answer: int, **more) -> None:
        box = self.side.finished(self.id(name), answer, blocks=[list(self.blocks[name])], **more)
        self.ended.append(name)
        if box is not None:
            self.boxes[name] = box

    def view(self, name: str) -> KVView:
        cache = self.data[name][0]
        return KVView.from_contiguous(cache[:, None, ..., :SIZE], cache[:, None, ..., SIZE:], [cache.shape[2]])

    @property
    def states(self) -> int:
        return self.side.num_states + sum(w.num_states for w in self.workers)
