"""Recipes: those that come with kvroute, and what is refused."""

from __future__ import annotations

from pathlib import Path

import pytest

from kvroute.errors import FileFormatError, InvalidInputError
from kvroute.recipes import load_recipe, read_recipe, recipe_names
from kvroute.reproduction import Source

PAPERS = {"qwen3-8b", "deepseek-r1-distill-qwen-14b", "llama-3.1-8b", "qwen2-7b"}
SMALL = """
name: small
about: a test
source: made here
model: smollm2
routing:
  train: [{name: a, maker: sums, rows: 20}]
  test: [{name: b, maker: sums, rows: 10, seed: 1}]
"""


def written(folder: Path, text: str) -> Path:
    path = folder / "recipe.yaml"
    path.write_text(text)
    return path


def test_those_that_come_with_kvroute_are_whole() -> None:
    assert set(recipe_names()) == PAPERS | {"tiny-thinker", "smollm2"}
    for name in recipe_names():
        recipe, folder = load_recipe(name)
        assert recipe.name == name
        assert (folder / f"{name}.yaml").is_file()
        assert set(recipe.published) <= set(recipe.figures())
        if name in PAPERS:
            assert "2601.20326" in recipe.source
            assert any(value is not None for value in recipe.published.values())
    thinker, folder = load_recipe("tiny-thinker")
    assert (folder / thinker.model / "config.json").is_file()


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (("maker: sums, rows: 20", "rows: 20"), "a file or a maker"),
        (("maker: sums, rows: 20", "maker: sums"), "a maker needs rows"),
        (("maker: sums, rows: 20", "maker: os.system, rows: 20"), "tiny-thinker"),
        (("name: b", "name: a"), "two sets of the routing part are named a"),
        (("name: b", "name: b.c"), "routing.test.0.name"),
        (("source: made here", "source: made here\npublished: {b.slow.acuracy: 0.5}"), "gives no figure"),
        (("model: smollm2", "model: smollm2\nrun: rm"), "run"),
        (("routing:", "routing:\n  two_step: {}"), "needs checkpoints"),
        (("routing:", "routing:\n  head: {spec: none-such}"), "no preset"),
        (("routing:", "routing:\n  max_loss: .nan"), "max_loss"),
    ],
)
def test_what_makes_no_sense_is_refused(change: tuple[str, str], said: str, tmp_path: Path) -> None:
    assert read_recipe(written(tmp_path, SMALL)).name == "small"
    with pytest.raises(FileFormatError, match=said):
        read_recipe(written(tmp_path, SMALL.replace(*change)))


def test_yaml_that_would_make_objects_is_refused(tmp_path: Path) -> None:
    with pytest.raises(FileFormatError, match="not YAML"):
        read_recipe(written(tmp_path, "!!python/object/apply:os.getcwd []"))
    with pytest.raises(InvalidInputError, match=r"There are: .*qwen3-8b"):
        load_recipe("qwen4")
    with pytest.raises(InvalidInputError, match="can't be read"):
        load_recipe(str(tmp_path / "none.yaml"))


def test_rows_of_sets(tmp_path: Path) -> None:
    """Files come from the named folder before the recipe's; ids carry the set's name; a limit holds for each."""
    recipe = read_recipe(written(tmp_path, SMALL.replace("maker: sums, rows: 20", "file: a.jsonl")))
    assert recipe.routing is not None
    of_file, made = recipe.routing.train[0], recipe.routing.test[0]
    with pytest.raises(InvalidInputError, match="--data FOLDER"):
        Source(tmp_path).questions(of_file)
    row = '{"id": 1, "question": "2 + 3?", "answer": "5", "answer_type": "number"}\n'
    (tmp_path / "a.jsonl").write_text(row)
    (tmp_path / "data").mkdir()
    assert [q.id for q in Source(tmp_path, tmp_path / "data").questions(of_file)] == ["a:1"]
    (tmp_path / "data" / "a.jsonl").write_text(row + row.replace('"id": 1', '"id": 2'))
    assert len(Source(tmp_path, tmp_path / "data").questions(of_file)) == 2
    assert len(Source(tmp_path, tmp_path / "data", limit=1).questions(of_file)) == 1
    sums = Source(tmp_path).questions(made)
    assert len({q.question for q in sums}) == 10
    assert sums == Source(tmp_path).questions(made)
    assert len(Source(tmp_path, limit=4).questions(made)) == 4
