"""Serve a model in this process with kvroute's connector, run jobs, and save what the requests got.

python -m tests.serving.run_connector MODEL OUT.json '{"engine": {...}, "jobs": [{"prompts": [...], "params": {...}}]}'

A job has "features" for all of its prompts or "asks", one a prompt (null for none); "extra" are the server's settings.
With "counts", names of the engine's own metrics, their sums behind each job go to OUT.counts.json.
"""

from __future__ import annotations

import json
import os
import sys
from typing import Any


def main(model: str, out: str, job: dict[str, Any]) -> None:
    from vllm import LLM, SamplingParams
    from vllm.config import KVTransferConfig

    from kvroute.serving.plugin import register

    register()
    register()  # vLLM loads plugins in every process, some of them twice
    engine = LLM(
        model=model,
        kv_transfer_config=KVTransferConfig(
            kv_connector="KVRouteConnector", kv_role="kv_producer", kv_connector_extra_config=job.get("extra", {})
        ),
        **({"enforce_eager": True, "max_model_len": 512, "dtype": "float32", "max_num_seqs": 4} | job["engine"]),
    )
    saved: list[Any] = []
    counts: list[dict[str, float]] = []
    for part in job["jobs"]:
        asks = part["asks"] if "asks" in part else [{"features": part["features"]}] * len(part["prompts"])
        params = [
            SamplingParams(
                **{"temperature": 0.0, "ignore_eos": True} | part["params"],
                extra_args={**part.get("args", {}), "kv_transfer_params": None if ask is None else {"kvroute": ask}},
            )
            for ask in asks
        ]
        outputs = engine.generate([{"prompt_token_ids": p} for p in part["prompts"]], params, use_tqdm=False)
        saved.append(
            [
                {
                    "prompt": list(o.prompt_token_ids),
                    "answers": [list(a.token_ids) for a in o.outputs],
                    "cached": o.num_cached_tokens,
                    "finish": [a.finish_reason for a in o.outputs],
                    "result": (o.kv_transfer_params or {}).get("kvroute"),
                }
                for o in outputs
            ]
        )
        if "counts" in job:
            metrics = {m.name: m for m in engine.get_metrics()}
            counts.append(
                {n: getattr(metrics[n], "sum", None) or getattr(metrics[n], "value", 0) for n in job["counts"]}
            )
    with open(out, "w") as file:
        json.dump(saved, file)
    with open(out.replace(".json", ".counts.json"), "w") as file:
        json.dump(counts, file)


if __name__ == "__main__":
    os.environ["VLLM_ENABLE_V1_MULTIPROCESSING"] = "0"
    main(sys.argv[1], sys.argv[2], json.loads(sys.argv[3]))
