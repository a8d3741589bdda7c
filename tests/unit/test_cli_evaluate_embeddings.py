"""``kvroute evaluate embeddings`` on a tiny model and a folder of made-up rows."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from kvroute import PoolingSpec

Run = Callable[..., tuple[int, str, str]]
THINGS = ("fox", "dog", "cat", "mat", "key", "value", "token", "answer", "model", "country")


@pytest.fixture
def data(tmp_path: Path) -> Path:
    """Sets as ``--data`` takes them."""

    def write(name: str, rows: list[dict[str, Any]]) -> None:
        path = tmp_path / "data" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text("".join(json.dumps(r) + "\n" for r in rows))

    for part, ways in (("train", ("the {}", "a {} here", "lazy {}", "my {}")), ("test", ("every {}", "some {}"))):
        rows = [
            {"id": f"{part}{i}{w}", "text": w.format(t), "label": "first" if i < 5 else "second"}
            for i, t in enumerate(THINGS)
            for w in ways
        ]
        write(f"classification/half.{part}.jsonl", rows)
    pairs = [(a, b, 5.0 if a == b else 1.0) for i, a in enumerate(THINGS) for b in (a, THINGS[i - 1])]
    write(
        "sts/same.jsonl",
        [{"id": f"{a}{b}", "sentence1": f"the {a}", "sentence2": f"a {b}", "score": s} for a, b, s in pairs],
    )
    write("retrieval/facts/corpus.jsonl", [{"_id": t, "title": t, "text": f"all of the {t}"} for t in THINGS])
    write("retrieval/facts/queries.jsonl", [{"_id": t, "text": f"where is the {t}?"} for t in THINGS])
    judged = "".join(f"{t}\t{t}\t1\n" for t in THINGS)
    (tmp_path / "data/retrieval/facts/qrels.tsv").write_text("query-id\tcorpus-id\tscore\n" + judged)
    return tmp_path / "data"


def arguments(data: Path, model: str, *more: object) -> list[object]:
    return [
        "evaluate", "embeddings", "--data", data, "-o", data.parent / "report", "--model", model, "--dtype", "float32",
        "--dimension", 4, "--fit-texts", 30, "--bootstrap", 20, "--references", "none", *more,
    ]  # fmt: skip


def test_evaluate_writes_one_page_and_one_json_file(
    run: Run, data: Path, tiny_folder: Callable[[str], str], tmp_path: Path
) -> None:
    model = tiny_folder("llama")
    (tmp_path / "mine.json").write_text(PoolingSpec(layers=(1,), part="v", heads="concat").to_json())
    asked = arguments(data, model, "--spec", tmp_path / "mine.json", "--preset", "best,paper-mteb")
    code, out, err = run(*asked, "--json")
    assert code == 0, err
    found = json.loads(out)
    assert {"`best`", "`paper-mteb`", "mine", "hidden state, best layer and weights"} <= set(found["methods"])
    assert found["rows"]["half"] == 20
    assert found["methods"]["mine"]["how"] == "V 1, 1 layer, mean"
    assert found["methods"]["mine"]["groups"]["classification"]["low"] is not None
    assert {"half", "same", "facts", "mean"} <= set(found["compared"][0]["difference"])
    page = (tmp_path / "report/report.html").read_text()
    assert "<svg" in page
    assert "paper-mteb" in page
    assert json.loads((tmp_path / "report/report.json").read_text())["methods"].keys() == found["methods"].keys()
    code, _, err = run(*asked)
    assert code == 2
    assert "--force" in err
    code, out, err = run(*asked, "--force")  # states and dev scores are there already
    assert code == 0, err
    assert "| mine |" in out
    assert "`best` minus hidden state, best layer and weights" in out


def test_evaluate_embeddings_refuses(run: Run, data: Path, tiny_folder: Callable[[str], str], tmp_path: Path) -> None:
    model = tiny_folder("llama")
    for more, said in (
        (("--preset", "nicest"), "nicest"),
        (("--preset", ","), "Neither a preset nor a spec"),
        (("--forms", "loud"), "plain, prompt, twice"),
        (("--references", "hubert"), "hubert"),
    ):
        code, _, err = run(*arguments(data, model, *more))
        assert code == 2
        assert said in err
    code, _, err = run(*arguments(tmp_path / "nothing", model))
    assert code == 2
    assert "no set" in err
