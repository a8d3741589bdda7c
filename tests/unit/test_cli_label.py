"""``kvroute label`` on a tiny model: rows, header, failing rows, and runs that are killed."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from kvroute import TransformersEngine, label_questions, read_labels
from kvroute.label_rows import meta_path, usable
from kvroute.questions import read_questions
from kvroute.rows import parse_jsonl
from kvroute.thinking import ThinkingMode

Run = Callable[..., tuple[int, str, str]]
SMALL = ("--max-fast", 6, "--max-slow", 12, "-q")


@pytest.fixture(scope="module")
def model(tiny_folder: Callable[[str], str]) -> str:
    return tiny_folder("llama")


def question(i: int, **other: Any) -> dict[str, Any]:
    text = f"How much is {i} plus {'a' * (i % 5 + 1)}?"
    return {"id": f"q{i}", "question": text, "answer": str(i), "answer_type": "number", "level": i % 3} | other


@pytest.fixture
def file(tmp_path: Path) -> Path:
    path = tmp_path / "questions.jsonl"
    path.write_text("".join(json.dumps(question(i)) + "\n" for i in range(7)))
    return path


def test_rows_and_header(run: Run, model: str, file: Path, tmp_path: Path) -> None:
    out = tmp_path / "labels.jsonl"
    options = ("--checkpoints", 5, "--prompt", "Say: {question}", "--shares", "0.25,0.25,0.25,0.25", "--chunk", 3)
    code, printed, err = run("label", file, "-o", out, "--model", model, *SMALL, *options, "--dtype", "float32")
    assert code == 0, err
    assert "7 rows in" in err
    assert "right" in printed
    rows, meta = read_labels(out)
    engine = TransformersEngine.from_pretrained(model, dtype="float32")
    questions = read_questions(parse_jsonl(file.read_text(), file), file)
    limits = {"fast": 6, "slow": 12}
    wanted = list(
        label_questions(
            engine, questions, max_tokens=limits, checkpoints=5, prompt="Say: {question}", chunk=3,
            shares=dict.fromkeys(("train", "validation", "calibration", "test"), 0.25),
        )
    )  # fmt: skip
    assert rows == wanted
    assert [r.extra for r in rows] == [{"level": i % 3} for i in range(7)]
    assert (meta.fingerprint, meta.max_tokens, meta.checkpoints) == (engine.info.fingerprint, limits, 5)
    assert (meta.prompt, meta.thinking) == ("Say: {question}", ThinkingMode.instructions())
    assert set(meta.versions) == {"kvroute", "torch", "transformers", "python"}
    assert not list(tmp_path.glob("*.partial*"))


def test_json_limit_and_instructions(run: Run, model: str, file: Path, tmp_path: Path) -> None:
    out = tmp_path / "labels.jsonl"
    words = ("--fast-instruction", "Be quick.", "--slow-instruction", "Be slow.")
    code, printed, err = run("label", file, "-o", out, "--model", model, *SMALL, *words, "--limit", 2, "--json")
    assert code == 0, err
    found = json.loads(printed)
    assert (found["rows"], found["labelled"], found["resumed"], found["failed"]) == (2, 2, 0, 0)
    assert found["all"][0]["rows"] == 2
    rows, meta = read_labels(out)
    assert [r.id for r in rows] == ["q0", "q1"]
    assert (meta.thinking.fast, meta.thinking.slow) == ("\nBe quick.", "\nBe slow.")


def test_a_pair_from_a_file_and_samples(run: Run, model: str, file: Path, tmp_path: Path) -> None:
    pair = ThinkingMode(fast="F", slow="S", leave="L", enter="E", close="</think>")
    (tmp_path / "pair.json").write_text(pair.to_json())
    out = tmp_path / "labels.jsonl"
    options = ("--thinking", tmp_path / "pair.json", "--samples", 3, "--temperature", 1.0, "--seed", 4, "--short", 5)
    code, _, err = run("label", file, "-o", out, "--model", model, *SMALL, *options, "--limit", 2)
    assert code == 0, err
    rows, meta = read_labels(out)
    assert meta.thinking == pair
    assert (meta.samples, meta.temperature, meta.seed, meta.short) == (3, 1.0, 4, 5)
    assert [len(r.fast) for r in rows] == [len(r.slow) for r in rows] == [3, 3]
    assert [a.seed for a in rows[0].fast] == [12, 13, 14]


def test_failed_rows_are_kept_and_retried(
    run: Run, model: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from kvroute import checkers

    rows = [question(i) for i in range(6)]
    rows[1] |= {"answer_type": "moody"}
    rows[4] |= {"answer_type": "moody"}
    file, out = tmp_path / "q.jsonl", tmp_path / "labels.jsonl"
    file.write_text("".join(json.dumps(r) + "\n" for r in rows))
    arguments = ("label", file, "-o", out, "--model", model, *SMALL)
    code, _, err = run(*arguments)
    assert code == 0
    assert "2 rows failed" in err
    found = read_labels(out)[0]
    assert [r.id for r in found if r.error] == ["q1", "q4"]
    before = out.read_bytes().splitlines()
    assert run(*arguments)[0] == 2  # there already
    code, _, err = run(*arguments, "--short", 9, "--retry")
    assert code == 2
    assert "short" in err
    assert run(*arguments, "--limit", 5, "--retry")[0] == 2
    monkeypatch.setitem(checkers.CHECKERS, "moody", lambda text, answer: True)
    code, printed, err = run(*arguments, "--retry", "--json")
    assert code == 0, err
    assert (json.loads(printed)["labelled"], json.loads(printed)["failed"]) == (2, 0)
    after = out.read_bytes().splitlines()
    assert [a == b for a, b in zip(after, before, strict=True)] == [True, False, True, True, False, True]
    again = read_labels(out)[0]
    assert [again[i].label for i in (1, 4)] == [0.0, 0.0]
    assert len(usable(again)) == 6
    out.with_suffix(".copy").write_bytes(out.read_bytes())
    assert run(*arguments, "--retry")[0] == 0  # nothing is left to do
    assert out.read_bytes() == out.with_suffix(".copy").read_bytes()
    assert run(*arguments, "--force")[0] == 0
    assert out.read_bytes() == out.with_suffix(".copy").read_bytes()  # as one run would have written


def test_tolerance(run: Run, model: str, file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from kvroute import checkers

    seen = []
    original = checkers.check_number

    def noted(text: str, answer: str, *, tolerance: float = 0.0) -> checkers.CheckResult:
        seen.append(tolerance)
        return original(text, answer, tolerance=tolerance)

    monkeypatch.setattr(checkers, "check_number", noted)
    out = tmp_path / "labels.jsonl"
    assert run("label", file, "-o", out, "--model", model, *SMALL, "--limit", 1, "--tolerance", 0.04)[0] == 0
    assert set(seen) == {0.04}


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (("--shares", "0.5,0.5"), "four numbers"),
        (("--shares", "0.5,0.5,x,0"), "four numbers"),
        (("--shares", "0.5,0.5,0.5,0"), "add up to 1"),
        (("--limit", 0), "--limit"),
        (("--chunk", 0), "--chunk"),
        (("--samples", 2), "temperature"),
        (("--tolerance", 2), "tolerance"),
        (("--prompt", "x"), "{question}"),
        (("--thinking", "nowhere.json"), "no file"),
        (("--thinking", "nowhere.json", "--fast-instruction", "x"), "exclude"),
        (("-o", "labels.txt"), ".jsonl"),
    ],
)
def test_misuse(run: Run, model: str, file: Path, tmp_path: Path, options: tuple[object, ...], message: str) -> None:
    code, out, err = run("label", file, "-o", tmp_path / "labels.jsonl", "--model", model, *SMALL, *options)
    assert (code, out) == (2, "")
    assert message in err
    assert not (tmp_path / "labels.jsonl").exists()


def test_bad_files(run: Run, model: str, tmp_path: Path) -> None:
    for text, message in (
        ("", "holds no question"),
        ('{"question": "x"}\n', "line 1: no field 'answer'"),
        ("x", "JSON"),
    ):
        (tmp_path / "q.jsonl").write_text(text)
        code, _, err = run("label", tmp_path / "q.jsonl", "-o", tmp_path / "l.jsonl", "--model", model)
        assert code == 2
        assert message in err


KILLS = 50
# Lives are forks of one process that has all imports and the model: 50 starts of an interpreter would take minutes.
_KILLING = """
import os, random, signal, sys, time
from pathlib import Path

import torch
import kvroute.cli.label, kvroute.label_rows, kvroute.label_summary, kvroute.labelling
from kvroute import TransformersEngine
from kvroute.cli import main

folder, model, kills = Path(sys.argv[1]), sys.argv[2], int(sys.argv[3])
torch.set_num_threads(1)
engine = TransformersEngine.from_pretrained(model, dtype="float32")
kvroute.cli.label.load_engine = lambda *_: engine
rng = random.Random(0)


def begin(out):
    process = os.fork()
    if process == 0:
        try:
            main(["label", str(folder / "q.jsonl"), "-o", str(folder / out), *sys.argv[4:]])
        except SystemExit as ended:
            os._exit(ended.code or 0)
        os._exit(9)
    return process


def chunks():
    try:
        return sum(name.startswith("0") for name in os.listdir(folder / "cut.jsonl.partial"))
    except FileNotFoundError:  # not there yet, or no longer
        return 0


began = time.monotonic()
assert os.waitpid(begin("whole.jsonl"), 0)[1] == 0
chunk = (time.monotonic() - began) / len((folder / "whole.jsonl").read_bytes().splitlines())
done, places, rounds = 0, [], 0
while True:
    process, ended = begin("cut.jsonl"), (0, 0)
    if done < kills:
        # Not by the clock alone: on a busy machine a life would never come to its first chunk.
        goal = chunks() + rng.randrange(3)
        while chunks() < goal and ended[0] == 0:
            time.sleep(chunk / 20)
            ended = os.waitpid(process, os.WNOHANG)
        if ended[0] == 0:
            time.sleep(rng.uniform(0, 2 * chunk))
            os.kill(process, signal.SIGKILL)
    if ended[0] == 0:
        ended = os.waitpid(process, 0)
    if ended[1] == signal.SIGKILL:
        done += 1
        places.append(chunks())
        if not (folder / "cut.jsonl").exists():
            continue  # else it was killed after its work, before its exit
    else:
        assert ended[1] == 0, ended
    rounds += 1
    assert (folder / "cut.jsonl").read_bytes() == (folder / "whole.jsonl").read_bytes(), "the rows differ"
    if done >= kills:
        break
    (folder / "cut.jsonl").unlink()  # it came to its end before the last kill: once more from the beginning
print(done, rounds, len(set(places)))
"""


@pytest.mark.slow
def test_killed_fifty_times_it_ends_with_every_row_once(
    tmp_path: Path, tiny_model: Callable[..., Any], tiny_tokenizer: Any
) -> None:
    tiny_model("llama", num_hidden_layers=1).save_pretrained(tmp_path / "model")
    tiny_tokenizer.save_pretrained(tmp_path / "model")
    rows = [question(i) for i in range(40)]
    (tmp_path / "q.jsonl").write_text("".join(json.dumps(r) + "\n" for r in rows))
    options = ["--chunk", "1", "--max-fast", "3", "--max-slow", "7", "--checkpoints", "3", "--json", "-q"]
    done = subprocess.run(
        [sys.executable, "-c", _KILLING, str(tmp_path), str(tmp_path / "model"), str(KILLS), *options],
        env={**os.environ, "OMP_NUM_THREADS": "1", "TOKENIZERS_PARALLELISM": "false"},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    kills, rounds, places = map(int, done.stdout.splitlines()[-1].split())
    assert kills == KILLS
    assert rounds >= 1
    assert places > 5  # killed at many different places
    found, _ = read_labels(tmp_path / "cut.jsonl")
    assert [r.id for r in found] == [r["id"] for r in rows]
    assert (tmp_path / "cut.jsonl").read_bytes() == (tmp_path / "whole.jsonl").read_bytes()
    header = (meta_path(tmp_path / name).read_bytes() for name in ("cut.jsonl", "whole.jsonl"))
    assert len(set(header)) == 1
