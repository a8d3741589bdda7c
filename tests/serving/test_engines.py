"""What users do with vLLM through kvroute, on CPU and with the tiny thinker: it gives what transformers gives."""

from __future__ import annotations

import json
import re
import shutil
import subprocess
import sys
import urllib.error
import urllib.request
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import openai
import pytest

from kvroute import KVEmbedder, PoolingSpec, Question, Router, SelfEvaluator, TransformersEngine, VLLMClient
from kvroute.errors import InvalidInputError
from kvroute.labelling import Labeller
from tests.serving.http_server import free_port, running
from tests.serving.processes import ROOT, environment, run_module
from tests.serving.run_vllm_engine import CHATS, FEATURES, TEXTS

pytestmark = pytest.mark.vllm
THINKER = ROOT / "examples/tiny_thinker"
MODEL = THINKER / "model"
KEY = "sesam"


@pytest.fixture(scope="module")
def engine() -> TransformersEngine:
    return TransformersEngine.from_pretrained(MODEL, dtype="float32", device="cpu")


@pytest.fixture(scope="module")
def policies(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("policies")
    for name in ("policy.json", "policy.drift.safetensors"):
        shutil.copy(THINKER / name, folder)
    shutil.copytree(THINKER / "head", folder / "head")
    return folder


@pytest.fixture(scope="module")
def url(policies: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """A server that ``kvroute serve`` started."""
    port = free_port()
    log = tmp_path_factory.mktemp("log") / "log"
    command = [sys.executable, "-m", "kvroute.cli", "serve", str(MODEL), "--policy", str(policies), "--name", "thinker"]
    command += ["--port", str(port), "--enforce-eager", "--max-model-len", "256", "--dtype", "float32"]
    command += ["--max-num-seqs", "16", "--api-key", KEY]
    with running(command, port, log, patience=400) as server:
        yield server.url


@pytest.fixture(scope="module")
def client(url: str) -> Iterator[VLLMClient]:
    with VLLMClient(url, tokenizer=MODEL, api_key=KEY) as it:
        yield it


def close(found: Any, expected: Any) -> None:
    expected = np.asarray(expected)
    np.testing.assert_allclose(np.asarray(found), expected, rtol=0, atol=5e-5 * np.abs(expected).max())


def written(url: str) -> float:
    """Tokens that a server says it wrote."""
    page = urllib.request.urlopen(f"{url}/metrics", timeout=30).read().decode()
    return sum(float(n) for n in re.findall(r"^vllm:generation_tokens_total\{.*\} (\S+)$", page, re.MULTILINE))


def test_embeddings_by_the_stock_client(url: str, engine: TransformersEngine) -> None:
    stock = openai.OpenAI(base_url=f"{url}/v1", api_key=KEY, max_retries=0)
    spec = PoolingSpec(layers="last:2", part="v", heads="concat", window=4)
    for how, pooling in (
        ({"model": "thinker"}, "best"),
        ({"model": "thinker:paper-mteb"}, "paper-mteb"),
        ({"model": "thinker", "extra_body": {"kvroute": {"spec": spec.model_dump(exclude_defaults=True)}}}, spec),
    ):
        expected = KVEmbedder(engine, pooling).encode(TEXTS)
        for form in ("float", "base64"):
            found = stock.embeddings.create(input=TEXTS, encoding_format=form, **how)  # type: ignore[call-overload]
            rows = [d.embedding for d in found.data]
            if form == "base64" and isinstance(rows[0], str):
                import base64

                rows = [np.frombuffer(base64.b64decode(row), "<f4") for row in rows]
            close(rows, expected)
        ids = engine.tokenize_texts(TEXTS)
        found = stock.embeddings.create(input=ids, **how)  # type: ignore[call-overload]
        close([d.embedding for d in found.data], expected)
        assert found.usage.prompt_tokens == sum(map(len, ids))

    # a text that was read before is read from the prefix cache, and each text costs the one token that vLLM must write
    long = "run " + ";".join(f"{i}a+{i}b*{i}" for i in range(20))
    assert 128 < len(engine.tokenize_texts([long])[0]) < 200
    before = written(url)
    for texts, cached in (([long], 0), ([long, f"{long}7", TEXTS[0]], 256)):
        found = stock.embeddings.create(input=texts, model="thinker")
        assert (found.usage.model_extra or {})["prompt_tokens_details"]["cached_tokens"] == cached
        close([d.embedding for d in found.data], KVEmbedder(engine, "best").encode(texts))
    assert written(url) - before == 4
    for wrong, status in (({"model": "another"}, 404), ({"input": "a" * 900}, 400), ({"dimensions": 3}, 400)):
        with pytest.raises(openai.APIStatusError) as caught:
            stock.embeddings.create(**{"model": "thinker", "input": "a", **wrong})  # type: ignore[arg-type]
        assert caught.value.status_code == status


def test_the_key_guards_kvroutes_routes(url: str) -> None:
    for path, data in (("embeddings", b"{}"), ("kvroute/score", b"{}"), ("kvroute/info", None)):
        with pytest.raises(urllib.error.HTTPError) as caught:
            urllib.request.urlopen(urllib.request.Request(f"{url}/v1/{path}", data), timeout=30)
        assert caught.value.code == 401
        caught.value.close()


def test_scores_over_http_and_by_the_client(url: str, client: VLLMClient, engine: TransformersEngine) -> None:
    items = [{"messages": chat, "answer": "the answer is 7"} for chat in CHATS]
    body = json.dumps({"model": "thinker", "items": items}).encode()
    headers = {"Authorization": f"Bearer {KEY}", "Content-Type": "application/json"}
    request = urllib.request.Request(f"{url}/v1/kvroute/score", body, headers)
    with urllib.request.urlopen(request, timeout=60) as answer:
        over_http = json.load(answer)["data"]
    rows = [(chat, "the answer is 7") for chat in CHATS]
    mine = SelfEvaluator(engine, scores=["kv-coe", "length", "p-true"]).score_many(rows, progress=False)
    theirs = SelfEvaluator(client, scores=["kv-coe", "length", "p-true"]).score_many(rows, progress=False)
    for a, b, c in zip(mine, theirs, over_http, strict=True):
        for name, score in a.scores.items():
            expected = None if score.value is None else pytest.approx(score.value, rel=3e-4, abs=3e-5)
            assert b.scores[name].value == expected, name
            if name != "p_true":
                assert c["scores"][name]["value"] == expected, name
    whole = SelfEvaluator(client).score(*rows[0])
    assert "TransformersEngine" in str(whole.scores["entropy"].reason)


def test_the_server_routes(client: VLLMClient, engine: TransformersEngine, policies: Path) -> None:
    assert client.info.fingerprint == engine.info.fingerprint
    mine = Router(engine, policies / "policy.json").generate(CHATS, max_tokens=60)
    router = Router(client, policies / "policy.json")
    for a, b in zip(router.generate(CHATS, max_tokens=60), mine, strict=True):
        assert (a.text, a.thought, a.answer) == (b.text, b.thought, b.answer)
        assert (a.generation.token_ids, a.usage) == (b.generation.token_ids, b.usage)
        assert (a.decision.mode, a.decision.switch is None) == (b.decision.mode, b.decision.switch is None)
        assert a.decision.difficulty == pytest.approx(b.decision.difficulty, abs=1e-2)
    pieces = list(router.stream(CHATS[0], max_tokens=60))
    assert "".join(p.text for p in pieces) == mine[0].text
    assert pieces[-1].routed is not None
    assert pieces[-1].routed.decision.mode == mine[0].decision.mode
    with pytest.raises(InvalidInputError, match="It has: fast, policy, slow"):
        Router(client, "another")


def test_labels_over_the_server(client: VLLMClient, engine: TransformersEngine) -> None:
    questions = [Question(str(i), text, "7", "number") for i, text in enumerate(TEXTS)]
    how: dict[str, Any] = {"max_tokens": {"fast": 16, "slow": 60}, "checkpoints": 8}
    mine, theirs = (Labeller(e, **how).label(questions) for e in (engine, client))
    assert [r.error for r in theirs] == [None] * len(questions)
    for a, b in zip(mine, theirs, strict=True):
        assert a.model_dump(exclude={"extra"}) == b.model_dump(exclude={"extra"})


def test_the_page_over_the_server(url: str, engine: TransformersEngine, policies: Path) -> None:
    """``kvroute ui --engine URL`` streams the answer of the server's policy, with what was decided on the way."""
    command = [sys.executable, "-m", "kvroute.cli", "ui", "--model", str(MODEL), "--engine", url]
    command += ["--policy", "policy", "--port", "0"]
    variables = environment() | {"KVROUTE_API_KEY": KEY}
    with subprocess.Popen(command, cwd=ROOT, env=variables, stdout=subprocess.PIPE, text=True) as page:
        assert page.stdout is not None
        try:
            place = re.findall(r"http://\S+/", page.stdout.readline())[0]
            about = json.load(urllib.request.urlopen(f"{place}api/about", timeout=60))
            assert KEY not in json.dumps(about)
            body = json.dumps({"question": TEXTS[0], "max_tokens": 60}).encode()
            asked = urllib.request.Request(f"{place}api/ask", body, {"Content-Type": "application/json"})
            with urllib.request.urlopen(asked, timeout=120) as answer:
                events = [json.loads(line) for line in answer]
        finally:
            page.terminate()
    chat = [{"role": "user", "content": TEXTS[0]}]
    for lane, mode in enumerate((None, "slow")):
        mine = Router(engine, policies / "policy.json").generate(chat, max_tokens=60, mode=mode)
        own = [e for e in events if e["lane"] == lane]
        assert "".join(e["text"] for e in own if e["type"] == "piece") == mine.text
        decision = next(e for e in own if e["type"] == "decision")
        assert decision["mode"] == mine.decision.mode
        if mode is None:
            assert decision["difficulty"] == pytest.approx(mine.decision.difficulty, abs=1e-2)
        assert ("switch" in {e["type"] for e in own}) == (mine.decision.switch is not None)
        assert own[-1]["type"] == "end"


@pytest.mark.slow
def test_a_recipe_whose_answers_the_server_writes(
    url: str, run: Callable[..., tuple[int, str, str]], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """All answers are the server's; the caches are read by transformers, and the table is made of both."""
    monkeypatch.setenv("KVROUTE_API_KEY", KEY)
    before = written(url)
    code, text, err = run(
        "reproduce", "tiny-thinker", "--engine", url, "--out", tmp_path / "out", "--limit", 120, "--quiet", "--json"
    )
    assert code == 0, err
    assert written(url) - before > 120 * 2 * 10
    found = json.loads(text)
    figures = {name: figure["ours"] for name, figure in found["figures"].items()}
    assert figures["thinker.slow.accuracy"] > figures["thinker.fast.accuracy"]
    assert figures["thinker.slow.tokens"] > figures["thinker.fast.tokens"]
    assert 0 <= figures["thinker.auroc-fast-is-right"] <= 1
    assert (tmp_path / "out" / "reproduction.html").stat().st_size > 10_000


def test_vllm_in_this_process(engine: TransformersEngine, policies: Path, tmp_path: Path) -> None:
    out = tmp_path / "out.json"
    run_module("tests.serving.run_vllm_engine", str(MODEL), str(policies), str(out))
    found = json.loads(out.read_text())
    assert found["fingerprint"] == engine.info.fingerprint
    answers = engine.generate(CHATS, features=FEATURES, max_tokens=12)
    for theirs, mine in zip(found["answers"], answers, strict=True):
        assert (theirs["text"], theirs["tokens"], theirs["prompt"]) == (
            mine.text, mine.token_ids, mine.prompt_token_ids,
        )  # fmt: skip
        assert theirs["finish"] == mine.finish_reason
        assert not theirs["errors"]
        for name, vector in mine.features.items():
            close(theirs["features"][name], vector)
        for name, score in mine.scores.items():
            assert theirs["scores"][name] == pytest.approx(score.value, rel=3e-4, abs=3e-5), name
    assert found["streamed"] == answers[0].text
    assert found["streamed_scores"]["kv_coe_r_token"] == pytest.approx(
        answers[0].scores["kv_coe_r_token"].value, rel=3e-4, abs=3e-5
    )
    stop, text, finish, errors = found["stopped"]
    assert (text, finish, errors) == (engine.generate(CHATS[0], max_tokens=12, stop=stop).text, "stop", {})
    assert found["cancelled"] == "cancelled"
    assert found["together"] == [a.text for a in answers]
    close(found["vectors"], KVEmbedder(engine, "best").encode(TEXTS))
    scored = SelfEvaluator(engine, scores=["kv-coe", "length", "p-true"]).score(CHATS[0], "68")
    for name, one in scored.scores.items():
        value, reason = found["scored"][name]
        assert value == (None if one.value is None else pytest.approx(one.value, rel=3e-4, abs=3e-5)), name
        assert reason == one.reason
    routed = Router(engine, policies / "policy.json").generate(CHATS, max_tokens=60)
    assert found["routed"] == [[r.text, r.decision.mode, r.usage.generated] for r in routed]
    assert found["refused"] == ["TextTooLongError", "UnsupportedModelError"]
    _adapters_agree(found, engine, policies / "policy.json")


def _adapters_agree(found: dict[str, Any], engine: TransformersEngine, policy: Path) -> None:
    """LangChain and LlamaIndex over the engine in process say what they say over transformers."""
    from langchain_kvroute import ChatKVRoute, KVRouteEmbeddings, kvroute_metadata

    theirs = found["langchain"]
    mine = ChatKVRoute(engine=engine, policy=policy, max_tokens=60).batch(TEXTS)
    assert theirs["answers"] == [answer.text for answer in mine]
    assert theirs["modes"] == [(kvroute_metadata(answer) or {})["mode"] for answer in mine]
    assert theirs["faults"] == [[]] * len(TEXTS)
    assert theirs["usage"] == [(answer.usage_metadata or {})["output_tokens"] for answer in mine]
    assert theirs["streamed"] == theirs["later"] == theirs["answers"][0]
    embeddings = KVRouteEmbeddings(engine=engine, spec="best")
    close(theirs["documents"], embeddings.embed_documents(TEXTS))
    close(theirs["query"], embeddings.embed_query(TEXTS[0]))
    assert found["llama_index"]["texts"] == theirs["documents"]  # the same vectors, by the same embedder
    assert found["llama_index"]["query"] == theirs["query"]
