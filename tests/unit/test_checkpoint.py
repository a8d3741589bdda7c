"""A checkpoint that was not loaded says the same of its model as the loaded model."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from kvroute.engines.checkpoint import describe_checkpoint
from kvroute.engines.loading import describe
from kvroute.errors import ModelLoadError
from tiny_models import STANDARD


@pytest.mark.parametrize("architecture", STANDARD)
@pytest.mark.parametrize("shards", [{}, {"max_shard_size": "20KB"}], ids=["one file", "several"])
def test_it_is_what_the_loaded_model_says(
    architecture: str, shards: dict[str, str], tiny_model: Callable[..., Any], tmp_path: Path
) -> None:
    model = tiny_model(architecture, dtype=torch.bfloat16)
    model.save_pretrained(tmp_path, **shards)
    assert len(list(tmp_path.glob("*.safetensors"))) == 1 or shards
    found = describe_checkpoint(tmp_path, name="m")
    assert found == describe(model, name="m", revision=None)


def test_a_decoder_saved_alone_is_known(tiny_model: Callable[..., Any], tmp_path: Path) -> None:
    model = tiny_model("llama")
    model.save_pretrained(tmp_path)
    model.model.config.architectures = ["LlamaForCausalLM"]
    from safetensors.torch import load_file, save_file

    tensors = load_file(tmp_path / "model.safetensors")
    save_file({k.removeprefix("model."): v for k, v in tensors.items()}, tmp_path / "model.safetensors")
    assert describe_checkpoint(tmp_path).fingerprint == describe(model, name="m", revision=None).fingerprint


def test_other_files_are_refused(tiny_model: Callable[..., Any], tmp_path: Path) -> None:
    with pytest.raises(ModelLoadError):
        describe_checkpoint(tmp_path)
    model = tiny_model("llama")
    model.save_pretrained(tmp_path)
    (tmp_path / "model.safetensors").rename(tmp_path / "else.safetensors")
    with pytest.raises(ModelLoadError, match=r"no model\.safetensors"):
        describe_checkpoint(tmp_path)
    from safetensors.torch import load_file, save_file

    tensors = load_file(tmp_path / "else.safetensors")
    save_file({k: v for k, v in tensors.items() if "down_proj" not in k}, tmp_path / "model.safetensors")
    with pytest.raises(ModelLoadError, match="down_proj"):
        describe_checkpoint(tmp_path)
