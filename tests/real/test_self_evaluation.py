"""SelfEvaluator on the real SmolLM2: generation and scoring agree, and every score is there or says why not."""

from __future__ import annotations

import math

import pytest

from kvroute import SCORES, SelfEvaluator, TransformersEngine
from kvroute.generation import Prompt

pytestmark = pytest.mark.real

PROMPTS: list[Prompt] = [
    [{"role": "user", "content": "What is the capital of France?"}],
    [{"role": "user", "content": "Say yes."}],
    "The three primary colours are",
    [{"role": "system", "content": "Answer in one word."}, {"role": "user", "content": "What is two plus two?"}],
]


def test_generation_and_score_agree(smollm2: TransformersEngine) -> None:
    answers = smollm2.generate(PROMPTS, features=["kv-coe", "logits", "length"], max_tokens=48)
    assert {a.finish_reason for a in answers} == {"stop", "length"}
    evaluator = SelfEvaluator(smollm2)
    together = evaluator.score_many(list(zip(PROMPTS, answers, strict=True)))
    for prompt, answer, scored in zip(PROMPTS, answers, together, strict=True):
        alone = evaluator.score(prompt, answer)
        # The greedy answers read back as the same tokens, so their texts have the same scores.
        ids = smollm2.tokenize_texts([answer.text], special_tokens=False)[0]
        texts = [scored, alone]
        if ids == [t for t in answer.token_ids if t != smollm2.end_token]:
            texts.append(evaluator.score(prompt, answer.text, finish_reason=answer.finish_reason))
        for evaluation in texts:
            for name, score in answer.scores.items():
                if score.value is None:
                    assert evaluation.scores[name] == score
                else:
                    assert evaluation.scores[name].value == pytest.approx(score.value, abs=1e-4), name


def test_every_score_is_finite_or_has_a_reason(smollm2: TransformersEngine) -> None:
    rows: list[tuple[Prompt, str]] = [
        (PROMPTS[0], "The capital of France is Paris."),
        (PROMPTS[0], "P"),
        (PROMPTS[3], "4"),
        (PROMPTS[2], " red, yellow and blue." * 30),
        ("?", "\N{PARTY POPPER}"),
    ]
    every = ["kv-coe", "logits", "p-true", "length", "hidden-coe"]
    found = SelfEvaluator(smollm2, scores=every).score_many(rows)
    for evaluation in found:
        assert set(evaluation.scores) == set(SCORES)
        for name, score in evaluation.scores.items():
            assert (score.value is None) != (score.reason is None)
            if score.value is not None:
                assert math.isfinite(score.value)
                assert SCORES[name].low <= score.value <= SCORES[name].high
    assert all(s.value is not None for s in found[0].scores.values())


def test_a_right_answer_is_likelier_than_a_wrong_one(smollm2: TransformersEngine) -> None:
    evaluator = SelfEvaluator(smollm2, scores=["mean_logprob"])
    right, wrong = evaluator.score_many([(PROMPTS[0], f"The capital of France is {x}.") for x in ("Paris", "Oslo")])
    assert right.scores["mean_logprob"].value > wrong.scores["mean_logprob"].value  # type: ignore[operator]
