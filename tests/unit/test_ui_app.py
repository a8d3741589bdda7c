"""The page's server: what it gives, what it refuses, and that it stops when the reader leaves."""

from __future__ import annotations

import asyncio
import json
import re
import threading
import time
from collections.abc import Iterator
from contextlib import nullcontext
from importlib.resources import files
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from starlette.requests import ClientDisconnect
from starlette.testclient import TestClient

from kvroute import CancelToken, InvalidInputError, KVEmbedder, PoolingSpec, Router, TransformersEngine
from kvroute.candidates import one_step_candidate
from kvroute.label_rows import write_meta
from kvroute.ui.app import WAITING, BusyError, Turn, build_app
from kvroute.ui.desk import LONGEST, Desk, Example, Question
from kvroute.ui.guard import HEADERS, MOST_BYTES, Hosts
from kvroute.ui.labelled import Labelled
from kvroute.ui.layers import REFERENCE
from tests.label_data import label_meta, label_rows, ridge_head
from tests.unit.test_heads_confidence import a_head
from tests.unit.test_router import LABELS, PROMPTS, an_engine, two_step

PLACE = "http://127.0.0.1:8010"
ASK = {"question": PROMPTS[0], "max_tokens": 12}


@pytest.fixture(scope="module")
def engine() -> TransformersEngine:
    return an_engine()


@pytest.fixture(scope="module")
def router(engine: TransformersEngine) -> Router:
    return two_step(engine, LABELS, 20.0, confidence=a_head(engine))


@pytest.fixture
def desk(engine: TransformersEngine, router: Router) -> Desk:
    return Desk(engine, router, confidence=router.confidence, examples=[Example("a name", PROMPTS[1])])


def client_of(desk: Desk, host: str = "127.0.0.1") -> TestClient:
    return TestClient(build_app(desk, Hosts(host)), base_url=PLACE, raise_server_exceptions=False)


@pytest.fixture
def client(desk: Desk) -> TestClient:
    return client_of(desk)


def events(response: Any) -> list[dict[str, Any]]:
    return [json.loads(line) for line in response.text.splitlines()]


def test_the_page_and_what_it_loads_are_here(client: TestClient) -> None:
    page = client.get("/")
    assert page.status_code == 200
    assert page.headers["content-type"].startswith("text/html")
    for name, value in HEADERS.items():
        assert page.headers[name] == (value if name != "cache-control" else "no-cache")
    loaded = re.findall(r'(?:src|href)="(/[^"]+)"', page.text)
    modules = [f.name for f in files("kvroute.ui").joinpath("static").iterdir() if f.name.endswith(".js")]
    for path in {*loaded, *(f"/static/{m}" for m in modules)}:
        assert client.get(path).status_code == 200, path
    assert client.get("/static/main.js").headers["content-type"].startswith("text/javascript")


def test_nothing_on_the_page_names_another_host_or_breaks_the_policy() -> None:
    for f in files("kvroute.ui").joinpath("static").iterdir():
        text = f.read_text()
        assert not re.findall(r"(?:https?:)?//[a-z0-9-]+\.[a-z]", text.replace("http://www.w3.org/2000/svg", "")), (
            f.name
        )
        assert "innerHTML" not in text, f.name
        assert "eval(" not in text
        assert not re.search(r"""\sstyle=|\son[a-z]+=["']""", text), f.name


@pytest.mark.parametrize(
    "path", ["/static/nothing.js", "/static/../app.py", "/static/%2e%2e%2fapp.py", "/app.py", "/static/"]
)
def test_only_its_own_files_are_served(client: TestClient, path: str) -> None:
    assert client.get(path).status_code == 404


def test_an_answer_is_streamed_as_events(client: TestClient, router: Router) -> None:
    response = client.post("/api/ask", json=ASK)
    assert response.headers["content-type"].startswith("application/x-ndjson")
    found = events(response)
    routed = router.generate([{"role": "user", "content": PROMPTS[0]}], max_tokens=12)
    assert "".join(e["text"] for e in found if e["type"] == "piece" and e["lane"] == 0) == routed.text
    ends = {e["lane"]: e for e in found if e["type"] == "end"}
    assert sorted(ends) == [0, 1]
    assert ends[0]["confidence"] == pytest.approx(routed.confidence)
    alone = events(client.post("/api/ask", json={**ASK, "beside": False}))
    assert {e["lane"] for e in alone} == {0}
    slow = events(client.post("/api/ask", json={**ASK, "mode": "slow"}))
    assert {e["lane"] for e in slow} == {0}
    assert next(e for e in slow if e["type"] == "decision")["why"] == "forced"


def test_it_says_what_it_runs(client: TestClient, router: Router) -> None:
    about = client.get("/api/about").json()
    assert about["model"]["name"] == "tiny"
    assert about["policy"]["kind"] == "two-step"
    assert about["policy"]["tau"] == router.policy.tau
    assert about["examples"] == [{"name": "a name", "question": PROMPTS[1]}]
    assert about["limits"]["characters"] == LONGEST
    assert str(Path.home()) not in json.dumps(about)


# ---------------------------------------------------------------------- refusals


@pytest.mark.parametrize(
    "host", ["evil.example", "evil.example:8010", "127.0.0.1.evil.example", "", "[::1", "10.0.0.7"]
)
def test_another_name_is_refused(client: TestClient, host: str) -> None:
    for response in (
        client.get("/", headers={"host": host}),
        client.post("/api/ask", json=ASK, headers={"host": host}),
    ):
        assert response.status_code == 403
        assert "content-security-policy" in response.headers


@pytest.mark.parametrize("host", ["127.0.0.1:8010", "localhost:8010", "[::1]:8010", "LOCALHOST"])
def test_its_own_names_are_not(client: TestClient, host: str) -> None:
    assert client.get("/", headers={"host": host}).status_code == 200


def test_a_page_for_others_takes_addresses_and_no_strange_names(desk: Desk) -> None:
    client = client_of(desk, "0.0.0.0")
    assert client.get("/", headers={"host": "192.168.1.9:8010"}).status_code == 200
    assert client.get("/", headers={"host": "evil.example:8010"}).status_code == 403


@pytest.mark.parametrize(
    ("headers", "status"),
    [
        ({"origin": "http://evil.example"}, 403),
        ({"origin": "http://127.0.0.1:9999"}, 403),
        ({"origin": "null"}, 403),
        ({"sec-fetch-site": "cross-site"}, 403),
        ({"sec-fetch-site": "same-site"}, 403),
        ({"content-type": "text/plain"}, 415),
        ({"content-type": "application/x-www-form-urlencoded"}, 415),
        ({"origin": PLACE, "sec-fetch-site": "same-origin"}, 200),
        ({}, 200),
    ],
)
def test_other_sites_may_not_ask(client: TestClient, headers: dict[str, str], status: int) -> None:
    given = {"content-type": "application/json", **headers}
    assert client.post("/api/ask", content=json.dumps(ASK), headers=given).status_code == status
    if "sec-fetch-site" in headers and status != 200:
        assert client.get("/api/curve", headers=headers).status_code == 403
        assert client.get("/", headers=headers).status_code == 200  # a link may stand anywhere


@pytest.mark.parametrize(
    ("body", "said"),
    [
        ({"question": ""}, "question: it is empty."),
        ({"question": "  \n"}, "question: there is no text in it."),
        ({"question": "x" * (LONGEST + 1)}, f"question: String should have at most {LONGEST} characters."),
        ({"question": "x", "max_tokens": 0}, "max_tokens: Input should be greater than or equal to 1."),
        ({"question": "x", "temperature": 9}, "temperature: Input should be less than or equal to 2."),
        ({"question": "x", "mode": "fastest"}, "mode: Input should be 'policy', 'fast' or 'slow'."),
        ({"question": "x", "policy": "/etc/passwd"}, "policy: Extra inputs are not permitted."),
        ({}, "question: Field required."),
        ([], "the request: Input should be an object."),
    ],
)
def test_requests_that_are_none(client: TestClient, body: Any, said: str) -> None:
    response = client.post("/api/ask", json=body)
    assert response.status_code == 400
    assert response.json()["message"] == said


def test_large_bodies_are_refused(client: TestClient) -> None:
    response = client.post("/api/ask", content=b" " * (MOST_BYTES + 1), headers={"content-type": "application/json"})
    assert response.status_code == 413
    chunks = (b" " * 1024 for _ in range(MOST_BYTES // 1024 + 2))  # without a length in front
    assert client.post("/api/ask", content=chunks, headers={"content-type": "application/json"}).status_code == 413


def test_faults_are_told_in_words(client: TestClient, desk: Desk, monkeypatch: pytest.MonkeyPatch) -> None:
    found = events(client.post("/api/ask", json={"question": "word " * 1500, "max_tokens": 2048}))
    assert found[-1]["type"] == "error"
    assert "tokens, and the limit is" in found[-1]["message"]
    assert found[-1]["hint"]
    assert client.get("/api/curve").json()["message"] == "No labelled file was given."

    def broken(*_: Any) -> Iterator[Any]:
        raise RuntimeError("a secret path /home/somebody")
        yield

    monkeypatch.setattr(Desk, "ask", broken)
    said = events(client.post("/api/ask", json=ASK))[-1]
    assert said["message"] == "Something went wrong here: RuntimeError."
    assert "somebody" not in json.dumps(said)
    monkeypatch.setattr(Desk, "compare", broken)
    monkeypatch.setattr(desk, "compare", lambda _: 1 / 0)
    wrong = client.post("/api/compare", json={"first": "a", "second": "b"})
    assert wrong.status_code == 500
    assert wrong.json()["message"] == "Something went wrong here: ZeroDivisionError."


# ---------------------------------------------------------------------- one at a time


async def test_turns_are_taken_in_order_and_few_wait() -> None:
    turn, order, gate = Turn(), [], asyncio.Event()

    async def work(name: int) -> None:
        async with turn.take():
            await gate.wait()
            order.append(name)

    tasks = [asyncio.create_task(work(i)) for i in range(WAITING + 1)]
    await asyncio.sleep(0)
    with pytest.raises(BusyError):
        async with turn.take():
            pass
    tasks[1].cancel()  # one that waits goes, and makes room
    await asyncio.sleep(0)
    turn.check()
    gate.set()
    await asyncio.gather(*tasks, return_exceptions=True)
    assert order == [0, 2, 3]
    assert turn.ahead == 0


class Slow(Desk):
    """Answers until it is told to stop."""

    ended: threading.Event
    begun: threading.Event

    def ask(self, wanted: Question, cancel: CancelToken) -> Iterator[dict[str, Any]]:
        self.begun.set()
        while not cancel.cancelled:
            yield {"type": "piece", "lane": 0}
            time.sleep(0.005)
        self.ended.set()


def slow_desk(engine: TransformersEngine) -> Slow:
    made = Slow(engine)
    made.begun, made.ended = threading.Event(), threading.Event()
    return made


def scope_of(spec: str = "2.3") -> dict[str, Any]:
    return {
        "type": "http", "asgi": {"version": "3.0", "spec_version": spec}, "http_version": "1.1", "method": "POST",
        "path": "/api/ask", "raw_path": b"/api/ask", "query_string": b"", "root_path": "", "scheme": "http",
        "headers": [(b"host", b"127.0.0.1"), (b"content-type", b"application/json")], "client": ("127.0.0.1", 1),
        "server": ("127.0.0.1", 8010),
    }  # fmt: skip


@pytest.mark.parametrize("spec", ["2.3", "2.4"])
async def test_it_stops_when_the_reader_leaves(engine: TransformersEngine, spec: str) -> None:
    desk = slow_desk(engine)
    app = build_app(desk, Hosts("127.0.0.1"))
    sent: list[Any] = []
    left = asyncio.Event()
    asked = False

    async def receive() -> Any:
        nonlocal asked
        if not asked:
            asked = True
            return {"type": "http.request", "body": json.dumps(ASK).encode(), "more_body": False}
        await left.wait()
        return {"type": "http.disconnect"}

    async def send(message: Any) -> None:
        sent.append(message)
        if len(sent) >= 5:
            left.set()
            if spec == "2.4":
                raise OSError("the connection is gone")

    with nullcontext() if spec == "2.3" else pytest.raises(ClientDisconnect):  # which the server expects
        await asyncio.wait_for(app(scope_of(spec), receive, send), 10)
    assert await asyncio.to_thread(desk.ended.wait, 5)
    # The next one is not held up.
    again = TestClient(app, base_url=PLACE)
    Slow.ask, kept = (lambda self, wanted, cancel: iter([{"type": "end"}])), Slow.ask  # type: ignore[assignment]
    try:
        assert await asyncio.to_thread(lambda: events(again.post("/api/ask", json=ASK))) == [{"type": "end"}]
    finally:
        Slow.ask = kept  # type: ignore[method-assign]


async def test_a_second_reader_waits_and_a_crowd_is_told(engine: TransformersEngine) -> None:
    desk = slow_desk(engine)
    app = build_app(desk, Hosts("127.0.0.1"))

    class Reader:
        def __init__(self) -> None:
            self.lines: list[dict[str, Any]] = []
            self.status = 0
            self.left = asyncio.Event()
            self.asked = False
            self.task = asyncio.create_task(app(scope_of(), self.receive, self.send))

        async def receive(self) -> Any:
            if not self.asked:
                self.asked = True
                return {"type": "http.request", "body": json.dumps(ASK).encode(), "more_body": False}
            await self.left.wait()
            return {"type": "http.disconnect"}

        async def send(self, message: Any) -> None:
            self.status = message.get("status", self.status)
            self.lines += [json.loads(x) for x in message.get("body", b"").splitlines()]

    readers = []
    for _ in range(WAITING + 1):
        readers.append(Reader())
        await asyncio.sleep(0.05)
    assert [r.lines[0] for r in readers[1:]] == [{"type": "waiting", "ahead": n} for n in range(1, WAITING + 1)]
    crowd = Reader()
    await asyncio.wait_for(crowd.task, 5)
    assert crowd.status == 503
    assert "wait already" in crowd.lines[0]["message"]
    for reader in readers:
        reader.left.set()
    await asyncio.wait_for(asyncio.gather(*(r.task for r in readers)), 10)


# ---------------------------------------------------------------------- comparing


def test_cosines_by_layer(client: TestClient, engine: TransformersEngine) -> None:
    pair = {"first": PROMPTS[0], "second": PROMPTS[2]}
    found = client.post("/api/compare", json=pair).json()
    count = engine.info.num_layers
    assert found["layers"] == list(range(count))
    for part in ("k", "v"):
        for layer in range(count):
            embedder = KVEmbedder(engine, PoolingSpec(layers=(layer,), part=part, heads="concat"))
            a, b = embedder.encode(list(pair.values()), progress=False).astype(np.float64)
            mean = embedder.encode(list(REFERENCE), progress=False).mean(axis=0)
            assert found[part][layer] == pytest.approx(cosine(a, b), abs=1e-5)
            assert found[f"{part}_free"][layer] == pytest.approx(cosine(a - mean, b - mean), abs=1e-4)
    best = KVEmbedder(engine).encode(list(pair.values()), progress=False)
    assert found["embedding"]["cosine"] == pytest.approx(cosine(*best), abs=1e-5)


def test_layers_of_other_sizes_and_windows(tiny_engines: TransformersEngine) -> None:
    found = Desk(tiny_engines).about()
    assert found["policy"] is None
    compared = client_of(Desk(tiny_engines)).post("/api/compare", json={"first": "the cat sat", "second": "a question"})
    body = compared.json()
    assert len(body["k"]) == len(body["v"]) == tiny_engines.info.num_layers
    assert all(x is None or -1 <= x <= 1 for x in (*body["k"], *body["v_free"]))


def cosine(a: Any, b: Any) -> float:
    return float(a @ b / np.linalg.norm(a) / np.linalg.norm(b))


# ---------------------------------------------------------------------- the labelled file


@pytest.fixture
def labels(tmp_path: Path, tiny_engine: TransformersEngine) -> Path:
    path = tmp_path / "labels.jsonl"
    path.write_text("".join(r.model_dump_json() + "\n" for r in label_rows(60)))
    write_meta(path, label_meta(tiny_engine))
    return path


def test_columns_are_the_heads_difficulties_and_the_modes_outcomes(
    labels: Path, tiny_engine: TransformersEngine
) -> None:
    rows = label_rows(60)
    head = ridge_head(tiny_engine, rows, PoolingSpec(layers="last:1", part="v", heads="concat"))
    desk = Desk(tiny_engine, labelled=Labelled.open(labels, head, "head", tiny_engine))
    found = client_of(desk).get("/api/curve").json()
    assert found["file"] == "labels.jsonl"
    assert found["every"] is None  # the head reads no windows
    assert "train" not in found["parts"]
    test = [r for r in rows if r.part == "test"]
    part = found["parts"]["test"]
    assert part["rows"] == part["of"] == len(test)
    d = head.predict(tiny_engine.pool([list(r.prompt_ids) for r in test], [head.spec], progress=False)[0])
    np.testing.assert_allclose(part["difficulty"], d, atol=1e-3)
    mine = one_step_candidate(part["difficulty"], test, 40.0, 90.0)
    slow = (np.array(part["difficulty"]) > 40) & (np.array(part["difficulty"]) <= 90)
    tokens = np.where(slow, part["slow_tokens"], part["fast_tokens"])
    assert tokens.mean() == pytest.approx(mine.mean_tokens)
    assert np.where(slow, part["slow_right"], part["fast_right"]).mean() == pytest.approx(mine.accuracy)


def test_closings_are_those_of_the_labels(labels: Path, tiny_engine: TransformersEngine) -> None:
    from dataclasses import replace

    rows = label_rows(60)
    spec = PoolingSpec(layers="last:1", part="v", heads="concat")
    head = ridge_head(tiny_engine, rows, spec)
    both = replace(head, windows=head)
    found = Labelled.open(labels, both, "head", tiny_engine).columns(tiny_engine)
    assert found["every"] == 5
    from kvroute.heads.examples import mode_layout

    suffix = mode_layout(tiny_engine, rows, label_meta(tiny_engine)).slow
    for part, columns in found["parts"].items():
        mine = [r for r in rows if r.part == part]
        for row, closings in zip(mine, columns["closings"], strict=True):
            slow = row.slow[0]
            assert [c[1:] for c in closings] == [[float(c.correct), float(c.tokens)] for c in slow.checkpoints]
            held = [[*row.prompt_ids, *suffix, *slow.token_ids[: c.at]] for c in slow.checkpoints]
            d = head.predict(tiny_engine.pool(held, [spec], progress=False)[0])
            np.testing.assert_allclose([c[0] for c in closings], d, atol=2e-3)


def test_files_that_can_not_be_shown(labels: Path, tiny_engine: TransformersEngine, tmp_path: Path) -> None:
    head = ridge_head(tiny_engine, label_rows(60), PoolingSpec(layers="last:1", part="v", heads="concat"))
    with pytest.raises(InvalidInputError, match="says whether an answer is correct"):
        Labelled.open(labels, a_head(tiny_engine), "answers", tiny_engine)
    only_train = tmp_path / "train.jsonl"
    only_train.write_text("".join(r.model_dump_json() + "\n" for r in label_rows(60) if r.part == "train"))
    write_meta(only_train, label_meta(tiny_engine))
    with pytest.raises(InvalidInputError, match="would flatter"):
        Labelled.open(only_train, head, "head", tiny_engine)
