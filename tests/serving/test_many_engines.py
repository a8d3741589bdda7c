"""Several engines: vLLM's data parallel behind one address, and servers behind one client, of which one is killed.

Both servers are started by ``kvroute serve``. Who answered a request must not show in what was read of it.
"""

from __future__ import annotations

import os
import re
import signal
import sys
import urllib.request
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor, as_completed
from typing import Any

import numpy as np
import pytest
import torch

from kvroute import PoolingSpec, Router, TokenIds, TransformersEngine, VLLMClient
from kvroute.serving.jobs import Decide
from tests.serving.http_server import free_port
from tests.serving.processes import ROOT, environment

sys.path.insert(0, str(ROOT / "examples"))
sys.path.insert(0, str(ROOT / "examples" / "tiny_thinker"))

from vllm_demo import Server  # type: ignore[import-not-found]

from questions import make_questions  # type: ignore[import-not-found]

CORES = sorted(os.sched_getaffinity(0))
pytestmark = [
    pytest.mark.vllm,
    pytest.mark.slow,
    pytest.mark.skipif(len(CORES) < 2, reason="vLLM's CPU backend gives each engine a core of its own"),
]
THINKER = ROOT / "examples" / "tiny_thinker"
FEATURE = "prompt:paper-mteb"


def serving(*options: str) -> Server:
    """A server of the tiny thinker, not yet started."""
    port = free_port()
    command = [sys.executable, "-m", "kvroute.cli", "serve", str(THINKER / "model"), "--policy", str(THINKER)]
    command += ["--name", "thinker", "--port", str(port), "--dtype", "float32", "--enforce-eager"]
    command += ["--max-num-seqs", "16"]
    return Server([*command, *options], f"http://127.0.0.1:{port}")


@pytest.fixture(scope="module")
def pair() -> Iterator[tuple[Server, Server]]:
    """One with two engines, one with one."""
    with pytest.MonkeyPatch.context() as patch:
        for name, value in environment().items():
            patch.setenv(name, value)
        with serving("--data-parallel-size", "2") as two, serving() as one:
            patch.setenv("VLLM_CPU_OMP_THREADS_BIND", "|".join(map(str, CORES[:2])))
            two.start()
            patch.delenv("VLLM_CPU_OMP_THREADS_BIND")
            one.start()
            yield two, one


@pytest.fixture(scope="module")
def engine() -> TransformersEngine:
    return TransformersEngine.from_pretrained(THINKER / "model", dtype=torch.float32)


def chats(count: int, seed: int) -> list[Any]:
    return [[{"role": "user", "content": q["question"]}] for q in make_questions(count, seed)]


def vectors(engine: TransformersEngine, prompts: list[Any]) -> np.ndarray:
    return engine.pool([engine.tokenize(p) for p in prompts], [PoolingSpec.preset("paper-mteb")])[0]


def count(server: Server, name: str, **labels: str) -> float:
    """A metric's value, summed over the labels that are not given."""
    text = urllib.request.urlopen(f"{server.url}/metrics", timeout=60).read().decode()
    wanted = [f'{k}="{v}"' for k, v in labels.items()]
    found = re.findall(rf"^{re.escape(name)}(\{{.*\}}) (\S+)$", text, re.MULTILINE)
    return sum(float(value) for shown, value in found if all(w in shown for w in wanted))


def test_data_parallel(pair, engine):
    two, _ = pair
    prompts = chats(40, 7)
    with VLLMClient(two.url) as client:
        answers = client.generate(prompts, features=FEATURE, decide=Decide(policy="policy"), max_tokens=100)
        pieces = list(client.stream(prompts[:8], features=FEATURE, max_tokens=8))
    expected = vectors(engine, prompts)
    found = np.stack([a.features[FEATURE] for a in answers])
    np.testing.assert_allclose(found, expected, rtol=0, atol=1e-5)
    router = Router.load(engine, THINKER / "policy.json")
    for answer, decision in zip(answers, router.decide_many(prompts), strict=True):
        assert answer.served is not None
        assert answer.served.decision is not None
        assert answer.served.decision.fault is None
        assert answer.served.decision.difficulty == pytest.approx(decision.difficulty, abs=1e-2)
    streamed = {p.index: p.generation.features[FEATURE] for p in pieces if p.generation is not None}
    np.testing.assert_allclose(np.stack([streamed[i] for i in range(8)]), expected[:8], rtol=0, atol=1e-5)
    asked = [count(two, "vllm:kvroute_requests_total", engine=str(i), asked="features") for i in range(2)]
    assert sum(asked) == 48
    assert min(asked) > 8, "both engines took their share"
    assert count(two, "vllm:kvroute_faults_total") == 0


def test_a_server_that_is_killed_loses_nothing(pair, engine):
    two, one = pair
    prompts = chats(200, 8)
    texts = [TokenIds(tuple(engine.tokenize(p))) for p in prompts]
    before = count(one, "vllm:kvroute_requests_total", asked="features")
    # hot, so that few answers end early: there is something in flight to be lost
    hot = {"temperature": 2.0, "repetition_penalty": 2.0, "max_tokens": 100, "features": FEATURE}
    with VLLMClient([two.url, one.url]) as client, ThreadPoolExecutor(64) as pool:
        running = [pool.submit(client.generate, text, **hot) for text in texts]
        for _ in zip(as_completed(running), range(40), strict=False):
            pass
        assert two._process is not None
        busy = client._sender.servers.all[0].busy
        os.killpg(two._process.pid, signal.SIGKILL)
        answers = [each.result(timeout=300) for each in running]
        assert busy > 0, "requests in flight on the server that was killed"
        assert {a.finish_reason for a in answers} <= {"stop", "length"}
        found = np.stack([a.features[FEATURE] for a in answers])
        np.testing.assert_allclose(found, vectors(engine, prompts), rtol=0, atol=1e-5)
        assert len(client.generate(prompts[:5], max_tokens=4)) == 5  # and it goes on with the other
    took = count(one, "vllm:kvroute_requests_total", asked="features") - before
    assert took > len(prompts) / 2
