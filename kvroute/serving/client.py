"""An engine that is a vLLM server, or several: the client of running servers that load kvroute's connector."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from kvroute.errors import InvalidInputError
from kvroute.info import ModelInfo
from kvroute.serving.sending import Sender
from kvroute.serving.servers import Servers
from kvroute.serving.vllm_base import VLLMBase
from kvroute.serving.vllm_core import load_tokenizer


class VLLMClient(VLLMBase):
    """Writes answers on running vLLM servers, and gets their features from kvroute's connector there.

    Has the interface of :class:`~kvroute.TransformersEngine` as far as a server can give it. May be used from several
    threads and event loops at once. Requests go to the server with the fewest in flight. A server that can't be
    reached is left alone for a while, its unanswered requests go to another one, and it is tried again; a request that
    was answered, with an error too, is never sent again.

    Args:
        urls: address of a server such as ``http://host:8000``, or those of several that serve the same model.
        model: the model by the name the servers give it; by default the first that a server has.
        tokenizer: a transformers tokenizer, or the name or folder to load it from; by default the server tokenizes.
        info: what the model is, which heads and embeddings need; by default what a server says that was started by
            ``kvroute serve``.
        api_key: of the servers. Not taken from the environment.
        timeout: seconds until an answer must be there; of a stream, its next piece.
        connect_timeout: seconds until a connection must be there.
        retries: how often a request without an answer is sent again, once a server more for each further server.
        in_flight: requests that are sent at a time, all servers together.

    Raises:
        MissingExtraError: openai is not installed.
        InvalidInputError: an argument makes no sense.
        ModelLoadError: the tokenizer can't be loaded.
    """

    def __init__(
        self,
        urls: str | Sequence[str],
        *,
        model: str | None = None,
        tokenizer: Any = None,
        info: ModelInfo | None = None,
        api_key: str | None = None,
        timeout: float = 600.0,
        connect_timeout: float = 5.0,
        retries: int = 3,
        in_flight: int = 64,
    ) -> None:
        listed = [urls] if isinstance(urls, str) else list(urls)
        if not listed:
            raise InvalidInputError("No server's address was given.")
        if not (timeout > 0 and connect_timeout > 0 and retries >= 0 and in_flight >= 1):
            raise InvalidInputError("Timeouts and in_flight are above 0, and retries is not below.")
        super().__init__(
            tokenizer=load_tokenizer(tokenizer) if isinstance(tokenizer, str | Path) else tokenizer,
            info=info,
            name=model or "the server's model",
        )
        try:
            servers = Servers(listed, api_key=api_key, timeout=timeout, connect_timeout=connect_timeout)
        except BaseException:
            self.close()
            raise
        self._sender = self._link = Sender(
            servers, model=model, info=info, timeout=timeout, attempts=retries + len(listed), in_flight=in_flight
        )

    def __repr__(self) -> str:
        return f"VLLMClient({[s.url for s in self._sender.servers.all]}, model={self._sender.model!r})"

    @property
    def model(self) -> str:
        """The model, as the servers name it; asks one of them where it was not given."""
        return self._sender.model or self._wait(self._sender.named())
