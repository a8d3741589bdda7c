"""What is compared: ways to pool keys and values, and ways to pool hidden states, at every layer."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Literal, TypeVar

import numpy as np

from kvroute.embedding_evaluation.measures import Array
from kvroute.embedding_evaluation.states import FORMS, SIF_A, States, sif_name
from kvroute.errors import SpecError
from kvroute.pooling import PoolingSpec

Side = Literal["kv", "hidden"]


@dataclass(frozen=True)
class Candidate:
    """A way from states to one raw vector a text.

    Attributes:
        side: ``kv`` or ``hidden``.
        layers: attention layers, or the one hidden state (0 is the embedding).
        part: ``k``, ``v`` or ``kv``.
        weights: of the mean over tokens, one of its form's.
        reduce: ``concat`` or ``mean`` over layers (heads side by side), or ``paper`` (mean over layers and heads).
        form: how the text was put to the model.
    """

    side: Side
    layers: tuple[int, ...]
    part: str = "kv"
    weights: str = "mean"
    reduce: str = "concat"
    form: str = "plain"

    @classmethod
    def of(cls, spec: PoolingSpec, num_layers: int) -> Candidate:
        """A spec as a candidate. A vector's length does not matter: they are compared by their cosines.

        Raises:
            SpecError: a spec that states can't tell: a window, the first token, or other weights than were kept.
        """
        weights = {None: "mean", "position": "position", "sif": sif_name(spec.sif_a)}[spec.weights]
        if spec.tokens == "last":
            weights = "last"
        kept = spec.sif_a in SIF_A or spec.weights != "sif"
        if spec.window is not None or spec.tokens == "first" or not kept:
            raise SpecError(
                f"The evaluation keeps no states of a window, of the first token, or of SIF weights other than those "
                f"of a = {', '.join(f'{a:g}' for a in SIF_A)}.",
                hint="Measure it as an embedder: KVEmbedder(engine, spec).save(folder), and --embedder folder.",
            )
        layers = spec.read_layers(num_layers)
        reduce: str = "mean" if spec.layer_reduce == "sum" else spec.layer_reduce
        if spec.heads == "mean":
            if reduce == "concat" and len(layers) > 1:
                raise SpecError("The evaluation can't lay layers side by side whose heads are averaged.")
            reduce = "paper"
        return cls("kv", layers, spec.part, weights, "concat" if reduce == "last" else reduce)

    @property
    def depth(self) -> int:
        """Layers that have to run."""
        return max(self.layers) + (1 if self.side == "kv" else 0)

    @property
    def name(self) -> str:
        """What a table says."""
        weights = f"{self.weights} token" if self.weights == "last" else self.weights
        form = {"plain": "", "prompt": ", in a prompt", "twice": ", text twice"}[self.form]
        if self.side == "hidden":
            return f"hidden {self.layers[0]}, {weights}{form}"
        reduce = {"concat": "side by side", "mean": "mean of layers", "paper": "mean of layers and heads"}[self.reduce]
        several = reduce if len(self.layers) > 1 else "1 layer"
        return f"{self.part.upper()} {_spans(self.layers)}, {several}, {weights}{form}"

    @property
    def parts(self) -> int:
        """Parts of equal size that lie side by side in its vector."""
        if self.side == "hidden":
            return 1
        return len(self.part) * (len(self.layers) if self.reduce == "concat" else 1)

    def pieces(self) -> list[Candidate]:
        """Candidates whose vectors side by side are this one's, up to the order of dimensions."""
        if self.side == "hidden" or self.reduce != "concat":
            return [self]
        return [replace(self, layers=(layer,), part=part) for layer in self.layers for part in self.part]

    def matrix(self, forms: Mapping[str, States]) -> Array:
        """``[n, dim]`` float32 for all texts of the states, keys before values, layers in order."""
        states = forms[self.form]
        if self.side == "hidden":
            return np.asarray(states.hidden[states.form.hidden.index(self.weights), self.layers[0]], dtype=np.float32)
        weights = states.form.kv.index(self.weights)
        halves = []
        for part in self.part:
            layers = [states.kv[weights, layer, "kv".index(part)].astype(np.float32) for layer in self.layers]
            half = np.concatenate(layers, axis=1) if self.reduce == "concat" else np.mean(layers, axis=0)
            if self.reduce == "paper":
                half = half.reshape(len(half), states.heads, -1).mean(axis=1)
            halves.append(half)
        return np.concatenate(halves, axis=1)


@dataclass(frozen=True)
class Joined:
    """Several candidates side by side, such as shallow values of the text and deep ones of a prompt's last token."""

    members: tuple[Candidate, ...]

    @property
    def depth(self) -> int:
        """Layers that have to run."""
        return max(m.depth for m in self.members)

    @property
    def name(self) -> str:
        """What a table says."""
        return " beside ".join(m.name for m in self.members)

    @property
    def parts(self) -> int:
        """Parts that lie side by side in its vector; of equal size where the members' are."""
        return sum(m.parts for m in self.members)

    @property
    def form(self) -> str:
        """Form of the most demanding member."""
        return max((m.form for m in self.members), key=list(FORMS).index)

    def pieces(self) -> list[Candidate]:
        """As those of a candidate."""
        return [piece for m in self.members for piece in m.pieces()]

    def matrix(self, forms: Mapping[str, States]) -> Array:
        """As that of a candidate."""
        return np.concatenate([m.matrix(forms) for m in self.members], axis=1)


Way = Candidate | Joined
SomeWay = TypeVar("SomeWay", bound=Way)


def layer_sets(num_layers: int) -> list[tuple[int, ...]]:
    """Prefixes of the depth, bands, a shallow part with the last layers, and every second layer."""

    def at(fraction: float) -> int:
        return round(num_layers * fraction)

    sets = [tuple(range(at(f))) for f in (1 / 8, 1 / 5, 7 / 30, 1 / 3, 2 / 5, 1 / 2, 2 / 3, 1)]
    sets += [tuple(range(at(low), at(high))) for low, high in ((1 / 8, 1 / 3), (1 / 4, 1 / 2), (1 / 2, 1), (2 / 3, 1))]
    sets += [tuple(range(max(num_layers - 4, 0), num_layers)), tuple(range(0, num_layers, 2))]
    sets += [tuple(range(at(4 / 15))) + tuple(range(max(num_layers - n, 0), num_layers)) for n in (2, 4)]
    sets += [(*range(at(1 / 5)), *range(at(2 / 5), at(2 / 5) + 2))]
    cleaned = [tuple(dict.fromkeys(layer for layer in s if layer < num_layers)) for s in sets]
    return list(dict.fromkeys(s for s in cleaned if s))


def kv_candidates(num_layers: int, form: str = "plain") -> list[Candidate]:
    """Sets of layers of values, and of keys beside them, in each of the form's weights."""
    out: list[Candidate] = []
    for weights in FORMS[form].kv:
        wide = weights.startswith(("sif", "last"))
        for layers in layer_sets(num_layers)[:: 1 if wide else 3]:  # a coarser look where less is to be had
            if form == "prompt" and weights == "last":  # where the last token is always the same, so is layer 0
                layers = tuple(layer for layer in layers if layer)
            if not layers:
                continue
            out.append(Candidate("kv", layers, "v", weights, form=form))
            if weights != "position":
                out.append(Candidate("kv", layers, "v", weights, "mean", form))
            if wide:
                out.append(Candidate("kv", layers, "kv", weights, form=form))
    return list(dict.fromkeys(out))


def hidden_candidates(num_layers: int, form: str = "plain") -> list[Candidate]:
    """Every hidden state in each of the form's weights."""
    return [
        Candidate("hidden", (layer,), "h", weights, form=form)
        for weights in FORMS[form].hidden
        for layer in range(0 if form == "plain" and weights != "last" else 1, num_layers + 1)
    ]


def _spans(layers: tuple[int, ...]) -> str:
    """``0-7 and 26-29``, or ``0, 2, ... 28``."""
    spans: list[list[int]] = []
    for layer in layers:
        if spans and layer == spans[-1][-1] + 1:
            spans[-1].append(layer)
        else:
            spans.append([layer])
    if len(spans) > 4:
        return f"{layers[0]}, {layers[1]}, ... {layers[-1]}"
    return " and ".join(f"{s[0]}-{s[-1]}" if len(s) > 1 else str(s[0]) for s in spans)
