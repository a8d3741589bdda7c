"""A model of a few lines that can be steered by an engine of one's own and by a server's two sides, step by step.

Its keys and values are a function of token and place, and the next token of the last few; so both ways of running it
must write the same.
"""

from __future__ import annotations

import threading
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from types import SimpleNamespace

import numpy as np
import torch

from kvroute import DifficultyHead, Policy, PoolingSpec
from kvroute.choosing import Chooser
from kvroute.heads.models import RidgeModel
from kvroute.pooling import pool
from kvroute.route_steering import ClosingMark, Request, RouteSteer
from kvroute.serving.catalog import Catalog, ServedPolicy
from kvroute.serving.config import ServingConfig
from kvroute.serving.forcing import Board
from kvroute.serving.messages import StepResults
from kvroute.serving.pages import LayerPages
from kvroute.serving.scheduler import SchedulerSide
from kvroute.serving.thinking_tokens import ThinkingTokens
from kvroute.serving.worker import WorkerSide
from kvroute.thinking import Layout
from kvroute_kernels import KVView
from tests.serving_files import a_head

LAYERS, HEADS, SIZE, BLOCK, BLOCKS, VOCAB = 4, 2, 8, 4, 400, 40
END, OPEN, CLOSE, LINE = 0, 1, 2, 3
FAST, SLOW = [OPEN, LINE, LINE, CLOSE, LINE], [OPEN, LINE]
PHRASES = {"fast": [LINE, CLOSE, LINE], "slow": [LINE, OPEN, LINE]}
SIF = np.linspace(0.2, 1.0, VOCAB, dtype=np.float32)
_random = torch.Generator().manual_seed(7)
_TABLE = torch.randn(VOCAB, LAYERS, HEADS, 2 * SIZE, generator=_random)
_PLACE = torch.randn(512, LAYERS, HEADS, 2 * SIZE, generator=_random) * 0.3


def states(tokens: list[int]) -> torch.Tensor:
    """Keys and values ``[T, L, H, 2 D]`` of tokens."""
    return _TABLE[tokens] + _PLACE[: len(tokens)]


def next_token(tokens: list[int]) -> int:
    """What the model writes: now and then an end of its thought or of its answer."""
    mixed = sum((i + 3) * t * t for i, t in enumerate(tokens[-4:])) + 31 * len(tokens)
    if mixed % 47 == 0:
        return CLOSE
    return END if mixed % 101 == 0 else 4 + mixed % (VOCAB - 4)


def a_reader(spec: PoolingSpec, seed: int, slope: float = 0.15) -> DifficultyHead:
    head = a_head(spec=spec)
    random = np.random.default_rng(seed)
    dim = head.predictor.dim
    weight = (random.standard_normal(dim) * slope).astype(np.float32)
    zeros, ones = np.zeros(dim, np.float32), np.ones(dim, np.float32)
    return replace(head, predictor=RidgeModel(zeros, ones, weight, np.array([0.5])))


WHOLE = PoolingSpec(layers="all", part="v", weights="sif", heads="concat", layer_reduce="concat")
WINDOW = PoolingSpec(layers="last:2", part="kv", window=6, heads="concat", layer_reduce="mean")
HEAD = replace(a_reader(WHOLE, 1), windows=a_reader(WINDOW, 2))


class _Tokenizer:
    def decode(self, ids: list[int], **_: object) -> str:
        return " ".join(map(str, ids))


def thinking() -> ThinkingTokens:
    engine = SimpleNamespace(tokenizer=_Tokenizer(), tokenize_texts=lambda texts, **_: [[CLOSE] for _ in texts])
    mark = ClosingMark(engine, "</think>")
    return ThinkingTokens({"fast": FAST, "slow": SLOW}, PHRASES, mark, FAST[2:])


# ---------------------------------------------------------------------- an engine of one's own


class OwnRouter(Chooser):
    """What a steering needs of a router."""

    def __init__(self, policy: Policy, head: DifficultyHead | None = HEAD) -> None:
        super().__init__(policy, head, None)
        self.phrases, self.closing, self.targets = PHRASES, thinking().mark, {}


class Own:
    """A loop as that of an engine of one's own, with one row a batch."""

    def __init__(self, prompt: list[int], limit: int) -> None:
        self.prompt, self.limit, self.tokens, self.waiting = list(prompt), limit, [], 0

    def pooled(self, rows, spec):
        tokens = self.prompt + self.tokens[:-1]
        x = states(tokens).permute(1, 2, 0, 3)[:, None]
        view = KVView.from_contiguous(x[..., :SIZE], x[..., SIZE:], [len(tokens)])
        return pool(view, spec, sif_weights=[torch.from_numpy(SIF[tokens])]).numpy()

    def tokens_of(self, row):
        return self.tokens

    def room(self, row):
        return self.limit - len(self.tokens)

    def end(self, rows):
        raise AssertionError("nothing is ended here")

    def run(self, router: OwnRouter, forced: str | None = None) -> Request:
        request = Request(Layout(list(self.prompt), FAST, SLOW), forced=forced)
        steering = RouteSteer(router, [request]).open([0])
        self.prompt += steering.begin(self, [0])[0]
        while len(self.tokens) < self.limit:
            self.tokens.append(next_token(self.prompt + self.tokens))
            if self.tokens[-1] == END or len(self.tokens) >= self.limit:
                break
            for token in steering.after(self, [0]).get(0, []):
                if len(self.tokens) < self.limit:
                    self.tokens.append(token)
        return request


# ---------------------------------------------------------------------- a server


class Server:
    """A server of simulated steps; ``ranks`` share the heads, or hold them ``replicas`` times."""

    def __init__(
        self,
        policies: dict[str, Policy] | None = None,
        *,
        ranks: int = 1,
        replicas: int = 1,
        head: DifficultyHead = HEAD,
        runs_ahead: bool = False,
        confidence: DifficultyHead | None = None,
        **settings,
    ) -> None:
        config = ServingConfig(**settings)
        config._catalog = Catalog(
            {n: ServedPolicy(p, head if p.reads_difficulty else None) for n, p in (policies or {}).items()},
            {} if confidence is None else {"right": confidence},
        )
        self.memory = torch.zeros(LAYERS, BLOCKS, HEADS, BLOCK, 2 * SIZE)
        self.boards = [Board() for _ in range(ranks)]
        self.workers = []
        groups = ranks // replicas
        for rank in range(ranks):
            part = rank // replicas
            heads = slice(part * HEADS // groups, (part + 1) * HEADS // groups)
            pages = [
                LayerPages(i, f"l{i}", self.memory[i, :, heads, :, :SIZE], self.memory[i, :, heads, :, SIZE:], 0)
                for i in range(LAYERS)
            ]
            self.workers.append(
                WorkerSide(
                    pages,
                    config=config,
                    board=self.boards[rank],
                    gather=self._gather(rank) if ranks > 1 else None,
                    replicas=replicas,
                    copy=rank % replicas != 0,
                )
            )
        self.pool = ThreadPoolExecutor(ranks)
        self.barrier = threading.Barrier(ranks, timeout=10)
        self.shared: list = [None] * ranks
        self.side = SchedulerSide(config, [BLOCK], lambda a: SIF, thinking=thinking, longest=400, runs_ahead=runs_ahead)
        self.free = list(range(1, BLOCKS))
        self.tokens: dict[str, list[int]] = {}
        self.prompts: dict[str, int] = {}
        self.limits: dict[str, int] = {}
        self.blocks: dict[str, list[int]] = {}
        self.done: dict[str, int] = {}
        self.boxes: dict[str, dict | None] = {}
        self.sent_blocks: dict[str, list[int]] = {}
        self.loaded = True  # the logits processor

    def _gather(self, rank: int):
        def gather(x: torch.Tensor) -> torch.Tensor:
            self.shared[rank] = x.clone()
            self.barrier.wait()
            whole = torch.stack(self.shared)
            self.barrier.wait()
            return whole

        return gather

    def add(self, name: str, prompt: list[int], ask: dict, limit: int = 60, **more) -> None:
        self.tokens[name], self.prompts[name] = list(prompt), len(prompt)
        self.limits[name], self.blocks[name], self.done[name] = limit, [], 0
        self.side.on_request(name, {"kvroute": ask}, len(prompt), self.tokens[name], limit=limit, **more)

    def preempt(self, name: str) -> None:
        for block in self.blocks[name]:
            self.memory[:, block] = torch.nan
        self.free += self.blocks[name]
        self.blocks[name], self.done[name] = [], 0

    def abort(self, name: str) -> None:
        self.boxes[name] = self.side.finished(name, len(self.tokens[name]) - self.prompts[name])
        del self.tokens[name]

    def step(self, most: int = 1000) -> None:
        """All running requests take a step of at most so many tokens."""
        rows, samples = [], []
        for name, tokens in self.tokens.items():
            if name in self.boxes:
                continue
            start, stop = self.done[name], min(len(tokens), self.done[name] + most)
            table = self.blocks[name]
            while len(table) * BLOCK < stop:
                table.append(self.free.pop(0))
            x = states(tokens[:stop])
            for t in range(start, stop):
                self.memory[:, table[t // BLOCK], :, t % BLOCK] = x[t]
            self.done[name] = stop
            if self.side.asked(name):
                rows.append((name, start, stop - start, [list(table)]))
            if stop == len(tokens):
                samples.append(name)
        meta = self.side.step(rows)
        self.sent_blocks = {r.id: r.blocks[0] for r in meta.requests}
        list(self.pool.map(lambda worker: worker.step(meta), self.workers))
        merged: StepResults | None = None
        for worker in self.workers:
            got = worker.results()
            merged = got if merged is None or got is None else merged.merge(got)
        for name in samples:
            tokens, place = self.tokens[name], len(self.tokens[name]) - self.prompts[name]
            forced = {board.token(name, place) for board in self.boards}
            assert len(forced) == 1, "ranks must force the same"
            token = forced.pop() if self.loaded else None
            tokens.append(next_token(tokens) if token is None else token)
            if tokens[-1] == END or place + 1 >= self.limits[name]:
                self.boxes[name] = self.side.finished(name, place + 1)
        self.side.merge(merged)

    def run(self, most: int = 1000, steps: int = 300) -> None:
        for _ in range(steps):
            if all(name in self.boxes for name in self.tokens):
                break
            self.step(most)
        self.step()  # an empty one takes the last words along

    def answer(self, name: str) -> list[int]:
        return self.tokens[name][self.prompts[name] :]

    @property
    def states(self) -> int:
        return self.side.num_states + sum(w.num_states for w in self.workers) + sum(map(len, self.boards))
