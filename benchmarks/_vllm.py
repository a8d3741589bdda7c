"""What the scripts on vLLM share: processes with this checkout's entry points, engines, and a request run alone.

They run where vLLM is installed (``.venv-vllm/bin/python``, which ``make test-vllm`` makes), on its CPU build.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import multiprocessing
import os
import sys
import tempfile
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
import torch

ROOT = Path(__file__).parents[1]
if str(ROOT) not in sys.path:
    sys.path.insert(0, str(ROOT))

from kvroute import TransformersEngine  # noqa: E402
from kvroute.chains import ChainState, chain_scores, named_scores  # noqa: E402
from kvroute.pooling import PoolingSpec, pool  # noqa: E402
from kvroute.scores import Score  # noqa: E402
from kvroute.serving.mailbox import MAILBOX  # noqa: E402
from kvroute_kernels import KVView, paged_pool  # noqa: E402
from kvroute_kernels.chain_step import token_vectors  # noqa: E402
from tests.serving.processes import environment  # noqa: E402

T = TypeVar("T")
CONNECTOR = "KVRouteConnector"


def prepare(*, log_level: str = "ERROR") -> None:
    """Set this process's environment for vLLM; those that it starts inherit it. Call it before anything of vLLM's."""
    os.environ.update(environment())
    os.environ.setdefault("OMP_NUM_THREADS", "1")
    os.environ["VLLM_LOGGING_LEVEL"] = log_level
    for path in reversed(os.environ["PYTHONPATH"].split(os.pathsep)):  # what a process started by spawn sees
        if path not in sys.path:
            sys.path.insert(0, path)


def apart(
    work: Callable[..., T], *arguments: Any, log: Path | None = None, core_apart: bool = False, cores: int = 0
) -> T:
    """Run a function of a module in a process of its own: an engine leaves much behind in one.

    Args:
        work: the function.
        arguments: its arguments.
        log: file for what the process prints, appended to; nowhere by default.
        core_apart: whether vLLM runs its engine's core in yet another process, as a server does.
        cores: that vLLM's ranks are bound to, one each; 0 leaves that to vLLM.

    Raises:
        RuntimeError: ``work`` raised; with the kind and text of that.
    """
    os.environ["VLLM_ENABLE_V1_MULTIPROCESSING"] = "1" if core_apart else "0"
    context = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(1, mp_context=context, initializer=_prepared, initargs=(log, cores)) as process:
        return process.submit(_told, work, *arguments).result()


def _told(work: Callable[..., T], *arguments: Any) -> T:
    try:
        return work(*arguments)
    except Exception as error:  # noqa: BLE001 - some of vLLM's can't be sent to another process
        raise RuntimeError(f"{type(error).__name__}: {error}") from None


def _prepared(log: Path | None, cores: int) -> None:
    target = os.open(os.devnull if log is None else log, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o644)
    for stream in (1, 2):
        os.dup2(target, stream)
    logging.captureWarnings(True)
    if cores:
        os.sched_setaffinity(0, range(cores))
        os.environ["VLLM_CPU_OMP_THREADS_BIND"] = "|".join(map(str, range(cores)))


def start_engine(model: str | Path, *, kvroute: Mapping[str, Any] | None = None, **options: Any) -> Any:
    """vLLM's ``LLM`` in this process; with kvroute and its settings unless ``kvroute`` is None."""
    from vllm import LLM

    return LLM(**engine_options(model, kvroute, **options))


def stop_engine(engine: Any) -> None:
    """End an ``LLM``; a core in a process of its own would outlive it and keep this one from ending."""
    engine.llm_engine.engine_core.shutdown()


def engine_options(model: str | Path, kvroute: Mapping[str, Any] | None, **options: Any) -> dict[str, Any]:
    """The arguments of an engine of vLLM's."""
    from vllm.config import KVTransferConfig

    if kvroute is not None:
        options["kv_transfer_config"] = KVTransferConfig(
            kv_connector=CONNECTOR, kv_role="kv_producer", kv_connector_extra_config=dict(kvroute)
        )
    plain = {"enforce_eager": True, "max_model_len": 512, "dtype": "float32", "max_num_seqs": 8}
    return {"model": str(model), **(plain | options)}


def sampling(ask: Mapping[str, Any] | None, **options: Any) -> Any:
    """vLLM's ``SamplingParams``, greedy unless said otherwise, with what is asked of kvroute."""
    from vllm import SamplingParams

    extra = None if ask is None else {"kv_transfer_params": {"kvroute": dict(ask)}}
    return SamplingParams(**({"temperature": 0.0} | options), extra_args=extra)


@dataclass
class Answered:
    """One request to an ``LLM``.

    Attributes:
        output: vLLM's own.
        results: what came with the statistics, by the answer's number; empty without kvroute.
    """

    output: Any
    results: dict[int, dict[str, Any]]


def answer(
    engine: Any,
    requests: Mapping[str, tuple[Sequence[int], Any]],
    within: contextlib.AbstractContextManager[Any] | None = None,
) -> dict[str, Answered]:
    """Have an ``LLM`` of this process answer requests at once, and wait for all that is said of them.

    Args:
        engine: it, with its statistics on.
        requests: tokens of the prompt and ``SamplingParams``, by the id that the request is to have.
        within: context of all that the engine does.
    """
    return asyncio.run(_answer(engine, requests, within or contextlib.nullcontext()))


async def _answer(
    engine: Any, requests: Mapping[str, tuple[Sequence[int], Any]], within: contextlib.AbstractContextManager[Any]
) -> dict[str, Answered]:
    from vllm.sampling_params import RequestOutputKind

    core, outputs = engine.llm_engine, {}
    with contextlib.ExitStack() as stack:
        slots = {name: stack.enter_context(MAILBOX.expect([name], p.n)) for name, (_, p) in requests.items()}
        with within:
            for name, (prompt, params) in requests.items():
                params.output_kind = RequestOutputKind.FINAL_ONLY  # as LLM.generate
                core.add_request(name, {"prompt_token_ids": list(prompt)}, params)
            while core.has_unfinished_requests():
                outputs |= {o.request_id: o for o in core.step() if o.finished}
            if hasattr(core.engine_core, "engine_core"):  # one apart makes this step unasked, and says nothing of it
                core.step()  # the workers hear of the last end, and tell what they read behind it
        return {
            name: Answered(outputs[name], {sample: result for (_, sample), result in slot.results.items()})
            for name, slot in slots.items()
        }


def metrics(engine: Any) -> dict[str, float]:
    """An engine's counters and gauges by name, summed over labels; needs its ``disable_log_stats=False``."""
    found: dict[str, float] = {}
    for metric in engine.get_metrics():
        value = getattr(metric, "value", None)
        if value is not None:
            found[metric.name] = found.get(metric.name, 0.0) + float(value)
    return found


def scratch() -> tempfile.TemporaryDirectory[str]:
    """A folder for what a script needs on disk."""
    return tempfile.TemporaryDirectory(prefix="kvroute-benchmark-")


# ---------------------------------------------------------------------- a request alone


class Alone:
    """What features of given tokens are when transformers runs them alone, in one piece.

    Args:
        engine: the model.
    """

    def __init__(self, engine: TransformersEngine) -> None:
        self.engine = engine

    def features(
        self, ids: Sequence[int], prompt: int, vectors: Mapping[str, tuple[str, PoolingSpec]]
    ) -> dict[str, np.ndarray[Any, Any] | float]:
        """Pooled vectors by name and, by theirs, the chain scores.

        Args:
            ids: prompt and answer; the last token has no keys and values.
            prompt: tokens of the prompt.
            vectors: of ``prompt`` or ``answer``, and how to pool.
        """
        found: dict[str, np.ndarray[Any, Any] | float] = {}
        kept = list(ids[:-1])
        [(_, reading)] = list(self.engine.read([list(ids)], [prompt], want={"kv"}, progress=False))
        view = reading.view
        assert view is not None
        for name, (of, spec) in vectors.items():
            start, stop = (0, prompt) if of == "prompt" else (prompt, len(kept))
            if start == stop:
                continue
            sif = [self.engine.sif_weights(spec.sif_a)[torch.tensor(kept)]] if spec.weights == "sif" else None
            layers = self.engine.info.num_layers
            vector = pool(view, spec, num_layers=layers, start=[start], stop=[stop], sif_weights=sif)
            found[name] = vector[0].numpy()
        if view.dtype == torch.float64:
            scores = _exact_chains(view, prompt, len(kept))
        else:
            chain = ChainState(1, num_layers=self.engine.info.num_layers)
            chain.update_view(view, [0], [prompt], [len(kept)])
            scores = chain.scores()
        return found | {name: score.value for name, score in scores.items() if score.value is not None}


def _exact_chains(view: KVView, start: int, stop: int) -> dict[str, Score]:
    """Scores of both chains in float64, in which :class:`ChainState` does not keep its vectors."""
    if start == stop:
        return {}
    sums = paged_pool(view, start=[start], stop=[stop])
    by_layer = torch.cat([x[0].flatten(1) for x in (sums.keys, sums.values) if x is not None], dim=1)
    return named_scores(chain_scores(token_vectors(view, 0, start, stop)), chain_scores(by_layer / (stop - start)))
