"""Keys and values of answers, kept while their scores are read, so that a search runs no model.

A :class:`Recorder` stands in for an engine and writes down what passes by; a :class:`Replay` stands in for one in
:mod:`kvroute.heads.search`, which thereby runs as it does for ``kvroute train``.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

from kvroute import ModelInfo, TransformersEngine
from kvroute.answer_scores import read_scores, score_table
from kvroute.confidence_maps import Floats
from kvroute.files import read_tensors, write_tensors
from kvroute.labelled_answers import LabelledAnswer
from kvroute_kernels import KVView

_KIND = "kvroute.recorded-answers"
_BATCH = 64


@dataclass(frozen=True)
class Recorded:
    """What was seen of some answers.

    Attributes:
        keys, values: by answer ``[L, T - 1, H, D]`` float16: the last token has none.
        hidden: ``[n, layers + 1, hidden]`` float32, mean over an answer's tokens but the last.
        scores: by name ``[n]``.
    """

    keys: list[torch.Tensor]
    values: list[torch.Tensor]
    hidden: np.ndarray[Any, np.dtype[np.float32]]
    scores: dict[str, Floats]

    def __len__(self) -> int:
        return len(self.keys)


class Recorder:
    """An engine that writes down keys, values and hidden states of the answers that are read through it."""

    def __init__(self, engine: TransformersEngine) -> None:
        self._engine = engine
        self.seen: dict[tuple[int, ...], tuple[torch.Tensor, torch.Tensor, torch.Tensor]] = {}

    def __getattr__(self, name: str) -> Any:
        return getattr(self._engine, name)

    def read(
        self, token_ids: Sequence[Sequence[int]], start: Sequence[int], *, want: Collection[Any], **options: Any
    ) -> Iterator[tuple[list[int], Any]]:
        """As the engine's."""
        for batch, reading in self._engine.read(token_ids, start, want=want, **options):
            if reading.view is not None and reading.hidden is not None:
                (group,) = reading.view.groups  # layers that are alike, in one piece: [L, B, H, T, D]
                for b, i in enumerate(batch):
                    span = slice(start[i], len(token_ids[i]) - 1)
                    k, v = (x[:, b, :, span].transpose(1, 2).half().clone() for x in (group.keys, group.values))
                    self.seen[tuple(token_ids[i])] = k, v, reading.hidden[b].float()
            yield batch, reading


def record(engine: TransformersEngine, answers: Sequence[LabelledAnswer], folder: Path, name: str) -> Recorded:
    """Read every score of some answers and all that a search may ask for, in one pass, or take it from ``folder``."""
    path = folder / f"{name}.safetensors"
    if not path.is_file():
        recorder: Any = Recorder(engine)
        table = score_table(read_scores(recorder, answers))  # no folder: keys and values come from the same pass
        texts = [(*a.prompt.ids, *a.answer) for a in answers]  # type: ignore[union-attr,misc]
        keys, values, hidden = zip(*(recorder.seen[t] for t in texts), strict=True)
        tensors = {
            "keys": torch.cat(keys, dim=1).numpy(),
            "values": torch.cat(values, dim=1).numpy(),
            "hidden": torch.stack(hidden).numpy(),
            "lengths": np.array([k.shape[1] for k in keys]),
        }
        if not np.isfinite(tensors["keys"]).all():
            raise ValueError("keys do not fit float16")
        write_tensors(path, _KIND, tensors | {f"score {n}": v for n, v in table.items()}, {"answers": len(answers)})
    held, _ = read_tensors(path, _KIND)
    if len(held["lengths"]) != len(answers):
        raise ValueError(f"{path} holds other answers; delete it")
    sizes = held["lengths"].tolist()
    return Recorded(
        list(torch.from_numpy(held["keys"]).split(sizes, dim=1)),
        list(torch.from_numpy(held["values"]).split(sizes, dim=1)),
        held["hidden"],
        {n.removeprefix("score "): v for n, v in held.items() if n.startswith("score ")},
    )


class Replay:
    """Gives the caches of recorded answers by their numbers: the "text" of answer i is i, as often as it has tokens."""

    def __init__(self, info: ModelInfo, recorded: Sequence[Recorded]) -> None:
        self.info = info
        self.keys = [k for r in recorded for k in r.keys]
        self.values = [v for r in recorded for v in r.values]

    def text(self, index: int) -> tuple[int, ...]:
        """The stand-in for an answer's tokens."""
        return (index,) * int(self.keys[index].shape[1])

    def prefill(self, token_ids: Sequence[Sequence[int]], **_options: Any) -> Iterator[tuple[list[int], KVView]]:
        """The caches of answers, all layers."""
        order = sorted(range(len(token_ids)), key=lambda i: len(token_ids[i]))
        for at in range(0, len(order), _BATCH):
            batch = order[at : at + _BATCH]
            lengths = [len(token_ids[i]) for i in batch]
            pieces = [(self.keys[token_ids[i][0]], self.values[token_ids[i][0]]) for i in batch]
            keys, values = (
                torch.stack(
                    [_padded(p[side][:, :n], max(lengths)) for p, n in zip(pieces, lengths, strict=True)], dim=1
                )
                for side in (0, 1)
            )
            yield batch, KVView.from_contiguous(keys.transpose(2, 3), values.transpose(2, 3), lengths)


def _padded(x: torch.Tensor, length: int) -> torch.Tensor:
    """``[L, T, H, D]`` to ``[L, length, H, D]``."""
    return torch.nn.functional.pad(x.float(), (0, 0, 0, 0, 0, length - x.shape[1]))
