"""langchain_kvroute is light, its names are what __all__ says, and without LangChain it says what to install."""

from __future__ import annotations

import json
import subprocess
import sys
from importlib.util import find_spec

import pytest

import langchain_kvroute


def test_without_langchain_core_it_says_the_pip_line() -> None:
    code = "import sys; sys.modules['langchain_core'] = None; import langchain_kvroute"
    ran = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert ran.returncode == 1
    assert "pip install 'kvroute[langchain]'" in ran.stderr


@pytest.mark.parametrize(
    ("blocked", "here", "missing", "said"),
    [
        (  # as before langchain-core 1.8
            "langchain_core.decisions",
            "KVRouteRouter",
            "KVRouteDecisionModel",
            [
                "langchain-core>=1.8 (for langchain_core.decisions)",
                "pip install 'kvroute[langchain]' 'langchain-core>=1.8'",
            ],
        ),
        ("langchain_openai", "ChatKVRoute", "ChatOpenAIKVRoute", ["pip install 'kvroute[langchain-openai]'"]),
    ],
)
def test_without_a_package_it_says_the_pip_line(blocked: str, here: str, missing: str, said: list[str]) -> None:
    """All else is there."""
    code = (
        f"import sys; sys.modules[{blocked!r}] = None\n"
        "import kvroute, langchain_kvroute\n"
        f"langchain_kvroute.{here}\n"
        f"try:\n    langchain_kvroute.{missing}\n"
        "except kvroute.MissingExtraError as error:\n    print(error)"
    )
    printed = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout
    for words in said:
        assert words in printed


def test_it_loads_no_model_library_and_no_other_framework() -> None:
    code = "import langchain_kvroute, sys, json; print(json.dumps([n.split('.')[0] for n in sys.modules]))"
    ran = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    heavy = {"transformers", "vllm", "langchain", "langchain_openai", "llama_index", "sklearn"}
    assert not heavy & set(json.loads(ran.stdout.splitlines()[-1]))


def test_every_public_name_is_there() -> None:
    for name in langchain_kvroute.__all__:
        if name == "KVRouteDecisionModel" and find_spec("langchain_core.decisions") is None:
            continue  # needs langchain-core 1.8, as it says itself
        assert getattr(langchain_kvroute, name) is not None
    assert dir(langchain_kvroute) == sorted(langchain_kvroute.__all__)
    with pytest.raises(AttributeError, match="nonsense"):
        _ = langchain_kvroute.nonsense
