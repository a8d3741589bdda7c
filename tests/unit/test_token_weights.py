"""Frequency tables: by hand, from the vocabulary, their files, and the tokenizer they belong to."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
from tokenizers import Tokenizer
from transformers import PreTrainedTokenizerFast

from kvroute import FileFormatError, FrequencyTable, InvalidInputError, ModelMismatchError


@pytest.fixture
def other_tokenizer(tiny_tokenizer: Any) -> Any:
    """The same tokens, two ids swapped."""
    text = tiny_tokenizer.backend_tokenizer.to_str()
    first, second = tiny_tokenizer.convert_ids_to_tokens([40, 41])
    swapped = text.replace(f'"{first}":40', '"@@":40').replace(f'"{second}":41', f'"{first}":41')
    return PreTrainedTokenizerFast(tokenizer_object=Tokenizer.from_str(swapped.replace('"@@":40', f'"{second}":40')))


def test_fit_counts_tokens_and_gives_every_token_one_more(tiny_tokenizer: Any) -> None:
    texts = ["the quick brown fox", "the the the"]
    table = FrequencyTable.fit(iter(texts), tiny_tokenizer)
    counts = np.ones(len(tiny_tokenizer))
    for text in texts:
        for token in tiny_tokenizer(text, add_special_tokens=False)["input_ids"]:
            counts[token] += 1
    special = list(tiny_tokenizer.added_tokens_decoder)
    counts[special] = counts.max()  # control tokens carry no meaning, so they weigh as little as the commonest token
    np.testing.assert_allclose(table.frequencies, counts / counts.sum(), rtol=1e-12)
    assert table.frequencies.sum() == pytest.approx(1)


def test_weights_are_a_over_a_plus_p(tiny_tokenizer: Any) -> None:
    table = FrequencyTable.fit(["the quick brown fox"], tiny_tokenizer)
    weights = table.weights(0.01)
    assert weights.dtype == np.float32
    np.testing.assert_allclose(weights, 0.01 / (0.01 + table.frequencies), rtol=1e-6)
    assert ((weights > 0) & (weights <= 1)).all()


def test_the_vocabulary_alone_ranks_tokens_by_their_merges(tiny_tokenizer: Any) -> None:
    table = FrequencyTable.from_vocabulary(tiny_tokenizer)
    tokens = tiny_tokenizer.convert_ids_to_tokens(range(len(tiny_tokenizer)))
    special = list(tiny_tokenizer.added_tokens_decoder)
    merged = [i for i, token in enumerate(tokens) if i not in special and len(token) > 1]
    single = [i for i, token in enumerate(tokens) if i not in special and len(token) == 1]
    assert len(merged) > 20
    assert (np.diff(table.frequencies[merged]) < 0).all()  # ids follow the order in which merges were learned
    top = table.frequencies.max()
    np.testing.assert_allclose(table.frequencies[[*special, *single]], top)


def test_a_table_fitted_on_nothing_or_on_what_is_no_text_is_refused(tiny_tokenizer: Any) -> None:
    with pytest.raises(InvalidInputError, match="at least one text"):
        FrequencyTable.fit([], tiny_tokenizer)
    with pytest.raises(InvalidInputError, match="Text 1 "):
        FrequencyTable.fit(["fine", "\ud800"], tiny_tokenizer)
    with pytest.raises(InvalidInputError, match="Text 2 is int"):
        FrequencyTable.fit(["fine", "fine", 3], tiny_tokenizer)  # type: ignore[list-item]


@pytest.mark.parametrize("values", [[], [0.0, 0.0], [1.0, -1.0], [1.0, np.nan], [1.0, np.inf], [[1.0]]])
def test_frequencies_that_are_none_are_refused(values: Any) -> None:
    with pytest.raises(InvalidInputError, match="Frequencies"):
        FrequencyTable(np.array(values), "v", "a test")


def test_another_tokenizer_is_refused(tiny_tokenizer: Any, other_tokenizer: Any) -> None:
    table = FrequencyTable.from_vocabulary(tiny_tokenizer)
    table.require(tiny_tokenizer)
    assert len(other_tokenizer) == len(tiny_tokenizer)
    with pytest.raises(ModelMismatchError, match=table.vocabulary):
        table.require(other_tokenizer)


def test_saved_and_loaded_it_is_the_same(tiny_tokenizer: Any, tmp_path: Path) -> None:
    table = FrequencyTable.fit(["the quick brown fox"], tiny_tokenizer)
    table.save(tmp_path / "t.safetensors")
    loaded = FrequencyTable.load(tmp_path / "t.safetensors")
    np.testing.assert_array_equal(loaded.frequencies, table.frequencies)
    assert (loaded.vocabulary, loaded.origin) == (table.vocabulary, table.origin)
    loaded.require(tiny_tokenizer)


def test_a_torn_or_changed_file_is_refused(tiny_tokenizer: Any, tmp_path: Path) -> None:
    path = tmp_path / "t.safetensors"
    FrequencyTable.from_vocabulary(tiny_tokenizer).save(path)
    whole = path.read_bytes()
    path.write_bytes(whole[: len(whole) // 2])
    with pytest.raises(FileFormatError, match="torn"):
        FrequencyTable.load(path)
    changed = bytearray(whole)
    changed[-8] ^= 1
    path.write_bytes(changed)
    with pytest.raises(FileFormatError, match="changed"):
        FrequencyTable.load(path)
