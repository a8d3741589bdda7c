"""Engines by name: opened once, shared, copied and pickled."""

from __future__ import annotations

import copy
import pickle
from concurrent.futures import ThreadPoolExecutor

import pytest

from kvroute import EngineHandle, EngineName, InvalidInputError, ModelLoadError


def test_handles_of_one_name_share_one_engine(tiny_folder):
    name = EngineName(tiny_folder("llama"))
    handles = [EngineHandle(name=name) for _ in range(4)]
    assert not any(h.opened for h in handles)
    with ThreadPoolExecutor(4) as threads:
        engines = list(threads.map(lambda h: h.get(), handles))
    assert all(e is engines[0] for e in engines)
    assert EngineHandle(name=EngineName(tiny_folder("llama"), dtype="bfloat16")).get() is not engines[0]


def test_it_is_let_go_when_nobody_holds_it(tiny_folder):
    name = EngineName(tiny_folder("qwen3"))
    first = id(EngineHandle(name=name).get())
    assert first  # nothing to see of a freed engine but that a new one is made
    again = EngineHandle(name=name)
    assert not again.opened
    assert again.get() is EngineHandle(name=name).get()


def test_copies_share_the_engine_and_a_pickle_carries_its_name(tiny_engine, tiny_folder):
    given = EngineHandle(tiny_engine)
    assert copy.deepcopy(given).get() is tiny_engine is copy.copy(given).get()
    with pytest.raises(InvalidInputError, match="can't be pickled"):
        pickle.dumps(given)
    named = EngineHandle(name=EngineName(tiny_folder("llama")), api_key="s3cret-key")
    data = pickle.dumps(named)
    assert b"s3cret-key" not in data
    assert "s3cret-key" not in repr(named)
    assert pickle.loads(data).get() is named.get()  # noqa: S301 - our own


@pytest.mark.parametrize(
    "wrong", [{}, {"model": "m", "kind": "gpu"}, {"model": "m", "urls": ("http://h",)}, {"kind": "server"}]
)
def test_names_that_make_no_sense(wrong):
    with pytest.raises(InvalidInputError):
        EngineName(**wrong)


def test_names_survive_json():
    name = EngineName("tokenizer", kind="server", urls=("http://a:1", "http://b:2"), served="m")
    assert EngineName.from_dict(name.to_dict()) == name
    with pytest.raises(InvalidInputError, match="Give an engine"):
        EngineHandle()
    with pytest.raises(ModelLoadError):
        EngineHandle(name=EngineName("/no/such/folder")).get()


def test_only_servers_have_timeouts_and_retries(tiny_folder):
    name = EngineName(kind="server", urls=("http://127.0.0.1:9",), timeout=7.0, retries=0)
    assert EngineName.from_dict(name.to_dict()) == name
    client = EngineHandle(name=name).get()
    sender = client._sender
    assert (sender._timeout, sender._attempts) == (7.0, 1)
    client.close()
    with pytest.raises(InvalidInputError, match="Only servers"):
        EngineName(tiny_folder("llama"), timeout=7.0)
