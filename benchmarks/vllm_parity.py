"""What requests get inside vLLM, against the same tokens run alone by transformers.

Engines differ in what a scheduler can do to a request: prefixes found in the cache, prompts in chunks, preemption,
blocks of several sizes, tensor parallelism, other processes, HTTP. They also differ in the way in which an answer is
read: at once by a worker at hand, step by step, or late, behind its last step. Each answers requests that ask for every
feature. TransformersEngine then reads each answer's tokens alone, once in the engine's dtype and once in float64. Both
sides are held to the float64 ones: vLLM's error may be some times transformers' own, which is the largest over all
texts of the model.

How many times follows from how sums are rounded. Both engines do the same operations on the same numbers, in other
orders and other kernels. In a sum of n terms, added one after the other, a term is rounded up to n times; in 16 partial
sums (two AVX2 registers of 8) n / 16 times. Errors of random sign grow with the root of their number, so of two equal
sums one may be the less exact by sqrt(16) = 4 (of random products: 2.2 with 64 terms, 3.7 with 1,536), and a network of
such sums by no more. It is a model, not a bound: what is measured lies between 1 and 3.

In float32 a single token too few is 5,000 times transformers' error and more. In bfloat16 it is 6 to 40 times where
features are sums or of few tokens, and less than the limit in means: these cases find coarser faults only.

Not run here: blocks of 16 tokens (vLLM's CPU attention takes multiples of 32, but for MLA, which has 16), float8 and
GPUs.
"""

from __future__ import annotations

import argparse
import itertools
import math
import os
import re
import sys
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch

import _vllm
from _harness import Figure, add_common_arguments, exact, figure_table, finish, table
from _parity_engines import Found, answer_async, answer_in_process, answer_over_http
from _parity_reference import FEATURES, Compared, Reference, compare
from kvroute.heads import DifficultyHead
from kvroute.models import bundled_path
from tests.serving.checkpoints import build

SETTINGS = {"max_features": 32}
TIMES = 4.0
"""How many times transformers' own error vLLM's may be."""
Errors = dict[tuple[str, str], dict[str, float]]
"""By model and dtype, transformers' own errors by feature."""


@dataclass(frozen=True)
class Job:
    """Requests that are sent at once.

    Attributes:
        name: for the table.
        prompts: a key of :func:`prompt_sets`.
        params: of the sampling.
        ends: each answer ends at a token that stands in its answer to the job before, so sooner than it might; only of
            such an answer something is left to be read behind its last step.
    """

    name: str
    prompts: str = "mixed"
    params: dict[str, Any] = field(default_factory=lambda: {"max_tokens": 24})
    ends: bool = False


@dataclass(frozen=True)
class Case:
    """An engine and what it is asked.

    Attributes:
        name: for the table.
        model: ``smollm2`` or a key of the tiny checkpoints.
        dtype: of weights and cache.
        way: where the engine runs, a key of :data:`WAYS`.
        options: of the engine.
        jobs: one after the other.
        drops: the engine gives up blocks outside a layer's window.
    """

    name: str
    model: str = "smollm2"
    dtype: str = "float32"
    way: str = "in process"
    options: dict[str, Any] = field(default_factory=dict)
    jobs: tuple[Job, ...] = (Job("mixed lengths"),)
    drops: bool = False

    @property
    def read(self) -> str:
        """The way in which answers are read."""
        return "step by step" if self.drops else WAYS[self.way]


WAYS = {
    "in process": "at hand",
    "core apart": "step by step",
    "two ranks": "step by step",
    "AsyncLLM": "late",
    "AsyncLLM, two ranks": "late",
    "HTTP": "late",
}
MIXED = Job("mixed lengths")
TWO = Job("n = 2", params={"max_tokens": 12, "n": 2, "temperature": 1.0})
ENDS = Job("ended by a token", ends=True)
PREFIXES = (
    Job("cold"),
    Job("warm"),
    ENDS,
    Job("shared prefix", "shared"),
    Job("one token", params={"max_tokens": 1}),
    Job("longer answers", params={"max_tokens": 70}),
)
SHARED = (
    Job("shared prefix, cold", "shared"),
    Job("shared prefix, warm", "shared"),
    Job("shared prefix, ended by a token", "shared", ends=True),
)
CHUNKS = {"block_size": 32, "max_num_batched_tokens": 64}
TINY_CACHE = {"block_size": 32, "num_gpu_blocks_override": 18, "max_num_seqs": 6}
CROWD = Job("preempted", "crowd", {"max_tokens": 60})
RANKS = {"tensor_parallel_size": 2}
CASES = (
    Case("prefixes, blocks of 128", options={"block_size": 128}, jobs=(*PREFIXES, TWO)),
    Case("chunks of 64, blocks of 32", options=CHUNKS, jobs=PREFIXES[:3]),
    Case("no prefix cache, blocks of 64", options={"block_size": 64, "enable_prefix_caching": False}),
    Case("tiny cache", options=TINY_CACHE, jobs=(CROWD,)),
    Case("core in another process", way="core apart", jobs=(MIXED, ENDS, TWO)),
    Case("AsyncLLM", way="AsyncLLM", jobs=(MIXED, ENDS, TWO)),
    Case("HTTP", way="HTTP", jobs=(MIXED, ENDS, TWO)),
    Case("HTTP, chunks of 64, blocks of 32", way="HTTP", options=CHUNKS, jobs=SHARED),
    Case("HTTP, tiny cache", way="HTTP", options=TINY_CACHE, jobs=(CROWD,)),
    Case("tensor parallel 2", "llama_2", way="two ranks", options=RANKS),
    Case("tensor parallel 2", "llama_2", way="AsyncLLM, two ranks", options=RANKS, jobs=(MIXED, ENDS)),
    Case("bfloat16", dtype="bfloat16", jobs=PREFIXES[:3]),
    Case("Qwen3, chunks", "qwen3", "bfloat16", options=CHUNKS),
    Case("Gemma-3, all blocks kept", "gemma3", options={"disable_hybrid_kv_cache_manager": True}, jobs=PREFIXES[:4]),
    Case("Gemma-3, blocks dropped", "gemma3", options=CHUNKS, drops=True),
    Case("DeepSeek-V2 (MLA, blocks of 16)", "deepseek_v2", jobs=(MIXED, Job("shared prefix", "shared"))),
)
QUICK = (
    Case("prefixes, chunks of 64", "llama", options=CHUNKS, jobs=(*PREFIXES, TWO)),
    Case("tiny cache", "llama", options=TINY_CACHE, jobs=(CROWD,)),
    Case("HTTP, chunks of 64", "llama", way="HTTP", options=CHUNKS, jobs=SHARED),
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


Counts = list[tuple[Case, dict[str, float]]]


@dataclass
class Done:
    """A job and its comparison."""

    case: Case
    job: Job
    compared: Compared

    @property
    def unsaid(self) -> list[str]:
        """What is absent, but for blocks outside a window: those are the engine's to drop, and a request is told."""
        return [a for a in self.compared.absent if not (self.case.drops and "window" in a)]


def run_case(
    case: Case, folder: Path, head: DifficultyHead, prompts: dict[str, Any], scratch: Path, log: Path
) -> Found:
    """Start the case's engine and have its jobs answered."""
    heads = scratch / f"heads-{case.model}-{case.dtype}"
    if not heads.exists():
        head.save(heads / "right")
    settings = {**SETTINGS, "heads": str(heads)}
    ask = {"features": FEATURES, "confidence": "right"}
    jobs = [{"prompts": prompts[j.prompts], "params": j.params, "ends": j.ends, "ask": ask} for j in case.jobs]
    options = {"dtype": case.dtype, **case.options}
    if case.way == "HTTP":
        return answer_over_http(str(folder), options, settings, jobs, log)
    work = answer_async if "AsyncLLM" in case.way else answer_in_process
    cores = 2 if "two ranks" in case.way else 0
    apart = case.way != "in process"
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


def run_all(cases: list[Case], prompts: dict[str, Any], log: Path | None) -> tuple[list[Done], Errors, Counts]:
    """Every case: its jobs compared; transformers' own errors by model and dtype; and by case what was counted."""
    jobs: list[Done] = []
    own: Errors = {}
    counts: Counts = []
    with _vllm.scratch() as scratch:
        folder = Path(scratch)
        for (model, dtype), some in itertools.groupby(cases, lambda case: (case.model, case.dtype)):
            checkpoint_folder = checkpoint(model, dtype, folder)
            reference = Reference(checkpoint_folder, dtype)  # one at a time: memory
            for case in some:
                arguments = (case, checkpoint_folder, reference.head, prompts, folder, log or folder / "log")
                found, counted = run_case(*arguments)
                counts.append((case, counted))
                for job, answers in zip(case.jobs, found, strict=True):
                    jobs.append(Done(case, job, compare(answers, reference)))
                    for text in jobs[-1].unsaid:
                        print(f"{case.name}, {job.name}: {text}", file=sys.stderr)
                    print(f"{case.name}, {job.name}: compared", file=sys.stderr)
            own[model, dtype] = reference.own()
    return jobs, own, counts


def reported(jobs: list[Done], own: Errors, counts: Counts) -> tuple[str, dict[str, Figure]]:
    """The table, and the figures."""
    rows, figures = [], {}
    for done in jobs:
        case, job, one = done.case, done.job, done.compared
        errors = own[case.model, case.dtype]
        times, name = one.times(errors)
        sizes = (f"{one.worst.get(name, math.nan):.1e}", f"{errors.get(name, math.nan):.1e}", f"{times:.2f}")
        told = len(one.absent) - len(done.unsaid)
        engine = (case.name, case.model, case.dtype, case.read, job.name)
        rows.append((*engine, one.answers, name, *sizes, one.cached or "", told or ""))
        figures[f"times transformers' error: {case.name}, {case.read}, {job.name}"] = exact(times, f"<= {TIMES:g}")
    worst = max(figures, key=lambda name: figures[name].value)
    figures = {worst: figures[worst]} | {"features_missing": exact(sum(len(d.unsaid) for d in jobs), "<= 0")}
    for case, counted in counts:
        if CROWD in case.jobs:
            figures[f"preemptions: {case.name}"] = exact(counted["preempted"], ">= 1")
        if "AsyncLLM" in case.way and any(job.ends for job in case.jobs):
            figures[f"late results: {case.name}, {case.way}"] = exact(counted["late"], ">= 1")
    for way in ("in process", "HTTP"):
        warm = [d for d in jobs if d.case.way == way and "warm" in d.job.name]
        if warm:
            figures[f"prompt tokens found in cache: {way}"] = exact(min(d.compared.cached for d in warm), ">= 1")
    header = ("engine", "model", "dtype", "read", "requests", "answers", "worst feature", "error", "transformers'")
    return table((*header, "times", "cached tokens", "told: outside a window"), rows), figures


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add_common_arguments(parser)
    parser.add_argument("--only", default="", help="run the cases whose name this pattern is found in")
    parser.add_argument("--log", type=Path, help="file for what the engines print")
    arguments = parser.parse_args()
    _vllm.prepare(log_level="WARNING")
    began = time.monotonic()
    wanted = [c for c in (QUICK if arguments.quick else CASES) if re.search(arguments.only, c.name, re.I)]
    cases = [c for c in wanted if "two ranks" not in c.way or (os.cpu_count() or 1) > 1]
    jobs, own, counts = run_all(cases, prompt_sets(arguments.seed), arguments.log)
    text, figures = reported(jobs, own, counts)
    print(text + "\n\n" + figure_table(figures))
    for case in wanted:
        if case not in cases:
            print(f"\nNot run: {case.name}: it needs two cores.")
    print(f"\n{time.monotonic() - began:.0f} seconds.")
    finish(
        arguments,
        name="vllm_parity",
        figures=figures,
        baseline="TransformersEngine, each request alone",
        n={"engines": len(cases), "answers": sum(d.compared.answers for d in jobs)},
    )


if __name__ == "__main__":
    main()
