"""Drift: fair while quiet, however long; quick on another distribution; exact for a finite reference and for ties."""

from __future__ import annotations

import logging
import threading
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from scipy.integrate import quad
from scipy.stats import binom, kstest

from kvroute import FileFormatError, InvalidInputError, ModelMismatchError
from kvroute.drift import DriftMonitor
from kvroute.rank_bets import STAKES, RankBets, assign, cut, stakes

DIM = 6


def draw(
    n: int, random: np.random.Generator, *, shift: float = 0.0, wide: float = 1.0
) -> tuple[np.ndarray, np.ndarray]:
    """Difficulties and vectors that go together; many difficulties are equal (cut at 0 and 100)."""
    vectors = wide * random.normal(size=(n, DIM)) * np.array([3, 2, 1, 1, 0.5, 0.1]) + shift
    difficulty = np.clip(40 + 25 * vectors[:, 0] / 3 + 10 * random.normal(size=n), 0, 100)
    return difficulty, vectors


def test_every_stake_is_fair() -> None:
    for i in range(STAKES):
        total, _ = quad(lambda p, i=i: float(stakes(np.array([p]))[0, i]), 0, 1, limit=200)
        assert total == pytest.approx(1, abs=1e-3)
    assert (stakes(np.linspace(0, 1, 101)) >= 0).all()


def test_p_values_are_uniform_even_with_a_small_reference_and_ties() -> None:
    """Over many references of 60 values, of which half are equal, the 1st, 40th and 400th live p-value."""
    random = np.random.default_rng(0)
    found: dict[int, list[float]] = {1: [], 40: [], 400: []}
    pairs = []
    for _ in range(1500):
        values = np.maximum(random.normal(size=460), 0.0)
        ties = random.random(460)
        edges, edge_ties, sizes = cut(values[:60], ties[:60], 12)
        bins = assign(values[60:], ties[60:], edges, edge_ties)
        bets = RankBets(sizes[None])
        for t, at in enumerate(bins, 1):
            u = random.random(1)
            if t in found:
                found[t].append(float(bets.p_values(at[None], u)[0]))
            bets.live[0, at] += 1
            bets.n += 1
        pairs.append((found[40][-1], found[400][-1]))
    for values in found.values():
        assert kstest(values, "uniform").pvalue > 1e-3
    assert abs(np.corrcoef(np.array(pairs).T)[0, 1]) < 0.1


@pytest.mark.slow
def test_quiet_runs_of_ten_thousand_requests_give_an_alarm_in_at_most_one_of_a_hundred() -> None:
    """500 runs, each with a reference of its own, all streams; run side by side."""
    random = np.random.default_rng(1)
    monitors, bins = [], []
    for seed in range(500):
        monitor = DriftMonitor.fit(*draw(1000, random), seed=seed)
        monitors.append(monitor)
        found = monitor._assign(monitor.numbers(*draw(10_000, random)), random)
        bins.append(found.astype(np.uint8))
    streams = len(monitors[0].names)
    assert streams == 6
    bets = RankBets(np.concatenate([m._bets.sizes for m in monitors]))
    for at in np.concatenate(bins).T.astype(np.int64):
        bets.update(at, random.random(len(at)))
    largest = bets.largest.reshape(500, streams).max(1)
    alarms = int((largest >= monitors[0].threshold).sum())
    assert alarms <= 5
    one = bets.largest.reshape(500, streams)
    for level in (0.5, 0.1, 0.02):  # Ville, stream by stream: also where it is not rare
        for stream in range(streams):
            assert binom.sf(int((one[:, stream] >= 1 / level).sum()) - 1, 500, level) > 1e-4


@pytest.mark.parametrize(
    "other",
    [
        pytest.param(lambda n, r: draw(n, r, shift=2.0), id="shifted"),
        pytest.param(lambda n, r: draw(n, r, wide=2.0), id="wider"),
        pytest.param(lambda n, r: draw(n, r, wide=0.4), id="narrower"),
        pytest.param(lambda n, r: (np.full(n, 100.0), draw(n, r)[1]), id="harder"),
        pytest.param(lambda n, r: (draw(n, r)[0], draw(n, r)[1] + np.eye(DIM)[5] * 2), id="off the axes"),
    ],
)
@pytest.mark.parametrize("quiet", [0, 3000])
def test_another_distribution_is_found_within_200_requests(
    other: Callable[[int, np.random.Generator], tuple[np.ndarray, np.ndarray]], quiet: int
) -> None:
    late = 0
    for seed in range(4):
        random = np.random.default_rng((seed, quiet))
        monitor = DriftMonitor.fit(*draw(1500, random), seed=seed)
        assert not monitor.update_many(*draw(quiet, random))
        monitor.update_many(*other(200, random))
        late += not monitor.drifted
    assert late == 0


def test_alarm_is_given_and_logged_once_and_health_says_what_changed(caplog: pytest.LogCaptureFixture) -> None:
    random = np.random.default_rng(2)
    monitor = DriftMonitor.fit(*draw(1000, random))
    before = monitor.health()
    assert (before.status, before.n, before.e_value, before.alarm_at) == ("quiet", 0, pytest.approx(1 / 6), None)
    assert monitor.names == ("difficulty", "distance", "axis-0", "axis-1", "axis-2", "axis-3")
    with caplog.at_level(logging.WARNING):
        alarms = [monitor.update(100.0, v) for v in draw(150, random)[1]]
    assert sum(alarms) == 1
    assert len(caplog.records) == 1
    health = monitor.health()
    assert health.status == "drifted"
    assert health.alarm_at == alarms.index(True) + 1
    assert health.n == 150
    assert health.e_value > 1 / health.alpha
    difficulty = health.streams["difficulty"]
    assert sum(difficulty.expected) == pytest.approx(1)
    assert difficulty.expected == pytest.approx([0.1] * 10, abs=0.02)
    assert difficulty.seen[9] > 0.8
    assert difficulty.evidence == max(s.evidence for s in health.streams.values())
    assert type(health).model_validate_json(health.model_dump_json()) == health
    monitor.reset()
    assert monitor.health().status == "quiet"
    assert monitor.health().n == 0


def test_difficulty_alone_can_be_watched() -> None:
    random = np.random.default_rng(3)
    monitor = DriftMonitor.fit(random.uniform(0, 60, 300))
    assert monitor.names == ("difficulty",)
    assert not monitor.update_many(random.uniform(0, 60, 300))
    assert monitor.update_many(random.uniform(30, 90, 200))


def test_a_saved_monitor_goes_on(tmp_path: Path) -> None:
    random = np.random.default_rng(4)
    monitor = DriftMonitor.fit(*draw(800, random), fingerprint="abc")
    monitor.update_many(*draw(300, random))
    path = tmp_path / "policy.drift.safetensors"
    monitor.save(path)
    loaded = DriftMonitor.load(path, "abc")
    assert loaded.health() == monitor.health()
    difficulty, vectors = draw(20, random)
    assert (loaded.numbers(difficulty, vectors) == monitor.numbers(difficulty, vectors)).all()
    loaded.update_many(*draw(200, random, shift=2.0))
    assert loaded.drifted
    loaded.save(path)
    assert DriftMonitor.load(path).health() == loaded.health()
    with pytest.raises(ModelMismatchError):
        DriftMonitor.load(path, "other")
    path.write_bytes(path.read_bytes()[:-50])
    with pytest.raises(FileFormatError):
        DriftMonitor.load(path)


def test_threads_lose_no_request() -> None:
    random = np.random.default_rng(5)
    monitor = DriftMonitor.fit(*draw(500, random))
    rows = [draw(100, np.random.default_rng(i)) for i in range(8)]

    def work(difficulty: np.ndarray, vectors: np.ndarray) -> None:
        for d, v in zip(difficulty, vectors, strict=True):
            monitor.update(float(d), v)
            monitor.health()

    threads = [threading.Thread(target=work, args=row) for row in rows]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert monitor.health().n == 800
    assert (monitor._bets.live.sum(1) == 800).all()


def test_what_cannot_be_watched_is_refused() -> None:
    random = np.random.default_rng(6)
    difficulty, vectors = draw(300, random)
    for call in (
        lambda: DriftMonitor.fit(difficulty[:50]),
        lambda: DriftMonitor.fit(difficulty, vectors[:-1]),
        lambda: DriftMonitor.fit(difficulty, vectors, alpha=0),
        lambda: DriftMonitor.fit(np.where(difficulty > 90, np.nan, difficulty)),
        lambda: DriftMonitor.fit(difficulty, np.ones((300, 3))),
    ):
        with pytest.raises(InvalidInputError):
            call()
    monitor = DriftMonitor.fit(difficulty, vectors)
    for bad in ((10.0, None), (10.0, np.zeros(DIM + 1)), (float("nan"), np.zeros(DIM)), (10.0, np.full(DIM, np.inf))):
        with pytest.raises(InvalidInputError):
            monitor.update(*bad)
    assert monitor.health().n == 0
