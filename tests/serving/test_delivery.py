"""Every way of getting an answer from a real vLLM server has kvroute's result: read with the stock openai client.

The model is the tiny thinker with its policy. kvroute runs beside another connector here (vLLM's MultiConnector).
What is asked for and how it was delivered must not change what is read: each result is compared to the plain
request's with the same tokens.
"""

from __future__ import annotations

import asyncio
import json
import re
import urllib.error
import urllib.request
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import openai
import pytest

from kvroute.serving.answers import Result
from tests.serving.http_server import CONNECTOR, serving
from tests.serving.processes import ROOT

pytestmark = pytest.mark.vllm
THINKER = ROOT / "examples" / "tiny_thinker"
PROMPT = "run a=2 b=9;1a+6;2a=1;3b+9;4b=8;5a+7"
OTHERS = ["map:g>m,f>92,d>37,c>49,m>j,e>m,k>f", "run ok next a=4 b=9"]
CHAT: Any = [{"role": "user", "content": PROMPT}]
FEATURES = ["prompt:paper-mteb", "answer:paper-mteb", "kv-coe", "length"]
ASK = {"kv_transfer_params": {"kvroute": {"features": FEATURES}}}


@pytest.fixture(scope="module")
def stored(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Where the other connector writes."""
    return tmp_path_factory.mktemp("stored")


@pytest.fixture(scope="module")
def url(tmp_path_factory: pytest.TempPathFactory, stored: Path) -> Iterator[str]:
    other = {
        "kv_connector": "ExampleConnector",
        "kv_role": "kv_both",
        "kv_connector_extra_config": {"shared_storage_path": str(stored)},
    }
    multi = {
        "kv_connector": "MultiConnector",
        "kv_role": "kv_both",
        "kv_connector_extra_config": {
            "connectors": [{**CONNECTOR, "kv_connector_extra_config": {"policies": str(THINKER)}}, other]
        },
    }
    log = tmp_path_factory.mktemp("server") / "log"
    with serving(THINKER / "model", log, "--no-async-scheduling", transfer=multi) as it:
        yield it
    assert "kvroute could not" not in log.read_text()


@pytest.fixture(scope="module")
def client(url: str) -> Iterator[openai.OpenAI]:
    with openai.OpenAI(base_url=f"{url}/v1", api_key="-", max_retries=0) as it:
        yield it


def complete(client: openai.OpenAI, prompt: Any = PROMPT, **more: Any) -> tuple[Any, Any]:
    """An answer, and what kvroute says about it."""
    options = {"max_tokens": 12, "temperature": 0, "extra_body": ASK} | more
    options["extra_body"] = {"ignore_eos": True, **options["extra_body"]}
    answer: Any = client.completions.create(model="model", prompt=prompt, **options)
    if options.get("stream"):
        answer = list(answer)
    last = answer[-1] if options.get("stream") else answer
    return answer, (last.model_extra.get("kv_transfer_params") or {}).get("kvroute")


def check(found: dict[str, Any], expected: dict[str, Any]) -> None:
    """Equal, within the rounding of other batches."""
    assert found["error"] is None
    assert {k: v for k, v in found["tokens"].items() if k != "behind_stop"} == expected["tokens"]
    assert set(found["features"]) == set(expected["features"])
    for name, vector in expected["features"].items():
        np.testing.assert_allclose(found["features"][name], vector, rtol=0, atol=1e-4 * np.abs(vector).max())
    for name, score in expected["scores"].items():
        value = score["value"]
        assert found["scores"][name]["value"] == (None if value is None else pytest.approx(value, rel=1e-3, abs=1e-4))


def test_streams(client):
    _, expected = complete(client)
    for options in ({}, {"stream_options": {"include_usage": True}}):
        chunks, found = complete(client, stream=True, **options)
        assert all("kv_transfer_params" not in c.model_extra for c in chunks[:-1])
        check(found, expected)
    options = {"model": "model", "messages": CHAT, "max_tokens": 8, "temperature": 0, "extra_body": ASK}
    whole: Any = client.chat.completions.create(**options)
    last: Any = list(client.chat.completions.create(stream=True, **options))[-1]
    assert last.choices[0].finish_reason == whole.choices[0].finish_reason
    check(last.model_extra["kv_transfer_params"]["kvroute"], whole.model_extra["kv_transfer_params"]["kvroute"])


@pytest.mark.parametrize("stream", [False, True])
def test_a_stop_string(client, stream):
    plain, _ = complete(client)
    text = plain.choices[0].text
    stop = next(text[i : i + 2] for i in range(4, len(text)) if text.find(text[i : i + 2]) == i)
    more = {"stream": True, "stream_options": {"include_usage": True}} if stream else {}
    told, found = complete(client, stop=stop, **more)
    behind = found["tokens"]["behind_stop"]
    written = (told[-1] if stream else told).usage.completion_tokens
    assert 2 < written <= 12
    # the engine writes on until it hears of the stop string from the API server, on a busy machine as far as it may
    assert 0 <= behind <= 12 - written
    check(found, complete(client, max_tokens=written + behind)[1])


def test_choices_and_prompts(client):
    prompts = [PROMPT, *OTHERS]
    alone = [complete(client, p, max_tokens=4)[1] for p in prompts]
    two = {"max_tokens": 4, "n": 2, "temperature": 1, "top_p": 1e-6}  # vLLM takes n for what is not greedy alone
    answer, found = complete(client, prompts, **two)
    assert [c.index for c in answer.choices] == list(range(6))
    for i, result in enumerate(found["choices"]):
        check(result, alone[i // 2])
    check(found, alone[0])
    for i, result in enumerate(complete(client, prompts, stream=True, **two)[1]["choices"]):
        check(result, alone[i // 2])
    stopped = complete(client, stop=answer.choices[0].text[-3:], **two)[1]["choices"]
    assert all(r["error"] is None and r["tokens"]["behind_stop"] is None for r in stopped)
    text: Any = client.chat.completions.create(model="model", messages=CHAT, max_tokens=3, n=2, extra_body=ASK)
    assert len(text.model_extra["kv_transfer_params"]["kvroute"]["choices"]) == 2


def test_one_token_and_beams(client):
    _, found = complete(client, max_tokens=1)
    assert set(found["features"]) == {"prompt:paper-mteb"}
    assert found["tokens"]["answer"] == 1
    check(complete(client, max_tokens=1, stream=True)[1], found)
    _, found = complete(client, max_tokens=2, n=2, extra_body={**ASK, "use_beam_search": True})
    assert "beam" in found["error"]


def test_structured_output(client):
    """Features as ever; a policy is refused with the reason, and neither the answer nor a feature suffers."""
    colours = {"type": "object", "properties": {"colour": {"enum": ["red", "blue"]}}, "required": ["colour"]}
    schema = {"type": "json_schema", "json_schema": {"name": "colours", "schema": colours, "strict": True}}

    def chat(**ask: Any) -> tuple[Any, Any]:
        answer: Any = client.chat.completions.create(
            model="model", messages=CHAT, max_tokens=60, temperature=0, response_format=schema,
            extra_body={"kv_transfer_params": {"kvroute": ask}},
        )  # fmt: skip
        return answer, (answer.model_extra["kv_transfer_params"] or {}).get("kvroute")

    plain, _ = chat()
    text = plain.choices[0].message.content
    assert json.loads(text)["colour"] in ("red", "blue")
    alone, expected = chat(features=FEATURES)
    assert set(expected["features"]) == {"prompt:paper-mteb", "answer:paper-mteb"}
    assert expected["tokens"]["answer"] == plain.usage.completion_tokens
    assert (expected["error"], expected["faults"]) == (None, [])
    both, refused = chat(features=FEATURES, policy="policy")
    check(refused, expected)
    assert "A grammar constrains this answer" in " ".join(refused["faults"])
    only, nothing = chat(mode="slow")
    assert "A grammar constrains this answer" in nothing["error"]
    assert refused["decision"] is nothing["decision"] is None
    assert {a.choices[0].message.content for a in (alone, both, only)} == {text}


async def test_a_request_that_is_left_harms_nobody(url):
    async with openai.AsyncOpenAI(base_url=f"{url}/v1", api_key="-", max_retries=0) as client:
        options: Any = {"model": "model", "temperature": 0, "extra_body": ASK, "stream": True}

        async def left() -> None:
            stream: Any = await client.completions.create(prompt=OTHERS[0], max_tokens=400, **options)
            async for _ in stream:
                break
            await stream.close()

        async def kept() -> Any:
            stream: Any = await client.completions.create(prompt=PROMPT, max_tokens=12, **options)
            return [chunk async for chunk in stream][-1]

        found = await asyncio.gather(kept(), left(), kept(), left())
        for chunk in (found[0], found[2]):
            assert chunk.model_extra["kv_transfer_params"]["kvroute"]["tokens"]["answer"] == 12


def test_who_asks_nothing_gets_nothing(client):
    for body in ({}, {"kv_transfer_params": {"kvroute": {}}}):
        answer, _ = complete(client, max_tokens=2, extra_body=body)
        assert not (answer.model_extra.get("kv_transfer_params") or {}).get("kvroute")


# ---------------------------------------------------------------------- hostility


def post(url: str, body: bytes, headers: dict[str, str] | None = None) -> tuple[int, Any]:
    request = urllib.request.Request(
        f"{url}/v1/completions", body, {"Content-Type": "application/json", **(headers or {})}
    )
    try:
        with urllib.request.urlopen(request, timeout=100) as answer:
            return answer.status, json.loads(answer.read())
    except urllib.error.HTTPError as error:
        return error.code, error.read()


def nested(depth: int) -> Any:
    value: Any = "end"
    for _ in range(depth):
        value = {"features": value}
    return value


SECRET = "a file that no request may name"
HOSTILE: list[tuple[Any, str]] = [
    (5, "object"),
    (True, "object"),
    ("text", "object"),
    ([1, 2], "object"),
    ({"features": 7}, "features"),
    ({"features": [7]}, "name"),
    ({"features": ["../../etc/passwd"]}, "No feature"),
    ({"features": {"../x": "kv-coe"}}, "no name"),
    ({"features": {"a": {"of": "prompt", "layers": "last:9999999"}}}, "layers"),
    ({"features": {"a": {"layers": [0.5]}}}, ""),
    ({"features": {"a": {"file": "/etc/passwd"}}}, "no field"),
    ({"features": ["kv-coe"] * 1000}, "features"),
    ({"policy": "../../../../etc/passwd"}, ""),
    ({"policy": "/etc/passwd"}, ""),
    ({"policy": {"head": "/etc/passwd"}}, ""),
    ({"confidence": "file:///etc/passwd"}, ""),
    ({"mode": "root"}, ""),
    ({"shadow": "yes", "policy": "p"}, ""),
    ({"answer_from": -1, "features": ["length"]}, ""),
    ({"answer_from": 10**15, "features": ["length"]}, ""),
    ({"__class__": "x"}, "no field"),
    ({"features": ["x" * 1_000_000]}, "characters"),
    ({"features": list(range(200_000))}, "larger"),
    (nested(30), ""),
    ({"features": [float("nan")]}, ""),
    ({"features": [2**70]}, ""),
]
NEIGHBOURS: list[dict[str, Any]] = [
    {"do_remote_prefill": True, "remote_engine_id": "x", "remote_block_ids": [1], "remote_host": "h", "remote_port": 1},
    {"do_remote_decode": True},
    {"do_remote_prefill": "yes", "remote_prefill_cached_tokens": -5},
    {"prompt_token_ids": [1, 2, 3]},
    {"kvroute ": {"features": ["kv-coe"]}, "KVROUTE": 5, "": None},
]


def test_hostile_asks_get_an_error_and_nobody_else_notices(url, client):
    expected = complete(client)[1]

    def hostile(case: tuple[Any, str]) -> None:
        asked, word = case
        body = {"model": "model", "prompt": PROMPT, "max_tokens": 2, "kv_transfer_params": {"kvroute": asked}}
        status, answer = post(url, json.dumps(body).encode())
        if status == 400:
            return
        assert status == 200, (status, str(answer)[:300])
        assert answer["usage"]["completion_tokens"] == 2
        error = Result.from_dict(answer["kv_transfer_params"]["kvroute"]).error
        assert error, case
        assert word in error, (word, error)
        assert len(error) <= 400
        assert "/etc" not in error

    with ThreadPoolExecutor(4) as pool:
        good = [pool.submit(complete, client) for _ in range(2)]
        list(pool.map(hostile, HOSTILE))
        good += [pool.submit(complete, client) for _ in range(2)]
        for future in good:
            check(future.result()[1], expected)
    for params in (5, "kvroute", ["kvroute"], True):  # vLLM refuses these itself
        body = json.dumps({"model": "model", "prompt": PROMPT, "kv_transfer_params": params}).encode()
        assert post(url, body)[0] == 400
    for text in (b'{"kv_transfer_params": {"kvroute": ' + b'{"a":' * 100_000, b"kvroute", b'{"kvroute": NaN'):
        assert post(url, text)[0] == 400


def test_other_connectors_keys_and_ids_of_others(url, client):
    expected = complete(client)[1]
    plain = {"model": "model", "prompt": PROMPT, "max_tokens": 12, "temperature": 0}
    for params in NEIGHBOURS:
        body = {**plain, "kv_transfer_params": {**params, **ASK["kv_transfer_params"]}}
        status, answer = post(url, json.dumps(body).encode())
        assert status in (200, 400), (params, status, answer)
        if status == 200:
            check(answer["kv_transfer_params"]["kvroute"], expected)
    # two clients with one id, one of them asking nothing that is seen as an ask
    body = json.dumps({**plain, **ASK}).encode()
    spelled = body.replace(b'"kvroute"', rb'"\u006bvroute"')
    other = json.dumps({**plain, "prompt": OTHERS[0], **ASK}).encode()
    with ThreadPoolExecutor(6) as pool:
        got = list(pool.map(lambda b: post(url, b, {"X-Request-Id": "same"})[1], [body, other, spelled] * 2))
    for answer in (got[0], got[3]):
        check(answer["kv_transfer_params"]["kvroute"], expected)
        assert answer["id"].startswith("cmpl-same-")
    assert len({answer["id"] for answer in got}) == 6
    for arguments in ({"kvroute_rid": "x"}, {"kvroute_rid": [1]}, {"kvroute_rid": 5}):
        assert post(url, json.dumps({**plain, "vllm_xargs": arguments, **ASK}).encode())[0] in (200, 400)
    check(complete(client)[1], expected)


def test_the_documented_ask_gets_the_documented_fields(client):
    page = (ROOT / "docs" / "serving.md").read_text()
    blocks = re.findall(r"^```json\n(.*?)^```$", page, re.DOTALL | re.MULTILINE)
    ask, documented = (json.loads(block) for block in blocks[:2])
    answer: Any = client.chat.completions.create(
        model="model", messages=CHAT, max_tokens=150, temperature=0, extra_body=ask
    )

    def names(value: Any) -> Any:
        return {k: names(v) for k, v in value.items()} if isinstance(value, dict) else None

    found = answer.model_extra["kv_transfer_params"]["kvroute"]
    for part in (found, documented):  # whether a mode is switched is the policy's business
        part["decision"].pop("switch")
    assert names(found) == names(documented)


# ---------------------------------------------------------------------- headers and metrics


def value(now: dict[str, float], name: str, **labels: str) -> float:
    """Sum of a metric's series with these labels."""
    wanted = [f'{k}="{v}"' for k, v in {**labels, "engine": "0", "model_name": "model"}.items()]
    return sum(v for k, v in now.items() if k.startswith(f"vllm:kvroute_{name}{{") and all(w in k for w in wanted))


def metrics(url: str) -> dict[str, float]:
    """kvroute's, by name with labels."""
    text = urllib.request.urlopen(f"{url}/metrics", timeout=10).read().decode()
    return {m[1]: float(m[2]) for m in re.finditer(r"^(vllm:kvroute_\S+) (\S+)$", text, re.MULTILINE)}


def test_decisions_are_in_headers_and_metrics(url, client):
    before = metrics(url)
    asks = [{"policy": "policy"}, {"policy": "policy", "shadow": True}, {"mode": "fast"}, {"mode": "slow"}]
    options = {"model": "model", "messages": CHAT, "max_tokens": 150, "temperature": 0}
    found, difficulties = [], []
    for ask in asks:
        raw = client.chat.completions.with_raw_response.create(
            **options, extra_body={"kv_transfer_params": {"kvroute": ask}}
        )
        answer: Any = raw.parse()
        result = Result.from_dict(answer.model_extra["kv_transfer_params"]["kvroute"])
        assert result.error is None
        assert result.decision is not None
        found.append(result.decision)
        assert raw.headers["x-kvroute-mode"] == result.decision.final_mode
        told = raw.headers.get("x-kvroute-difficulty")
        assert (told is None) == (result.decision.difficulty is None)
        if told is not None:
            assert float(told) == pytest.approx(result.decision.difficulty, rel=1e-3)
            difficulties.append(result.decision.difficulty)
    assert [d.why for d in found[1:]] == ["shadow", "forced", "forced"]
    after = metrics(url)

    def grown(name: str, **labels: str) -> float:
        return value(after, name, **labels) - value(before, name, **labels)

    for decision, policy in zip(found, ("policy", "policy", "", ""), strict=True):
        assert grown("decisions_total", policy=policy, mode=decision.final_mode, why=decision.why) == 1
    assert grown("switches_total") == (found[0].switch is not None)
    assert grown("difficulty_count") == len(difficulties) == 2
    assert grown("difficulty_sum") == pytest.approx(sum(difficulties))
    for asked, count in (("policy", 2), ("shadow", 1), ("mode", 2), ("features", 0)):
        assert grown("requests_total", asked=asked) == count


def test_documented_metrics_are_there(url):
    page = (ROOT / "docs" / "serving.md").read_text()
    documented = set(re.findall(r"^\| `(vllm:kvroute_\w+)`", page, re.MULTILINE))
    text = urllib.request.urlopen(f"{url}/metrics", timeout=10).read().decode()
    found = set(re.findall(r"^# TYPE (vllm:kvroute_\w+) (?:counter|gauge|histogram)$", text, re.MULTILINE))
    assert documented == {name for name in found if not name.endswith("_created")}


def test_metrics_of_features_and_time(url, client):
    before = metrics(url)
    complete(client)
    complete(client, extra_body={"kv_transfer_params": {"kvroute": {"features": ["no such"]}}})
    complete(client, extra_body={})
    after = metrics(url)

    def grown(name: str, **labels: str) -> float:
        return value(after, name, **labels) - value(before, name, **labels)

    assert grown("requests_total", asked="features") == 1
    assert grown("requests_total", asked="refused") == 1
    assert grown("hook_seconds_total", side="worker") > 0
    assert grown("hook_seconds_total", side="scheduler") > 0
    assert value(after, "faults_total") == 0
    assert value(after, "features_off") == 0
    assert "vllm:kvroute_features_off" in " ".join(after)
