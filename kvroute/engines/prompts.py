"""Texts and chats to token ids."""

from __future__ import annotations

import threading
from collections.abc import Sequence
from typing import Any

from kvroute.errors import ChatTemplateError, InvalidInputError
from kvroute.generation import Message, Prompt, TokenIds


class PromptTokenizer:
    """A tokenizer behind a lock: fast tokenizers keep settings that threads would fight over.

    Args:
        tokenizer: a transformers tokenizer.
        name: the model's name, for error messages.
    """

    def __init__(self, tokenizer: Any, name: str) -> None:
        self._tokenizer = tokenizer
        self._name = name
        self._lock = threading.Lock()

    def tokenize(self, prompt: Prompt, *, open_turn: bool = True) -> list[int]:
        """Token ids of a text as it stands, or of a chat.

        Args:
            prompt: the text, or messages.
            open_turn: for messages, whether the model's turn is opened at the end.

        Raises:
            ChatTemplateError: messages, and no chat template (or it refuses them).
            InvalidInputError: the text can't be tokenized (a lone surrogate, say).
        """
        if isinstance(prompt, TokenIds):
            return list(prompt.ids)
        if isinstance(prompt, str):
            return self.tokenize_texts([prompt])[0]
        return self.tokenize_texts([self.render(prompt, open_turn=open_turn)], special_tokens=False)[0]

    def tokenize_texts(self, texts: Sequence[str], *, special_tokens: bool = True) -> list[list[int]]:
        """Token ids of plain texts, in one call of the tokenizer.

        Raises:
            InvalidInputError: a text can't be tokenized, naming its index.
        """
        for index, text in enumerate(texts):
            try:
                text.encode()
            except UnicodeEncodeError as error:
                raise InvalidInputError(
                    f"Text {index} can't be tokenized: {error.reason} at character {error.start}.",
                    hint="Clean it first, e.g. with text.encode('utf-8', 'replace').decode().",
                ) from error
        if not texts:
            return []
        with self._lock:
            found = self._tokenizer(list(texts), add_special_tokens=special_tokens)
        return [list(ids) for ids in found["input_ids"]]

    def render(self, messages: Sequence[Message], *, open_turn: bool = True) -> str:
        """The text of a chat by the tokenizer's chat template.

        Raises:
            ChatTemplateError: no template, or it refuses the messages.
        """
        if not getattr(self._tokenizer, "chat_template", None):
            raise ChatTemplateError(
                f"The tokenizer of {self._name} has no chat template, so messages can't be written out.",
                hint="Pass a plain text, or set tokenizer.chat_template.",
            )
        try:
            return str(
                self._tokenizer.apply_chat_template(
                    [dict(m) for m in messages], tokenize=False, add_generation_prompt=open_turn
                )
            )
        except Exception as error:
            raise ChatTemplateError(
                f"The chat template refused the messages: {error}",
                hint="A message is {'role': ..., 'content': ...} with a role the template knows.",
            ) from error
