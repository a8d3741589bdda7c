"""Add to a file of labels what the model answers inside an agent: with its tool declared, before and after a call.

``python examples/tiny_thinker/agent_labels.py labels.jsonl -o agent-labels.jsonl``. A prompt that declares tools is
another prompt: confidence that was trained on plain ones alone is too sure of itself there. The rows that are added are
questions of all kinds asked with the calculator at hand, the calls of it (right where the expression is), and the
answers behind its results; parts are those of the same hash of the question's skeleton.
"""

from __future__ import annotations

import argparse
import hashlib
import random
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from kvroute import LabelRow, ThinkingMode, TokenIds, TransformersEngine, read_labels
from kvroute.checkers import check
from kvroute.label_rows import Attempt, write_meta
from kvroute.skeletons import SHARES, part_of, skeleton_digest
from questions import CALCULATOR, make_question, make_tool_chat

LIMITS = {"fast": 48, "slow": 192}
_CHUNK = 256
_EXPRESSION = re.compile(
    r'<tool_call>\n\{"name": "calculator", "arguments": \{"expression": "([^"]+)"\}\}\n</tool_call>'
)

Asked = tuple[str, list[dict[str, Any]], str, str]
"""Kind, chat, question, answer."""


def asked(count: int, seed: int) -> list[Asked]:
    """Three questions in five are of the kinds without a tool, one is answered by a call, one follows its result."""
    rng = random.Random(f"agent {seed}")
    rows: list[Asked] = []
    for place in range(count):
        made, (chat, result) = make_question(rng), make_tool_chat(rng)
        expression = chat[1]["tool_calls"][0]["function"]["arguments"]["expression"]
        user = [{"role": "user", "content": made.question}]
        rows.append(
            {
                3: ("call", chat[:1], chat[0]["content"], expression),
                4: ("told", chat[:3], chat[0]["content"], result),
            }.get(place % 5, (made.kind, user, made.question, made.answer))
        )
    return rows


def right(kind: str, said: str, answer: str) -> bool:
    """Whether an answer, or a call, is right."""
    if kind == "call":
        called = _EXPRESSION.fullmatch(said)
        return called is not None and called[1] == answer
    return check(said, answer, "number").correct


def label(engine: TransformersEngine, rows: Sequence[Asked]) -> list[LabelRow]:
    """Both modes' answers, checked."""
    thinking = ThinkingMode.of(engine)
    layouts = [thinking.layout(engine, chat, template={"tools": [CALCULATOR]}) for _, chat, _, _ in rows]
    attempts: dict[str, list[Attempt]] = {}
    for mode in ("fast", "slow"):
        prompts = [TokenIds((*layout.base, *layout.suffix(mode))) for layout in layouts]
        attempts[mode] = []
        for (kind, _, _, answer), found in zip(
            rows, engine.generate(prompts, max_tokens=LIMITS[mode], progress=False), strict=True
        ):
            said = thinking.split(found.text, mode=mode)[1]
            good = right(kind, said, answer)
            attempts[mode].append(
                Attempt(mode=mode, text=found.text, token_ids=tuple(found.token_ids), thought_tokens=0, answer=said,
                        correct=good, readable=True, finish_reason=found.finish_reason)
            )  # fmt: skip
    made = []
    for (kind, _, question, answer), layout, fast, slow in zip(
        rows, layouts, attempts["fast"], attempts["slow"], strict=True
    ):
        digest = skeleton_digest(question)
        made.append(
            LabelRow(
                id=f"agent {hashlib.sha256(repr((kind, question)).encode()).hexdigest()[:16]}", question=question,
                answer=answer, answer_type="number", part=part_of(digest, SHARES), skeleton=digest,
                prompt_ids=tuple(layout.base), fast=(fast,), slow=(slow,),
                label=0.0 if fast.correct else 75.0 if slow.correct else 100.0, extra={"kind": kind, "agent": True},
            )
        )  # fmt: skip
    return made


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("labels", type=Path)
    parser.add_argument("-o", "--out", type=Path, required=True)
    parser.add_argument("--count", type=int, default=2500)
    parser.add_argument("--seed", type=int, default=1)
    arguments = parser.parse_args()
    rows, meta = read_labels(arguments.labels)
    engine = TransformersEngine.from_pretrained(Path(__file__).parent / "model", dtype="float32", token_budget=8192)
    due = list(
        {question: row for row in asked(arguments.count, arguments.seed) for question in [(row[0], row[2])]}.values()
    )
    for start in range(0, len(due), _CHUNK):
        rows += label(engine, due[start : start + _CHUNK])
    arguments.out.write_text("".join(row.model_dump_json() + "\n" for row in rows))
    digest = hashlib.sha256(arguments.out.read_bytes()).hexdigest()
    write_meta(arguments.out, meta.model_copy(update={"questions_digest": digest}))


if __name__ == "__main__":
    main()
