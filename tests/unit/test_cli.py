"""Every command on a tiny model: outputs, JSON, exit codes, and runs that are killed."""

from __future__ import annotations

import json
import os
import random
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import pytest

from kvroute import KVEmbedder, SelfEvaluator, TransformersEngine
from kvroute.cli import main


@pytest.fixture(scope="module")
def model(tiny_folder: Callable[[str], str]) -> str:
    return tiny_folder("llama")


@pytest.fixture(scope="module")
def engine(model: str) -> TransformersEngine:
    return TransformersEngine.from_pretrained(model, dtype="float32")


Run = Callable[..., tuple[int, str, str]]


def test_version_and_help(run: Run) -> None:
    from kvroute import __version__

    assert run("--version") == (0, f"{__version__}\n", "")
    code, out, _ = run("--help")
    assert code == 0
    assert all(c in out for c in ("info", "embed", "score", "ask", "calibrate", "evaluate"))
    assert "routing" in run("evaluate", "--help")[1]


def test_info(run: Run, model: str, engine: TransformersEngine) -> None:
    code, out, _ = run("info", model, "--json")
    found = json.loads(out)
    assert code == 0
    assert found["fingerprint"] == engine.info.fingerprint
    assert found["presets"]["paper-classifier"]["layers_run"] == engine.info.num_layers
    assert engine.info.fingerprint in run("info", model)[1]


@pytest.mark.parametrize("suffix", [".npy", ".jsonl", ".parquet"])
def test_embed_writes_each_format(
    run: Run, model: str, engine: TransformersEngine, tmp_path: Path, suffix: str
) -> None:
    texts = [f"text number {i} {'x' * (i % 7)}" for i in range(20)]
    (tmp_path / "in.jsonl").write_text("\n".join(json.dumps({"id": f"r{i}", "body": t}) for i, t in enumerate(texts)))
    out = tmp_path / f"out{suffix}"
    code, said, _ = run(
        "embed",
        tmp_path / "in.jsonl",
        "--field",
        "body",
        "--out",
        out,
        "--model",
        model,
        "--spec",
        "paper-mteb",
        "--json",
    )
    assert code == 0
    assert json.loads(said)["texts"] == 20
    expected = KVEmbedder(engine, "paper-mteb").encode(texts)
    if suffix == ".npy":
        found = np.load(out)
        assert found.dtype == np.float32
    elif suffix == ".jsonl":
        rows = [json.loads(line) for line in out.read_text().splitlines()]
        assert [r["id"] for r in rows] == [f"r{i}" for i in range(20)]
        found = np.array([r["embedding"] for r in rows])
    else:
        table = pq.read_table(out)
        assert table["id"].to_pylist() == [f"r{i}" for i in range(20)]
        found = np.array(table["embedding"].to_pylist())
    np.testing.assert_allclose(found, expected, atol=1e-5)
    assert sorted(p.name for p in tmp_path.iterdir()) == sorted(["in.jsonl", out.name])


def test_embed_reads_lines_and_specs_and_fitted_embedders(
    run: Run, model: str, engine: TransformersEngine, tmp_path: Path
) -> None:
    texts = [f"{w} {i}" for i, w in enumerate(["one", "two", "three", "four", "five", "six", "seven", "eight"])]
    (tmp_path / "in.txt").write_text("\n".join(texts) + "\n")
    embedder = KVEmbedder(engine, "paper-mteb").fit(texts, dimension=3)
    embedder.save(tmp_path / "fitted")
    (tmp_path / "spec.json").write_text(embedder.spec.to_json())
    for arguments, expected in (
        (("--spec", tmp_path / "spec.json"), KVEmbedder(engine, embedder.spec).encode(texts)),
        (("--embedder", tmp_path / "fitted"), embedder.encode(texts)),
    ):
        out = tmp_path / "o.npy"
        assert run("embed", tmp_path / "in.txt", "--model", model, "--out", out, "--force", *arguments)[0] == 0
        np.testing.assert_allclose(np.load(out), expected, atol=1e-4)


def test_score_and_calibrate_and_ask(
    run: Run, model: str, engine: TransformersEngine, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    rng = random.Random(0)
    rows = [{"prompt": f"q{i}", "answer": "a" * rng.randint(3, 12), "correct": rng.random() < 0.5} for i in range(40)]
    rows[0] = {"messages": [{"role": "user", "content": "q0"}], "answer": "yes it is", "correct": True}
    (tmp_path / "rows.jsonl").write_text("\n".join(map(json.dumps, rows)))
    out = tmp_path / "scored.jsonl"
    assert run("score", tmp_path / "rows.jsonl", "--out", out, "--model", model)[0] == 0
    scored = [json.loads(line) for line in out.read_text().splitlines()]
    expected = SelfEvaluator(engine).score("q5", rows[5]["answer"])  # type: ignore[arg-type]
    assert scored[5]["scores"]["mean_logprob"] == pytest.approx(expected.scores["mean_logprob"].value, abs=1e-4)
    assert scored[5]["correct"] == rows[5]["correct"]
    assert scored[5]["confidence"] is None
    assert scored[5]["confidence_reason"]

    monkeypatch.setenv("KVROUTE_CALIBRATORS", str(tmp_path / "fitted"))
    options = ("calibrate", "--confidence", out, "--scores", "mean_logprob,length", "--model", model)
    code, said, _ = run(*options, "--name", "mine", "--json")
    assert code == 0
    assert json.loads(said)["rows"] == 40
    assert "Saved" in run(*options, "--name", "mine", "--force")[1]
    assert run(*options, "--name", "mine")[0] == 2  # there already

    code, said, _ = run("score", tmp_path / "rows.jsonl", "--model", model, "--calibrator", "mine")
    assert all(0 <= json.loads(line)["confidence"] <= 1 for line in said.splitlines())
    asked = ("ask", "hello", "--model", model, "--max-tokens", 6)
    code, said, _ = run(*asked, "--json", "--calibrator", tmp_path / "fitted" / "mine.json")
    found = json.loads(said)
    assert code == 0
    assert 0 <= found["confidence"] <= 1
    assert found["usage"]["generated"] <= 6
    text = engine.generate([{"role": "user", "content": "hello"}], max_tokens=6).text
    assert found["text"] == text
    code, said, _ = run(*asked)
    assert said.startswith(text)
    assert "kv_coe_r_token" in said
    assert "the scores took" in said
    assert run(*asked, "--no-scores", "--raw")[0] == 0


@pytest.mark.parametrize(
    ("arguments", "what"),
    [
        (("embed", "none.txt"), "can't be read"),
        (("embed", "{blank}"), "line 2: blank"),
        (("embed", "{text}", "--out", "x.csv"), "ends in none of"),
        (("embed", "{text}", "--spec", "nonsense"), "no preset and no file"),
        (("embed", "{text}", "--jsonl"), "not JSON"),
        (("embed", "{long}", "--model", "{model}"), "text 1"),
        (("info", "nowhere/at/all"), "can't be loaded"),
        (("embed", "{ids}", "--model", "{model}"), "some rows have an id"),
        (("embed", "{text}", "--prompt-name", "query", "--model", "{model}"), "No prompt is named"),
        (("score", "{text}"), "not JSON"),
        (("score", "{rows}", "--scores", "luck", "--model", "{model}"), "No score is named"),
        (("calibrate", "--confidence", "{rows}"), "--name or --out"),
        (("calibrate", "--confidence", "{rows}", "--name", "../x"), "not a name"),
        (("calibrate", "--confidence", "{rows}", "--out", "c.json", "--model", "{model}"), "correct"),
        (("ask", "x", "--raw", "--system", "y"), "no --system"),
        (("ask", "x", "--max-tokens", "0", "--model", "{model}"), "max_tokens"),
    ],
)
def test_faults_are_one_line_with_what_to_do(
    run: Run, model: str, tmp_path: Path, arguments: tuple[str, ...], what: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "blank.txt").write_text("a\n\nb\n")
    (tmp_path / "text.txt").write_text("a\nb\n")
    (tmp_path / "long.txt").write_text("short\n" + "word " * 5000 + "\n")
    (tmp_path / "rows.jsonl").write_text('{"prompt": "a", "answer": "b"}\n')
    (tmp_path / "ids.jsonl").write_text('{"text": "a", "id": 1}\n{"text": "b"}\n')
    names = {
        "ids": "ids.jsonl",
        "blank": "blank.txt",
        "text": "text.txt",
        "long": "long.txt",
        "rows": "rows.jsonl",
        "model": model,
    }
    code, _, err = run(*(a.format(**names) for a in arguments))
    assert code == 2
    assert what in err
    assert "Traceback" not in err
    assert err.startswith("kvroute: ")


def test_debug_shows_the_traceback_and_is_no_argument_of_a_command(run: Run) -> None:
    from kvroute import InvalidInputError

    with pytest.raises(InvalidInputError):
        main(["--debug", "embed", "none.txt"])
    assert run("embed", "none.txt")[0] == 2
    code, _, err = run("embed", "none.txt", "--debug")
    assert code == 2
    assert "No such option" in err


def test_stdin_to_stdout(model: str, engine: TransformersEngine) -> None:
    command = [
        sys.executable,
        "-m",
        "kvroute.cli",
        "embed",
        "-",
        "--model",
        model,
        "--spec",
        "paper-mteb",
        "--skip-empty",
    ]
    ran = subprocess.run(command, input="one text\n\nanother\n", capture_output=True, text=True, check=True)
    found = np.array([json.loads(line)["embedding"] for line in ran.stdout.splitlines()])
    np.testing.assert_allclose(found, KVEmbedder(engine, "paper-mteb").encode(["one text", "another"]), atol=1e-5)


def test_a_reader_that_leaves_early_is_no_fault(model: str, tmp_path: Path) -> None:
    (tmp_path / "in.txt").write_text("\n".join(f"text {i}" for i in range(2000)))
    line = f"{sys.executable} -m kvroute.cli embed {tmp_path / 'in.txt'} --model {model} -q | head -c 10 > /dev/null"
    ran = subprocess.run(["bash", "-c", line], capture_output=True, text=True, check=False)
    assert "Traceback" not in ran.stderr


def test_help_is_quick_and_light() -> None:
    code = (
        "import sys\nfrom kvroute.cli import app\n"
        "sys.exit(any(m in sys.modules for m in ('torch', 'transformers', 'sklearn')))"
    )
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


@pytest.mark.slow
def test_a_killed_score_run_goes_on(model: str, tmp_path: Path) -> None:
    rows = [{"prompt": f"question {i}", "answer": f"answer {i} " * (i % 9 + 1)} for i in range(2000)]
    (tmp_path / "in.jsonl").write_text("\n".join(map(json.dumps, rows)))

    def command(out: str) -> list[str]:
        where = [str(tmp_path / "in.jsonl"), "--out", str(tmp_path / out)]
        return [sys.executable, "-m", "kvroute.cli", "score", *where, "--model", model, "-q"]

    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    partial = tmp_path / "cut.jsonl.partial"
    for enough in (3, 20):
        process = subprocess.Popen(command("cut.jsonl"), env=environment)
        while process.poll() is None and _files(partial) < enough:
            time.sleep(0.002)
        assert process.poll() is None, "it ended before it could be killed"
        process.send_signal(signal.SIGKILL)
        process.wait()
    subprocess.run(command("cut.jsonl"), check=True, env=environment)
    subprocess.run(command("whole.jsonl"), check=True, env=environment)
    assert (tmp_path / "cut.jsonl").read_bytes() == (tmp_path / "whole.jsonl").read_bytes()


def _embed(model: str, folder: Path, out: str) -> list[str]:
    source = str(folder / "in.txt")
    return [sys.executable, "-m", "kvroute.cli", "embed", source, "--out", str(folder / out), "--model", model, "-q"]


@pytest.mark.slow
def test_a_killed_run_goes_on_and_ends_with_the_same_bytes(model: str, tmp_path: Path) -> None:
    rng = random.Random(1)
    lines = [" ".join(rng.choice(["ab", "cde", "f"]) for _ in range(rng.randint(3, 40))) for _ in range(6000)]
    (tmp_path / "in.txt").write_text("\n".join(lines))
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    subprocess.run(_embed(model, tmp_path, "whole.npy"), check=True, env=environment)
    out, partial = tmp_path / "cut.npy", tmp_path / "cut.npy.partial"
    kills = 0
    while not out.exists():
        assert kills < 40, "the run does not come forward"
        process = subprocess.Popen(_embed(model, tmp_path, "cut.npy"), env=environment)
        enough = _files(partial) + rng.randint(4, 12)
        while process.poll() is None and _files(partial) < enough:
            time.sleep(0.002)
        time.sleep(rng.uniform(0, 0.03))  # anywhere within a chunk
        if process.poll() is None:
            process.send_signal(signal.SIGKILL)
            kills += 1
        process.wait()
    assert kills >= 2
    assert out.read_bytes() == (tmp_path / "whole.npy").read_bytes()
    assert len(np.load(out)) == len(lines)
    assert not partial.exists()


def _files(folder: Path) -> int:
    return len(list(folder.iterdir())) if folder.is_dir() else 0


def test_an_interrupt_exits_130(model: str, tmp_path: Path) -> None:
    (tmp_path / "in.txt").write_text("\n".join(f"text {i}" * 20 for i in range(20000)))
    process = subprocess.Popen(
        _embed(model, tmp_path, "o.npy"),
        stderr=subprocess.PIPE,
        text=True,
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),  # noqa: PLW1509 - a job in the background ignores it
    )
    partial = tmp_path / "o.npy.partial"
    for _ in range(600):
        if partial.is_dir() and len(list(partial.iterdir())) > 1:
            break
        time.sleep(0.05)
    process.send_signal(signal.SIGINT)
    _, err = process.communicate(timeout=60)
    assert process.returncode == 130
    assert "Traceback" not in err
