"""Questions for the tiny thinker, each with its answer, its fast answer and its thought.

Kinds (what makes a question hard is never its length: steps, entries and filler words are drawn alike for all):

- ``run``: two registers modulo 10 go through steps. Both are set anew on the way: late in an easy question, so that
  little is left to compute, and early in a hard one.
- ``map``: follow arrows in a table, from a node to a number. Every table has four numbers, so that how far it is shows
  only to who looks the first arrow up. Easy at the first node, hard behind an arrow.
- ``top``: the largest of some two-digit numbers. Easy.
- ``draw``: the answer is a hash of the question, which no thought finds.
- ``sum``: with a calculator at hand (:func:`make_tool_chat`): the model has to call it.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import random
import re
from dataclasses import dataclass
from typing import Any

NODES = "cdefghjkmn"
_FILLERS = (" please", " now", " then", " well", " so", " ok", " right", " next")
KINDS = {"run": 0.48, "map": 0.3, "top": 0.14, "draw": 0.08}
"""Shares of the kinds among questions."""
CALCULATOR: dict[str, Any] = {
    "type": "function",
    "function": {
        "name": "calculator",
        "description": "Multiplies and adds whole numbers.",
        "parameters": {"type": "object", "properties": {"expression": {"type": "string"}}, "required": ["expression"]},
    },
}
"""The tool that the model is trained to call, in the schema of chat templates."""


@dataclass(frozen=True, slots=True)
class Worked:
    """A question with all that training writes about it.

    Attributes:
        kind: see the module's text.
        question: the user's message.
        answer: two digits.
        fast: the answer at once: it restates the question, then gives the result.
        thought: each step with its result, the result, and a check of all steps.
        slow: the answer behind a thought.
        hard: whether much is left to compute, or it can't be known.
    """

    kind: str
    question: str
    answer: str
    fast: str
    thought: str
    slow: str
    hard: bool

    @property
    def think(self) -> bool:
        """Whether a thought helps."""
        return self.hard and self.kind != "draw"


def make_question(rng: random.Random, kind: str | None = None, *, shares: dict[str, float] = KINDS) -> Worked:
    """One question; of a kind drawn by ``shares`` if none is given."""
    kind = kind or rng.choices(list(shares), list(shares.values()))[0]
    return {"run": _run, "map": _map, "top": _top, "draw": _draw}[kind](rng)


def make_questions(n: int, seed: int) -> list[dict[str, str]]:
    """Different questions as rows for ``kvroute label``: id, question, answer, answer_type, kind."""
    rng = random.Random(f"questions {seed}")
    rows: dict[str, dict[str, str]] = {}
    while len(rows) < n:
        made = make_question(rng)
        rows.setdefault(
            made.question,
            {
                "id": f"{seed}-{len(rows)}",
                "question": made.question,
                "answer": made.answer,
                "answer_type": "number",
                "kind": made.kind,
            },
        )
    return list(rows.values())


def make_tool_chat(rng: random.Random) -> tuple[list[dict[str, Any]], str]:
    """A chat that needs the calculator, and the answer: user, tool call, tool's response, answer."""
    expression = f"{rng.randint(2, 99)}{rng.choice('+*')}{rng.randint(2, 99)}"
    left, sign, right = expression.partition("+") if "+" in expression else expression.partition("*")
    result = str(int(left) + int(right) if sign == "+" else int(left) * int(right))
    call = {"type": "function", "function": {"name": "calculator", "arguments": {"expression": expression}}}
    chat: list[dict[str, Any]] = [
        {"role": "user", "content": f"sum{_filler(rng)} {expression}{_filler(rng)}"},
        {"role": "assistant", "content": "", "tool_calls": [call]},
        {"role": "tool", "content": result},
        {"role": "assistant", "content": f"it gives {result}."},
    ]
    return chat, result


def left(kind: str, question: str) -> int | None:
    """Steps of a ``run`` behind the last that sets a register, arrows of a ``map`` to follow; None for other kinds."""
    if kind == "run":
        steps = question.split(";")[1:]
        return len(steps) - 1 - max(i for i, step in enumerate(steps) if "=" in step)
    if kind == "map":
        arrows = dict(re.findall(r"(\w)>([a-z]?)", question))
        at, count = question.split(" from ")[-1], 0
        while at := arrows[at]:
            count += 1
        return count
    return None


def _worked(
    kind: str, question: str, steps: list[str], states: list[str], answer: str, restated: str, *, hard: bool
) -> Worked:
    thought = f"{';'.join(steps)};so {answer};check {';'.join(states)};yes {answer}."
    return Worked(kind, question, answer, f"{restated} {answer}.", thought, f"it gives {answer}.", hard)


def _filler(rng: random.Random) -> str:
    return "".join(rng.choice(_FILLERS) for _ in range(rng.choice((0, 0, 1, 2))))


# ------------------------------------------------------------------ run


def _run(rng: random.Random) -> Worked:
    count = rng.choice((5, 6))
    live = rng.choices((0, 1, 2, count - 2), (26, 26, 6, 42))[0]
    # Both registers are set anew, one right before the last `live` steps, the other shortly before it.
    last = count - live - 1
    first = rng.randrange(max(0, last - 2), last)
    names = rng.sample("ab", 2)
    sets = {first: names[0], last: names[1]}
    state = {"a": rng.randrange(10), "b": rng.randrange(10)}
    begin = f"a={state['a']} b={state['b']}"
    steps, walked, states = [], [], []
    # Numbered from anywhere on: how many steps there are, and how many follow one, is not written in it.
    number_of_first = rng.randrange(10)
    for place in range(count):
        if place in sets:
            name, sign, operand = sets[place], "=", str(rng.randrange(10))
        elif first < place < last:  # only what is about to be set moves, or more than `live` steps would count
            name, sign, operand = sets[last], rng.choice("+*"), str(rng.randrange(2, 10))
        else:
            name, sign, operand = rng.choice("ab"), rng.choice("+*"), str(rng.randrange(2, 10))
            if rng.random() < 0.4:
                operand = "b" if name == "a" else "a"
        number = state[operand] if operand in state else int(operand)
        old = state[name]
        state[name] = {"=": number, "+": old + number, "*": old * number}[sign] % 10
        steps.append(f";{(number_of_first + place) % 10}{name}{sign}{operand}")
        states.append(f"{state['a']}{state['b']}")
        walked.append(f"{steps[-1][1:]}:{states[-1]}")
    question = f"run{_filler(rng)} {begin}{''.join(steps)}{_filler(rng)}"
    restated = f"the run from {begin} by all of its steps gives"
    return _worked("run", question, walked, states, states[-1], restated, hard=live > 1)


# ------------------------------------------------------------------ map


def _map(rng: random.Random) -> Worked:
    count = rng.choice((8, 9))
    names = rng.sample(NODES, count)
    length = rng.choices((0, 1, 2, 3, 4), (40, 15, 8, 17, 20))[0]
    # A path over the first nodes to a number; three more numbers, so that one alone is no answer; the rest: anywhere.
    numbers = [f"{n:02d}" for n in rng.sample(range(100), 4)]
    target = [*names[1 : length + 1], *numbers]
    target += [rng.choice(names[:place] + names[place + 1 :]) for place in range(len(target), count)]
    entries = [f"{name}>{to}" for name, to in zip(names, target, strict=True)]
    question = f"map{_filler(rng)}:{','.join(rng.sample(entries, count))}{_filler(rng)} from {names[0]}"
    walked, states = [names[0], *entries[: length + 1]], [names[0], *target[: length + 1]]
    restated = "the map followed by all of its arrows gives"
    return _worked("map", question, walked, states, numbers[0], restated, hard=length > 0)


# ------------------------------------------------------------------ top, draw


def _top(rng: random.Random) -> Worked:
    numbers = [f"{n:02d}" for n in rng.sample(range(100), rng.choice((9, 10, 11)))]
    best = [max(numbers[: place + 1]) for place in range(len(numbers))]
    question = f"top{_filler(rng)} {','.join(numbers)}{_filler(rng)}"
    return _worked("top", question, best, best, best[-1], "the top of all of the numbers in it gives", hard=False)


def _draw(rng: random.Random) -> Worked:
    numbers = [f"{n:02d}" for n in rng.sample(range(100), rng.choice((8, 9, 10)))]
    question = f"draw{_filler(rng)} {','.join(numbers)}{_filler(rng)} from a hat"
    answer = f"{int.from_bytes(hashlib.sha256(question.encode()).digest()[:4]) % 100:02d}"
    restated = "the draw of one of the numbers in it gives"
    return _worked("draw", question, numbers[:2], numbers[:2], answer, restated, hard=True)


def main() -> None:
    """Print questions as JSON Lines."""
    parser = argparse.ArgumentParser(description="Questions for the tiny thinker, as kvroute label takes them.")
    parser.add_argument("--count", type=int, default=1000)
    parser.add_argument("--seed", type=int, default=1)
    arguments = parser.parse_args()
    for row in make_questions(arguments.count, arguments.seed):
        print(json.dumps(row))


if __name__ == "__main__":
    main()
