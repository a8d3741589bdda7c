"""benchmarks/embedding_quality.py: nothing tuned on is reported on, and its shortcuts are what kvroute computes."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from kvroute import KVEmbedder, PoolingSpec, PostProcessor, TransformersEngine

sys.path.insert(0, str(Path(__file__).parents[2] / "benchmarks"))

import itertools

from quality.candidates import Candidate, hidden_candidates, kv_candidates
from quality.data import Tasks, load, made_up
from quality.evaluate import Evaluator
from quality.extract import Store, extract, store_for
from quality.measures import cosines, ndcg_at_10, rank_correlation_of
from quality.report import differences, figure, figures, resample, table

TEXTS = [f"the {a} and the {b}" for a in ("fox", "dog", "cat") for b in ("mat", "key", "value", "token", "answer")]


@pytest.fixture
def tasks(tmp_path: Path) -> Tasks:
    """Files as in the data folder, with rows that say where they are from."""
    for name in ("banking77", "clinc150", "amazon_counterfactual_en", "tweeteval_emotion", "trec6"):
        for part in ("train", "test"):
            rows = [{"id": f"{name}-{part}-{i}", "text": f"{name} {part} {i}", "label": f"l{i % 3}"} for i in range(30)]
            write(tmp_path / f"classification/{name}.{part}.jsonl", rows)
    for name in ("stsb_en_test", "sts13"):
        rows = [{"id": f"{name}{i}", "sentence1": f"a{i}", "sentence2": f"b{i}", "score": i % 6} for i in range(60)]
        write(tmp_path / f"sts/{name}.jsonl", rows)
    for name in ("cranfield", "scifact_small", "limit_small"):
        folder = tmp_path / "retrieval" / name
        write(folder / "corpus.jsonl", [{"_id": f"d{i}", "title": "T", "text": f"{name} {i}"} for i in range(40)])
        write(folder / "queries.jsonl", [{"_id": f"q{i}", "text": f"{name} query {i}"} for i in range(30)])
        judged = "".join(f"q{i}\td{i}\t1\nq{i}\td{i + 5}\t0\n" for i in range(30))
        (folder / "qrels.tsv").write_text("query-id\tcorpus-id\tscore\n" + judged)
    return load(tmp_path, train=20, test=10, pairs=50, documents=24)


def write(path: Path, rows: list[dict[str, Any]]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps(r) + "\n" for r in rows))


def test_what_is_reported_on_is_never_tuned_on(tasks: Tasks) -> None:
    for c in tasks.classification:
        assert (len(c.train), len(c.dev), len(c.test)) == (15, 5, 10)
        assert not set(c.train) & set(c.dev)
        assert all(" train " in text for text, _ in c.train + c.dev)
        assert all(" test " in text for text, _ in c.test)
    for s in tasks.sts:
        assert len(s.dev) + len(s.test) == 50
        assert s.dev
        assert s.test
        assert not set(s.dev) & set(s.test)
    for r in tasks.retrieval:
        assert r.dev
        assert r.test
        assert not {q for q, _ in r.dev} & {q for q, _ in r.test}
        assert len(r.documents) <= 24
        for query, relevant in r.dev + r.test:  # a query's relevant document is there, and no other is counted
            number = query.split()[-1]
            assert [r.documents[i] for i in relevant] == [f"T. {r.name} {number}"]


@pytest.fixture(scope="module")
def stores(tiny_engine: TransformersEngine, tmp_path_factory: pytest.TempPathFactory) -> tuple[Store, Store]:
    return fill(tiny_engine, tmp_path_factory.mktemp("stores"), TEXTS[:12], TEXTS[9:])


def fill(engine: TransformersEngine, folder: Path, *texts: list[str]) -> Any:
    stores = []
    for listed in texts:
        store = store_for(folder, engine, listed, limit=20, before="", after="", last=False)
        assert extract(store, engine, limit=20)
        store.load()
        stores.append(store)
    return tuple(stores)


@pytest.mark.parametrize(
    "spec",
    [
        PoolingSpec(layers="first:3", part="v", weights="sif", sif_a=1e-4, heads="concat", layer_reduce="concat"),
        PoolingSpec(layers=(0, 3), part="kv", weights="position", heads="concat", layer_reduce="mean"),
        PoolingSpec.preset("paper-mteb"),
    ],
    ids=["sif", "position", "paper"],
)
def test_a_candidates_vectors_are_those_of_the_embedder(
    tiny_engine: TransformersEngine, stores: tuple[Store, Store], spec: PoolingSpec
) -> None:
    candidate = Candidate.of(spec, tiny_engine.info.num_layers)
    mine = candidate.matrix(stores[0])
    theirs = KVEmbedder(tiny_engine, spec).encode(TEXTS[:12])
    np.testing.assert_allclose(cosines(mine, theirs), 1, atol=1e-4)  # the store is float16
    assert candidate.depth == spec.deepest_layer(tiny_engine.info) + 1


def test_hidden_states_are_the_models_own(tiny_engine: TransformersEngine, stores: tuple[Store, Store]) -> None:
    import torch

    ids = tiny_engine.tokenizer(TEXTS[0], return_tensors="pt")["input_ids"]
    with torch.inference_mode():
        states = tiny_engine.model(ids, output_hidden_states=True).hidden_states
    for layer in (0, 2, len(states) - 1):
        whole, rest = (
            Candidate("hidden", (layer,), "h", "mean", first).matrix(stores[0])[0] for first in (True, False)
        )
        np.testing.assert_allclose(whole, states[layer][0].mean(dim=0), rtol=2e-3, atol=2e-3)
        np.testing.assert_allclose(rest, states[layer][0, 1:].mean(dim=0), rtol=2e-3, atol=2e-3)


def test_whitening_by_inner_products_is_the_post_processors(stores: tuple[Store, Store]) -> None:
    short, documents = stores
    evaluator = Evaluator(made_up_for(short, documents), short, documents, dimension=5, fit_texts=10, seed=0)
    candidate = Candidate("kv", (0, 2, 4), "kv", "position")
    assert len(candidate.pieces()) == 6
    found = evaluator.dev.vectors(candidate)
    whole = np.concatenate([candidate.matrix(short), candidate.matrix(documents)])
    blocks = [whole.shape[1] // 6] * 6
    wanted = PostProcessor.fit(whole[evaluator.fitted], "whiten", 5, blocks=blocks).transform(whole)[evaluator.dev.rows]
    np.testing.assert_allclose(found @ found.T, wanted @ wanted.T, rtol=1e-2, atol=1e-2)  # axes may point either way


def made_up_for(short: Store, documents: Store) -> Tasks:
    """Tasks over the texts of two stores."""
    from quality.data import Classification, Retrieval, Sts

    t, d = short.texts, documents.texts
    labelled = [(x, str(i % 2)) for i, x in enumerate(t)]
    graded = [(a, b, float(i)) for i, (a, b) in enumerate(itertools.pairwise(t))]
    queries = [(x, {i % len(d): 1.0}) for i, x in enumerate(t)]
    return Tasks(
        [Classification(n, labelled[:6], labelled[6:9], labelled[9:]) for n in ("one", "two")],
        [Sts("pairs", graded[:6], graded[6:])],
        [Retrieval("facts", d, queries[:6], queries[6:])],
    )


def test_report_compares_in_pairs(tiny_engine: TransformersEngine, stores: tuple[Store, Store]) -> None:
    tasks = made_up_for(*stores)
    evaluator = Evaluator(tasks, *stores, dimension=5, fit_texts=10, seed=0)
    candidates = {"one": Candidate("kv", (0, 1), "v"), "other": Candidate("hidden", (2,), "h")}
    results = {k: (c, evaluator.run(c, "test")) for k, c in candidates.items()}
    one, other = (rows for _, rows in results.values())
    picks = resample(one.counts(), 30, 0)
    assert one.counts() == {"one": 3, "two": 3, "pairs": 5, "facts": 6}
    assert table(results, picks).count("\n") == 3
    assert "[+0.000, +0.000]" in differences(one, one, picks)
    same = figures(one, one, one, picks)
    assert {f.ok for f in same.values()} == {True}
    assert same["fast_over_best"].value == 1
    assert figures(one, one, other, picks)["sts_best_minus_hidden"].value == pytest.approx(
        one.group("sts") - other.group("sts")
    )
    raw = evaluator.run(candidates["one"], "test", whitened=False)
    assert list(raw.tasks()) == ["sts", "retrieval"]


def test_figure_is_undecided_where_the_bound_lies_within_the_interval() -> None:
    assert figure(1.0, [0.9, 1.1], ">= 0.97").ok is None
    assert figure(1.0, [0.99, 1.1], ">= 0.97").ok is True
    assert figure(0.5, [0.4, 0.6], ">= 0.97").ok is False


def test_measures_are_those_of_the_libraries() -> None:
    from scipy.stats import spearmanr
    from sklearn.metrics import ndcg_score

    rng = np.random.default_rng(0)
    queries, documents = rng.normal(size=(4, 6)), rng.normal(size=(20, 6))
    gains = rng.integers(0, 3, size=(4, 20))
    gains[:, 0] = 1
    judged = [{i: float(g) for i, g in enumerate(row) if g} for row in gains]
    similarity = cosines(np.repeat(queries, 20, axis=0), np.tile(documents, (4, 1))).reshape(4, 20)
    wanted = [ndcg_score(gains[i : i + 1], similarity[i : i + 1], k=10) for i in range(4)]
    np.testing.assert_allclose(ndcg_at_10(queries, documents, judged), wanted)
    a, b = rng.normal(size=30), rng.integers(0, 4, size=30)
    assert rank_correlation_of(np.arange(30), a, b) == pytest.approx(spearmanr(a, b).statistic)


def test_candidates_cover_every_hidden_state_and_half_the_depth() -> None:
    assert {c.layers[0] for c in hidden_candidates(30)} == set(range(31))
    kv = kv_candidates(30)
    assert len(kv) == len(set(kv))
    assert {c.depth for c in kv} >= {4, 8, 15, 30}
    assert all(max(c.layers) < 30 and len(set(c.layers)) == len(c.layers) for c in kv)
    assert kv_candidates(5)  # a shallow model has candidates too
    assert len(made_up().texts()[0]) > 40
