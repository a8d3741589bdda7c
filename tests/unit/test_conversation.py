"""Conversations: every turn is the answer to its messages; what is in the cache already is not computed again."""

from __future__ import annotations

import asyncio
from typing import Any

import numpy as np
import pytest

from kvroute import (
    CancelToken,
    Conversation,
    DifficultyHead,
    InvalidInputError,
    Policy,
    PoolingSpec,
    Prefix,
    Router,
    TextTooLongError,
    ThinkingMode,
    TokenIds,
    TransformersEngine,
)
from kvroute.confidence_maps import LogisticMap
from kvroute.engines.sampling import Sampler
from kvroute.heads.fitting import Rows, ridge_path
from tiny_models import EOS

TURNS = ["what is the capital of the country?", "and the dog?", "the quick brown fox jumps over the lazy dog"]
HOW: dict[str, Any] = {"max_tokens": 12}
TAGS = ThinkingMode(
    name="tags", fast="", slow="<think>\n", leave="\n</think>\n\n", enter="\n<think>\n", close="</think>"
)
"""A fast answer follows the prompt at once, so the next turn's prompt goes on from it."""


def a_head(engine: TransformersEngine) -> DifficultyHead:
    spec = PoolingSpec(layers=(0, 1), part="v", heads="concat")
    rng = np.random.default_rng(0)
    x = rng.normal(size=(200, spec.dimension(engine.info))).astype(np.float32)
    return DifficultyHead(
        spec=spec, target="difficulty", predictor=ridge_path(Rows(x, (x[:, 0] > 0).astype(float)), [0.01])[0],
        map=LogisticMap(means=(50.0,), scales=(20.0,), coefficients=(-2.0,), intercept=0.0),
        model=engine.info.name, fingerprint=engine.info.fingerprint, data_hash="x",
    )  # fmt: skip


def common(left: list[int], right: list[int]) -> int:
    count = 0
    while count < min(len(left), len(right)) and left[count] == right[count]:
        count += 1
    return count


# ---------------------------------------------------------------------- kept caches


def test_a_kept_cache_is_continued(standard_engine: TransformersEngine) -> None:
    """Of rows with padding, of several that end at different steps, and by several prompts at once."""
    prompts = ["the quick brown fox jumps over the lazy dog", "what?", "the cat sat on the mat"]
    plain = standard_engine.generate(prompts, **HOW)
    kept = standard_engine.generate(prompts, keep_cache=True, **HOW)
    for before, answer in zip(plain, kept, strict=True):
        assert before.prefix is None
        assert answer == before or answer.token_ids == before.token_ids
        assert isinstance(answer.prefix, Prefix)
        held = answer.prompt_token_ids + answer.token_ids[:-1]
        assert list(answer.prefix.token_ids) == held
        onward = TokenIds((*held, answer.token_ids[-1], 50, 60, 70))
        without = standard_engine.generate(onward, max_tokens=30)
        reused = standard_engine.generate([onward, onward], max_tokens=30, prefix=answer.prefix)
        assert reused[0].token_ids == reused[1].token_ids == without.token_ids
        assert reused[0].usage.cached == len(held)
        assert reused[0].usage.computed == 4 + reused[0].usage.generated - 1


def test_a_kept_cache_shares_nothing_with_the_batch(tiny_engine: TransformersEngine) -> None:
    answer = tiny_engine.generate("the quick brown fox", keep_cache=True, **HOW)
    assert answer.prefix is not None
    slab = answer.prefix.cache.slabs[0][0]
    assert slab.keys is not None
    before = slab.keys.clone()
    onward = TokenIds((*answer.prefix.token_ids, 50, 60))
    first = tiny_engine.generate(onward, prefix=answer.prefix, **HOW)
    assert bool((slab.keys == before).all())
    assert tiny_engine.generate(onward, prefix=answer.prefix, **HOW).token_ids == first.token_ids
    assert slab.keys.shape[3] == len(answer.prefix.token_ids)  # and holds no room that nobody uses


def test_kept_caches_come_with_streams(tiny_engine: TransformersEngine) -> None:
    last = [c for c in tiny_engine.stream("what?", keep_cache=True, **HOW) if c.generation is not None]
    assert last[0].generation is not None
    assert last[0].generation.prefix is not None


def test_there_is_none_where_nothing_ran_or_states_recur(
    tiny_engine: TransformersEngine, hybrid_engine: TransformersEngine
) -> None:
    cancel = CancelToken()
    cancel.cancel()
    assert tiny_engine.generate("what?", keep_cache=True, cancel=cancel, **HOW).prefix is None
    answer = hybrid_engine.generate("what?", keep_cache=True, **HOW)
    assert answer.prefix is None
    assert answer.token_ids == hybrid_engine.generate("what?", **HOW).token_ids


# ---------------------------------------------------------------------- turns


@pytest.mark.parametrize("thinking", [TAGS, ThinkingMode.instructions()], ids=["tags", "instructions"])
@pytest.mark.parametrize("mode", ["fast", "slow"])
def test_every_turn_is_that_of_its_messages(standard_engine: TransformersEngine, thinking: Any, mode: str) -> None:
    router = Router(standard_engine, mode, thinking=thinking)
    talk = Conversation(router, "be brief")
    messages: list[dict[str, Any]] = [{"role": "system", "content": "be brief"}]
    held: list[int] = []
    for turn, text in enumerate(TURNS):
        messages.append({"role": "user", "content": text})
        wanted = router.generate(messages, **HOW)
        found = talk.say(text, **HOW)
        assert found.generation.token_ids == wanted.generation.token_ids
        assert found.answer == wanted.answer
        base = thinking.layout(standard_engine, messages).base
        assert found.usage.cached == min(common(held, base), len(base) - 1)
        assert found.usage.computed == wanted.usage.computed - found.usage.cached
        assert (found.usage.cached > 0) == (turn > 0)
        assert found.generation.prefix is None
        held = (found.generation.prompt_token_ids + found.generation.token_ids)[:-1]
        assert talk.kept == len(held)
        messages.append({"role": "assistant", "content": found.answer})
        assert talk.messages == messages


def test_a_fast_answer_is_taken_over_too(tiny_engine: TransformersEngine, monkeypatch: pytest.MonkeyPatch) -> None:
    """Without tokens of the mode's own, the next prompt goes on from the answer where its text gives its tokens."""
    router = Router(tiny_engine, "fast", thinking=TAGS)
    talk = Conversation(router)
    answer = tiny_engine.tokenize_texts(["the lazy dog"], special_tokens=False)[0]
    written = iter([*answer, EOS])
    with monkeypatch.context() as patch:
        patch.setattr(Sampler, "choose", lambda self, logits, rows, contexts: [next(written)])
        assert talk.say(TURNS[0], **HOW).answer == "the lazy dog"
    first = len(TAGS.layout(tiny_engine, [{"role": "user", "content": TURNS[0]}]).base)
    second = talk.say(TURNS[1], **HOW)
    assert second.usage.cached == first + len(answer)  # all but the end token, which was never run


def test_without_reuse_all_is_computed(tiny_engine: TransformersEngine) -> None:
    router = Router(tiny_engine, "fast", thinking=TAGS)
    plain, reusing = Conversation(router, reuse=False), Conversation(router)
    for text in TURNS:
        left, right = plain.say(text, **HOW), reusing.say(text, **HOW)
        assert left.text == right.text
        assert left.usage.cached == 0
        assert left.usage.prompt == right.usage.prompt
    assert plain.kept == 0


def test_recurrent_layers_compute_all_and_answer_the_same(hybrid_engine: TransformersEngine) -> None:
    router = Router(hybrid_engine, "fast", thinking=ThinkingMode.instructions())
    talk = Conversation(router)
    for text in TURNS[:2]:
        asked = [*talk.messages, {"role": "user", "content": text}]
        found = talk.say(text, **HOW)
        assert found.usage.cached == 0
        assert found.text == router.generate(asked, **HOW).text
    assert talk.kept == 0


def test_difficulties_do_not_depend_on_the_reuse(tiny_engine: TransformersEngine) -> None:
    router = Router(tiny_engine, Policy(margin=0.0), head=a_head(tiny_engine), thinking=TAGS)
    plain, reusing = Conversation(router, reuse=False), Conversation(router)
    for text in TURNS:
        left, right = plain.say(text, **HOW), reusing.say(text, **HOW)
        assert right.decision.difficulty == pytest.approx(left.decision.difficulty, abs=1e-2)
        assert left.text == right.text


def test_turns_do_not_flap(tiny_engine: TransformersEngine) -> None:
    """A difficulty just beyond the threshold keeps the last turn's mode; one far beyond leaves it."""
    router = Router(tiny_engine, Policy(tau=50.0, margin=5.0), head=a_head(tiny_engine), thinking=TAGS)
    levels = iter([40.0, 52.0, 70.0, 48.0, 30.0])
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(DifficultyHead, "predict", lambda self, x: np.full(len(x), next(levels)))
        talk = Conversation(router)
        decisions = [talk.say("what?", max_tokens=3).decision for _ in range(5)]
    assert [d.mode for d in decisions] == ["fast", "fast", "slow", "slow", "fast"]
    assert [d.why for d in decisions] == ["difficulty", "margin", "difficulty", "margin", "difficulty"]
    assert talk.last_mode == "fast"


def test_streams_record_their_turn(tiny_engine: TransformersEngine) -> None:
    router = Router(tiny_engine, "fast", thinking=TAGS)
    said, streamed = Conversation(router), Conversation(router)
    for text in TURNS:
        wanted = said.say(text, **HOW)
        chunks = list(streamed.stream(text, **HOW))
        assert chunks[-1].routed is not None
        assert chunks[-1].routed.text == wanted.text == "".join(c.text for c in chunks)
        assert chunks[-1].routed.usage == wanted.usage
        assert chunks[-1].routed.generation.prefix is None
    assert streamed.messages == said.messages
    assert streamed.kept == said.kept
    before = streamed.messages
    left = streamed.stream("what?", **HOW)
    next(left)
    del left
    assert streamed.messages == before


def test_async_twins(tiny_engine: TransformersEngine) -> None:
    router = Router(tiny_engine, "fast", thinking=TAGS)
    said, other = Conversation(router), Conversation(router)

    async def talk() -> None:
        first = await other.asay(TURNS[0], **HOW)
        assert first.text == said.say(TURNS[0], **HOW).text
        pieces = [c async for c in other.astream(TURNS[1], **HOW)]
        wanted = said.say(TURNS[1], **HOW)
        assert pieces[-1].routed is not None
        assert pieces[-1].routed.text == wanted.text
        assert pieces[-1].routed.usage.cached == wanted.usage.cached > 0

    asyncio.run(talk())
    assert other.messages == said.messages


def test_a_turn_that_fails_changes_nothing(tiny_engine: TransformersEngine) -> None:
    router = Router(tiny_engine, "fast", thinking=TAGS)
    talk = Conversation(router, "be brief")
    talk.say(TURNS[0], **HOW)
    before, kept = talk.messages, talk.kept
    with pytest.raises(TextTooLongError):
        talk.say("too long " * 4000, **HOW)
    with pytest.raises(InvalidInputError):
        talk.say("what?", mode="deep", **HOW)
    cancel = CancelToken()
    cancel.cancel()
    talk.say("what?", cancel=cancel, **HOW)
    assert (talk.messages, talk.kept) == (before, kept)
    talk.messages.append({"role": "user", "content": "not said"})
    assert talk.messages == before


def test_reset_and_turns_to_begin_with(tiny_engine: TransformersEngine) -> None:
    router = Router(tiny_engine, "fast", thinking=TAGS)
    begin = [{"role": "user", "content": "hello"}, {"role": "assistant", "content": "the cat"}]
    talk = Conversation(router, "be brief", messages=begin)
    first = talk.say("what?", **HOW)
    talk.reset()
    assert talk.messages == [{"role": "system", "content": "be brief"}, *begin]
    assert (talk.kept, talk.last_mode) == (0, None)
    again = talk.say("what?", **HOW)
    assert again.text == first.text
    assert again.usage == first.usage
