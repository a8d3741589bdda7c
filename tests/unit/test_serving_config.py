"""A server's settings: what is refused at start, what is off and says why, and which names there are."""

from __future__ import annotations

import json
import logging
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from kvroute import DifficultyHead, DriftMonitor, InvalidInputError, Policy
from kvroute.errors import AskError
from kvroute.serving.asks import read_ask
from kvroute.serving.config import ServingConfig
from serving_files import INFO, a_head, an_info, write_policy


@pytest.fixture
def folders(tmp_path: Path) -> Iterator[dict[str, Any]]:
    """Two policies and a head for confidence."""
    write_policy(tmp_path / "policies", "one")
    write_policy(tmp_path / "policies" / "two")
    a_head(target="correct").save(tmp_path / "heads" / "right")
    yield {"policies": str(tmp_path / "policies"), "heads": str(tmp_path / "heads")}  # noqa: PT022 - typed as the others


def test_an_empty_one() -> None:
    for extra in (None, {}):
        config = ServingConfig.read(extra)
        assert (config.policies, config.default_ask, config.info) == (None, None, None)
        assert (config.max_features, config.max_vector, config.max_ask_bytes) == (8, 65536, 16384)
        assert config.catalog.off == []


def test_names_are_found_in_both_ways(folders: dict[str, Any]) -> None:
    config = ServingConfig.read(json.loads(json.dumps(folders)))
    assert sorted(config.catalog.policies) == ["one", "two"]
    assert sorted(config.catalog.heads) == ["right"]
    served = config.catalog.policy("two")
    assert served.policy.kind == "two-step"
    assert served.head is not None
    assert served.head.windows is not None
    assert served.drift is not None
    assert config.catalog.off == []


def test_the_demo_policy_is_served() -> None:
    folder = Path(__file__).parents[2] / "examples" / "tiny_thinker"
    config = ServingConfig.read({"policies": str(folder), "strict": True, "default": {"policy": "policy"}})
    assert config.default_ask is not None
    assert config.default_ask.policy == "policy"


@pytest.mark.parametrize(
    ("extra", "message", "hint"),
    [
        ({"polices": "x"}, "no setting 'polices'", "Did you mean 'policies'"),
        ({"max_feature": 1}, "no setting 'max_feature'", "Did you mean 'max_features'"),
        ({3: 1}, "no setting a int", "There are:"),
        ({"x" * 10**6: 1}, "no setting 'xxx", "There are:"),
        (["policies"], "is a dict of settings, not a list", ""),
        ({"max_features": 0}, "max_features", ""),
        ({"max_features": "8"}, "max_features", ""),
        ({"max_features": True}, "max_features", ""),
        ({"max_vector": 1.5}, "max_vector", ""),
        ({"strict": "yes"}, "strict", ""),
        ({"policies": 3}, "policies", ""),
        ({"policies": "/nowhere/at/all"}, "can't be listed", "as the server sees it"),
        ({"default": ["kv-coe"]}, "default", ""),
        ({"default": {"features": ["kv-cow"]}}, "default ask can't be done: No feature", "Did you mean 'kv-coe'"),
        ({"default": {"policy": "none"}}, "default ask can't be done: No policy", "has no policies"),
    ],
)
def test_what_makes_no_sense_is_refused(extra: Any, message: str, hint: str) -> None:
    with pytest.raises(InvalidInputError) as caught:
        ServingConfig.read(extra)
    assert message in caught.value.message
    assert hint in (caught.value.hint or "")
    assert len(str(caught.value)) < 600


def torn(path: Path) -> None:
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])


def changed(path: Path) -> None:
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 0xFF
    path.write_bytes(bytes(data))


@pytest.mark.parametrize(
    "spoil", [torn, changed, Path.unlink, lambda p: p.write_bytes(b""), lambda p: p.write_text("[]")]
)
@pytest.mark.parametrize(
    "name",
    [
        "policies/two/policy.json",
        "policies/two/policy.drift.safetensors",
        "policies/two/head/head.json",
        "policies/two/head/head.safetensors",
        "policies/two/head/windows/head.json",
        "heads/right/head.json",
        "heads/right/head.safetensors",
    ],
)
def test_a_spoilt_file_costs_its_own_name(
    folders: dict[str, Any], tmp_path: Path, name: str, spoil: Any, caplog: pytest.LogCaptureFixture
) -> None:
    spoil(tmp_path / name)
    with caplog.at_level(logging.WARNING):
        config = ServingConfig.read(folders)
    assert "one" in config.catalog.policies
    what, bad = ("policy", "two") if name.startswith("policies") else ("head", "right")
    served = config.catalog.policies if what == "policy" else config.catalog.heads
    assert bad not in served
    asked = {"kvroute": {"policy": bad} if what == "policy" else {"confidence": bad}}
    with pytest.raises(AskError) as caught:
        read_ask(asked, config)
    assert str(tmp_path) not in str(caught.value)
    assert caught.value.hint
    if (tmp_path / name).is_file() or "head.safe" in name or "windows" in name or "drift" in name:
        assert f"The {what} {bad!r} is off: its files can't be read." == caught.value.message
        assert [r for r in caplog.messages if f"The {what} {bad!r} is off" in r]
        with pytest.raises(InvalidInputError, match="is off"):
            ServingConfig.read({**folders, "strict": True})


def test_a_broken_default_is_told_to_each_request(folders: dict[str, Any], tmp_path: Path) -> None:
    torn(tmp_path / "policies" / "one.json")
    config = ServingConfig.read({**folders, "default": {"policy": "one"}})
    for _ in range(2):
        with pytest.raises(AskError, match="is off"):
            read_ask(None, config)
    assert read_ask({"kvroute": {}}, config) is None
    with pytest.raises(InvalidInputError, match="is off"):
        ServingConfig.read({**folders, "default": {"policy": "one"}, "strict": True})


@pytest.mark.parametrize(
    ("policy", "head", "reason"),
    [
        (Policy(), None, "there is no head"),
        (Policy(head="head"), a_head(target="correct"), "target 'correct'"),
        (Policy(kind="two-step", head="head"), a_head(), "no part for that"),
        (Policy(thresholds=(1.0, 2.0), targets=("fast", "slow", "big"), head="head"), a_head(), "targets other than"),
    ],
)
def test_a_policy_that_lacks_something_is_off(
    tmp_path: Path, policy: Policy, head: DifficultyHead | None, reason: str
) -> None:
    policy.save(tmp_path / "p" / "policy.json")
    if head is not None:
        head.save(tmp_path / "p" / "head")
    Policy(kind="slow").save(tmp_path / "slow.json")
    config = ServingConfig.read({"policies": str(tmp_path)})
    assert list(config.catalog.policies) == ["slow"]
    assert reason in config.catalog.policies_off["p"].public


def test_a_head_of_another_model_is_off(folders: dict[str, Any], tmp_path: Path) -> None:
    other = an_info("other")
    shutil.rmtree(tmp_path / "policies" / "two")
    write_policy(tmp_path / "policies" / "two", info=other)
    config = ServingConfig.read(folders)
    assert sorted(config.catalog.policies) == ["one", "two"]
    here = config.for_model(INFO)
    assert list(here.catalog.policies) == ["one"]
    assert list(here.catalog.heads) == ["right"]
    with pytest.raises(AskError, match="it was made for another model") as caught:
        read_ask({"kvroute": {"policy": "two"}}, here)
    assert "/srv" not in str(caught.value)
    assert list(config.for_model(other).catalog.policies) == ["two"]
    assert sorted(config.for_model(an_info("unknown"), fingerprints=False).catalog.policies) == ["one", "two"]
    sizes = config.for_model(an_info(layers=5), fingerprints=False).catalog
    assert not sizes.policies
    assert "takes 64 numbers, and this model gives 80" in sizes.policies_off["one"].public
    with pytest.raises(InvalidInputError, match="is off"):
        ServingConfig.read({**folders, "strict": True}).for_model(INFO)
    assert config.info is None
    assert config.for_model(INFO).info == INFO


def test_a_drift_reference_of_another_model(folders: dict[str, Any], tmp_path: Path) -> None:
    random = np.random.default_rng(0)
    DriftMonitor.fit(random.random(200), fingerprint="0" * 16).save(tmp_path / "policies" / "one.drift.safetensors")
    here = ServingConfig.read(folders).for_model(INFO)
    assert list(here.catalog.policies) == ["two"]


def test_the_default_is_checked_against_the_model() -> None:
    config = ServingConfig.read({"default": {"features": {"mine": {"layers": [9]}}}})
    assert config.default_ask is not None
    with pytest.raises(InvalidInputError, match="default ask can't be done: Layer 9"):
        config.for_model(INFO)


def test_a_head_that_two_policies_use_is_read_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    a_head().save(tmp_path / "head")
    for name in ("a", "b"):
        Policy(head="head").save(tmp_path / f"{name}.json")
    read: list[Path] = []
    load = DifficultyHead.load
    monkeypatch.setattr(DifficultyHead, "load", lambda folder: read.append(folder) or load(folder))
    catalog = ServingConfig.read({"policies": str(tmp_path)}).catalog
    assert catalog.policy("a").head is catalog.policy("b").head
    assert len(read) == 1


def test_a_fault_of_any_kind_stays_with_its_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    Policy(kind="slow").save(tmp_path / "a.json")
    Policy(kind="fast").save(tmp_path / "b.json")
    load = Policy.load

    def fails(path: Path) -> Policy:
        if path.stem == "a":
            raise MemoryError("/srv/secret")
        return load(path)

    monkeypatch.setattr(Policy, "load", fails)
    config = ServingConfig.read({"policies": str(tmp_path)})
    assert list(config.catalog.policies) == ["b"]
    assert config.catalog.policies_off["a"].public == "it can't be used"


def test_hidden_and_odd_names_are_no_policies(tmp_path: Path) -> None:
    for name in (".hidden.json", "a b.json", "-x.json", "good.json", "note.txt"):
        Policy(kind="slow").save(tmp_path / name)
    assert list(ServingConfig.read({"policies": str(tmp_path)}).catalog.policies) == ["good"]
