"""``kvroute evaluate scores`` on a tiny model: what is read, what is kept, what is judged, and what is refused."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from kvroute import PoolingSpec, SelfEvaluator, TransformersEngine
from kvroute.answer_scores import read_scores, score_table
from kvroute.confidence_maps import auroc, fit_map
from kvroute.errors import EmptyTextError, InvalidInputError
from kvroute.generation import TokenIds
from kvroute.heads import DifficultyHead
from kvroute.heads.fitting import Rows, fit_ridge
from kvroute.label_rows import usable, write_meta
from kvroute.labelled_answers import LabelledAnswer, label_answers, read_answer_sets
from kvroute.score_evaluation import evaluate_scores
from kvroute.scores import SCORES
from label_data import label_meta, label_rows

Run = Callable[..., tuple[int, str, str]]
SPEC = PoolingSpec(layers="all", part="v", heads="concat", layer_reduce="concat")


@pytest.fixture(scope="module")
def model(tiny_folder: Callable[[str], str]) -> str:
    return tiny_folder("llama")


@pytest.fixture(scope="module")
def engine(model: str) -> TransformersEngine:
    return TransformersEngine.from_pretrained(model, dtype="float32")


@pytest.fixture(scope="module")
def labels(engine: TransformersEngine, tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("labels") / "sums.jsonl"
    path.write_text("".join(r.model_dump_json() + "\n" for r in label_rows(300)))
    write_meta(path, label_meta(engine))
    return path


@pytest.fixture(scope="module")
def head(engine: TransformersEngine) -> DifficultyHead:
    """A ridge on the answers of train rows."""
    rows = usable(label_rows(300), "train")
    answers = label_answers(engine, rows, label_meta(engine), "fast")
    truth = np.array([a.correct for a in answers], dtype=float)
    texts = [[*a.prompt.ids, *a.answer] for a in answers]  # type: ignore[union-attr,misc]
    vectors = []
    for ids, answer in zip(texts, answers, strict=True):
        for _, view in engine.prefill([ids[:-1]], progress=False):
            from kvroute.pooling import pool

            start = len(ids) - len(answer.answer)
            vectors.append(pool(view, SPEC, num_layers=engine.info.num_layers, start=[start], stop=[len(ids) - 1])[0])
    x = np.stack([v.numpy() for v in vectors])
    fitted = fit_ridge(Rows(x, truth), None, {"alpha": 0.1}).model
    return DifficultyHead(
        spec=SPEC, target="correct", predictor=fitted, map=fit_map(fitted(x)[:, None], truth > 0.5, "logistic"),
        model=engine.info.name, fingerprint=engine.info.fingerprint, data_hash="abc", details={"questions": "d"},
    )  # fmt: skip


def answers_of(engine: TransformersEngine, n: int) -> list[LabelledAnswer]:
    return label_answers(engine, usable(label_rows(n)), label_meta(engine), "fast")


def test_scores_are_those_of_self_evaluation(engine: TransformersEngine, head: DifficultyHead) -> None:
    answers = answers_of(engine, 12)
    found = read_scores(engine, answers, head=head, progress=False)
    evaluator = SelfEvaluator(engine, scores=[n for n in SCORES if n != "p_true"], head=head)
    alone = evaluator.score_many([(a.prompt, a.answer) for a in answers], progress=False)
    asked = SelfEvaluator(engine, scores=["p_true"]).score_many([(a.question, a.text) for a in answers], progress=False)
    for row, one, p_true in zip(found, alone, asked, strict=True):
        assert list(row) == [*SCORES, "confidence"]
        assert row["confidence"].value == one.confidence
        assert row["p_true"].value == pytest.approx(p_true.scores["p_true"].value)
        for name, score in one.scores.items():
            assert row[name] == score, name
    assert score_table(found)["length"].tolist() == [float(len(a.answer)) for a in answers]


class Counting:
    """An engine that counts the answers it reads, and stops after so many calls."""

    def __init__(self, engine: TransformersEngine, calls: int = 10**9) -> None:
        self._engine, self.left, self.read_answers, self.wants = engine, calls, 0, []

    def __getattr__(self, name: str) -> Any:
        return getattr(self._engine, name)

    def read(self, token_ids: Any, start: Any, **options: Any) -> Any:
        self.left -= 1
        if self.left < 0:
            raise KeyboardInterrupt
        self.read_answers += len(token_ids)
        self.wants.append(sorted(options["want"]))
        return self._engine.read(token_ids, start, **options)


def test_one_pass_reads_everything_and_a_second_run_reads_nothing(
    engine: TransformersEngine, head: DifficultyHead, tmp_path: Path
) -> None:
    answers = answers_of(engine, 40)
    first: Any = Counting(engine)
    found = read_scores(first, answers, head=head, folder=tmp_path, progress=False)
    assert first.wants == [["hidden", "kv", "logits"]]
    again: Any = Counting(engine)
    assert read_scores(again, answers, head=head, folder=tmp_path, progress=False) == found
    assert again.wants == []
    # Another head: its vectors alone are read. No head: nothing.
    other = DifficultyHead(
        **{
            **vars(head),
            "data_hash": "x",
            "map": fit_map(np.array([[0.0], [1.0]]), np.array([True, False]), "logistic"),
        }
    )
    judged = read_scores(again, answers, head=other, folder=tmp_path, progress=False)
    assert again.wants == [["kv"]]
    assert judged[0]["confidence"] != found[0]["confidence"]
    assert judged[0]["entropy"] == found[0]["entropy"]
    assert "confidence" not in read_scores(again, answers, folder=tmp_path, progress=False)[0]
    assert len(again.wants) == 1
    # A torn file is made anew, and another answer is another file.
    torn = next(tmp_path.glob("scores-*.safetensors"))
    torn.write_bytes(torn.read_bytes()[:-9])
    assert read_scores(again, answers, head=head, folder=tmp_path, progress=False) == found
    assert again.wants[1:] == [["hidden", "kv", "logits"]]


def test_a_run_that_was_killed_goes_on(
    engine: TransformersEngine, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("kvroute.answer_scores._CHUNK", 10)
    answers = answers_of(engine, 40)
    killed: Any = Counting(engine, calls=2)
    with pytest.raises(KeyboardInterrupt):
        read_scores(killed, answers, folder=tmp_path, progress=False)
    rest: Any = Counting(engine)
    found = read_scores(rest, answers, folder=tmp_path, progress=False)
    assert rest.read_answers == len(answers) - 20
    assert found == read_scores(engine, answers, progress=False)


def test_an_answer_that_is_too_short_says_so_and_an_empty_one_is_refused(
    engine: TransformersEngine, tmp_path: Path
) -> None:
    short = LabelledAnswer(TokenIds((70, 71)), (72,), "x", "what?", True, "g")
    for _ in range(2):  # computed, then kept
        (row,) = read_scores(engine, [short], folder=tmp_path, progress=False)
        assert row["kv_coe_r_token"].value is None
        assert "vectors" in str(row["kv_coe_r_token"].reason) or "token" in str(row["kv_coe_r_token"].reason)
        assert row["mean_logprob"].value is not None
    with pytest.raises(EmptyTextError, match="Text 1"):
        read_scores(engine, [short, LabelledAnswer(TokenIds((70,)), (), "", "what?", True, "g")], progress=False)


def test_labels_give_a_set_a_mode_and_judge_test_rows(engine: TransformersEngine, labels: Path) -> None:
    fast, slow = read_answer_sets(labels, engine)
    assert (fast.name, slow.name) == ("sums (fast)", "sums (slow)")
    rows = usable(label_rows(300))
    assert int(fast.judged.sum()) == sum(r.part == "test" for r in rows)
    assert {a.part for a in fast.answers} == {"train", "validation", "test"}
    (one,) = read_answer_sets(labels, engine, part="all", mode="slow")
    assert one.name == "sums"
    assert one.judged.all()
    assert len(one) == len(rows)
    assert {a.mode for a in one.answers} == {"slow"}
    (held,) = read_answer_sets(labels, engine, part="calibration", mode="fast")
    assert {a.part for a, j in zip(held.answers, held.judged, strict=True) if j} == {"calibration"}
    assert "test" not in {a.part for a in held.answers}


def test_the_head_is_judged_beside_the_scores(engine: TransformersEngine, labels: Path, head: DifficultyHead) -> None:
    sets = read_answer_sets(labels, engine, mode="fast")
    report = evaluate_scores(engine, sets, head=head, resamples=200, progress=False)
    found = report.sets[0]
    test = [a for a, j in zip(sets[0].answers, sets[0].judged, strict=True) if j]
    rows = read_scores(engine, test, head=head, progress=False)
    table = score_table(rows)
    truth = np.array([a.correct for a in test])
    assert found.drawn["confidence"].value["auroc"] == pytest.approx(auroc(table["confidence"], truth))
    assert found.drawn["entropy"].value["auroc"] == pytest.approx(auroc(-table["entropy"], truth))
    assert report.mean("confidence").value["auroc"] > 0.7  # the tokens tell
    assert found.fitted_on > 100
    with pytest.raises(InvalidInputError, match="trained on questions of sums"):
        evaluate_scores(engine, read_answer_sets(labels, engine, part="all", mode="fast"), head=head)


@pytest.fixture(scope="module")
def plain(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("plain") / "answers.jsonl"
    rng = np.random.default_rng(0)
    rows: list[dict[str, Any]] = []
    for i in range(60):
        right = bool(rng.integers(2))
        words = " ".join(rng.choice(["the", "quick", "fox", "dog"], 6)) + (" cat" if right else " jumps")
        asked: dict[str, Any] = [
            {"question": f"what {i}?"},
            {"prompt": f"what {i}?"},
            {"messages": [{"role": "user", "content": f"what {i}?"}]},
        ][i % 3]
        rows.append({**asked, "answer": words, "correct": right, "id": i})
    path.write_text("".join(json.dumps(r) + "\n" for r in rows))
    return path


def test_the_command_writes_json_and_a_page(run: Run, model: str, plain: Path, labels: Path, tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    out = tmp_path / "report"
    options = (
        "evaluate",
        "scores",
        plain,
        labels,
        "-m",
        model,
        "-o",
        out,
        "--bootstrap",
        100,
        "--dtype",
        "float32",
        "-q",
    )
    code, text, err = run(*options, "--json")
    assert code == 0, err
    said = json.loads(text)
    written = json.loads((out / "report.json").read_text())
    assert set(said["sets"]) == {"answers", "sums (fast)", "sums (slow)"}
    assert said["sets"]["answers"]["answers"] == 60
    assert "risk_coverage" in written["sets"]["answers"]["scores"]["entropy"]
    assert "risk_coverage" not in said["sets"]["answers"]["scores"]["entropy"]
    assert said["mean"] == written["mean"]
    page = (out / "report.html").read_text()
    for heading in ("AUROC", "Risk and coverage", "Calibration", "Distributions"):
        assert heading in page
    assert page.count("<svg") >= 4
    assert run(*options)[0] == 2  # it is there already
    before = (out / "report.json").read_bytes()
    code, text, err = run(*options, "--force")
    assert code == 0, err
    assert "Against the best score" in text
    assert (out / "report.json").read_bytes() == before


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ('{"question": "q", "answer": "a"}', "line 1: 'correct' is not true or false"),
        ('{"question": "q", "answer": "", "correct": true}', "line 1: the answer is empty"),
        ('{"answer": "a", "correct": true}', "line 1: no question, prompt or messages"),
        ('{"messages": 3, "answer": "a", "correct": true}', "messages is not a list"),
        ('{"question": "q", "answer": "a", "correct": true, "finish_reason": "x"}', "finish_reason is stop"),
        ("", "holds no answer"),
        ('{"question": "q", "answer": "a b c d", "correct": true}', "1 right and 0 wrong"),
    ],
)
def test_rows_that_can_not_be_used(run: Run, model: str, tmp_path: Path, line: str, message: str) -> None:
    file = tmp_path / "bad.jsonl"
    file.write_text(line + "\n")
    code, _, err = run("evaluate", "scores", file, "-m", model, "-o", tmp_path / "out", "-q")
    assert code == 2
    assert message in err
    assert not (tmp_path / "out" / "report.json").exists()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (("--part", "train"), "part is auto"),
        (("--part", "test"), "has no parts"),
        (("--mode", "quick"), "mode is fast"),
        (("--engine", "vllm"), "vLLM does not hand out"),
        (("--head", "nowhere"), "nowhere"),
    ],
)
def test_options_that_can_not_be_used(
    run: Run, model: str, plain: Path, tmp_path: Path, options: tuple[str, ...], message: str
) -> None:
    code, _, err = run("evaluate", "scores", plain, "-m", model, "-o", tmp_path / "out", "-q", *options)
    assert code == 2
    assert message in err
