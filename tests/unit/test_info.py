"""ModelInfo and its fingerprint: the checkpoint, whatever the dtype; nothing else."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch

from kvroute import InvalidInputError, KVRouteError, ModelInfo, ModelLoadError, ModelMismatchError, TransformersEngine
from kvroute.engines.loading import describe
from kvroute.info import sign_digest
from tiny_models import STANDARD


def info_of(model: Any) -> ModelInfo:
    return describe(model, name="m", revision=None)


@pytest.mark.parametrize("architecture", STANDARD)
def test_the_fingerprint_is_that_of_the_checkpoint_in_any_dtype(
    architecture: str, tiny_model: Callable[..., Any]
) -> None:
    found = {
        dtype: info_of(tiny_model(architecture, dtype=dtype))
        for dtype in (torch.float32, torch.bfloat16, torch.float16)
    }
    assert len({i.fingerprint for i in found.values()}) == 1
    assert [i.dtype for i in found.values()] == ["float32", "bfloat16", "float16"]
    assert info_of(tiny_model(architecture, seed=1)).fingerprint != found[torch.float32].fingerprint


def test_a_fine_tuned_copy_has_a_fingerprint_of_its_own(tiny_model: Callable[..., Any]) -> None:
    plain, tuned = tiny_model("llama"), tiny_model("llama")
    with torch.no_grad():
        for weight in tuned.parameters():
            weight += 1e-3 * weight.std() * torch.randn_like(weight)
    assert info_of(plain).fingerprint != info_of(tuned).fingerprint


def test_another_rope_is_another_model(tiny_model: Callable[..., Any]) -> None:
    theta = tiny_model("llama", rope_parameters={"rope_type": "default", "rope_theta": 5e5})
    plain = tiny_model("llama")
    assert info_of(theta).weights_digest == info_of(plain).weights_digest
    assert info_of(theta).fingerprint != info_of(plain).fingerprint


def test_name_and_revision_are_not_part_of_it(tiny_model: Callable[..., Any]) -> None:
    model = tiny_model("llama")
    assert describe(model, name="a", revision="1").fingerprint == describe(model, name="b", revision="2").fingerprint


def test_it_survives_saving_and_loading(tiny_model: Callable[..., Any], tiny_tokenizer: Any, tmp_path: Any) -> None:
    model = tiny_model("gemma3")
    model.save_pretrained(tmp_path)
    tiny_tokenizer.save_pretrained(tmp_path)
    for dtype in ("float32", torch.bfloat16, "auto"):
        engine = TransformersEngine.from_pretrained(tmp_path, dtype=dtype, device="cpu")
        assert engine.info.fingerprint == info_of(model).fingerprint
        assert engine.info.name == str(tmp_path)
    assert ModelInfo.model_validate_json(engine.info.model_dump_json()) == engine.info
    with pytest.raises(InvalidInputError, match="is not a dtype"):
        TransformersEngine.from_pretrained(tmp_path, dtype="float33")
    with pytest.raises(KVRouteError, match="device"):
        TransformersEngine.from_pretrained(tmp_path, device="nonsense")


def test_a_mismatch_names_both_models(tiny_model: Callable[..., Any]) -> None:
    info = info_of(tiny_model("llama"))
    info.require(info.fingerprint, "The head")
    with pytest.raises(ModelMismatchError, match="The head was made for other-7b") as caught:
        info.require("0123456789abcdef", "The head", "other-7b")
    assert "0123456789abcdef" in str(caught.value)
    assert info.fingerprint in str(caught.value)


def test_sizes(tiny_model: Callable[..., Any]) -> None:
    info = info_of(tiny_model("gemma3"))
    assert (info.architecture, info.num_layers, info.model_layers) == ("Gemma3ForCausalLM", 5, 5)
    assert (info.hidden_size, info.vocab_size, info.context) == (48, 320, 4096)
    assert [layer.sizes for layer in info.layers] == [(2, 14, 14)] * 5
    assert [layer.window for layer in info.layers] == [5, None, 5, 5, None]
    neox = info_of(tiny_model("gpt_neox"))
    assert neox.layers[0].sizes == (5, 8, 8)


def test_the_digest_sees_signs_alone() -> None:
    weight = torch.randn(8, 8)
    names = [("model.embed_tokens.weight", weight), ("model.layers.0.mlp.down_proj.weight", weight)]
    digest = sign_digest(names)
    assert digest == sign_digest([(n, w * 3) for n, w in names])
    assert digest == sign_digest(names[::-1])
    flipped = weight.clone()
    flipped[3, 3] *= -1
    assert digest != sign_digest([names[0], (names[1][0], flipped)])
    assert digest == sign_digest([*names, ("lm_head.weight", torch.randn(8, 8))])  # may be tied, fused or absent


def test_a_model_that_is_not_there_is_our_error(tmp_path: Any) -> None:
    with pytest.raises(ModelLoadError, match="can't be loaded") as caught:
        TransformersEngine.from_pretrained(tmp_path / "nothing")
    assert caught.value.__cause__ is not None
    assert "smollm2" in str(caught.value)
    (tmp_path / "config.json").write_text("{ not json")
    with pytest.raises(ModelLoadError):
        TransformersEngine.from_pretrained(tmp_path)
