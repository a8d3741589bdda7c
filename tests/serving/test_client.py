"""The client with a real vLLM server on CPU: the same answers and features as the embedded engine's."""

from __future__ import annotations

import contextlib
import json
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest

from kvroute import CancelToken, TokenIds, TransformersEngine
from kvroute.errors import ConnectorMissingError, InvalidInputError, ModelMismatchError, ServerUnreachableError
from kvroute.models import bundled_path
from kvroute.serving.client import VLLMClient
from tests.serving.http_server import Running, free_port, running, vllm_command

pytestmark = pytest.mark.vllm
TEXTS = ["The capital of France is", "One, two, three, four,", "Water boils at"]
CHAT = [{"role": "user", "content": "Name a colour."}]
CONNECTOR = {
    "kv_connector": "KVRouteConnector",
    "kv_connector_module_path": "kvroute.serving.connector",
    "kv_role": "kv_producer",
}


@contextlib.contextmanager
def serving(log: Path, *, connector: bool) -> Iterator[Running]:
    """SmolLM2 by vLLM, without our middleware; kvroute is loaded by its module's path."""
    port = free_port()
    command = vllm_command(Path(bundled_path("smollm2")), port, name="smol")
    command += ["--kv-transfer-config", json.dumps(CONNECTOR)] if connector else []
    with running(command, port, log) as it:
        yield it


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Running]:
    with serving(tmp_path_factory.mktemp("server") / "log", connector=True) as it:
        yield it


@pytest.fixture(scope="module")
def engine() -> TransformersEngine:
    return TransformersEngine.from_pretrained(bundled_path("smollm2"), dtype="float32", device="cpu")


@pytest.fixture(scope="module")
def client(server: Running, engine: TransformersEngine) -> Iterator[VLLMClient]:
    with VLLMClient(server.url, info=engine.info) as it:
        yield it


def test_answers_are_the_engines(client: VLLMClient, engine: TransformersEngine) -> None:
    prompts = [*TEXTS, CHAT, TokenIds((504, 3575, 282))]
    asked = ["prompt:paper-mteb", "answer:paper-mteb", "kv-coe", "length"]
    found = client.generate(prompts, features=asked, max_tokens=12)
    for mine, theirs in zip(engine.generate(prompts, features=asked, max_tokens=12), found, strict=True):
        assert theirs.prompt_token_ids == mine.prompt_token_ids
        assert theirs.token_ids == mine.token_ids
        assert theirs.text == mine.text
        assert theirs.finish_reason == mine.finish_reason
        assert theirs.usage.generated == mine.usage.generated
        assert not theirs.feature_errors
        assert set(theirs.features) == set(mine.features)
        for name, vector in mine.features.items():
            np.testing.assert_allclose(theirs.features[name], vector, rtol=0, atol=5e-5 * np.abs(vector).max())
        for name, score in mine.scores.items():
            assert theirs.scores[name].value == pytest.approx(score.value, rel=1e-3, abs=1e-4), name


def test_pool(client: VLLMClient, engine: TransformersEngine) -> None:
    from kvroute.pooling import PRESETS

    spec = PRESETS["paper-mteb"]
    ids = engine.tokenize_texts(TEXTS)
    assert client.tokenize_texts(TEXTS) == ids
    (expected,), (found,) = engine.pool(ids, [spec]), client.pool(ids, [spec])
    np.testing.assert_allclose(found, expected, rtol=0, atol=5e-5 * np.abs(expected).max())


async def test_streams(client: VLLMClient) -> None:
    whole = client.generate(TEXTS[0], max_tokens=10)
    pieces = list(client.stream(TEXTS[0], max_tokens=10))
    assert "".join(p.text for p in pieces) == whole.text
    assert [p.token_id for p in pieces if p.token_id is not None] == whole.token_ids
    assert pieces[-1].generation is not None
    assert pieces[-1].generation.usage.generated == whole.usage.generated
    assert "".join([p.text async for p in client.astream(TEXTS[0], max_tokens=10)]) == whole.text
    assert (await client.agenerate(TEXTS[0], max_tokens=10)).text == whole.text  # type: ignore[union-attr]


def test_stop_and_cancel(client: VLLMClient, engine: TransformersEngine) -> None:
    mine = engine.generate(TEXTS[1], max_tokens=30, stop="eight")
    theirs = client.generate(TEXTS[1], max_tokens=30, stop="eight")
    assert (theirs.text, theirs.finish_reason) == (mine.text, "stop")
    cancel = CancelToken()
    pieces = []
    for piece in client.stream(TEXTS[0], max_tokens=400, cancel=cancel):
        pieces.append(piece)
        cancel.cancel()
    assert pieces[-1].generation is not None
    assert pieces[-1].generation.finish_reason == "cancelled"


def test_refusals(server: Running, client: VLLMClient) -> None:
    with pytest.raises(InvalidInputError, match="512"):
        client.generate(TokenIds((500,) * 600))
    with VLLMClient(server.url, model="another") as other, pytest.raises(ModelMismatchError, match="serves smol"):
        other.generate("a")


def test_a_server_without_kvroute_that_dies(tmp_path: Path, server: Running) -> None:
    with (
        serving(tmp_path / "log", connector=False) as plain,
        VLLMClient(plain.url, retries=1) as client,
        VLLMClient([plain.url, server.url]) as both,
    ):
        assert client.generate(TEXTS[0], max_tokens=2).text
        with pytest.raises(ConnectorMissingError):
            client.generate(TEXTS[0], features="kv-coe")
        assert len(both.generate(TEXTS * 4, max_tokens=4)) == 12
        plain.process.kill()
        assert len(both.generate(TEXTS * 4, max_tokens=4)) == 12
        with pytest.raises(ServerUnreachableError):
            client.generate(TEXTS[0])
