"""Which texts run together."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from kvroute.engines.batching import WRITING_WASTE, plan_batches


@settings(max_examples=200, deadline=None)
@given(lengths=st.lists(st.integers(1, 5000), max_size=200), budget=st.integers(1, 20000))
def test_every_text_runs_once_and_no_batch_passes_the_budget(lengths: list[int], budget: int) -> None:
    batches = plan_batches(lengths, budget)
    assert sorted(i for batch in batches for i in batch) == list(range(len(lengths)))
    for batch in batches:
        assert batch
        padded = max(lengths[i] for i in batch) * len(batch)
        assert padded <= budget or len(batch) == 1
        assert lengths[batch[0]] == max(lengths[i] for i in batch)
    assert [lengths[b[0]] for b in batches] == sorted((lengths[b[0]] for b in batches), reverse=True)


@pytest.mark.parametrize("budget", [2048, 16384])
@pytest.mark.parametrize("kind", ["uniform", "lognormal", "short", "two kinds", "one long"])
def test_a_thousand_texts_of_mixed_length_waste_under_a_tenth(kind: str, budget: int) -> None:
    generator = np.random.default_rng(7)
    lengths = {
        "uniform": generator.integers(1, 1024, 1000),
        "lognormal": np.clip(generator.lognormal(4, 1, 1000).astype(int), 1, 2000),
        "short": generator.integers(1, 40, 1000),
        "two kinds": np.where(generator.random(1000) < 0.5, 5, 700),
        "one long": np.array([2000] + [8] * 999),
    }[kind].tolist()
    batches = plan_batches(lengths, budget)
    computed = sum(max(lengths[i] for i in b) * len(b) for b in batches)
    assert 1 - sum(lengths) / computed < 0.10
    least = sum(lengths) / budget
    assert len(batches) < 6 * least + 60  # not one text at a time either


def test_nothing_to_plan() -> None:
    assert plan_batches([], 100) == []


def test_answers_of_unlike_prompts_are_written_together() -> None:
    """A second batch costs every step of the answers again, so padding may be more than where texts are read."""
    lengths = [16 + n for n in (48, 45, 42, 39, 36, 33, 30, 27)]
    assert len(plan_batches(lengths, 8192, waste=WRITING_WASTE)) == 1
    assert len(plan_batches(lengths, 8192)) > 1
    assert len(plan_batches([1000, *lengths], 8192, waste=WRITING_WASTE)) == 2
