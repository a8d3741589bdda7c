"""Fixtures: tiny random models in every architecture, a tokenizer, and the real SmolLM2. No network."""

from __future__ import annotations

import os
from collections.abc import Callable
from importlib.util import find_spec
from typing import Any

import pytest
import torch
from transformers import PreTrainedTokenizerFast

from kvroute import TransformersEngine
from tiny_models import HYBRID, STANDARD, build_model, build_tokenizer

collect_ignore = [] if find_spec("vllm") else ["serving"]
"""Tests of the real engine run in an environment of its own."""

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")


@pytest.fixture(scope="session")
def tiny_tokenizer() -> PreTrainedTokenizerFast:
    """A byte-level BPE of 320 tokens with a ChatML template. Shared: change a ``build_tokenizer()`` of your own."""
    return build_tokenizer()


@pytest.fixture(scope="session")
def tiny_model() -> Callable[..., Any]:
    """``tiny_model(architecture, seed=0, dtype=torch.float32, **config)``: a fresh random model."""
    return build_model


@pytest.fixture(scope="session")
def _engines(tiny_tokenizer: PreTrainedTokenizerFast) -> Callable[[str], TransformersEngine]:
    made: dict[str, TransformersEngine] = {}

    def engine(architecture: str) -> TransformersEngine:
        if architecture not in made:
            model = build_model(architecture)
            made[architecture] = TransformersEngine(model, tiny_tokenizer, name=f"tiny-{architecture}")
        return made[architecture]

    return engine


@pytest.fixture(scope="session")
def tiny_engine(_engines: Callable[[str], TransformersEngine]) -> TransformersEngine:
    """A tiny random Llama. Shared by all tests, so leave it as it is."""
    return _engines("llama")


@pytest.fixture(params=[*STANDARD, *HYBRID])
def tiny_engines(request: pytest.FixtureRequest, _engines: Callable[[str], TransformersEngine]) -> TransformersEngine:
    """One engine an architecture, hybrids included: the test runs once for each."""
    return _engines(request.param)


@pytest.fixture(params=STANDARD)
def standard_engine(
    request: pytest.FixtureRequest, _engines: Callable[[str], TransformersEngine]
) -> TransformersEngine:
    """One engine an architecture whose layers all keep keys and values."""
    return _engines(request.param)


@pytest.fixture(params=HYBRID)
def hybrid_engine(request: pytest.FixtureRequest, _engines: Callable[[str], TransformersEngine]) -> TransformersEngine:
    """One engine an architecture that mixes attention and recurrent layers."""
    return _engines(request.param)


@pytest.fixture(scope="session")
def tiny_folder(
    tmp_path_factory: pytest.TempPathFactory, tiny_tokenizer: PreTrainedTokenizerFast
) -> Callable[[str], str]:
    """``tiny_folder(architecture)``: where a tiny random model and its tokenizer are saved, for commands. Shared."""
    saved: dict[str, str] = {}

    def folder(architecture: str) -> str:
        if architecture not in saved:
            path = tmp_path_factory.mktemp(f"tiny-{architecture}")
            build_model(architecture).save_pretrained(path)
            tiny_tokenizer.save_pretrained(path)
            saved[architecture] = str(path)
        return saved[architecture]

    return folder


@pytest.fixture
def run(capsys: pytest.CaptureFixture[str]) -> Callable[..., tuple[int, str, str]]:
    """``run(*arguments)``: exit code, standard output and standard error of a command."""
    from kvroute.cli import main

    def call(*arguments: object) -> tuple[int, str, str]:
        capsys.readouterr()
        with pytest.raises(SystemExit) as ended:
            main([str(a) for a in arguments])
        out, err = capsys.readouterr()
        return int(ended.value.code or 0), out, err

    return call


@pytest.fixture(scope="session")
def smollm2() -> TransformersEngine:
    """The real SmolLM2-135M-Instruct in float32. Tests that use it are marked ``real``."""
    return TransformersEngine.from_pretrained("smollm2", dtype=torch.float32)


@pytest.fixture(autouse=True)
def _fixed_seed() -> None:
    torch.manual_seed(0)
