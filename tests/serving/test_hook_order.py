"""The connector under vLLM's two model runners: their hooks come in different orders, and give the same.

Scheduler, requests and the order of hooks are vLLM's own code (0.32); no engine runs. The model is a rule, for the
V2 runner needs a GPU: it writes keys and values that follow from token and place, and tokens that follow from the last.
"""

from __future__ import annotations

import logging
import shutil
import weakref
from collections import Counter
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from kvroute import Policy, VLLMEngine
from kvroute.errors import InvalidInputError
from kvroute.serving.forcing import BOARD
from kvroute.serving.mailbox import WAITS
from tests.results import assert_same
from tests.serving.processes import ROOT

pytestmark = pytest.mark.vllm
THINKER = ROOT / "examples" / "tiny_thinker"
LAYERS, HEADS, SIZE, BLOCK, BLOCKS, VOCAB = 5, 2, 32, 16, 14, 517
NAMES = [f"model.layers.{i}.self_attn.attn" for i in range(LAYERS)]
SPECULATIVE = {"method": "ngram", "num_speculative_tokens": 2, "prompt_lookup_max": 3}
_random = torch.Generator().manual_seed(3)
TABLE = torch.randn(VOCAB, LAYERS, HEADS, 2 * SIZE, generator=_random)
PLACE = torch.randn(256, LAYERS, HEADS, 2 * SIZE, generator=_random) * 0.3


def config(settings: dict[str, Any], **options: Any) -> Any:
    """vLLM's, of the tiny thinker with kvroute."""
    from vllm.config import KVTransferConfig
    from vllm.engine.arg_utils import EngineArgs

    from kvroute.serving.plugin import NAME, register

    register()
    transfer = KVTransferConfig(kv_connector=NAME, kv_role="kv_producer", kv_connector_extra_config=settings)
    sizes = {"max_model_len": 256, "max_num_batched_tokens": 64, "max_num_seqs": 4, "block_size": BLOCK}
    return EngineArgs(
        model=str(THINKER / "model"), dtype="float32", enable_prefix_caching=False, kv_transfer_config=transfer,
        **sizes, **options,
    ).create_engine_config()  # fmt: skip


def cache_config() -> Any:
    from vllm.v1.kv_cache_interface import FullAttentionSpec, KVCacheConfig, KVCacheGroupSpec

    spec = FullAttentionSpec(block_size=BLOCK, num_kv_heads=HEADS, head_size=SIZE, dtype=torch.float32)
    return KVCacheConfig(num_blocks=BLOCKS, kv_cache_tensors=[], kv_cache_groups=[KVCacheGroupSpec(NAMES, spec)])


# ---------------------------------------------------------------------- an engine of steps


class Steps:
    """Steps of vLLM's scheduler, with a rule for a model behind them.

    Args:
        v2: whether hooks come as the V2 runner calls them; else as V1.
        policies: their folder.
    """

    def __init__(self, patch: pytest.MonkeyPatch, policies: Path, *, v2: bool) -> None:
        from vllm.distributed import kv_transfer
        from vllm.distributed.kv_transfer.kv_connector.v1.base import KVConnectorRole
        from vllm.v1.core.sched.scheduler import Scheduler
        from vllm.v1.structured_output import StructuredOutputManager
        from vllm.v1.worker.gpu.kv_connector import ActiveKVConnector

        from kvroute.serving import connector

        self.v2, self.calls, self.seen = v2, [], Counter()
        made, cache = config({"policies": str(policies), "strict": True}), cache_config()
        made.cache_config.num_gpu_blocks = BLOCKS
        backend = SimpleNamespace(get_name=lambda: "FLASH_ATTN")
        for name in NAMES:
            module = SimpleNamespace(get_attn_backend=lambda: backend, kv_cache_dtype="auto", sliding_window=None)
            made.compilation_config.static_forward_context[name] = module
        self.memory = {name: torch.zeros(BLOCKS, HEADS, BLOCK, 2 * SIZE) for name in NAMES}
        # the scheduler's side of an engine has its worker in another process, where it can't be asked to read
        patch.setattr(connector, "_WORKERS", weakref.WeakValueDictionary())
        patch.setattr(connector, "_ranks", lambda: (0, None))
        self.worker = connector.KVRouteConnector(made, KVConnectorRole.WORKER, cache)
        for name in ("handle_preemptions", "finish_forward", "start_load_kv", "wait_for_save", "get_finished",
                     "build_connector_worker_meta"):  # fmt: skip
            self._note(name)
        patch.setattr(kv_transfer.kv_transfer_state, "_KV_CONNECTOR_AGENT", self.worker)
        if v2:
            self.runner = ActiveKVConnector(made, self.memory)
        else:
            self.worker.register_kv_caches(self.memory)
        connector._WORKERS.clear()
        self.made = made
        self.scheduler = Scheduler(made, cache, StructuredOutputManager(made), BLOCK, log_stats=True)
        self.scheduler.use_v2_model_runner = v2
        self.tables: dict[str, list[int]] = {}
        self.results: dict[str, dict[str, Any]] = {}
        self.answers: dict[str, list[int]] = {}
        self.own: dict[str, dict[str, Any]] = {}

    def _note(self, name: str) -> None:
        hook = getattr(self.worker, name)

        def noted(*args: Any, **kwargs: Any) -> Any:
            self.calls.append(name)
            return hook(*args, **kwargs)

        setattr(self.worker, name, noted)

    def add(self, name: str, prompt: list[int], ask: dict[str, Any], max_tokens: int) -> None:
        from vllm import SamplingParams
        from vllm.v1.request import Request

        params = SamplingParams(
            max_tokens=max_tokens, ignore_eos=True, extra_args={"kv_transfer_params": {"kvroute": ask}}
        )
        self.scheduler.add_request(Request(name, prompt, params, None))

    def run(self) -> None:
        """Until nothing is left to do, as the engine's core does it."""
        while self.scheduler.has_requests():
            self._step()

    def _step(self) -> None:
        planned = self.scheduler.schedule()
        ids = list(planned.num_scheduled_tokens)
        known = {name for name in self.seen if name in self.scheduler.requests}
        self.seen.update(r.req_id for r in planned.scheduled_new_reqs)
        self.seen["new and known"] += len(known & {r.req_id for r in planned.scheduled_new_reqs})
        self.seen["resumed"] += len(planned.scheduled_cached_reqs.resumed_req_ids)
        self.seen["empty"] += not ids
        requests = {name: self.scheduler.requests[name] for name in ids}
        starts = {r.req_id: r.num_computed_tokens for r in planned.scheduled_new_reqs}
        cached = planned.scheduled_cached_reqs
        starts |= dict(zip(cached.req_ids, cached.num_computed_tokens, strict=True))
        self.calls.clear()
        tokens, output = (self._v2 if self.v2 else self._v1)(planned, requests, starts)
        self._finish(planned, ids, tokens, output)

    def _v1(self, planned: Any, requests: Any, starts: Any) -> tuple[list[list[int]], Any]:
        """``gpu_model_runner.py``: ``execute_model``, then ``sample_tokens``."""
        from vllm.forward_context import set_forward_context
        from vllm.v1.worker.kv_connector_model_runner_mixin import KVConnectorModelRunnerMixin as Mixin

        self.worker.handle_preemptions(planned.kv_connector_metadata)
        with set_forward_context(None, self.made), Mixin.maybe_get_kv_connector_output(planned) as output:
            self._forward(requests, starts, planned.num_scheduled_tokens)
        assert self.calls == [
            "handle_preemptions", "start_load_kv", "wait_for_save", "get_finished", "build_connector_worker_meta",
        ]  # fmt: skip
        return self._sample(requests, starts, planned.num_scheduled_tokens), output

    def _v2(self, planned: Any, requests: Any, starts: Any) -> tuple[list[list[int]], Any]:
        """``gpu/model_runner.py``: ``execute_model``, then ``sample_tokens``."""
        if requests:
            names = list(requests)
            batch = SimpleNamespace(
                idx_mapping=torch.arange(len(names)), req_ids=names, num_tokens=planned.total_num_scheduled_tokens
            )
            self.runner.pre_forward(planned, batch)
            self._forward(requests, starts, planned.num_scheduled_tokens)
            self.runner.finish_forward()
            tokens = self._sample(requests, starts, planned.num_scheduled_tokens)
            assert self.calls == ["handle_preemptions", "finish_forward"]
            output = self.runner.post_forward(planned.finished_req_ids)
        else:
            tokens, output = [], self.runner.no_forward(planned).kv_connector_output
        assert self.calls == [
            "handle_preemptions", "finish_forward", "start_load_kv", "wait_for_save", "get_finished",
            "build_connector_worker_meta",
        ]  # fmt: skip
        return tokens, output

    def _forward(self, requests: Any, starts: Any, counts: Any) -> None:
        for name, request in requests.items():
            (table,) = self.scheduler.kv_cache_manager.get_block_ids(name)
            places = range(starts[name], starts[name] + counts[name])
            states = TABLE[request.all_token_ids[places.start : places.stop]] + PLACE[places.start : places.stop]
            for place, state in zip(places, states, strict=True):
                for layer, memory in enumerate(self.memory.values()):
                    memory[table[place // BLOCK], :, place % BLOCK] = state[layer]

    def _sample(self, requests: Any, starts: Any, counts: Any) -> list[list[int]]:
        found = []
        for name, request in requests.items():
            tokens = list(request.all_token_ids)
            if starts[name] + counts[name] < len(tokens):  # a chunk of its prompt, or of what is computed anew
                found.append([])
                continue
            token = BOARD.token(name, len(tokens) - request.num_prompt_tokens)
            found.append([10 + (7 * tokens[-1] + len(tokens)) % 500 if token is None else token])
        return found

    def _finish(self, planned: Any, ids: list[str], tokens: list[list[int]], output: Any) -> None:
        from vllm.v1.outputs import ModelRunnerOutput

        rows = {name: row for row, name in enumerate(ids)}
        ran = ModelRunnerOutput(ids, rows, sampled_token_ids=tokens, kv_connector_output=output)
        for outputs in self.scheduler.update_from_output(planned, ran).values():
            for one in outputs.outputs:
                self.answers.setdefault(one.request_id, []).extend(one.new_token_ids)
                if one.kv_transfer_params is not None:
                    self.own[one.request_id] = one.kv_transfer_params["kvroute"]
            stats = outputs.scheduler_stats and outputs.scheduler_stats.kv_connector_stats
            self.results |= (stats and stats.get("results")) or {}


FEATURES = ["prompt:paper-mteb", "answer:paper-mteb", "kv-coe", "length"]
ASKS = [
    {"policy": "policy", "features": FEATURES},
    {"policy": "closes", "features": FEATURES},
    {"mode": "fast", "features": FEATURES},
    {"features": FEATURES},
    {"policy": "policy", "shadow": True},
    {"mode": "slow", "features": FEATURES},
    {"features": [*FEATURES, "no such feature"]},
]


@pytest.fixture(scope="module")
def policies(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """That of the tiny thinker, and one that closes every thought at its first checkpoint."""
    folder = tmp_path_factory.mktemp("policies")
    shutil.copytree(THINKER / "head", folder / "head")
    for name in ("policy.json", "policy.drift.safetensors"):
        shutil.copy(THINKER / name, folder)
    Policy(kind="two-step", tau=0, tau_fast=100, tau_slow=101, every=6, head="head").save(folder / "closes.json")
    return folder


def run(patch: pytest.MonkeyPatch, policies: Path, *, v2: bool) -> Steps:
    steps = Steps(patch, policies, v2=v2)
    for i, ask in enumerate(ASKS * 2):
        late = f"-{WAITS}" if i >= len(ASKS) else ""  # whose results may come a step later
        prompt = [(11 * j * j + 3 * j + i % len(ASKS)) % 500 + 10 for j in range(20 + 9 * (i % len(ASKS)))]
        steps.add(f"request-{i}{late}", prompt, ask, 40)
    steps.run()
    return steps


def test_the_v2_runners_order_gives_what_v1s_gives(monkeypatch: pytest.MonkeyPatch, policies: Path) -> None:
    v1, v2 = (run(monkeypatch, policies, v2=v2) for v2 in (False, True))
    # too few blocks for all: requests are preempted, and V2's scheduler gives them out as new ones again
    assert v1.seen["resumed"] > 0 == v1.seen["new and known"]
    assert v2.seen["new and known"] > 0 == v2.seen["resumed"]
    assert v1.seen["empty"] > 0 < v2.seen["empty"]
    assert v1.answers == v2.answers
    assert len(v1.results) == len(v2.results) == 2 * len(ASKS)
    for name, found in v1.results.items():
        assert_same(found, v2.results[name], rel=1e-5, absolute=1e-6)  # sums are taken in other pieces
        assert found["tokens"]["answer"] == 40
        assert found["faults"] == []
        ask = ASKS[int(name.split("-")[1]) % len(ASKS)]
        assert (found["error"] is None) == ("no such feature" not in ask.get("features", ()))
        if found["error"] is None and "features" in ask:
            assert set(found["features"]) == {"prompt:paper-mteb", "answer:paper-mteb"}
            assert found["scores"]["kv_coe_r_token"]["value"] is not None
        if "policy" in ask or "mode" in ask:  # what was to be forced stands in the answer
            assert found["decision"]["fault"] is None
        if ask.get("mode") == "fast":
            assert found["decision"]["final_mode"] == "fast"
        if ask.get("policy") == "closes":
            assert (found["decision"]["switch"]["token"], found["decision"]["switch"]["forced"] > 0) == (7, True)
    for steps in (v1, v2):
        at_once = {name for name in steps.results if WAITS not in name}
        assert at_once == {name for name in steps.own if WAITS not in name}
        for name in at_once:
            assert_same(steps.own[name], steps.results[name], rel=1e-5, absolute=1e-6)
        assert steps.scheduler.connector._scheduler.num_states == 0
        assert steps.worker._worker.num_states == len(BOARD) == 0
        assert steps.scheduler.connector._scheduler.faults == 0


# ---------------------------------------------------------------------- engines that nothing can be read from


def connector(made: Any, role: str = "SCHEDULER") -> Any:
    from vllm.distributed.kv_transfer.kv_connector.v1.base import KVConnectorRole

    from kvroute.serving.connector import KVRouteConnector

    return KVRouteConnector(made, KVConnectorRole[role], cache_config())


@pytest.mark.parametrize("why", ["drafted tokens may be taken back", "a rank has only some of the layers"])
def test_what_cant_be_read_is_refused_at_the_start(caplog: pytest.LogCaptureFixture, why: str) -> None:
    speculative = {"speculative_config": SPECULATIVE} if "drafted" in why else {}

    def made(**settings: Any) -> Any:
        found = config(settings, **speculative)
        found.parallel_config.pipeline_parallel_size = 1 if speculative else 2
        return found

    for role in ("SCHEDULER", "WORKER"):
        for settings in ({"policies": str(THINKER)}, {"strict": True}, {"default": {"mode": "slow"}}):
            with pytest.raises(InvalidInputError, match=f"{why}.*Start the engine without it"):
                connector(made(**settings), role)
    with caplog.at_level(logging.WARNING, logger="kvroute"):
        side = connector(made(default={"features": ["kv-coe"]}))._scheduler
        connector(made(), "WORKER")
    assert [why in record.message for record in caplog.records if record.name.startswith("kvroute")] == [True]
    side.on_request("a", None, 5)
    assert why in side.finished("a", 3)["error"]


def test_the_engine_in_this_process_is_refused_before_it_starts() -> None:
    with pytest.raises(InvalidInputError, match=r"drafted tokens.*serve policies"):
        VLLMEngine(THINKER / "model", policies=THINKER, max_model_len=256, speculative_config=SPECULATIVE)
