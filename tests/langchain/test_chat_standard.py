"""LangChain's standard tests of chat models, on the tiny thinker and on the real SmolLM2."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from langchain_tests.integration_tests import ChatModelIntegrationTests
from langchain_tests.unit_tests import ChatModelUnitTests
from standard_tests import ALLOWED, NO_JSON, TOOLS, WEAK, expected_to_fail

from kvroute import TransformersEngine
from langchain_kvroute import ChatKVRoute

FOLDER = Path(__file__).resolve().parents[2] / "examples" / "tiny_thinker"


@expected_to_fail(ALLOWED, "test_serdes")
class TestUnit(ChatModelUnitTests):
    """A server by name: nothing is opened, and nothing is asked of it."""

    @property
    def chat_model_class(self) -> type[ChatKVRoute]:
        return ChatKVRoute

    @property
    def chat_model_params(self) -> dict[str, Any]:
        return {"model": str(FOLDER / "model"), "base_url": "http://127.0.0.1:9"}

    @property
    def init_from_env_params(self) -> tuple[dict[str, str], dict[str, Any], dict[str, Any]]:
        return {"KVROUTE_API_KEY": "sesame"}, self.chat_model_params, {"api_key": "sesame"}


@expected_to_fail(WEAK, *TOOLS)
class TestThinker(ChatModelIntegrationTests):
    """With a policy: thoughts, decisions and tools are on the way of every test."""

    @pytest.fixture(autouse=True)
    def _kept(self, named_thinker: TransformersEngine) -> None:
        """The model is opened once."""

    @property
    def chat_model_class(self) -> type[ChatKVRoute]:
        return ChatKVRoute

    @property
    def chat_model_params(self) -> dict[str, Any]:
        return {"model": str(FOLDER / "model"), "policy": FOLDER / "policy.json", "max_tokens": 64}


@pytest.mark.real
@expected_to_fail(NO_JSON, *(name for name in TOOLS if "structured" in name))
class TestSmolLM2(ChatModelIntegrationTests):
    """Without tools, which its template does not know."""

    @pytest.fixture(autouse=True)
    def _kept(self, named_smollm2: TransformersEngine) -> None:
        """The model is opened once."""

    @property
    def chat_model_class(self) -> type[ChatKVRoute]:
        return ChatKVRoute

    @property
    def chat_model_params(self) -> dict[str, Any]:
        return {"model": "smollm2", "max_tokens": 48}

    @property
    def has_tool_calling(self) -> bool:
        return False

    @property
    def has_structured_output(self) -> bool:
        return True


@pytest.fixture(scope="module")
def named_thinker() -> TransformersEngine:
    """Held, so that models of this name share it."""
    found: TransformersEngine = ChatKVRoute(model=str(FOLDER / "model")).opened()
    return found


@pytest.fixture(scope="module")
def named_smollm2() -> TransformersEngine:
    """Held, so that models of this name share it."""
    found: TransformersEngine = ChatKVRoute(model="smollm2").opened()
    return found
