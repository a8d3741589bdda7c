"""The engines of ``vllm_parity``: each gives its requests' answers, and what kvroute says of every one of them."""

from __future__ import annotations

import asyncio
import json
import urllib.request
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import _vllm
from _load import metric
from kvroute.serving.answers import PENDING
from kvroute.serving.mailbox import MAILBOX, WAITS
from tests.serving.http_server import serving

Jobs = list[dict[str, Any]]
"""``prompts`` that are sent at once, the ``ask``, ``params`` of the sampling, and whether each answer ``ends`` at a
token that stands in the middle of its answer to the job before."""
Found = tuple[list[list[dict[str, Any]]], dict[str, float]]
"""By job and prompt ``prompt`` and ``answers`` as tokens, the ``results`` of these, and prompt tokens found in the
cache (``cached``); and counts: ``preempted``, and results that were ``late``: not there when their answers ended."""


def answer_in_process(model: str, options: dict[str, Any], settings: dict[str, Any], jobs: Jobs) -> Found:
    """What an ``LLM`` of this process gives."""
    engine = _vllm.start_engine(model, kvroute=settings, disable_log_stats=False, **options)
    found: list[list[dict[str, Any]]] = []
    for number, job in enumerate(jobs):
        requests = {
            f"{number}-{place}": (prompt, _vllm.sampling(job["ask"], ignore_eos=True, **params))
            for place, (prompt, params) in enumerate(_each(job, found))
        }
        found.append([_answer(one.output, one.results) for one in _vllm.answer(engine, requests).values()])
    preempted = _vllm.metrics(engine).get("vllm:num_preemptions", 0.0)
    _vllm.stop_engine(engine)
    return found, {"preempted": preempted, "late": 0.0}


def answer_async(model: str, options: dict[str, Any], settings: dict[str, Any], jobs: Jobs) -> Found:
    """What an ``AsyncLLM`` gives, of requests whose ids say that their results are waited for."""
    return asyncio.run(_answer_async(model, options, settings, jobs))


async def _answer_async(model: str, options: dict[str, Any], settings: dict[str, Any], jobs: Jobs) -> Found:
    from vllm import AsyncEngineArgs
    from vllm.sampling_params import RequestOutputKind
    from vllm.v1.engine.async_llm import AsyncLLM

    engine = AsyncLLM.from_engine_args(AsyncEngineArgs(**_vllm.engine_options(model, settings, **options)))
    found: list[list[dict[str, Any]]] = []
    late = 0

    async def one(name: str, prompt: list[int], params: Any) -> dict[str, Any]:
        nonlocal late
        params.output_kind = RequestOutputKind.FINAL_ONLY
        with MAILBOX.expect([name], params.n) as slot:
            last: Any = None
            async for output in engine.generate({"prompt_token_ids": prompt}, params, name):
                last = output
            late += PENDING in (last.kv_transfer_params or {}).get("kvroute", {})
            await slot.wait(30)
        return _answer(last, {sample: result for (_, sample), result in slot.results.items()})

    try:
        for number, job in enumerate(jobs):
            sent = [
                one(f"{number}-{place}-{WAITS}", prompt, _vllm.sampling(job["ask"], ignore_eos=True, **params))
                for place, (prompt, params) in enumerate(_each(job, found))
            ]
            found.append(list(await asyncio.gather(*sent)))
    finally:
        engine.shutdown()
    return found, {"preempted": 0.0, "late": late}


def _each(job: dict[str, Any], found: Sequence[list[dict[str, Any]]]) -> list[tuple[list[int], dict[str, Any]]]:
    """By prompt, the parameters of its sampling."""
    if not job["ends"]:
        return [(prompt, job["params"]) for prompt in job["prompts"]]
    ends = [one["answers"][0][len(one["answers"][0]) * 2 // 3] for one in found[-1]]
    return [(p, {**job["params"], "stop_token_ids": [end]}) for p, end in zip(job["prompts"], ends, strict=True)]


def _answer(output: Any, results: dict[int, dict[str, Any]]) -> dict[str, Any]:
    """An answer with the results that came with the statistics; vLLM's own must be one of them."""
    answers = [list(o.token_ids) for o in output.outputs]
    every: list[Any] = [results.get(o.index) for o in output.outputs]
    own = (output.kv_transfer_params or {}).get("kvroute")
    if own is None or (PENDING not in own and own not in every):
        every = [None] * len(answers)
    prompt = list(output.prompt_token_ids)
    return {"prompt": prompt, "answers": answers, "results": every, "cached": output.num_cached_tokens or 0}


def answer_over_http(model: str, options: dict[str, Any], settings: dict[str, Any], jobs: Jobs, log: Path) -> Found:
    """What a server gives."""
    flags = [f"--{k.replace('_', '-')}={v}" for k, v in options.items() if k != "dtype"]
    transfer = {"kv_connector": _vllm.CONNECTOR, "kv_role": "kv_producer", "kv_connector_extra_config": settings}
    with serving(Path(model), log, "--dtype", options["dtype"], *flags, transfer=transfer, patience=900) as url:

        def one(prompt: list[int], params: dict[str, Any], ask: dict[str, Any]) -> dict[str, Any]:
            body = {"model": "model", "prompt": prompt, "temperature": 0, "ignore_eos": True, "return_token_ids": True}
            body |= {**params, "kv_transfer_params": {"kvroute": ask}}
            head = {"Content-Type": "application/json"}
            request = urllib.request.Request(f"{url}/v1/completions", json.dumps(body).encode(), head)
            with urllib.request.urlopen(request, timeout=300) as response:
                got = json.loads(response.read())
            result = got["kv_transfer_params"]["kvroute"]
            answers = [c["token_ids"] for c in got["choices"]]
            return {"prompt": prompt, "answers": answers, "results": result.get("choices", [result]), "cached": 0}

        found: list[list[dict[str, Any]]] = []
        for job in jobs:
            before = metric(url, "vllm:prefix_cache_hits_total")
            with ThreadPoolExecutor(8) as threads:
                sent = [threads.submit(one, *each, job["ask"]) for each in _each(job, found)]
                found.append([future.result() for future in sent])
            found[-1][0]["cached"] = int(metric(url, "vllm:prefix_cache_hits_total") - before)
        preempted = metric(url, "vllm:num_preemptions_total")
    return found, {"preempted": preempted, "late": 0.0}
