"""Serve a model in this process, read every request's keys and values through kvroute's layouts, and save them.

    python -m tests.serving.read_caches MODEL OUT.pt '{"prompts": [[1, 2, ...], ...], "max_tokens": 3, "engine": {...}}'

Read at the end of the step that ends a request's prompt, and again at every step after it, so that windows have
dropped blocks by then. OUT holds, by request: tokens whose K and V are there, and by layer ``first`` (the first
token held), ``keys`` and ``values`` ``[H, T - first, D]``.
"""

from __future__ import annotations

import json
import os
import sys
from dataclasses import dataclass, field
from typing import Any

import torch
from vllm.distributed.kv_transfer.kv_connector.v1.base import (
    KVConnectorBase_V1,
    KVConnectorMetadata,
    SupportsHMA,
)

from kvroute.serving.layouts import LayerPages, layer_pages
from kvroute.serving.pages import stack_pages, view_of
from kvroute.serving.vllm_facts import cache_facts, cpu_writer

READ: dict[str, dict[str, Any]] = {}
"""By request: what was read last."""
PAGES: list[LayerPages] = []


@dataclass
class Blocks(KVConnectorMetadata):
    """By request of a step: block ids by group, and tokens computed when the step has run."""

    requests: dict[str, tuple[list[list[int]], int]] = field(default_factory=dict)


class ReadingConnector(KVConnectorBase_V1, SupportsHMA):
    """Reads every request of a step after the forward pass."""

    def register_kv_caches(self, kv_caches):
        facts = cache_facts(self._vllm_config, self._kv_cache_config)
        PAGES.extend(layer_pages(facts, kv_caches, cpu_writer()))

    def build_connector_meta(self, scheduler_output):
        state = scheduler_output.kv_connector_block_state
        new, cached = scheduler_output.scheduled_new_reqs, scheduler_output.scheduled_cached_reqs
        computed = {r.req_id: r.num_computed_tokens for r in new}
        computed |= dict(zip(cached.req_ids, cached.num_computed_tokens, strict=True))
        meta = Blocks()
        for request, start in computed.items():
            blocks = [list(ids) for ids in state.get_block_ids(request)]
            meta.requests[request] = (blocks, start + scheduler_output.num_scheduled_tokens[request])
        return meta

    def wait_for_save(self):
        requests = self._get_connector_metadata().requests
        if not requests:
            return
        lengths = [length for _, length in requests.values()]
        view = view_of(stack_pages(PAGES), [blocks for blocks, _ in requests.values()], lengths)
        for number, request in enumerate(requests):
            layers = []
            for index in view.layers:
                group, place = view.group_of(index)
                first = int(group.table.first[number])
                keys, values = view.token_slices(group, number, first, lengths[number])
                layers.append({"first": first, "keys": keys[place].clone(), "values": values[place].clone()})
            READ[request] = {"tokens": lengths[number], "layers": layers}

    def start_load_kv(self, forward_context, **kwargs):
        pass

    def wait_for_layer_load(self, layer_name):
        pass

    def save_kv_layer(self, layer_name, kv_layer, attn_metadata, **kwargs):
        pass

    def get_num_new_matched_tokens(self, request, num_computed_tokens):
        return 0, False

    def update_state_after_alloc(self, request, blocks, num_external_tokens):
        pass

    def request_finished(self, request, block_ids):
        return False, None

    def request_finished_all_groups(self, request, block_ids):
        return False, None


def main(model: str, out: str, job: dict[str, Any]) -> None:
    """Run the job and save what was read, and each request's tokens."""
    from vllm import LLM, SamplingParams
    from vllm.config import KVTransferConfig

    engine = LLM(
        model=model,
        skip_tokenizer_init=True,
        kv_transfer_config=KVTransferConfig(
            kv_connector="ReadingConnector", kv_role="kv_producer", kv_connector_module_path="tests.serving.read_caches"
        ),
        **({"enforce_eager": True, "max_model_len": 512} | job["engine"]),
    )
    # the connector's module is imported by name, this one may be __main__
    module = sys.modules["tests.serving.read_caches"]
    params = SamplingParams(temperature=0, max_tokens=job["max_tokens"], ignore_eos=True, detokenize=False)
    outputs = engine.generate([{"prompt_token_ids": p} for p in job["prompts"]], params, use_tqdm=False)
    read = []
    for output in outputs:
        found = next(
            v for k, v in module.READ.items() if k == output.request_id or k.startswith(output.request_id + "-")
        )
        read.append(found | {"ids": [*output.prompt_token_ids, *output.outputs[0].token_ids]})
    pages = [{"ratio": p.ratio, "group": p.group, "window": p.window, "drops": p.drops} for p in module.PAGES]
    torch.save({"read": read, "pages": pages, "stacks": len(stack_pages(module.PAGES))}, out)


if __name__ == "__main__":
    os.environ["VLLM_ENABLE_V1_MULTIPROCESSING"] = "0"
    main(sys.argv[1], sys.argv[2], json.loads(sys.argv[3]))
