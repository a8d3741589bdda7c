"""What is raised where a cache can't be read as asked."""

from __future__ import annotations


class KVViewError(ValueError):
    """The tensors do not make a KV view, or the view can't answer what was asked."""


class WindowError(KVViewError):
    """Tokens were asked for that a layer with a window holds no more."""

    def __init__(self, layer: int, sequence: int, asked: int, held: int) -> None:
        self.layer = layer
        self.sequence = sequence
        self.asked = asked
        self.held = held
        super().__init__(
            f"Layer {layer} holds only a window of the tokens: sequence {sequence} was asked for token {asked}, "
            f"the first one held is {held}."
        )


class NonFiniteKVError(KVViewError):
    """The cache holds NaN or infinity."""

    def __init__(self, sequence: int, layer: int, position: int, part: str) -> None:
        self.sequence = sequence
        self.layer = layer
        self.position = position
        self.part = part
        super().__init__(f"{part} of layer {layer}, token {position}, sequence {sequence} are not finite.")
