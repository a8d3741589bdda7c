"""The tiny thinker: its questions, what training sees of them, and that training learns."""

from __future__ import annotations

import random
import re
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
import torch

from kvroute import TransformersEngine
from kvroute.thinking import ThinkingMode

FOLDER = Path(__file__).resolve().parents[2] / "examples" / "tiny_thinker"
sys.path.insert(0, str(FOLDER))

import questions as made  # noqa: E402
import train as training  # noqa: E402


@pytest.fixture(scope="module")
def tokenizer() -> Any:
    return training.build_tokenizer(0)


@pytest.mark.parametrize("kind", sorted(made.KINDS))
def test_a_thought_and_both_answers_end_with_the_answer(kind: str) -> None:
    rng = random.Random(3)
    for _ in range(200):
        q = made.make_question(rng, kind)
        assert re.fullmatch(r"\d\d", q.answer)
        assert q.fast.endswith(f" {q.answer}.")
        assert q.slow.endswith(f" {q.answer}.")
        steps, check = q.thought.split(f";so {q.answer};check ")
        assert check.endswith(f";yes {q.answer}.")
        for step, state in zip(steps.split(";"), check.split(";")[:-1], strict=True):
            assert step.endswith(state)


def test_run_follows_its_steps() -> None:
    """Against a machine of its own: two registers, one step after the other, numbered from anywhere on."""
    rng = random.Random(4)
    firsts = set()
    for _ in range(300):
        q = made.make_question(rng, "run")
        state = {name: int(digit) for name, digit in re.findall(r"([ab])=(\d)", q.question.split(";")[0])}
        steps = q.question.split(";")[1:]
        firsts.add(steps[0][0])
        for place, step in enumerate(steps):
            number, name, sign, operand = re.match(r"(\d)([ab])([-+*=])(\w)", step).groups()  # type: ignore[union-attr]
            assert int(number) == (int(steps[0][0]) + place) % 10
            number = state[operand] if operand in state else int(operand)
            old = state[name]
            state[name] = {"=": number, "+": old + number, "-": old - number, "*": old * number}[sign] % 10
        assert q.answer == f"{state['a']}{state['b']}"
    assert firsts == set("0123456789")


def test_map_follows_its_arrows() -> None:
    rng = random.Random(5)
    for _ in range(300):
        q = made.make_question(rng, "map")
        arrows = dict(re.findall(r"(\w)>(\w+)", q.question))
        assert sum(to.isdigit() for to in arrows.values()) >= 4, "a number alone must not be the answer"
        at = q.question.split(" from ")[-1]
        while not at.isdigit():
            at = arrows[at]
        assert q.answer == at


def test_top_is_the_largest() -> None:
    rng = random.Random(6)
    for _ in range(100):
        q = made.make_question(rng, "top")
        assert q.answer == max(re.findall(r"\d\d", q.question))


def test_answers_have_many_likely_values_and_questions_differ() -> None:
    rows = made.make_questions(4000, 7)
    assert len({r["question"] for r in rows}) == 4000
    counts = {a: sum(r["answer"] == a for r in rows) for a in {r["answer"] for r in rows}}
    assert sum(c >= 10 for c in counts.values()) >= 50
    assert max(counts.values()) < 0.05 * len(rows)
    assert made.make_questions(50, 7) == rows[:50]


def test_length_says_little(tokenizer: Any) -> None:
    """Steps that are left to compute, which is what makes a run hard, are not told by tokens."""
    from sklearn.metrics import roc_auc_score

    rng = random.Random(8)
    drawn = [made.make_question(rng, "run") for _ in range(2000)]
    lengths = [len(tokenizer(q.question)["input_ids"]) for q in drawn]
    hard = [(made.left("run", q.question) or 0) >= 2 for q in drawn]
    assert 0.4 < roc_auc_score(hard, lengths) < 0.65


def test_template_gives_control_tokens(tokenizer: Any) -> None:
    model = training.build_model(tokenizer, 0).eval()
    assert sum(p.numel() for p in model.parameters()) < 2_000_000
    engine = TransformersEngine(model, tokenizer, name="tiny-thinker")
    mode = ThinkingMode.of(engine)
    assert (mode.fast, mode.slow, mode.leave, mode.enter) == (
        training.FAST, training.SLOW, training.LEAVE, training.ENTER,
    )  # fmt: skip


def test_what_training_learns_is_what_the_router_runs(tokenizer: Any) -> None:
    """A sample's tokens are those of the layout, so nothing differs between training and use."""
    engine = TransformersEngine(training.build_model(tokenizer, 0).eval(), tokenizer, name="tiny-thinker")
    mode = ThinkingMode.of(engine)
    q = made.make_question(random.Random(9), "run")
    layout = mode.layout(engine, [{"role": "user", "content": q.question}])
    prompt = tokenizer.apply_chat_template(
        [{"role": "user", "content": q.question}], tokenize=False, add_generation_prompt=True
    )
    whole = tokenizer(prompt + training.SLOW + q.thought + training.LEAVE + q.slow, add_special_tokens=False)
    assert whole["input_ids"][: len(layout.base) + len(layout.slow)] == layout.base + layout.slow
    bare = tokenizer(prompt + training.FAST, add_special_tokens=False)["input_ids"]
    assert bare == layout.base + layout.fast


def test_samples_learn_only_what_the_model_writes(tokenizer: Any) -> None:
    for sample in training.make_samples(tokenizer, random.Random(10), 200):
        assert len(sample.ids) == len(sample.weights)
        assert sample.weights[-1]
        assert not sample.weights[0]
        text = tokenizer.decode([i for i, w in zip(sample.ids, sample.weights, strict=True) if w])
        assert "<|im_start|>" not in text
        assert text.endswith("<|im_end|>")


def test_without_a_mode_the_choice_to_think_is_learned(tokenizer: Any) -> None:
    """A thought where one helps, an answer at once elsewhere; that choice alone counts more than other tokens."""
    think = tokenizer.convert_tokens_to_ids("<think>")
    opened = 0
    for sample in training.make_samples(tokenizer, random.Random(14), 200, {"free": 1.0}):
        at = next(i for i, w in enumerate(sample.weights) if w)
        assert sample.weights[at] == training.CHOICE
        assert set(sample.weights[at + 1 :]) == {1.0}
        assert tokenizer.decode(sample.ids[:at]).endswith("<|im_start|>assistant\n")
        opened += sample.ids[at] == think
        assert (think in sample.ids) == (sample.ids[at] == think)
    assert 60 < opened < 140
    rng = random.Random(15)
    for _ in range(100):
        q = made.make_question(rng)
        assert q.think == (q.hard and q.kind in ("run", "map"))


def test_tool_calls_are_written_in_the_template_s_format(tokenizer: Any) -> None:
    chat, result = made.make_tool_chat(random.Random(11))
    text = tokenizer.apply_chat_template(chat, tools=[made.CALCULATOR], tokenize=False)
    assert "tools: calculator" in text
    assert re.search(
        r'<tool_call>\n\{"name": "calculator", "arguments": \{"expression": "[^"]+"\}\}\n</tool_call>', text
    )
    assert f"<tool_response>\n{result}\n</tool_response>" in text


def test_a_few_steps_of_training_lower_the_loss(tokenizer: Any) -> None:
    model = training.build_model(tokenizer, 1)
    losses = training.train(model, tokenizer, seed=1, steps=24, size=8, log=lambda _: None)
    assert len(losses) == 24
    assert sum(losses[-3:]) / 3 < losses[0] - 0.5
    assert not model.training


def test_parts_of_a_batch_give_the_gradients_of_the_whole(tokenizer: Any) -> None:
    model = training.build_model(tokenizer, 2)
    ids, weights = next(training.batches(tokenizer, random.Random(12), 5))
    with ThreadPoolExecutor(training.CORES) as pool:
        loss = training.set_gradients(model, ids, weights, pool)
    split = [p.grad.clone() for p in model.parameters()]
    model.zero_grad()
    whole = training.loss_of(model, ids, weights) / weights[:, 1:].sum()
    whole.backward()
    assert loss == pytest.approx(whole.item(), rel=1e-5)
    for mine, parameter in zip(split, model.parameters(), strict=True):
        torch.testing.assert_close(mine, parameter.grad, rtol=1e-3, atol=1e-6)


def test_training_begins_with_exercises_in_copying(tokenizer: Any) -> None:
    """What is learned in them stands in the question."""
    drawn = training.batches(tokenizer, random.Random(13), 16, exercises=2)
    for _ in range(2):
        for ids, weights in zip(*next(drawn), strict=True):
            question = tokenizer.decode(ids).split("<|im_start|>assistant")[0]
            said = tokenizer.decode(ids[weights > 0]).removesuffix(training.END)
            assert said in question or all(arrow in question for arrow in said.split(";"))
    ids, _ = next(drawn)
    assert "<think>" in tokenizer.decode(ids.flatten())


def test_orthogonal() -> None:
    torch.manual_seed(0)
    for shape in ((3, 8, 20), (2, 20, 8)):
        found = training.orthogonal(torch.randn(*shape))
        sizes = torch.linalg.svdvals(found)
        assert ((sizes > 0.5) & (sizes < 1.5)).all()
