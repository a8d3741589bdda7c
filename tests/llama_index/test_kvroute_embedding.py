"""KVRouteEmbedding by itself: vectors, instructions, events, dicts, pickles, copies, threads, and what is refused."""

from __future__ import annotations

import asyncio
import copy
import json
import logging
import pickle
import subprocess
import sys
import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from llama_index.core.callbacks import CallbackManager, CBEventType, EventPayload, LlamaDebugHandler
from llama_index.core.instrumentation import get_dispatcher
from llama_index.core.instrumentation.event_handlers import BaseEventHandler
from llama_index.core.instrumentation.events.embedding import EmbeddingEndEvent, EmbeddingStartEvent
from llama_index.core.storage.kvstore import SimpleKVStore
from pydantic import Field, ValidationError

from kvroute import (
    EmptyTextError,
    InvalidInputError,
    KVEmbedder,
    ModelLoadError,
    PoolingSpec,
    ServerError,
    ServerTimeoutError,
    ServerUnreachableError,
    SpecError,
    TextTooLongError,
    TransformersEngine,
    VLLMClient,
)
from llama_index.embeddings.kvroute import KVRouteEmbedding
from serving_files import an_info
from vllm_stand_in import StandIn

ROOT = Path(__file__).resolve().parents[2]
THINKER = str(ROOT / "examples" / "tiny_thinker" / "model")
TEXTS = ["run so:a=1,b=2", "map so:c>e,d>k from c", "top so:7,3,9", "draw so:q"]
KEY = "s3cret-key"


@pytest.fixture(scope="module")
def engine() -> TransformersEngine:
    return TransformersEngine.from_pretrained(THINKER)


@pytest.fixture(scope="module")
def named() -> KVRouteEmbedding:
    return KVRouteEmbedding(THINKER, query_instruction="question: ", text_instruction="answer: {text}.")


def pickled(made: KVRouteEmbedding) -> Any:
    return pickle.loads(pickle.dumps(made))  # noqa: S301 - our own


# ---------------------------------------------------------------------- vectors


def test_vectors_are_the_embedders(named: KVRouteEmbedding, engine: TransformersEngine) -> None:
    embedder = KVEmbedder(engine)
    queries, texts = (
        embedder.encode(["question: " + t for t in TEXTS]),
        embedder.encode([f"answer: {t}." for t in TEXTS]),
    )
    assert np.abs(queries - texts).max() > 1e-2
    np.testing.assert_allclose([named.get_query_embedding(t) for t in TEXTS], queries, rtol=1e-4, atol=1e-5)
    np.testing.assert_allclose([named.get_text_embedding(t) for t in TEXTS], texts, rtol=1e-4, atol=1e-5)
    np.testing.assert_allclose(named.get_text_embedding_batch(TEXTS), texts, rtol=1e-4, atol=1e-5)
    assert all(type(number) is float for number in named.get_query_embedding("a"))


async def test_async_gives_the_same(named: KVRouteEmbedding) -> None:
    assert await named.aget_query_embedding(TEXTS[0]) == named.get_query_embedding(TEXTS[0])
    assert await named.aget_text_embedding(TEXTS[0]) == named.get_text_embedding(TEXTS[0])
    small = KVRouteEmbedding(THINKER, embed_batch_size=3, num_workers=2)
    together = await small.aget_text_embedding_batch(TEXTS, show_progress=True)
    np.testing.assert_allclose(together, small.get_text_embedding_batch(TEXTS), rtol=1e-4, atol=1e-5)


def test_an_engine_and_an_embedder_with_what_it_has(engine: TransformersEngine, tmp_path: Path) -> None:
    prompts = {"query": "q: ", "document": "d: "}
    fitted = KVEmbedder(engine, "paper-mteb", prompts=prompts).fit(TEXTS * 2, method="center")
    fitted.save(tmp_path)
    plain = KVRouteEmbedding(engine=engine, spec="paper-mteb", query_instruction="q: ")
    given = KVRouteEmbedding(embedder=fitted)
    saved = KVRouteEmbedding(THINKER, embedder_folder=tmp_path)
    np.testing.assert_allclose(given.get_query_embedding("a"), fitted.encode_query("a"), rtol=1e-5, atol=1e-6)
    np.testing.assert_allclose(given.get_text_embedding("a"), fitted.encode_document("a"), rtol=1e-5, atol=1e-6)
    np.testing.assert_allclose(saved.get_text_embedding("a"), given.get_text_embedding("a"), rtol=1e-5, atol=1e-6)
    assert np.abs(np.subtract(plain.get_query_embedding("a"), given.get_query_embedding("a"))).max() > 1e-3
    assert given.identity.digest == saved.identity.digest != plain.identity.digest
    bare = KVRouteEmbedding(embedder=fitted, query_instruction="")
    np.testing.assert_allclose(bare.get_query_embedding("a"), fitted.encode("a"), rtol=1e-5, atol=1e-6)


def test_normalize_and_truncate(engine: TransformersEngine) -> None:
    long = "run " * 600
    unit = KVRouteEmbedding(engine=engine, normalize=True, truncate=True)
    assert np.linalg.norm(unit.get_text_embedding(long)) == pytest.approx(1.0, abs=1e-5)
    assert np.linalg.norm(KVRouteEmbedding(engine=engine).get_text_embedding("run")) > 1.1
    with pytest.raises(TextTooLongError):
        KVRouteEmbedding(engine=engine).get_text_embedding(long)


# ---------------------------------------------------------------------- events


class Events(BaseEventHandler):
    seen: list[Any] = Field(default_factory=list)

    def handle(self, event: Any, **kwargs: Any) -> None:
        self.seen.append(event)


def test_events_and_callbacks_fire_and_hold_no_key(engine: TransformersEngine) -> None:
    debug, events, root = LlamaDebugHandler(print_trace_on_end=False), Events(), get_dispatcher()
    root.add_event_handler(events)
    try:
        made = KVRouteEmbedding(engine=engine, embed_batch_size=3, callback_manager=CallbackManager([debug]))
        vectors = made.get_text_embedding_batch(TEXTS, show_progress=True)
        query = made.get_query_embedding("a")
    finally:
        root.event_handlers.remove(events)
    starts = [e for e in events.seen if isinstance(e, EmbeddingStartEvent)]
    ends = [e for e in events.seen if isinstance(e, EmbeddingEndEvent)]
    assert [e.chunks for e in ends] == [TEXTS[:3], TEXTS[3:], ["a"]]
    assert [v for e in ends for v in e.embeddings] == [*vectors, query]
    said = {"class_name": "KVRouteEmbedding", "model_name": THINKER, "embed_batch_size": 3}
    assert said.items() <= starts[-1].model_dict.items()
    assert made.to_payload() == said
    pairs = debug.get_event_pairs(CBEventType.EMBEDDING)
    assert [end.payload[EventPayload.CHUNKS] for _, end in pairs] == [TEXTS[:3], TEXTS[3:], ["a"]]


def test_a_callback_that_raises_is_the_users_error_and_the_next_call_works(engine: TransformersEngine) -> None:
    class Broken(LlamaDebugHandler):
        def on_event_start(self, *args: Any, **kwargs: Any) -> str:
            raise RuntimeError("mine")

    made = KVRouteEmbedding(engine=engine, callback_manager=CallbackManager([Broken(print_trace_on_end=False)]))
    with pytest.raises(RuntimeError, match="mine"):
        made.get_query_embedding("a")
    made.callback_manager = CallbackManager([])
    assert made.get_query_embedding("a")


# ---------------------------------------------------------------------- dicts, pickles, copies


SETTINGS: dict[str, Any] = {
    "spec": PoolingSpec(layers=(0, 1), part="v"),
    "query_instruction": "q: ",
    "text_instruction": "",
    "normalize": True,
    "truncate": True,
    "embed_batch_size": 7,
    "dtype": "float32",
}


def test_to_dict_and_back() -> None:
    made = KVRouteEmbedding(THINKER, **SETTINGS)
    data = made.to_dict()
    assert data["class_name"] == KVRouteEmbedding.class_name() == "KVRouteEmbedding"
    again = KVRouteEmbedding.from_dict(json.loads(json.dumps(data)))
    assert again.to_dict() == data == KVRouteEmbedding.from_json(made.to_json()).to_dict()
    assert not again._embedder.opened
    assert again.get_query_embedding("a") == made.get_query_embedding("a")
    assert data["vectors"] != KVRouteEmbedding(THINKER, **{**SETTINGS, "spec": "fast"}).to_dict()["vectors"]


def test_a_given_engine_is_named_in_a_dict_and_must_be_given_again(engine: TransformersEngine) -> None:
    data = json.loads(KVRouteEmbedding(engine=engine, **{**SETTINGS, "dtype": "auto"}).to_json())
    assert data["model_name"] == engine.info.name
    with pytest.raises(InvalidInputError, match=r"tiny_thinker.*from_dict\(data, engine="):
        KVRouteEmbedding.from_dict(data)
    again = KVRouteEmbedding.from_dict(data, engine=engine)
    assert again.to_dict() == data
    assert KVRouteEmbedding.from_dict(data, model_name=THINKER).get_query_embedding("a") == again.get_query_embedding(
        "a"
    )


def test_what_is_fitted_is_in_the_dict_by_its_digest(engine: TransformersEngine, tmp_path: Path) -> None:
    embedder = KVEmbedder(engine).fit(TEXTS * 2, method="center")
    embedder.save(tmp_path)
    saved, given = KVRouteEmbedding(THINKER, embedder_folder=tmp_path), KVRouteEmbedding(embedder=embedder)
    before = saved.to_dict()["vectors"], given.to_dict()["vectors"]
    embedder.fit(TEXTS, method="standardize").save(tmp_path)
    assert (saved.to_dict()["vectors"], given.to_dict()["vectors"]) != before
    assert saved.to_dict()["vectors"] != before[0]
    assert given.to_dict()["vectors"] != before[1]


def test_pickles_and_copies(engine: TransformersEngine, caplog: pytest.LogCaptureFixture) -> None:
    made = KVRouteEmbedding(THINKER, callback_manager=CallbackManager([LlamaDebugHandler()]), **SETTINGS)
    again = pickled(made)
    assert again.to_dict() == made.to_dict()
    assert again.get_text_embedding("a") == made.get_text_embedding("a")
    given = KVRouteEmbedding(engine=engine)
    assert copy.deepcopy(given)._embedder.get().engine is engine
    assert given.model_copy()._embedder.get().engine is engine
    with pytest.raises(InvalidInputError, match="Name the model"):
        pickle.dumps(given)
    assert given.get_text_embedding("a")
    handler = LlamaDebugHandler(print_trace_on_end=False)
    handler.lock = threading.Lock()  # type: ignore[attr-defined]
    made.callback_manager = CallbackManager([handler])
    with caplog.at_level(logging.WARNING):
        assert pickled(made).callback_manager.handlers == []
    assert "without its callback_manager" in caplog.text
    assert made.callback_manager.handlers == [handler]


def test_keys_are_in_no_text_dict_or_pickle() -> None:
    made = KVRouteEmbedding(base_url="http://127.0.0.1:9", api_key=KEY)
    for said in (repr(made), str(made), made.to_json(), json.dumps(made.to_payload()), repr(made._embedder)):
        assert KEY not in said
    assert KEY.encode() not in pickle.dumps(made)
    assert made._embedder.engine is not None
    assert made._embedder.engine._api_key == KEY
    with pytest.raises(ValidationError) as refused:
        KVRouteEmbedding(base_url="http://127.0.0.1:9", api_key=KEY, embed_batch_size=0)
    assert KEY not in str(refused.value)


# ---------------------------------------------------------------------- threads, loops, tasks


def test_threads_and_two_event_loops(named: KVRouteEmbedding) -> None:
    expected = [named.get_text_embedding(t) for t in TEXTS]
    fresh = KVRouteEmbedding(THINKER, text_instruction="answer: {text}.")
    with ThreadPoolExecutor(4) as threads:
        found = list(threads.map(fresh.get_text_embedding, TEXTS * 4))
    np.testing.assert_allclose(found, expected * 4, rtol=1e-4, atol=1e-5)
    for _ in range(2):
        assert asyncio.run(fresh.aget_text_embedding(TEXTS[0])) == found[0]


async def test_a_cancelled_task_leaves_it_usable(named: KVRouteEmbedding) -> None:
    task = asyncio.create_task(named.aget_text_embedding_batch(TEXTS * 50))
    await asyncio.sleep(0.02)
    task.cancel()
    with pytest.raises(asyncio.CancelledError):
        await task
    assert await named.aget_text_embedding(TEXTS[0]) == named.get_text_embedding(TEXTS[0])


# ---------------------------------------------------------------------- what is refused


def test_a_bad_text_is_named_by_its_place_before_work_is_done(engine: TransformersEngine) -> None:
    debug = LlamaDebugHandler(print_trace_on_end=False)
    made = KVRouteEmbedding(engine=engine, embed_batch_size=1, callback_manager=CallbackManager([debug]))
    with pytest.raises(EmptyTextError) as empty:
        made.get_text_embedding_batch([*TEXTS, ""])
    with pytest.raises(TextTooLongError) as long:
        asyncio.run(made.aget_text_embedding_batch([*TEXTS, "a", "run " * 600]))
    assert (empty.value.index, long.value.index) == (4, 5)
    assert not debug.get_event_pairs(CBEventType.EMBEDDING)
    assert made.get_text_embedding_batch([]) == []


@pytest.mark.parametrize(
    ("wrong", "error", "words"),
    [
        ({}, InvalidInputError, "Give one of"),
        ({"model_name": THINKER, "engine": object()}, InvalidInputError, "Give one of"),
        ({"model_name": THINKER, "spec": "bets"}, SpecError, "bets"),
        ({"model_name": THINKER, "spec": "best", "embedder_folder": "x"}, InvalidInputError, "spec or the folder"),
        ({"model_name": THINKER, "embeddings_cache": SimpleKVStore()}, InvalidInputError, "mixed up"),
        ({"model_name": THINKER, "embed_bach_size": 3}, TypeError, "embed_bach_size"),
    ],
)
def test_settings_that_make_no_sense(wrong: dict[str, Any], error: type[Exception], words: str) -> None:
    with pytest.raises(error, match=words):
        KVRouteEmbedding(**wrong)


def test_settings_that_would_not_be_heeded_can_not_be_changed(named: KVRouteEmbedding) -> None:
    with pytest.raises(ValidationError, match="frozen"):
        named.spec = "fast"
    with pytest.raises(ModelLoadError):
        KVRouteEmbedding("/no/such/folder").get_query_embedding("a")


SPEC = PoolingSpec(layers="last:1", heads="concat")


@pytest.fixture
def stand_in() -> Iterator[StandIn]:
    with StandIn() as server:
        server.result = lambda body, _: {"kvroute": {"features": {"0": [float(len(body["prompt"]))] * 32}}}
        yield server


def test_a_server_that_is_gone_and_comes_back(stand_in: StandIn) -> None:
    with VLLMClient(stand_in.url, info=an_info(), retries=0) as client:
        made = KVRouteEmbedding(engine=client, spec=SPEC)
        assert made.get_text_embedding("abc") == [4.0] * 32
        port = int(stand_in.url.rpartition(":")[2])
        stand_in.die()
        with pytest.raises(ServerUnreachableError):
            made.get_text_embedding("abc")
        with StandIn(port=port) as again:
            again.result = stand_in.result
            assert made.get_text_embedding("abcd") == [5.0] * 32


def test_a_server_that_is_too_slow(stand_in: StandIn) -> None:
    with VLLMClient(stand_in.url, info=an_info(), timeout=0.3, retries=0) as client:
        made = KVRouteEmbedding(engine=client, spec=SPEC)
        stand_in.delay = 2.0
        with pytest.raises(ServerTimeoutError):
            made.get_text_embedding("abc")
        stand_in.delay = 0.0
        assert made.get_text_embedding("abc") == [4.0] * 32


async def test_nothing_of_a_text_is_logged(
    named: KVRouteEmbedding, stand_in: StandIn, caplog: pytest.LogCaptureFixture
) -> None:
    for logger in ("kvroute", "kvroute_kernels", "llama_index.embeddings.kvroute"):
        caplog.set_level(logging.DEBUG, logger=logger)
    text = "sesame opens the door"
    assert named.get_text_embedding_batch([text, text]) == await named.aget_text_embedding_batch([text, text])
    assert named.get_query_embedding(text)
    with pytest.raises(TextTooLongError):
        named.get_text_embedding_batch(["a", "sesame " * 600])
    with VLLMClient(stand_in.url, info=an_info(), retries=0, connect_timeout=0.5) as client:
        made = KVRouteEmbedding(engine=client, spec=SPEC)
        assert made.get_text_embedding(text)
        stand_in.act = lambda handler, _: handler.refuse(500, f"can't read {text}") is None
        with pytest.raises(ServerError, match="sesame"):
            await made.aget_query_embedding(text)
        stand_in.die()
        with pytest.raises(ServerUnreachableError):
            made.get_text_embedding_batch([text])
    assert "sesame" not in caplog.text


def test_a_servers_key_comes_from_the_setting_and_in_a_pickle_from_the_environment(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    with StandIn(token=KEY) as server:
        made = KVRouteEmbedding(base_url=f"{server.url}/v1", api_key=KEY)
        with made._embedder.engine.get() as client:
            assert client.tokenize_texts(["a"])
            with pickled(made)._embedder.engine.get() as stranger, pytest.raises(ServerError, match="401"):
                stranger.tokenize_texts(["a"])
            monkeypatch.setenv("KVROUTE_API_KEY", KEY)
            assert pickled(made)._embedder.engine.get() is client


# ---------------------------------------------------------------------- importing


def test_without_llama_index_it_says_the_pip_line() -> None:
    code = (
        "import importlib.machinery as m, sys\n"
        "class No:\n"
        "    def find_spec(self, name, path=None, target=None):\n"
        "        if name == 'llama_index.core': return None\n"
        "real = m.PathFinder.find_spec\n"
        "m.PathFinder.find_spec = lambda n, *a: None if n.startswith('llama_index.core') else real(n, *a)\n"
        "import llama_index.embeddings.kvroute"
    )
    ran = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert ran.returncode == 1
    assert "pip install 'kvroute[llama-index]'" in ran.stderr


def test_importing_it_loads_no_model_code() -> None:
    code = "import llama_index.embeddings.kvroute, sys; print('transformers' in sys.modules, 'vllm' in sys.modules)"
    ran = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert ran.stdout.split() == ["False", "False"]
