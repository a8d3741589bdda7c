"""Every exception that kvroute raises on purpose.

All share the root :class:`KVRouteError`, carry a ``hint`` that says what to do next, and keep the
exception that caused them as ``__cause__``.
"""

from __future__ import annotations


class KVRouteError(Exception):
    """Root of all kvroute errors. ``str(error)`` says what was wrong and, behind it, the mend."""

    def __init__(self, message: str, *, hint: str | None = None) -> None:
        self.message = message
        self.hint = hint
        super().__init__(message if hint is None else f"{message} {hint}")


def fault_text(error: Exception) -> str:
    """A fault in words, for a result that goes on without what failed."""
    return str(error) if isinstance(error, KVRouteError) else f"{type(error).__name__}: {error}"


class InvalidInputError(KVRouteError, ValueError):
    """An argument or a file holds something that can't be used."""


class EmptyTextError(InvalidInputError):
    """A text holds no token. ``index`` is its place in the input."""

    def __init__(self, index: int) -> None:
        self.index = index
        super().__init__(
            f"Text {index} is empty: it has no token, so it has no keys and values to read.",
            hint="Remove it, or replace it by a text of your own that stands for 'nothing'.",
        )


class TextTooLongError(InvalidInputError):
    """A text does not fit the model's context. ``index`` is its place, ``length`` its tokens."""

    def __init__(self, index: int, length: int, limit: int, *, hint: str | None = None) -> None:
        self.index = index
        self.length = length
        self.limit = limit
        super().__init__(
            f"Text {index} has {length} tokens, and the limit is {limit}.",
            hint=hint or "Pass truncate=True to keep the first tokens, or split the text.",
        )


class SpecError(InvalidInputError):
    """A pooling or chain spec makes no sense, alone or for this model."""


class AskError(InvalidInputError):
    """What a request to a server asks of kvroute can't be done. Its text goes to the client: no path, no secret."""


class UnsupportedModelError(KVRouteError):
    """The model keeps no KV cache that kvroute can read, or not the part that was asked for."""


class UnsupportedLayoutError(KVRouteError):
    """The serving engine stores keys and values in a way that kvroute can't read."""


class WindowedLayerError(KVRouteError):
    """A layer holds only a window of the tokens, and tokens outside it were asked for."""


class ModelMismatchError(KVRouteError):
    """Something fitted on one model was given to another."""


class ModelLoadError(KVRouteError):
    """A model or tokenizer could not be found, read or converted."""


class NonFiniteCacheError(KVRouteError):
    """The KV cache holds NaN or infinity. ``layer`` and ``position`` say where."""

    def __init__(self, sequence: int, layer: int, position: int, part: str) -> None:
        self.sequence = sequence
        self.layer = layer
        self.position = position
        self.part = part
        super().__init__(
            f"The {part} of layer {layer} at token {position} of sequence {sequence} are not finite.",
            hint="Load the model in float32 or bfloat16 (float16 overflows in some models), or check its weights.",
        )


class ChatTemplateError(KVRouteError):
    """Chat messages were given, and the tokenizer has no chat template (or it failed)."""


class CalibrationError(KVRouteError):
    """A calibrator can't be fitted on these rows, or its file can't be used."""


class FileFormatError(KVRouteError):
    """A file of kvroute's own is torn, changed, of another format or of a newer version."""


class OutOfMemoryError(KVRouteError):
    """Even the smallest batch does not fit the memory."""


class ServerError(KVRouteError):
    """A server gave an error, or an answer that can't be used. ``status`` is its HTTP status, or None."""

    def __init__(self, message: str, *, hint: str | None = None, status: int | None = None) -> None:
        self.status = status
        super().__init__(message, hint=hint)


class ServerUnreachableError(ServerError):
    """No server could be reached, or the connection broke and could not be made again."""


class ServerTimeoutError(ServerError):
    """A server took longer than the client waits."""


class ConnectorMissingError(ServerError):
    """A server answers, and kvroute does not run inside it."""


class MissingExtraError(KVRouteError, ImportError):
    """A package of an optional extra is not installed."""

    def __init__(self, package: str, extra: str, *, hint: str | None = None) -> None:
        self.package = package
        self.extra = extra
        super().__init__(
            f"This needs the package {package}, which is not installed.",
            hint=hint or f"Install it with: pip install 'kvroute[{extra}]'",
        )
