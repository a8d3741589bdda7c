"""Answers: token for token those of model.generate, alone and batched; features come out of the same passes."""

from __future__ import annotations

import asyncio
import threading
import time
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import reference
from kvroute import (
    CancelToken,
    ChainSpec,
    Generation,
    InvalidInputError,
    ModelMismatchError,
    OutOfMemoryError,
    PoolingSpec,
    SamplingOptions,
    SpecError,
    TextTooLongError,
    TransformersEngine,
)
from kvroute.engines.text import TextStream
from tiny_models import BOS, EOS, PAD, VOCAB, build_model, build_tokenizer

PROMPTS = [
    "the quick brown fox jumps over the lazy dog",
    "what?",
    "a language model keeps the keys and values of every token it has read, and the question is the answer",
    "cat",
    "and the dog sat on the mat",
]
LONG = 30  # past every sliding window of the tiny models


def stock_greedy(engine: TransformersEngine, ids: list[int], count: int, **kwargs: Any) -> list[int]:
    out = engine.model.generate(
        torch.tensor([ids]), attention_mask=torch.ones(1, len(ids), dtype=torch.long), do_sample=False,
        max_new_tokens=count, **kwargs,
    )  # fmt: skip
    return out[0, len(ids) :].tolist()


def with_ends(engine: TransformersEngine, ends: list[int]) -> TransformersEngine:
    """The same model with other end tokens (a copy of its config only), so that answers end early."""
    model = build_model(engine.info.name.removeprefix("tiny-"))
    model.generation_config.eos_token_id = ends
    return TransformersEngine(model, engine.tokenizer, name=engine.info.name)


# ---------------------------------------------------------------------- greedy


def test_greedy_is_token_for_token_that_of_the_model(tiny_engines: TransformersEngine) -> None:
    together = tiny_engines.generate(PROMPTS, max_tokens=LONG)
    for prompt, batched in zip(PROMPTS, together, strict=True):
        alone = tiny_engines.generate(prompt, max_tokens=LONG)
        wanted = stock_greedy(tiny_engines, tiny_engines.tokenize(prompt), LONG)
        assert alone.token_ids == wanted
        assert batched.token_ids == wanted
        assert batched.text == alone.text == tiny_engines.tokenizer.decode(wanted, skip_special_tokens=True)


def test_batched_greedy_is_that_of_a_left_padded_batch(standard_engine: TransformersEngine) -> None:
    tokenizer = build_tokenizer()
    tokenizer.padding_side = "left"
    inputs = tokenizer(PROMPTS, return_tensors="pt", padding=True)
    inputs.pop("token_type_ids", None)
    out = standard_engine.model.generate(**inputs, do_sample=False, max_new_tokens=LONG)
    width = inputs["input_ids"].shape[1]
    for row, answer in zip(out[:, width:].tolist(), standard_engine.generate(PROMPTS, max_tokens=LONG), strict=True):
        assert row[: len(answer.token_ids)] == answer.token_ids


def test_answers_that_end_at_different_steps(tiny_engines: TransformersEngine) -> None:
    """Some answers end early and leave the batch, which is then made smaller: the others go on as if alone."""
    full = [stock_greedy(tiny_engines, tiny_engines.tokenize(p), LONG) for p in PROMPTS]
    ends = sorted({tokens[min(at, len(tokens) - 1)] for tokens, at in zip(full, (2, 9, 40, 5, 17), strict=True)})
    engine = with_ends(tiny_engines, ends)
    answers = engine.generate(PROMPTS, max_tokens=LONG, features=["kv-coe", PoolingSpec(layers="all"), "length"])
    lengths = set()
    for tokens, answer in zip(full, answers, strict=True):
        cut = next(i + 1 for i, t in enumerate(tokens) if t in ends)
        assert answer.token_ids == tokens[:cut]
        assert answer.finish_reason == "stop"
        assert answer.scores["length"].value == cut
        assert not answer.feature_errors
        lengths.add(cut)
        cache = reference.stock_cache(engine.model, answer.prompt_token_ids + answer.token_ids[:-1])
        low, high = len(answer.prompt_token_ids), len(answer.prompt_token_ids) + cut - 1
        if high - low >= 3:
            chain = reference.token_chain(cache, low, high)
            assert (answer.scores["kv_coe_r_token"].value, answer.scores["kv_coe_c_token"].value) == pytest.approx(
                reference.coe(chain), rel=1e-4, abs=1e-5
            )
        else:
            assert answer.scores["kv_coe_r_token"].value is None
    assert len(lengths) >= 3


@pytest.mark.parametrize("architecture", ["llama", "gemma3"])
def test_a_long_answer_outgrows_the_room_it_was_given(architecture: str, tiny_tokenizer: Any) -> None:
    """The cache grows past 256 tokens; one answer leaves the batch in between."""
    model = build_model(architecture, eos_token_id=None)
    model.generation_config.eos_token_id = None
    tiny = TransformersEngine(model, tiny_tokenizer)
    full = [stock_greedy(tiny, tiny.tokenize(p), 290) for p in PROMPTS[:2]]
    ends = [t for t in full[0] if t not in full[1]]
    assert ends, "the answers share all their tokens: choose other prompts"
    model.generation_config.eos_token_id = ends[-1]
    answers = tiny.generate(PROMPTS[:2], max_tokens=290, features="kv-coe")
    assert answers[0].token_ids == full[0][: full[0].index(ends[-1]) + 1]
    assert answers[1].token_ids == full[1]
    ids = answers[1].prompt_token_ids + full[1][:-1]
    cache = reference.stock_cache(model, ids)
    wanted = reference.coe(reference.token_chain(cache, len(answers[1].prompt_token_ids), len(ids)))
    found = answers[1].scores
    assert (found["kv_coe_r_token"].value, found["kv_coe_c_token"].value) == pytest.approx(wanted, rel=1e-4)


def test_repetition_penalty_of_the_models_own_config(standard_engine: TransformersEngine) -> None:
    engine = with_ends(standard_engine, [EOS])
    plain = engine.generate(PROMPTS[0], max_tokens=LONG).token_ids
    engine.model.generation_config.repetition_penalty = 1.7
    answers = engine.generate(PROMPTS, max_tokens=LONG)
    for prompt, answer in zip(PROMPTS, answers, strict=True):
        assert answer.token_ids == stock_greedy(engine, engine.tokenize(prompt), LONG)
    assert answers[0].token_ids != plain
    assert engine.generate(PROMPTS[0], max_tokens=LONG, repetition_penalty=1.0).token_ids == plain


def test_the_first_token_may_end_the_answer(tiny_engine: TransformersEngine) -> None:
    first = tiny_engine.generate(PROMPTS[0], max_tokens=1).token_ids
    engine = with_ends(tiny_engine, first)
    answer = engine.generate(PROMPTS[0], max_tokens=9, features=["kv-coe", "logits", "answer:paper-mteb", "length"])
    assert answer.token_ids == first
    assert answer.text == ""
    assert answer.finish_reason == "stop"
    assert answer.usage.generated == 1
    assert answer.usage.computed == answer.usage.prompt
    assert answer.feature_errors == {"answer:paper-mteb": "The answer has no token with keys and values."}
    assert answer.scores["kv_coe_r_token"].value is None
    assert "0 vectors" in str(answer.scores["kv_coe_r_token"].reason)
    assert answer.scores["mean_logprob"].value is not None


def test_prompts_and_answers_fill_the_context_exactly(tiny_tokenizer: Any) -> None:
    engine = TransformersEngine(build_model("llama", max_position_embeddings=32), tiny_tokenizer)
    prompt = "zq" * 12  # 24 tokens
    assert len(engine.tokenize(prompt)) == 24
    assert len(engine.generate(prompt, max_tokens=9).token_ids) == 9  # the last one is never run
    with pytest.raises(TextTooLongError, match="max_tokens"):
        engine.generate(prompt, max_tokens=10)
    assert len(engine.generate("zq" * 16, max_tokens=1).token_ids) == 1
    with pytest.raises(InvalidInputError, match="Lower max_tokens"):
        engine.generate(prompt, max_tokens=33)


# ---------------------------------------------------------------------- sampling


def test_a_seed_fixes_the_answer_whatever_the_batch(tiny_engine: TransformersEngine) -> None:
    options = SamplingOptions(max_tokens=12, temperature=0.9, top_p=0.9, seed=11)
    alone = [tiny_engine.generate(p, options=options).token_ids for p in PROMPTS]
    assert [g.token_ids for g in tiny_engine.generate(PROMPTS, options=options)] == alone
    assert [g.token_ids for g in tiny_engine.generate(PROMPTS[::-1], options=options)] == alone[::-1]
    other = tiny_engine.generate(PROMPTS[0], options=options.model_copy(update={"seed": 12})).token_ids
    assert other != alone[0]
    unseeded = {tuple(tiny_engine.generate(PROMPTS[0], max_tokens=12, temperature=1.0).token_ids) for _ in range(3)}
    assert len(unseeded) == 3


def test_equal_prompts_get_answers_of_their_own_that_can_be_had_again(tiny_engine: TransformersEngine) -> None:
    first = [g.token_ids for g in tiny_engine.generate(["cat"] * 4, max_tokens=8, temperature=1.0, seed=3)]
    assert len({tuple(t) for t in first}) == 4
    assert first == [g.token_ids for g in tiny_engine.generate(["cat"] * 4, max_tokens=8, temperature=1.0, seed=3)]


def test_top_p_keeps_to_the_nucleus_and_draws_as_the_model_says(tiny_engine: TransformersEngine) -> None:
    ids = tiny_engine.tokenize(PROMPTS[0])
    with torch.no_grad():
        probabilities = torch.softmax(tiny_engine.model(torch.tensor([ids])).logits[0, -1] / 1.5, dim=-1)
    ordered, tokens = probabilities.sort(descending=True)
    count = int((ordered.cumsum(0) - ordered < 0.5).sum())
    nucleus = set(tokens[:count].tolist())
    drawn = tiny_engine.generate([PROMPTS[0]] * 400, max_tokens=1, temperature=1.5, top_p=0.5, seed=1)
    counts = np.bincount([g.token_ids[0] for g in drawn], minlength=VOCAB)
    assert set(np.flatnonzero(counts)) <= nucleus
    kept = torch.zeros(VOCAB).index_put((tokens[:count],), ordered[:count])
    expected = (kept / kept.sum()).numpy() * 400
    chi = float((((counts - expected) ** 2)[expected > 0] / expected[expected > 0]).sum())
    assert chi < count + 4 * (2 * count) ** 0.5  # 4 standard deviations; the seed is fixed
    tiny = tiny_engine.generate([PROMPTS[0]] * 20, max_tokens=1, temperature=5.0, top_p=1e-9, seed=1)
    assert {g.token_ids[0] for g in tiny} == {int(tokens[0])}


# ---------------------------------------------------------------------- text


def test_a_stop_text_across_token_borders_ends_the_answer(tiny_engine: TransformersEngine) -> None:
    for prompt in PROMPTS:
        whole = tiny_engine.generate(prompt, max_tokens=LONG)
        text = whole.text
        for low, size in [(3, 1), (5, 4), (9, 2), (0, 1)]:
            stop = text[low : low + size]
            if "\ufffd" in stop:
                continue
            found = tiny_engine.generate(prompt, max_tokens=LONG, stop=stop)
            assert found.text == text[: text.index(stop)]
            assert found.finish_reason == "stop"
            assert found.token_ids == whole.token_ids[: len(found.token_ids)]
            assert stop in tiny_engine.tokenizer.decode(found.token_ids)
            assert stop not in tiny_engine.tokenizer.decode(found.token_ids[:-1])
            streamed = "".join(c.text for c in tiny_engine.stream(prompt, max_tokens=LONG, stop=stop))
            assert streamed == found.text
    assert tiny_engine.generate(PROMPTS[0], max_tokens=5, stop=["never there", "nor here"]).finish_reason == "length"


def test_stop_texts_in_a_batch_end_their_own_answers(tiny_engine: TransformersEngine) -> None:
    texts = [tiny_engine.generate(p, max_tokens=LONG).text for p in PROMPTS]
    stop = next(c for c in texts[0][4:] if c.isascii())
    for text, answer in zip(texts, tiny_engine.generate(PROMPTS, max_tokens=LONG, stop=(stop,)), strict=True):
        assert answer.text == text.split(stop)[0]


@settings(max_examples=60, deadline=None)
@given(text=st.text(max_size=40), extra=st.lists(st.integers(4, VOCAB - 1), max_size=12), stop=st.text(max_size=3))
def test_pieces_joined_are_the_text(text: str, extra: list[int], stop: str) -> None:
    tokenizer = build_tokenizer()
    ids = tokenizer(text.encode("utf-8", "replace").decode())["input_ids"] + extra  # any bytes, whole characters or not
    plain = TextStream(tokenizer)
    pieces = [plain.push(t) for t in ids] + [plain.finish()]
    whole = tokenizer.decode(ids, skip_special_tokens=True)
    assert "".join(pieces) == plain.text == whole
    stopped = TextStream(tokenizer, [stop])
    shown = ""
    for token in ids:
        shown += stopped.push(token)
        assert not stop or stop not in shown
        if stopped.stopped:
            break
    shown += stopped.finish()
    assert shown == stopped.text == (whole.split(stop)[0] if stop else whole)


def test_a_stream_says_what_generate_says(tiny_engines: TransformersEngine) -> None:
    features = {"all": PoolingSpec(layers="all"), "coe": ChainSpec(), "logits": "logits"}
    wanted = tiny_engines.generate(PROMPTS, max_tokens=LONG, features=features)
    chunks = list(tiny_engines.stream(PROMPTS, max_tokens=LONG, features=features))
    for index, answer in enumerate(wanted):
        mine = [c for c in chunks if c.index == index]
        assert "".join(c.text for c in mine) == answer.text
        assert [c.token_id for c in mine] == answer.token_ids
        assert [c.generation is None for c in mine] == [True] * (len(mine) - 1) + [False]
        last = mine[-1].generation
        assert last is not None
        assert last.token_ids == answer.token_ids
        assert last.text == answer.text
        assert last.usage == answer.usage
        assert np.array_equal(last.features["all"], answer.features["all"])
        assert last.scores == answer.scores


def test_streams_check_their_arguments_at_the_call(tiny_engine: TransformersEngine) -> None:
    with pytest.raises(SpecError):
        tiny_engine.stream("the", max_tokens=0)


# ---------------------------------------------------------------------- features


def test_features_are_those_of_a_fresh_prefill(tiny_engines: TransformersEngine) -> None:
    count = tiny_engines.info.num_layers
    specs = {
        "mean": PoolingSpec(layers="all", heads="concat", layer_reduce="concat"),
        "last": PoolingSpec(layers=[0, count - 1], tokens="last", part="v"),
        "sif": PoolingSpec(layers=0.5, weights="sif"),
        "window": PoolingSpec(layers="last:2", window=4, tokens="sum"),
    }
    answers = tiny_engines.generate(PROMPTS, max_tokens=LONG, features=[*specs] and {**specs, "coe": "kv-coe"})
    pooled = tiny_engines.pool([a.prompt_token_ids for a in answers], list(specs.values()))
    for place, answer in enumerate(answers):
        assert not answer.feature_errors
        assert list(answer.features) == list(specs)
        for name, vectors in zip(specs, pooled, strict=True):
            assert answer.features[name].dtype == np.float32
            assert reference.relative_error(answer.features[name], vectors[place]) < 1e-5
        ids = answer.prompt_token_ids + answer.token_ids[:-1]
        low = len(answer.prompt_token_ids)
        cache = reference.stock_cache(tiny_engines.model, ids)
        for axis, chain in (
            ("token", reference.token_chain(cache, low, len(ids))),
            ("layer", reference.layer_chain(cache, low, len(ids))),
        ):
            if axis == "layer" and count < 3:
                assert answer.scores["kv_coe_r_layer"].value is None
                continue
            found = (answer.scores[f"kv_coe_r_{axis}"].value, answer.scores[f"kv_coe_c_{axis}"].value)
            assert found == pytest.approx(reference.coe(chain), rel=1e-4, abs=1e-5)


def test_answer_features_leave_out_the_last_sampled_token(tiny_engine: TransformersEngine) -> None:
    answer = tiny_engine.generate(PROMPTS[0], max_tokens=9, features="answer:paper-mteb")
    cache = reference.stock_cache(tiny_engine.model, answer.prompt_token_ids + answer.token_ids)
    low = len(answer.prompt_token_ids)
    part = [(k[:, low : low + 8], v[:, low : low + 8]) for k, v in cache]
    wanted = reference.pool(part, PoolingSpec.preset("paper-mteb"))
    assert reference.relative_error(answer.features["answer:paper-mteb"], wanted) < 1e-5


def test_logit_scores_are_those_of_the_models_logits(tiny_engine: TransformersEngine) -> None:
    answer = tiny_engine.generate(PROMPTS[1], max_tokens=15, features="logits")
    ids = answer.prompt_token_ids + answer.token_ids
    with torch.no_grad():
        logprobs = tiny_engine.model(torch.tensor([ids])).logits[0].double().log_softmax(-1)
    rows = logprobs[len(answer.prompt_token_ids) - 1 : -1]
    chosen = rows[torch.arange(15), torch.tensor(answer.token_ids)]
    assert answer.scores["mean_logprob"].value == pytest.approx(float(chosen.mean()), rel=1e-4)
    assert answer.scores["entropy"].value == pytest.approx(float(-(rows.exp() * rows).sum(-1).mean()), rel=1e-4)
    assert answer.scores["max_probability"].value == pytest.approx(float(rows.exp().amax(-1).mean()), rel=1e-4)


def test_nothing_asked_nothing_given(tiny_engine: TransformersEngine) -> None:
    answer = tiny_engine.generate("cat", max_tokens=3)
    assert (answer.features, answer.scores, answer.feature_errors) == ({}, {}, {})
    assert answer.timings.features == 0
    assert answer.timings.prefill > 0
    assert answer.timings.decode > 0
    assert answer.timings.total == answer.timings.prefill + answer.timings.decode


@pytest.mark.parametrize(
    "features",
    [
        "nonsense",
        "prompt:nonsense",
        "",
        5,
        [5],
        ["kv-coe", ChainSpec(layers=[0, 1, 2])],
        {"a": ChainSpec(), "b": ChainSpec(layers=[0])},
        [PoolingSpec(), PoolingSpec(window=3)],
        PoolingSpec(layers=[9]),
    ],
)
def test_features_that_can_not_be_given_are_refused(features: Any, tiny_engine: TransformersEngine) -> None:
    with pytest.raises(SpecError):
        tiny_engine.generate("cat", max_tokens=2, features=features)


def test_a_fault_in_the_cache_costs_the_feature_and_not_the_answer(tiny_tokenizer: Any) -> None:
    model = build_model("llama")
    with torch.no_grad():
        model.get_decoder().layers[3].self_attn.v_proj.weight[0, 0] = float("nan")
    engine = TransformersEngine(model, tiny_tokenizer)
    answer = engine.generate(
        "the quick", max_tokens=5, features=["kv-coe", "logits", PoolingSpec(layers=[0]), "prompt:paper-mteb"]
    )
    assert len(answer.token_ids) == 5
    assert set(answer.feature_errors) == {"kv-coe", "prompt:paper-mteb"}
    assert "values of layer 3 at token 0" in answer.feature_errors["prompt:paper-mteb"]
    assert np.isfinite(answer.features["prompt"]).all()
    assert "layer 3" in str(answer.scores["kv_coe_r_token"].reason)
    assert answer.scores["mean_logprob"].value is None
    assert "not finite" in str(answer.scores["mean_logprob"].reason)
    sampled = engine.generate("the quick", max_tokens=5, temperature=1.0, top_p=0.9)
    assert len(sampled.token_ids) == 5


def test_a_fault_in_one_answers_cache_spares_its_neighbours(tiny_tokenizer: Any) -> None:
    model = build_model("llama")
    with torch.no_grad():
        model.get_input_embeddings().weight[BOS] = float("inf")
    engine = TransformersEngine(model, tiny_tokenizer)
    spec = PoolingSpec(layers="all")
    good, bad, other = engine.generate(["cat", "a<|bos|>b", "the dog"], max_tokens=6, features=[spec, "kv-coe"])
    assert set(bad.feature_errors) == {"prompt", "kv-coe"}
    for answer in (good, other):
        assert not answer.feature_errors
        assert (
            reference.relative_error(answer.features["prompt"], engine.pool([answer.prompt_token_ids], [spec])[0][0])
            < 1e-5
        )
        assert answer.scores["kv_coe_r_token"].value is not None


# ---------------------------------------------------------------------- usage and prefixes


def test_usage_counts_what_was_computed(tiny_engine: TransformersEngine) -> None:
    for answer in tiny_engine.generate(PROMPTS, max_tokens=7):
        assert answer.usage.prompt == len(answer.prompt_token_ids)
        assert answer.usage.cached == 0
        assert answer.usage.generated == len(answer.token_ids) == 7
        assert answer.usage.computed == answer.usage.prompt + 6


def test_a_prefix_changes_nothing_but_the_work(standard_engine: TransformersEngine) -> None:
    head = "a language model keeps the keys and values of every token "
    prompts = [head + "it has read", head + "cat", head + "and the question, and the answer: what is it?", head]
    features = {"all": PoolingSpec(layers="all", heads="concat", layer_reduce="concat"), "coe": "kv-coe"}
    plain = standard_engine.generate(prompts, max_tokens=LONG, features=features)
    prefix = standard_engine.prefix(head)
    before = [s.keys.clone() for s, _, _ in prefix.cache.slabs]
    again = standard_engine.generate(prompts, max_tokens=LONG, features=features, prefix=prefix)
    single = [standard_engine.generate(p, max_tokens=LONG, features=features, prefix=prefix) for p in prompts]
    for a, b, c in zip(plain, again, single, strict=True):
        assert a.token_ids == b.token_ids == c.token_ids
        for other in (b, c):
            assert not other.feature_errors
            assert reference.relative_error(other.features["all"], a.features["all"]) < 1e-5
            for name, score in a.scores.items():
                found = other.scores[name]
                assert (found.value is None) == (score.value is None)
                assert score.value is None or found.value == pytest.approx(score.value, rel=1e-3, abs=1e-4)
            assert other.usage.prompt == a.usage.prompt
            assert other.usage.cached + other.usage.computed == a.usage.computed
    assert [g.usage.cached for g in single[:3]] == [prefix.common(g.prompt_token_ids) for g in single[:3]]
    assert single[3].usage.cached == len(prefix.token_ids) - 1  # one token has to run to give logits
    assert all(g.usage.cached > 0 for g in again[:3])
    assert all(torch.equal(x, s.keys) for x, (s, _, _) in zip(before, prefix.cache.slabs, strict=True))


def test_a_prefix_that_fits_in_part_or_not_at_all(standard_engine: TransformersEngine) -> None:
    prefix = standard_engine.prefix("the quick brown fox jumps over the lazy dog and more")
    for prompt, shared in [("the quick brown cat", True), ("zzz", False), ("the", False)]:
        plain = standard_engine.generate(prompt, max_tokens=8, features=PoolingSpec(layers="all"))
        found = standard_engine.generate(prompt, max_tokens=8, features=PoolingSpec(layers="all"), prefix=prefix)
        assert found.token_ids == plain.token_ids
        assert (found.usage.cached > 0) == shared
        assert reference.relative_error(found.features["prompt"], plain.features["prompt"]) < 1e-5


def test_a_chat_prefix(tiny_engine: TransformersEngine) -> None:
    system = [{"role": "system", "content": "answer the question"}]
    chats = [[*system, {"role": "user", "content": text}] for text in ("what?", "and the dog")]
    prefix = tiny_engine.prefix(system)
    for a, b in zip(
        tiny_engine.generate(chats, max_tokens=9), tiny_engine.generate(chats, max_tokens=9, prefix=prefix), strict=True
    ):
        assert a.token_ids == b.token_ids
        assert b.usage.cached > 0
    assert tiny_engine.generate(chats[0], max_tokens=1, prefix=prefix).usage.cached == len(prefix.token_ids)


def test_a_prefix_of_another_model_is_refused(tiny_engine: TransformersEngine, tiny_tokenizer: Any) -> None:
    other = TransformersEngine(build_model("llama", seed=4), tiny_tokenizer, name="another")
    with pytest.raises(ModelMismatchError, match="tiny-llama"):
        tiny_engine.generate("the quick", max_tokens=2, prefix=other.prefix("the quick"))


# ---------------------------------------------------------------------- ending it


def test_cancelling_gives_the_answers_so_far(tiny_engine: TransformersEngine) -> None:
    cancel = CancelToken()
    wanted = tiny_engine.generate(PROMPTS[0], max_tokens=50)
    pieces = []
    last = None
    for chunk in tiny_engine.stream(PROMPTS[0], max_tokens=50, cancel=cancel, features=["kv-coe", "length"]):
        pieces.append(chunk.text)
        last = chunk.generation
        if len(pieces) == 8:
            cancel.cancel()
    assert last is not None
    assert last.finish_reason == "cancelled"
    assert last.token_ids == wanted.token_ids[:8]
    assert "".join(pieces) == last.text
    assert last.scores["length"].value == 8
    assert last.scores["kv_coe_r_token"].value is not None


def test_what_is_cancelled_before_it_begins_runs_nothing(tiny_engine: TransformersEngine) -> None:
    cancel = CancelToken()
    cancel.cancel()
    calls = []
    handle = tiny_engine.model.get_decoder().register_forward_pre_hook(lambda *_: calls.append(1))
    try:
        answers = tiny_engine.generate(
            PROMPTS, max_tokens=9, cancel=cancel, features=["kv-coe", "prompt:paper-mteb", "answer:paper-mteb"]
        )
    finally:
        handle.remove()
    assert not calls
    assert [a.finish_reason for a in answers] == ["cancelled"] * len(PROMPTS)
    for answer in answers:
        assert answer.token_ids == []
        assert answer.text == ""
        assert answer.usage.computed == 0
        assert set(answer.feature_errors) >= {"prompt:paper-mteb", "answer:paper-mteb"}
        assert answer.scores["kv_coe_r_token"].value is None


def test_leaving_a_stream_ends_the_work(tiny_engine: TransformersEngine) -> None:
    stream = tiny_engine.stream(PROMPTS, max_tokens=500)
    next(stream)
    assert not torch.is_inference_mode_enabled()  # nor does it leak into the caller
    stream.close()
    assert tiny_engine.generate("cat", max_tokens=3).token_ids


def kvroute_threads() -> list[threading.Thread]:
    return [t for t in threading.enumerate() if t.name == "kvroute-stream"]


async def until(condition: Callable[[], bool], seconds: float = 10) -> None:
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end, "it did not come to an end"
        await asyncio.sleep(0.01)


async def test_the_async_twins_say_the_same(tiny_engine: TransformersEngine) -> None:
    wanted = tiny_engine.generate(PROMPTS, max_tokens=LONG, features="kv-coe")
    found = await tiny_engine.agenerate(PROMPTS, max_tokens=LONG, features="kv-coe")
    assert isinstance(found, list)
    assert [g.token_ids for g in found] == [g.token_ids for g in wanted]
    single = await tiny_engine.agenerate(PROMPTS[0], max_tokens=LONG)
    assert isinstance(single, Generation)
    token = CancelToken()
    answers: dict[int, Any] = {}
    pieces = [""] * len(PROMPTS)
    async for chunk in tiny_engine.astream(PROMPTS, max_tokens=LONG, features="kv-coe", cancel=token):
        pieces[chunk.index] += chunk.text
        if chunk.generation:
            answers[chunk.index] = chunk.generation
    assert pieces == [g.text for g in wanted]
    assert [answers[i].scores for i in range(len(PROMPTS))] == [g.scores for g in wanted]
    assert not token.cancelled  # the caller's own: it is not used up by a stream that ended
    with pytest.raises(SpecError):
        async for _ in tiny_engine.astream("cat", max_tokens=0):
            pass
    with pytest.raises(SpecError):
        await tiny_engine.agenerate("cat", max_tokens=0)


async def test_cancelling_the_task_ends_the_work(tiny_engine: TransformersEngine) -> None:
    steps = []
    handle = tiny_engine.model.get_decoder().register_forward_pre_hook(lambda *_: steps.append(1))
    try:
        task = asyncio.create_task(tiny_engine.agenerate(PROMPTS[0], max_tokens=4000))
        await until(lambda: len(steps) > 3)
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task

        async def read() -> None:
            async for _ in tiny_engine.astream(PROMPTS[0], max_tokens=4000):
                pass

        task = asyncio.create_task(read())
        await until(lambda: bool(kvroute_threads()))
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task
        await until(lambda: not kvroute_threads())
        count = len(steps)
        await asyncio.sleep(0.2)
        assert len(steps) == count
        assert count < 3000
    finally:
        handle.remove()


async def test_leaving_an_async_stream_ends_the_work(tiny_engine: TransformersEngine) -> None:
    async for _ in tiny_engine.astream(PROMPTS, max_tokens=3000):
        break
    await until(lambda: not kvroute_threads())


async def test_answers_in_several_tasks_at_once(tiny_engine: TransformersEngine) -> None:
    wanted = [tiny_engine.generate(p, max_tokens=15).token_ids for p in PROMPTS]
    found = await asyncio.gather(*(tiny_engine.agenerate(p, max_tokens=15) for p in PROMPTS))
    assert [g.token_ids for g in found] == wanted  # type: ignore[union-attr]


# ---------------------------------------------------------------------- memory


def test_memory_that_runs_out_during_prefill_or_writing_loses_no_answer(tiny_tokenizer: Any) -> None:
    engine = TransformersEngine(build_model("llama"), tiny_tokenizer)
    prompts = [f"the quick brown fox {i}" for i in range(12)]
    wanted = [g.token_ids for g in engine.generate(prompts, max_tokens=10)]
    calls: list[int] = []

    def check(_module: Any, _args: Any, kwargs: dict[str, Any]) -> None:
        rows, new = kwargs["input_ids"].shape
        calls.append(rows)
        if rows > (4 if new == 1 and len(calls) > 3 else 9):  # the batch fits at first, and no more while it is written
            raise torch.OutOfMemoryError("CUDA out of memory.")

    handle = engine.model.get_decoder().register_forward_pre_hook(check, with_kwargs=True)
    with pytest.warns(RuntimeWarning, match="budget is halved"):
        found = engine.generate(prompts, max_tokens=10)
    assert [g.token_ids for g in found] == wanted

    def never(_module: Any, _args: Any, kwargs: dict[str, Any]) -> None:
        if kwargs["input_ids"].shape[1] == 1:
            raise torch.OutOfMemoryError("CUDA out of memory.")

    handle.remove()
    handle = engine.model.get_decoder().register_forward_pre_hook(never, with_kwargs=True)
    with pytest.raises(OutOfMemoryError, match="Prompt 0"):
        engine.generate(prompts[0], max_tokens=10)
    with pytest.raises(OutOfMemoryError):
        list(engine.stream(prompts, max_tokens=10))
    handle.remove()


def test_end_tokens_are_the_models_or_the_tokenizers(tiny_tokenizer: Any) -> None:
    from kvroute.engines.sampling import end_tokens

    model = build_model("llama")
    assert end_tokens(model, tiny_tokenizer) == {EOS}
    model.generation_config.eos_token_id = [7, 9]
    assert end_tokens(model, tiny_tokenizer) == {7, 9}
    model.generation_config.eos_token_id = None
    assert end_tokens(model, tiny_tokenizer) == {EOS}
    assert PAD not in end_tokens(model, tiny_tokenizer)
