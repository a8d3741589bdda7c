"""TransformersEngine: prefill for features, on every architecture, against the model's own cache in float64."""

from __future__ import annotations

import threading
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import reference
from kvroute import (
    ChainSpec,
    ChatTemplateError,
    EmptyTextError,
    InvalidInputError,
    KVRouteError,
    NonFiniteCacheError,
    OutOfMemoryError,
    PoolingSpec,
    SpecError,
    TextTooLongError,
    TransformersEngine,
    UnsupportedModelError,
    pool,
)
from tiny_models import VOCAB, build_model, build_tokenizer

SPECS = [
    PoolingSpec(layers="all"),
    PoolingSpec(layers="all", part="k", tokens="sum", heads="concat", layer_reduce="concat"),
    PoolingSpec(layers=[-1, 0], part="v", tokens="last", heads="concat", layer_reduce="concat"),
    PoolingSpec(layers=0.5, tokens="first", layer_reduce="sum"),
    PoolingSpec(layers="last:2", window=3, normalize=True),
    PoolingSpec(layers="first:1", weights="position", layer_reduce="last", heads="concat"),
    PoolingSpec(layers="all", weights="sif", part="v"),
    PoolingSpec.preset("paper-mteb").model_copy(update={"layers": "last:2"}),
]


def texts(count: int, longest: int, seed: int = 0) -> list[list[int]]:
    """Token ids of mixed lengths, the longest among them."""
    generator = np.random.default_rng(seed)
    lengths = [longest, 1, *generator.integers(1, longest + 1, size=max(count - 2, 0)).tolist()][:count]
    return [generator.integers(4, VOCAB, size=n).tolist() for n in lengths]


def test_vectors_equal_the_float64_computation_from_the_models_own_cache(tiny_engines: TransformersEngine) -> None:
    ids = texts(9, 37)
    sif = np.random.default_rng(1).random(VOCAB).astype(np.float32)
    found = tiny_engines.pool(ids, SPECS, sif_weights=sif)
    for place, text in enumerate(ids):
        cache = reference.stock_cache(tiny_engines.model, text)
        assert len(cache) == tiny_engines.info.num_layers
        for spec, vectors in zip(SPECS, found, strict=True):
            wanted = reference.pool(cache, spec, sif=sif[text])
            assert vectors.dtype == np.float32
            assert vectors.shape[1] == spec.dimension(tiny_engines.info) == len(wanted)
            assert reference.relative_error(vectors[place], wanted) < 1e-5, (spec, len(text))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_in_half_precision_only_the_cache_is_rounded(dtype: torch.dtype, tiny_tokenizer: Any) -> None:
    """The model's own cache in that dtype, summed in float64: no rounding is added but float32's."""
    engine = TransformersEngine(build_model("llama", dtype=dtype), tiny_tokenizer)
    ids = texts(1, 200)
    for spec, vectors in zip(SPECS[:6], engine.pool(ids, SPECS[:6]), strict=True):
        wanted = reference.pool(reference.stock_cache(engine.model, ids[0]), spec)
        assert reference.relative_error(vectors[0], wanted) < 1e-5
    padded = engine.pool([*ids, *texts(5, 180, seed=3)], SPECS[:1])[0][0]
    wanted = reference.pool(reference.stock_cache(engine.model, ids[0]), SPECS[0])
    assert reference.relative_error(padded, wanted) < 4 * torch.finfo(dtype).eps  # the kernels' own rounding


def test_a_vector_does_not_depend_on_batch_order_or_padding_side(tiny_engines: TransformersEngine) -> None:
    ids = texts(64, 23, seed=5)
    spec = PoolingSpec(layers="all", heads="concat", layer_reduce="concat")
    together = tiny_engines.pool(ids, [spec])[0]
    order = np.random.default_rng(0).permutation(64)
    shuffled = tiny_engines.pool([ids[i] for i in order], [spec])[0]
    assert reference.relative_error(shuffled, together[order]) < 1e-5
    alone = np.concatenate([tiny_engines.pool([t], [spec])[0] for t in ids[:12]])
    for place in range(12):
        assert reference.relative_error(together[place], alone[place]) < 1e-5
    for batch, view in tiny_engines.prefill(ids, padding="left"):
        left = pool(view, spec)
        for row, place in enumerate(batch):
            assert reference.relative_error(left[row], together[place]) < 1e-5


@contextmanager
def counted_layers(model: Any) -> Iterator[list[int]]:
    """Decoder layers that were entered."""
    ran: list[int] = []
    decoder = model.get_decoder()
    handles = [
        layer.register_forward_pre_hook(lambda *_args, i=i: ran.append(i)) for i, layer in enumerate(decoder.layers)
    ]
    head = model.get_output_embeddings()
    handles.append(head.register_forward_pre_hook(lambda *_args: ran.append(-1)))
    try:
        yield ran
    finally:
        for handle in handles:
            handle.remove()


def test_no_layer_below_the_deepest_and_no_lm_head_is_run(tiny_engines: TransformersEngine) -> None:
    info = tiny_engines.info
    for deepest in range(info.num_layers):
        spec = PoolingSpec(layers=[0, deepest] if deepest else [0])
        assert spec.deepest_layer(info) == deepest
        with counted_layers(tiny_engines.model) as ran:
            early = tiny_engines.pool([[5, 6, 7, 8, 9, 10, 11, 12]], [spec])[0]
        assert ran == list(range(info.layers[deepest].model_layer + 1))
        full = tiny_engines.pool([[5, 6, 7, 8, 9, 10, 11, 12]], [spec, PoolingSpec(layers="all")])[0]
        assert np.array_equal(early, full)


def state_of(model: Any) -> tuple[Any, ...]:
    hooks = [
        (name, len(m._forward_hooks), len(m._forward_pre_hooks), "forward" in vars(m))
        for name, m in model.named_modules()
    ]
    weights = {k: v.clone() for k, v in model.state_dict().items()}
    return weights, model.config.to_dict(), model.generation_config.to_dict(), hooks, model.training


def assert_same_state(before: tuple[Any, ...], after: tuple[Any, ...]) -> None:
    assert before[1:] == after[1:]
    assert before[0].keys() == after[0].keys()
    assert all(torch.equal(v, after[0][k]) for k, v in before[0].items())


def test_the_model_is_as_it_was_afterwards(tiny_model: Callable[..., Any], tiny_tokenizer: Any) -> None:
    model = tiny_model("gemma3")
    prompt = torch.tensor([[9, 8, 7, 6, 5]])
    written = model.generate(prompt, do_sample=False, max_new_tokens=12)
    states = model(prompt, output_hidden_states=True).hidden_states
    engine = TransformersEngine(model, tiny_tokenizer)
    before = state_of(model)
    engine.pool(texts(5, 11), [PoolingSpec(layers=[1])])
    assert_same_state(before, state_of(model))

    def broken(*_args: Any) -> None:
        raise ValueError("a fault of the model's own")

    handle = model.get_decoder().layers[2].register_forward_pre_hook(broken)
    with pytest.raises(ValueError, match="own"):
        engine.pool(texts(5, 11), [PoolingSpec(layers=[4])])
    handle.remove()
    assert_same_state(before, state_of(model))
    assert torch.equal(model.generate(prompt, do_sample=False, max_new_tokens=12), written)
    after = model(prompt, output_hidden_states=True).hidden_states
    assert len(after) == len(states)
    assert all(torch.equal(a, b) for a, b in zip(states, after, strict=True))


def test_two_threads_use_one_model_at_once(tiny_engine: TransformersEngine) -> None:
    ids = texts(30, 25, seed=8)
    shallow, deep = PoolingSpec(layers=[0]), PoolingSpec(layers="all")
    wanted = {"shallow": tiny_engine.pool(ids, [shallow])[0], "deep": tiny_engine.pool(ids, [deep])[0]}
    answer = tiny_engine.generate("the quick", max_tokens=12).token_ids
    faults: list[str] = []

    def work(name: str, spec: PoolingSpec) -> None:
        for _ in range(6):
            if not np.array_equal(tiny_engine.pool(ids, [spec])[0], wanted[name]):
                faults.append(name)

    def write() -> None:
        for _ in range(6):
            if tiny_engine.generate("the quick", max_tokens=12).token_ids != answer:
                faults.append("generate")

    threads = [
        threading.Thread(target=work, args=("shallow", shallow)),
        threading.Thread(target=work, args=("deep", deep)),
        threading.Thread(target=write),
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not faults


# ---------------------------------------------------------------------- hybrids and windows


def test_indices_of_a_hybrid_count_its_attention_layers(hybrid_engine: TransformersEngine) -> None:
    info = hybrid_engine.info
    assert info.num_layers == 2
    assert info.model_layers == 4
    assert [layer.model_layer for layer in info.layers] == [1, 3]
    with pytest.raises(SpecError, match="has 2 attention layers"):
        hybrid_engine.pool([[5, 6]], [PoolingSpec(layers=[3])])


def test_a_hybrid_keeps_no_prefix(hybrid_engine: TransformersEngine) -> None:
    with pytest.raises(UnsupportedModelError, match="recurrent state"):
        hybrid_engine.prefix("the quick brown fox")


def test_a_model_without_keys_and_values_is_refused(tiny_model: Callable[..., Any], tiny_tokenizer: Any) -> None:
    with pytest.raises(UnsupportedModelError, match="no layer that keeps keys and values"):
        TransformersEngine(tiny_model("mamba"), tiny_tokenizer)
    with pytest.raises(UnsupportedModelError, match="mix attention and a recurrent state"):
        TransformersEngine(tiny_model("falcon_h1"), tiny_tokenizer)


@pytest.mark.parametrize("architecture", ["mistral", "gemma3"])
def test_layers_with_a_window_still_give_all_tokens(
    architecture: str, tiny_model: Callable[..., Any], tiny_tokenizer: Any
) -> None:
    engine = TransformersEngine(tiny_model(architecture), tiny_tokenizer)
    windows = [layer.window for layer in engine.info.layers]
    assert windows == ([7] * 4 if architecture == "mistral" else [5, None, 5, 5, None])
    ids = texts(3, 40)
    found = engine.pool(ids, [PoolingSpec(layers="all", tokens="first")])[0]
    for place, text in enumerate(ids):
        wanted = reference.pool(reference.stock_cache(engine.model, text), PoolingSpec(layers="all", tokens="first"))
        assert reference.relative_error(found[place], wanted) < 1e-5


# ---------------------------------------------------------------------- faults


def test_nan_in_a_weight_is_reported_with_its_layer(tiny_model: Callable[..., Any], tiny_tokenizer: Any) -> None:
    model = tiny_model("llama")
    with torch.no_grad():
        model.get_decoder().layers[2].self_attn.v_proj.weight[3, 0] = float("nan")
    engine = TransformersEngine(model, tiny_tokenizer)
    assert np.isfinite(engine.pool([[5, 6, 7]], [PoolingSpec(layers=[0, 1])])[0]).all()
    with pytest.raises(NonFiniteCacheError, match="values of layer 2 at token 0") as caught:
        engine.pool([[5, 6, 7]], [PoolingSpec(layers="all")])
    assert (caught.value.layer, caught.value.position, caught.value.part) == (2, 0, "values")


def test_nan_is_reported_with_its_token_and_text(tiny_model: Callable[..., Any], tiny_tokenizer: Any) -> None:
    model = tiny_model("qwen3")
    with torch.no_grad():
        model.get_input_embeddings().weight[77] = float("inf")
    engine = TransformersEngine(model, tiny_tokenizer)
    with pytest.raises(NonFiniteCacheError) as caught:
        engine.pool([[5, 6], [9, 8, 7, 6], [5, 6, 77, 8]], [PoolingSpec(layers=[0])])
    assert (caught.value.sequence, caught.value.layer, caught.value.position) == (2, 0, 2)
    assert "sequence 2" in str(caught.value)


@pytest.mark.parametrize(
    ("ids", "error"),
    [
        ([[5], []], EmptyTextError),
        ([[5] * 4097], TextTooLongError),
        ([[5], [VOCAB]], InvalidInputError),
        ([[-1]], InvalidInputError),
    ],
)
def test_bad_texts_are_refused_before_anything_runs(
    ids: list[list[int]], error: type[Exception], tiny_engine: TransformersEngine
) -> None:
    with counted_layers(tiny_engine.model) as ran, pytest.raises(error):
        tiny_engine.pool(ids, [PoolingSpec(layers="all")])
    assert not ran


@pytest.mark.parametrize("layers", [[], [5], [-1], [0, 99]])
def test_prefill_refuses_layers_that_are_not_there(layers: list[int], tiny_engine: TransformersEngine) -> None:
    with pytest.raises(SpecError):
        list(tiny_engine.prefill([[5, 6]], layers=layers))


def test_nothing_to_do(tiny_engine: TransformersEngine) -> None:
    assert tiny_engine.pool([], [PoolingSpec()])[0].shape == (0, 20)
    assert tiny_engine.pool([[5]], []) == []
    assert list(tiny_engine.prefill([])) == []
    assert tiny_engine.generate([]) == []


def test_a_model_in_training_mode_is_refused(tiny_model: Callable[..., Any], tiny_tokenizer: Any) -> None:
    with pytest.raises(InvalidInputError, match=r"eval\(\)"):
        TransformersEngine(tiny_model("llama").train(), tiny_tokenizer)
    with pytest.raises(InvalidInputError, match="at least 1"):
        TransformersEngine(tiny_model("llama"), tiny_tokenizer, token_budget=0)


# ---------------------------------------------------------------------- memory


@contextmanager
def memory_of(model: Any, tokens: int) -> Iterator[list[int]]:
    """The decoder runs out of memory when more than so many tokens go in at once."""
    tried: list[int] = []

    def check(_module: Any, _args: Any, kwargs: dict[str, Any]) -> None:
        tried.append(kwargs["input_ids"].numel())
        if tried[-1] > tokens:
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB")

    handle = model.get_decoder().register_forward_pre_hook(check, with_kwargs=True)
    try:
        yield tried
    finally:
        handle.remove()


def test_out_of_memory_halves_the_budget_and_loses_nothing(tiny_model: Callable[..., Any], tiny_tokenizer: Any) -> None:
    engine = TransformersEngine(tiny_model("llama"), tiny_tokenizer, token_budget=256)
    ids = texts(40, 30, seed=2)
    wanted = engine.pool(ids, [PoolingSpec(layers="all")])[0]
    with memory_of(engine.model, 70) as tried, pytest.warns(RuntimeWarning, match="halved to") as warned:
        found = engine.pool(ids, [PoolingSpec(layers="all")])[0]
    assert engine.token_budget == 64
    assert len(warned) == 2
    assert max(tried) > 70
    assert reference.relative_error(found, wanted) < 1e-5
    with memory_of(engine.model, 70), warnings.catch_warnings():
        warnings.simplefilter("error")
        engine.pool(ids, [PoolingSpec(layers="all")])  # what was learnt is kept


def test_a_single_text_that_does_not_fit_is_our_error(tiny_model: Callable[..., Any], tiny_tokenizer: Any) -> None:
    engine = TransformersEngine(tiny_model("llama"), tiny_tokenizer, token_budget=64)
    with memory_of(engine.model, 20), pytest.raises(OutOfMemoryError, match="Text 0 with 30 tokens") as caught:
        engine.pool([[6] * 30], [PoolingSpec(layers="all")])
    assert isinstance(caught.value.__cause__, torch.OutOfMemoryError)
    with memory_of(engine.model, 20), pytest.raises(OutOfMemoryError, match="Prompt 0"):
        engine.generate("the quick brown fox " * 5, max_tokens=4)


def test_other_errors_of_the_model_are_not_taken_for_a_lack_of_memory(
    tiny_model: Callable[..., Any], tiny_tokenizer: Any
) -> None:
    engine = TransformersEngine(tiny_model("llama"), tiny_tokenizer)

    def broken(*_args: Any) -> None:
        raise RuntimeError("shapes do not match")

    handle = engine.model.get_decoder().register_forward_pre_hook(broken)
    with pytest.raises(RuntimeError, match="shapes"):
        engine.pool([[5], [6]], [PoolingSpec(layers="all")])
    handle.remove()


# ---------------------------------------------------------------------- any text


@settings(max_examples=60, deadline=None)
@given(
    text=st.one_of(st.text(), st.text(alphabet=st.characters(categories=("Cs", "Cc", "Lu", "So"))), st.just("\x00")),
    spec=st.builds(
        dict,
        layers=st.one_of(st.sampled_from(["all", "last:2", "first:99", "nope", ""]), st.floats(), st.integers(-9, 9))
        | st.lists(st.integers(-6, 6), max_size=4),
        part=st.sampled_from(["k", "v", "kv", "x"]),
        tokens=st.sampled_from(["mean", "sum", "last", "first"]),
        window=st.one_of(st.none(), st.integers(-2, 50)),
        heads=st.sampled_from(["mean", "concat"]),
        layer_reduce=st.sampled_from(["mean", "sum", "last", "concat"]),
        normalize=st.booleans(),
    ),
)
def test_any_text_and_any_spec_give_a_vector_or_our_error(
    text: str, spec: dict[str, Any], tiny_engine: TransformersEngine
) -> None:
    try:
        chosen = PoolingSpec(**spec)
        ids = tiny_engine.tokenize(text)
        vector = tiny_engine.pool([ids], [chosen])[0]
    except KVRouteError:
        return
    assert vector.shape == (1, chosen.dimension(tiny_engine.info))
    assert np.isfinite(vector).all()


@settings(max_examples=40, deadline=None)
@given(
    text=st.text(max_size=60) | st.text(alphabet=st.characters(categories=("Cs", "Cc", "So")), max_size=20),
    options=st.fixed_dictionaries(
        {"max_tokens": st.integers(-1, 6)},
        optional={
            "temperature": st.floats(-1, 3) | st.just(float("nan")),
            "top_p": st.floats(-0.5, 1.5),
            "seed": st.integers(-1, 2**64),
            "stop": st.text(max_size=2) | st.lists(st.text(max_size=3), max_size=2),
            "repetition_penalty": st.floats(-1, 3),
            "nonsense": st.just(1),
        },
    ),
    chat=st.booleans(),
)
def test_any_text_and_any_options_give_an_answer_or_our_error(
    text: str, options: dict[str, Any], chat: bool, tiny_engine: TransformersEngine
) -> None:
    prompt: Any = [{"role": "user", "content": text}] if chat else text
    try:
        answer = tiny_engine.generate(prompt, features=["kv-coe", "logits"], **options)
    except KVRouteError:
        return
    assert 1 <= len(answer.token_ids) <= options["max_tokens"]
    assert not answer.feature_errors


def test_a_text_of_100_kilobytes(tiny_tokenizer: Any, tiny_engine: TransformersEngine) -> None:
    text = "the quick brown fox \x00 \U0001f600" * 4000
    with pytest.raises(TextTooLongError, match="the limit is 4096"):
        tiny_engine.pool([tiny_engine.tokenize(text)], [PoolingSpec()])
    with pytest.raises(TextTooLongError, match="max_tokens"):
        tiny_engine.generate(text, max_tokens=1)


@pytest.mark.parametrize(
    "prompts", [5, None, b"bytes", [1], [[]], [["a"]], ["a", 3], [{"role": "user"}], {"role": "user"}, [[{"x": 1}]]]
)
def test_what_is_no_prompt_is_refused(prompts: Any, tiny_engine: TransformersEngine) -> None:
    with pytest.raises(KVRouteError):
        tiny_engine.generate(prompts, max_tokens=1)


def test_lone_surrogates_are_refused_everywhere(tiny_engine: TransformersEngine) -> None:
    for call in (
        lambda: tiny_engine.tokenize("a\ud800"),
        lambda: tiny_engine.generate("a\ud800"),
        lambda: tiny_engine.generate([{"role": "user", "content": "\udfff"}]),
        lambda: tiny_engine.prefix([{"role": "user", "content": "\udfff"}]),
        lambda: tiny_engine.prefix("\udfff"),
    ):
        with pytest.raises(InvalidInputError, match="can't be tokenized"):
            call()


def test_a_chat_needs_a_template(tiny_model: Callable[..., Any]) -> None:
    tokenizer = build_tokenizer()
    tokenizer.chat_template = None
    engine = TransformersEngine(tiny_model("llama"), tokenizer)
    with pytest.raises(ChatTemplateError, match="no chat template"):
        engine.generate([{"role": "user", "content": "hi"}])
    tokenizer.chat_template = "{{ raise_exception('roles must alternate') }}"
    with pytest.raises(ChatTemplateError, match="roles must alternate"):
        engine.generate([{"role": "user", "content": "hi"}])


def test_chain_layers_are_checked_before_anything_runs(tiny_engine: TransformersEngine) -> None:
    with counted_layers(tiny_engine.model) as ran, pytest.raises(SpecError, match="has 5 attention layers"):
        tiny_engine.generate("the", features=ChainSpec(layers=[7]))
    assert not ran
