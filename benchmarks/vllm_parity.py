"""What requests get inside vLLM, against the same tokens run alone by transformers.

Engines differ in what a scheduler can do to a request: prefixes found in the cache, prompts in chunks, preemption,
blocks of several sizes, tensor parallelism, other processes, HTTP. Each answers requests that ask for every feature.
TransformersEngine then reads each request's tokens alone, once in the engine's dtype and once in the next wider one:
what that changes is the dtype's own rounding, and vLLM's numbers may lie a few times that away. A feature's rounding is
the worst over all requests to a model in a dtype, as a job's difference is the worst over its requests: three requests
alone are too few to know it.

Not run here: blocks of 16 tokens (vLLM's CPU attention takes multiples of 32, but for MLA, which has 16), float8 and
GPUs.
"""

from __future__ import annotations

import argparse
import asyncio
import copy
import json
import math
import os
import re
import sys
import time
import urllib.request
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch

import _vllm
from _harness import Figure, add_common_arguments, exact, figure_table, finish, table
from _heads import PAPER, costs_head
from kvroute import TransformersEngine
from kvroute.heads import DifficultyHead
from kvroute.models import bundled_path
from kvroute.pooling import PRESETS, PoolingSpec
from kvroute.serving.asks import Ask
from tests.serving.checkpoints import build
from tests.serving.http_server import serving

FEATURES: dict[str, Any] = {
    **{f"{of}:{preset}": f"{of}:{preset}" for of in ("prompt", "answer") for preset in PRESETS},
    "answer-newest": {"of": "answer", "layers": "last:2", "tokens": "last", "part": "kv"},
    "answer-first": {"of": "answer", "layers": "last:2", "tokens": "first", "part": "k"},
    "answer-window": {"of": "answer", "layers": "last:3", "window": 7, "weights": "position", "layer_reduce": "last"},
    "prompt-window": {"of": "prompt", "layers": "last:3", "window": 16, "weights": "sif", "part": "k"},
    "kv-coe": "kv-coe",
    "length": "length",
}
SETTINGS = {"max_features": 32}
Jobs = list[dict[str, Any]]
TIMES = 4.0
"""How many times the dtype's own rounding a number may lie away."""
WIDER = {"float32": torch.float64, "bfloat16": torch.float32}


@dataclass(frozen=True)
class Job:
    """Requests that are sent at once.

    Attributes:
        name: for the table.
        prompts: a key of :func:`prompt_sets`.
        params: of the sampling.
    """

    name: str
    prompts: str = "mixed"
    params: dict[str, Any] = field(default_factory=lambda: {"max_tokens": 24})


@dataclass(frozen=True)
class Case:
    """An engine and what it is asked.

    Attributes:
        name: for the table.
        model: ``smollm2`` or a key of the tiny checkpoints.
        dtype: of weights and cache.
        way: where the engine runs.
        options: of the engine.
        jobs: one after the other.
    """

    name: str
    model: str = "smollm2"
    dtype: str = "float32"
    way: str = "in process"
    options: dict[str, Any] = field(default_factory=dict)
    jobs: tuple[Job, ...] = (Job("mixed lengths"),)


MIXED = Job("mixed lengths")
TWO = Job("n = 2", params={"max_tokens": 12, "n": 2, "temperature": 1.0})
PREFIXES = (
    Job("cold"),
    Job("warm"),
    Job("shared prefix", "shared"),
    Job("one token", params={"max_tokens": 1}),
    Job("longer answers", params={"max_tokens": 70}),
)
TINY_CACHE = {"block_size": 32, "num_gpu_blocks_override": 18, "max_num_seqs": 6}
CROWD = Job("preempted", "crowd", {"max_tokens": 60})
CASES = (
    Case("prefixes, blocks of 128", options={"block_size": 128}, jobs=(*PREFIXES, TWO)),
    Case("chunks of 64, blocks of 32", options={"block_size": 32, "max_num_batched_tokens": 64}, jobs=PREFIXES[:2]),
    Case("no prefix cache, blocks of 64", options={"block_size": 64, "enable_prefix_caching": False}),
    Case("tiny cache", options=TINY_CACHE, jobs=(CROWD,)),
    Case("core in another process", way="core apart"),
    Case("AsyncLLM", way="AsyncLLM"),
    Case("HTTP", way="HTTP", jobs=(MIXED, TWO)),
    Case("tensor parallel 2", "llama_2", way="two ranks", options={"tensor_parallel_size": 2}),
    Case("bfloat16", dtype="bfloat16", jobs=PREFIXES[:2]),
    Case("Qwen3, chunks", "qwen3", "bfloat16", options={"block_size": 32, "max_num_batched_tokens": 64}),
    Case("Gemma-3, all blocks kept", "gemma3", options={"disable_hybrid_kv_cache_manager": True}, jobs=PREFIXES[:3]),
    Case("Gemma-3, blocks dropped", "gemma3", options={"block_size": 32, "max_num_batched_tokens": 64}),
    Case("DeepSeek-V2 (MLA, blocks of 16)", "deepseek_v2", jobs=(MIXED, Job("shared prefix", "shared"))),
)
QUICK = (
    Case("prefixes, chunks of 64", "llama", options={"block_size": 32, "max_num_batched_tokens": 64}, jobs=PREFIXES),
    Case("tiny cache", "llama", options=TINY_CACHE, jobs=(CROWD,)),
)


def prompt_sets(seed: int) -> dict[str, list[list[int]]]:
    """Random tokens; those of ``shared`` begin alike."""
    rng = np.random.default_rng(seed)

    def draw(count: int) -> list[int]:
        return [int(t) for t in rng.integers(200, 40_000, count)]

    beginning = draw(288)
    return {
        "mixed": [draw(n) for n in (300, 33, 140, 5)],
        "shared": [[*beginning, *draw(n)] for n in (3, 40, 90)],
        "crowd": [draw(n) for n in (100, 90, 110, 80, 95, 70)],
    }


# ---------------------------------------------------------------------- in vLLM


def answer_in_process(model: str, options: dict[str, Any], settings: dict[str, Any], jobs: Jobs) -> Any:
    """What an ``LLM`` of this process gives to each job: prompt, answers, result; and how often it preempted."""
    engine = _vllm.start_engine(model, kvroute=settings, disable_log_stats=False, **options)
    found = []
    for job in jobs:
        params = _vllm.sampling(job["ask"], ignore_eos=True, **job["params"])
        prompts = [{"prompt_token_ids": p} for p in job["prompts"]]
        found.append([_answer(output) for output in engine.generate(prompts, params, use_tqdm=False)])
    preempted = _vllm.metrics(engine).get("vllm:num_preemptions", 0.0)
    _vllm.stop_engine(engine)
    return found, preempted


def answer_async(model: str, options: dict[str, Any], settings: dict[str, Any], jobs: Jobs) -> Any:
    """The same by an ``AsyncLLM``."""
    return asyncio.run(_answer_async(model, options, settings, jobs))


async def _answer_async(model: str, options: dict[str, Any], settings: dict[str, Any], jobs: Jobs) -> Any:
    from vllm import AsyncEngineArgs
    from vllm.v1.engine.async_llm import AsyncLLM

    engine = AsyncLLM.from_engine_args(AsyncEngineArgs(**_vllm.engine_options(model, settings, **options)))
    found = []
    try:
        for number, job in enumerate(jobs):

            async def one(place: int, prompt: list[int], job: dict[str, Any] = job, number: int = number) -> Any:
                params = _vllm.sampling(job["ask"], ignore_eos=True, **job["params"])
                last: Any = None
                async for output in engine.generate({"prompt_token_ids": prompt}, params, f"{number}-{place}"):
                    last = output
                return _answer(last)

            found.append(list(await asyncio.gather(*(one(i, p) for i, p in enumerate(job["prompts"])))))
    finally:
        engine.shutdown()
    return found, 0.0


def _answer(output: Any) -> dict[str, Any]:
    answers = [list(o.token_ids) for o in output.outputs]
    result = (output.kv_transfer_params or {}).get("kvroute")
    prompt = list(output.prompt_token_ids)
    return {"prompt": prompt, "answers": answers, "results": [result], "cached": output.num_cached_tokens}


def answer_over_http(model: str, options: dict[str, Any], settings: dict[str, Any], jobs: Jobs, log: Path) -> Any:
    """The same by a server."""
    flags = [f"--{k.replace('_', '-')}={v}" for k, v in options.items() if k != "dtype"]
    transfer = {"kv_connector": _vllm.CONNECTOR, "kv_role": "kv_producer", "kv_connector_extra_config": settings}
    with serving(Path(model), log, "--dtype", options["dtype"], *flags, transfer=transfer, patience=900) as url:

        def one(prompt: list[int], job: dict[str, Any]) -> dict[str, Any]:
            body = {"model": "model", "prompt": prompt, "temperature": 0, "ignore_eos": True, "return_token_ids": True}
            body |= {**job["params"], "kv_transfer_params": {"kvroute": job["ask"]}}
            head = {"Content-Type": "application/json"}
            request = urllib.request.Request(f"{url}/v1/completions", json.dumps(body).encode(), head)
            with urllib.request.urlopen(request, timeout=300) as response:
                found = json.loads(response.read())
            result = found["kv_transfer_params"]["kvroute"]
            answers = [c["token_ids"] for c in found["choices"]]
            return {"prompt": prompt, "answers": answers, "results": result.get("choices", [result]), "cached": None}

        out = []
        for job in jobs:
            with ThreadPoolExecutor(8) as threads:
                out.append(list(threads.map(lambda p, job=job: one(p, job), job["prompts"])))
    return out, 0.0


# ---------------------------------------------------------------------- alone


class Reference:
    """A model in transformers, in an engine's dtype and in the next wider one.

    Args:
        folder: the checkpoint.
        dtype: the engine's.
    """

    def __init__(self, folder: Path, dtype: str) -> None:
        same = TransformersEngine.from_pretrained(str(folder), dtype=dtype, device="cpu")
        wide = TransformersEngine(copy.deepcopy(same.model).to(WIDER[dtype]), same.tokenizer, name=same.info.name)
        self.engines = (_vllm.Alone(same), _vllm.Alone(wide))
        self.head = replace(costs_head(same, 0, kind="ridge", spec=replace_dims(PAPER)), target="correct")
        self._seen: dict[tuple[int, ...], tuple[dict[str, Any], dict[str, Any]]] = {}
        self._vectors = {**Ask(features=FEATURES).plan.pooled, "confidence": ("answer", self.head.spec)}

    def both(self, prompt: list[int], answer: list[int]) -> tuple[dict[str, Any], dict[str, Any]]:
        """Features in the dtype and in the wider one."""
        key = (len(prompt), *prompt, *answer)
        if key not in self._seen:
            found = []
            for alone in self.engines:
                values = alone.features([*prompt, *answer], len(prompt), self._vectors)
                vector = values.pop("confidence", None)
                if vector is not None:
                    values["confidence"] = float(self.head.predict(np.asarray(vector)[None])[0])
                found.append({**values, "length": float(len(answer))})
            self._seen[key] = (found[0], found[1])
        return self._seen[key]


def replace_dims(spec: PoolingSpec) -> PoolingSpec:
    """The paper's pooling over the last two layers, which every model here has alike."""
    return spec.model_copy(update={"layers": "last:2"})


@dataclass
class Compared:
    """How far numbers of a job lie away, relative to each feature's scale.

    Attributes:
        requests: compared.
        worst: by feature, vLLM from transformers in the same dtype.
        rounding: by feature, transformers from itself in the wider dtype.
        absent: features that a request did not get, with the reason.
        cached: prompt tokens found in the cache.
    """

    requests: int = 0
    worst: dict[str, float] = field(default_factory=dict)
    rounding: dict[str, float] = field(default_factory=dict)
    absent: list[str] = field(default_factory=list)
    cached: int = 0

    def times(self, rounding: dict[str, float]) -> tuple[float, str]:
        """The worst difference as a multiple of the feature's rounding, and whose it is."""
        ratios = [(w / max(rounding[n], np.finfo(np.float32).eps / 2), n) for n, w in self.worst.items()]
        return max(ratios, default=(math.nan, ""))


@dataclass
class Done:
    """A job and its comparison."""

    case: Case
    job: Job
    compared: Compared

    @property
    def unsaid(self) -> list[str]:
        """What is absent, but for blocks outside a window: those are the engine's to drop, and a request is told."""
        return [a for a in self.compared.absent if not ("dropped" in self.case.name and "window" in a)]


def roundings(jobs: list[Done]) -> dict[tuple[str, str], dict[str, float]]:
    """By model and dtype, each feature's worst rounding over all its jobs."""
    found: dict[tuple[str, str], dict[str, float]] = {}
    for one in jobs:
        known = found.setdefault((one.case.model, one.case.dtype), {})
        for name, size in one.compared.rounding.items():
            known[name] = max(size, known.get(name, 0.0))
    return found


def compare(answers: list[dict[str, Any]], reference: Reference) -> Compared:
    """Compare each request's result to the same tokens alone."""
    found = Compared()
    pairs: dict[str, list[tuple[Any, Any, Any]]] = {}
    for answer in answers:
        found.requests += 1
        found.cached += answer["cached"] or 0
        for result, tokens in matched(answer, reference):
            same, wide = reference.both(answer["prompt"], tokens)
            if result is None or result["error"]:
                found.absent.append("no result" if result is None else result["error"])
                continue
            told = {n: f for f in result["faults"] for n in same if f.startswith(f"{n}: ")}
            found.absent += told.values()
            got = {**result["features"], **_valued(result["scores"])}
            if result["confidence"]:
                got |= _valued({"confidence": result["confidence"]})
            missing = set(same) - set(got) - set(told)
            found.absent += [f"{name}: missing" for name in sorted(missing)]
            for name in set(got) & set(same):
                pairs.setdefault(name, []).append((got[name], same[name], wide[name]))
    for name, rows in pairs.items():
        scale = max(float(np.abs(s).max()) for _, s, _ in rows) or 1.0
        found.worst[name] = max(float(np.abs(np.subtract(g, s)).max()) for g, s, _ in rows) / scale
        found.rounding[name] = max(float(np.abs(np.subtract(s, w)).max()) for _, s, w in rows) / scale
    return found


def _valued(scores: dict[str, Any]) -> dict[str, float]:
    return {name: score["value"] for name, score in scores.items() if score["value"] is not None}


def matched(answer: dict[str, Any], reference: Reference) -> list[tuple[Any, list[int]]]:
    """Results with their answers; an ``LLM`` gives of several answers the result of the one that ended last."""
    results, answers = answer["results"], answer["answers"]
    if len(results) == len(answers):
        return list(zip(results, answers, strict=True))

    def away(tokens: list[int]) -> float:
        name = "answer:paper-mteb"
        expected = reference.both(answer["prompt"], tokens)[0].get(name)
        got = results[0]["features"].get(name)
        return math.inf if expected is None or got is None else float(np.abs(np.subtract(got, expected)).max())

    return [(results[0], min(answers, key=away))]


# ---------------------------------------------------------------------- all of it


def run_case(case: Case, folder: Path, head: DifficultyHead, prompts: dict[str, Any], log: Path) -> Any:
    """Start the case's engine and have its jobs answered."""
    heads = folder.parent / f"heads-{folder.name}"
    head.save(heads / "right")
    settings = {**SETTINGS, "heads": str(heads)}
    ask = {"features": FEATURES, "confidence": "right"}
    jobs = [{"prompts": prompts[j.prompts], "params": j.params, "ask": ask} for j in case.jobs]
    options = {"dtype": case.dtype, **case.options}
    if case.way == "HTTP":
        return answer_over_http(str(folder), options, settings, jobs, log)
    work = answer_async if case.way == "AsyncLLM" else answer_in_process
    apart = case.way in ("core apart", "AsyncLLM", "two ranks")
    cores = 2 if case.way == "two ranks" else 0
    return _vllm.apart(work, str(folder), options, settings, jobs, log=log, core_apart=apart, cores=cores)


def checkpoint(name: str, dtype: str, scratch: Path) -> Path:
    """A model's folder; tiny ones are made with SmolLM2's tokenizer, which weighs tokens."""
    if name == "smollm2":
        return Path(bundled_path("smollm2"))
    from transformers import AutoTokenizer

    folder = scratch / f"{name}-{dtype}"
    if not folder.exists():
        tokenizer = AutoTokenizer.from_pretrained(bundled_path("smollm2"))
        build(name, folder, getattr(torch, dtype), vocab_size=len(tokenizer))
        tokenizer.save_pretrained(folder)
    return folder


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add_common_arguments(parser)
    parser.add_argument("--only", default="", help="run the cases whose name this pattern is found in")
    parser.add_argument("--log", type=Path, help="file for what the engines print")
    arguments = parser.parse_args()
    _vllm.prepare(log_level="WARNING")
    prompts = prompt_sets(arguments.seed)
    cores = os.cpu_count() or 1
    cases = [c for c in (QUICK if arguments.quick else CASES) if re.search(arguments.only, c.name, re.I)]
    skipped = [c for c in cases if c.way == "two ranks" and cores < 2]
    jobs: list[Done] = []
    preempted, began = 0.0, time.monotonic()
    with _vllm.scratch() as scratch:
        references: dict[tuple[str, str], Reference] = {}
        for case in cases:
            if case in skipped:
                continue
            folder = checkpoint(case.model, case.dtype, Path(scratch))
            key = (case.model, case.dtype)
            if key not in references:
                references = {key: Reference(folder, case.dtype)}  # one at a time: memory
            reference = references[key]
            log = arguments.log or Path(scratch) / "log"
            target = Path(scratch) / folder.name
            target.mkdir(exist_ok=True)
            found, preemptions = run_case(case, folder, reference.head, prompts, log)
            preempted += preemptions
            for job, answers in zip(case.jobs, found, strict=True):
                jobs.append(Done(case, job, compare(answers, reference)))
                for text in jobs[-1].unsaid:
                    print(f"{case.name}, {job.name}: {text}", file=sys.stderr)
                print(f"{case.name}, {job.name}: compared", file=sys.stderr)
    rows, figures, known = [], {}, roundings(jobs)
    for done in jobs:
        case, job, one = done.case, done.job, done.compared
        rounding = known[case.model, case.dtype]
        times, name = one.times(rounding)
        sizes = (f"{one.worst.get(name, math.nan):.1e}", f"{rounding.get(name, math.nan):.1e}", f"{times:.2f}")
        told = len(one.absent) - len(done.unsaid)
        engine = (case.name, case.model, case.dtype, job.name)
        rows.append((*engine, one.requests, name, *sizes, one.cached or "", told or ""))
        figures[f"{case.name}, {job.name}"] = exact(times, f"<= {TIMES:g}")
    absent, hits = sum(len(d.unsaid) for d in jobs), sum(d.compared.cached for d in jobs)
    header = ("engine", "model", "dtype", "requests", "of them", "worst feature", "difference", "rounding", "times")
    print(table((*header, "cached tokens", "told: outside a window"), rows))
    figures |= {"features_missing": exact(absent, "<= 0")}
    if any(c.jobs == (CROWD,) for c in cases):
        figures["preemptions"] = exact(preempted, ">= 1")
    if any(job.name == "warm" for case in cases for job in case.jobs):
        figures["prompt_tokens_found_in_cache"] = exact(hits, ">= 1")
    print("\n" + figure_table(_worst_first(figures)))
    for case in skipped:
        print(f"\nNot run: {case.name}: it needs two cores.")
    print(f"\n{time.monotonic() - began:.0f} seconds.")
    finish(
        arguments,
        name="vllm_parity",
        figures=figures,
        baseline="TransformersEngine, each request alone",
        n={"engines": len(cases) - len(skipped), "requests": sum(int(r[4]) for r in rows)},
    )


def _worst_first(figures: dict[str, Figure]) -> dict[str, Figure]:
    """The worst case's figure, and those that are no case's."""
    cases = {k: f for k, f in figures.items() if ", " in k}
    if not cases:
        return figures
    worst = max(cases, key=lambda k: cases[k].value)
    return {f"times the rounding: {worst}": cases[worst], **{k: f for k, f in figures.items() if k not in cases}}


if __name__ == "__main__":
    main()
