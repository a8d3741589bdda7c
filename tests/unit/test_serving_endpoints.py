"""kvroute's routes over a small ASGI app that answers as vLLM's own routes do."""

from __future__ import annotations

import asyncio
import base64
import json
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

from kvroute.pooling import PRESETS
from kvroute.serving import about as about_module
from kvroute.serving.about import About, about, connector_settings
from kvroute.serving.asgi import IN_FLIGHT, MAX_BODY
from kvroute.serving.endpoints import KVRouteEndpoints
from kvroute.thinking import ThinkingMode
from tests.serving_files import INFO, a_head, write_policy

KEY = b"Bearer sesam"


class Server:
    """vLLM's routes: a key check, models, tokens of a text (its characters), and one token with what kvroute read."""

    def __init__(self) -> None:
        self.asked: list[tuple[str, dict[str, Any]]] = []
        self.busy = self.most = self.ended = 0
        self.answer: Any = None
        self.delay = 0.0

    async def __call__(self, scope: Any, receive: Any, send: Any) -> None:
        assert scope["app"].state is not None
        message = await receive()
        body = json.loads(message["body"] or b"{}")
        self.asked.append((scope["path"], body))
        self.busy += 1
        self.most = max(self.most, self.busy)
        try:
            await asyncio.sleep(self.delay)
            status, found = self.found(scope, body)
        finally:
            self.busy -= 1
            self.ended += 1
        data = json.dumps(found).encode()
        await send({"type": "http.response.start", "status": status, "headers": []})
        await send({"type": "http.response.body", "body": data[:5], "more_body": True})
        await send({"type": "http.response.body", "body": data[5:]})

    def found(self, scope: Any, body: dict[str, Any]) -> tuple[int, Any]:
        path = scope["path"].removeprefix(scope.get("root_path", ""))
        if path.startswith("/v1") and dict(scope["headers"]).get(b"authorization") != KEY:
            return 401, {"error": "Unauthorized"}
        if path == "/v1/models":
            return 200, {"object": "list", "data": [{"id": "m"}]}
        if path == "/tokenize":
            text = body.get("prompt")
            text = "".join(f"<{m['content']}>" for m in body["messages"]) if text is None else text
            return 200, {"tokens": ([1] if body.get("add_special_tokens") else []) + [ord(c) for c in text]}
        if path != "/v1/completions":
            return 404, {"detail": "Not Found"}
        if body.get("model") not in (None, "m"):
            return 404, {"error": {"message": "no such model", "type": "NotFoundError", "param": "model", "code": 404}}
        prompt = body["prompt"] if isinstance(body["prompt"], list) else [1, *(ord(c) for c in body["prompt"])]
        if len(prompt) > 50:
            return 400, {"error": {"message": "too long", "type": "BadRequestError", "param": "input", "code": 400}}
        params = self.answer(prompt, body["kv_transfer_params"]["kvroute"]) if self.answer else None
        return 200, {
            "model": "m",
            "usage": {"prompt_tokens": len(prompt), "prompt_tokens_details": {"cached_tokens": 2}},
            "kv_transfer_params": params,
        }


def pooled(prompt: list[int], ask: dict[str, Any]) -> Any:
    """A vector that tells prompts and specs apart."""
    ((name, spec),) = ask["features"].items()
    assert spec["of"] == "prompt"
    vector = [float(sum(prompt)), float(len(prompt)), float(len(spec) - 1), 0.1]
    return {"kvroute": {"features": {name: vector}, "tokens": {"prompt": len(prompt)}}}


@pytest.fixture
def server() -> Server:
    found = Server()
    found.answer = pooled
    return found


async def ask(
    server: Any, path: str, body: Any = None, *, method: str = "POST", key: bytes | None = KEY, root: str = "",
    state: Any = None, gone: asyncio.Event | None = None,
) -> tuple[int, Any]:  # fmt: skip
    """Send a request through the middleware; status and JSON."""
    data = body if isinstance(body, bytes) else b"" if body is None else json.dumps(body).encode()
    parts = [data[i : i + 2**20] for i in range(0, len(data), 2**20)] or [b""]
    sent: list[Any] = []

    async def receive() -> Any:
        if parts:
            part = parts.pop(0)
            return {"type": "http.request", "body": part, "more_body": bool(parts)}
        await (gone or asyncio.Event()).wait()
        return {"type": "http.disconnect"}

    async def send(message: Any) -> None:
        sent.append(message)

    headers = [(b"host", b"x"), (b"content-length", str(len(data)).encode())]
    headers += [] if key is None else [(b"authorization", key)]
    app = SimpleNamespace(state=state or SimpleNamespace(vllm_config=None))
    scope = {"type": "http", "method": method, "path": root + path, "root_path": root, "headers": headers, "app": app}
    await KVRouteEndpoints(server)(scope, receive, send)
    body = b"".join(m.get("body", b"") for m in sent[1:])
    return sent[0]["status"], json.loads(body)


# ---------------------------------------------------------------------- embeddings


async def test_embeddings_of_texts_and_tokens(server: Server) -> None:
    status, found = await ask(server, "/v1/embeddings", {"model": "m", "input": ["ab", "c"], "user": "u"})
    assert status == 200
    assert found["object"] == "list"
    assert found["model"] == "m"
    assert found["usage"]["prompt_tokens"] == found["usage"]["total_tokens"] == 5
    assert found["usage"]["prompt_tokens_details"] == {"cached_tokens": 4}
    best = len(PRESETS["best"].model_dump(exclude_defaults=True))
    assert [d["index"] for d in found["data"]] == [0, 1]
    assert [d["embedding"] for d in found["data"]] == [
        pytest.approx([1 + 97 + 98, 3, best, 0.1]),
        pytest.approx([1 + 99, 2, best, 0.1]),
    ]
    for given, sums in (("ab", [196]), ([5, 6], [11]), ([[5], [6, 7]], [5, 13])):
        status, found = await ask(server, "/v1/embeddings", {"input": given}, root="/behind")
        assert [d["embedding"][0] for d in found["data"]] == sums
    inner = [body for path, body in server.asked if path.endswith("/v1/completions")]
    assert all(body["max_tokens"] == 1 for body in inner)


async def test_base64_are_the_same_numbers(server: Server) -> None:
    body = {"model": "m", "input": "ab"}
    _, plain = await ask(server, "/v1/embeddings", body)
    _, coded = await ask(server, "/v1/embeddings", {**body, "encoding_format": "base64"})
    numbers = np.frombuffer(base64.b64decode(coded["data"][0]["embedding"]), dtype="<f4")
    np.testing.assert_array_equal(numbers, np.array(plain["data"][0]["embedding"], dtype=np.float32))


async def test_how_to_pool(server: Server) -> None:
    spec = {"layers": "last:2", "part": "v", "heads": "concat"}
    for body, fields in (
        ({"model": "m:paper-classifier"}, PRESETS["paper-classifier"].model_dump(exclude_defaults=True)),
        ({"model": "m", "kvroute": {"spec": "fast"}}, PRESETS["fast"].model_dump(exclude_defaults=True)),
        ({"model": "m", "kvroute": {"spec": spec}}, spec),
    ):
        status, _ = await ask(server, "/v1/embeddings", {"input": "ab", **body})
        assert status == 200
        asked = server.asked[-1][1]
        assert asked["model"] == "m"
        sent = asked["kv_transfer_params"]["kvroute"]["features"]["embedding"]
        assert sent == {"of": "prompt", **json.loads(json.dumps(fields))}


@pytest.mark.parametrize(
    ("body", "param", "words"),
    [
        ({"model": "m"}, "input", "missing"),
        ({"input": ""}, "input", "Text 0 is empty"),
        ({"input": ["a", ""]}, "input", "Text 1 is empty"),
        ({"input": []}, "input", "1 to 2048"),
        ({"input": ["a"] * 2049}, "input", "1 to 2048"),
        ({"input": [["a"]]}, "input", "token ids"),
        ({"input": 7}, "input", "token ids"),
        ({"input": "a", "encoding_format": "int8"}, "encoding_format", "base64"),
        ({"input": "a", "dimensions": 2}, "dimensions", "can't be cut to 2"),
        ({"input": "a", "dimensions": 0}, "dimensions", "greater"),
        ({"input": "a", "kvroute": {"spec": "bset"}}, "kvroute", "best"),
        ({"input": "a", "kvroute": {"spec": {"layer": 3}}}, "kvroute", "Extra inputs"),
        ({"input": "a", "kvroute": {"preset": "best"}}, "kvroute", "Extra inputs"),
        ({"input": "a", "model": "m:best", "kvroute": {"spec": "fast"}}, "kvroute", "ends in a preset"),
        ({"input": "a", "model": ["m"]}, "model", "string"),
    ],
)
async def test_a_wrong_body_is_refused_in_openais_form(server: Server, body: Any, param: str, words: str) -> None:
    status, found = await ask(server, "/v1/embeddings", body)
    assert status == 400
    assert words in found["error"]["message"]
    assert found["error"]["param"] == param
    assert found["error"]["type"] == "invalid_request_error"
    assert found["error"]["code"] == 400


@pytest.mark.parametrize("body", [b"", b"[1]", b"{", b"[" * 100_000, b'"a"', b"\xff"])
async def test_a_body_that_is_no_object(server: Server, body: bytes) -> None:
    status, found = await ask(server, "/v1/embeddings", body)
    assert (status, found["error"]["message"]) == (400, "The body is no JSON object.")


async def test_a_body_beyond_the_limit(server: Server) -> None:
    status, _ = await ask(server, "/v1/embeddings", b" " * (MAX_BODY + 1))
    assert status == 413


async def test_the_servers_key_guards_ours(server: Server) -> None:
    for path, method in (("/v1/embeddings", "POST"), ("/v1/kvroute/score", "POST"), ("/v1/kvroute/info", "GET")):
        for key in (None, b"Bearer wrong"):
            server.asked.clear()
            status, found = await ask(server, path, {"input": "a"}, method=method, key=key)
            assert (status, found) == (401, {"error": "Unauthorized"})
            assert [p for p, _ in server.asked] == ["/v1/models"]


async def test_what_the_server_refuses_is_passed_on_with_the_text(server: Server) -> None:
    status, found = await ask(server, "/v1/embeddings", {"input": ["ab", "x" * 60]})
    assert (status, found["error"]["message"], found["error"]["type"]) == (400, "Text 1: too long", "BadRequestError")
    status, found = await ask(server, "/v1/embeddings", {"model": "other:best", "input": "a"})
    assert (status, found["error"]["message"]) == (404, "no such model")
    server.answer = lambda prompt, ask: {"kvroute": {"error": "No layer 99."}}
    status, found = await ask(server, "/v1/embeddings", {"input": ["a", "b"]})
    assert (status, found["error"]["message"]) == (400, "Text 0: No layer 99.")
    server.answer = lambda prompt, ask: {"kvroute": {"faults": ["embedding: The cache holds values."]}}
    status, found = await ask(server, "/v1/embeddings", {"input": "a"})
    assert (status, found["error"]["message"]) == (500, "embedding: The cache holds values.")
    server.answer = None
    status, found = await ask(server, "/v1/embeddings", {"input": "a"})
    assert status == 501
    assert "--kv-transfer-config" in found["error"]["message"]


async def test_many_texts_are_asked_together_and_end_together(server: Server) -> None:
    server.delay = 0.01
    _, found = await ask(server, "/v1/embeddings", {"input": [[i] for i in range(1, 151)]})
    assert [d["embedding"][0] for d in found["data"]] == list(range(1, 151))
    assert server.most == IN_FLIGHT
    server.delay, server.ended = 5.0, 0
    gone = asyncio.Event()
    task = asyncio.ensure_future(ask(server, "/v1/embeddings", {"input": ["a", "b", "c"]}, gone=gone))
    server.delay = 0.0  # of the key check, which comes first
    await asyncio.sleep(0)
    await asyncio.sleep(0)
    server.delay = 5.0
    while server.busy < 3:
        await asyncio.sleep(0.01)
    gone.set()
    with pytest.raises(asyncio.CancelledError):
        await task
    assert server.busy == 0


async def test_a_fault_of_ours_is_an_answer(server: Server, monkeypatch: pytest.MonkeyPatch) -> None:
    def torn(*_: Any) -> Any:
        raise RuntimeError("secret /etc/passwd")

    server.answer = torn
    status, found = await ask(server, "/v1/embeddings", {"input": "a"})
    assert status == 500
    assert "secret" not in json.dumps(found)


async def test_everything_else_passes_through(server: Server) -> None:
    assert await ask(server, "/v1/models", method="GET") == (200, {"object": "list", "data": [{"id": "m"}]})
    assert (await ask(server, "/v1/embeddings", method="GET"))[0] == 404
    pooling = SimpleNamespace(vllm_config=SimpleNamespace(model_config=SimpleNamespace(runner_type="pooling")))
    assert (await ask(server, "/v1/embeddings", {"input": "a"}, state=pooling))[0] == 404


# ---------------------------------------------------------------------- scores


def scored(prompt: list[int], ask: dict[str, Any]) -> Any:
    """Tells what was asked."""
    start = ask["answer_from"]
    values = {"kv_coe_r_token": start, "kv_coe_c_token": len(prompt) - start, "kv_coe_r_layer": sum(prompt)}
    scores: dict[str, Any] = {name: {"value": float(v)} for name, v in values.items()}
    scores["kv_coe_c_layer"] = {"reason": "too short"}
    confidence = {"value": 0.25} if ask.get("confidence") == "right" else None
    return {"kvroute": {"scores": scores, "confidence": confidence}}


async def test_scores_of_answers(server: Server) -> None:
    server.answer = scored
    items = [
        {"prompt": "ab", "answer": "xyz"},
        {"prompt": "ab", "answer": "xyz", "finish_reason": "length"},
        {"messages": [{"role": "user", "content": "q"}], "answer": [7, 8]},
        {"prompt": [3, 4, 5], "answer": [9]},
    ]
    status, found = await ask(server, "/v1/kvroute/score", {"model": "m", "items": items, "confidence": "right"})
    assert status == 200, found
    read = [
        (d["scores"]["kv_coe_r_token"]["value"], d["scores"]["kv_coe_c_token"]["value"], d["scores"]["length"]["value"])
        for d in found["data"]
    ]
    # where the answer begins, its tokens with keys and values, its length; a text's end token has neither
    assert read == [(3, 3, 4), (3, 2, 3), (3, 1, 2), (3, 0, 1)]
    assert found["data"][2]["scores"]["kv_coe_r_layer"]["value"] == ord("<") + ord("q") + ord(">") + 7
    assert found["data"][0]["scores"]["kv_coe_c_layer"] == {"value": None, "reason": "too short"}
    assert found["data"][0]["confidence"] == {"value": 0.25, "reason": None}
    assert found["usage"]["prompt_tokens"] == 6 + 5 + 4 + 3
    status, found = await ask(server, "/v1/kvroute/score", {"items": items[:1], "scores": ["length"]})
    assert found["data"] == [{"object": "score", "index": 0, "scores": {"length": {"value": 4.0, "reason": None}}}]


@pytest.mark.parametrize(
    ("body", "words"),
    [
        ({"items": []}, "items"),
        ({}, "'items' is missing"),
        ({"items": [{"answer": "a"}]}, "Item 0: Give 'prompt' or 'messages'"),
        ({"items": [{"prompt": "a", "messages": [{}], "answer": "a"}]}, "Item 0: Give 'prompt' or 'messages'"),
        ({"items": [{"prompt": "a", "answer": ""}]}, "Item 0: The answer holds no token"),
        ({"items": [{"prompt": [], "answer": "a"}]}, "Item 0: The prompt holds no token"),
        ({"items": [{"prompt": "a", "answer": "a", "finish_reason": "eos"}]}, "finish_reason"),
        ({"items": [{"prompt": "a", "answer": "a"}], "scores": ["logits"]}, "more than a server's cache"),
        ({"items": [{"prompt": "a", "answer": "a"}], "scores": ["grade"]}, "not known"),
        ({"items": [{"prompt": "a", "answer": "a"}] * 257}, "items"),
    ],
)
async def test_a_wrong_score_request(server: Server, body: Any, words: str) -> None:
    server.answer = scored
    status, found = await ask(server, "/v1/kvroute/score", body)
    assert status == 400
    assert words in found["error"]["message"]


# ---------------------------------------------------------------------- what the server runs


def a_config(extra: dict[str, Any] | None, **more: Any) -> Any:
    transfer = SimpleNamespace(kv_connector="KVRouteConnector", kv_connector_extra_config=extra)
    model = SimpleNamespace(
        model="/srv/secret/model", tokenizer="/srv/secret/model", revision=None, tokenizer_revision=None,
        trust_remote_code=False, dtype="torch.bfloat16", max_model_len=128, runner_type="generate",
    )  # fmt: skip
    return SimpleNamespace(model_config=model, kv_transfer_config=None if extra is None else transfer, **more)


async def test_what_a_server_says(server: Server, tmp_path: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    write_policy(tmp_path / "policies", "support")
    a_head(target="correct").save(tmp_path / "heads" / "right")
    (tmp_path / "heads" / "torn").mkdir()
    (tmp_path / "heads" / "torn" / "head.json").write_text("{")
    config = a_config({"policies": str(tmp_path / "policies"), "heads": str(tmp_path / "heads"), "max_features": 3})
    monkeypatch.setattr(about_module, "model_info", lambda config, name: INFO.model_copy(update={"name": name}))
    state = SimpleNamespace(vllm_config=config, args=SimpleNamespace(served_model_name=["tiny", "other"]))
    status, found = await ask(server, "/v1/kvroute/info", method="GET", state=state)
    assert status == 200
    assert "/srv" not in json.dumps(found)
    assert str(tmp_path) not in json.dumps(found)
    assert found["model"]["fingerprint"] == INFO.fingerprint
    read = About.from_dict({**found, "news": 1, "model": {**found["model"], "news": 2}})
    assert read.model is not None
    assert (read.model.name, read.model.fingerprint, read.connector) == ("tiny", INFO.fingerprint, True)
    assert {n: p.kind for n, p in read.policies.items()} == {"support": "two-step"}
    assert read.heads == {"right": "correct"}
    assert read.off == {"torn": "its files can't be read"}
    assert read.limits["max_features"] == 3
    unnamed = SimpleNamespace(vllm_config=config, args=SimpleNamespace(served_model_name=None))
    _, found = await ask(server, "/v1/kvroute/info", method="GET", state=unnamed)
    assert found["model"]["name"] == "model"


def test_a_model_that_cant_be_described_costs_no_more_than_itself(tmp_path: Any) -> None:
    write_policy(tmp_path, "support")
    found = about(a_config({"policies": str(tmp_path)}), "tiny")
    assert found.model is None
    assert found.model_error
    assert "/srv" not in found.model_error
    assert set(found.policies) == {"support"}


def test_the_connector_among_others_or_not_at_all() -> None:
    assert connector_settings(a_config({"max_features": 3})) == {"max_features": 3}
    many = a_config({"connectors": [{"kv_connector": "Other"}, {"kv_connector": "KVRouteConnector"}]})
    many.kv_transfer_config.kv_connector = "MultiConnector"
    assert connector_settings(many) == {}
    many.kv_transfer_config.kv_connector_extra_config["connectors"].pop()
    assert connector_settings(many) is None
    assert about(a_config(None)).connector is False


def test_thinking_travels() -> None:
    mode = ThinkingMode(fast="", slow="<t>", leave="</t>", enter="<t>", close="</t>")
    said = About("1", True, thinking=mode).to_dict()
    assert About.from_dict(json.loads(json.dumps(said))).thinking == mode
