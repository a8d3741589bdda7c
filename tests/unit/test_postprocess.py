"""Post-processing against plain float64 computations, and its files."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from kvroute import FileFormatError, InvalidInputError, PostProcessor
from kvroute.files import write_tensors


def cloud(count: int, dim: int, seed: int = 0) -> np.ndarray:
    """Correlated vectors around a mean that is far from zero, as pooled keys and values are."""
    rng = np.random.default_rng(seed)
    spread = rng.normal(size=(dim, dim)) / np.sqrt(dim)
    return (rng.normal(size=(count, dim)) @ spread + 5 * rng.normal(size=dim)).astype(np.float32)


def test_center_removes_the_mean_of_the_fitted_vectors_and_no_other() -> None:
    x = cloud(50, 8)
    fitted = PostProcessor.fit(x, "center")
    np.testing.assert_allclose(fitted.transform(x).mean(axis=0), 0, atol=1e-5)
    np.testing.assert_allclose(fitted.transform(x[:1] + 1), x[:1] + 1 - x.mean(axis=0), atol=1e-5)


def test_standardize_gives_unit_deviation_and_survives_a_constant_dimension() -> None:
    x = cloud(50, 8)
    x[:, 3] = 7.0
    y = PostProcessor.fit(x, "standardize").transform(x)
    np.testing.assert_allclose(np.delete(y.std(axis=0), 3), 1, rtol=1e-4)
    np.testing.assert_allclose(y[:, 3], 0, atol=1e-5)


@pytest.mark.parametrize(("count", "dim"), [(200, 16), (40, 300)], ids=["more vectors", "longer vectors"])
def test_whitened_vectors_have_the_identity_as_covariance(count: int, dim: int) -> None:
    x = cloud(count, dim)
    y = PostProcessor.fit(x, "whiten", 12).transform(x).astype(np.float64)
    np.testing.assert_allclose(np.cov(y.T), np.eye(12), atol=1e-3)


@pytest.mark.parametrize(("count", "dim"), [(200, 16), (40, 300)], ids=["more vectors", "longer vectors"])
def test_projection_is_that_of_scikit_learn(count: int, dim: int) -> None:
    from sklearn.decomposition import PCA

    x = cloud(count, dim)
    new = cloud(5, dim, seed=1)
    mine = PostProcessor.fit(x, "project", 6).transform(new)
    theirs = PCA(6, svd_solver="full").fit(x.astype(np.float64)).transform(new.astype(np.float64))
    np.testing.assert_allclose(np.abs(mine), np.abs(theirs), rtol=1e-3, atol=1e-3)  # the sign of an axis is free


def test_power_goes_from_projection_to_whitening() -> None:
    x = cloud(100, 10)
    none, half, whole = (PostProcessor.fit(x, "whiten", 5, power=p).transform(x) for p in (0.0, 0.5, 1.0))
    np.testing.assert_allclose(none, PostProcessor.fit(x, "project", 5).transform(x), rtol=1e-4, atol=1e-4)
    deviation = none.std(axis=0, ddof=1)
    np.testing.assert_allclose(half, none / np.sqrt(deviation), rtol=1e-3, atol=1e-4)
    np.testing.assert_allclose(whole, none / deviation, rtol=1e-3, atol=1e-4)


def test_twelve_thousand_dimensions_from_a_few_texts_take_seconds() -> None:
    x = np.random.default_rng(0).normal(size=(60, 12_000)).astype(np.float32)
    fitted = PostProcessor.fit(x, "whiten")
    assert (fitted.input_dimension, fitted.dimension) == (12_000, 59)  # centring takes one direction of 60


@pytest.mark.parametrize(
    ("vectors", "method", "dimension", "words"),
    [
        (np.zeros((1, 4)), "center", None, "at least 2"),
        (np.zeros(4), "center", None, "at least 2"),
        (np.full((3, 4), np.nan), "whiten", None, "NaN"),
        (np.eye(4), "rotate", None, "rotate"),
        (np.eye(4), "center", 2, "keeps the dimension"),
        (np.eye(4), "whiten", 9, "3 directions"),
        (np.eye(4), "whiten", 0, "0 were"),
        (np.ones((4, 4)), "whiten", None, "0 directions"),
    ],
)
def test_what_cant_be_fitted_is_refused(vectors: np.ndarray, method: str, dimension: int | None, words: str) -> None:
    with pytest.raises(InvalidInputError, match=words):
        PostProcessor.fit(vectors, method, dimension)  # type: ignore[arg-type]


def test_vectors_of_another_size_are_refused() -> None:
    with pytest.raises(InvalidInputError, match="size 4"):
        PostProcessor.fit(cloud(9, 4), "center").transform(np.zeros((2, 5)))


@given(count=st.integers(2, 12), dim=st.integers(1, 12), power=st.floats(0, 1), seed=st.integers(0, 99))
@settings(max_examples=40, deadline=None)
def test_whatever_is_fitted_stays_finite(count: int, dim: int, power: float, seed: int) -> None:
    x = np.random.default_rng(seed).normal(size=(count, dim)).astype(np.float32)
    fitted = PostProcessor.fit(x, "whiten", power=power)
    assert np.isfinite(fitted.transform(x * 100)).all()
    assert fitted.dimension <= min(count - 1, dim)


@pytest.mark.parametrize("method", ["center", "standardize", "whiten", "project"])
def test_saved_and_loaded_it_does_the_same(method: str, tmp_path: Path) -> None:
    x = cloud(30, 6)
    fitted = PostProcessor.fit(x, method)  # type: ignore[arg-type]
    fitted.save(tmp_path / "p.safetensors", {"fingerprint": "abc"})
    loaded = PostProcessor.load(tmp_path / "p.safetensors")
    np.testing.assert_array_equal(loaded.transform(x), fitted.transform(x))
    assert (loaded.method, loaded.fitted_on, loaded.facts) == (method, 30, {"fingerprint": "abc"})


def test_a_file_that_is_not_as_it_was_written_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "p.safetensors"
    PostProcessor.fit(cloud(30, 6), "whiten").save(path)
    whole = path.read_bytes()

    path.write_bytes(whole[:-20])
    with pytest.raises(FileFormatError, match="torn"):
        PostProcessor.load(path)
    changed = bytearray(whole)
    changed[-3] ^= 1
    path.write_bytes(changed)
    with pytest.raises(FileFormatError, match="changed"):
        PostProcessor.load(path)
    path.write_bytes(whole.replace(b'"format":"1"', b'"format":"7"'))
    with pytest.raises(FileFormatError, match="newer kvroute"):
        PostProcessor.load(path)
    write_tensors(path, "kvroute.postprocess", {"scale": np.ones(3)}, {"method": "center"})
    with pytest.raises(FileFormatError, match="not whole"):
        PostProcessor.load(path)
    write_tensors(path, "kvroute.frequencies", {"frequencies": np.ones(3)}, {})
    with pytest.raises(FileFormatError, match=r"kvroute\.frequencies"):
        PostProcessor.load(path)
    path.unlink()
    with pytest.raises(FileFormatError, match="missing"):
        PostProcessor.load(path)


def test_parts_that_dont_fit_together_are_refused() -> None:
    with pytest.raises(InvalidInputError, match="fit together"):
        PostProcessor("whiten", np.zeros(3), components=np.zeros((4, 2)))


def test_blocks_count_the_same_however_large_their_values(tmp_path: Path) -> None:
    x = cloud(80, 12)
    loud = x * np.repeat([1.0, 1000.0, 0.01], 4)
    plain, louder = (PostProcessor.fit(v, "whiten", 5, blocks=[4, 4, 4]).transform(v) for v in (x, loud))
    np.testing.assert_allclose(louder, plain, rtol=1e-2, atol=1e-2)
    alone = PostProcessor.fit(loud, "project", 4)  # without blocks the loud one takes the first axes
    assert alone.components is not None
    assert np.abs(alone.components[4:8]).max() > 100 * np.abs(np.delete(alone.components, range(4, 8), axis=0)).max()
    x[:, :4] = 3.0  # a constant block does no harm
    assert np.isfinite(PostProcessor.fit(x, "whiten", 5, blocks=[4, 8]).transform(x)).all()
    for wrong in ([4, 4], [0, 12], []):
        with pytest.raises(InvalidInputError, match="size 12"):
            PostProcessor.fit(x, "whiten", 5, blocks=wrong)
