"""SelfEvaluator: the scores of an answer that exists are those of its generation, and of plain float64 formulas."""

from __future__ import annotations

import asyncio
import itertools
import json
import math
import warnings
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from kvroute import (
    SCORES,
    ChatTemplateError,
    ConfidenceCalibrator,
    EmptyTextError,
    InvalidInputError,
    KVRouteError,
    SelfEvaluator,
    TextTooLongError,
    TransformersEngine,
)
from kvroute.engines.reading import Reading
from kvroute.generation import Prompt
from tiny_models import EOS, build_model, build_tokenizer

FEATURES = ["kv-coe", "logits", "length"]
EVERY = ["kv-coe", "logits", "length", "p-true", "hidden-coe"]
CHAT = [{"role": "user", "content": "what is the capital of the country?"}]
PROMPTS: list[Prompt] = [
    CHAT,
    "the quick brown fox jumps over",
    "a",
    [{"role": "system", "content": "answer the question"}, *CHAT],
    "question and answer: " * 6,
]


def engine_of(architecture: str = "llama", **kwargs: Any) -> TransformersEngine:
    return TransformersEngine(build_model(architecture), build_tokenizer(), name=f"tiny-{architecture}", **kwargs)


def coe(chain: np.ndarray[Any, Any]) -> tuple[float, float]:
    """CoE-R and CoE-C of ``[N + 1, F]`` in float64, written out (arXiv 2410.13640, section 3)."""

    def angle(a: np.ndarray[Any, Any], b: np.ndarray[Any, Any]) -> float:
        return math.acos(float(np.clip(a @ b / np.linalg.norm(a) / np.linalg.norm(b), -1, 1)))

    z = np.asarray(chain, dtype=np.float64)
    span, turn = np.linalg.norm(z[-1] - z[0]), angle(z[-1], z[0])
    m = np.array([np.linalg.norm(b - a) / span for a, b in itertools.pairwise(z)])
    a = np.array([angle(y, x) / turn for x, y in itertools.pairwise(z)])
    return float(m.mean() - a.mean()), math.sqrt((m * np.cos(a)).mean() ** 2 + (m * np.sin(a)).mean() ** 2)


# ---------------------------------------------------------------------- agreement with generation


def agree(generated: Any, scored: Any, names: Sequence[str] | None = None) -> None:
    assert list(generated.scores) == [n for n, s in SCORES.items() if s.family in FEATURES]
    for name, score in generated.scores.items():
        mine = scored.scores[name]
        if score.value is None:
            assert mine == score
        else:
            assert mine.value == pytest.approx(score.value, abs=1e-4), name


@pytest.mark.parametrize("sampling", [{"max_tokens": 17}, {"max_tokens": 40, "temperature": 1.5, "seed": 3}])
def test_scores_are_those_of_the_generation(tiny_engines: TransformersEngine, sampling: dict[str, Any]) -> None:
    """Generated in one batch, padded on the left; scored in one batch, padded on the right, and alone."""
    answers = tiny_engines.generate(PROMPTS, features=FEATURES, **sampling)
    evaluator = SelfEvaluator(tiny_engines)
    together = evaluator.score_many(list(zip(PROMPTS, answers, strict=True)))
    for prompt, answer, scored in zip(PROMPTS, answers, together, strict=True):
        agree(answer, scored)
        agree(answer, evaluator.score(prompt, answer.token_ids))
        assert scored.usage.prompt == len(answer.prompt_token_ids)
        assert scored.usage.generated == len(answer.token_ids)
        assert scored.usage.computed == len(answer.prompt_token_ids) + len(answer.token_ids) - 1
        assert scored.seconds > 0


class Ending:
    """A model that ends its answer after some tokens: the logits of the end token are lifted from then on."""

    def __init__(self, model: Any, after: int) -> None:
        self.model, self.after, self.steps = model, after, 0

    def __enter__(self) -> None:
        def lift(_module: Any, _inputs: Any, logits: torch.Tensor) -> torch.Tensor:
            self.steps += 1
            if self.steps > self.after:
                logits = logits.clone()
                logits[..., EOS] += 1000
            return logits

        self.handle = self.model.lm_head.register_forward_hook(lift)

    def __exit__(self, *_: object) -> None:
        self.handle.remove()


def test_an_answer_given_as_text_is_closed_as_it_was_written() -> None:
    """The chains drop the end token after ``stop``, and the last token of the text after ``length``."""
    engine = engine_of()
    evaluator = SelfEvaluator(engine)
    with Ending(engine.model, after=12):
        stopped = engine.generate(CHAT, features=["kv-coe", "length"], max_tokens=40)
    assert stopped.finish_reason == "stop"
    assert stopped.token_ids[-1] == EOS
    cut = engine.generate(CHAT, features=["kv-coe", "length"], max_tokens=12)
    assert cut.token_ids == stopped.token_ids[:-1]
    text = "the cat sat on the mat"
    ids = engine.tokenize_texts([text], special_tokens=False)[0]
    as_stop, as_length = (evaluator.score(CHAT, text, finish_reason=f) for f in ("stop", "length"))
    assert as_stop.scores == evaluator.score(CHAT, [*ids, EOS]).scores
    assert as_length.scores == evaluator.score(CHAT, ids).scores
    assert as_stop.scores["length"].value == len(ids) + 1
    assert as_stop.scores["kv_coe_r_token"] != as_length.scores["kv_coe_r_token"]
    for generation in (stopped, cut):
        mine = evaluator.score(CHAT, generation).scores
        for name, score in generation.scores.items():
            assert mine[name].value == pytest.approx(score.value, abs=1e-4)
    many = evaluator.score_many([(CHAT, text), (CHAT, text)], finish_reason=["length", "stop"])
    assert [e.scores["length"] for e in many] == [as_length.scores["length"], as_stop.scores["length"]]


def test_a_model_without_an_end_token_leaves_the_text_open() -> None:
    model, tokenizer = build_model("llama", eos_token_id=None), build_tokenizer()
    model.generation_config.eos_token_id = None
    tokenizer.eos_token = None
    engine = TransformersEngine(model, tokenizer)
    assert engine.end_token is None
    ids = engine.tokenize_texts(["the cat"], special_tokens=False)[0]
    assert SelfEvaluator(engine).score("a", "the cat").usage.generated == len(ids)


def test_no_special_tokens_in_an_answer_given_as_text() -> None:
    tokenizer = build_tokenizer()
    from tokenizers.processors import TemplateProcessing

    tokenizer.backend_tokenizer.post_processor = TemplateProcessing(
        single="<|bos|> $A", special_tokens=[("<|bos|>", 1)]
    )
    engine = TransformersEngine(build_model("llama"), tokenizer)
    assert engine.tokenize("the cat")[0] == 1
    found = SelfEvaluator(engine).score("the cat", "the cat")
    assert found.usage.prompt == 1 + found.usage.generated - 1  # begin token before, end token behind


# ---------------------------------------------------------------------- the batch


def test_an_evaluation_does_not_depend_on_its_batch(tiny_engine: TransformersEngine) -> None:
    texts = ["the cat", "the quick brown fox jumps over the lazy dog", "a", "a language model " * 20]
    rows = [(p, a) for p in PROMPTS for a in texts]
    evaluator = SelfEvaluator(tiny_engine, scores=EVERY)
    together = evaluator.score_many(rows)
    backwards = evaluator.score_many(rows[::-1])[::-1]
    for row, a, b in zip(rows, together, backwards, strict=True):
        alone = evaluator.score(*row)
        assert set(a.scores) == set(SCORES)
        for name, score in a.scores.items():
            for other in (b.scores[name], alone.scores[name]):
                if score.value is None:
                    assert score == other
                else:
                    assert other.value == pytest.approx(score.value, abs=1e-4), name


def test_batches_stay_under_the_token_budget(monkeypatch: pytest.MonkeyPatch) -> None:
    engine = engine_of(token_budget=64)
    seen: list[torch.Size] = []
    engine.model.get_decoder().register_forward_pre_hook(
        lambda _m, _a, kwargs: seen.append(kwargs["input_ids"].shape), with_kwargs=True
    )
    SelfEvaluator(engine, scores=EVERY).score_many([("the cat", "the cat sat on " * n) for n in range(1, 9)])
    assert len(seen) > 4
    assert all(s.numel() <= 64 or s[0] == 1 for s in seen)


def test_out_of_memory_halves_the_budget_and_loses_nothing() -> None:
    engine = engine_of()
    rows = [("the cat", f"the cat sat on {i}") for i in range(16)]
    before = SelfEvaluator(engine).score_many(rows)
    full = 0

    def refuse(_module: Any, _args: Any, kwargs: dict[str, Any]) -> None:
        nonlocal full
        if kwargs["input_ids"].shape[0] > 4:
            full += 1
            raise RuntimeError("DefaultCPUAllocator: can't allocate memory")

    engine.model.get_decoder().register_forward_pre_hook(refuse, with_kwargs=True)
    with warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("always")
        after = SelfEvaluator(engine).score_many(rows)
    assert full > 0
    assert "budget is halved" in str(said[0].message)
    for a, b in zip(before, after, strict=True):
        assert b.scores["entropy"].value == pytest.approx(a.scores["entropy"].value, abs=1e-5)


# ---------------------------------------------------------------------- the formulas


def test_hidden_states_against_the_formula(standard_engine: TransformersEngine) -> None:
    model = standard_engine.model
    prompt, answer = "the quick brown fox", "jumps over the lazy dog and the cat sat on the mat"
    found = SelfEvaluator(standard_engine, scores=["hidden-coe"]).score(prompt, answer).scores
    start = standard_engine.tokenize(prompt)
    ids = [*start, *standard_engine.tokenize_texts([answer], special_tokens=False)[0]]  # the end token is dropped
    with torch.no_grad():
        states = model(torch.tensor([ids]), output_hidden_states=True).hidden_states
    assert len(states) == model.config.num_hidden_layers + 1
    chain = np.stack([s[0, len(start) :].double().mean(dim=0).numpy() for s in states])
    r, c = coe(chain)
    assert found["hidden_coe_r"].value == pytest.approx(r, abs=1e-4)
    assert found["hidden_coe_c"].value == pytest.approx(c, abs=1e-4)


def test_logit_scores_against_the_formula(tiny_engines: TransformersEngine) -> None:
    prompt, answer = "the quick brown fox", "jumps over the lazy dog"
    found = SelfEvaluator(tiny_engines, scores=["logits"]).score(prompt, answer).scores
    start = tiny_engines.tokenize(prompt)
    ids = [*start, *tiny_engines.tokenize_texts([answer], special_tokens=False)[0], EOS]
    with torch.no_grad():
        logits = tiny_engines.model(torch.tensor([ids])).logits[0].double()
    p = torch.softmax(logits[len(start) - 1 : -1], dim=-1)
    chosen = p[range(len(p)), ids[len(start) :]]
    assert found["mean_logprob"].value == pytest.approx(float(chosen.log().mean()), abs=1e-4)
    assert found["entropy"].value == pytest.approx(float(-(p * p.log()).sum(-1).mean()), abs=1e-4)
    assert found["max_probability"].value == pytest.approx(float(p.amax(-1).mean()), abs=1e-4)


def test_soft_caps_and_scales_of_the_logits_are_kept() -> None:
    """What a model does behind its LM head (Gemma-2's soft cap) belongs to its logits."""
    from transformers import Gemma2Config, Gemma2ForCausalLM

    config = Gemma2Config(
        vocab_size=320, hidden_size=32, intermediate_size=48, num_hidden_layers=3, num_attention_heads=4,
        num_key_value_heads=2, head_dim=8, final_logit_softcapping=0.5, initializer_range=0.5, eos_token_id=EOS,
        attn_implementation="eager",
    )  # fmt: skip
    model = Gemma2ForCausalLM(config).eval()
    engine = TransformersEngine(model, build_tokenizer())
    ids = engine.tokenize("the cat sat on the mat")
    with torch.no_grad():
        p = torch.softmax(model(torch.tensor([ids])).logits[0, 2:-1].double(), dim=-1)
    found = SelfEvaluator(engine).score("x", ids[3:]).scores  # another prompt: other logits
    reading = next(iter(engine.read([ids], [3], want=["logits"])))[1]
    assert reading.logits is not None
    assert reading.logits[0][:, 0].numpy() == pytest.approx(p[range(len(p)), ids[3:]].log().numpy(), abs=1e-5)
    assert found["max_probability"].value == pytest.approx(1 / 320, rel=1)  # capped at 0.5: nearly uniform


@pytest.mark.parametrize("chat", [True, False])
def test_p_true_is_a_over_a_and_b(chat: bool) -> None:
    tokenizer = build_tokenizer()
    if not chat:
        tokenizer.chat_template = None
    engine = TransformersEngine(build_model("llama"), tokenizer, name="tiny")
    found = SelfEvaluator(engine, scores=["p-true"]).score("is 2 even?", "yes")
    text = "Question: is 2 even?\nProposed answer: yes\nIs the proposed answer:\nA) True\nB) False"
    if chat:
        ids = engine.tokenize([{"role": "user", "content": text + "\nAnswer with A or B only."}])
        a, b = (tokenizer.encode(x, add_special_tokens=False)[0] for x in "AB")
    else:
        true = tokenizer.encode(text + "\nThe proposed answer is: A")
        ids, a = true[:-1], true[-1]
        b = tokenizer.encode(text + "\nThe proposed answer is: B")[-1]
    with torch.no_grad():
        p = torch.softmax(engine.model(torch.tensor([ids])).logits[0, -1].double(), dim=-1)
    assert found.scores["p_true"].value == pytest.approx(float(p[a] / (p[a] + p[b])), abs=1e-5)
    assert list(found.scores) == ["p_true"]
    assert found.usage.computed == len(ids)


def test_p_true_follows_the_model() -> None:
    """A head that lifts A raises the score to 1; one that lifts B lowers it to 0."""
    for letter, expected in (("A", 1.0), ("B", 0.0)):
        engine = engine_of()
        token = engine.tokenize_texts([letter], special_tokens=False)[0][0]

        def lift(_m: Any, _i: Any, logits: torch.Tensor, token: int = token) -> torch.Tensor:
            logits = logits.clone()
            logits[..., token] += 100
            return logits

        engine.model.lm_head.register_forward_hook(lift)
        found = SelfEvaluator(engine, scores=["p_true"]).score(CHAT, [7, 8, EOS])
        assert found.scores["p_true"].value == pytest.approx(expected, abs=1e-6)


def test_a_question_that_does_not_fit_has_no_p_true() -> None:
    model = build_model("llama", max_position_embeddings=48)
    found = SelfEvaluator(TransformersEngine(model, build_tokenizer()), scores=["p-true", "length"]).score("a", "cat")
    assert found.scores["p_true"].value is None
    assert "the context holds 48" in str(found.scores["p_true"].reason)
    assert found.scores["length"].value is not None


# ---------------------------------------------------------------------- only what is asked for


def counting(engine: TransformersEngine) -> dict[str, int]:
    """How many positions the LM head and each layer's MLP have seen, and decoder runs."""
    seen = {"head": 0, "last_mlp": 0, "runs": 0}

    def count(key: str) -> Callable[..., None]:
        def hook(_module: Any, inputs: Any) -> None:
            seen[key] += inputs[0].shape[:-1].numel()

        return hook

    engine.model.lm_head.register_forward_pre_hook(count("head"))
    engine.model.model.layers[-1].mlp.register_forward_pre_hook(count("last_mlp"))

    def run(*_: Any) -> None:
        seen["runs"] += 1

    engine.model.get_decoder().register_forward_pre_hook(run)
    return seen


@pytest.mark.parametrize(
    ("scores", "head", "deep", "runs"),
    [
        (["length"], 0, False, 0),
        (["kv_coe_r_token", "length"], 0, False, 1),
        (["hidden-coe"], 0, True, 1),
        (["kv-coe", "entropy"], 6, True, 1),
        (["p-true"], 1, True, 1),
    ],
)
def test_nothing_else_is_computed(scores: list[str], head: int, deep: bool, runs: int) -> None:
    engine = engine_of()
    seen = counting(engine)
    found = SelfEvaluator(engine, scores=scores).score(CHAT, [5, 6, 7, 8, 9, EOS])
    assert seen["head"] == head
    assert (seen["last_mlp"] > 0) == deep
    assert seen["runs"] == runs
    asked = [n for n in SCORES if n in scores or SCORES[n].family in scores]
    assert sorted(found.scores) == sorted(asked)


def test_the_lm_head_works_through_the_answer_in_pieces(monkeypatch: pytest.MonkeyPatch) -> None:
    engine = engine_of()
    rows = [(CHAT, list(range(4, 60))), ("a", [9, 8, 7])]
    whole = SelfEvaluator(engine).score_many(rows)
    monkeypatch.setattr("kvroute.engines.reading._LOGITS", 320 * 5)
    most = 0

    def note(_m: Any, inputs: Any) -> None:
        nonlocal most
        most = max(most, inputs[0].shape[:-1].numel())

    engine.model.lm_head.register_forward_pre_hook(note)
    pieces = SelfEvaluator(engine).score_many(rows)
    assert most == 5
    for a, b in zip(whole, pieces, strict=True):
        assert b.scores["mean_logprob"].value == pytest.approx(a.scores["mean_logprob"].value, abs=1e-6)


def test_the_model_is_left_as_it_was() -> None:
    engine = engine_of()
    before = {n: id(m) for n, m in engine.model.named_modules()}
    hooks = sum(len(m._forward_hooks) + len(m._forward_pre_hooks) for m in engine.model.modules())
    SelfEvaluator(engine, scores=EVERY).score(CHAT, "the cat")
    assert {n: id(m) for n, m in engine.model.named_modules()} == before
    assert sum(len(m._forward_hooks) + len(m._forward_pre_hooks) for m in engine.model.modules()) == hooks


# ---------------------------------------------------------------------- answers that have no score


def test_short_answers_have_reasons(tiny_engine: TransformersEngine) -> None:
    evaluator = SelfEvaluator(tiny_engine, scores=EVERY)
    one, three = evaluator.score_many([("the cat", [9]), ("the cat", [9, 10, 11])])
    for found in (one, three):
        for score in found.scores.values():
            assert (score.value is None) != (score.reason is None)
            assert score.value is None or math.isfinite(score.value)
    assert one.scores["kv_coe_r_token"].value is None
    assert one.scores["hidden_coe_r"].value is None
    assert one.scores["mean_logprob"].value is not None
    assert "fewer than 3" in str(three.scores["kv_coe_c_token"].reason)
    assert three.scores["kv_coe_c_layer"].value is not None
    assert one.to_dict()["reasons"]["hidden_coe_c"] == one.scores["hidden_coe_c"].reason


def test_a_fault_in_one_answer_costs_the_others_nothing() -> None:
    """The embedding of one token is NaN: the answer with it has reasons, its neighbours have scores."""
    engine = engine_of()
    rows: list[tuple[Prompt, list[int]]] = [("the cat", [20, 21, 22, 23, 24]) for _ in range(3)]
    before = SelfEvaluator(engine, scores=[*FEATURES, "hidden-coe"]).score_many(rows)
    with torch.no_grad():
        engine.model.get_input_embeddings().weight[99] = math.nan
    rows[1] = ("the cat", [20, 21, 99, 23, 24])
    after = SelfEvaluator(engine, scores=[*FEATURES, "hidden-coe"]).score_many(rows)
    for place in (0, 2):
        for name, score in before[place].scores.items():
            assert after[place].scores[name].value == pytest.approx(score.value, abs=1e-5)
    broken = after[1].scores
    assert broken["length"].value == 5
    assert "layer 0 at token" in str(broken["kv_coe_r_token"].reason)
    assert "not finite" in str(broken["mean_logprob"].reason)
    assert "not finite" in str(broken["hidden_coe_r"].reason)
    json.dumps(after[1].to_dict(), allow_nan=False)


# ---------------------------------------------------------------------- bad input


@pytest.mark.parametrize(
    ("prompt", "answer", "error", "message"),
    [
        ("a", "", EmptyTextError, "Text 0 is empty"),
        ("a", [], EmptyTextError, "Text 0 is empty"),
        ("", "a", InvalidInputError, "prompt of row 0 is empty"),
        ("a", "b" * 5000, TextTooLongError, "prompt and answer together"),
        ("a", [5, 320], InvalidInputError, "has token 320, and the model has 0 to 319"),
        ("a", [-1], InvalidInputError, "has token -1"),
        ("a", [1.5], InvalidInputError, "not a text, token ids or a Generation"),
        ("a", None, InvalidInputError, "row 0 is NoneType"),
        (7, "a", InvalidInputError, "Prompt 0 is neither a text nor a list of messages"),
        ([], "a", InvalidInputError, "Prompt 0"),
        ([{"role": "user"}, "x"], "a", InvalidInputError, "Prompt 0"),
        ("a", "\ud800", InvalidInputError, "can't be tokenized"),
        ("\ud800", "a", InvalidInputError, "can't be tokenized"),
    ],
)
def test_bad_input(tiny_engine: TransformersEngine, prompt: Any, answer: Any, error: Any, message: str) -> None:
    with pytest.raises(error, match=message):
        SelfEvaluator(tiny_engine).score(prompt, answer)


def test_errors_name_the_row_and_come_before_anything_is_run() -> None:
    engine = engine_of()
    seen = counting(engine)
    with pytest.raises(EmptyTextError) as caught:
        SelfEvaluator(engine).score_many([("a", "b"), ("a", "b"), ("a", "")])
    assert caught.value.index == 2
    with pytest.raises(InvalidInputError, match="row 1 is empty"):
        SelfEvaluator(engine).score_many([("a", "b"), ("", "b")])
    with pytest.raises(InvalidInputError, match="Row 0 is not a pair"):
        SelfEvaluator(engine).score_many(["ab"])  # type: ignore[list-item]
    with pytest.raises(InvalidInputError, match="finish_reason"):
        SelfEvaluator(engine).score_many([("a", "b")], finish_reason=["stop", "stop"])
    with pytest.raises(InvalidInputError, match="finish_reason"):
        SelfEvaluator(engine).score("a", "b", finish_reason="done")  # type: ignore[arg-type]
    assert seen["runs"] == 0
    assert SelfEvaluator(engine).score_many([]) == []


def test_unknown_scores_are_refused_with_the_list(tiny_engine: TransformersEngine) -> None:
    with pytest.raises(InvalidInputError, match=r"'coe'.*kv_coe_r_token.*p_true.*families.*kv-coe"):
        SelfEvaluator(tiny_engine, scores=["coe"])
    with pytest.raises(InvalidInputError, match=r"'perplexity'"):
        SelfEvaluator(tiny_engine).score("a", "b", scores=["perplexity"])


def test_messages_without_a_template() -> None:
    tokenizer = build_tokenizer()
    tokenizer.chat_template = None
    with pytest.raises(ChatTemplateError):
        SelfEvaluator(TransformersEngine(build_model("llama"), tokenizer)).score(CHAT, "a")


_ANY = st.one_of(st.text(max_size=30), st.lists(st.integers(-5, 400), max_size=6), st.none(), st.floats(), st.binary())


@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(rows=st.lists(st.tuples(_ANY, _ANY), max_size=4), scores=st.lists(st.sampled_from(EVERY), max_size=3))
def test_any_input_gives_scores_or_our_error(tiny_engine: TransformersEngine, rows: Any, scores: list[str]) -> None:
    try:
        found = SelfEvaluator(tiny_engine, scores=scores).score_many(rows)
    except KVRouteError:
        return
    assert len(found) == len(rows)
    for evaluation in found:
        json.dumps(evaluation.to_dict(), allow_nan=False)


# ---------------------------------------------------------------------- confidence, async


def calibrator(engine: TransformersEngine) -> ConfidenceCalibrator:
    rows = [{"mean_logprob": -5.0 + (i % 10) / 10, "length": float(i)} for i in range(40)]
    return ConfidenceCalibrator.fit(rows, [i % 10 > 4 for i in range(40)], info=engine.info)


def test_confidence_is_the_calibrators_or_none_with_a_reason(
    tiny_engine: TransformersEngine, monkeypatch: pytest.MonkeyPatch, tmp_path: Any
) -> None:
    plain = SelfEvaluator(tiny_engine).score("a", "the cat")
    assert plain.confidence is None
    assert "no calibrator" in str(plain.confidence_reason)
    fitted = calibrator(tiny_engine)
    found = SelfEvaluator(tiny_engine, calibrator=fitted, scores=["kv-coe"]).score("a", "the cat")
    assert list(found.scores)[-2:] == ["mean_logprob", "length"]  # what the calibrator reads is there too
    assert found.confidence == fitted.confidence(found.scores)[0]
    assert found.confidence_reason is None
    fitted.save(tmp_path / "mine.json")
    monkeypatch.setenv("KVROUTE_CALIBRATORS", str(tmp_path))
    named = SelfEvaluator(tiny_engine, calibrator="mine").score("a", "the cat")
    assert named.confidence == found.confidence


def test_confidence_of_a_generation(tiny_engine: TransformersEngine) -> None:
    fitted = calibrator(tiny_engine)
    evaluator = SelfEvaluator(tiny_engine, calibrator=fitted)
    full = tiny_engine.generate("the cat", features=["logits", "length"], max_tokens=8)
    confidence, reason = evaluator.confidence(full)
    assert reason is None
    assert confidence == pytest.approx(evaluator.score("the cat", full).confidence, abs=1e-4)
    bare = tiny_engine.generate("the cat", features=["length"], max_tokens=8)
    assert evaluator.confidence(bare) == (None, "the score mean_logprob is missing, and the calibrator reads it")
    none, reason = SelfEvaluator(tiny_engine).confidence(full)
    assert none is None
    assert "no calibrator" in str(reason)


async def test_async_twins(tiny_engine: TransformersEngine) -> None:
    evaluator = SelfEvaluator(tiny_engine)
    rows = [("a", "the cat"), ("the dog", "sat on the mat")]
    found = await evaluator.ascore_many(rows)
    assert [e.scores for e in found] == [e.scores for e in evaluator.score_many(rows)]
    alone = await evaluator.ascore(*rows[0], finish_reason="length")
    assert alone.scores == evaluator.score(*rows[0], finish_reason="length").scores


async def test_cancelling_the_task_ends_the_work() -> None:
    engine = engine_of(token_budget=8)
    started, batches = asyncio.Event(), 0
    loop = asyncio.get_running_loop()
    read = engine.read

    def slow(*args: Any, **kwargs: Any) -> Any:
        nonlocal batches
        for batch, reading in read(*args, **kwargs):
            batches += 1
            loop.call_soon_threadsafe(started.set)
            import time

            time.sleep(0.05)
            yield batch, reading

    engine.read = slow  # type: ignore[method-assign]
    task = asyncio.create_task(SelfEvaluator(engine).ascore_many([("a", "the cat sat")] * 100))
    await started.wait()
    task.cancel()
    with pytest.raises(asyncio.CancelledError):
        await task
    await asyncio.sleep(0.3)
    done = batches
    await asyncio.sleep(0.2)
    assert batches == done < 10


def test_a_reading_holds_what_was_asked_for(tiny_engine: TransformersEngine) -> None:
    ids = [[4, 5, 6, 7, 8], [9, 10, 11]]
    for want in (["kv"], ["logits"], ["hidden"], ["kv", "hidden"]):
        for batch, reading in tiny_engine.read(ids, [2, 1], want=want, layers=[1, 3]):  # type: ignore[arg-type]
            assert isinstance(reading, Reading)
            assert (reading.view is not None) == ("kv" in want)
            assert (reading.logits is not None) == ("logits" in want)
            assert (reading.hidden is not None) == ("hidden" in want)
            if reading.view is not None:
                assert reading.view.layers == (1, 3)
                assert reading.view.host_lengths == [len(ids[i]) - 1 for i in batch]
    with pytest.raises(EmptyTextError):
        tiny_engine.read(ids, [2, 3], want=["kv"])
    with pytest.raises(EmptyTextError):
        tiny_engine.read(ids, [0, 1], want=["kv"])
