"""The class that vLLM loads: a thin shell around :class:`SchedulerSide` and :class:`WorkerSide`."""

from __future__ import annotations

import copy
import functools
import logging
import time
import weakref
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, TypeVar

from vllm.distributed.kv_transfer.kv_connector.v1.base import (
    KVConnectorBase_V1,
    KVConnectorMetadata,
    KVConnectorRole,
    KVConnectorWorkerMetadata,
    SupportsHMA,
)
from vllm.distributed.kv_transfer.kv_connector.v1.metrics import KVConnectorPromMetrics, KVConnectorStats

from kvroute.serving.answers import public_text
from kvroute.serving.asks import KEY
from kvroute.serving.config import ServingConfig
from kvroute.serving.forcing import REQUEST_KEY
from kvroute.serving.layouts import layer_pages
from kvroute.serving.messages import StepMeta, StepResults
from kvroute.serving.metrics import KVRouteMetrics, KVRouteStats
from kvroute.serving.scheduler import SchedulerSide
from kvroute.serving.served_model import ServedModel
from kvroute.serving.unreadable import require_readable, unreadable
from kvroute.serving.vllm_facts import cache_facts, cpu_writer, holds_pages
from kvroute.serving.worker import WorkerSide

if TYPE_CHECKING:
    import torch

_log = logging.getLogger(__name__)
_T = TypeVar("_T")
_WORKERS: weakref.WeakValueDictionary[str, WorkerSide] = weakref.WeakValueDictionary()
"""By engine id, workers of this process that the scheduler's side may ask to read at once, one an engine."""
_UNREAD = "What a worker read of it was lost."


@dataclass
class StepMessage(KVConnectorMetadata):  # type: ignore[misc]
    """To the workers."""

    meta: StepMeta = field(default_factory=StepMeta)


@dataclass
class StepAnswer(KVConnectorWorkerMetadata):  # type: ignore[misc]
    """From a worker, in rank order."""

    results: StepResults = field(default_factory=StepResults)

    def aggregate(self, other: KVConnectorWorkerMetadata) -> KVConnectorWorkerMetadata:
        """With the next rank's."""
        assert isinstance(other, StepAnswer)
        try:
            return StepAnswer(self.results.merge(other.results))
        except Exception as error:  # noqa: BLE001 - the engine must not see it
            _log.warning("kvroute could not join what two workers read.", exc_info=True)
            ids = [*self.results.read, *other.results.read, *self.results.faults, *other.results.faults]
            return StepAnswer(StepResults(faults=dict.fromkeys(ids, public_text(error)), lost=1))


def _guarded(neutral: Callable[..., Any]) -> Callable[[Callable[..., _T]], Callable[..., _T]]:
    """A hook that raises nothing: where it fails, that is counted and ``neutral(self, *its arguments)`` returned. The
    time of the scheduler's side is counted, too."""

    def wrap(hook: Callable[..., _T]) -> Callable[..., _T]:
        @functools.wraps(hook)
        def guarded(self: KVRouteConnector, *args: Any, **kwargs: Any) -> _T:
            began = time.perf_counter()
            try:
                return hook(self, *args, **kwargs)
            except Exception as error:  # noqa: BLE001 - the engine must not see it
                self._failed(hook.__name__, error, args)
                return neutral(self, *args, **kwargs)  # type: ignore[no-any-return]
            finally:
                if self._scheduler is not None:
                    try:
                        self._scheduler.tally.spent("scheduler", time.perf_counter() - began)
                    except Exception as error:  # noqa: BLE001 - the engine must not see it
                        self._failed("", error, args)

        return guarded

    return wrap


def _nothing(*_: Any) -> None:
    """What most hooks return."""


def _unsent(connector: KVRouteConnector, *_: Any) -> StepMessage:
    """A step of which the workers are told nothing."""
    if connector._scheduler is not None:
        connector._scheduler.unsent()
    return StepMessage()


class KVRouteConnector(KVConnectorBase_V1, SupportsHMA):  # type: ignore[misc]
    """Reads features and scores from the engine's paged cache, and decides how hard requests think. It moves no blocks;
    tokens are forced by :class:`kvroute.serving.logits_processor.ForcedTokens`, into requests that ask for it alone.

    Raises:
        InvalidInputError: the settings make no sense, or need what can't be read from this engine.
    """

    def __init__(self, vllm_config: Any, role: KVConnectorRole, kv_cache_config: Any) -> None:
        super().__init__(vllm_config, role, kv_cache_config)
        config = ServingConfig.read(self._kv_transfer_config.kv_connector_extra_config or None)
        off = unreadable(vllm_config)
        require_readable(config, off)
        model = ServedModel(vllm_config, kv_cache_config)
        self._config = config = model.bind(config)
        self._worker: WorkerSide | None = None
        self._scheduler: SchedulerSide | None = None
        if role == KVConnectorRole.SCHEDULER:
            model.prepare()
            if off is not None:
                _log.warning("%s Requests that ask for something are answered, and told so.", off)
            sizes = [group.kv_cache_spec.block_size for group in kv_cache_config.kv_cache_groups]
            self._scheduler = SchedulerSide(
                config,
                sizes,
                model.sif,
                off,
                thinking=lambda: model.thinking(config),
                longest=int(vllm_config.model_config.max_model_len),
                runs_ahead=bool(vllm_config.scheduler_config.async_scheduling),
                reader=functools.partial(_WORKERS.get, str(self._kv_transfer_config.engine_id)),
                holds_pages=holds_pages(kv_cache_config),
            )

    # ------------------------------------------------------------------ worker

    def register_kv_caches(self, kv_caches: dict[str, torch.Tensor]) -> None:
        """Raises UnsupportedLayoutError, which ends the start: a cache that can't be read is no server of ours."""
        facts = cache_facts(self._vllm_config, self._kv_cache_config)
        writer = cpu_writer(self._vllm_config.cache_config.cache_dtype)
        rank, gather = _ranks()
        self._worker = WorkerSide(
            layer_pages(facts, kv_caches, writer),
            config=self._config,
            gather=gather,
            replicas=facts.replicas,
            copy=rank % facts.replicas != 0,
        )
        if gather is None and self._worker.keeps_up:
            _WORKERS[str(self._kv_transfer_config.engine_id)] = self._worker

    def _failed(self, hook: str, error: Exception, args: Sequence[Any]) -> None:
        """Count a hook's failure; where a request ended in it, nothing of it is kept."""
        try:
            if self._worker is not None:
                self._worker.failed(error)
            if self._scheduler is not None:
                self._scheduler.failed(error, args[0].request_id if hook.startswith("request_finished") else None)
        except Exception:  # noqa: BLE001 - nothing is left to tell
            _log.warning("kvroute failed twice in %s.", hook, exc_info=True)

    def _read_nothing(self) -> StepAnswer | None:
        """That what this rank read in the step is lost: half of a vector must not be taken for a whole one."""
        message = self._get_connector_metadata() if self.has_connector_metadata() else None
        if not isinstance(message, StepMessage) or not (message.meta.requests or message.meta.rests):
            return None
        ids = [r.id for r in [*message.meta.requests, *message.meta.rests]]
        return StepAnswer(StepResults(faults=dict.fromkeys(ids, _UNREAD)))

    def _step(self) -> None:
        if self._worker is not None and self.has_connector_metadata():
            message = self._get_connector_metadata()
            if isinstance(message, StepMessage):
                self._worker.step(message.meta)

    @_guarded(_nothing)
    def handle_preemptions(self, kv_connector_metadata: KVConnectorMetadata) -> None:
        """Before the forward: the last moment at which the pages of requests that ended are whole."""
        if self._worker is not None and isinstance(kv_connector_metadata, StepMessage):
            self._worker.begin(kv_connector_metadata.meta)

    @_guarded(_nothing)
    def finish_forward(self) -> None:
        self._step()

    @_guarded(_nothing)
    def wait_for_save(self) -> None:
        self._step()

    @_guarded(lambda *_: (None, None))
    def get_finished(self, finished_req_ids: set[str]) -> tuple[set[str] | None, set[str] | None]:
        self._step()
        if self._worker is not None:
            for request in finished_req_ids:  # known from the scheduler's side, too, unless that failed
                self._worker.drop(request)
        return None, None

    @_guarded(_read_nothing)
    def build_connector_worker_meta(self) -> KVConnectorWorkerMetadata | None:
        self._step()
        results = None if self._worker is None else self._worker.results()
        return None if results is None else StepAnswer(results)

    # ------------------------------------------------------------------ statistics

    @_guarded(_nothing)
    def get_kv_connector_stats(self) -> KVConnectorStats | None:
        payload = None if self._scheduler is None else self._scheduler.statistics()
        return None if payload is None else KVRouteStats(data=payload)

    @classmethod
    def build_kv_connector_stats(cls, data: dict[str, Any] | None = None) -> KVConnectorStats | None:
        return KVRouteStats(data={} if data is None else data)

    @classmethod
    def build_prom_metrics(
        cls, vllm_config: Any, metric_types: Any, labelnames: list[str], per_engine_labelvalues: dict[int, list[object]]
    ) -> KVConnectorPromMetrics:
        return KVRouteMetrics(vllm_config, metric_types, labelnames, per_engine_labelvalues)

    def start_load_kv(self, forward_context: Any, **kwargs: Any) -> None:
        """Nothing is loaded."""

    def wait_for_layer_load(self, layer_name: str) -> None:
        """Nothing is loaded."""

    def save_kv_layer(self, layer_name: str, kv_layer: Any, attn_metadata: Any, **kwargs: Any) -> None:
        """Nothing is saved; and under full CUDA graphs this is not called."""

    # ------------------------------------------------------------------ scheduler

    @property
    def requires_kv_delivery(self) -> bool:
        """Nobody waits for blocks of ours."""
        return False

    @_guarded(_nothing)
    def on_new_request(self, request: Any) -> None:
        if self._scheduler is not None:
            self._scheduler.on_request(
                request.request_id,
                request.kv_transfer_params,
                int(request.num_prompt_tokens),
                request.all_token_ids,
                limit=int(request.max_tokens),
                structured=bool(request.use_structured_output),
            )
            _name_request(request, self._scheduler.decides(request.request_id))

    def get_num_new_matched_tokens(self, request: Any, num_computed_tokens: int) -> tuple[int | None, bool]:  # noqa: ARG002
        return 0, False

    def update_state_after_alloc(self, request: Any, blocks: Any, num_external_tokens: int) -> None:
        """Nothing was loaded."""

    @_guarded(_unsent)
    def build_connector_meta(self, scheduler_output: Any) -> KVConnectorMetadata:
        side = self._scheduler
        if side is None:
            return StepMessage()
        scheduled: list[Any] = []
        if side.idle:
            return StepMessage(side.step(scheduled))
        try:
            state = scheduler_output.kv_connector_block_state
            cached = scheduler_output.scheduled_cached_reqs
            starts = [(r.req_id, r.num_computed_tokens) for r in scheduler_output.scheduled_new_reqs]
            starts += zip(cached.req_ids, cached.num_computed_tokens, strict=True)
            for request, start in starts:
                if side.asked(request):
                    count = scheduler_output.num_scheduled_tokens[request]
                    scheduled.append((request, start, count, functools.partial(state.get_block_ids, request)))
        except Exception as error:  # noqa: BLE001 - what was read of it so far is right
            side.failed(error)
        return StepMessage(side.step(scheduled, scheduler_output.preempted_req_ids or ()))

    @_guarded(_nothing)
    def update_connector_output(self, connector_output: Any) -> None:
        if self._scheduler is not None:
            answer = connector_output.kv_connector_worker_meta
            self._scheduler.merge(answer.results if isinstance(answer, StepAnswer) else None)

    @_guarded(lambda *_: (False, None))
    def request_finished(self, request: Any, block_ids: Any) -> tuple[bool, dict[str, Any] | None]:
        return self._finished(request, [block_ids])

    def _finished(self, request: Any, block_ids: Any) -> tuple[bool, dict[str, Any] | None]:
        if self._scheduler is None:
            return False, None
        aborted = request.status.name == "FINISHED_ABORTED"
        box = self._scheduler.finished(
            request.request_id, int(request.num_output_tokens), aborted=aborted, blocks=block_ids
        )
        return False, None if box is None else {KEY: box}

    @_guarded(lambda *_: (False, None))
    def request_finished_all_groups(self, request: Any, block_ids: Any) -> tuple[bool, dict[str, Any] | None]:
        return self._finished(request, block_ids)

    def reset_cache(self) -> bool | None:
        return True


def _name_request(request: Any, decides: bool) -> None:
    """Tell the logits processor whose row it sees, where tokens may be forced; take away what a client said there."""
    params = request.sampling_params
    if params is None or not (decides or REQUEST_KEY in (params.extra_args or {})):
        return
    extra = {key: value for key, value in (params.extra_args or {}).items() if key != REQUEST_KEY}
    if decides:
        extra[REQUEST_KEY] = request.request_id
    params = copy.copy(params)  # the answers of one prompt (n > 1) may share theirs
    params.extra_args = extra
    request.sampling_params = params


def _ranks() -> tuple[int, Callable[[torch.Tensor], torch.Tensor] | None]:
    """This rank of the tensor-parallel group, and a gather over it: ``[n]`` to ``[ranks, n]``; None if it is alone."""
    from vllm.distributed.parallel_state import get_tp_group

    group = get_tp_group()
    if group.world_size == 1:
        return 0, None
    return int(group.rank_in_group), lambda x: group.all_gather(x[None].contiguous(), dim=0)
