"""Tokens forced at the start and in flight: those of a run by hand over the same tokens, and nothing computed twice."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import cache
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import reference
from kvroute import (
    AnswerPooling,
    CancelToken,
    Generation,
    OutOfMemoryError,
    PoolingSpec,
    TextTooLongError,
    TokenIds,
    TransformersEngine,
)
from tiny_models import HYBRID, STANDARD, VOCAB, build_model, build_tokenizer

PROMPTS = [
    "the quick brown fox jumps over the lazy dog",
    "what?",
    "a language model keeps the keys and values of every token it has read, and the question is the answer",
    "cat",
    "the quick brown fox jumps over the lazy dog",  # again
]
COUNT = 18
SUFFIXES = [[], [40], [50, 51, 52, 53, 54], [60, 61], [70, 71, 72]]
FORCED: list[dict[int, list[int]]] = [{5: [80, 81, 82]}, {1: [83]}, {}, {9: [84, 85, 86, 87, 88]}, {5: [89], 9: [90]}]
"""By prompt: after so many tokens these are put in."""


@dataclass
class Script:
    """Does what it was told, and notes what it was shown."""

    suffixes: Sequence[list[int]]
    forced: Sequence[Mapping[int, list[int]]]
    spec: PoolingSpec | None = None
    end_at: Mapping[int, int] = field(default_factory=dict)  # by prompt: after so many tokens it ends; 0 at the start
    opened: list[list[int]] = field(default_factory=list)
    looks: list[tuple[int, list[int], Any]] = field(default_factory=list)  # prompt, tokens held behind it, vector

    @property
    def reserve(self) -> int:
        return max(map(len, self.suffixes))

    def open(self, indices: Sequence[int]) -> Any:
        self.opened.append(list(indices))
        return _Scripted(self, list(indices))


@dataclass
class _Scripted:
    script: Script
    indices: list[int]

    def begin(self, session: Any, rows: Sequence[int]) -> list[list[int]]:
        assert list(rows) == list(range(len(self.indices)))
        assert all(list(session.tokens_of(r)) == [] for r in rows)
        self._look(session, rows, begin=True)
        session.end([r for r in rows if self.script.end_at.get(self.indices[r]) == 0])
        return [list(self.script.suffixes[i]) for i in self.indices]

    def after(self, session: Any, rows: Sequence[int]) -> Mapping[int, Sequence[int]]:
        self._look(session, rows, begin=False)
        done = {r: len(session.tokens_of(r)) for r in rows}
        session.end([r for r in rows if self.script.end_at.get(self.indices[r]) == done[r]])
        return {r: f for r in rows if (f := self.script.forced[self.indices[r]].get(done[r]))}

    def _look(self, session: Any, rows: Sequence[int], *, begin: bool) -> None:
        if self.script.spec is None:
            return
        for r, vector in zip(rows, session.pooled(rows, self.script.spec), strict=True):
            i = self.indices[r]
            held = [] if begin else [*self.script.suffixes[i], *session.tokens_of(r)[:-1]]
            self.script.looks.append((i, held, vector))


@cache
def exact(architecture: str) -> TransformersEngine:
    """In float64: what differs is wrong, not rounded. Shared, so leave it as it is."""
    experts = architecture in ("qwen3_next", "jamba")  # they run in float32 at most
    model = build_model(architecture, dtype=torch.float32 if experts else torch.float64)
    model.generation_config.eos_token_id = None
    tokenizer = build_tokenizer()
    tokenizer.eos_token = None  # answers end where the tests say
    return TransformersEngine(model, tokenizer, name=f"exact-{architecture}")


def with_ends(engine: TransformersEngine, ends: list[int]) -> TransformersEngine:
    model = build_model(engine.info.name.removeprefix("exact-"), dtype=torch.float64)
    model.generation_config.eos_token_id = ends
    return TransformersEngine(model, engine.tokenizer, name=engine.info.name)


@torch.no_grad()
def logits_of(engine: TransformersEngine, ids: list[int]) -> torch.Tensor:
    logits: torch.Tensor = engine.model(input_ids=torch.tensor([ids])).logits
    return logits[0].float()


def chosen_places(count: int, forced: Mapping[int, list[int]]) -> list[int]:
    """Which tokens of an answer were chosen, by its schedule."""
    places, at = [], 0
    while at < count:
        places.append(at)
        at += 1
        at += len(forced.get(at, ()))
    return places


def assert_by_hand(
    engine: TransformersEngine, answer: Generation, base: list[int], suffix: list[int], forced: Any
) -> None:
    """Every chosen token is the likeliest after a prefill of what stands before it, and every forced one is there."""
    assert answer.prompt_token_ids == base + suffix
    tokens = answer.token_ids
    places = chosen_places(len(tokens), forced)
    for after, phrase in forced.items():
        assert tokens[after : after + len(phrase)] == phrase[: len(tokens) - after] or after >= len(tokens)
    likeliest = logits_of(engine, base + suffix + tokens).argmax(dim=-1).tolist()
    first = len(base + suffix) - 1
    assert [tokens[p] for p in places] == [likeliest[first + p] for p in places]


Plan = tuple[tuple[int, tuple[int, ...]], ...]


@cache
def by_hand(architecture: str, prompt: tuple[int, ...], count: int, forced: Plan, ends: tuple[int, ...]) -> list[int]:
    """The same from scratch: a whole forward a token, no cache, no batch."""
    engine, tokens, plan = exact(architecture), list[int](), dict(forced)
    while len(tokens) < count:
        tokens.append(int(logits_of(engine, [*prompt, *tokens])[-1].argmax()))
        if tokens[-1] in ends:
            break
        tokens = [*tokens, *plan.get(len(tokens), ())][:count]
    return tokens


# ---------------------------------------------------------------------- tokens


@pytest.mark.parametrize("architecture", [*STANDARD, *HYBRID])
def test_answers_are_those_of_a_run_by_hand(architecture: str) -> None:
    """Suffixes of none, one and many tokens, switches at different steps, some twice, in one padded batch."""
    engine = exact(architecture)
    script = Script(SUFFIXES, FORCED)
    together = engine.generate(PROMPTS, steer=script, max_tokens=COUNT)
    assert script.opened == [sorted(range(5), key=lambda i: (-len(engine.tokenize(PROMPTS[i])), i))]
    for i, (prompt, batched) in enumerate(zip(PROMPTS, together, strict=True)):
        base = engine.tokenize(prompt)
        assert_by_hand(engine, batched, base, SUFFIXES[i], FORCED[i])
        assert len(batched.token_ids) == COUNT
        assert batched.finish_reason == "length"
        alone = engine.generate(prompt, steer=Script([SUFFIXES[i]], [FORCED[i]]), max_tokens=COUNT)
        assert alone.token_ids == batched.token_ids
        assert batched.text == engine.tokenizer.decode(batched.token_ids, skip_special_tokens=True)


@pytest.mark.parametrize("architecture", ["llama", "gemma3", "lfm2"])
def test_answers_that_end_at_different_steps(architecture: str) -> None:
    engine = exact(architecture)
    full = engine.generate(PROMPTS, steer=Script(SUFFIXES, FORCED), max_tokens=COUNT)
    # Tokens that three rows choose, at places that are not forced.
    ends = sorted({full[0].token_ids[3], full[1].token_ids[7], full[3].token_ids[15]})
    ended = with_ends(engine, ends)
    script = Script(SUFFIXES, FORCED)
    lengths = set()
    for i, (whole, answer) in enumerate(
        zip(full, ended.generate(PROMPTS, steer=script, max_tokens=COUNT), strict=True)
    ):
        places = [p for p in chosen_places(COUNT, FORCED[i]) if whole.token_ids[p] in ends]
        cut = places[0] + 1 if places else COUNT
        assert answer.token_ids == whole.token_ids[:cut]
        assert answer.finish_reason == ("stop" if places else "length")
        lengths.add(cut)
    assert len(lengths) >= 3


def test_float32_logits_are_near_those_of_a_prefill(standard_engine: TransformersEngine) -> None:
    """Where float noise counts: the mean log-probabilities of the chosen tokens."""
    answers = standard_engine.generate(PROMPTS, steer=Script(SUFFIXES, FORCED), max_tokens=COUNT, features="logits")
    for i, answer in enumerate(answers):
        places = chosen_places(len(answer.token_ids), FORCED[i])
        logprobs = logits_of(standard_engine, answer.prompt_token_ids + answer.token_ids).log_softmax(dim=-1)
        first = len(answer.prompt_token_ids) - 1
        wanted = np.mean([float(logprobs[first + p, answer.token_ids[p]]) for p in places])
        assert answer.scores["mean_logprob"].value == pytest.approx(wanted, abs=2e-3)


@pytest.mark.parametrize("architecture", ["llama", "lfm2"])
def test_an_empty_script_changes_nothing(architecture: str) -> None:
    engine = exact(architecture)
    plain = engine.generate(PROMPTS, max_tokens=COUNT)
    steered = engine.generate(PROMPTS, steer=Script([[]] * 5, [{}] * 5), max_tokens=COUNT)
    assert [g.token_ids for g in steered] == [g.token_ids for g in plain]
    assert [g.usage for g in steered] == [g.usage for g in plain]


def test_sampling_does_not_depend_on_the_batch() -> None:
    engine = exact("llama")
    chosen: dict[str, Any] = {"max_tokens": COUNT, "temperature": 1.0, "seed": 3, "repetition_penalty": 1.3}
    together = engine.generate(PROMPTS[:4], steer=Script(SUFFIXES, FORCED), **chosen)
    for i, answer in enumerate(together):
        alone = engine.generate(PROMPTS[i], steer=Script([SUFFIXES[i]], [FORCED[i]]), **chosen)
        assert alone.token_ids == answer.token_ids


def test_a_prefix_is_continued() -> None:
    engine = exact("llama")
    kept = engine.prefix("the quick brown fox")
    plain = engine.generate(PROMPTS, steer=Script(SUFFIXES, FORCED), max_tokens=COUNT)
    saved = engine.generate(PROMPTS[:1], steer=Script(SUFFIXES[1:], FORCED), max_tokens=COUNT, prefix=kept)[0]
    again = engine.generate(PROMPTS[:1], steer=Script(SUFFIXES[1:], FORCED), max_tokens=COUNT)[0]
    assert saved.token_ids == again.token_ids
    assert saved.usage.cached == len(kept.token_ids) > 0
    assert saved.usage.computed == again.usage.computed - saved.usage.cached
    assert len(plain) == 5


_TOKENS = st.lists(st.integers(4, VOCAB - 1), max_size=4)


@settings(max_examples=40, deadline=None)
@given(data=st.data())
def test_random_schedules_are_those_of_runs_from_scratch(data: st.DataObject) -> None:
    count = data.draw(st.integers(1, 9), label="max_tokens")
    n = data.draw(st.integers(1, 4), label="rows")
    prompts = [data.draw(st.lists(st.integers(4, 12), min_size=1, max_size=5), label="prompt") for _ in range(n)]
    suffixes = [data.draw(_TOKENS, label="suffix") for _ in range(n)]
    forced = [data.draw(st.dictionaries(st.integers(1, 8), _TOKENS, max_size=3), label="forced") for _ in range(n)]
    ends = tuple(data.draw(st.lists(st.integers(4, VOCAB - 1), max_size=60), label="ends"))
    engine = _with_ends(ends)
    answers = engine.generate(
        [TokenIds(tuple(p)) for p in prompts], steer=Script(suffixes, forced), max_tokens=count, features="length"
    )
    for prompt, suffix, plan, answer in zip(prompts, suffixes, forced, answers, strict=True):
        frozen = tuple((k, tuple(v)) for k, v in plan.items())
        wanted = by_hand("llama", tuple(prompt + suffix), count, frozen, ends)
        assert answer.token_ids == wanted
        assert answer.usage.prompt == len(prompt + suffix)
        assert answer.usage.generated == len(wanted)
        assert answer.scores["length"].value == len(wanted)
        ran = answer.usage.cached + answer.usage.computed - answer.usage.prompt
        # Up to the last chosen token; max_tokens may fall among forced ones, which are not run then.
        assert ran == chosen_places(len(wanted), plan)[-1]


def _with_ends(ends: tuple[int, ...]) -> TransformersEngine:
    engine = exact("llama")
    engine.model.generation_config.eos_token_id = list(ends) or None
    return engine


@pytest.fixture(autouse=True)
def _ends_of_the_shared_model_are_put_back() -> Any:
    yield
    exact("llama").model.generation_config.eos_token_id = None


# ---------------------------------------------------------------------- what was computed


class Counting:
    """Notes every token that goes through a model's forward, lane by lane."""

    def __init__(self, model: Any) -> None:
        self.calls: list[tuple[list[list[int]], list[list[int]]]] = []
        self._handle = model.register_forward_pre_hook(self._note, with_kwargs=True)

    def _note(self, _module: Any, _args: Any, kwargs: dict[str, Any]) -> None:
        self.calls.append((kwargs["input_ids"].tolist(), kwargs["position_ids"].tolist()))

    def __enter__(self) -> Counting:
        return self

    def __exit__(self, *_: object) -> None:
        self._handle.remove()

    @property
    def tokens(self) -> int:
        return sum(len(ids) * len(ids[0]) for ids, _ in self.calls)

    def lane(self, index: int, skip: int = 0) -> tuple[list[int], list[int]]:
        """One lane's tokens and positions in order, without the first ``skip`` (padding)."""
        ids = [t for call, _ in self.calls for t in call[index]]
        return ids[skip:], [p for _, call in self.calls for p in call[index]][skip:]


@pytest.mark.parametrize("architecture", ["llama", "gemma3", "lfm2"])
@pytest.mark.parametrize("i", range(4))
def test_every_token_goes_through_the_model_once(architecture: str, i: int) -> None:
    engine = exact(architecture)
    with Counting(engine.model) as counted:
        answer = engine.generate(PROMPTS[i], steer=Script([SUFFIXES[i]], [FORCED[i]]), max_tokens=COUNT)
    ids, positions = counted.lane(0)
    assert ids == engine.tokenize(PROMPTS[i]) + SUFFIXES[i] + answer.token_ids[:-1]
    assert positions == list(range(len(ids)))
    assert answer.usage.computed == counted.tokens == len(ids)


def test_a_batch_runs_every_rows_tokens_once() -> None:
    engine = exact("llama")
    prompts = [TokenIds(tuple(range(5, 5 + n))) for n in (4, 9, 6, 2)]
    script = Script([[40, 41], [50, 51], [60, 61], [70, 71]], FORCED)  # all end at once, so no lane is left
    with Counting(engine.model) as counted:
        answers = engine.generate(prompts, steer=script, max_tokens=COUNT)
    assert len(script.opened) == 1
    for lane, i in enumerate(script.opened[0]):
        ids, positions = counted.lane(lane, skip=9 - len(prompts[i].ids))
        assert ids == answers[i].prompt_token_ids + answers[i].token_ids[:-1]
        assert positions == list(range(len(ids)))
        assert answers[i].usage.computed == len(ids)


def test_equal_prompts_are_run_once() -> None:
    engine = exact("llama")
    script = Script([[40], [41, 42], [], [43]], [{}, {3: [80]}, {}, {}])
    prompts = [PROMPTS[0], PROMPTS[0], PROMPTS[1], PROMPTS[0]]
    lengths = [len(engine.tokenize(p)) for p in prompts]
    with Counting(engine.model) as counted:
        answers = engine.generate(prompts, steer=script, max_tokens=6)
    assert len(counted.calls[0][0]) == 2  # two different prompts
    assert [a.usage.cached for a in answers] == [0, lengths[0], 0, lengths[0]]
    for i, answer in enumerate(answers):
        assert_by_hand(engine, answer, engine.tokenize(prompts[i]), script.suffixes[i], script.forced[i])
        assert answer.usage.computed == answer.usage.prompt - answer.usage.cached + 5


def test_usage_adds_up_to_what_the_model_saw() -> None:
    """No padding, no row that runs along: then the sum is exact."""
    engine = exact("llama")
    prompts = [TokenIds((5, 6, 7)), TokenIds((5, 6, 7)), TokenIds((9, 8, 7))]
    script = Script([[40, 41], [42, 43], [44, 45]], [{2: [80, 81]}, {4: [82]}, {}])
    with Counting(engine.model) as counted:
        answers = engine.generate(prompts, steer=script, max_tokens=9)
    assert sum(a.usage.computed for a in answers) == counted.tokens == 2 * 3 + 3 * (2 + 8)


# ---------------------------------------------------------------------- features


SPECS = {
    "mean": PoolingSpec(layers="all", heads="concat"),
    "window": PoolingSpec(layers="all", window=6, tokens="sum", part="v"),
    "sif": PoolingSpec(layers="last:2", weights="sif"),
    "last": PoolingSpec(layers="all", tokens="last"),
}


@pytest.mark.parametrize("architecture", ["llama", "mistral", "gemma3", "lfm2"])
def test_features_are_those_of_an_unsteered_run_on_the_same_tokens(architecture: str) -> None:
    engine = exact(architecture)
    answers = engine.generate(
        PROMPTS, steer=Script(SUFFIXES, FORCED), max_tokens=COUNT,
        features={"kv-coe": "kv-coe", "logits": "logits", "length": "length", "prompt": SPECS["mean"],
                  "answer": AnswerPooling(SPECS["mean"])},
    )  # fmt: skip
    for i, answer in enumerate(answers):
        assert not answer.feature_errors
        base, low, high = len(engine.tokenize(PROMPTS[i])), answer.usage.prompt, answer.usage.prompt + COUNT - 1
        ids = answer.prompt_token_ids + answer.token_ids
        cache = reference.stock_cache(engine.model, ids[:-1])
        part = [(k[:, low:high], v[:, low:high]) for k, v in cache]
        # The prompt's vector is of what both modes share, the answer's of all that follows the suffix.
        shared = [(k[:, :base], v[:, :base]) for k, v in cache]
        assert reference.relative_error(answer.features["prompt"], reference.pool(shared, SPECS["mean"])) < 1e-5
        assert reference.relative_error(answer.features["answer"], reference.pool(part, SPECS["mean"])) < 1e-5
        chains = {"token": reference.token_chain(cache, low, high), "layer": reference.layer_chain(cache, low, high)}
        for axis, chain in chains.items():
            if len(chain) < 3:  # two layers with keys and values: no chain
                assert answer.scores[f"kv_coe_r_{axis}"].value is None
                continue
            found = (answer.scores[f"kv_coe_r_{axis}"].value, answer.scores[f"kv_coe_c_{axis}"].value)
            assert found == pytest.approx(reference.coe(chain), rel=1e-4, abs=1e-5)
        assert answer.scores["length"].value == COUNT
        # Of the tokens that the model chose: a forced one says nothing about how sure it is.
        places = chosen_places(COUNT, FORCED[i])
        logprobs = logits_of(engine, ids[:-1]).double().log_softmax(dim=-1)[low - 1 :]
        rows = logprobs[places]
        wanted = {
            "mean_logprob": float(rows[range(len(places)), [answer.token_ids[p] for p in places]].mean()),
            "entropy": float(torch.special.entr(rows.exp()).sum(dim=-1).mean()),
            "max_probability": float(rows.exp().amax(dim=-1).mean()),
        }
        assert {n: answer.scores[n].value for n in wanted} == pytest.approx(wanted, abs=1e-5)


@pytest.mark.parametrize("name", SPECS)
@pytest.mark.parametrize("architecture", ["llama", "gemma3", "lfm2"])
def test_vectors_at_a_checkpoint_are_those_of_a_prefill(architecture: str, name: str) -> None:
    engine = exact(architecture)
    script = Script(SUFFIXES, FORCED, spec=SPECS[name])
    engine.generate(PROMPTS, steer=script, max_tokens=12)
    assert len(script.looks) > 5 * 6
    ids = [engine.tokenize(PROMPTS[i]) + held for i, held, _ in script.looks]
    wanted = engine.pool(ids, [SPECS[name]])[0]
    found = np.array([v for _, _, v in script.looks])
    np.testing.assert_allclose(found, wanted, rtol=1e-5, atol=1e-6)


# ---------------------------------------------------------------------- streams and ends


def test_a_stream_shows_forced_tokens_in_their_place() -> None:
    engine = exact("llama")
    wanted = engine.generate(PROMPTS, steer=Script(SUFFIXES, FORCED), max_tokens=COUNT)
    texts, tokens, last = [""] * 5, [list[int]() for _ in PROMPTS], list[int]()
    for chunk in engine.stream(PROMPTS, steer=Script(SUFFIXES, FORCED), max_tokens=COUNT):
        assert chunk.index not in last
        texts[chunk.index] += chunk.text
        if chunk.token_id is not None:
            tokens[chunk.index].append(chunk.token_id)
        if chunk.generation is not None:
            last.append(chunk.index)
            assert chunk.generation.token_ids == wanted[chunk.index].token_ids
            assert chunk.generation.text == texts[chunk.index]
    assert tokens == [g.token_ids for g in wanted]
    assert texts == [g.text for g in wanted]
    assert sorted(last) == list(range(5))


def test_a_stop_text_among_forced_tokens_ends_the_answer() -> None:
    engine = exact("llama")
    phrase = engine.tokenize_texts([" and stop here, please"], special_tokens=False)[0]
    script = Script([[]], [{4: phrase}])
    answer = engine.generate(PROMPTS[0], steer=script, max_tokens=COUNT, stop="stop here")
    plain = engine.generate(PROMPTS[0], steer=Script([[]], [{4: phrase}]), max_tokens=COUNT)
    assert answer.finish_reason == "stop"
    assert answer.text == plain.text[: plain.text.index("stop here")]
    assert answer.text.endswith(" and ")
    assert 4 < len(answer.token_ids) < 4 + len(phrase)
    chunks = list(engine.stream(PROMPTS[0], steer=Script([[]], [{4: phrase}]), max_tokens=COUNT, stop="stop here"))
    assert "".join(c.text for c in chunks) == answer.text
    assert chunks[-1].generation is not None


def test_max_tokens_holds_for_forced_tokens_too() -> None:
    engine = exact("llama")
    answer = engine.generate(PROMPTS[0], steer=Script([[]], [{4: list(range(80, 99))}]), max_tokens=8)
    assert answer.token_ids[4:] == [80, 81, 82, 83]
    assert answer.finish_reason == "length"
    assert answer.usage.computed == answer.usage.prompt + 3  # what was forced last was not run
    room: list[int] = []

    class Asking(_Scripted):
        def after(self, session: Any, rows: Sequence[int]) -> Mapping[int, Sequence[int]]:
            room.extend(session.room(r) for r in rows)
            return super().after(session, rows)

    script = Script([[40]], [{2: [80, 81]}])
    script.open = lambda indices: Asking(script, list(indices))  # type: ignore[method-assign]
    engine.generate(PROMPTS[0], steer=script, max_tokens=6)
    assert room == [5, 4, 1]


@pytest.mark.parametrize("architecture", ["llama", "lfm2"])
@pytest.mark.parametrize("end_at", [{0: 0}, {0: 0, 1: 0, 2: 0}, dict.fromkeys(range(4), 0), {1: 1, 2: 5}, {3: 4, 0: 0}])
def test_a_steering_ends_answers(architecture: str, end_at: dict[int, int]) -> None:
    engine = exact(architecture)
    features: Any = {
        "prompt": SPECS["mean"],
        "answer": AnswerPooling(SPECS["mean"]),
        "logits": "logits",
        "coe": "kv-coe",
    }
    plain = engine.generate(PROMPTS[:4], steer=Script(SUFFIXES, FORCED), max_tokens=COUNT, features=features)
    script = Script(SUFFIXES, FORCED, end_at=end_at)
    ended = engine.generate(PROMPTS[:4], steer=script, max_tokens=COUNT, features=features)
    for i, (whole, answer) in enumerate(zip(plain, ended, strict=True)):
        np.testing.assert_allclose(answer.features["prompt"], whole.features["prompt"], rtol=1e-6)
        if i not in end_at:
            assert answer.token_ids == whole.token_ids
            assert answer.usage == whole.usage
            continue
        assert answer.finish_reason == "cancelled"
        assert answer.token_ids == whole.token_ids[: end_at[i]]
        if end_at[i] == 0:  # nothing is written for it, nor put behind it
            assert (answer.text, answer.usage.generated, answer.usage.computed) == ("", 0, answer.usage.prompt)
            assert answer.prompt_token_ids == engine.tokenize(PROMPTS[i])
            assert answer.scores["mean_logprob"].value is None
            assert "answer" in answer.feature_errors
    last: dict[int, Generation] = {}
    texts = [""] * 4
    for chunk in engine.stream(
        PROMPTS[:4], steer=Script(SUFFIXES, FORCED, end_at=end_at), max_tokens=COUNT, features=features
    ):
        assert chunk.index not in last
        texts[chunk.index] += chunk.text
        if chunk.generation is not None:
            last[chunk.index] = chunk.generation
    assert [last[i].token_ids for i in range(4)] == [g.token_ids for g in ended]
    assert texts == [g.text for g in ended]


def test_cancelling_among_forced_tokens_counts_what_was_run() -> None:
    engine = exact("llama")
    cancel = CancelToken()
    script = Script([[40]], [{2: list(range(80, 90))}])
    with Counting(engine.model) as counted:
        found = None
        for n, chunk in enumerate(engine.stream(PROMPTS[0], steer=script, max_tokens=COUNT, cancel=cancel)):
            if n == 5:
                cancel.cancel()
            found = chunk.generation
    assert found is not None
    assert found.finish_reason == "cancelled"
    assert found.usage.computed == counted.tokens
    assert found.token_ids[2:] == list(range(80, 90))


def test_room_is_kept_for_the_suffix() -> None:
    engine = exact("llama")
    fits = engine.info.context + 1 - 8 - 3
    script = Script([[40, 41, 42]], [{}])
    with pytest.raises(TextTooLongError, match="max_tokens"):
        engine.generate(TokenIds((5,) * (fits + 1)), steer=script, max_tokens=8)
    assert script.opened == []


# ---------------------------------------------------------------------- memory


def test_a_batch_that_was_given_up_is_opened_again() -> None:
    engine = TransformersEngine(exact("llama").model, exact("llama").tokenizer, token_budget=64)
    wanted = engine.generate(PROMPTS, steer=Script(SUFFIXES, FORCED), max_tokens=COUNT)
    steps = 0

    def check(_module: Any, _args: Any, kwargs: dict[str, Any]) -> None:
        nonlocal steps
        rows, new = kwargs["input_ids"].shape
        steps += new == 1
        if rows > 2 and steps > 6:
            raise torch.OutOfMemoryError("CUDA out of memory.")

    handle = engine.model.register_forward_pre_hook(check, with_kwargs=True)
    try:
        script = Script(SUFFIXES, FORCED)
        with pytest.warns(RuntimeWarning, match="budget is halved"):
            found = engine.generate(PROMPTS, steer=script, max_tokens=COUNT)
        assert [g.token_ids for g in found] == [g.token_ids for g in wanted]
        assert len(script.opened) > 2
        steps, engine.token_budget = 0, 64
        with pytest.raises(OutOfMemoryError):
            list(engine.stream(PROMPTS, steer=Script(SUFFIXES, FORCED), max_tokens=COUNT))
    finally:
        handle.remove()
