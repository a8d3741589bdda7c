"""``KVRouteEncoder`` in mteb's own ``evaluate``, on tasks of made-up rows that are downloaded from nowhere."""

from __future__ import annotations

import sys
import warnings
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from scipy.stats import spearmanr

from kvroute import KVEmbedder, PoolingSpec, TransformersEngine
from kvroute.errors import InvalidInputError, MissingExtraError
from kvroute.mteb_encoder import KVRouteEncoder

pytest.importorskip("mteb")

SPEC = PoolingSpec(layers=(1, 2), part="v", heads="concat", layer_reduce="concat")
THINGS = ("fox", "dog", "cat", "mat", "key", "value", "token", "answer", "model", "country")
PAIRS = [(f"the {a}", f"a {b}", float(2 + 3 * (a == b) - 2 * (len(a) % 2))) for a in THINGS for b in (a, THINGS[0])]
STS, DOCUMENTS = "MadeUpSTS", "MadeUpRetrieval"


def tasks() -> list[Any]:
    """An STS and a retrieval task whose rows are here."""
    from datasets import Dataset
    from mteb.abstasks import AbsTaskRetrieval, AbsTaskSTS
    from mteb.abstasks.task_metadata import TaskMetadata

    def about(name: str, kind: Any, score: str) -> TaskMetadata:
        return TaskMetadata(
            name=name, description="Made up.", type=kind, eval_langs=["eng-Latn"], main_score=score,
            dataset={"path": "nobody/nothing", "revision": "0"}, category="t2t",
        )  # fmt: skip

    class MadeUpSTS(AbsTaskSTS):  # type: ignore[misc]
        metadata = about(STS, "STS", "cosine_spearman")

    class MadeUpRetrieval(AbsTaskRetrieval):  # type: ignore[misc]
        metadata = about(DOCUMENTS, "Retrieval", "ndcg_at_10")

    sts, retrieval = MadeUpSTS(), MadeUpRetrieval()
    one, two, score = zip(*PAIRS, strict=True)
    sts.dataset = {"test": Dataset.from_dict({"sentence1": one, "sentence2": two, "score": score})}
    documents = [{"id": t, "title": t, "text": f"all of the {t}"} for t in THINGS]
    queries = [{"id": t, "text": f"where is the {t}?"} for t in THINGS]
    retrieval.dataset = {
        "default": {
            "test": {
                "corpus": Dataset.from_list(documents),
                "queries": Dataset.from_list(queries),
                "relevant_docs": {t: {t: 1} for t in THINGS},
                "top_ranked": None,
            }
        }
    }
    for task in (sts, retrieval):
        task.data_loaded = True
    return [sts, retrieval]


def scores(encoder: KVRouteEncoder) -> dict[str, float]:
    """Main score by task."""
    import mteb

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # mteb's own
        found = mteb.evaluate(encoder, tasks(), cache=None, co2_tracker=False, show_progress_bar=False)
    assert found.model_name == encoder.mteb_model_meta.name
    return {r.task_name: r.scores["test"][0]["main_score"] for r in found.task_results}


def test_mteb_gives_what_the_vectors_give(tiny_engine: TransformersEngine) -> None:
    embedder = KVEmbedder(tiny_engine, SPEC, prompts={"query": "question: ", "STS": "text: "})
    found = scores(KVRouteEncoder(embedder))
    first, second, gold = zip(*PAIRS, strict=True)
    a, b = (embedder.encode(list(side), prompt="text: ", normalize=True) for side in (first, second))
    assert found[STS] == pytest.approx(spearmanr((a * b).sum(axis=1), gold).statistic, abs=1e-5)
    queries = embedder.encode_query([f"where is the {t}?" for t in THINGS])
    similarity = embedder.similarity(queries, embedder.encode([f"{t} all of the {t}" for t in THINGS]))
    rank = (similarity > similarity.diagonal()[:, None]).sum(axis=1)
    assert found[DOCUMENTS] == pytest.approx(float(np.mean(np.where(rank < 10, 1 / np.log2(rank + 2), 0))), abs=1e-4)


def test_other_vectors_have_another_name(tiny_engine: TransformersEngine) -> None:
    one, two = (KVRouteEncoder(KVEmbedder(tiny_engine, SPEC, prompts=p)) for p in ({}, {"query": "q: "}))
    assert one.mteb_model_meta.name.startswith("kvroute/tiny-llama-")
    assert one.mteb_model_meta.name != two.mteb_model_meta.name
    assert one.mteb_model_meta.embed_dim == one.embedder.dimension
    assert KVRouteEncoder(one.embedder, name="me/mine").mteb_model_meta.name == "me/mine"
    with pytest.raises(InvalidInputError, match="ORGANIZATION"):
        KVRouteEncoder(one.embedder, name="mine")


def test_texts_that_mteb_may_hold_are_embedded(tiny_engine: TransformersEngine) -> None:
    encoder = KVRouteEncoder(KVEmbedder(tiny_engine, SPEC))
    task: Any = {"task_metadata": SimpleNamespace(name="x", type="STS"), "hf_split": "test", "hf_subset": "default"}
    found = encoder.encode([{"text": ["", "the fox "]}, {"text": ["the cat " * 3000]}], **task)
    assert found.shape == (3, encoder.embedder.dimension)
    assert np.isfinite(found).all()
    np.testing.assert_allclose(
        encoder.similarity_pairwise(found, found[::-1]), encoder.similarity(found, found[::-1]).diagonal(), atol=1e-6
    )
    assert encoder.encode([], **task).shape == (0, encoder.embedder.dimension)
    with pytest.raises(InvalidInputError, match="image"):
        encoder.encode([{"image": [None]}], **task)


def test_without_mteb_the_extra_is_named(tiny_engine: TransformersEngine, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "mteb", None)
    with pytest.raises(MissingExtraError, match="eval"):
        KVRouteEncoder(KVEmbedder(tiny_engine, SPEC))
