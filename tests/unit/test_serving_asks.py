"""What anybody who reaches a server may send: an ask, nothing, or our error with a hint; and never anything else."""

from __future__ import annotations

import json
import pickle
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st

from kvroute import ChainSpec, PoolingSpec
from kvroute.errors import AskError
from kvroute.info import LayerInfo, ModelInfo
from kvroute.pooling import PRESETS
from kvroute.serving.asks import FEATURES, Ask, PooledFeature, read_ask
from kvroute.serving.config import ServingConfig
from serving_files import INFO, a_head, write_policy

PLAIN = ServingConfig()
OTHERS = {"do_remote_prefill": True, "remote_block_ids": [1, 2], "remote_host": "h"}


@pytest.fixture(scope="module")
def config(tmp_path_factory: pytest.TempPathFactory) -> ServingConfig:
    """Policies ``support`` and ``plain``, heads ``right`` and ``hard``."""
    folder = tmp_path_factory.mktemp("serving")
    write_policy(folder / "policies", "support")
    write_policy(folder / "policies" / "plain")
    a_head(target="correct").save(folder / "heads" / "right")
    a_head().save(folder / "heads" / "hard")
    found = ServingConfig.read({"policies": str(folder / "policies"), "heads": str(folder / "heads")})
    assert found.catalog.off == []
    return found.for_model(INFO)


def ask(value: Any, config: ServingConfig = PLAIN) -> Ask | None:
    return read_ask({"kvroute": value, **OTHERS}, config)


# ---------------------------------------------------------------------- what is read


def test_features_by_name() -> None:
    found = ask({"features": ["prompt:paper-mteb", "answer:fast", "kv-coe", "length", "length"]})
    assert found is not None
    plan = found.plan
    assert plan.pooled == {
        "prompt:paper-mteb": ("prompt", PRESETS["paper-mteb"]),
        "answer:fast": ("answer", PRESETS["fast"]),
    }
    assert (plan.chain, plan.length, plan.logits) == (ChainSpec(), True, False)
    assert found.plan is plan


@pytest.mark.parametrize("name", FEATURES)
def test_every_feature_that_has_a_name_is_planned(name: str) -> None:
    found = ask({"features": [name]})
    assert found is not None
    assert not found.plan.empty


def test_features_by_spec() -> None:
    given = {"mine": {"of": "answer", "layers": [0, -1], "part": "v"}, "again": "prompt:best", "plain": {}}
    found = ask({"features": given})
    assert found is not None
    assert found.plan.pooled == {
        "mine": ("answer", PoolingSpec(layers=(0, -1), part="v")),
        "again": ("prompt", PRESETS["best"]),
        "plain": ("prompt", PoolingSpec()),
    }
    assert type(found.plan.pooled["mine"][1]) is PoolingSpec


def test_names_of_policies_and_heads(config: ServingConfig) -> None:
    found = ask({"policy": "support", "shadow": True, "confidence": "right"}, config)
    assert found == Ask(policy="support", shadow=True, confidence="right")
    assert ask({"policy": "plain", "mode": "fast"}, config) == Ask(policy="plain", mode="fast")
    assert ask({"mode": "slow"}) == Ask(mode="slow")


@pytest.mark.parametrize(
    "params", [None, {}, OTHERS, {"kvroute": None}, {"kvroute": {}}, {"kvroute": {"features": []}}]
)
def test_nothing_asked(params: Any) -> None:
    assert read_ask(params, PLAIN) is None


def test_the_default_is_for_those_that_ask_nothing() -> None:
    config = ServingConfig.read({"default": {"features": ["length"]}})
    for params in (None, {}, OTHERS, {"kvroute": None}):
        assert read_ask(params, config) == Ask(features={"length": "length"})
    assert read_ask({"kvroute": {}}, config) is None
    assert read_ask({"kvroute": {"mode": "fast"}}, config) == Ask(mode="fast")


def test_it_travels(config: ServingConfig) -> None:
    given = {"features": {"a": {"of": "answer", "layers": 0.5}, "b": "kv-coe"}, "policy": "support", "shadow": True}
    found = ask(given, config)
    assert found is not None
    sent = pickle.loads(pickle.dumps(json.loads(json.dumps(found.to_dict()))))  # noqa: S301
    assert len(pickle.dumps(found.to_dict())) < 300
    back = Ask.from_dict(sent)
    assert back == found
    assert back.plan == found.plan
    assert isinstance(back.features["a"], PooledFeature)


# ---------------------------------------------------------------------- what is refused


def deep(levels: int) -> Any:
    value: Any = 1
    for _ in range(levels):
        value = {"features": value} if levels % 2 else [value]
    return value


CYCLE: list[Any] = []
CYCLE.append(CYCLE)


@pytest.mark.parametrize(
    ("value", "message", "hint"),
    [
        (3, "is an object, not a int", "It looks like"),
        (False, "is an object, not a bool", "It looks like"),
        ("x", "is an object, not 'x'", "It looks like"),
        (["kv-coe"], "is an object, not a list", "It looks like"),
        ({"feature": ["kv-coe"]}, "no field 'feature'", "Did you mean 'features'"),
        ({1: 2}, "a key that is no text", "It looks like"),
        ({"features": "kv-coe"}, "a list of names or an object", "It looks like"),
        ({"features": 3}, "a list of names or an object", "It looks like"),
        ({"features": [3]}, "A feature is a name, not a int", "a name of your own"),
        ({"features": [{"layers": "all"}]}, "A feature is a name, not a dict", "a name of your own"),
        ({"features": {"a": None}}, "A feature is a name, not a NoneType", "a name of your own"),
        ({"features": ["kv-cow"]}, "No feature is named 'kv-cow'", "Did you mean 'kv-coe'"),
        ({"features": ["prompt:paper_mteb"]}, "No feature is named", "Did you mean 'prompt:paper-mteb'"),
        ({"features": ["logits"]}, "no logits", "logprobs"),
        ({"features": ["length"] * 9}, "9 features are asked for", "at most 8"),
        ({"features": {f"f{i}": "length" for i in range(9)}}, "9 features", "at most 8"),
        ({"features": {"": "length"}}, "no name for a feature", "Letters"),
        ({"features": {"../x": "length"}}, "no name for a feature", "Letters"),
        ({"features": {"\u0444\U0001f600": "length"}}, "no name for a feature", "Letters"),
        ({"features": {"a\n": "length"}}, "no name for a feature", "Letters"),
        ({"features": {"a": {"layer": "all"}}}, "no field 'layer'", "Did you mean 'layers'"),
        ({"features": {"a": {"layers": "lots"}}}, "The ask is wrong: layers: Value error, 'lots'", "It looks like"),
        ({"features": {"a": {"layers": []}}}, "at least one layer", "It looks like"),
        ({"features": {"a": {"layers": [[1]]}}}, "nested deeper than 4", "It looks like"),
        ({"features": {"a": {"window": 0}}}, "window", "It looks like"),
        ({"features": {"a": {"of": "thought"}}}, "of:", "It looks like"),
        ({"features": {"a": {"weights": "sif", "sif_a": 0.123}}}, "sif_a that is not served", "Served are"),
        ({"features": {"a": {"sif_a": float("nan")}}}, "not finite", "NaN"),
        ({"features": {"a": {"layers": float("inf")}}}, "not finite", "NaN"),
        ({"features": {"a": {"window": 2**53}}}, "beyond 2^53", "nothing here"),
        ({"features": {"a": {"window": 10**5000}}}, "beyond 2^53", "nothing here"),
        ({"mode": "medium"}, "mode: Input should be 'fast' or 'slow'", "It looks like"),
        ({"mode": ["fast"]}, "mode", "It looks like"),
        ({"shadow": "true", "policy": "x"}, "shadow", "It looks like"),
        ({"shadow": True}, "no policy is named", "Add 'policy'"),
        ({"policy": 3}, "policy", "It looks like"),
        ({"policy": "x"}, "No policy is named 'x'", "has no policies"),
        ({"confidence": "x"}, "No head is named 'x'", "has no heads"),
        ({"policy": "p" * 65}, "A text of 65 characters", "At most 64"),
        ({"policy": "p" * 10**6}, "A text of 1000000 characters", "At most 64"),
        ({"k" * 10**6: 1}, "A text of 1000000 characters", "At most 64"),
        ({"features": list(range(10**6))}, "larger than 16384 bytes", "less at a time"),
        ({"features": {str(i): 1 for i in range(10**5)}}, "larger than 16384 bytes", "less at a time"),
        ({"features": {"a": {"layers": [0] * 4000}}}, "larger than 16384 bytes", "less at a time"),
        ({"policy": b"x"}, "a bytes, which is not JSON", "It looks like"),
        ({"policy": {1, 2}}, "a set, which is not JSON", "It looks like"),
        (CYCLE, "nested deeper than 4", "It looks like"),
        (deep(100_000), "nested deeper than 4", "It looks like"),
    ],
)  # fmt: skip
def test_nonsense(value: Any, message: str, hint: str) -> None:
    began = time.process_time()
    with pytest.raises(AskError) as caught:
        ask(value)
    assert time.process_time() - began < 0.5
    assert message in caught.value.message
    assert hint in (caught.value.hint or "")
    assert len(caught.value.message) <= 300


@pytest.mark.parametrize("params", [3, "kvroute", ["kvroute"], b"x", True, 1.5])
def test_params_of_another_type(params: Any) -> None:
    with pytest.raises(AskError, match="kv_transfer_params is an object"):
        read_ask(params, PLAIN)


PATHS = [
    "../x", "/etc/passwd", "..", ".", "", "~", "policies/support", "support.json", "support/", "./support",
    "support\0", "support\n", "..\\x", "C:\\x", "file:///etc/passwd", "%2e%2e%2fx", "\ud800", "ｓupport", "SUPPORT",
]  # fmt: skip


@pytest.mark.parametrize("name", PATHS)
@pytest.mark.parametrize("what", ["policy", "confidence"])
def test_a_path_is_no_name(config: ServingConfig, name: str, what: str) -> None:
    with pytest.raises(AskError, match="is named") as caught:
        ask({what: name}, config)
    assert "There are: " in (caught.value.hint or "")
    json.dumps(str(caught.value)).encode()
    str(caught.value).encode()  # no lone surrogate gets out


def test_a_misspelt_policy(config: ServingConfig) -> None:
    with pytest.raises(AskError) as caught:
        ask({"policy": "suport"}, config)
    assert caught.value.hint == "Did you mean 'support'? There are: plain, support."


def test_contradictions(config: ServingConfig) -> None:
    with pytest.raises(AskError, match="nothing to decide"):
        ask({"policy": "support", "mode": "fast", "shadow": True}, config)
    with pytest.raises(AskError, match="reads a difficulty"):
        ask({"confidence": "hard"}, config)
    with pytest.raises(AskError, match="needs no decision"):
        ask({"answer_from": 4, "mode": "fast"}, config)


def test_the_model_limits_the_features(config: ServingConfig) -> None:
    with pytest.raises(AskError, match="Layer 4 was asked for, and the model has 4") as caught:
        ask({"features": {"a": {"layers": [4]}}}, config)
    assert "0 to 3" in (caught.value.hint or "")
    narrow = ServingConfig.read({"max_vector": 127}).for_model(INFO)
    wide = {"layers": "all", "heads": "concat", "layer_reduce": "concat"}
    with pytest.raises(AskError, match="'a' would have 128 numbers, and the limit is 127"):
        ask({"features": {"a": wide}}, narrow)
    assert ask({"features": {"a": {**wide, "layers": "last:3"}}}, narrow) is not None
    layers = tuple(LayerInfo(model_layer=i, kv_heads=1 + i, key_size=8, value_size=8) for i in range(2))
    uneven = ServingConfig().for_model(INFO.model_copy(update={"layers": layers}))
    with pytest.raises(AskError, match="2 layers of 'a' differ") as caught:
        ask({"features": {"a": {"layers": "all"}}}, uneven)
    assert "/srv" not in str(caught.value)  # where the model's name is a path


def test_other_connectors_are_left_alone() -> None:
    class Untouchable:
        def __getattribute__(self, name: str) -> Any:
            raise AssertionError(name)

    params = {"nixl": Untouchable(), "kvroute": {"mode": "fast"}, "big": "x" * 10**6}
    before = dict(params)
    assert read_ask(params, PLAIN) == Ask(mode="fast")
    assert list(params) == list(before)
    assert params["kvroute"] == {"mode": "fast"}


# ---------------------------------------------------------------------- anything at all


@dataclass
class Watch:
    """Files that were opened, listed or looked at while it is on."""

    on: bool = False
    seen: list[str] = field(default_factory=list)


WATCH = Watch()


def _audit(event: str, args: tuple[Any, ...]) -> None:
    if WATCH.on and event.split(".")[0] in ("open", "os", "socket", "subprocess", "shutil", "import"):
        WATCH.seen.append(f"{event} {args[:1]}")


sys.addaudithook(_audit)


@pytest.fixture(autouse=True, scope="module")
def _stats_are_watched() -> Iterator[None]:
    """Looking at a file has no audit event, so it is watched by name."""
    with pytest.MonkeyPatch.context() as patch:
        for name in ("stat", "is_file", "is_dir", "exists", "resolve"):
            patch.setattr(Path, name, _told(name, getattr(Path, name)))
        yield


def _told(name: str, real: Any) -> Any:
    def call(*args: Any, **kwargs: Any) -> Any:
        if WATCH.on:
            WATCH.seen.append(f"{name} {args[:1]}")
        return real(*args, **kwargs)

    return call


@contextmanager
def watched() -> Iterator[list[str]]:
    WATCH.seen.clear()
    WATCH.on = True
    try:
        yield WATCH.seen
    finally:
        WATCH.on = False


HOSTILE = [
    *PATHS, "prompt:../x", "answer:/etc/passwd", "__class__", "constructor", "{0}", "%s", "\u202e", "\U0001f600" * 60,
    "x" * 10**6, "kv-coe", "prompt:best", "support", "right", "fast", "all", "last:4", "first:999999999", "sif",
]  # fmt: skip
LEAVES = (
    st.none()
    | st.booleans()
    | st.integers()
    | st.integers(min_value=10**300, max_value=10**301)
    | st.floats()
    | st.sampled_from(HOSTILE)
    | st.text(st.characters(codec=None), max_size=80)
    | st.binary(max_size=4)
)
KEYS = st.sampled_from([*Ask.model_fields, *PooledFeature.model_fields, *HOSTILE]) | st.text(max_size=8) | st.integers()
ANYTHING = st.recursive(
    LEAVES,
    lambda inner: (
        st.lists(inner, max_size=12)
        | st.dictionaries(KEYS, inner, max_size=6)
        | st.tuples(inner)
        | st.builds(lambda x: [x] * 20_000, inner)
    ),
    max_leaves=12,
)
SMALL = (
    st.none()
    | st.booleans()
    | st.integers(-3, 99)
    | st.floats(-1, 2)
    | st.sampled_from([name for name in HOSTILE if len(name) <= 64])
)
"""Passes the check of size, so that what comes behind it is reached."""
SPECS = st.fixed_dictionaries(
    {},
    optional={
        "of": st.sampled_from(["prompt", "answer"]),
        "layers": st.sampled_from(["all", "last:2", "first:99", 0.5, [0], [0, 0], [9], 3])
        | st.lists(SMALL, max_size=3),
        "part": st.sampled_from(["k", "v", "kv"]),
        "tokens": st.sampled_from(["mean", "sum", "last"]),
        "window": st.integers(-1, 99),
        "weights": st.sampled_from(["sif", "position"]),
        "sif_a": st.sampled_from([1e-3, 1e-4]) | st.floats(0, 1),
        "heads": st.sampled_from(["mean", "concat"]),
        "normalize": SMALL,
    },
)
ODD_SPECS = st.dictionaries(st.sampled_from([*PooledFeature.model_fields, "layer"]), SMALL, max_size=2)
NAMES = st.sampled_from(["a", "b", "c", "kv-coe", "../x"])
NEAR = st.fixed_dictionaries(
    {},
    optional={
        "features": st.lists(st.sampled_from(FEATURES), max_size=9)
        | st.dictionaries(NAMES, SPECS, max_size=3)
        | st.dictionaries(NAMES, SPECS | ODD_SPECS | st.sampled_from(FEATURES) | SMALL, max_size=2)
        | st.lists(SMALL, max_size=2),
        "policy": st.sampled_from(["support", "plain"]) | SMALL,
        "mode": st.sampled_from(["fast", "slow"]) | SMALL,
        "shadow": st.booleans(),
        "confidence": st.sampled_from(["right", "hard"]) | SMALL,
    },
)
"""Asks with a fault or two, or none."""


def check(params: Any, config: ServingConfig) -> Ask | AskError | None:
    """What comes of anything: three things are allowed, none of which takes long, touches a file or tells a path."""
    began = time.thread_time()
    with watched() as seen:
        try:
            found: Ask | AskError | None = read_ask(params, config)
        except AskError as error:
            found = error
    assert time.thread_time() - began < 0.2
    assert seen == []
    if isinstance(found, AskError):
        text = str(found)
        text.encode()  # it can be sent
        assert found.hint
        assert len(found.message) <= 300
        assert str(Path.cwd()) not in text
        assert "serving0" not in text
    elif found is not None:
        assert Ask.from_dict(json.loads(json.dumps(found.to_dict()))).plan == found.plan
    return found


@settings(max_examples=300, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(ANYTHING)
def test_anything_at_all(config: ServingConfig, value: Any) -> None:
    check(value, config)
    check({"kvroute": value}, config)
    check({"kvroute": {"features": value, "policy": value}}, config)


@settings(max_examples=600, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(NEAR)
@example({"features": {"a": {"layers": ["\ud800"]}}})
@example({"policy": "\ud800"})
@example({"features": {"a": {"layers": [True]}}})
def test_asks_with_a_fault_or_two(config: ServingConfig, value: Any) -> None:
    check({"kvroute": value, **OTHERS}, config)


def test_the_watch_sees(tmp_path: Path) -> None:
    with watched() as seen, pytest.raises(OSError, match="nowhere"):
        open("/nowhere")  # noqa: SIM115
    assert len(seen) == 1
    with watched() as seen:
        tmp_path.is_file()
    assert len(seen) >= 1


def a_large_model() -> ModelInfo:
    layer = INFO.layers[0]
    return INFO.model_copy(update={"layers": tuple(layer.model_copy(update={"model_layer": i}) for i in range(128))})


def test_an_ask_takes_a_millisecond() -> None:
    config = ServingConfig().for_model(a_large_model())
    value = {"features": {f"f{i}": {"layers": "all", "of": "answer"} for i in range(8)}, "mode": "fast"}
    best = min(_seconds(lambda: ask(value, config)) for _ in range(20))
    assert best < 0.005


def test_the_worst_ask_takes_little_more() -> None:
    values = [
        {"features": {"a": {"layers": list(range(1700))}}},
        {"features": {"a": {"layers": [0] * 1600}}},
        {f"{i:x}": 0 for i in range(900)},
        {"features": [["x"] * 400] * 8},
    ]
    config = ServingConfig.read({"max_ask_bytes": 16384}).for_model(INFO)
    for value in values:
        assert min(_seconds(lambda v=value: _refused(v, config)) for _ in range(5)) < 0.05


def _refused(value: Any, config: ServingConfig) -> None:
    with pytest.raises(AskError):
        ask(value, config)


def _seconds(work: Any) -> float:
    began = time.perf_counter()
    work()
    return time.perf_counter() - began
