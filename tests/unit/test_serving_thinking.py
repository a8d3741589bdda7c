"""What a server knows of its model: thinking tokens from the tokenizer, sizes and fingerprint from its files."""

from __future__ import annotations

import shutil
from pathlib import Path
from types import SimpleNamespace

import pytest
import transformers

from kvroute.errors import AskError, InvalidInputError, UnsupportedModelError
from kvroute.heads.head import DifficultyHead
from kvroute.pooling import PRESETS
from kvroute.serving.config import ServingConfig
from kvroute.serving.served_model import ServedModel
from kvroute.serving.thinking_tokens import ThinkingTokens
from kvroute.serving.vllm_facts import layer_sizes
from kvroute.thinking import ThinkingMode

THINKER = Path(__file__).parents[2] / "examples/tiny_thinker"


@pytest.fixture(scope="module")
def tokenizer():
    return transformers.AutoTokenizer.from_pretrained(THINKER / "model")


def ids(tokenizer, text: str) -> list[int]:
    return tokenizer(text, add_special_tokens=False)["input_ids"]


def rendered(tokenizer, **variables) -> list[int]:
    messages = [{"role": "user", "content": "top 12,34"}]
    return ids(
        tokenizer, tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True, **variables)
    )


def test_the_tokens_are_those_of_the_chat_template(tokenizer):
    found = ThinkingTokens.of(tokenizer)
    assert found.suffixes == {"fast": ids(tokenizer, "<think>\n\n</think>\n\n"), "slow": ids(tokenizer, "<think>\n")}
    assert found.phrases["fast"] == ids(tokenizer, "\n</think>\n\n")
    assert found.mark.ends(ids(tokenizer, "</think>"))


def test_a_prompt_is_laid_out_by_what_it_ends_with(tokenizer):
    found = ThinkingTokens.of(tokenizer)
    plain = rendered(tokenizer)
    layout, given = found.layout(plain)
    assert (layout.base, layout.fast, layout.slow, given) == (plain, *found.suffixes.values(), None)
    layout, given = found.layout(rendered(tokenizer, enable_thinking=False))
    assert (layout.base, layout.fast, layout.slow, given) == (plain, [], [], "fast")
    opened = plain + ids(tokenizer, "<think>\n")
    layout, given = found.layout(opened)
    assert (layout.base, layout.slow, given) == (plain, [], None)
    assert tokenizer.decode(opened + layout.fast).endswith("<think>\n\n</think>\n\n")


def test_what_the_prompt_leaves_of_the_fast_mode_is_taken_from_texts_where_tokens_differ():
    class Pieces:
        """Joins line ends, as many tokenizers do."""

        chat_template = None

        def __call__(self, texts, add_special_tokens):
            parts = ["<think>", "</think>", "\n\n", "\n"]
            out = []
            for text in texts:
                found = []
                while text:
                    piece = next(p for p in parts if text.startswith(p))
                    found.append(parts.index(piece))
                    text = text.removeprefix(piece)
                out.append(found)
            return {"input_ids": out}

    pair = {"fast": "<think>\n\n</think>\n\n", "slow": "<think>\n", "leave": "\n</think>\n\n", "enter": "<think>\n"}
    found = ThinkingTokens.of(Pieces(), ThinkingMode(**pair, close="</think>"))
    assert found.suffixes["fast"] == [0, 2, 1, 2]
    layout, _ = found.layout([9, 8, 0, 3])
    assert (layout.base, layout.fast) == ([9, 8], [3, 1, 2])
    apart = ThinkingTokens.of(Pieces(), ThinkingMode(**{**pair, "fast": "</think>"}, close="</think>"))
    with pytest.raises(AskError, match="opens a thought"):
        apart.layout([9, 8, 0, 3])


def test_the_mode_that_an_answer_shows():
    found = ThinkingTokens({"fast": [1, 2, 3], "slow": [1, 5]}, {"fast": [], "slow": []}, None, None)
    assert found.shown([], opened=False) is None
    assert found.shown([1], opened=False) is None
    assert found.shown([1, 2], opened=False) is None
    assert found.shown([1, 2, 3, 9], opened=False) == ("fast", 3)
    assert found.shown([1, 5, 9], opened=False) == ("slow", 2)
    assert found.shown([7], opened=False) == ("fast", 0)
    assert found.shown([7], opened=True) == ("slow", 0)


def test_instructions_and_unknown_templates_are_refused(tokenizer):
    with pytest.raises(UnsupportedModelError, match="said in the user's message"):
        ThinkingTokens.of(tokenizer, ThinkingMode.instructions())
    plain = SimpleNamespace(chat_template=None)
    with pytest.raises(UnsupportedModelError, match="no chat template"):
        ThinkingTokens.of(plain)


def test_the_setting_thinking():
    pair = {"fast": "a", "slow": "b", "leave": "c", "enter": "d"}
    config = ServingConfig.read({"thinking": pair})
    assert config.thinking == ThinkingMode(**pair)
    with pytest.raises(InvalidInputError, match="thinking"):
        ServingConfig.read({"thinking": {"fast": "a"}})


# ---------------------------------------------------------------------- the model itself


def vllm_config(folder: Path) -> tuple[SimpleNamespace, SimpleNamespace]:
    """vLLM's objects as far as they are read, named as its source names them (0.32)."""
    text = transformers.AutoConfig.from_pretrained(folder)
    model = SimpleNamespace(
        model=str(folder),
        revision=None,
        tokenizer=str(folder),
        tokenizer_revision=None,
        trust_remote_code=False,
        hf_text_config=text,
        architectures=["Qwen3ForCausalLM"],
        max_model_len=512,
        dtype="torch.float32",
        get_total_num_hidden_layers=lambda: text.num_hidden_layers,
    )
    spec = type("FullAttentionSpec", (), {"num_kv_heads": 1, "head_size": 32, "head_size_v": 32})()
    names = [f"model.layers.{i}.self_attn.attn" for i in range(text.num_hidden_layers)]
    groups = [SimpleNamespace(layer_names=names[::-1], kv_cache_spec=spec)]
    parallel = SimpleNamespace(tensor_parallel_size=2)
    return (
        SimpleNamespace(model_config=model, parallel_config=parallel),
        SimpleNamespace(kv_cache_groups=groups, kv_tp_replicas=1),
    )


def test_sizes_of_all_ranks_together():
    config, cache = vllm_config(THINKER / "model")
    layers = config.model_config.get_total_num_hidden_layers()
    assert layer_sizes(config, cache) == [(i, 2, 32, 32) for i in range(layers)]
    cache.kv_tp_replicas = 2
    assert layer_sizes(config, cache)[0] == (0, 1, 32, 32)
    latent = type("MLAAttentionSpec", (), {"num_kv_heads": 1, "head_size": 576, "head_size_v": 0})()
    config.model_config.hf_text_config = SimpleNamespace(qk_rope_head_dim=64)
    cache.kv_cache_groups = [SimpleNamespace(layer_names=["model.layers.0.self_attn.attn"], kv_cache_spec=latent)]
    assert layer_sizes(config, cache) == [(0, 1, 512, 64)]


def served(tmp_path: Path) -> ServingConfig:
    shutil.copytree(THINKER / "head", tmp_path / "thinker")
    return ServingConfig(heads=tmp_path)


def test_heads_of_the_served_model_are_on_and_others_are_off(tmp_path):
    model = ServedModel(*vllm_config(THINKER / "model"))
    config = model.bind(served(tmp_path))
    assert set(config.catalog.heads) == {"thinker"}
    assert config.info is not None
    assert config.info.fingerprint == DifficultyHead.load(THINKER / "head").fingerprint
    other = DifficultyHead.load(THINKER / "head")
    object.__setattr__(other, "fingerprint", "0123456789abcdef")
    other.save(tmp_path / "other")
    config = model.bind(ServingConfig(heads=tmp_path))
    assert set(config.catalog.heads) == {"thinker"}
    assert config.catalog.heads_off["other"].public == "it was made for another model"


def test_without_its_files_only_sizes_are_compared(tmp_path):
    config = served(tmp_path)
    parts = vllm_config(THINKER / "model")
    parts[0].model_config.model = "no/such-model"
    bound = ServedModel(*parts).bind(config)
    assert set(bound.catalog.heads) == {"thinker"}
    parts[1].kv_cache_groups[0].kv_cache_spec.head_size_v = 16
    assert ServedModel(*parts).bind(config).catalog.heads_off


@pytest.mark.parametrize("text", ["</think>", "and so the answer is"])
def test_where_a_thought_ends(tokenizer, text):
    """Of one token, and of several that may be cut otherwise."""
    pair = {"fast": "a", "slow": "b", "leave": "c", "enter": "d"}
    mark = ThinkingTokens.of(tokenizer, ThinkingMode(**pair, close=text)).mark
    before = ids(tokenizer, "1a+2:34;2b=5:35 so and so 35. ")
    answer = [*before, *ids(tokenizer, text), *ids(tokenizer, f" it gives 35 {text}.")]
    step_by_step = next(n for n in range(1, len(answer) + 1) if mark.ends(answer[max(0, n - mark.width) : n]))
    assert mark.find(answer) == step_by_step
    assert len(before) < step_by_step < len(answer)
    assert mark.find(before) is None
    assert mark.find([]) is None


def test_tables_that_requests_need_are_made_before_the_first(tmp_path, caplog):
    model = ServedModel(*vllm_config(THINKER / "model"))
    model.prepare()
    (a,) = {spec.sif_a for spec in PRESETS.values() if spec.weights == "sif"}
    assert set(model._tables) == {a}
    assert model.sif(a) is model._tables[a]
    parts = vllm_config(THINKER / "model")
    parts[0].model_config.tokenizer = str(tmp_path)  # an empty folder
    with caplog.at_level("INFO"):
        ServedModel(*parts).prepare()
    assert "No frequencies" in caplog.text
    with pytest.raises((OSError, ValueError)):
        ServedModel(*parts).sif(a)
