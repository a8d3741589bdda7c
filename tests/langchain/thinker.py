"""The tiny thinker for tests of chains: engine, router, questions, and handlers that note what they see."""

from __future__ import annotations

import random
import sys
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from langchain_core.callbacks import BaseCallbackHandler

from kvroute import Policy, Router, TransformersEngine

FOLDER = Path(__file__).resolve().parents[2] / "examples" / "tiny_thinker"
MODEL, POLICY, HEAD = str(FOLDER / "model"), str(FOLDER / "policy.json"), str(FOLDER / "head")
sys.path.insert(0, str(FOLDER))

from questions import make_question  # noqa: E402

_opened: list[TransformersEngine] = []


def engine() -> TransformersEngine:
    """One for all tests."""
    if not _opened:
        _opened.append(TransformersEngine.from_pretrained(MODEL))
    return _opened[0]


def router(**policy: Any) -> Router:
    """Over the shared engine: one step, thinking from difficulty 12 on, unless told otherwise."""
    return Router(engine(), Policy(**({"kind": "one-step", "tau": 12.0} | policy)), head=HEAD)


def questions(count: int, seed: int = 0) -> list[str]:
    """Of all kinds."""
    rng = random.Random(seed)
    return [make_question(rng).question for _ in range(count)]


def chat(question: str) -> list[dict[str, str]]:
    """A question as kvroute asks it."""
    return [{"role": "user", "content": question}]


@contextmanager
def counted(count: list[tuple[int, int]]) -> Any:
    """Notes the shape ``(sequences, tokens)`` of every forward pass of the shared engine's model."""
    model = engine().model
    handle = model.register_forward_pre_hook(
        lambda _, args, kwargs: count.append(tuple((kwargs.get("input_ids") if not args else args[0]).shape)),
        with_kwargs=True,
    )
    try:
        yield
    finally:
        handle.remove()


class Seen(BaseCallbackHandler):
    """Notes the runs: name, tags, metadata, parent, and how they ended."""

    def __init__(self) -> None:
        self.runs: dict[Any, dict[str, Any]] = {}

    def _begin(self, kind: str, run_id: Any, parent: Any, tags: Any, metadata: Any, name: Any) -> None:
        self.runs[run_id] = {
            "kind": kind,
            "name": name,
            "parent": parent,
            "tags": list(tags or []),
            "metadata": dict(metadata or {}),
            "end": None,
        }

    def on_chain_start(self, serialized, inputs, *, run_id, parent_run_id=None, tags=None, metadata=None, **kwargs):
        self._begin("chain", run_id, parent_run_id, tags, metadata, kwargs.get("name"))

    def on_chat_model_start(self, serialized, messages, *, run_id, parent_run_id=None, tags=None, metadata=None, **_):
        self._begin("chat", run_id, parent_run_id, tags, metadata, None)

    def on_chain_end(self, outputs, *, run_id, **_):
        self.runs[run_id]["end"] = outputs

    def on_chain_error(self, error, *, run_id, **_):
        self.runs[run_id]["end"] = error

    def tagged(self, tag: str) -> list[dict[str, Any]]:
        """Runs with a tag."""
        return [run for run in self.runs.values() if tag in run["tags"]]

    def root(self) -> dict[str, Any]:
        """The run that has no parent."""
        [found] = [run for run in self.runs.values() if run["parent"] is None]
        return found
