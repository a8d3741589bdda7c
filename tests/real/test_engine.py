"""The engine's main claims again, on the real SmolLM2."""

from __future__ import annotations

import threading
from typing import Any

import numpy as np
import pytest
import torch

import reference
from kvroute import PoolingSpec, TransformersEngine, pool

pytestmark = pytest.mark.real

TEXTS = [
    "The river rose two metres overnight and carried off the footbridge.",
    "Interest rates were left unchanged.",
    "Why does bread go stale faster in the fridge than on the counter? Starch crystallises near freezing.",
    "def add(a, b):\n    return a + b\n",
    "Быстрая лисица прыгает через ленивую собаку, 速い茶色の狐, 🦊.",
    "ok",
]
CHATS = [
    [{"role": "user", "content": "What is the capital of France?"}],
    [{"role": "system", "content": "You answer in one word."}, {"role": "user", "content": "What colour is the sky?"}],
    [{"role": "user", "content": "Count from one to five."}],
    [{"role": "user", "content": "Name three animals that can fly, and say for each of them why it can."}],
]
SPECS = [
    PoolingSpec.preset("paper-mteb"),
    PoolingSpec.preset("paper-classifier"),
    PoolingSpec(layers="all", heads="concat", layer_reduce="concat"),
    PoolingSpec(layers=0.5, part="v", weights="position"),
    PoolingSpec(layers=[0, -1], part="k", tokens="last", heads="concat"),
]


@pytest.fixture(scope="module")
def smollm2_bf16() -> TransformersEngine:
    return TransformersEngine.from_pretrained("smollm2", dtype=torch.bfloat16)


@pytest.mark.parametrize("engine", ["smollm2", "smollm2_bf16"])
def test_vectors_equal_float64_from_the_models_own_cache(engine: str, request: pytest.FixtureRequest) -> None:
    loaded: TransformersEngine = request.getfixturevalue(engine)
    assert loaded.info.dtype == ("float32" if engine == "smollm2" else "bfloat16")
    for text in TEXTS:
        ids = loaded.tokenize(text)
        cache = reference.stock_cache(loaded.model, ids)
        assert len(cache) == 30
        for spec, vectors in zip(SPECS, loaded.pool([ids], SPECS), strict=True):
            assert reference.relative_error(vectors[0], reference.pool(cache, spec)) < 1e-5, (text, spec)


def test_a_batch_in_bfloat16_stays_within_its_rounding(smollm2_bf16: TransformersEngine) -> None:
    ids = [smollm2_bf16.tokenize(t) for t in TEXTS]
    together = smollm2_bf16.pool(ids, SPECS[2:3])[0]
    for place, text in enumerate(ids):
        wanted = reference.pool(reference.stock_cache(smollm2_bf16.model, text), SPECS[2])
        assert reference.relative_error(together[place], wanted) < 4 * torch.finfo(torch.bfloat16).eps


def test_a_vector_does_not_depend_on_its_batch(smollm2: TransformersEngine) -> None:
    generator = np.random.default_rng(0)
    words = " ".join(TEXTS[:4]).split()
    texts = [" ".join(generator.choice(words, size=n)) for n in generator.integers(1, 30, size=64)]
    ids = [smollm2.tokenize(t) for t in texts]
    together = smollm2.pool(ids, [SPECS[2]])[0]
    order = generator.permutation(64)
    assert reference.relative_error(smollm2.pool([ids[i] for i in order], [SPECS[2]])[0], together[order]) < 1e-5
    for place in range(8):
        assert reference.relative_error(smollm2.pool([ids[place]], [SPECS[2]])[0][0], together[place]) < 1e-5
    for batch, view in smollm2.prefill(ids[:16], padding="left"):
        for vector, place in zip(pool(view, SPECS[2]), batch, strict=True):
            assert reference.relative_error(vector, together[place]) < 1e-5


def test_half_the_depth_runs_half_the_layers_and_gives_the_same(smollm2: TransformersEngine) -> None:
    ids = [smollm2.tokenize(t) for t in TEXTS]
    ran: list[int] = []
    handles = [
        layer.register_forward_pre_hook(lambda *_, i=i: ran.append(i))
        for i, layer in enumerate(smollm2.model.get_decoder().layers)
    ]
    try:
        half = smollm2.pool(ids, [PoolingSpec(layers=0.5)])[0]
    finally:
        for handle in handles:
            handle.remove()
    assert max(ran) == 14
    assert np.array_equal(half, smollm2.pool(ids, [PoolingSpec(layers=0.5), PoolingSpec(layers="all")])[0])


def stock(engine: TransformersEngine, ids: list[int], count: int) -> list[int]:
    mask = torch.ones(1, len(ids), dtype=torch.long)
    out = engine.model.generate(torch.tensor([ids]), attention_mask=mask, do_sample=False, max_new_tokens=count)
    return out[0, len(ids) :].tolist()


def test_greedy_is_that_of_the_model_alone_and_batched(smollm2: TransformersEngine) -> None:
    together = smollm2.generate(CHATS, max_tokens=40)
    for chat, answer in zip(CHATS, together, strict=True):
        wanted = stock(smollm2, smollm2.tokenize(chat), 40)
        assert answer.token_ids == wanted
        assert smollm2.generate(chat, max_tokens=40).token_ids == wanted
    assert "Paris" in together[0].text
    assert {a.finish_reason for a in together} == {"stop", "length"}  # they do end at different steps


def test_chains_kept_while_writing_are_those_of_the_formula(smollm2: TransformersEngine) -> None:
    prompt = [{"role": "user", "content": "Write a long story about a lighthouse keeper and her dog."}]
    answer = smollm2.generate(prompt, max_tokens=250, features=["kv-coe", "answer:paper-mteb"])
    assert len(answer.token_ids) > 150
    ids = answer.prompt_token_ids + answer.token_ids[:-1]  # the last one has no keys and values yet
    low = len(answer.prompt_token_ids)
    cache = reference.stock_cache(smollm2.model, ids)
    token = reference.coe(reference.token_chain(cache, low, len(ids)))
    layer = reference.coe(reference.layer_chain(cache, low, len(ids)))
    found = answer.scores
    assert (found["kv_coe_r_token"].value, found["kv_coe_c_token"].value) == pytest.approx(token, rel=1e-4)
    assert (found["kv_coe_r_layer"].value, found["kv_coe_c_layer"].value) == pytest.approx(layer, rel=1e-4)
    part = [(k[:, low:], v[:, low:]) for k, v in cache]
    wanted = reference.pool(part, PoolingSpec.preset("paper-mteb"))
    assert reference.relative_error(answer.features["answer:paper-mteb"], wanted) < 1e-5


def test_a_prefix_saves_work_and_changes_nothing(smollm2: TransformersEngine) -> None:
    system = {"role": "system", "content": "You are a careful assistant who answers briefly and never invents facts."}
    chats = [[system, *chat[-1:]] for chat in CHATS[:2]]
    features: Any = {"vector": PoolingSpec.preset("paper-mteb"), "chain": "kv-coe"}
    prefix = smollm2.prefix([system])
    for a, b in zip(
        smollm2.generate(chats, max_tokens=25, features=features),
        smollm2.generate(chats, max_tokens=25, features=features, prefix=prefix),
        strict=True,
    ):
        assert a.token_ids == b.token_ids
        assert reference.relative_error(b.features["vector"], a.features["vector"]) < 1e-5
        assert b.usage.cached > 15
        assert b.usage.cached + b.usage.computed == a.usage.computed
        for name, score in a.scores.items():
            assert b.scores[name].value == pytest.approx(score.value, rel=1e-3)


def test_two_threads_at_once(smollm2: TransformersEngine) -> None:
    ids = [smollm2.tokenize(t) for t in TEXTS]
    vectors = smollm2.pool(ids, [PoolingSpec(layers=[3])])[0]
    answer = smollm2.generate(CHATS[0], max_tokens=15).token_ids
    faults: list[str] = []

    def read() -> None:
        for _ in range(4):
            if reference.relative_error(smollm2.pool(ids, [PoolingSpec(layers=[3])])[0], vectors) > 1e-5:
                faults.append("vectors")

    def write() -> None:
        for _ in range(2):
            if smollm2.generate(CHATS[0], max_tokens=15).token_ids != answer:
                faults.append("answer")

    threads = [threading.Thread(target=work) for work in (read, write, read)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not faults
    assert stock(smollm2, smollm2.tokenize(CHATS[0]), 15) == answer


def test_a_stream_of_real_text(smollm2: TransformersEngine) -> None:
    wanted = smollm2.generate(CHATS, max_tokens=40, stop=["five", " the"])
    pieces = [""] * len(CHATS)
    last: dict[int, Any] = {}
    for chunk in smollm2.stream(CHATS, max_tokens=40, stop=["five", " the"]):
        pieces[chunk.index] += chunk.text
        last[chunk.index] = chunk.generation
    assert pieces == [g.text for g in wanted] == [last[i].text for i in range(len(CHATS))]
    assert not any("five" in p or " the" in p for p in pieces)


def test_one_checkpoint_has_one_fingerprint(smollm2: TransformersEngine, smollm2_bf16: TransformersEngine) -> None:
    assert smollm2.info.fingerprint == smollm2_bf16.info.fingerprint
    assert smollm2.info.dtype != smollm2_bf16.info.dtype
    assert (smollm2.info.num_layers, smollm2.info.layers[0].sizes, smollm2.info.context) == (30, (3, 64, 64), 8192)
