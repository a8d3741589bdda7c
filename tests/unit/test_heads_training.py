"""Search and training: a signal is found and its absence too, test rows are looked at last, budgets hold."""

from __future__ import annotations

import json
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from kvroute import DifficultyHead, InvalidInputError, ModelMismatchError, PoolingSpec, SpecError
from kvroute.confidence_maps import auroc
from kvroute.heads.examples import Examples, mode_layout, prompt_examples, window_examples
from kvroute.heads.features import pool_spans
from kvroute.heads.search import Problem, SearchOptions, layer_sets, search, spec_grid
from kvroute.heads.training import TrainingReport, fit_probability, train_head
from label_data import label_meta, label_rows

SPEC = PoolingSpec(layers="all", part="v", heads="concat")
FIXED = SearchOptions.quick(spec=SPEC, kinds=("ridge",))


def train(engine: Any, rows: Any, **kwargs: Any) -> tuple[DifficultyHead, TrainingReport]:
    options = {"search": FIXED, "windows": False, "progress": False} | kwargs
    return train_head(engine, rows, label_meta(engine), **options)


@pytest.fixture(scope="module")
def rows() -> Any:
    return label_rows(360)


@pytest.fixture(scope="module")
def trained(tiny_engine: Any, rows: Any) -> tuple[DifficultyHead, TrainingReport]:
    """The whole search, all kinds, windows too."""
    return train_head(
        tiny_engine, rows, label_meta(tiny_engine), progress=False, search=SearchOptions.quick(finalists=2)
    )


def test_the_signal_is_found(trained: Any, tiny_engine: Any, rows: Any) -> None:
    """The held-out figures are those of the head itself on the test rows."""
    head, report = trained
    test = [r for r in rows if r.part == "test"]
    assert report.rows["test"] == len(test)
    assert report.held_out == head.metrics
    (vectors,) = tiny_engine.pool([r.prompt_ids for r in test], [head.spec])
    found = head.predict(vectors)
    right = np.array([r.fast_right == 1 for r in test])
    only_slow = np.array([r.slow_right == 1 and r.fast_right == 0 for r in test])
    labels = np.array([r.label for r in test])
    assert report.held_out["auroc_fast_right"] == pytest.approx(auroc(-found, right), abs=1e-6)
    assert report.held_out["auroc_only_slow_right"] == pytest.approx(auroc(found, only_slow), abs=1e-6)
    assert report.held_out["mae"] == pytest.approx(np.abs(found - labels).mean(), abs=1e-3)
    p = head.probability(found)
    assert report.held_out["brier"] == pytest.approx(np.mean((p - right) ** 2), abs=1e-6)
    assert report.held_out["auroc_fast_right"] > 0.8
    assert report.held_out["calibration_error"] < 0.25


def test_the_windows_head_tells_where_closing_is_right(trained: Any, tiny_engine: Any, rows: Any) -> None:
    head, report = trained
    assert head.windows is not None
    assert head.windows.target == "difficulty"
    test = [r for r in rows if r.part == "test"]
    layout = mode_layout(tiny_engine, rows, label_meta(tiny_engine))
    spans = window_examples(test, layout, every=5)
    (vectors,) = pool_spans(tiny_engine, spans, [head.windows.spec])
    found = head.windows.predict(vectors)
    assert report.windows.held_out["n"] == len(spans)
    expected = auroc(-found, spans.right >= 0.5)
    assert report.windows.held_out["auroc_closing_right"] == pytest.approx(expected, abs=1e-6)
    assert expected > 0.65


def test_every_candidate_is_in_the_report(trained: Any) -> None:
    _, report = trained
    stages = {c.stage for c in report.tried}
    assert stages == {"specs", "variants", "kinds", "bare"}
    assert {c.kind for c in report.tried if c.stage == "kinds"} == {"ridge", "logistic", "mlp", "trees"}
    specs = {c.spec for c in report.tried if c.stage == "specs"}
    assert specs == {s for s in spec_grid(range(5), 5)}  # noqa: C416
    assert len({c.spec for c in report.tried if c.stage == "kinds"}) == 2
    last = [c for c in report.tried if c.stage in ("kinds", "bare")]
    assert report.chosen.order == max(c.order for c in last)
    assert json.loads(json.dumps(report.to_dict(), allow_nan=False))["chosen"]["auroc"] == report.chosen.auroc


def test_nothing_is_found_where_nothing_is(tiny_engine: Any) -> None:
    """The best of hundreds looks better than chance on validation rows; on test rows it must not."""
    values = []
    for seed in range(3):
        _, report = train(
            tiny_engine, label_rows(300, seed=seed, shuffle=True), search=SearchOptions.quick(kinds=("ridge", "trees"))
        )
        values.append(report.held_out["auroc_fast_right"])
        assert report.held_out["calibration_error"] < 0.3
    assert abs(float(np.mean(values)) - 0.5) < 0.15, values


def test_test_and_calibration_rows_change_nothing(tiny_engine: Any, rows: Any) -> None:
    """Their labels turned round, and the head is the same to the bit."""
    turned = [
        r.model_copy(update={"label": 100.0 - (r.label or 0), "fast": r.slow, "slow": r.fast})
        if r.part in ("test", "calibration")
        else r
        for r in rows
    ]
    options = SearchOptions.quick(kinds=("ridge", "mlp"))
    one, first = train(tiny_engine, rows, search=options, windows=True)
    two, second = train(tiny_engine, turned, search=options, windows=True)
    for a, b in ((one, two), (one.windows, two.windows)):
        assert a is not None
        assert b is not None
        assert a.spec == b.spec
        assert a.data_hash == b.data_hash
        mine, theirs = a.predictor.tensors(), b.predictor.tensors()
        assert all((mine[n] == theirs[n]).all() for n in mine)
        assert a.map == b.map
    assert first.validation == second.validation
    assert first.held_out != second.held_out


def test_a_seed_gives_the_same_head_again(tiny_engine: Any, rows: Any) -> None:
    options = SearchOptions.quick(spec=SPEC, kinds=("mlp",), bare=False)
    heads = [train(tiny_engine, rows, search=options, seed=s)[0] for s in (3, 3, 4)]
    weights = [h.predictor.tensors()["hidden_weight"] for h in heads]
    assert (weights[0] == weights[1]).all()
    assert not (weights[0] == weights[2]).all()


def test_kinds_and_spec_are_as_asked(tiny_engine: Any, rows: Any) -> None:
    head, report = train(tiny_engine, rows, kinds=("logistic",))
    assert (head.kind, head.spec) == ("logistic", SPEC)
    assert {(c.kind, c.spec) for c in report.tried} == {("logistic", SPEC)}
    inner = PoolingSpec(layers="last:1", window=8)
    options = SearchOptions(**{**dict(FIXED), "window_spec": inner})
    both, _ = train(tiny_engine, rows, search=options, windows=True)
    assert both.spec == SPEC
    assert both.windows is not None
    assert both.windows.spec == inner


def test_a_short_budget_still_gives_a_head(tiny_engine: Any, rows: Any) -> None:
    began = time.perf_counter()
    head, report = train(tiny_engine, rows, search=SearchOptions(budget_seconds=0.001))
    assert time.perf_counter() - began < 30
    assert len({c.spec for c in report.tried}) == 1
    assert len([c for c in report.tried if c.stage == "kinds"]) == 1
    assert head.metrics["auroc_fast_right"] > 0.6


def test_memory_bounds_the_rows_that_specs_are_chosen_on(tiny_engine: Any, rows: Any) -> None:
    _, report = train(tiny_engine, rows, search=SearchOptions.quick(kinds=("ridge",), memory_mb=1, rows=3000))
    assert max(c.train for c in report.tried if c.stage == "specs") < 150
    assert max(c.train for c in report.tried if c.stage == "kinds") > 150


def test_bare_questions_are_a_choice(tiny_engine: Any, rows: Any) -> None:
    counts = {}
    for bare in (True, False, None):
        _, report = train(tiny_engine, rows, search=SearchOptions(**{**dict(FIXED), "bare": bare}))
        counts[bare] = {(c.bare, c.train) for c in report.tried}
    training = sum(r.part == "train" for r in rows)
    assert counts[True] == {(True, 2 * training)}
    assert counts[False] == {(False, training)}
    assert counts[None] == {(False, training), (True, 2 * training)}


def test_head_and_report_say_where_they_come_from(trained: Any, tiny_engine: Any, tmp_path: Path) -> None:
    head, report = trained
    assert head.fingerprint == tiny_engine.info.fingerprint
    assert head.details["spans"] == report.rows
    assert {"kvroute", "torch", "scikit-learn"} <= set(head.details["versions"])
    head.save(tmp_path)
    back = DifficultyHead.load(tmp_path, tiny_engine.info)
    assert back.windows is not None
    x = np.random.default_rng(0).normal(size=(5, head.predictor.dim)).astype(np.float32)
    assert (back.predict(x) == head.predict(x)).all()
    assert back.nearest(x, 2) == head.nearest(x, 2)
    assert back.nearest(x, 2)[0][0].question.startswith("question ")


# ------------------------------------------------------------------ answers


@pytest.fixture(scope="module")
def confident(tiny_engine: Any, rows: Any) -> tuple[DifficultyHead, TrainingReport]:
    options = SearchOptions.quick(kinds=("ridge", "trees"))
    return train(tiny_engine, rows, target="correct", search=options)


def test_a_confidence_is_trained_on_answers(confident: Any, tiny_engine: Any, rows: Any) -> None:
    head, report = confident
    assert head.target == "correct"
    layout = mode_layout(tiny_engine, rows, label_meta(tiny_engine))
    truth, ids, start = [], [], []
    for row in (r for r in rows if r.part == "test"):
        for a in (*row.fast, *row.slow):
            before = [*row.prompt_ids, *layout.suffix(a.mode)]
            ids.append([*before, *a.token_ids])
            start.append(len(before))
            truth.append(a.correct)
    from kvroute.pooling import pool

    p = np.empty(len(ids))
    for batch, reading in tiny_engine.read(ids, start, want=("kv",)):
        stop = [len(ids[i]) - 1 for i in batch]
        vectors = pool(reading.view, head.spec, start=[start[i] for i in batch], stop=stop)
        p[batch] = head.predict(np.asarray(vectors))
    assert p.min() >= 0
    assert p.max() <= 1
    assert report.held_out["auroc_right"] == pytest.approx(auroc(p, np.array(truth)), abs=0.02)  # ties by the map
    assert report.held_out["auroc_right"] > 0.75
    assert report.held_out["brier"] == pytest.approx(np.mean((p - truth) ** 2), abs=1e-3)
    assert report.held_out["calibration_error"] < 0.15
    fast = np.array([i % 2 == 0 for i in range(len(ids))])
    by_mode = auroc(p[fast], np.array(truth)[fast])
    assert report.held_out["auroc_fast_answers"] == pytest.approx(by_mode, abs=0.03)


def test_every_score_of_the_core_stands_beside_it(confident: Any) -> None:
    from kvroute import SCORES

    _, report = confident
    assert {*SCORES, "logits combined", "kv-coe combined", "all combined"} == set(report.baselines)
    for found in report.baselines.values():
        assert set(found) == {"auroc", "brier", "calibration_error", "n"}
        assert found["n"] == report.rows["test"]


def test_answers_to_like_questions_share_a_fold(tiny_engine: Any, rows: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    from kvroute.heads import training

    seen: list[Problem] = []
    original = training.search
    monkeypatch.setattr(training, "search", lambda e, p, *a, **k: seen.append(p) or original(e, p, *a, **k))
    train(tiny_engine, rows, target="correct")
    (problem,) = seen
    groups = np.array([e.group for e in problem.examples.items])
    assert len(problem.splits) == 5
    for fit, held in problem.splits:
        assert not set(groups[fit]) & set(groups[held])
    assert sorted(np.concatenate([h for _, h in problem.splits])) == list(range(len(groups)))
    assert {e.part for e in problem.examples.items} == {"train", "validation"}


# ------------------------------------------------------------------ parts


def test_layer_sets_are_each_named_once() -> None:
    assert layer_sets(range(6), 6) == ["all", "last:3", "first:3", (2, 3), "last:4", "first:2", "last:2", "last:1"]
    assert layer_sets(range(1), 1) == ["all"]
    assert layer_sets([1, 4], 6) == [(1, 4), (4,), (1,)]
    grid = spec_grid(range(30), 30)
    assert len(grid) == len(set(grid)) == 8 * 3 * 7
    assert grid[0] == PoolingSpec(layers="all", part="kv", heads="concat")


def test_heads_are_averaged_where_they_are_too_many(tiny_engine: Any, rows: Any, monkeypatch: Any) -> None:
    from kvroute.heads import search as module

    monkeypatch.setattr(module, "_WIDEST", 40)
    _, report = train(tiny_engine, rows, search=SearchOptions.quick(kinds=("ridge",)))
    assert {c.spec.heads for c in report.tried if c.stage == "specs"} == {"mean"}
    assert max(c.spec.dimension(tiny_engine.info) for c in report.tried) <= 40


def test_no_text_is_read_twice_for_the_search(tiny_engine: Any, rows: Any) -> None:
    """The finalists' vectors come from the sums that specs were chosen on; only bare questions are read besides."""
    seen: list[tuple[int, ...]] = []

    class Counting:
        info = tiny_engine.info

        def prefill(self, token_ids: Any, **kwargs: Any) -> Any:
            seen.extend(tuple(ids) for ids in token_ids)
            return tiny_engine.prefill(token_ids, **kwargs)

    examples = prompt_examples(tiny_engine, [r for r in rows if r.part in ("train", "validation")], bare=True)
    problem = Problem(examples, ((examples.where("train"), examples.where("validation")),), False, -1)
    for most in (3000, 30):
        seen.clear()
        found = search(Counting(), problem, SearchOptions(kinds=("ridge",), rows=most))
        assert len(seen) == len(examples.texts)
        (wanted,) = pool_spans(tiny_engine, found.problem.examples, [found.candidate.spec])
        np.testing.assert_allclose(found.x, wanted, atol=1e-4)


def spans(right: Any) -> Examples:
    made = prompt_examples(None, label_rows(len(right)), bare=False)  # type: ignore[arg-type]
    return Examples(made.texts, tuple(replace(e, right=float(r)) for e, r in zip(made.items, right, strict=True)))


def test_the_probability_never_rises_with_the_difficulty() -> None:
    rng = np.random.default_rng(0)
    d = rng.uniform(0, 100, 400)
    grid = np.linspace(-10, 110, 200)[:, None]
    learned = fit_probability(d, spans(rng.uniform(size=400) < 1 / (1 + np.exp((d - 50) / 10))), rising=False)
    assert learned(grid)[0] > 0.9
    assert learned(grid)[-1] < 0.1
    assert (np.diff(learned(grid)) <= 0).all()
    turned = fit_probability(d, spans(d > 50), rising=False)  # the wrong way round: the share, and no more
    assert turned(grid) == pytest.approx(np.mean(d > 50), abs=0.01)
    alone = fit_probability(d, spans(np.ones(400)), rising=False)(grid)
    assert ((alone > 0.99) & (alone < 1)).all()


def test_shares_of_samples_count_by_their_share() -> None:
    d = np.repeat([10.0, 90.0], 100)
    learned = fit_probability(d, spans(np.repeat([0.75, 0.25], 100)), rising=False)
    assert learned(np.array([[10.0], [90.0]])) == pytest.approx([0.75, 0.25], abs=0.03)


# ------------------------------------------------------------------ bad input


def test_labels_of_another_model_are_refused(tiny_engine: Any, rows: Any) -> None:
    meta = label_meta(tiny_engine, fingerprint="f" * 16, model="other")
    with pytest.raises(ModelMismatchError, match=r"other.*tiny-llama"):
        train_head(tiny_engine, rows, meta)


def test_what_can_not_be_trained_on_is_said(tiny_engine: Any, rows: Any) -> None:
    with pytest.raises(InvalidInputError, match="'validation', and there are 0"):
        train(tiny_engine, [r for r in rows if r.part == "train"])
    bare = [r.model_copy(update={"prompt_ids": ()}) for r in rows]
    with pytest.raises(InvalidInputError, match="no prompt_ids"):
        train(tiny_engine, bare)
    plain = [
        r.model_copy(update={"slow": tuple(a.model_copy(update={"checkpoints": ()}) for a in r.slow)}) for r in rows
    ]
    with pytest.raises(InvalidInputError, match="there are 0 and 0"):
        train(tiny_engine, plain, windows=True)
    assert train(tiny_engine, plain, windows=None)[0].windows is None
    with pytest.raises(SpecError, match="sif"):
        train(tiny_engine, rows, search=SearchOptions(spec=PoolingSpec(weights="sif")))
    with pytest.raises(SpecError, match="kinds"):
        train(tiny_engine, rows, kinds=("forest",))
    with pytest.raises(InvalidInputError, match="target"):
        train(tiny_engine, rows, target="nonsense")
    wrong = [r.model_copy(update={"fast": (), "slow": r.slow[:0]}) for r in rows]
    with pytest.raises(InvalidInputError, match="right and 0 wrong"):
        train(tiny_engine, wrong, target="correct")


def test_failed_rows_are_passed_over(tiny_engine: Any, rows: Any) -> None:
    failed = [r.model_copy(update={"label": None, "error": "x", "fast": (), "slow": ()}) for r in rows[:30]]
    _, report = train(tiny_engine, [*failed, *rows[30:]])
    assert sum(report.rows.values()) == sum(r.part != "calibration" for r in rows[30:])


def test_without_test_rows_there_are_no_figures(tiny_engine: Any, rows: Any) -> None:
    head, report = train(tiny_engine, [r for r in rows if r.part != "test"])
    assert head.metrics == report.held_out == {}
    assert report.validation["n"] == report.rows["validation"]
    assert report.rows["test"] == 0


def test_search_sees_what_it_is_given_alone(tiny_engine: Any, rows: Any) -> None:
    """The problem that is handed in holds no test span, so none can be chosen by."""
    examples = prompt_examples(tiny_engine, [r for r in rows if r.part in ("train", "validation")], bare=False)
    problem = Problem(examples, ((examples.where("train"), examples.where("validation")),), False, -1)
    found = search(tiny_engine, problem, FIXED)
    assert found.candidate.auroc == pytest.approx(
        auroc(-found.predictions, examples.take(examples.where("validation")).right >= 0.5)
    )
