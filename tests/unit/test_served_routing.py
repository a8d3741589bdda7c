"""A router over an engine that decides by itself gives what a router over an engine of one's own gives.

The engine is a stand-in: a router of the other kind decides and writes, and the mode's tokens are put before what it
wrote, as vLLM has them. The real one is in ``tests/serving``.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from kvroute import (
    CancelToken,
    Generation,
    GenerationChunk,
    InvalidInputError,
    Policy,
    Routed,
    Router,
    SamplingOptions,
    Score,
    ThinkingMode,
    TokenIds,
    TransformersEngine,
    UnsupportedModelError,
)
from kvroute.serving.about import About
from kvroute.serving.answers import Result
from tests.unit.test_router import LABELS, PAIR, PROMPTS, an_engine, constant, trained

COUNT = 40  # leaves room for a switch: close to the limit the engine has a little more of it


class Deciding:
    """Decides inside, with the policies that it was given as routers."""

    decides_inside = True

    def __init__(self, engine: TransformersEngine, routers: dict[str, Router], thinking: ThinkingMode = PAIR) -> None:
        self.engine, self.routers = engine, routers
        self.tokenizer, self.info, self.tokenize_texts = engine.tokenizer, engine.info, engine.tokenize_texts
        told = {n: r.policy.model_copy(update={"head": None, "drift": None}) for n, r in routers.items()}
        self.about = About("1", True, engine.info, thinking=thinking, policies=told, off={"torn": "it can't be used"})
        self.stops: list[tuple[str, ...]] = []
        self.silent = False
        self.error: str | None = None
        self.refused: str | None = None

    def generate(
        self, prompts: Any, *, options: SamplingOptions, decide: Any, features: Any = None, cancel: Any = None,
        progress: Any = None,
    ) -> list[Generation]:  # fmt: skip
        self.stops.append(options.stop)
        return [self.one(p, options, d, features) for p, d in zip(prompts, decide, strict=True)]

    def one(self, prompt: TokenIds, options: SamplingOptions, decide: Any, features: Any) -> Generation:
        if decide is None:
            return self.engine.generate(prompt, options=options, features=features)
        total = options.max_tokens + decide.reserve
        router = self.routers[decide.policy] if decide.policy else Router(self.engine, decide.mode, thinking=PAIR)
        more = {} if decide.policy else {"mode": decide.mode}
        # The mode's tokens count in what may be written.
        mode = router.decide(prompt, **more).mode
        suffix = router._requests([prompt], None, None)[0].layout.suffix(mode)  # type: ignore[arg-type]
        if total <= len(suffix):
            routed = router.generate(prompt, options=SamplingOptions(max_tokens=1), **more)
            tokens = suffix[:total]
        else:
            written = options.model_copy(update={"max_tokens": total - len(suffix)})
            routed = router.generate(prompt, options=written, features=features, **more)
            tokens = [*suffix, *routed.generation.token_ids]
        said = Result(decision=routed.decision)
        if self.error is not None:
            said = Result(error=self.error)
        if self.refused is not None:
            said = Result(faults=[self.refused])
        return replace(
            routed.generation,
            text="not looked at",
            token_ids=tokens,
            prompt_token_ids=list(prompt.ids),
            served=None if self.silent else Result.from_dict(said.to_dict()),
        )

    def stream(self, prompts: Any, **how: Any) -> Iterator[GenerationChunk]:
        for i, found in enumerate(self.generate(prompts, **how)):
            for token in found.token_ids:
                yield GenerationChunk(i, "?", token)
            yield GenerationChunk(i, "", None, found)


@pytest.fixture(scope="module")
def engine() -> TransformersEngine:
    return an_engine()


@pytest.fixture(scope="module")
def routers(engine: TransformersEngine) -> dict[str, Router]:
    head = trained(engine, LABELS)
    one = Router(engine, Policy(kind="one-step"), head=head, thinking=PAIR)
    both = trained(engine, LABELS, windows=constant(engine, 20.0))  # closes every thought
    out = Router(engine, Policy(kind="two-step", every=4), head=both, thinking=PAIR)
    both = trained(engine, LABELS, windows=constant(engine, 80.0))  # opens one in every fast answer
    into = Router(engine, Policy(kind="two-step", every=4), head=both, thinking=PAIR)
    return {"one": one, "out": out, "into": into}


@pytest.fixture
def deciding(engine: TransformersEngine, routers: dict[str, Router]) -> Deciding:
    return Deciding(engine, routers)


def same(found: Routed, mine: Routed, *, difficulty: bool = True) -> None:
    assert (found.text, found.thought, found.answer) == (mine.text, mine.thought, mine.answer)
    assert found.generation.token_ids == mine.generation.token_ids
    assert found.generation.prompt_token_ids == mine.generation.prompt_token_ids
    assert found.generation.finish_reason == mine.generation.finish_reason
    assert (found.usage.prompt, found.usage.generated) == (mine.usage.prompt, mine.usage.generated)
    assert found.usage.computed == mine.usage.computed
    for name in ("mode", "final_mode", "difficulty", "threshold", "why", "switch", "checkpoints", "fault"):
        if name == "difficulty" and not difficulty:
            continue
        assert getattr(found.decision, name) == getattr(mine.decision, name), name


@pytest.mark.parametrize("name", ["one", "out", "into"])
def test_a_policy_of_the_engines(deciding: Deciding, routers: dict[str, Router], name: str) -> None:
    mine = routers[name].generate(PROMPTS, max_tokens=COUNT)
    router = Router(deciding, name)  # type: ignore[arg-type]
    found = router.generate(PROMPTS, max_tokens=COUNT)
    for a, b in zip(found, mine, strict=True):
        same(a, b)
    assert {m.decision.mode for m in mine} == {"fast", "slow"}
    switched = sum(m.decision.switch is not None for m in mine)
    assert router.health()["counts"] == {
        "mode:fast": 3, "mode:slow": 3, "faults": 0, "switches": switched,
    }  # fmt: skip
    assert switched or name == "one"
    decisions = router.decide_many(PROMPTS)
    assert [d.mode for d in decisions] == [m.decision.mode for m in mine]


@pytest.mark.parametrize("mode", ["fast", "slow"])
def test_demanded_modes(deciding: Deciding, engine: TransformersEngine, routers: dict[str, Router], mode: str) -> None:
    fixed = Router(deciding, mode).generate(PROMPTS[:2], max_tokens=8)  # type: ignore[arg-type]
    for a, b in zip(fixed, Router(engine, mode, thinking=PAIR).generate(PROMPTS[:2], max_tokens=8), strict=True):
        same(a, b)
    asked = Router(deciding, "one").generate(PROMPTS[:2], mode=[mode, None], max_tokens=8)  # type: ignore[arg-type]
    for a, b in zip(asked, routers["one"].generate(PROMPTS[:2], mode=[mode, None], max_tokens=8), strict=True):
        same(a, b, difficulty=a.decision.why != "forced")  # here one is read beside those of others
    assert asked[0].decision.why == "forced"


def test_stop_texts(deciding: Deciding, routers: dict[str, Router]) -> None:
    plain = routers["one"].generate(PROMPTS[:4], max_tokens=COUNT)
    assert {p.decision.mode for p in plain} == {"fast", "slow"}
    router = Router(deciding, "one")  # type: ignore[arg-type]
    for stop in (plain[0].text[5:8], plain[1].text[9:12]):
        mine = routers["one"].generate(PROMPTS[:4], max_tokens=COUNT, stop=stop)
        assert "stop" in {m.generation.finish_reason for m in mine}
        for a, b in zip(router.generate(PROMPTS[:4], max_tokens=COUNT, stop=stop), mine, strict=True):
            same(a, b)
        assert deciding.stops[-1] == (stop,)
    router.generate(PROMPTS[:2], max_tokens=8, stop="\n\n")  # which the fast mode's own tokens hold
    assert deciding.stops[-1] == ()


@pytest.mark.parametrize("name", ["out", "into"])
def test_pieces_join_to_the_whole(deciding: Deciding, routers: dict[str, Router], name: str) -> None:
    router = Router(deciding, name)  # type: ignore[arg-type]
    whole = router.generate(PROMPTS, max_tokens=COUNT)
    mine = {(c.index, i): c for i, c in enumerate(routers[name].stream(PROMPTS, max_tokens=COUNT))}
    pieces = list(router.stream(PROMPTS, max_tokens=COUNT))
    for i, routed in enumerate(whole):
        own = [p for p in pieces if p.index == i]
        assert "".join(p.text for p in own) == routed.text
        assert [p.token_id for p in own if p.token_id is not None] == routed.generation.token_ids
        assert own[-1].routed is not None
        same(own[-1].routed, routed)
        theirs = [c.phase for (index, _), c in mine.items() if index == i and c.token_id is not None]
        phases = [p.phase for p in own if p.token_id is not None]
        switch = routed.decision.switch
        if switch is not None and switch.to == "slow":  # told by the phrase's last token, not by its first
            first, behind = switch.token, switch.token + switch.forced
            assert phases[:first] + phases[behind:] == theirs[:first] + theirs[behind:]
        else:
            assert phases == theirs


def test_an_answer_shorter_than_its_mode(deciding: Deciding) -> None:
    found = Router(deciding, "one").decide(PROMPTS[0])  # type: ignore[arg-type]
    assert (found.mode, found.difficulty) == ("fast", pytest.approx(LABELS[0], abs=1e-4))


def _plain() -> Any:
    from kvroute.serving.jobs import Decide

    return Decide(policy="one")


def test_what_the_engine_does_not_say(deciding: Deciding) -> None:
    router = Router(deciding, "one")  # type: ignore[arg-type]
    expected = [r.decision.mode for r in router.generate(PROMPTS[:3], max_tokens=6)]
    deciding.silent = True
    found = router.generate(PROMPTS[:3], max_tokens=6)
    assert [r.decision.mode for r in found] == expected  # as the answers show
    assert all(r.decision.why == "fault" and "said nothing" in str(r.decision.fault) for r in found)
    assert router.health()["faults"] == 3
    deciding.silent, deciding.error = False, "The policy burnt."
    assert router.generate(PROMPTS[0], max_tokens=6).decision.fault == "The policy burnt."
    deciding.error, deciding.refused = None, "A grammar constrains this answer."  # features came, no decision
    assert router.generate(PROMPTS[0], max_tokens=6).decision.fault == "A grammar constrains this answer."


def test_a_pair_of_instructions_stands_in_the_prompt(engine: TransformersEngine) -> None:
    pair = ThinkingMode.instructions()
    deciding = Deciding(engine, {}, pair)
    chat = [{"role": "user", "content": "what?"}]
    for mode in ("fast", "slow"):
        same(
            Router(deciding, mode).generate(chat, max_tokens=6),  # type: ignore[arg-type]
            Router(engine, mode, thinking=pair).generate(chat, max_tokens=6),
        )
    deciding = Deciding(engine, {"one": Router(engine, Policy(kind="random"), thinking=pair)}, pair)
    with pytest.raises(UnsupportedModelError, match="in the question"):
        Router(deciding, "one")  # type: ignore[arg-type]


def test_policies_that_the_engine_does_not_have(deciding: Deciding, tmp_path: Path) -> None:
    made: Any = deciding
    for policy, words in (
        ("other", "has no policy 'other'"),
        ("torn", "'torn' is off: it can't be used"),
        ("random", "has no policy 'random'"),
        (Policy(kind="one-step", tau=40), "not loaded in the engine"),
        (tmp_path / "none.json", "has no policy"),
    ):
        with pytest.raises(InvalidInputError, match=words) as caught:
            Router(made, policy)
        assert "fast, into, one, out, slow" in str(caught.value)
    Policy(kind="one-step", head="elsewhere").save(tmp_path / "same.json")
    assert Router(made, tmp_path / "same.json").served.name == "one"  # type: ignore[union-attr]
    whole = made.about.policies["one"].model_copy(update={"head": "its", "drift": "own"})
    made.about = replace(made.about, policies={**made.about.policies, "one": whole})  # as one of this process has it
    assert Router(made, tmp_path / "same.json").served.name == "one"  # type: ignore[union-attr]
    assert Router(made, Policy(kind="two-step", every=4)).served.name == "out"  # type: ignore[union-attr]
    Policy(kind="one-step", tau=40).save(tmp_path / "another.json")
    with pytest.raises(InvalidInputError, match="kvroute serve"):
        Router(made, str(tmp_path / "another.json"))


def test_what_is_the_engines_alone(deciding: Deciding, engine: TransformersEngine) -> None:
    made: Any = deciding
    for how in ({"head": trained(engine, LABELS)}, {"targets": {"large": engine}}):
        with pytest.raises(InvalidInputError, match="Leave"):
            Router(made, "one", **how)
    with pytest.raises(InvalidInputError, match="other tokens"):
        Router(made, "one", thinking=PAIR.model_copy(update={"slow": "<t>"}))
    router = Router(made, "one", thinking=PAIR.model_copy(update={"name": "mine"}))
    for how in ({"explain": True}, {"last": "fast"}):
        with pytest.raises(InvalidInputError, match="Leave"):
            router.generate("a", **how)
        with pytest.raises(InvalidInputError, match="Leave"):
            router.stream("a", **how)
        with pytest.raises(InvalidInputError, match="Leave"):
            router.decide("a", **how)
    with pytest.raises(InvalidInputError, match="best_of"):
        router.best_of("a")


@pytest.mark.parametrize("thinking", [PAIR, ThinkingMode.instructions()], ids=["tokens", "instructions"])
def test_a_confidence_of_the_engines(
    engine: TransformersEngine, routers: dict[str, Router], thinking: ThinkingMode
) -> None:
    """By the name of its head, in every mode, and the decisions are what they are without it."""

    class Sure(Deciding):
        names: list[str | None] = []  # noqa: RUF012

        def one(self, prompt: TokenIds, options: SamplingOptions, decide: Any, features: Any) -> Generation:
            self.names.append(decide.confidence)
            if decide.mode is None and decide.policy is None:
                return replace(super().one(prompt, options, None, features), served=Result(confidence=Score(0.75)))
            found = super().one(prompt, options, decide, features)
            assert found.served is not None
            return replace(found, served=replace(found.served, confidence=Score(0.75)))

    sure = Sure(engine, routers, thinking)
    for policy in ("fast", "one") if thinking is PAIR else ("fast",):
        router = Router(sure, policy, confidence="sure")  # type: ignore[arg-type]
        plain = Router(Deciding(engine, routers, thinking), policy)  # type: ignore[arg-type]
        asked = [[{"role": "user", "content": p}] for p in PROMPTS[:3]]
        found = router.generate(asked, max_tokens=8)
        for a, b in zip(found, plain.generate(asked, max_tokens=8), strict=True):
            same(a, b)
            assert (a.confidence, a.confidence_reason) == (0.75, None)
            assert b.confidence is None
        assert [c.routed.confidence for c in router.stream(asked, max_tokens=8) if c.routed] == [0.75] * 3
    assert set(sure.names) == {"sure"}
    with pytest.raises(InvalidInputError, match="heads by name"):
        Router(engine, "fast", thinking=PAIR, confidence="sure")


def test_a_confidence_is_read_here(engine: TransformersEngine, deciding: Deciding) -> None:
    right = constant(engine, 70.0, target="correct")
    mine = Router(engine, "fast", thinking=PAIR, confidence=right).generate(PROMPTS[0], max_tokens=6)
    found = Router(deciding, "fast", confidence=right).generate(PROMPTS[0], max_tokens=6)  # type: ignore[arg-type]
    assert found.confidence == mine.confidence is not None
    assert not found.generation.features


def test_cancelled(deciding: Deciding) -> None:
    router = Router(deciding, "one")  # type: ignore[arg-type]
    empty = replace(deciding.generate(
        [TokenIds((5, 6))], options=SamplingOptions(max_tokens=1), decide=[_plain()]
    )[0], token_ids=[], finish_reason="cancelled", served=None)  # fmt: skip
    deciding.generate = lambda *_, **__: [empty]  # type: ignore[method-assign,assignment]
    found = router.generate(PROMPTS[0], max_tokens=6, cancel=CancelToken())
    assert (found.text, found.generation.finish_reason) == ("", "cancelled")
    assert "cancelled" in str(found.decision.fault)
