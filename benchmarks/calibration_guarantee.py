"""How often a calibrated policy breaks its promise, over many random splits of one pool of labelled questions.

A split draws the calibration rows; the rest of the pool is the truth. On each the one-step candidates (thresholds from
validation rows) are certified for "at most 1 point below always slow, with confidence 0.9", and the loss of the policy
that is picked is taken on the rest. Beside it two simulated hard cases, whose true losses are known exactly: from
the middle of the candidates on, all of them lose just more (or just less) than 1 point.

The pool: --labels FILE (what ``kvroute label`` wrote; its calibration and test rows, with --head), or questions that
the tiny thinker of examples/tiny_thinker answers here, kept chunk by chunk in .cache, so that a run that was ended goes
on.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

import _thinker
from _harness import Figure, add_common_arguments, exact, figure_table, finish, judge, table
from kvroute.bounds import binomial_lower, binomial_upper
from kvroute.candidates import Candidate, one_step_grid, slow_rows
from kvroute.files import read_tensors, write_tensors
from kvroute.guarantee import AtMostLoss, certify
from kvroute.routing_curves import Modes, Outcome

if TYPE_CHECKING:
    from kvroute import TransformersEngine
    from kvroute.heads import DifficultyHead
    from kvroute.label_rows import LabelRow
    from kvroute.questions import Question

ROOT = Path(__file__).parents[1]
_KIND = "kvroute.benchmark.pool"
_CHUNK = 256
Floats = np.ndarray[Any, np.dtype[np.float64]]
Pair = tuple[float, float | None]
"""tau and give_up of a one-step policy."""

# ---------------------------------------------------------------------- the pool


@dataclass(frozen=True)
class Pool:
    """Questions answered in both modes; all ``[n]``."""

    difficulty: Floats
    fast_correct: Floats
    fast_tokens: Floats
    slow_correct: Floats
    slow_tokens: Floats

    def __len__(self) -> int:
        return len(self.difficulty)

    def baseline(self, rows: Any = slice(None)) -> Outcome:
        """Always slow on some rows."""
        return Outcome(self.slow_correct[rows], self.slow_tokens[rows])

    def candidate(self, pair: Pair, rows: Any = slice(None)) -> Candidate:
        """The one-step policy on some rows."""
        tau, give_up = pair
        slow = slow_rows(self.difficulty[rows], tau, give_up)
        fast = Outcome(self.fast_correct[rows], self.fast_tokens[rows])
        found = Modes(fast, self.baseline(rows)).chosen(slow)
        return Candidate(found.right, found.tokens, slow, {"kind": "one-step", "tau": tau, "give_up": give_up})

    @classmethod
    def of(cls, rows: Sequence[LabelRow], difficulty: Floats) -> Pool:
        """From labelled rows."""
        return cls(
            difficulty,
            np.array([r.fast_right for r in rows]),
            np.array([r.fast_tokens for r in rows]),
            np.array([r.slow_right for r in rows]),
            np.array([r.slow_tokens for r in rows]),
        )

    @classmethod
    def join(cls, pools: Sequence[Pool]) -> Pool:
        """One after the other."""
        return cls(*(np.concatenate([getattr(p, name) for p in pools]) for name in cls.__dataclass_fields__))


def difficulties(engine: TransformersEngine, head: DifficultyHead, rows: Sequence[LabelRow]) -> Floats:
    """``[n]`` of labelled rows, from their prompts."""
    from kvroute.heads.examples import prompt_examples
    from kvroute.heads.features import pool_spans

    vectors = pool_spans(engine, prompt_examples(engine, rows, bare=False), [head.spec], progress=False)[0]
    return head.predict(vectors)


def from_labels(path: Path, head_folder: Path, model: str) -> tuple[Pool, list[Pair]]:
    """The calibration and test rows of a file of labels, and the candidates from its validation rows."""
    from kvroute import TransformersEngine
    from kvroute.heads import DifficultyHead
    from kvroute.label_rows import read_labels, usable

    rows, meta = read_labels(path)
    engine = TransformersEngine.from_pretrained(model, dtype="float32")
    engine.info.require(meta.fingerprint, str(path), meta.model)
    head = DifficultyHead.load(head_folder, engine.info)
    held, validation = usable(rows, "calibration", "test"), usable(rows, "validation")
    grid = one_step_grid(difficulties(engine, head, validation), validation)
    return Pool.of(held, difficulties(engine, head, held)), grid


def from_thinker(arguments: argparse.Namespace) -> tuple[Pool, list[Pair]]:
    """Questions made, answered and kept in the cache; without a head a ridge head is trained on others first."""
    from kvroute.heads import DifficultyHead
    from kvroute.heads.search import SearchOptions
    from kvroute.heads.training import train_head
    from kvroute.label_rows import PARTS, usable
    from kvroute.labelling import Labeller
    from kvroute.skeletons import SHARES

    engine = _thinker.engine(arguments.thinker)
    train_size, pool_size = arguments.train_rows, arguments.pool_rows
    made = _thinker.questions(train_size, arguments.seed + 1000)
    learned, meta = _thinker.labelled(engine, made, dict(SHARES), checkpoints=None, parts=PARTS)
    known = {q.question for q in made}
    others = [q for q in _thinker.questions(pool_size + train_size, arguments.seed) if q.question not in known]
    labeller = Labeller(engine, max_tokens=_thinker.MAX_TOKENS)
    if arguments.head is not None:
        head = DifficultyHead.load(arguments.head, engine.info)
    else:
        search = SearchOptions.quick(kinds=("ridge",), bare=False)
        head, _ = train_head(engine, learned, meta, search=search, seed=arguments.seed, progress=False)
    validation = usable(learned, "validation")
    grid = one_step_grid(difficulties(engine, head, validation), validation)
    identity = [engine.info.fingerprint, head.data_hash, arguments.seed, head.kind, head.spec.to_json()]
    identity += [_thinker.MAX_TOKENS, train_size]
    digest = hashlib.sha256(json.dumps(identity, default=str).encode()).hexdigest()[:16]

    def chunks() -> Iterator[Pool]:
        for start in range(0, pool_size, _CHUNK):
            asked = others[start : min(start + _CHUNK, pool_size)]

            def work(asked: Sequence[Question] = asked) -> Pool:
                rows = usable(labeller.label(asked))
                return Pool.of(rows, difficulties(engine, head, rows))

            yield cached(arguments.cache / f"pool-{digest}-{start}-{len(asked)}.safetensors", work)

    return Pool.join(list(chunks())), grid


def cached(path: Path, work: Callable[[], Pool]) -> Pool:
    """What is in the file, or what ``work`` gives, which is put there."""
    if path.exists():
        arrays, _ = read_tensors(path, _KIND)
        return Pool(**arrays)
    pool = work()
    write_tensors(path, _KIND, {name: getattr(pool, name) for name in Pool.__dataclass_fields__}, {})
    return pool


# ---------------------------------------------------------------------- splits


@dataclass(frozen=True)
class Split:
    """One calibration: the policy's thresholds, or None for always slow, and what it does on the rest of the pool."""

    pair: Pair | None
    loss: float
    saved: float


def splits(
    pool: Pool, grid: Sequence[Pair], promise: AtMostLoss, delta: float, *, rows: int, count: int, seed: int
) -> Iterator[Split]:
    """Calibrate on random rows, again and again, and look at the rest."""
    for number in range(count):
        order = np.random.default_rng((seed, number)).permutation(len(pool))
        chosen, rest = order[:rows], order[rows:]
        found = certify([pool.candidate(t, chosen) for t in grid], pool.baseline(chosen), promise, delta, limits=False)
        if found.chosen is None:
            yield Split(None, 0.0, 0.0)
            continue
        pair = grid[found.chosen]
        base, own = pool.baseline(rest), pool.candidate(pair, rest)
        loss = 100 * float((base.right - own.right).mean())
        yield Split(pair, loss, 1 - float(own.tokens.sum() / base.tokens.sum()))


HARD_CANDIDATES = 20


def hard_pool(rows: int, loss: float, seed: int) -> tuple[Pool, list[Pair]]:
    """Rows of a law whose candidates lose 0.3 points up to the tenth, then ``loss`` percentage points exactly.

    Difficulty falls into 20 equal bins, one a candidate. Where the fast answer harms and where it helps is drawn so
    that the eleventh bin brings the jump; in the bins behind it both are equally likely, so all bolder candidates sit
    at the border with growing variance.
    """
    random = np.random.default_rng(seed)
    bins = random.integers(0, HARD_CANDIDATES, rows)
    worse, better = np.full(HARD_CANDIDATES, 0.02), np.full(HARD_CANDIDATES, 0.02)
    worse[:10], better[:10] = 0.01, 0.004
    worse[10] = better[10] + (loss / 100 - 10 * 0.006 / HARD_CANDIDATES) * HARD_CANDIDATES
    if not 0 <= worse[10] <= 1 - better[10]:
        raise ValueError(f"no such law loses {loss:g} points")
    u = random.random(rows)
    harmed, helped = u < worse[bins], u > 1 - better[bins]
    return Pool(
        difficulty=bins * 5.0 + 2.5,
        fast_correct=(~harmed).astype(np.float64),
        fast_tokens=np.full(rows, 10.0),
        slow_correct=(~helped).astype(np.float64),
        slow_tokens=np.full(rows, 50.0),
    ), [(5.0 * (i + 1), None) for i in range(HARD_CANDIDATES)]


def hard_case(loss: float, promise: AtMostLoss, delta: float, *, rows: int, count: int, seed: int) -> tuple[int, int]:
    """How many of fresh draws of calibration rows break the promise by the law itself, and how many end always slow."""
    broken = slow = 0
    for number in range(count):
        pool, grid = hard_pool(rows, loss, seed * 1_000_003 + number)
        found = certify([pool.candidate(t) for t in grid], pool.baseline(), promise, delta, limits=False)
        slow += found.chosen is None
        broken += found.chosen is not None and (0.3 if found.chosen < 10 else loss) > promise.points
    return broken, slow


# ---------------------------------------------------------------------- the figures


def share_figures(name: str, k: int, n: int, must: str | None) -> dict[str, Figure]:
    """A share with its exact interval, and the lower limit, which is what is judged."""
    low, high = binomial_lower(k, n, 0.025), binomial_upper(k, n, 0.025)
    figures = {name: Figure(k / n, low, high, None, None, n)}
    if must is not None:
        figures[f"{name}_lower_limit"] = exact(low, must)
    return figures


def parse(argv: Sequence[str] | None = None) -> argparse.Namespace:
    """The script's arguments."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add_common_arguments(parser)
    parser.add_argument("--labels", type=Path, help="a file that kvroute label wrote; needs --head and --model")
    parser.add_argument("--head", type=Path, help="a folder that kvroute train wrote; by default the thinker's")
    parser.add_argument("--thinker", type=Path, help="the tiny thinker's folder")
    parser.add_argument("--cache", type=Path, default=ROOT / ".cache" / "calibration_guarantee")
    parser.add_argument("--pool-rows", type=int, default=24_000)
    parser.add_argument("--train-rows", type=int, default=6_000, help="questions that thresholds and head come from")
    parser.add_argument("--rows", type=int, default=8_000, help="calibration rows of a split")
    parser.add_argument("--splits", type=int, default=200)
    parser.add_argument("--points", type=float, default=1.0)
    parser.add_argument("--delta", type=float, default=0.1)
    arguments = parser.parse_args(argv)
    if arguments.quick:
        arguments.pool_rows, arguments.train_rows, arguments.rows, arguments.splits = 800, 300, 400, 25
    if arguments.labels is not None and arguments.head is None:
        parser.error("--labels needs --head")
    if arguments.head is None and arguments.thinker is None:
        arguments.head = _thinker.FOLDER / "head"
    return arguments


def main() -> None:
    arguments = parse()
    promise, delta, count = AtMostLoss(arguments.points), arguments.delta, arguments.splits
    if arguments.labels is not None:
        pool, grid = from_labels(arguments.labels, arguments.head, arguments.model)
    else:
        pool, grid = from_thinker(arguments)
    if len(pool) < 2 * arguments.rows:
        raise SystemExit(f"The pool has {len(pool)} rows: too few for {arguments.rows} calibration rows and a rest.")
    run = {"rows": arguments.rows, "count": count, "seed": arguments.seed}
    done = list(splits(pool, grid, promise, delta, **run))
    broken = sum(s.loss > promise.points for s in done)
    slow = sum(s.pair is None for s in done)
    saved = np.array([s.saved for s in done])
    half = 1.96 * float(saved.std(ddof=1)) / math.sqrt(count)
    mean = float(saved.mean())
    figures = share_figures("broken_promises", broken, count, f"<= {delta:g}")
    figures["always_slow"] = exact(slow / count, "<= 0.1")
    figures["tokens_saved"] = Figure(
        mean, mean - half, mean + half, ">= 0.3", judge(mean - half, mean + half, ">= 0.3"), count
    )
    for word, loss in (("above", 1.002), ("below", 0.998)):
        hard_broken, hard_slow = hard_case(loss, AtMostLoss(1.0), delta, **run)
        figures |= share_figures(f"hard_just_{word}_broken_promises", hard_broken, count, f"<= {delta:g}")
        figures[f"hard_just_{word}_always_slow"] = exact(hard_slow / count, None)
    picked = [s.pair for s in done]
    losses = np.array([s.loss for s in done])
    print(f"{len(pool)} rows in the pool, {arguments.rows} to calibrate, {count} splits; {promise}, delta {delta:g}\n")
    truth = [(t, pool.candidate(t)) for t in grid]
    base = pool.baseline()
    print(
        table(
            ("slow above", "up to", "loss on the pool, points", "tokens saved", "slow", "picked in splits"),
            [
                (
                    f"{t[0]:.2f}",
                    "" if t[1] is None else f"{t[1]:.2f}",
                    f"{100 * (base.right - c.right).mean():.3f}",
                    f"{1 - c.tokens.sum() / base.tokens.sum():.3f}",
                    f"{c.slow.mean():.3f}",
                    picked.count(t),
                )
                for t, c in truth
            ],
        )
    )
    print(f"\nLoss on the rest of the pool: mean {losses.mean():.3f}, largest {losses.max():.3f} points.\n")
    print(figure_table(figures))
    finish(
        arguments,
        name="calibration_guarantee",
        figures=figures,
        baseline="always slow",
        n={"pool": len(pool), "calibration": arguments.rows, "splits": count},
    )


if __name__ == "__main__":
    main()
