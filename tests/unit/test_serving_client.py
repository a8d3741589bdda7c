"""The client of vLLM servers, over real HTTP. The servers are stand-ins (see ``vllm_stand_in``), not vLLM."""

from __future__ import annotations

import asyncio
import builtins
import gc
import itertools
import threading
import time
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import pytest

from kvroute import CancelToken, ChainSpec, FrequencyTable, KVEmbedder, Policy, PoolingSpec, Score, TokenIds
from kvroute.errors import (
    AskError,
    ConnectorMissingError,
    EmptyTextError,
    InvalidInputError,
    KVRouteError,
    MissingExtraError,
    ModelLoadError,
    ModelMismatchError,
    ServerError,
    ServerTimeoutError,
    ServerUnreachableError,
    SpecError,
    UnsupportedModelError,
)
from kvroute.features import AnswerPooling
from kvroute.generation import SamplingOptions
from kvroute.labelling import Question, label_questions
from kvroute.serving.about import About
from kvroute.serving.client import VLLMClient
from kvroute.serving.jobs import Decide
from serving_files import INFO, a_head, an_info
from tiny_models import build_tokenizer
from vllm_stand_in import MODEL, StandIn, features_of, words


@pytest.fixture
def server() -> Iterator[StandIn]:
    with StandIn() as it:
        yield it


@pytest.fixture
def client(server: StandIn) -> Iterator[VLLMClient]:
    with VLLMClient(server.url) as it:
        yield it


def until(true: Callable[[], bool], seconds: float = 5.0) -> None:
    end = time.monotonic() + seconds
    while not true():
        assert time.monotonic() < end
        time.sleep(0.005)


def first(times: int, deed: Callable[[Any], None]) -> Callable[[Any, dict[str, Any]], bool]:
    """Do something to the first few completions."""
    left = itertools.count(1)

    def act(handler: Any, _: dict[str, Any]) -> bool:
        if handler.path != "/v1/completions" or next(left) > times:
            return False
        deed(handler)
        return True

    return act


# ---------------------------------------------------------------------- answers


def test_an_answer(server: StandIn, client: VLLMClient) -> None:
    answer = client.generate("abc", max_tokens=3)
    assert answer.text == " w0 w1 w2"
    assert answer.token_ids == [0, 1, 2]
    assert answer.prompt_token_ids == words("abc")
    assert answer.finish_reason == "length"
    assert (answer.usage.prompt, answer.usage.cached, answer.usage.computed, answer.usage.generated) == (3, 2, 3, 3)
    assert answer.timings.total > 0
    assert not answer.features
    assert not answer.feature_errors
    assert client.model == MODEL
    sent = server.requests[0]
    assert "kv_transfer_params" not in sent
    assert sent["top_k"] == 0


def test_features(server: StandIn, client: VLLMClient) -> None:
    mine = PoolingSpec(layers="last:2", part="v")
    asked = {"p": "prompt:paper-mteb", "mine": mine, "a": AnswerPooling(mine), "chain": "kv-coe", "len": "length"}
    answer = client.generate("abc", features=asked, max_tokens=2)
    assert server.requests[0]["kv_transfer_params"]["kvroute"]["features"] == {
        "p": "prompt:paper-mteb",
        "mine": {"layers": "last:2", "part": "v"},
        "a": {"layers": "last:2", "part": "v", "of": "answer"},
        "chain": "kv-coe",
        "len": "length",
    }
    assert set(answer.features) == {"p", "mine", "a"}
    assert answer.features["mine"].dtype == np.float32
    assert answer.features["mine"].tolist() == features_of(words("abc"))
    assert answer.scores["kv_coe_r_token"].value == 0.25
    assert answer.scores["kv_coe_c_token"].reason == "The answer has one token."
    assert set(answer.feature_errors) == {"len"}  # the stand-in does not give it


def test_what_kvroute_says_went_wrong_is_the_reason(server: StandIn, client: VLLMClient) -> None:
    server.result = lambda *_: {"kvroute": {"error": "Out of order."}}
    answer = client.generate("abc", features=["prompt:paper-mteb", "kv-coe"])
    assert answer.text
    assert answer.feature_errors == {"prompt:paper-mteb": "Out of order.", "kv-coe": "Out of order."}


def test_options_are_sent(server: StandIn, client: VLLMClient) -> None:
    client.generate("a", max_tokens=2, temperature=0.5, top_p=0.9, stop="END", repetition_penalty=1.1)
    wanted = {"max_tokens": 2, "temperature": 0.5, "top_p": 0.9, "stop": ["END"], "repetition_penalty": 1.1}
    assert wanted.items() <= server.requests[0].items()
    assert "seed" not in server.requests[0]


def test_equal_prompts_have_seeds_of_their_own(server: StandIn, client: VLLMClient) -> None:
    def seeds(prompts: list[str]) -> dict[str, list[int]]:
        server.requests.clear()
        client.generate(prompts, seed=7, temperature=1.0, max_tokens=1)
        found: dict[str, list[int]] = {}
        for sent in server.requests:
            found.setdefault(sent["prompt"], []).append(sent["seed"])
        return {prompt: sorted(s) for prompt, s in found.items()}

    one = seeds(["a", "b", "a"])
    assert len({s for listed in one.values() for s in listed}) == 3
    assert seeds(["b", "a", "a"]) == one


def test_prompts_of_all_kinds(server: StandIn, client: VLLMClient) -> None:
    chat = [{"role": "user", "content": "hi"}]
    answers = client.generate(["text", chat, TokenIds((5, 6))], max_tokens=1)
    assert [a.prompt_token_ids for a in answers] == [words("text"), words("<user>hi<a>"), [5, 6]]
    assert client.generate(chat, max_tokens=1).prompt_token_ids == words("<user>hi<a>")
    assert client.tokenize("hi") == [1, *words("hi")]
    assert client.tokenize(chat) == words("<user>hi<a>")
    assert client.tokenize(TokenIds((3,))) == [3]
    assert client.tokenize_texts(["a", "b"], special_tokens=False) == [[97], [98]]
    assert client.generate([]) == []


def test_a_tokenizer_of_its_own(server: StandIn) -> None:
    class Tokenizer:
        eos_token_id = 9
        chat_template = "there is one"

        def __call__(self, texts: list[str], add_special_tokens: bool) -> dict[str, list[list[int]]]:
            return {"input_ids": [[7] * add_special_tokens + words(t) for t in texts]}

        def apply_chat_template(self, messages: Any, **_: Any) -> str:
            return "".join(m["content"] for m in messages)

    with VLLMClient(server.url, tokenizer=Tokenizer()) as client:
        answers = client.generate(["a", [{"role": "user", "content": "b"}]], max_tokens=1)
        assert client.end_token == 9
    assert [a.prompt_token_ids for a in answers] == [[7, 97], [98]]
    assert "/tokenize" not in server.paths


def test_pooling(server: StandIn) -> None:
    spec = PoolingSpec(layers="last:1")
    size = spec.dimension(INFO)
    server.result = lambda body, _: {"kvroute": {"features": {"0": [float(len(body["prompt"]))] * size}}}
    with VLLMClient(server.url, info=INFO) as client:
        (vectors,) = client.pool([[1, 2], [3]], [spec])
        assert vectors.tolist() == [[2.0] * size, [1.0] * size]
        assert server.requests[0]["max_tokens"] == 1
        server.result = lambda *_: {"kvroute": {"features": {}, "faults": ["It burnt."]}}
        with pytest.raises(ServerError, match="It burnt"):
            client.pool([[1]], [spec])


def test_sif_weights_are_the_vocabularys(server: StandIn) -> None:
    spec = PoolingSpec(layers="last:1", weights="sif")
    tokenizer = build_tokenizer()
    table = FrequencyTable.from_vocabulary(tokenizer).weights(spec.sif_a)
    server.result = lambda *_: {"kvroute": {"features": {"0": [0.5] * spec.dimension(INFO)}}}
    with VLLMClient(server.url, info=INFO, tokenizer=tokenizer) as client:
        assert client.pool([[1]], [spec], sif_weights=table)[0].tolist() == [[0.5] * spec.dimension(INFO)]
        with pytest.raises(InvalidInputError, match="frequencies=None"):
            client.pool([[1]], [spec], sif_weights=np.ones(3, np.float32))
    with VLLMClient(server.url, info=INFO) as client, pytest.raises(InvalidInputError, match="tokenizer="):
        client.pool([[1]], [spec], sif_weights=table)


def test_an_embedder_over_a_server(server: StandIn) -> None:
    tokenizer = build_tokenizer()
    server.result = lambda body, _: {"kvroute": {"features": {"0": [float(len(body["prompt"]))] * 16 * 2}}}
    with VLLMClient(server.url, info=INFO, tokenizer=tokenizer) as client:
        embedder = KVEmbedder(client, PoolingSpec(layers="last:1", weights="sif", heads="concat"))
        assert embedder.encode("the cat")[0] == len(tokenizer("the cat")["input_ids"])


def test_answers_that_exist(server: StandIn) -> None:
    size = PoolingSpec().dimension(INFO)

    def said(body: dict[str, Any], ask: Any) -> dict[str, Any]:
        assert body["max_tokens"] == 1
        scores = {"kv_coe_r_token": {"value": float(ask["answer_from"])}}
        return {"kvroute": {"features": {"a": [float(len(body["prompt"]))] * size}, "scores": scores}}

    server.result = said
    with VLLMClient(server.url, info=INFO) as client:
        asked = {"a": AnswerPooling(PoolingSpec()), "kv-coe": "kv-coe"}
        one, two = client.answer_features([[1, 2, 3, 4], [5, 6]], [2, 1], asked)
        assert (one.features["a"][0], one.scores["kv_coe_r_token"].value) == (3, 2)
        assert (two.features["a"][0], two.scores["kv_coe_r_token"].value) == (1, 1)
        with pytest.raises(EmptyTextError):
            client.answer_features([[1, 2]], [2], "kv-coe")
        with pytest.raises(UnsupportedModelError, match="TransformersEngine"):
            client.read([[1, 2]], [1], want={"logits"})


def test_the_next_token(server: StandIn, client: VLLMClient) -> None:
    assert client.choice_logprobs([[1], [2]], [[3, 4], [5, 6]]).tolist() == [[-3, -4], [-5, -6]]
    assert server.requests[-1]["max_tokens"] == 1
    assert client.choice_logprobs([], []).shape == (0, 0)
    server.act = lambda handler, body: "logprob_token_ids" in body and body.pop("logprob_token_ids") is None
    with pytest.raises(ServerError, match="log-probability"):
        client.choice_logprobs([[1]], [[3]])


def test_what_is_to_be_decided_is_sent_and_what_was_comes_back(server: StandIn, client: VLLMClient) -> None:
    decision = {"mode": "slow", "difficulty": 61.0, "why": "difficulty", "policy": "one-step"}
    server.result = lambda *_: {"kvroute": {"decision": decision, "confidence": {"value": 0.75}}}
    found = client.generate("a", max_tokens=2, decide=Decide(policy="support", confidence="right"))
    assert server.requests[-1]["kv_transfer_params"] == {"kvroute": {"policy": "support", "confidence": "right"}}
    assert found.served is not None
    assert found.served.decision is not None
    assert (found.served.decision.mode, found.served.decision.difficulty) == ("slow", 61)
    assert found.served.confidence == Score(0.75)
    client.generate(["a", "b"], max_tokens=2, decide=[None, Decide(mode="fast")])
    asks = {r["prompt"]: r.get("kv_transfer_params") for r in server.requests[-2:]}
    assert asks == {"a": None, "b": {"kvroute": {"mode": "fast"}}}
    chunks = list(client.stream("a", max_tokens=2, decide=Decide(mode="slow", policy="support")))
    assert chunks[-1].generation is not None
    assert chunks[-1].generation.served == found.served
    with pytest.raises(InvalidInputError, match="2 prompts, and 1"):
        client.generate(["a", "b"], decide=[None])


def test_a_server_says_what_it_runs(server: StandIn) -> None:
    server.about = About("1", True, INFO, policies={"support": Policy(kind="fast")}).to_dict()
    with VLLMClient(server.url) as client:
        assert client.info == INFO
        assert client.about.policies["support"].kind == "fast"
        assert server.paths.count("/v1/kvroute/info") == 1
    server.about = About("1", True, model_error="Its files are gone.").to_dict()
    with VLLMClient(server.url) as client, pytest.raises(InvalidInputError, match="files are gone"):
        _ = client.info
    server.about = About("1", False).to_dict()
    with VLLMClient(server.url) as client, pytest.raises(ConnectorMissingError):
        _ = client.info
    server.about = {"version": 7}
    with VLLMClient(server.url) as client, pytest.raises(ServerError, match="can't be read"):
        _ = client.info


def test_a_head_of_another_model(server: StandIn) -> None:
    server.about = About("1", True, an_info("def")).to_dict()
    with VLLMClient(server.url) as client, pytest.raises(ModelMismatchError):
        a_head().require(client.info)


def test_64_in_flight_and_in_order(server: StandIn, client: VLLMClient) -> None:
    full = threading.Event()

    def act(handler: Any, _: dict[str, Any]) -> bool:
        if handler.path == "/v1/completions":
            if server.busy == 64:
                full.set()
            full.wait(10)
        return False

    server.act = act
    answers = client.generate([f"{i}" for i in range(150)], max_tokens=1, features="prompt:paper-mteb")
    assert [a.prompt_token_ids for a in answers] == [words(f"{i}") for i in range(150)]
    assert all(a.features["prompt:paper-mteb"].tolist() == features_of(a.prompt_token_ids) for a in answers)
    assert server.most_busy == 64


def test_labelling_keeps_a_server_full(server: StandIn) -> None:
    """Both modes and the checkpoints of a chunk's thoughts: as many in flight as the client sends at a time."""
    limits = {"fast": 2, "slow": 3}
    full = {(limit, length): threading.Event() for limit, length in ((2, 0), (3, 0), (2, 1))}
    most: dict[tuple[int, int], int] = dict.fromkeys(full, 0)
    asked: dict[tuple[int, int], int] = dict.fromkeys(full, 0)

    def act(handler: Any, body: dict[str, Any]) -> bool:
        if handler.path == "/v1/completions":
            with server.lock:
                phase = (body["max_tokens"], int(server.requests.index(body) >= 300))
                asked[phase] += 1
                most[phase] = max(most[phase], server.busy)
            if most[phase] == 64:
                full[phase].set()
            full[phase].wait(10)
        return False

    server.act = act
    questions = [Question(str(i), f"What is {i}?", "7", "number") for i in range(150)]
    with VLLMClient(server.url, tokenizer=build_tokenizer(), info=INFO) as client:
        rows = list(label_questions(client, questions, max_tokens=limits, checkpoints=2, chunk=150, progress=False))
    assert [(r.id, r.error) for r in rows] == [(str(i), None) for i in range(150)]
    assert asked == dict.fromkeys(full, 150)
    assert most == dict.fromkeys(full, 64)
    assert server.most_busy == 64


# ---------------------------------------------------------------------- pieces


def test_a_stream(client: VLLMClient) -> None:
    pieces = list(client.stream("abc", max_tokens=3, features="prompt:paper-mteb"))
    assert [p.text for p in pieces] == [" w0", " w1", " w2", ""]
    assert [p.token_id for p in pieces] == [0, 1, 2, None]
    whole = pieces[-1].generation
    assert whole is not None
    assert whole.text == " w0 w1 w2"
    assert whole.usage.generated == 3
    assert whole.features["prompt:paper-mteb"].tolist() == features_of(words("abc"))
    assert all(p.generation is None for p in pieces[:-1])


def test_many_streams(client: VLLMClient) -> None:
    texts = ["", "", ""]
    for piece in client.stream(["a", "b", "c"], max_tokens=4):
        texts[piece.index] += piece.text
    assert texts == [" w0 w1 w2 w3"] * 3


def test_several_tokens_in_a_piece(server: StandIn, client: VLLMClient) -> None:
    def deed(handler: Any) -> None:
        handler.begin_events()
        handler.event({"choices": [{"text": "xy", "token_ids": [4, 5], "finish_reason": "stop"}]})
        handler.event("[DONE]")
        handler.wfile.write(b"0\r\n\r\n")

    server.act = first(1, deed)
    pieces = list(client.stream("a"))
    assert [(p.text, p.token_id) for p in pieces] == [("", 4), ("xy", 5), ("", None)]
    assert pieces[-1].generation is not None
    assert pieces[-1].generation.finish_reason == "stop"


def test_leaving_a_stream_closes_the_connection() -> None:
    with StandIn(delay=0.02) as server, VLLMClient(server.url) as client:
        stream = client.stream("a", max_tokens=1000)
        next(stream)
        stream.close()  # type: ignore[attr-defined]
        until(lambda: server.busy == 0)
        assert server.broken == 1


def test_a_stream_that_breaks(server: StandIn, client: VLLMClient) -> None:
    server.act = first(1, lambda handler: handler.stream(server.requests[-1], most=2))
    stream = client.stream("a", max_tokens=5)
    assert [next(stream).text, next(stream).text] == [" w0", " w1"]
    with pytest.raises(ServerUnreachableError, match="middle of a stream"):
        next(stream)
    assert len(server.requests) == 1


def test_a_stream_that_breaks_before_its_first_piece_begins_again(server: StandIn, client: VLLMClient) -> None:
    server.act = first(1, lambda handler: handler.stream(server.requests[-1], most=0))
    assert "".join(p.text for p in client.stream("a", max_tokens=2)) == " w0 w1"
    assert len(server.requests) == 2


def test_an_error_in_a_stream(server: StandIn, client: VLLMClient) -> None:
    def deed(handler: Any) -> None:
        handler.begin_events()
        handler.event({"error": {"message": "no more memory", "type": "InternalServerError", "code": 500}})
        handler.wfile.write(b"0\r\n\r\n")

    server.act = first(9, deed)
    with pytest.raises(ServerError, match="no more memory"):
        list(client.stream("a"))
    assert len(server.requests) == 1


# ---------------------------------------------------------------------- async


async def test_async(client: VLLMClient) -> None:
    one, many = await asyncio.gather(client.agenerate("a", max_tokens=1), client.agenerate(["b", "c"], max_tokens=2))
    assert not isinstance(one, list)
    assert isinstance(many, list)
    assert one.text == " w0"
    assert [a.text for a in many] == [" w0 w1"] * 2
    chat = [{"role": "user", "content": "hi"}]
    assert [p.text async for p in client.astream(chat, max_tokens=2)] == [" w0", " w1", ""]


async def test_cancelling_a_task_closes_the_connection() -> None:
    with StandIn(delay=0.02) as server, VLLMClient(server.url) as client:
        server.act = lambda handler, _: handler.path == "/v1/completions" and bool(handler.connection.recv(1) or True)
        task = asyncio.create_task(client.agenerate("a"))
        await asyncio.to_thread(until, lambda: server.busy == 1)
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task
        await asyncio.to_thread(until, lambda: server.busy == 0)  # recv returned: the connection is closed


async def test_leaving_an_async_stream() -> None:
    with StandIn(delay=0.02) as server, VLLMClient(server.url) as client:
        stream = client.astream("a", max_tokens=1000)
        await anext(stream)
        await stream.aclose()  # type: ignore[attr-defined]
        await asyncio.to_thread(until, lambda: server.busy == 0)


# ---------------------------------------------------------------------- cancel, close


def test_cancel() -> None:
    with StandIn(delay=0.05) as server, VLLMClient(server.url, in_flight=2) as client:
        server.act = lambda handler, body: body.get("prompt") == "stuck" and bool(handler.connection.recv(1) or True)
        cancel = CancelToken()
        threading.Timer(0.5, cancel.cancel).start()
        quick, stuck = client.generate(["quick", "stuck"], max_tokens=1, features="kv-coe", cancel=cancel)
        assert quick.text == " w0"
        assert (stuck.text, stuck.finish_reason) == ("", "cancelled")
        assert stuck.feature_errors == {"kv-coe": "The request was cancelled."}
        until(lambda: server.busy == 0)


def test_a_cancelled_stream_keeps_its_text() -> None:
    with StandIn(delay=0.02) as server, VLLMClient(server.url) as client:
        cancel = CancelToken()
        pieces = []
        for piece in client.stream("a", max_tokens=1000, cancel=cancel):
            pieces.append(piece)
            cancel.cancel()
        whole = pieces[-1].generation
        assert whole is not None
        assert whole.finish_reason == "cancelled"
        assert whole.text == "".join(p.text for p in pieces) != ""
        until(lambda: server.busy == 0)


def test_closing(server: StandIn) -> None:
    before = threading.active_count()
    client = VLLMClient(server.url)
    client.generate("a")
    client.close()
    client.close()
    with pytest.raises(InvalidInputError, match="closed"):
        client.generate("a")
    until(lambda: threading.active_count() <= before + 1)  # the stand-in's for a kept connection may be there still


def test_closing_while_somebody_waits() -> None:
    with StandIn(delay=0.5) as server:
        client = VLLMClient(server.url)
        threading.Timer(0.2, client.close).start()
        with pytest.raises(InvalidInputError, match="closed while"):
            client.generate("a", max_tokens=1)


# ---------------------------------------------------------------------- faults


@pytest.mark.parametrize("status", [500, 503, 429])
def test_an_answered_request_is_never_sent_again(server: StandIn, client: VLLMClient, status: int) -> None:
    server.act = first(9, lambda handler: handler.refuse(status, "no"))
    with pytest.raises(ServerError, match=f"{status}: .*no") as caught:
        client.generate("a")
    assert caught.value.status == status
    assert len(server.requests) == 1
    server.act = None
    assert client.generate("a", max_tokens=1).text == " w0"  # it is not dead for that


def test_a_refusal_is_the_callers_fault(server: StandIn, client: VLLMClient) -> None:
    server.act = first(9, lambda handler: handler.refuse(400, "The context holds 8192 tokens."))
    with pytest.raises(InvalidInputError, match="8192"):
        client.generate("a")


def test_a_connection_that_breaks_is_made_again(server: StandIn, client: VLLMClient) -> None:
    server.act = first(2, lambda handler: handler.break_off())
    assert client.generate("a", max_tokens=1).text == " w0"
    assert len(server.requests) == 3


def test_half_an_answer_is_none(server: StandIn, client: VLLMClient) -> None:
    def deed(handler: Any) -> None:
        handler.send_response(200)
        handler.send_header("Content-Type", "application/json")
        handler.send_header("Content-Length", "1000")
        handler.end_headers()
        handler.wfile.write(b'{"choices"')
        handler.wfile.flush()
        handler.break_off()

    server.act = first(1, deed)
    assert client.generate("a", max_tokens=1).text == " w0"


def test_an_aborted_answer_is_none(server: StandIn, client: VLLMClient) -> None:
    server.act = first(1, lambda h: h.send(200, {"choices": [{"text": "x", "finish_reason": "abort"}]}))
    assert client.generate("a", max_tokens=1).text == " w0"


def test_a_slow_answer(server: StandIn) -> None:
    server.delay = 5.0
    with VLLMClient(server.url, timeout=0.3) as client:
        began = time.monotonic()
        with pytest.raises(ServerTimeoutError, match=r"0\.3 seconds"):
            client.generate("a", max_tokens=1)
        with pytest.raises(ServerTimeoutError):
            list(client.stream("a", max_tokens=1))
        assert time.monotonic() - began < 3
        assert len(server.requests) == 2


@pytest.mark.parametrize("body", [b"<html>", b"[1]", b'{"choices": [{"text": 3}]}', b'{"choices": 1}', b"{\xff"])
def test_nonsense(server: StandIn, client: VLLMClient, body: bytes) -> None:
    server.act = first(9, lambda handler: handler.send(200, body))
    with pytest.raises(ServerError):
        client.generate("a")
    assert len(server.requests) == 1


@pytest.mark.parametrize("said", [{"features": {"p": ["x"]}}, {"scores": 3}, {"features": {"p": [1e99]}}])
def test_nonsense_of_kvroute(server: StandIn, client: VLLMClient, said: dict[str, Any]) -> None:
    server.result = lambda *_: {"kvroute": said}
    with pytest.raises(ServerError, match="no result of kvroute"):
        client.generate("a", features={"p": "prompt:paper-mteb"})


def test_no_server() -> None:
    with StandIn() as gone:
        pass
    with VLLMClient(gone.url, retries=1) as client, pytest.raises(ServerUnreachableError, match=f"{gone.port}.*2 att"):
        client.generate("a")


def test_the_first_error_ends_a_batch() -> None:
    with StandIn(delay=0.05) as server, VLLMClient(server.url, in_flight=4) as client:
        server.act = first(1, lambda handler: handler.refuse(500, "no"))
        with pytest.raises(ServerError):
            client.generate(["a"] * 100, max_tokens=1)
        until(lambda: server.busy == 0)
        assert len(server.requests) < 20


# ---------------------------------------------------------------------- several servers


def test_requests_go_to_the_server_with_the_fewest_in_flight() -> None:
    with (
        StandIn(delay=0.2) as slow,
        StandIn(delay=0.02) as fast,
        VLLMClient([slow.url, fast.url], in_flight=4) as client,
    ):
        client.generate(["a"] * 60, max_tokens=1)
        assert len(slow.requests) + len(fast.requests) == 60
        assert len(fast.requests) > 2 * len(slow.requests) > 0


def test_a_server_that_dies_loses_nothing_and_comes_back() -> None:
    one, other = StandIn(delay=0.05), StandIn(delay=0.05)
    with one, other, VLLMClient([one.url, other.url], in_flight=8) as client:
        prompts = [f"{i}" for i in range(100)]
        timer = threading.Timer(0.3, one.die)
        timer.start()
        answers = client.generate(prompts, max_tokens=1, features="prompt:paper-mteb")
        timer.join()
        assert [a.prompt_token_ids for a in answers] == [words(p) for p in prompts]
        assert 0 < len(one.requests) < 100
        until(lambda: one.busy == 0)
        taken = len(one.requests)
        assert client.generate("a", max_tokens=1).text == " w0"
        assert len(one.requests) == taken
        with StandIn(port=one.port) as again:

            def taken_again() -> bool:
                client.generate(["a", "b"], max_tokens=1)
                return bool(again.requests)

            until(taken_again)


def test_a_server_that_is_dead_from_the_start() -> None:
    with StandIn() as gone:
        pass
    with StandIn() as server, VLLMClient([gone.url, server.url]) as client:
        assert len(client.generate(["a"] * 20, max_tokens=1)) == 20
        assert len(server.requests) == 20


def test_the_only_server_comes_back_in_time() -> None:
    with StandIn() as gone:
        pass
    back: list[StandIn] = []
    timer = threading.Timer(0.7, lambda: back.append(StandIn(port=gone.port).__enter__()))
    timer.start()
    with VLLMClient(gone.url) as client:
        try:
            assert client.generate("a", max_tokens=1).text == " w0"
        finally:
            timer.join()
            back[0].die()


# ---------------------------------------------------------------------- the wrong server


def test_a_server_without_kvroute() -> None:
    with StandIn(connector=False) as server, VLLMClient(server.url) as client:
        assert client.generate("a", max_tokens=1).text == " w0"
        with pytest.raises(ConnectorMissingError, match="KVRouteConnector"):
            client.generate("a", features="prompt:paper-mteb")
        with pytest.raises(ConnectorMissingError):
            list(client.stream("a", features="prompt:paper-mteb"))


def test_kvroute_may_be_silent_about_a_request(server: StandIn, client: VLLMClient) -> None:
    client.generate("a", features="kv-coe")
    server.result = lambda *_: None
    answer = client.generate("a", features="kv-coe")
    assert answer.feature_errors == {"kv-coe": "The server said nothing about this request."}


def test_another_model() -> None:
    with StandIn(models=("that/one",)) as server:
        with VLLMClient(server.url, model="this/one") as client:
            with pytest.raises(ModelMismatchError, match="serves that/one, not this/one") as caught:
                client.generate("a")
            assert caught.value.hint
            assert not server.requests
        with StandIn() as other, VLLMClient([server.url, other.url]) as client, pytest.raises(ModelMismatchError):
            client.generate(["a"] * 4)


def test_features_of_another_size(server: StandIn) -> None:
    with VLLMClient(server.url, info=INFO) as client, pytest.raises(ModelMismatchError, match="has 3 numbers"):
        client.generate("abc", features="prompt:paper-mteb")


def test_what_is_not_known_is_said(client: VLLMClient) -> None:
    with pytest.raises(InvalidInputError, match="middleware"):
        _ = client.info
    with pytest.raises(InvalidInputError, match="tokenizer="):
        _ = client.tokenizer


@pytest.mark.parametrize(
    ("prompts", "how", "error"),
    [
        ("a", {"features": "logits"}, SpecError),
        ("a", {"features": ChainSpec(layers="last:2")}, SpecError),
        ("a", {"features": "nothing-like-it"}, AskError),
        ("a", {"features": {"no name": "kv-coe"}}, AskError),
        ("a", {"max_tokens": 0}, SpecError),
        ("a", {"options": SamplingOptions(), "seed": 1}, InvalidInputError),
        ("", {}, EmptyTextError),
        (["a", TokenIds(())], {}, EmptyTextError),
        ("\ud800", {}, InvalidInputError),
        ([[{"role": "user", "content": "a"}], 3], {}, InvalidInputError),
    ],
)
def test_before_anything_is_sent(
    server: StandIn, client: VLLMClient, prompts: Any, how: dict[str, Any], error: type[KVRouteError]
) -> None:
    with pytest.raises(error):
        client.generate(prompts, **how)
    with pytest.raises(error):
        client.stream(prompts, **how)
    assert not server.requests


@pytest.mark.parametrize("url", ["", "host:8000", "ftp://h", "http://u:geheim@h", "http://h/?key=geheim", "http://h:x"])
def test_addresses(url: str) -> None:
    with pytest.raises(InvalidInputError) as caught:
        VLLMClient(url)
    assert "geheim" not in str(caught.value)


@pytest.mark.parametrize("how", [{"timeout": 0}, {"retries": -1}, {"in_flight": 0}])
def test_arguments(how: dict[str, Any]) -> None:
    with pytest.raises(InvalidInputError):
        VLLMClient("http://h", **how)
    with pytest.raises(InvalidInputError):
        VLLMClient([])


def test_a_tokenizer_that_is_not_there(tmp_path: Any) -> None:
    with pytest.raises(ModelLoadError):
        VLLMClient("http://h", tokenizer=tmp_path / "none")


# ---------------------------------------------------------------------- secrets, extras


def test_the_key_is_sent_and_never_shown(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("OPENAI_API_KEY", "not-for-this-server")
    with StandIn(token="geheim") as server:
        with VLLMClient(server.url, api_key="geheim") as client:
            assert client.generate("a", max_tokens=1).text == " w0"
            assert "geheim" not in repr(client)
            assert server.url in repr(client)
            server.act = first(9, lambda handler: handler.refuse(500, "your key geheim is fine"))
            with pytest.raises(ServerError, match=r"key \*\*\* is"):
                client.generate("a")
        with VLLMClient(server.url) as client, pytest.raises(ServerError, match="401") as caught:
            client.generate("a")
        assert "api_key=" in str(caught.value)
        assert not any("not-for-this-server" in str(headers) for headers in server.headers)


def test_without_openai(monkeypatch: pytest.MonkeyPatch) -> None:
    real = builtins.__import__

    def without(name: str, *args: Any, **kwargs: Any) -> Any:
        if name == "openai":
            raise ImportError(name)
        return real(name, *args, **kwargs)

    monkeypatch.setattr(builtins, "__import__", without)
    with pytest.raises(MissingExtraError, match="vllm-client"):
        VLLMClient("http://h")


def test_a_client_that_nobody_holds_ends_its_thread(server: StandIn) -> None:
    client = VLLMClient(server.url)
    client.generate("hello", max_tokens=2)
    thread = next(t for t in threading.enumerate() if t.name == "kvroute-vllm" and t is client._background._thread)
    del client
    gc.collect()
    thread.join(10)
    assert not thread.is_alive()
