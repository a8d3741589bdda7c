"""A vLLM server's JSON (``/v1/completions``, as of vLLM 0.32) and what we make of it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, Final, NoReturn

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from kvroute.chains import ChainSpec
from kvroute.errors import InvalidInputError, ModelMismatchError, ServerError, SpecError
from kvroute.features import AnswerPooling, Features, named_features
from kvroute.generation import FinishReason, Generation, SamplingOptions, Timings, TokenIds, Usage
from kvroute.info import ModelInfo
from kvroute.pooling import PoolingSpec
from kvroute.serving.answers import Result
from kvroute.serving.asks import KEY, Ask, PooledFeature, read_ask
from kvroute.serving.config import ServingConfig
from kvroute.serving.jobs import Decide, Job
from kvroute.thinking import Mode

_ABORTED: Final = frozenset({"abort", "error"})
"""Finish reasons of a server that gave a request up."""


# ---------------------------------------------------------------------- to the server


def ask_for(features: Features, info: ModelInfo | None = None) -> Ask | None:
    """Features as a request asks for them, checked as a server does; None where nothing is asked.

    Args:
        features: as an engine takes them.
        info: the model, if known: then the specs must fit it.

    Raises:
        SpecError: a feature that a server does not compute.
        AskError: the server would refuse it.
    """
    asked: dict[str, Any] = {}
    for name, feature in named_features(features).items():
        if feature == "logits":
            raise SpecError(
                "A server does not compute 'logits' for kvroute.",
                hint="Leave it out, or use TransformersEngine for scores from logits.",
            )
        if isinstance(feature, ChainSpec):
            if feature != ChainSpec():
                raise SpecError("A server computes chains by the default ChainSpec.", hint="Ask for 'kv-coe'.")
            asked[name] = "kv-coe"
        elif isinstance(feature, PoolingSpec | AnswerPooling):
            spec, of = (feature.spec, "answer") if isinstance(feature, AnswerPooling) else (feature, "prompt")
            asked[name] = PooledFeature(of=of, **spec.model_dump()).model_dump(mode="json", exclude_defaults=True)
        else:
            asked[name] = feature
    if not asked:
        return None
    config = ServingConfig(max_features=64)
    return read_ask({KEY: {"features": asked}}, config if info is None else config.for_model(info))


def server_ask(
    *,
    policy: str | None = None,
    features: Features = None,
    mode: Mode | None = None,
    confidence: str | None = None,
    shadow: bool = False,
) -> dict[str, Any]:
    """What a request to a vLLM server asks of kvroute, for any client: its body's ``kv_transfer_params``.

    Args:
        policy: name of a policy that the server has; it decides how hard to think.
        features: what else to give, as an engine takes it.
        mode: ``fast`` or ``slow``; then nothing is decided.
        confidence: name of a head that the server has.
        shadow: decide, say so, and change nothing.

    Raises:
        SpecError, InvalidInputError: the server would refuse it. Names are the server's to check.
    """
    ask = with_more(ask_for(features), Decide(policy=policy, mode=mode, shadow=shadow, confidence=confidence), None)
    return {KEY: {} if ask is None else ask.to_dict()}


def with_more(ask: Ask | None, decide: Decide | None, answer_from: int | None) -> Ask | None:
    """An ask of features with what is to be decided, and where an answer that exists begins; what a server has by name
    is its to check."""
    if decide is None and answer_from is None:
        return ask
    fields: dict[str, Any] = {"features": {} if ask is None else ask.features, "answer_from": answer_from}
    if decide is not None:
        fields |= {"policy": decide.policy, "mode": decide.mode}
        fields |= {"shadow": decide.shadow, "confidence": decide.confidence}
    found = Ask(**fields)
    return None if found.empty else found


def request_body(job: Job, *, model: str, stream: bool) -> dict[str, Any]:
    """The JSON of one request.

    Args:
        job: what is wanted.
        model: as the server names it.
        stream: whether the answer comes in pieces.
    """
    options = job.options
    body: dict[str, Any] = {
        "model": model,
        "prompt": job.prompt if isinstance(job.prompt, str) else list(job.prompt.ids),
        "max_tokens": options.max_tokens,
        "temperature": options.temperature,
        "top_p": options.top_p,
        # A server takes what it is not told from the model's generation config, where we mean off.
        "top_k": 0,
        "min_p": 0.0,
        "return_token_ids": True,
    }
    if options.stop:
        body["stop"] = list(options.stop)
    if options.repetition_penalty is not None:
        body["repetition_penalty"] = options.repetition_penalty
    if job.seed is not None:
        body["seed"] = job.seed
    if job.ask is not None:
        body["kv_transfer_params"] = {KEY: job.ask.to_dict()}
    if job.choices:
        body |= {"logprobs": len(job.choices), "logprob_token_ids": list(job.choices)}
        body["return_tokens_as_token_ids"] = True
    if stream:
        body |= {"stream": True, "stream_options": {"include_usage": True}}
    return body


# ---------------------------------------------------------------------- from the server


class _Part(BaseModel):
    model_config = ConfigDict(extra="ignore")


class _Details(_Part):
    cached_tokens: int | None = None


class _Usage(_Part):
    prompt_tokens: int = Field(default=0, ge=0)
    completion_tokens: int | None = Field(default=0, ge=0)
    prompt_tokens_details: _Details | None = None


def completion_usage(prompt: int, cached: int) -> _Usage:
    """The tokens of a prompt, where no server counts them; those of the answer are counted as they come."""
    return _Usage(prompt_tokens=prompt, completion_tokens=None, prompt_tokens_details=_Details(cached_tokens=cached))


class _Logprobs(_Part):
    top_logprobs: list[dict[str, float]] | None = None


class Choice(_Part):
    """An answer, or a piece of one."""

    text: str = ""
    finish_reason: str | None = None
    stop_reason: int | str | None = None
    token_ids: list[int] | None = None
    prompt_token_ids: list[int] | None = None
    logprobs: _Logprobs | None = None


class Completion(_Part):
    """What ``/v1/completions`` gives, whole or as one event of a stream."""

    model: str = ""
    choices: list[Choice] = Field(default_factory=list)
    usage: _Usage | None = None
    kv_transfer_params: dict[str, Any] | None = None


class _Model(_Part):
    id: str
    max_model_len: int | None = None


class _Models(_Part):
    data: list[_Model] = Field(min_length=1)


class _Tokens(_Part):
    tokens: list[int]


def read_completion(body: object) -> Completion:
    """Read an answer or an event of a stream.

    Raises:
        ServerError: it is none.
    """
    try:
        return Completion.model_validate(body)
    except ValidationError as error:
        _not_vllm("/v1/completions", error)


def read_choices(body: object, choices: Sequence[int]) -> list[float]:
    """Log-probabilities of some tokens, from an answer to a job with these ``choices``.

    Raises:
        ServerError: one of them is not there.
    """
    found = read_completion(body).choices
    said = found[0].logprobs if found else None
    listed = (said.top_logprobs if said else None) or [{}]
    try:
        return [listed[0][f"token_id:{token}"] for token in choices]
    except KeyError as error:
        raise ServerError(
            "The server does not give the log-probability of a token that was asked for.",
            hint="This needs vLLM 0.32 or newer.",
        ) from error


def read_models(body: object) -> dict[str, int | None]:
    """Names of the models that a server has, and the tokens each can take.

    Raises:
        ServerError: it is no list of models.
    """
    try:
        return {model.id: model.max_model_len for model in _Models.model_validate(body).data}
    except ValidationError as error:
        _not_vllm("/v1/models", error)


def read_tokens(body: object) -> list[int]:
    """The answer of ``/tokenize``.

    Raises:
        ServerError: it has no tokens.
    """
    try:
        return _Tokens.model_validate(body).tokens
    except ValidationError as error:
        _not_vllm("/tokenize", error)


def _not_vllm(place: str, error: ValidationError) -> NoReturn:
    first = error.errors()[0]
    where = ".".join(map(str, first["loc"])) or "the whole"
    raise ServerError(
        f"The server's answer to {place} can't be read: {where}: {first['msg']}.",
        hint="Give the address of a vLLM server, such as http://host:8000/v1.",
    ) from error


class Answer:
    """One answer as it comes in.

    Attributes:
        text, token_ids, prompt_token_ids: so far.
        finish: the server's reason, as soon as it is done.
        aborted: the server gave the request up, so that it counts as unanswered.
        extra: what kvroute said about it, or None.
    """

    def __init__(self) -> None:
        self.text = ""
        self.token_ids: list[int] = []
        self.prompt_token_ids: list[int] = []
        self.finish: str | None = None
        self.extra: Mapping[str, Any] | None = None
        self._usage: _Usage | None = None

    @property
    def aborted(self) -> bool:
        """Whether the server gave the request up."""
        return self.finish in _ABORTED

    def add(self, part: Completion) -> tuple[str, list[int]]:
        """Take an answer or an event; returns its new text and tokens."""
        if part.usage is not None:
            self._usage = part.usage
        extra = (part.kv_transfer_params or {}).get(KEY)
        if isinstance(extra, Mapping):
            self.extra = extra
        if not part.choices:
            return "", []
        choice = part.choices[0]
        tokens = choice.token_ids or []
        self.text += choice.text
        self.token_ids += tokens
        self.prompt_token_ids = choice.prompt_token_ids or self.prompt_token_ids
        self.finish = choice.finish_reason or self.finish
        return choice.text, tokens

    def generation(
        self, ask: Ask | None, timings: Timings, *, cancelled: bool = False, info: ModelInfo | None = None
    ) -> Generation:
        """The whole answer.

        Args:
            ask: what was asked of kvroute; of what is missing the reason is given.
            timings: as the client saw it.
            cancelled: it was ended from here.
            info: the model, if known: the features must have its size.

        Raises:
            ServerError: what kvroute said can't be read.
            ModelMismatchError: a feature has another size than the model gives.
        """
        usage = self._usage or _Usage(prompt_tokens=len(self.prompt_token_ids))
        prompt = usage.prompt_tokens
        generated = usage.completion_tokens or len(self.token_ids)
        details = usage.prompt_tokens_details
        cached = min(prompt, (details.cached_tokens if details else None) or 0)
        reason: FinishReason = "cancelled" if cancelled else "length" if self.finish == "length" else "stop"
        result, why = _result(self.extra, cancelled)
        found = {} if ask is None else {name: v for name, v in result.features.items() if name in ask.plan.pooled}
        if ask is not None and info is not None:
            for name, vector in found.items():
                _check_size(name, len(vector), ask.plan.pooled[name][1].dimension(info), info)
        return Generation(
            self.text,
            self.token_ids,
            self.prompt_token_ids,
            reason,
            Usage(prompt, cached, prompt - cached + max(generated - 1, 0), generated),
            timings,
            features=found,
            scores={} if ask is None else result.scores,
            feature_errors={} if ask is None else dict.fromkeys(_missing(ask, result), why),
            served=None if self.extra is None else result,
        )


def _result(extra: Mapping[str, Any] | None, cancelled: bool) -> tuple[Result, str]:
    """What kvroute said, and why something may be missing from it."""
    if extra is None:
        return Result(), "The request was cancelled." if cancelled else "The server said nothing about this request."
    try:
        result = Result.from_dict(extra)
    except InvalidInputError as error:
        raise ServerError(error.message, hint=error.hint) from error
    return result, result.error or " ".join(result.faults) or "The server left it out and gave no reason."


def _missing(ask: Ask, result: Result) -> list[str]:
    missing = [name for name in ask.plan.pooled if name not in result.features]
    chain = next((n for n, f in ask.features.items() if f == "kv-coe"), None)
    if chain is not None and not any(name.startswith("kv_coe") for name in result.scores):
        missing.append(chain)
    if ask.plan.length and "length" not in result.scores:
        missing.append(next(n for n, f in ask.features.items() if f == "length"))
    return missing


def _check_size(name: str, size: int, wanted: int, info: ModelInfo) -> None:
    if size != wanted:
        raise ModelMismatchError(
            f"The server's feature {name!r} has {size} numbers, and {info.name} gives {wanted}.",
            hint="The server runs another model: start it with that one, or give the client the right info=.",
        )


def seeds(prompts: Sequence[str | TokenIds], options: SamplingOptions) -> list[int | None]:
    """A seed for each request, made from that of the options as :class:`~kvroute.generation.SamplingOptions` says."""
    from kvroute.engines.sampling import random_streams

    if options.seed is None:
        return [None] * len(prompts)
    streams = random_streams([list(p.encode()) if isinstance(p, str) else p.ids for p in prompts])
    return [(options.seed * 1_000_003 + stream) % 2**63 for stream in streams]
