"""``kvroute train`` on a tiny model: the folder, the tables, JSON, and what it refuses."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest

from kvroute import DifficultyHead, ModelInfo, SelfEvaluator, TransformersEngine
from kvroute.files import read_json
from kvroute.label_rows import write_meta
from label_data import label_meta, label_rows

Run = Callable[..., tuple[int, str, str]]


@pytest.fixture(scope="module")
def model(tiny_folder: Callable[[str], str]) -> str:
    return tiny_folder("llama")


@pytest.fixture(scope="module")
def info(model: str) -> ModelInfo:
    return TransformersEngine.from_pretrained(model).info


@pytest.fixture(scope="module")
def labels(model: str, tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("labels") / "labels.jsonl"
    path.write_text("".join(r.model_dump_json() + "\n" for r in label_rows(240)))
    write_meta(path, label_meta(TransformersEngine.from_pretrained(model)))
    return path


def test_a_head_is_trained_and_saved(run: Run, model: str, labels: Path, info: ModelInfo, tmp_path: Path) -> None:
    out = tmp_path / "heads" / "one"
    options = ("train", labels, "-o", out, "-m", model, "--quick", "--kind", "ridge", "--seed", 1)
    code, text, _ = run(*options)
    assert code == 0
    assert "auroc_fast_right" in text
    assert "windows in mid-thought" in text
    head = DifficultyHead.load(out, info)
    assert (head.kind, head.target) == ("ridge", "difficulty")
    assert head.windows is not None
    report = read_json(out / "search.json", "kvroute.search")
    assert report["held_out"] == head.metrics
    assert len({json.dumps(c["spec"]) for c in report["tried"]}) > 50
    assert report["windows"]["tried"]
    assert run(*options)[0] == 2  # it is there already
    code, text, _ = run(*options, "--force", "--json", "--no-windows")
    assert code == 0
    said = json.loads(text)
    assert said["held_out"] == head.metrics  # the same head from the same seed
    assert said["windows"] is None
    assert said["tried"] == len(report["tried"])
    assert DifficultyHead.load(out, info).windows is None


def test_a_spec_is_a_preset_a_file_or_json(run: Run, model: str, labels: Path, info: ModelInfo, tmp_path: Path) -> None:
    file = tmp_path / "spec.json"
    file.write_text('{"layers": "all", "part": "v"}')
    given = {"a": "paper-classifier", "b": file, "c": '{"layers": [1, 2], "part": "k"}'}
    for name, spec in given.items():
        code, _, err = run(
            "train", labels, "-o", tmp_path / name, "-m", model, "--spec", spec, "--kind", "ridge", "--no-windows"
        )
        assert code == 0, err
    specs = [DifficultyHead.load(tmp_path / n, info).spec for n in given]
    assert [s.part for s in specs] == ["kv", "v", "k"]
    assert specs[0].window == 64
    assert specs[2].layers == (1, 2)


def test_a_confidence_stands_beside_the_core_s_scores(run: Run, model: str, labels: Path, tmp_path: Path) -> None:
    options = ("train", labels, "-m", model, "--target", "correct", "--quick", "--kind", "ridge")
    code, text, _ = run(*options, "-o", tmp_path / "a")
    assert code == 0
    assert "logits combined" in text
    code, text, _ = run(*options, "-o", tmp_path / "b", "--json")
    said = json.loads(text)
    assert said["target"] == "correct"
    assert 0.5 < said["held_out"]["auroc_right"] <= 1
    assert said["baselines"]["length"]["n"] == said["rows"]["test"]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (("--kind", "forest"), "No kind of head is named 'forest'"),
        (("--target", "mood"), "target is difficulty or correct"),
        (("--spec", "nonsense"), "no preset and no file"),
        (("--spec", "{"), "Not a PoolingSpec"),
        (("--spec", '{"layers": [99]}'), "Layer 99"),
        (("--budget-seconds", "0"), "budget_seconds"),
    ],
)
def test_bad_options(
    run: Run, model: str, labels: Path, tmp_path: Path, options: tuple[str, ...], message: str
) -> None:
    code, _, err = run("train", labels, "-o", tmp_path / "x", "-m", model, *options)
    assert code == 2
    assert message in err
    assert not (tmp_path / "x").exists()


def test_what_can_not_be_saved_is_said_before_the_work(run: Run, model: str, labels: Path, tmp_path: Path) -> None:
    file = tmp_path / "file"
    file.write_text("mine")
    for out in (file, file / "head"):
        code, _, err = run("train", labels, "-o", out, "-m", model, "--force", "--quick")
        assert code == 2
        assert "not a folder that can be written to" in err
    assert file.read_text() == "mine"


def test_labels_of_another_model_or_without_header(run: Run, model: str, labels: Path, tmp_path: Path) -> None:
    other = tmp_path / "labels.jsonl"
    other.write_bytes(labels.read_bytes())
    code, _, err = run("train", other, "-o", tmp_path / "x", "-m", model)
    assert code == 2
    assert "labels.jsonl.meta.json" in err
    write_meta(other, label_meta(TransformersEngine.from_pretrained(model), fingerprint="f" * 16, model="somebody"))
    code, _, err = run("train", other, "-o", tmp_path / "x", "-m", model)
    assert code == 2
    assert "somebody" in err


def test_a_trained_confidence_is_shown(run: Run, model: str, labels: Path, tmp_path: Path) -> None:
    """By ``score`` and by ``ask``: that of SelfEvaluator with the head."""
    head = tmp_path / "head"
    assert run("train", labels, "-m", model, "--target", "correct", "--quick", "--kind", "ridge", "-o", head)[0] == 0
    file = tmp_path / "rows.jsonl"
    file.write_text('{"prompt": "the quick", "answer": " brown fox jumps"}\n{"prompt": "a", "answer": " cat sat"}\n')
    code, out, err = run("score", file, "-m", model, "--head", head, "--scores", "length")
    assert code == 0, err
    rows = [json.loads(line) for line in out.splitlines()]
    engine = TransformersEngine.from_pretrained(model)
    expected = SelfEvaluator(engine, head=head).score_many([(r["prompt"], r["answer"]) for r in rows])
    assert [r["confidence"] for r in rows] == pytest.approx([e.confidence for e in expected])
    assert all(0 <= r["confidence"] <= 1 for r in rows)
    code, out, err = run("ask", "the quick", "-m", model, "--head", head, "--max-tokens", "8", "--json")
    assert code == 0, err
    said = json.loads(out)
    evaluator = SelfEvaluator(engine, head=head)
    answer = engine.generate([{"role": "user", "content": "the quick"}], features=evaluator.features, max_tokens=8)
    assert said["text"] == answer.text
    assert said["confidence"] == pytest.approx(evaluator.confidence(answer)[0])
    code, _, err = run("score", file, "-m", model, "--head", tmp_path / "none")
    assert code == 2
    assert "head.json" in err
