"""Spans and their vectors: against pooling of each text alone, and the labels of windows."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from kvroute import PoolingSpec, SpecError, TransformersEngine
from kvroute.heads.examples import answer_examples, mode_layout, prompt_examples, window_examples
from kvroute.heads.features import SumStore, check_spec, pool_spans, reach_of
from kvroute.pooling import pool
from label_data import label_meta, label_rows
from tiny_models import build_model, build_tokenizer

SPECS = [
    PoolingSpec(layers="all", part="kv", heads="concat"),
    PoolingSpec(layers=0.5, part="v", tokens="sum", window=4),
    PoolingSpec(layers="last:2", part="k", tokens="last", heads="concat", layer_reduce="concat"),
    PoolingSpec(layers=(1, 3), part="kv", tokens="first", layer_reduce="sum"),
    PoolingSpec(layers=(3, 0), part="kv", window=16, layer_reduce="last", normalize=True),
]


def alone(engine: Any, ids: Any, spec: PoolingSpec, start: int, stop: int) -> np.ndarray[Any, Any]:
    """A span's vector from a prefill of nothing but its text up to its end."""
    _, view = next(engine.prefill([list(ids[:stop])]))
    return np.asarray(pool(view, spec, start=[start], stop=[stop]))[0]


def test_prompts_are_pooled_as_the_engine_pools_them(tiny_engine: Any) -> None:
    rows = label_rows(12)
    examples = prompt_examples(tiny_engine, rows, bare=False)
    assert [e.y * 100 for e in examples.items] == [r.label for r in rows]
    expected = tiny_engine.pool([r.prompt_ids for r in rows], SPECS)
    for found, wanted in zip(pool_spans(tiny_engine, examples, SPECS), expected, strict=True):
        np.testing.assert_allclose(found, wanted, atol=1e-4)


def test_the_bare_question_stands_beside_training_prompts(tiny_engine: Any) -> None:
    rows = label_rows(12)
    examples = prompt_examples(tiny_engine, rows, bare=True)
    bare = [e for e in examples.items if e.bare]
    training = [r for r in rows if r.part == "train"]
    assert [e.id for e in bare] == [r.id for r in training]
    expected = tiny_engine.tokenize_texts([r.question for r in training])
    assert [list(examples.texts[e.text]) for e in bare] == expected
    assert all(e.y == r.label / 100 for e, r in zip(bare, training, strict=True))  # type: ignore[operator]


def test_windows_have_the_labels_that_closing_there_gives(tiny_engine: Any) -> None:
    rows = label_rows(30)
    layout = mode_layout(tiny_engine, rows, label_meta(tiny_engine))
    examples = window_examples(rows, layout, every=5)
    wanted = []
    for row in rows:
        for attempt in (*row.slow, *row.fast):
            held = len(row.prompt_ids) + len(layout.suffix(attempt.mode))
            if attempt.mode == "slow":
                for c in attempt.checkpoints:
                    y = 0 if c.correct else 75 if attempt.correct else 100
                    wanted.append((row.id, held + c.at, y, c.correct))
            else:
                wanted += [(row.id, held + n, row.label, attempt.correct) for n in range(5, attempt.tokens, 5)]
    assert [(e.id, e.stop, e.y * 100, e.right == 1) for e in examples.items] == wanted
    assert {0, 75, 100} <= {w[2] for w in wanted}
    assert all(e.start == 0 for e in examples.items)
    found = pool_spans(tiny_engine, examples, SPECS)
    for place in range(0, len(examples), 7):
        item = examples.items[place]
        row = next(r for r in rows if r.id == item.id)
        attempt = (row.slow if item.mode == "slow" else row.fast)[0]
        ids = [*row.prompt_ids, *layout.suffix(attempt.mode), *attempt.token_ids]
        for spec, vectors in zip(SPECS, found, strict=True):
            np.testing.assert_allclose(vectors[place], alone(tiny_engine, ids, spec, 0, item.stop), atol=1e-4)


def test_answers_are_pooled_without_their_last_token(tiny_engine: Any) -> None:
    rows = label_rows(10)
    layout = mode_layout(tiny_engine, rows, label_meta(tiny_engine))
    examples = answer_examples(rows, layout)
    assert len(examples) == 20
    found = pool_spans(tiny_engine, examples, SPECS)
    for place, item in enumerate(examples.items):
        row = next(r for r in rows if r.id == item.id)
        attempt = (row.slow if item.mode == "slow" else row.fast)[0]
        before = [*row.prompt_ids, *layout.suffix(attempt.mode)]
        assert (item.start, item.stop) == (len(before), len(before) + attempt.tokens - 1)
        assert item.y == attempt.correct
        for spec, vectors in zip(SPECS, found, strict=True):
            wanted = alone(tiny_engine, [*before, *attempt.token_ids], spec, item.start, item.stop)
            np.testing.assert_allclose(vectors[place], wanted, atol=1e-4)


def test_one_store_gives_every_specs_vectors(tiny_engine: Any) -> None:
    rows = label_rows(20)
    layout = mode_layout(tiny_engine, rows, label_meta(tiny_engine))
    examples = window_examples(rows, layout, every=5)
    store = SumStore.fill(tiny_engine, examples, range(5), [reach_of(s) for s in SPECS])
    for spec, wanted in zip(SPECS, pool_spans(tiny_engine, examples, SPECS), strict=True):
        assert store.holds(spec)
        np.testing.assert_allclose(store.vectors(spec), wanted, atol=1e-4)
        np.testing.assert_allclose(store.vectors(spec, [3, 1]), wanted[[3, 1]], atol=1e-4)
    assert not store.holds(PoolingSpec(window=9))


def test_a_prefill_ends_where_the_last_span_ends(tiny_engine: Any) -> None:
    rows = label_rows(10)
    layout = mode_layout(tiny_engine, rows, label_meta(tiny_engine))
    examples = window_examples(rows, layout, every=5)
    seen: list[int] = []

    class Counting:
        info = tiny_engine.info

        def prefill(self, token_ids: Any, **kwargs: Any) -> Any:
            seen.extend(map(len, token_ids))
            return tiny_engine.prefill(token_ids, **kwargs)

    pool_spans(Counting(), examples, SPECS)
    assert len(seen) == len(examples.texts)  # once a text, whatever the spans and specs
    ends: dict[int, int] = {}
    for item in examples.items:
        ends[item.text] = max(ends.get(item.text, 0), item.stop)
    assert seen == [ends[i] for i in range(len(seen))]


def test_layers_with_a_window_are_left_out() -> None:
    engine, mistral = (TransformersEngine(build_model(a), build_tokenizer()) for a in ("gemma3", "mistral"))
    windows = [layer.window for layer in engine.info.layers]
    assert SumStore.usable_layers(engine.info, 5) == list(range(len(windows)))
    assert SumStore.usable_layers(engine.info, 500) == [i for i, w in enumerate(windows) if w is None]
    with pytest.raises(SpecError, match="holds fewer than"):
        SumStore.usable_layers(mistral.info, 500)


def test_a_spec_that_needs_frequencies_is_refused(tiny_engine: Any) -> None:
    with pytest.raises(SpecError, match="sif"):
        check_spec(PoolingSpec(weights="sif"), tiny_engine.info)
