"""A stand-in for a vLLM server: a real HTTP server in a thread, with the JSON shapes of vLLM 0.32 and no model.

The shapes are those of ``vllm/entrypoints/openai/completion`` (protocol.py, serving.py), ``serve/tokenize`` and
``serve/engine/protocol.py``. The "model" is a rule: the answer to a prompt are as many words ``w<i>`` as tokens may be
written, and features follow from the prompt. What a stand-in can't show is shown by ``tests/vllm``.
"""

from __future__ import annotations

import contextlib
import json
import socket
import threading
import time
from collections.abc import Callable
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

MODEL = "stand-in/model"


def words(prompt: Any) -> list[int]:
    """Token ids of a prompt: its characters."""
    return list(prompt) if isinstance(prompt, list) else [ord(c) for c in prompt]


def features_of(ids: list[int]) -> list[float]:
    """The vector that belongs to a prompt, whoever asks."""
    return [float(sum(ids)), float(len(ids)), 0.5]


class StandIn:
    """One server; use it as a context.

    Args:
        connector: whether kvroute runs in it.
        models: names it serves.
        port: 0 for a free one.
        delay: seconds before each answer, and between the pieces of a stream.
        act: called with the handler and the request before it is answered; True means it has dealt with it.
    """

    def __init__(
        self,
        *,
        connector: bool = True,
        models: tuple[str, ...] = (MODEL,),
        port: int = 0,
        delay: float = 0.0,
        act: Callable[[_Handler, dict[str, Any]], bool] | None = None,
        token: str | None = None,
    ) -> None:
        self.connector = connector
        self.models = models
        self.delay = delay
        self.act = act
        self.token = token
        self.about: dict[str, Any] | None = None
        self.result: Callable[[dict[str, Any], dict[str, Any] | None], dict[str, Any] | None] | None = None
        self.requests: list[dict[str, Any]] = []
        self.paths: list[str] = []
        self.headers: list[dict[str, str]] = []
        self.busy = self.most_busy = self.broken = 0
        self.lock = threading.Lock()
        self._sockets: set[socket.socket] = set()
        self._server = _Server(("127.0.0.1", port), _Handler)
        self._server.stand_in = self  # type: ignore[attr-defined]
        self.port = self._server.server_address[1]
        self.url = f"http://127.0.0.1:{self.port}"
        self._thread = threading.Thread(target=self._server.serve_forever, args=(0.01,), daemon=True)

    def __enter__(self) -> StandIn:
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self.die()

    def die(self) -> None:
        """Stop at once, in the middle of whatever is being answered."""
        self._server.shutdown()
        self._server.server_close()
        self._thread.join()
        with self.lock:
            for open_socket in self._sockets:
                _drop(open_socket)

    def holds(self, connection: socket.socket, held: bool) -> None:
        with self.lock:
            (self._sockets.add if held else self._sockets.discard)(connection)

    # ------------------------------------------------------------------ what it says

    def kvroute(self, body: dict[str, Any]) -> dict[str, Any] | None:
        """``kv_transfer_params`` of an answer."""
        if not self.connector:
            return None
        ask = (body.get("kv_transfer_params") or {}).get("kvroute")
        if self.result is not None:
            return self.result(body, ask)
        if ask is None:
            return None
        ids = words(body["prompt"])
        asked = ask.get("features") or {}
        found = {
            "features": {n: features_of(ids) for n, f in asked.items() if f not in ("kv-coe", "length")},
            "scores": {},
            "tokens": {"prompt": len(ids), "answer": body["max_tokens"]},
            "faults": [],
            "error": None,
        }
        if "kv-coe" in asked.values():
            found["scores"] = {
                "kv_coe_r_token": {"value": 0.25, "reason": None},
                "kv_coe_c_token": {"value": None, "reason": "The answer has one token."},
            }
        return {"kvroute": found}


def usage_of(prompt: int, generated: int) -> dict[str, Any]:
    return {
        "prompt_tokens": prompt,
        "total_tokens": prompt + generated,
        "completion_tokens": generated,
        "prompt_tokens_details": {"cached_tokens": min(prompt, 2)},
    }


def _drop(connection: socket.socket) -> None:
    with contextlib.suppress(OSError):  # it may be closed already
        connection.shutdown(socket.SHUT_RDWR)


class _Server(ThreadingHTTPServer):
    daemon_threads = True
    request_queue_size = 128


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"

    @property
    def stand_in(self) -> StandIn:
        return self.server.stand_in  # type: ignore[attr-defined,no-any-return]

    def setup(self) -> None:
        super().setup()
        self.stand_in.holds(self.connection, True)

    def finish(self) -> None:
        self.stand_in.holds(self.connection, False)
        super().finish()

    def log_message(self, *_: object) -> None:
        pass

    # ------------------------------------------------------------------ answers

    def send(self, status: int, body: Any) -> None:
        data = body if isinstance(body, bytes) else json.dumps(body).encode()
        self.send_response(status)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(data)))
        self.end_headers()
        self.wfile.write(data)

    def refuse(self, status: int, message: str) -> None:
        """As vLLM's ErrorResponse."""
        self.send(status, {"error": {"message": message, "type": "BadRequestError", "param": None, "code": status}})

    def break_off(self) -> None:
        """Close the connection without an answer."""
        self.close_connection = True
        _drop(self.connection)

    def begin_events(self) -> None:
        self.send_response(200)
        self.send_header("Content-Type", "text/event-stream; charset=utf-8")
        self.send_header("Transfer-Encoding", "chunked")
        self.end_headers()

    def event(self, body: Any) -> None:
        text = body if isinstance(body, str) else json.dumps(body)
        data = f"data: {text}\n\n".encode()
        self.wfile.write(f"{len(data):x}\r\n".encode() + data + b"\r\n")

    # ------------------------------------------------------------------ requests

    def do_GET(self) -> None:
        self.handle_request({})

    def do_POST(self) -> None:
        self.handle_request(json.loads(self.rfile.read(int(self.headers["Content-Length"]))))

    def handle_request(self, body: dict[str, Any]) -> None:
        it = self.stand_in
        with it.lock:
            it.paths.append(self.path)
            it.headers.append(dict(self.headers))
            if self.path == "/v1/completions":
                it.requests.append(body)
                it.busy += 1
                it.most_busy = max(it.most_busy, it.busy)
        try:
            if it.act is not None and it.act(self, body):
                return
            if it.token is not None and self.headers["Authorization"] != f"Bearer {it.token}":
                self.send(401, {"error": "Unauthorized"})
            elif self.path == "/v1/models":
                cards = [{"id": m, "object": "model", "owned_by": "vllm", "max_model_len": 8192} for m in it.models]
                self.send(200, {"object": "list", "data": cards})
            elif self.path == "/v1/kvroute/info" and it.about is not None:
                self.send(200, it.about)
            elif self.path == "/tokenize":
                text = body.get("prompt") or "".join(f"<{m['role']}>{m['content']}" for m in body["messages"]) + "<a>"
                ids = ([1] if body.get("add_special_tokens", "prompt" in body) else []) + words(text)
                self.send(200, {"count": len(ids), "max_model_len": 8192, "tokens": ids, "token_strs": None})
            elif self.path == "/v1/completions":
                (self.stream if body.get("stream") else self.whole)(body)
            else:
                self.send(404, {"detail": "Not Found"})
        except OSError:
            it.broken += 1
            self.close_connection = True
        finally:
            if self.path == "/v1/completions":
                with it.lock:
                    it.busy -= 1

    def whole(self, body: dict[str, Any]) -> None:
        time.sleep(self.stand_in.delay)
        ids = words(body["prompt"])
        tokens = list(range(body["max_tokens"]))
        choice = {
            "index": 0,
            "text": "".join(f" w{i}" for i in tokens),
            "logprobs": None,
            "finish_reason": "length",
            "stop_reason": None,
            "token_ids": tokens,
            "prompt_token_ids": ids,
        }
        if "logprob_token_ids" in body:
            top = {f"token_id:{t}": -float(t) for t in body["logprob_token_ids"]}
            choice["logprobs"] = {"top_logprobs": [{**top, "token_id:0": -0.5}]}
        self.send(
            200,
            {
                "id": "cmpl-1",
                "object": "text_completion",
                "created": 1,
                "model": body["model"],
                "choices": [choice],
                "usage": usage_of(len(ids), len(tokens)),
                "kv_transfer_params": self.stand_in.kvroute(body),
            },
        )

    def stream(self, body: dict[str, Any], *, most: int | None = None) -> None:
        """Events; of ``most`` tokens only, and then the connection breaks."""
        ids = words(body["prompt"])
        count = body["max_tokens"]
        self.begin_events()
        head = {"id": "cmpl-1", "object": "text_completion", "created": 1, "model": body["model"]}
        for i in range(count):
            if i == most:
                self.break_off()
                return
            time.sleep(self.stand_in.delay)
            choice: dict[str, Any] = {"index": 0, "text": f" w{i}", "logprobs": None, "token_ids": [i]}
            choice |= {"finish_reason": "length" if i == count - 1 else None, "stop_reason": None}
            if i == 0:
                choice["prompt_token_ids"] = ids
            event = {**head, "choices": [choice]}
            if i == count - 1:
                event["kv_transfer_params"] = self.stand_in.kvroute(body)
            self.event(event)
        self.event({**head, "choices": [], "usage": usage_of(len(ids), count)})
        self.event("[DONE]")
        self.wfile.write(b"0\r\n\r\n")
