"""How a model thinks, read from chat templates of the known manners, and the layout of prompts."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from kvroute import ChatTemplateError, ThinkingMode, TokenIds, TransformersEngine, UnsupportedModelError
from tiny_models import CHAT_TEMPLATE, build_model, build_tokenizer

# What the published templates do at their ends, in short.
_TURNS = (
    "{% if tools %}{{ '<|im_start|>system\nTools: ' + (tools | tojson) + '<|im_end|>\n' }}{% endif %}"
    "{% for m in messages %}{{ '<|im_start|>' + m['role'] + '\n' + m['content'] + '<|im_end|>\n' }}{% endfor %}"
)
_OPENED = "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}"
QWEN3 = (  # nothing while it thinks, an empty thought where it shall not
    f"{_TURNS}{_OPENED}"
    "{% if enable_thinking is defined and enable_thinking is false %}{{ '<think>\n\n</think>\n\n' }}{% endif %}"
    "{% endif %}"
)
BOTH_OPEN = (  # later kin: the thought is opened by the template, and closed at once where it shall not think
    f"{_TURNS}{_OPENED}"
    "{% if enable_thinking is defined and enable_thinking is false %}{{ '<think>\n\n</think>\n\n' }}"
    "{% else %}{{ '<think>\n' }}{% endif %}{% endif %}"
)
DEEPSEEK = (  # DeepSeek-R1: the template opens the thought, whatever is asked
    "{{ bos_token }}{% for m in messages %}{% if m['role'] == 'user' %}{{ '<|User|>' + m['content'] }}"
    "{% else %}{{ '<|Assistant|>' + m['content'].split('</think>')[-1] }}{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|Assistant|><think>\n' }}{% endif %}"
)
SYSTEM_SWITCH = (  # SmolLM3: a line of the system part says whether it thinks
    "{{ '<|im_start|>system\nReasoning: ' }}"
    "{% if enable_thinking is defined and enable_thinking %}{{ '/think' }}{% else %}{{ '/no_think' }}{% endif %}"
    "{{ '<|im_end|>\n' }}" + CHAT_TEMPLATE
)
OTHER_TAGS = f"{_TURNS}{_OPENED}{{% if enable_thinking %}}{{{{ '<reason>' }}}}{{% endif %}}{{% endif %}}"

ASKED = [{"role": "system", "content": "Be <think> brief."}, {"role": "user", "content": "what is the capital?"}]


@pytest.fixture(scope="module")
def model() -> Any:
    return build_model("qwen3", dtype=torch.float32)


def an_engine(model: Any, template: str | None, *, tokens: bool = False) -> TransformersEngine:
    tokenizer = build_tokenizer()
    tokenizer.chat_template = template
    if tokens:
        tokenizer.add_tokens(["<think>", "</think>"])
        model = build_model("qwen3", vocab_size=len(tokenizer))
    return TransformersEngine(model, tokenizer, name="tiny-thinker")


def text(engine: TransformersEngine, ids: list[int]) -> str:
    return str(engine.tokenizer.decode(ids, skip_special_tokens=False))


def rendered(engine: TransformersEngine, messages: Any, **variables: Any) -> str:
    return str(engine.tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True, **variables))


# ------------------------------------------------------------------ which one


@pytest.mark.parametrize("template", [QWEN3, BOTH_OPEN], ids=["qwen3", "both-open"])
def test_enable_thinking(model: Any, template: str) -> None:
    engine = an_engine(model, template)
    mode = ThinkingMode.of(engine)
    assert mode.name == "enable_thinking"
    assert (mode.fast, mode.slow) == ("<think>\n\n</think>\n\n", "<think>\n")
    assert (mode.leave, mode.enter, mode.close) == ("\n</think>\n\n", "\n<think>\n", "</think>")
    assert not mode.in_question
    layout = mode.layout(engine, ASKED)
    # Fast is to the letter what the template writes without thinking.
    assert text(engine, layout.base + layout.fast) == rendered(engine, ASKED, enable_thinking=False)
    assert text(engine, layout.base + layout.slow).startswith(rendered(engine, ASKED, enable_thinking=True))


def test_a_template_that_opens_the_thought(model: Any) -> None:
    engine = an_engine(model, DEEPSEEK)
    mode = ThinkingMode.of(engine)
    assert (mode.fast, mode.slow, mode.close) == ("<think>\n\n</think>\n\n", "<think>\n", "</think>")
    layout = mode.layout(engine, ASKED)
    assert text(engine, layout.base).endswith("<|Assistant|>")
    assert text(engine, layout.base + layout.slow) == rendered(engine, ASKED)


def test_a_thought_that_is_opened_without_a_line_break(model: Any) -> None:
    mode = ThinkingMode.of(an_engine(model, DEEPSEEK.replace("<think>\n", "<think>")))
    assert (mode.fast, mode.slow) == ("<think>\n\n</think>\n\n", "<think>")


def test_a_template_with_neither_gives_instructions(model: Any) -> None:
    mode = ThinkingMode.of(an_engine(model, CHAT_TEMPLATE))
    assert mode == ThinkingMode.instructions()
    assert mode.in_question
    assert mode.close is None


def test_thinking_tokens_of_the_tokenizer_alone(model: Any) -> None:
    engine = an_engine(model, CHAT_TEMPLATE, tokens=True)
    mode = ThinkingMode.of(engine)
    assert (mode.name, mode.slow) == ("think tokens", "<think>\n")
    assert mode.layout(engine, "what?").slow[0] == engine.tokenizer.convert_tokens_to_ids("<think>")


@pytest.mark.parametrize("template", [SYSTEM_SWITCH, OTHER_TAGS, None], ids=["system", "other tags", "none"])
def test_an_unknown_manner_shows_how_to_define_a_pair(model: Any, template: str | None) -> None:
    engine = an_engine(model, template)
    with pytest.raises(UnsupportedModelError, match="tiny-thinker") as caught:
        ThinkingMode.of(engine)
    assert "ThinkingMode(fast=" in str(caught.value)
    for field in ("slow=", "leave=", "enter=", "close="):
        assert field in str(caught.value)
    pair = ThinkingMode(fast="A:", slow="B:", leave="C:", enter="D:")  # as the message says
    layout = pair.layout(engine, "what?")
    assert text(engine, layout.base + layout.fast) == "what?A:"


def test_a_template_that_fails_is_an_error_of_its_own(model: Any) -> None:
    with pytest.raises(ChatTemplateError, match="no users here"):
        ThinkingMode.of(an_engine(model, "{{ raise_exception('no users here') }}"))


# ------------------------------------------------------------------ layouts


@pytest.mark.parametrize("template", [QWEN3, BOTH_OPEN, DEEPSEEK, CHAT_TEMPLATE])
@pytest.mark.parametrize(
    "prompt", [ASKED, ASKED[1:], "a text", TokenIds((5, 6, 7))], ids=["system", "user", "text", "ids"]
)
def test_both_modes_begin_with_the_base(model: Any, template: str, prompt: Any) -> None:
    engine = an_engine(model, template)
    mode = ThinkingMode.of(engine)
    layout = mode.layout(engine, prompt)
    assert layout.base
    assert layout.suffix("fast") == layout.fast
    assert layout.suffix("slow") == layout.slow
    assert layout.fast != layout.slow
    if isinstance(prompt, str):
        assert layout.base == engine.tokenize(prompt)
    elif isinstance(prompt, TokenIds):
        assert layout.base == [5, 6, 7]
    elif not mode.in_question:
        assert text(engine, layout.base).count("<think>") == (1 if len(prompt) > 1 else 0)  # the system part's own


def test_instructions_stand_behind_the_question(model: Any) -> None:
    engine = an_engine(model, CHAT_TEMPLATE)
    mode = ThinkingMode.instructions(fast=" FAST", slow=" SLOW")
    layout = mode.layout(engine, ASKED)
    tail = "<|im_end|>\n<|im_start|>assistant\n"
    assert text(engine, layout.base).endswith("what is the capital?")
    assert text(engine, layout.fast) == " FAST" + tail
    assert text(engine, layout.slow) == " SLOW" + tail
    asked = [ASKED[0], {"role": "user", "content": "what is the capital? FAST"}]
    assert text(engine, layout.base + layout.fast) == rendered(engine, asked)
    assert ASKED[1]["content"] == "what is the capital?"  # the caller's messages stay as they were


@pytest.mark.parametrize(
    "messages",
    [
        [*ASKED, {"role": "assistant", "content": "Rome"}],
        [{"role": "user", "content": [{"type": "text", "text": "what?"}]}],
    ],
)
def test_instructions_need_a_text_of_the_user_at_the_end(model: Any, messages: Any) -> None:
    with pytest.raises(ChatTemplateError, match="instructions"):
        ThinkingMode.instructions().layout(an_engine(model, CHAT_TEMPLATE), messages)


def test_variables_of_the_template_reach_the_base(model: Any) -> None:
    engine = an_engine(model, QWEN3)
    mode = ThinkingMode.of(engine)
    tools = [{"name": "calculator"}]
    bare, armed = mode.layout(engine, ASKED), mode.layout(engine, ASKED, template={"tools": tools})
    assert "calculator" in text(engine, armed.base)
    assert "calculator" not in text(engine, bare.base)
    assert (armed.fast, armed.slow) == (bare.fast, bare.slow)
    # A caller who says how to think in the template's own way does not get the tags twice.
    for flag in (True, False):
        assert mode.layout(engine, ASKED, template={"enable_thinking": flag}) == bare


def test_an_empty_mode_adds_nothing(model: Any) -> None:
    engine = an_engine(model, CHAT_TEMPLATE)
    pair = ThinkingMode(fast="", slow="B", leave="C", enter="D")
    assert pair.layout(engine, ASKED).fast == []


def test_phrases(model: Any) -> None:
    engine = an_engine(model, QWEN3)
    mode = ThinkingMode.of(engine)
    assert text(engine, mode.phrase(engine, "fast")) == "\n</think>\n\n"
    assert text(engine, mode.phrase(engine, "slow")) == "\n<think>\n"


# ------------------------------------------------------------------ answers


@pytest.mark.parametrize(
    ("written", "mode", "thought", "answer"),
    [
        ("hm, 2\n</think>\n\nit is 2", "fast", "hm, 2", "it is 2"),  # a thought that was closed
        ("hm, 2", "slow", "hm, 2", ""),  # one that was not
        ("it is 2", "fast", "", "it is 2"),
        ("<think>\nhm\n</think>\n\n2", "fast", "hm", "2"),  # the model opens it itself
        ("it is\n<think>\nhm, 2\n</think>\n\n2", "fast", "hm, 2", "2"),  # an answer broken off to think
        ("it is\n<think>\nhm", "slow", "hm", ""),  # and out of tokens there
        ("a</think>b</think>c", "fast", "a</think>b", "c"),
        ("", "slow", "", ""),
        ("", "fast", "", ""),
    ],
)  # fmt: skip
def test_split(model: Any, written: str, mode: Any, thought: str, answer: str) -> None:
    assert ThinkingMode.of(an_engine(model, QWEN3)).split(written, mode=mode) == (thought, answer)


def test_split_where_nothing_marks_a_thought() -> None:
    for mode in ("fast", "slow"):
        assert ThinkingMode.instructions().split("step by step. 2", mode=mode) == ("", "step by step. 2")
