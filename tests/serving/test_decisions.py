"""Decisions in a real vLLM engine on CPU: the tiny thinker writes what it writes under the same policy on transformers.

Both run in float32 and greedily. Their logits and difficulties differ by rounding alone, so a token or a mode may
differ only where two are as good as even; :meth:`Thinker.check` lets one such tie pass and says how near it must be.
"""

from __future__ import annotations

import json
import shutil
import sys
from collections import Counter
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

from kvroute import AnswerPooling, ChainSpec, Policy, PoolingSpec, Router, TransformersEngine
from kvroute.confidence_maps import LogisticMap
from kvroute.heads.head import DifficultyHead
from kvroute.heads.models import RidgeModel
from kvroute.info import ModelInfo
from kvroute.serving.deciding import NOT_FORCED
from tests.serving.processes import ROOT, run_module
from tests.serving_files import a_head

pytestmark = pytest.mark.vllm
THINKER = ROOT / "examples/tiny_thinker"
COUNTS = {
    "vllm:request_prefill_kv_computed_tokens": "prefilled",
    "vllm:prompt_tokens": "prompt",
    "vllm:generation_tokens": "written",
    "vllm:num_preemptions": "preemptions",
}
LIMIT = 100
PENALTY = 2.5
TIE = 1e-3
"""Logits, and points of difficulty, that count as even."""


def middle(values: list[float]) -> float:
    """A threshold between values, far from each: in the widest gap of their middle half."""
    ordered = sorted(values)
    inner = ordered[len(ordered) // 4 : max(len(ordered) // 4 + 2, 3 * len(ordered) // 4)]
    gap = max(range(len(inner) - 1), key=lambda i: inner[i + 1] - inner[i])
    return (inner[gap] + inner[gap + 1]) / 2


class Thinker:
    """The tiny thinker on transformers: questions, policies on disk, and what each question gets under each."""

    def __init__(self, folder: Path) -> None:
        sys.path.insert(0, str(THINKER))
        from questions import make_questions  # type: ignore[import-not-found]

        self.engine = TransformersEngine.from_pretrained(THINKER / "model", dtype=torch.float32)
        self.close = self.engine.tokenizer.convert_tokens_to_ids("</think>")
        self.folder = folder
        shutil.copytree(THINKER / "head", folder / "head")
        head = DifficultyHead.load(folder / "head", self.engine.info)
        chats = [[{"role": "user", "content": q["question"]}] for q in make_questions(30, 515)]
        difficulties = Router(self.engine, Policy(kind="one-step"), head=head).decide_many(chats)
        tau = middle([d.difficulty for d in difficulties if d.difficulty is not None])
        looking = Policy(kind="two-step", tau=tau, tau_fast=-1, tau_slow=101, every=4)  # looks, and never switches
        seen: dict[str, list[float]] = {"fast": [], "slow": []}
        for routed in Router(self.engine, looking, head=head).generate(chats, max_tokens=LIMIT, temperature=0.0):
            least = min if routed.decision.mode == "slow" else max
            if routed.decision.checkpoints:
                seen[routed.decision.mode].append(least(d for _, d in routed.decision.checkpoints))
        self.policies = {
            "one": Policy(kind="one-step", tau=tau, head="head"),
            "two": looking.model_copy(
                update={"tau_fast": middle(seen["slow"]), "tau_slow": middle(seen["fast"]), "head": "head"}
            ),
            "slow": Policy(kind="slow"),
            "random": Policy(kind="random", seed=4),
        }
        self.policies["penalized"] = self.policies["two"]
        self.confidence = _confidence(self.engine.info)
        self.confidence.save(folder / "heads" / "right")
        self.routed = {}
        for name, policy in self.policies.items():
            policy.save(folder / f"{name}.json")
            router = Router(
                self.engine, policy, head=head if policy.reads_difficulty else None, confidence=self.confidence
            )
            requests = router._requests(chats, None, None)
            self.prompts = [r.layout.base for r in requests]
            self.suffixes = {"fast": requests[0].layout.fast, "slow": requests[0].layout.slow}
            self.routed[name] = router.generate(
                chats,
                max_tokens=LIMIT,
                temperature=0.0,
                repetition_penalty=self._penalty(name),
                features={"answer": AnswerPooling(PoolingSpec(layers="last:2")), "chain": ChainSpec()},
            )

    def check(self, name: str, answers: list[dict]) -> Counter[str]:
        """Answers and decisions of a server, one a prompt, are those of the router."""
        seen: Counter[str] = Counter()
        for prompt, routed, got in zip(self.prompts, self.routed[name], answers, strict=True):
            decision, result = routed.decision, got["result"]
            assert result["error"] is None
            found = result["decision"]
            expected = [*self.suffixes[decision.mode], *routed.generation.token_ids]
            there = got["answers"][0][: len(expected)]
            assert found["fault"] is None
            if found["mode"] != decision.mode:
                threshold = self.policies[name].tau
                assert decision.difficulty == pytest.approx(threshold, abs=TIE)
                seen["tie"] += 1
                continue
            if there != expected[: len(there)] or len(there) < min(len(expected), LIMIT):
                assert self._even(prompt, expected, there, self._penalty(name)), (expected, there)
                seen["tie"] += 1
                continue
            assert (found["why"], found["policy"]) == (decision.why, decision.policy)
            if decision.difficulty is not None:
                assert found["difficulty"] == pytest.approx(decision.difficulty, abs=TIE)
            assert [c[0] for c in found["checkpoints"]] == [c[0] for c in decision.checkpoints]
            np.testing.assert_allclose(
                [c[1] for c in found["checkpoints"]], [c[1] for c in decision.checkpoints], atol=TIE
            )
            switch = decision.switch
            assert (found["switch"] is None) == (switch is None)
            if switch is not None:
                assert (found["switch"]["to"], found["switch"]["token"]) == (switch.to, switch.token)
                assert found["switch"]["forced"] == switch.forced
                seen[f"to {switch.to}"] += 1
            seen[decision.mode] += 1
        assert seen["tie"] <= 1
        return seen

    def _even(self, prompt: list[int], expected: list[int], there: list[int], penalty: float) -> bool:
        """Whether two answers part where both tokens are as likely."""
        place = next(i for i, (a, b) in enumerate(zip(expected, there, strict=False)) if a != b)
        before = [*prompt, *expected[:place]]
        with torch.no_grad():
            logits = self.engine.model(torch.tensor([before])).logits[0, -1]
        seen = logits[before]
        logits[before] = torch.where(seen < 0, seen * penalty, seen / penalty)
        return float(logits.max() - logits[there[place]]) < TIE

    @staticmethod
    def _penalty(name: str) -> float:
        return PENALTY if name == "penalized" else 1.0


def _confidence(info: ModelInfo) -> DifficultyHead:
    """A head for the model with random weights: what it says means nothing, and differs by answer."""
    spec = PoolingSpec(layers="last:2", part="v", heads="concat")
    blank = a_head(info, spec)
    weight = np.random.default_rng(0).standard_normal(blank.predictor.dim).astype(np.float32)
    ones = np.ones_like(weight)
    return replace(
        blank,
        target="correct",
        predictor=RidgeModel(0 * ones, ones, weight, np.array([0.5])),
        map=LogisticMap(means=(0.5,), scales=(1.0,), coefficients=(1.5,), intercept=0.1),
    )


@pytest.fixture(scope="module")
def thinker(tmp_path_factory) -> Thinker:
    return Thinker(tmp_path_factory.mktemp("policies"))


def serve(thinker: Thinker, folder: Path, engine: dict, jobs: list[dict]) -> tuple[list[list[dict]], list[dict]]:
    """What requests got, and by job the engine's own counts."""
    out = folder / "out.json"
    jobs = [
        {
            "prompts": thinker.prompts,
            **job,
            "params": {"max_tokens": LIMIT, "ignore_eos": False, **job.get("params", {})},
        }
        for job in jobs
    ]
    job = {
        "engine": {"disable_log_stats": False, "max_num_seqs": 32, **engine},
        "extra": {"policies": str(thinker.folder), "heads": str(thinker.folder / "heads"), "strict": True},
        "jobs": jobs,
        "counts": list(COUNTS),
    }
    run_module("tests.serving.run_connector", str(THINKER / "model"), str(out), json.dumps(job))
    counts = json.loads(out.with_name("out.counts.json").read_text())
    return json.loads(out.read_text()), [{COUNTS[k]: v for k, v in c.items()} for c in counts]


def test_the_same_answers_as_on_transformers(thinker, tmp_path):
    many = len(thinker.prompts)
    features = {"answer": {"of": "answer", "layers": "last:2"}, "chain": "kv-coe"}
    alone = {"prompts": [thinker.prompts[0]] * 2}
    mixed = [{"policy": "one"}, {"policy": "two"}, None, {"policy": "random"}, {"mode": "fast"}]
    jobs = [
        {"asks": [{"policy": "one"}] * many},
        {"asks": [{"policy": "two", "features": features, "confidence": "right"}] * many},
        {"asks": [None] * many},
        {"asks": [{"policy": "two", "shadow": True}] * many, "args": {"kvroute_rid": "someone"}},
        {"asks": [mixed[i % 5] for i in range(many)]},
        {"asks": [{"policy": "one"}] * 3, "prompts": thinker.prompts[:3], "params": {"max_tokens": 1}},
        {
            "asks": [{"policy": "two"}],
            "prompts": thinker.prompts[:1],
            "params": {"n": 3, "temperature": 1.5, "max_tokens": 20},
        },
        {
            "asks": [{"policy": "one"}],
            "prompts": thinker.prompts[:1],
            "params": {"frequency_penalty": 2.0, "repetition_penalty": 5.0, "max_tokens": 12, "temperature": 0.7},
        },
        {"asks": [{"policy": "penalized"}] * many, "params": {"repetition_penalty": PENALTY}},
        {
            "asks": [{"policy": "two"}] * many,
            "params": {"presence_penalty": 2.0, "frequency_penalty": 2.0, "repetition_penalty": 5.0, "max_tokens": 40},
        },
        *({"asks": [{"policy": "slow"}, None], **alone, "params": {"thinking_token_budget": n}} for n in (3, 0)),
        {"asks": [{"policy": "slow"}], "prompts": thinker.prompts[:1]},
    ]
    engine = {
        "max_num_batched_tokens": 64,
        "enable_prefix_caching": False,
        "reasoning_config": {"reasoning_start_str": "<think>", "reasoning_end_str": "</think>"},
    }
    got, counts = serve(thinker, tmp_path, engine, jobs)
    one, two, plain, shadow, both, single, three, penalties, penalized, presence, short, none, slow = got

    seen = thinker.check("one", one)
    assert seen["fast"] > 2
    assert seen["slow"] > 2
    seen = thinker.check("two", two)
    assert seen["to fast"] > 0
    assert seen["to slow"] > 0
    compared = 0
    for answer, routed in zip(two, thinker.routed["two"], strict=True):
        if answer["answers"][0] == [
            *thinker.suffixes[routed.decision.mode],
            *routed.generation.token_ids,
        ]:
            compared += 1
            vector = routed.generation.features["answer"]
            np.testing.assert_allclose(answer["result"]["features"]["answer"], vector, atol=1e-4 * np.abs(vector).max())
            assert answer["result"]["confidence"]["value"] == pytest.approx(routed.confidence, abs=1e-4)
            for name in ("kv_coe_r_token", "kv_coe_c_token"):
                value = routed.generation.scores[name].value
                assert answer["result"]["scores"][name]["value"] == pytest.approx(value, rel=1e-3, abs=1e-4)

    assert compared > 20
    assert np.std([a["result"]["confidence"]["value"] for a in two]) > 0.01

    # no prompt went through the model twice: that is what the engine itself counted
    whole = sum(map(len, thinker.prompts))
    for before, after, answers in zip([dict.fromkeys(COUNTS.values(), 0), *counts], counts, got[:5], strict=False):
        written = sum(len(a["answers"][0]) for a in answers)
        assert after["prompt"] - before["prompt"] == whole
        assert after["prefilled"] - before["prefilled"] == whole
        assert after["written"] - before["written"] == written

    for i, (alone, watched) in enumerate(zip(plain, shadow, strict=True)):
        assert watched["answers"] == alone["answers"]
        assert alone["result"] is None
        decision = watched["result"]["decision"]
        assert (decision["why"], decision["proposed"]) == ("shadow", thinker.routed["two"][i].decision.mode)
        begins = {m: alone["answers"][0][: len(s)] == s for m, s in thinker.suffixes.items()}
        assert decision["mode"] == ("slow" if begins["slow"] and not begins["fast"] else "fast")

    for i, answer in enumerate(both):
        ask = mixed[i % 5]
        if ask is None:
            assert answer["answers"] == plain[i]["answers"]
        elif ask.get("policy") in ("one", "two"):
            name = ask["policy"]
            assert answer["answers"] == (one if name == "one" else two)[i]["answers"]
        elif ask.get("mode") == "fast":
            assert answer["answers"][0][: len(thinker.suffixes["fast"])] == thinker.suffixes["fast"]
            assert answer["result"]["decision"]["why"] == "forced"
        else:
            assert answer["result"]["decision"]["mode"] == thinker.routed["random"][i].decision.mode

    for answer, whole_answer in zip(single, one, strict=False):
        assert answer["answers"][0] == whole_answer["answers"][0][:1]
        assert answer["result"]["decision"]["mode"] == whole_answer["result"]["decision"]["mode"]
    mode = two[0]["result"]["decision"]["mode"]
    for tokens in three[0]["answers"]:
        assert tokens[: len(thinker.suffixes[mode])] == thinker.suffixes[mode]
    mode = one[0]["result"]["decision"]["mode"]
    assert penalties[0]["answers"][0][: len(thinker.suffixes[mode])] == thinker.suffixes[mode]

    # penalties count the tokens that were forced, as a router's own
    seen = thinker.check("penalized", penalized)
    assert seen["to fast"] + seen["to slow"] > 0
    assert sum(a["answers"] != b["answers"] for a, b in zip(penalized, two, strict=True)) > 5
    # and no penalty keeps one from being forced: a decision would say so in its fault
    decisions = [answer["result"]["decision"] for answer in presence]
    assert {d["fault"] for d in decisions} == {None}
    assert any(d["switch"] is not None and d["switch"]["forced"] for d in decisions)

    # vLLM's own budget of thinking tokens comes last: it closes our thought where it closes any, and where that falls
    # among the mode's own tokens these are overruled, which the decision says
    begin = thinker.suffixes["slow"]
    whole_thought = slow[0]["answers"][0].index(thinker.close)
    for budget, answers in ((3, short), (0, none)):
        ours, theirs = (a["answers"][0] for a in answers)
        assert ours.index(thinker.close) == 1 + budget < whole_thought
        assert theirs.index(thinker.close) - theirs.index(begin[0]) == 1 + budget
        decision = answers[0]["result"]["decision"]
        assert (decision["mode"], decision["fault"]) == ("slow", None if budget else NOT_FORCED)
        assert ours[: len(begin)] == begin if budget else ours[: len(begin)] != begin


def test_preemption_and_a_tiny_cache(thinker, tmp_path):
    jobs = [{"asks": [{"policy": "two"}] * len(thinker.prompts)}]
    engine = {"block_size": 32, "num_gpu_blocks_override": 25, "max_model_len": 256, "max_num_batched_tokens": 128}
    (two,), counts = serve(thinker, tmp_path, engine, jobs)
    assert counts[0]["preemptions"] > 0
    thinker.check("two", two)


@pytest.mark.slow
def test_tensor_parallel(thinker, tmp_path, monkeypatch):
    monkeypatch.setenv("VLLM_CPU_OMP_THREADS_BIND", "0|1")
    jobs = [{"asks": [{"policy": "two"}] * len(thinker.prompts)}]
    (two,), _ = serve(thinker, tmp_path, {"tensor_parallel_size": 2}, jobs)
    thinker.check("two", two)
