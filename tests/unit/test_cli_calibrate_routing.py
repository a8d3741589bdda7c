"""``kvroute calibrate --routing`` on a tiny model: the policy, its certificate, its drift reference, and refusals."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest

from kvroute import PoolingSpec, TransformersEngine
from kvroute.candidates import one_step_candidate, run_candidate
from kvroute.drift import DriftMonitor
from kvroute.guarantee import Certificate
from kvroute.heads import DifficultyHead
from kvroute.label_rows import LabelRow, usable, write_meta
from kvroute.policy import Policy
from kvroute.router import Router
from kvroute.routing_curves import Modes
from label_data import label_meta, label_rows, ridge_head

SPEC = PoolingSpec(layers="all", part="v", heads="concat", layer_reduce="concat")
Run = Callable[..., tuple[int, str, str]]


@pytest.fixture(scope="module")
def model(tiny_folder: Callable[[str], str]) -> str:
    return tiny_folder("llama")


@pytest.fixture(scope="module")
def engine(model: str) -> TransformersEngine:
    return TransformersEngine.from_pretrained(model, dtype="float32")


@pytest.fixture(scope="module")
def rows() -> list[LabelRow]:
    """1,200 of which a fifth are for calibration."""
    made = label_rows(1200, seed=4)
    return [r.model_copy(update={"part": "calibration"}) if r.part == "test" else r for r in made]


@pytest.fixture(scope="module")
def head(engine: TransformersEngine, rows: list[LabelRow]) -> DifficultyHead:
    made = ridge_head(engine, rows, SPEC)
    return replace(made, windows=made)


@pytest.fixture(scope="module")
def files(
    tmp_path_factory: pytest.TempPathFactory, rows: list[LabelRow], head: DifficultyHead, engine: TransformersEngine
) -> Path:
    folder = tmp_path_factory.mktemp("files")
    labels = folder / "labels.jsonl"
    labels.write_text("".join(r.model_dump_json() + "\n" for r in rows))
    write_meta(labels, label_meta(engine, max_tokens={"fast": 24, "slow": 48}))
    head.save(folder / "heads/easy")
    return folder


def arguments(files: Path, model: str, out: Path, *more: object) -> list[object]:
    return [
        "calibrate", "--routing", files / "labels.jsonl", "--head", files / "heads/easy", "-o", out, "--model", model,
        "--dtype", "float32", *more,
    ]  # fmt: skip


def test_a_policy_is_found_and_can_be_used(
    run: Run, files: Path, model: str, engine: TransformersEngine, head: DifficultyHead, rows: list[LabelRow]
) -> None:
    out = files / "policies/cheap.json"
    code, said, err = run(*arguments(files, model, out, "--max-loss", 20, "--delta", 0.2, "--json"))
    assert code == 0, err
    found = json.loads(said)
    policy = Policy.load(out)
    assert policy.model_dump(mode="json") == {k: v for k, v in found.items() if k not in ("holds", "out")}
    assert found["holds"] is True
    assert policy.kind == "one-step"
    assert policy.guarantee is not None
    text = policy.guarantee.pop("text")
    certificate = Certificate.model_validate(policy.guarantee)
    assert text == str(certificate)
    assert certificate.chosen is not None
    chosen = certificate.candidates[certificate.chosen]
    calibration = usable(rows, "calibration")
    assert certificate.n == len(calibration)
    assert certificate.skeletons == len({r.skeleton for r in calibration})
    difficulty = head.predict(engine.pool([list(r.prompt_ids) for r in calibration], [SPEC], progress=False)[0])
    by_hand = one_step_candidate(difficulty, calibration, policy.tau, policy.give_up)
    base = Modes.of(calibration).slow
    assert chosen.loss == pytest.approx(100 * float((base.right - by_hand.right).mean()))
    assert chosen.tokens == pytest.approx(by_hand.tokens.mean())
    assert chosen.saved > 0
    assert chosen.p_value <= 0.2
    assert policy.drift == "cheap.drift.safetensors"
    assert DriftMonitor.load(out.parent / policy.drift, engine.info.fingerprint).health().status == "quiet"
    router = Router.load(engine, out)  # finds head and drift reference by the file
    assert router.generate("a question", max_tokens=4).decision.policy == "one-step"
    assert router.health()["drift"]["n"] == 1


def test_the_table_says_it_all_and_a_file_is_not_replaced(run: Run, files: Path, model: str) -> None:
    out = files / "policies/table.json"
    options = arguments(files, model, out, "--max-loss", 20, "--max-slow", 0.9, "--candidates", 6)
    code, said, err = run(*options)
    assert code == 0, err
    assert "certified" in said
    assert "at most 20 points of accuracy below always slow and at most 90 % of the questions slow" in said
    assert f"Saved to {out}" in said
    code, _, err = run(*options)
    assert code == 2
    assert "--force" in err
    assert run(*options, "--force")[0] == 0


def test_what_can_not_be_promised_gives_always_slow(run: Run, files: Path, model: str) -> None:
    out = files / "policies/strict.json"
    code, said, err = run(*arguments(files, model, out, "--max-loss", 0.001, "--json"))
    assert code == 0, err
    policy = Policy.load(out)
    assert (policy.kind, policy.head, policy.drift) == ("slow", None, None)
    assert policy.guarantee is not None
    assert policy.guarantee["chosen"] is None
    assert "Always slow" in policy.guarantee["text"]
    out = files / "policies/few.json"
    code, said, err = run(*arguments(files, model, out, "--max-tokens", 0.5, "--json"))
    assert json.loads(said)["holds"] is False


def test_two_steps_are_run(run: Run, files: Path, model: str, rows: list[LabelRow], head: DifficultyHead) -> None:
    few = files / "few"
    few.mkdir()
    kept = [*usable(rows, "validation")[:40], *usable(rows, "calibration")[:24]]
    (few / "labels.jsonl").write_text("".join(r.model_dump_json() + "\n" for r in kept))
    engine = TransformersEngine.from_pretrained(model, dtype="float32")
    meta = label_meta(engine, max_tokens={"fast": 6, "slow": 12})
    write_meta(few / "labels.jsonl", meta)
    head.save(few / "heads/easy")
    out = few / "two.json"
    code, said, err = run(
        *arguments(few, model, out, "--max-loss", 90, "--policy", "two-step", "--candidates", 2, "--json", "-q")
    )
    assert code == 0, err
    guarantee = json.loads(said)["guarantee"]
    assert guarantee["n"] == 24
    for report in guarantee["candidates"]:
        assert report["policy"]["kind"] == "two-step"
        policy = Policy(**{k: v for k, v in report["policy"].items() if k != "head"})
        again = run_candidate(Router(engine, policy, head=head, thinking=meta.thinking), kept[40:], meta, chunk=5)
        assert report["tokens"] == pytest.approx(again.tokens.mean())
        assert report["slow"] == pytest.approx(again.slow.mean())
        assert 0 < report["tokens"] <= 12


@pytest.mark.parametrize(
    ("more", "said"),
    [
        (["--max-loss", "0"], "points of accuracy"),
        ([], "Nothing is promised"),
        (["--max-loss", "1", "--delta", "1"], "--delta"),
        (["--max-loss", "1", "--policy", "three-step"], "three-step"),
        (["--max-tokens", "100"], "48"),
        (["--max-loss", "1", "--confidence", "x.jsonl"], "one of the two"),
    ],
)
def test_what_makes_no_sense_is_refused(run: Run, files: Path, model: str, more: list[str], said: str) -> None:
    code, _, err = run(*arguments(files, model, files / "never.json", *more))
    assert code == 2
    assert said in err
    assert not (files / "never.json").exists()


def test_one_half_at_a_time(run: Run, files: Path) -> None:
    code, _, err = run("calibrate", "-o", files / "x.json")
    assert code == 2
    assert "--confidence or --routing" in err
    code, _, err = run("calibrate", "--routing", files / "labels.jsonl", "-o", files / "x.json", "--max-loss", 1)
    assert code == 2
    assert "--head" in err
    code, _, err = run("calibrate", "--confidence", files / "labels.jsonl", "-o", files / "x.json", "--max-loss", 1)
    assert code == 2
    assert "--routing" in err
