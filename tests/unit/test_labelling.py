"""Labels: from a scripted model whose answers are known, and from a tiny random one, token for token."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import pytest

from kvroute import Generation, InvalidInputError, LabelRow, Question, ThinkingMode, TransformersEngine, label_questions
from kvroute.errors import OutOfMemoryError, UnsupportedModelError
from kvroute.generation import Timings, TokenIds, Usage
from kvroute.label_rows import Attempt
from kvroute.label_summary import kind_of, summarise, summary_dict
from kvroute.labelling import Labeller, pair_label
from kvroute.questions import read_questions
from kvroute.skeletons import part_of, skeleton_digest

THINK = ThinkingMode(
    fast="<think></think>", slow="<think>", leave=" so</think>", enter="<think>", close="</think>", name="test"
)
SMALL: dict[str, Any] = {"max_tokens": {"fast": 12, "slow": 24}}


class Scripted:
    """The tiny engine's tokens with written answers: ``script(prompt's text) -> answer's text``."""

    def __init__(self, engine: TransformersEngine, script: Callable[[str], str]) -> None:
        self._engine, self.script = engine, script
        self.calls: list[tuple[list[str], dict[str, Any]]] = []

    def __getattr__(self, name: str) -> Any:
        return getattr(self._engine, name)

    def generate(self, prompts: Sequence[TokenIds], **sampling: Any) -> list[Generation]:
        texts = [self.tokenizer.decode(list(p.ids)) for p in prompts]
        self.calls.append((texts, sampling))
        found = []
        for prompt, text in zip(prompts, texts, strict=True):
            written = self.script(text)
            ids = [*self.tokenize_texts([written], special_tokens=False)[0], 3]  # 3 ends an answer
            ids = ids[: sampling["max_tokens"]]
            found.append(
                Generation(
                    text=self.tokenizer.decode(ids, skip_special_tokens=True),
                    token_ids=ids,
                    prompt_token_ids=list(prompt.ids),
                    finish_reason="stop" if ids[-1] == 3 else "length",
                    usage=Usage(len(prompt.ids), 0, len(prompt.ids), len(ids)),
                    timings=Timings(0.0, 0.0, 0.0),
                )
            )
        return found


def ask(name: str, answer: str = "7", question: str = "", kind: str = "number", extra: Any = None) -> Question:
    return Question(name, question or f"question {name}", answer, kind, extra or {})


def is_fast(text: str) -> bool:
    return "<think></think>" in text


# ---------------------------------------------------------------------- labels


def test_the_four_labels(tiny_engine: TransformersEngine) -> None:
    answers = {  # by question: fast, slow
        "quick": ("7", "4+3</think>7"),
        "wordy": ("I say that it surely must be 7", "4+3</think>7"),
        "slow": ("8", "4+3</think>7"),
        "never": ("8", "4+3</think>9"),
        "mute": ("well", "4+3 and 7"),
    }

    def script(text: str) -> str:
        name = next(n for n in answers if f"question {n}" in text)
        return answers[name][0 if is_fast(text) else 1]

    engine = Scripted(tiny_engine, script)
    rows = list(
        label_questions(
            engine, [ask(n) for n in answers], thinking=THINK, short=10, max_tokens={"fast": 60, "slow": 90}
        )
    )
    assert [r.label for r in rows] == [0.0, 25.0, 75.0, 100.0, 100.0]
    assert [r.id for r in rows] == list(answers)
    quick, mute = rows[0], rows[4]
    assert (quick.fast[0].text, quick.fast[0].answer, quick.fast[0].thought_tokens) == ("7", "7", 0)
    assert quick.slow[0].text == "4+3</think>7"
    thought = quick.slow[0].token_ids[: quick.slow[0].thought_tokens]
    assert engine.tokenizer.decode(thought) == "4+3</think>"
    # A thought that was never closed has no answer, though there is a 7 in it; an answer without a number neither.
    assert [(a.answer, a.readable, a.correct) for a in (*mute.fast, *mute.slow)] == [(None, False, False)] * 2
    assert mute.slow[0].thought_tokens == mute.slow[0].tokens
    assert {r.part for r in rows} == {part_of(skeleton_digest(f"question {n}")) for n in answers}
    for texts, sampling in engine.calls:
        assert sampling["seed"] is None
        assert sampling["temperature"] == 0
        assert all("question" in t and t.endswith(("<think>", "</think>")) for t in texts)
    base = engine.tokenizer.decode(list(quick.prompt_ids))
    assert "question quick" in base
    assert not base.endswith("<think>")


def test_instructions_need_no_marks(tiny_engine: TransformersEngine) -> None:
    def script(text: str) -> str:
        return "The answer is 8" if "at once" in text else "4 + 3 is 7. The answer is 7."

    engine = Scripted(tiny_engine, script)
    row = next(label_questions(engine, [ask("a")], checkpoints=5, max_tokens={"fast": 40, "slow": 60}))
    assert (row.label, row.fast[0].answer, row.slow[0].answer) == (75.0, "8", "7")
    assert row.slow[0].thought_tokens == 0  # nothing marks it
    assert [c.at for c in row.slow[0].checkpoints] == list(range(5, row.slow[0].tokens, 5))
    assert engine.calls[-1][0][0].endswith("The answer is ")


def test_a_closing_mark_within_larger_tokens_is_found(tiny_engine: TransformersEngine) -> None:
    engine = Scripted(tiny_engine, lambda text: "7")
    labeller = Labeller(engine, thinking=THINK)
    labeller._close = [1, 2, 3]  # as if the mark alone had other tokens than within a text
    ids = engine.tokenize_texts(["4+3</think> so it is 7"], special_tokens=False)[0]
    found = Generation("4+3</think> so it is 7", ids, [1], "stop", Usage(1, 0, 1, 1), Timings(0, 0, 0))
    answer, thought = labeller._split("slow", found)
    assert answer == "so it is 7"
    assert engine.tokenizer.decode(ids[:thought]).startswith("4+3</think>")
    assert "</think>" not in engine.tokenizer.decode(ids[: thought - 1])


def test_samples_give_the_mean_over_pairs(tiny_engine: TransformersEngine) -> None:
    count = {"fast": 0, "slow": 0}

    def script(text: str) -> str:
        mode = "fast" if is_fast(text) else "slow"
        count[mode] += 1
        return {"fast": ["7", "8", "8", "7"], "slow": ["a</think>9", "b</think>7", "c</think>9", "d</think>7"]}[mode][
            count[mode] - 1
        ]

    engine = Scripted(tiny_engine, script)
    row = next(
        label_questions(
            engine, [ask("a")], thinking=THINK, samples=4, temperature=0.7, seed=5, max_tokens={"fast": 30, "slow": 40}
        )
    )
    assert row.label == (0 + 75 + 100 + 0) / 4
    assert (row.fast_right, row.slow_right) == (0.5, 0.5)
    assert [a.seed for a in row.fast] == [a.seed for a in row.slow] == [20, 21, 22, 23]
    assert {s["temperature"] for _, s in engine.calls} == {0.7}


def test_checkpoints_close_the_thought(tiny_engine: TransformersEngine) -> None:
    thought = "one two three four five six seven"

    def script(text: str) -> str:
        if " so</think>" in text:
            return "7" if "four" in text else "don't know"
        return "8" if is_fast(text) else f"{thought}</think>7"

    engine = Scripted(tiny_engine, script)
    row = next(label_questions(engine, [ask("a")], thinking=THINK, checkpoints=4, max_tokens={"fast": 30, "slow": 99}))
    slow = row.slow[0]
    ids = engine.tokenize_texts([thought, "</think>", " so</think>"], special_tokens=False)
    assert [c.at for c in slow.checkpoints] == list(range(4, slow.thought_tokens - len(ids[1]) + 1, 4))
    for point in slow.checkpoints:
        kept = engine.tokenizer.decode(list(slow.token_ids[: point.at]))
        assert thought.startswith(kept)
        assert point.correct is ("four" in kept)
        assert point.answer == ("7" if "four" in kept else None)
        answer = engine.tokenize_texts(["7" if "four" in kept else "don't know"], special_tokens=False)[0]
        assert point.tokens == point.at + len(ids[2]) + len(answer) + 1
    assert 0 < sum(c.correct for c in slow.checkpoints) < len(slow.checkpoints)
    prompts = engine.calls[-1][0]
    head = engine.tokenizer.decode([*row.prompt_ids]) + "<think>"
    assert all(p.startswith(head + "one"[:1]) and p.endswith(" so</think>") for p in prompts)


def test_equal_questions_are_answered_once(tiny_engine: TransformersEngine) -> None:
    engine = Scripted(tiny_engine, lambda text: "7" if is_fast(text) else "x</think>7")
    rows = list(label_questions(engine, [ask(n, question="same") for n in "abc"], thinking=THINK))
    assert [len(texts) for texts, _ in engine.calls] == [1, 1]
    assert [r.label for r in rows] == [0.0] * 3


def test_progress_says_what_is_left(tiny_engine: TransformersEngine, capsys: pytest.CaptureFixture[str]) -> None:
    engine = Scripted(tiny_engine, lambda text: "7" if is_fast(text) else "x</think>7")
    list(label_questions(engine, [ask(str(i)) for i in range(4)], thinking=THINK, chunk=1, progress=True))
    bar = capsys.readouterr().err
    assert "Labelling" in bar
    assert "4/4" in bar
    assert ":00" in bar  # time that is left
    list(label_questions(engine, [ask("a")], thinking=THINK, progress=False))
    assert capsys.readouterr().err == ""


# ---------------------------------------------------------------------- failing rows


def test_a_row_that_fails_keeps_its_error_and_the_others_their_labels(tiny_engine: TransformersEngine) -> None:
    def crash(text: str, answer: str) -> bool:
        raise ZeroDivisionError("the checker fell")

    engine = Scripted(tiny_engine, lambda text: "7" if is_fast(text) else "x</think>7")
    questions = [
        ask("good"),
        ask("long", question="word " * 5000),
        ask("crash", kind="own"),
        ask("type", kind="city"),
        ask("expected", answer="no number"),
        ask("blank", question="  "),
        ask("good too"),
    ]
    rows = list(label_questions(engine, questions, thinking=THINK, checkers={"own": crash}))
    errors = {r.id: r.error for r in rows}
    assert [r.id for r in rows] == [q.id for q in questions]
    assert [r.id for r in rows if r.label == 0.0] == ["good", "good too"]
    assert errors["good"] is None
    assert "No room is left for a" in (errors["long"] or "")
    assert errors["crash"] == "ZeroDivisionError: the checker fell"
    assert "no checker for answers of type 'city'" in (errors["type"] or "")
    assert "'no number' is not one number" in (errors["expected"] or "")
    assert "blank" in (errors["blank"] or "")
    assert all(not r.fast and not r.slow and r.label is None for r in rows if r.error)


def test_what_the_engine_refuses_costs_one_row(tiny_engine: TransformersEngine) -> None:
    class Small(Scripted):
        def generate(self, prompts: Sequence[TokenIds], **sampling: Any) -> list[Generation]:
            if any("question big" in self.tokenizer.decode(list(p.ids)) for p in prompts):
                raise OutOfMemoryError("too big")
            return super().generate(prompts, **sampling)

    engine = Small(tiny_engine, lambda text: "7" if is_fast(text) else "x</think>7")
    rows = list(label_questions(engine, [ask("a"), ask("big"), ask("b")], thinking=THINK))
    assert [r.label for r in rows] == [0.0, None, 0.0]
    assert rows[1].error == "OutOfMemoryError: too big"


def test_a_fault_of_the_machine_is_no_row_s(tiny_engine: TransformersEngine) -> None:
    def broken(text: str) -> str:
        raise RuntimeError("the device is gone")

    with pytest.raises(RuntimeError, match="gone"):
        list(label_questions(Scripted(tiny_engine, broken), [ask("a")], thinking=THINK))


# ---------------------------------------------------------------------- the real engine


def test_answers_are_those_of_the_engine_token_for_token(tiny_engine: TransformersEngine) -> None:
    questions = [ask(str(i), question=f"how much is {i} and {i * 7}? " * (i % 3 + 1)) for i in range(7)]
    options: dict[str, Any] = {"thinking": THINK, "checkpoints": 7, **SMALL}
    rows = list(label_questions(tiny_engine, questions, chunk=3, **options))
    assert [r.id for r in rows] == [q.id for q in questions]
    leave = THINK.phrase(tiny_engine, "fast")
    for row, question in zip(rows, questions, strict=True):
        layout = THINK.layout(tiny_engine, [{"role": "user", "content": question.question}])
        assert row.prompt_ids == tuple(layout.base)
        assert row.error is None
        for mode, attempts in (("fast", row.fast), ("slow", row.slow)):
            ids = (*layout.base, *layout.suffix(mode))  # type: ignore[arg-type]
            alone = tiny_engine.generate(TokenIds(ids), max_tokens=SMALL["max_tokens"][mode])
            assert attempts[0].token_ids == tuple(alone.token_ids)
            assert attempts[0].text == alone.text
        slow = row.slow[0]
        assert [c.at for c in slow.checkpoints] == list(range(7, slow.thought_tokens, 7))
        for point in slow.checkpoints:
            ids = (*layout.base, *layout.slow, *slow.token_ids[: point.at], *leave)
            alone = tiny_engine.generate(TokenIds(ids), max_tokens=12)
            assert point.tokens == point.at + len(leave) + len(alone.token_ids)


def test_a_seed_fixes_the_samples_whatever_is_asked_beside(tiny_engine: TransformersEngine) -> None:
    questions = [ask(str(i)) for i in range(5)]
    options: dict[str, Any] = {"thinking": THINK, "samples": 2, "temperature": 1.0, "checkpoints": 9, **SMALL}
    one = list(label_questions(tiny_engine, questions, seed=3, chunk=5, **options))
    other = list(label_questions(tiny_engine, questions[::-1], seed=3, chunk=2, **options))[::-1]
    assert one == other
    assert one[0].fast[0].token_ids != one[0].fast[1].token_ids
    assert one != list(label_questions(tiny_engine, questions, seed=4, **options))


def test_no_room_for_a_checkpoint_is_no_error(tiny_engine: TransformersEngine) -> None:
    engine = Scripted(tiny_engine, lambda text: "7" if is_fast(text) else "thinking " * 20)
    layout = THINK.layout(tiny_engine, [{"role": "user", "content": "question a"}])
    used = len(layout.base) + len(layout.slow) + len(THINK.phrase(tiny_engine, "fast"))
    context = tiny_engine.info.context
    fast = context + 1 - used - 32  # 32 tokens of a thought and no more can be kept
    labeller = Labeller(engine, thinking=THINK, checkpoints=5, max_tokens={"fast": fast, "slow": 60})
    row = labeller.label([ask("a")])[0]
    assert row.error is None
    assert [c.at for c in row.slow[0].checkpoints] == [5, 10, 15, 20, 25, 30]
    assert row.slow[0].tokens == 60


# ---------------------------------------------------------------------- options, rows, figures


def test_options_that_make_no_sense(tiny_engine: TransformersEngine) -> None:
    for options, message in (
        ({"samples": 2}, "would all be the same"),
        ({"samples": 0}, "samples is at least 1"),
        ({"checkpoints": 0}, "checkpoints is at least 1"),
        ({"short": 0}, "short is at least 1"),
        ({"seed": -1}, "A seed"),
        ({"prompt": "Hello"}, r"no \{question\}"),
        ({"max_tokens": {"fast": 0}}, "max_tokens"),
        ({"max_tokens": {"medium": 5}}, "max_tokens"),
        ({"shares": {"train": 0.5}}, "add up to 1"),
        ({"chunk": 0}, "chunk"),
    ):
        with pytest.raises(InvalidInputError, match=message):
            label_questions(tiny_engine, [ask("a")], **options)  # type: ignore[arg-type]


def test_a_model_without_template_needs_a_pair(tiny_model: Callable[..., Any]) -> None:
    from tiny_models import build_tokenizer

    tokenizer = build_tokenizer()
    tokenizer.chat_template = None
    engine = TransformersEngine(tiny_model("llama"), tokenizer)
    with pytest.raises(UnsupportedModelError, match=r"ThinkingMode\("):
        label_questions(engine, [ask("a")])
    row = next(label_questions(engine, [ask("a")], thinking=THINK, prompt="Q: {question} {x}\nA:", **SMALL))
    assert row.prompt_ids == tuple(engine.tokenize("Q: question a {x}\nA:"))


def test_read_questions() -> None:
    row = {"question": "q", "answer": "1", "answer_type": "number"}
    found = read_questions([(1, {**row, "id": "a", "level": 3}), (2, row), (5, {**row, "id": 7})], "f")
    assert [q.id for q in found] == ["a", "line-2", "7"]
    assert found[0].extra == {"level": 3}
    for bad, message in (
        ([(1, {**row, "id": "a"}), (3, {**row, "id": "a"})], "lines 1 and 3 have the same id"),
        ([(4, {**row, "id": [1]})], "line 4: id is list"),
        ([(4, {"question": "q", "answer": "1"})], "line 4: no field 'answer_type'"),
        ([(4, {**row, "answer": 7})], "line 4: field 'answer' is int"),
    ):
        with pytest.raises(InvalidInputError, match=message):
            read_questions(bad, "f")


def test_pair_label_at_the_limit() -> None:
    def attempt(mode: Any, right: bool, tokens: int) -> Attempt:
        return Attempt(
            mode=mode, text="", token_ids=tuple(range(tokens)), thought_tokens=0, answer="7", correct=right,
            readable=True, finish_reason="stop",
        )  # fmt: skip

    assert pair_label(attempt("fast", True, 127), attempt("slow", False, 9)) == 0
    assert pair_label(attempt("fast", True, 128), attempt("slow", True, 9)) == 25


def test_summary(tiny_engine: TransformersEngine) -> None:
    answers = {"a": ("7", "x</think>7"), "b": ("8", "x</think>7"), "c": ("8", "x"), "d": ("8", "x</think>8")}
    engine = Scripted(tiny_engine, lambda t: answers[next(n for n in answers if f"question {n}" in t)][not is_fast(t)])
    questions = [ask(n, extra={"kind": "one" if n in "ab" else "two"}) for n in answers]
    questions.append(ask("e", kind="city"))
    rows = list(label_questions(engine, questions, thinking=THINK))
    groups = summarise(rows)
    everything = groups["all"][0]
    assert (everything.rows, everything.failed) == (4, 1)
    assert (everything.fast_right, everything.slow_right, everything.unreadable) == (0.25, 0.5, 1)
    assert everything.labels == {"0": 1, "25": 0, "75": 1, "100": 2}
    assert sum(g.rows + g.failed for g in groups["parts"]) == sum(g.rows + g.failed for g in groups["kinds"]) == 5
    assert summary_dict(groups)["all"][0]["failed"] == 1
    assert kind_of(LabelRow.model_validate({**rows[0].model_dump(), "extra": {"subject": "s"}})) == "s"
