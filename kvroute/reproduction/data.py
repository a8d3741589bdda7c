"""The rows of a recipe's sets: from a file, or made."""

from __future__ import annotations

import importlib.util
import random
import sys
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from kvroute.errors import InvalidInputError
from kvroute.questions import Question, read_questions
from kvroute.recipes import DataSet
from kvroute.rows import parse_jsonl, text_field


def _words(text: str) -> list[str]:
    return text.split()


_THINGS = _words(
    "apples boxes coins drums eggs flags grapes hats inks jars kites lamps maps nuts oranges pens quilts rings shells "
    "tiles umbrellas vases wheels yarns zippers books cups dishes forks gloves hammers jackets keys ladders mugs nails "
    "oars plates ropes spoons"
)
_FORMS = (
    ("i have {a} {x} and buy {b} more. how many {x} do i have?", "+"),
    ("a shop holds {a} {x} and sells {b} of them. how many {x} are left?", "-"),
    ("there are {a} bags with {b} {x} each. how many {x} are there?", "*"),
)
_ANIMALS = _words("cat dog horse whale mouse eagle shark sheep otter camel")
_MONEY = _words("bank loan price tax salary market debt bill budget coin")
_SAID = ("The {x} is near the river.", "They spoke about the {x} again.", "A {x} was in the news today.")


class MissingFileError(InvalidInputError):
    """A set's file is not there."""


@dataclass(frozen=True)
class Texts:
    """Labelled texts, to train on and to judge on."""

    train: list[tuple[str, str]]
    test: list[tuple[str, str]]


@dataclass(frozen=True)
class Source:
    """Where a recipe's sets are looked for.

    Attributes:
        folder: the recipe's.
        data: the one that the user names, before it.
        limit: at most so many rows a set.
    """

    folder: Path
    data: Path | None = None
    limit: int | None = None
    _read: dict[DataSet, list[Question]] = field(default_factory=dict, repr=False)

    def find(self, file: str) -> Path:
        """A file of a set.

        Raises:
            MissingFileError: it is in none of the folders; the message names them.
        """
        folders = [f for f in (self.data, self.folder) if f is not None]
        for folder in folders:
            if (folder / file).is_file():
                return folder / file
        raise MissingFileError(
            f"{file} is not in {' or '.join(map(str, folders))}.",
            hint="Name the folder that the recipe's sets lie in: --data FOLDER.",
        )

    def questions(self, part: DataSet) -> list[Question]:
        """A set's questions; ids begin with the set's name, so that those of several sets differ.

        Raises:
            InvalidInputError: no such file, or a row that is no question.
        """
        if part not in self._read:
            most = min((n for n in (part.rows, self.limit) if n is not None), default=None)
            if part.maker is not None:
                assert most is not None
                rows = list(enumerate(_made(part.maker, most, part.seed), 1))
            else:
                path = self.find(str(part.file))
                rows = parse_jsonl(path.read_text(encoding="utf-8-sig"), path)[:most]
            if not rows:
                raise InvalidInputError(f"The set {part.name} holds no question.")
            found = read_questions(rows, part.name)
            self._read[part] = [
                Question(f"{part.name}:{q.id}", q.question, q.answer, q.answer_type, q.extra) for q in found
            ]
        return self._read[part]

    def texts(self, part: DataSet) -> Texts:
        """A set's labelled texts.

        Raises:
            InvalidInputError: no such files, or a row without text and label.
        """
        if part.maker is not None:
            if part.maker != "topics":
                raise InvalidInputError(f"The maker {part.maker} makes questions, no texts.")
            made = _topics(part.seed)
            cut = len(made) // 2
            return Texts(made[:cut], made[cut:][: part.rows])
        train, test = (self._labelled(f"{part.file}.{half}.jsonl") for half in ("train", "test"))
        most = min((n for n in (part.rows, self.limit) if n is not None), default=None)
        return Texts(train, test[:most])

    def _labelled(self, file: str) -> list[tuple[str, str]]:
        path = self.find(file)
        rows = parse_jsonl(path.read_text(encoding="utf-8-sig"), path)
        return [(text_field(r, "text", path, n), str(r.get("label"))) for n, r in rows]


def _made(maker: str, count: int, seed: int) -> list[dict[str, Any]]:
    if maker == "tiny-thinker":
        made: list[dict[str, Any]] = _thinker().make_questions(count, seed)
        return made
    if maker == "sums":
        return _sums(count, seed)
    raise InvalidInputError(f"The maker {maker} makes texts, no questions.")


def _thinker() -> Any:
    """The tiny thinker's maker, which lies in a checkout alone."""
    path = Path(__file__).resolve().parents[2] / "examples" / "tiny_thinker" / "questions.py"
    if not path.is_file():
        raise InvalidInputError(
            "The tiny thinker and its maker of questions are not part of the package.",
            hint="Run this recipe in a checkout of kvroute.",
        )
    name = "kvroute_tiny_thinker_questions"
    if name not in sys.modules:
        spec = importlib.util.spec_from_file_location(name, path)
        assert spec is not None
        assert spec.loader is not None
        module = importlib.util.module_from_spec(spec)
        sys.modules[name] = module  # dataclasses look their module up
        spec.loader.exec_module(module)
    return sys.modules[name]


def _sums(count: int, seed: int) -> list[dict[str, Any]]:
    """Sums in words, no two with the same things and form, so that skeletons differ."""
    pairs = [(x, form) for x in _THINGS for form in _FORMS]
    if count > len(pairs):
        raise InvalidInputError(f"The maker sums has {len(pairs)} questions, and {count} were asked for.")
    rng = random.Random(f"sums {seed}")
    rows = []
    for number, (x, (text, sign)) in enumerate(rng.sample(pairs, count)):
        b = rng.randrange(2, 10)
        a = rng.randrange(b, 10 if sign == "*" else 30)
        value = {"+": a + b, "-": a - b, "*": a * b}[sign]
        question = text.format(a=a, b=b, x=x)
        rows.append({"id": f"sum-{number}", "question": question, "answer": str(value), "answer_type": "number"})
    return rows


def _topics(seed: int) -> list[tuple[str, str]]:
    texts = [(said.format(x=x), topic) for topic, words in (("animal", _ANIMALS), ("money", _MONEY))
             for x in words for said in _SAID]  # fmt: skip
    random.Random(f"topics {seed}").shuffle(texts)
    return texts
