"""``kvroute.embedding_evaluation``: nothing tuned on is reported on, and its shortcuts are what kvroute computes."""

from __future__ import annotations

import itertools
import json
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from kvroute import KVEmbedder, PoolingSpec, PostProcessor, TransformersEngine
from kvroute.embedding_evaluation import EvaluationOptions, OutOfTimeError, Tasks, evaluate_embeddings, load_tasks
from kvroute.embedding_evaluation.candidates import Candidate, Joined, hidden_candidates, kv_candidates
from kvroute.embedding_evaluation.evaluator import Evaluator, open_texts
from kvroute.embedding_evaluation.measures import (
    clusters,
    cosines,
    ndcg_at_10,
    rank_correlation_of,
    unit,
    v_measure,
)
from kvroute.embedding_evaluation.pairs import open_pairs
from kvroute.embedding_evaluation.references import reference
from kvroute.embedding_evaluation.results import Judge
from kvroute.embedding_evaluation.run import BEST_HIDDEN, CHOSEN, CHOSEN_HALF
from kvroute.embedding_evaluation.states import FORMS, Reader, States
from kvroute.embedding_evaluation.tasks import Classification, Retrieval, Sts
from kvroute.errors import InvalidInputError, ModelLoadError, SpecError, UnsupportedModelError

sys.path.insert(0, str(Path(__file__).parents[2] / "benchmarks"))

from _made_up_tasks import made_up_tasks
from embedding_quality import compared_figures

TEXTS = [f"the {a} and the {b}" for a in ("fox", "dog", "cat") for b in ("mat", "key", "value", "token", "answer")]


def write(path: Path, rows: list[dict[str, Any]]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps(r) + "\n" for r in rows))


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Files as in the data folder, with rows that say where they are from."""
    for name in ("banking", "emotion"):
        for part in ("train", "test"):
            rows = [{"id": f"{name}-{part}-{i}", "text": f"{name} {part} {i}", "label": f"l{i % 3}"} for i in range(30)]
            write(tmp_path / f"classification/{name}.{part}.jsonl", rows)
    rows = [{"id": f"sts{i}", "sentence1": f"a{i}", "sentence2": f"b{i}", "score": i % 6} for i in range(60)]
    write(tmp_path / "sts/stsb.jsonl", rows)
    facts = tmp_path / "retrieval" / "facts"
    write(facts / "corpus.jsonl", [{"_id": f"d{i}", "title": "T", "text": f"facts {i}"} for i in range(40)])
    write(facts / "queries.jsonl", [{"_id": f"q{i}", "text": f"facts query {i}"} for i in range(30)])
    judged = "".join(f"q{i}\td{i}\t1\nq{i}\td{i + 5}\t0\n" for i in range(30))
    (facts / "qrels.tsv").write_text("query-id\tcorpus-id\tscore\n" + judged)
    return tmp_path


# ---------------------------------------------------------------------- rows


def test_what_is_reported_on_is_never_tuned_on(folder: Path) -> None:
    tasks = load_tasks(folder, 24)
    assert [c.name for c in tasks.classification] == ["banking", "emotion"]
    for c in tasks.classification:
        assert (len(c.train), len(c.dev), len(c.test)) == (18, 6, 9)
        assert not set(c.train) & set(c.dev)
        assert all(" train " in text for text, _ in c.train + c.dev)
        assert all(" test " in text for text, _ in c.test)
    for s in tasks.sts:
        assert len(s.dev) + len(s.test) == 21
        assert s.dev
        assert s.test
        assert not set(s.dev) & set(s.test)
    for r in tasks.retrieval:
        assert r.dev
        assert r.test
        assert not {q for q, _ in r.dev} & {q for q, _ in r.test}
        assert len(r.documents) == 12
        for query, relevant in r.dev + r.test:  # a query's relevant document is there, and no other is counted
            number = query.split()[-1]
            assert [r.documents[i] for i in relevant] == [f"T. facts {number}"]
    held = {text for c in tasks.classification for text, _ in c.test}
    held |= {t for s in tasks.sts for a, b, _ in s.test for t in (a, b)}
    held |= {q for r in tasks.retrieval for q, _ in r.test}
    assert not held & set(open_texts(tasks))
    pairs = open_pairs(tasks)
    assert not held & {t for p in pairs for t in (p.a, p.b)}
    assert {p.source for p in pairs} == {"banking", "emotion", "stsb", "facts"}
    assert {p.source for p in open_pairs(tasks, without=["banking", "facts"])} == {"emotion", "stsb"}
    assert all(p.group is None or p.group.startswith(p.source) for p in pairs)


def test_all_rows_are_taken_where_none_are_said(folder: Path) -> None:
    tasks = load_tasks(folder)
    assert len(tasks.classification[0].test) == 30
    assert len(tasks.retrieval[0].documents) == 40
    assert len(tasks.retrieval[0].dev) + len(tasks.retrieval[0].test) == 30


def test_a_folder_that_cannot_be_measured_on_says_why(folder: Path, tmp_path_factory: pytest.TempPathFactory) -> None:
    with pytest.raises(InvalidInputError, match=r"no set.*\n?.*"):
        load_tasks(tmp_path_factory.mktemp("empty"))
    with pytest.raises(InvalidInputError, match="too few"):
        load_tasks(folder, 2)
    write(folder / "sts/odd.jsonl", [{"id": "1", "sentence1": "a", "sentence2": "b"}])
    with pytest.raises(InvalidInputError, match="no score"):
        load_tasks(folder)
    write(folder / "sts/odd.jsonl", [{"id": "1", "sentence1": "a"}])
    with pytest.raises(InvalidInputError, match="sentence2"):
        load_tasks(folder)


# ---------------------------------------------------------------------- states and candidates


def read(engine: TransformersEngine, folder: Path, *forms: str) -> dict[str, States]:
    reader = Reader(engine, TEXTS[:12], TEXTS[9:], limits=(20, 20), folder=folder)
    found = {name: reader.read(FORMS[name], progress=False) for name in forms}
    assert all(found.values())
    return found  # type: ignore[return-value]


@pytest.fixture(scope="module")
def forms(tiny_engine: TransformersEngine, tmp_path_factory: pytest.TempPathFactory) -> dict[str, States]:
    return read(tiny_engine, tmp_path_factory.mktemp("states"), *FORMS)


@pytest.mark.parametrize(
    "spec",
    [
        PoolingSpec(layers="first:3", part="v", weights="sif", sif_a=1e-4, heads="concat", layer_reduce="concat"),
        PoolingSpec(layers=(0, 3), part="kv", weights="position", heads="concat", layer_reduce="mean"),
        PoolingSpec(layers=(1, 3), part="k", heads="concat", layer_reduce="last"),
        PoolingSpec(layers="all", part="v", tokens="last", heads="concat", layer_reduce="sum"),
        PoolingSpec.preset("paper-mteb"),
    ],
    ids=["sif", "position", "deepest", "last", "paper"],
)
def test_a_candidates_vectors_are_those_of_the_embedder(
    tiny_engine: TransformersEngine, forms: dict[str, States], spec: PoolingSpec
) -> None:
    candidate = Candidate.of(spec, tiny_engine.info.num_layers)
    mine = candidate.matrix(forms)
    theirs = KVEmbedder(tiny_engine, spec).encode(forms["plain"].texts)
    np.testing.assert_allclose(cosines(mine, theirs), 1, atol=1e-4)  # states are float16
    assert candidate.depth == spec.deepest_layer(tiny_engine.info) + 1


def test_a_spec_that_states_cannot_tell_is_refused(tiny_engine: TransformersEngine) -> None:
    for spec in (
        PoolingSpec(window=4),
        PoolingSpec(tokens="first"),
        PoolingSpec(weights="sif", sif_a=0.5),
        PoolingSpec(layers="all", heads="mean", layer_reduce="concat"),
    ):
        with pytest.raises(SpecError):
            Candidate.of(spec, tiny_engine.info.num_layers)


def test_the_prompts_last_token_and_the_second_copy_are_the_embedders(
    tiny_engine: TransformersEngine, forms: dict[str, States]
) -> None:
    form = FORMS["prompt"]
    spec = PoolingSpec(layers=(2, 3), part="v", tokens="last", heads="concat", layer_reduce="concat")
    theirs = KVEmbedder(tiny_engine, spec).encode(TEXTS[:5], prompt=f"{form.before}{{text}}{form.after}")
    mine = Candidate("kv", (2, 3), "v", "last", form="prompt").matrix(forms)[:5]
    np.testing.assert_allclose(cosines(mine, theirs), 1, atol=1e-4)
    ids = tiny_engine.tokenize_texts([TEXTS[0], FORMS["twice"].before, FORMS["twice"].between or ""])
    whole = [*ids[1], *ids[0], *ids[2], *ids[0]]
    window = PoolingSpec(layers=(1,), part="k", heads="concat", window=len(ids[0]))
    theirs = tiny_engine.pool([whole], [window])[0]
    mine = Candidate("kv", (1,), "k", "mean", form="twice").matrix(forms)[:1]
    np.testing.assert_allclose(cosines(mine, theirs), 1, atol=1e-4)


def test_hidden_states_are_the_models_own(tiny_engine: TransformersEngine, forms: dict[str, States]) -> None:
    ids = tiny_engine.tokenizer(TEXTS[0], return_tensors="pt")["input_ids"]
    with torch.inference_mode():
        states = tiny_engine.model(ids, output_hidden_states=True).hidden_states
    for layer in (0, 2, len(states) - 1):
        for weights, rows in (
            ("mean", slice(None)),
            ("mean, no first token", slice(1, None)),
            ("last", slice(-1, None)),
        ):
            mine = Candidate("hidden", (layer,), "h", weights).matrix(forms)[0]
            np.testing.assert_allclose(mine, states[layer][0, rows].mean(dim=0), rtol=2e-3, atol=2e-3)


def test_reading_goes_on_where_it_was_stopped(
    tiny_engine: TransformersEngine, tmp_path: Path, forms: dict[str, States], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("kvroute.embedding_evaluation.states._CHUNK", 4)
    reader = Reader(tiny_engine, TEXTS[:12], TEXTS[9:], limits=(20, 20), folder=tmp_path)
    assert reader.read(FORMS["plain"], seconds=0, progress=False) is None
    read_chunk, left = Reader._chunk, iter(range(2))

    def killed(self: Reader, *arguments: Any) -> None:
        if next(left, None) is None:
            raise KeyboardInterrupt
        read_chunk(self, *arguments)

    monkeypatch.setattr(Reader, "_chunk", killed)
    with pytest.raises(KeyboardInterrupt):
        reader.read(FORMS["plain"], progress=False)
    monkeypatch.setattr(Reader, "_chunk", read_chunk)
    found = reader.read(FORMS["plain"], progress=False)
    assert found is not None
    np.testing.assert_allclose(found.kv, forms["plain"].kv, atol=1e-3)


def test_models_whose_layers_differ_are_refused(hybrid_engine: TransformersEngine, tmp_path: Path) -> None:
    with pytest.raises(UnsupportedModelError):
        Reader(hybrid_engine, TEXTS, [], limits=(20, 20), folder=tmp_path)


def made_up_for(forms: dict[str, States]) -> Tasks:
    """Tasks over the texts that were read."""
    states = forms["plain"]
    t, d = list(states.short), list(states.document)
    labelled = [(x, str(i % 2)) for i, x in enumerate(t)]
    graded = [(a, b, float(i)) for i, (a, b) in enumerate(itertools.pairwise(t))]
    queries = [(x, {i % len(d): 1.0}) for i, x in enumerate(t)]
    return Tasks(
        [Classification(n, labelled[:6], labelled[6:9], labelled[9:]) for n in ("one", "two")],
        [Sts("pairs", graded[:6], graded[6:])],
        [Retrieval("facts", d, queries[:6], queries[6:])],
    )


@pytest.mark.parametrize(
    "way",
    [
        Candidate("kv", (0, 2, 4), "kv", "position"),
        Joined((Candidate("kv", (0, 1), "v", "mean"), Candidate("kv", (3,), "v", "last", form="prompt"))),
    ],
    ids=["candidate", "joined"],
)
def test_whitening_by_inner_products_is_the_post_processors(forms: dict[str, States], way: Candidate | Joined) -> None:
    evaluator = Evaluator(made_up_for(forms), forms, dimension=5, fit_texts=10, seed=0)
    assert len(way.pieces()) == way.parts
    found = evaluator._dev.vectors(way)
    whole = way.matrix(forms)
    blocks = [whole.shape[1] // way.parts] * way.parts
    fitted = PostProcessor.fit(whole[evaluator.fitted], "whiten", 5, blocks=blocks)
    wanted = fitted.transform(whole)[evaluator._dev.rows]
    np.testing.assert_allclose(found @ found.T, wanted @ wanted.T, rtol=1e-2, atol=1e-2)  # axes may point either way


def test_methods_are_compared_in_pairs(forms: dict[str, States]) -> None:
    evaluator = Evaluator(made_up_for(forms), forms, dimension=5, fit_texts=10, seed=0)
    one = evaluator.run(Candidate("kv", (0, 1), "v"), "test")
    other = evaluator.run(Candidate("hidden", (2,), "h"), "test")
    assert one.counts() == {"one": 3, "two": 3, "pairs": 5, "facts": 6, "one, clusters": 3, "two, clusters": 3}
    judge = Judge(one.counts(), 30)
    found = judge.differences(one, other)
    assert found["all sts"].value == pytest.approx(one.group("sts") - other.group("sts"))
    assert found["mean"].value == pytest.approx(one.average() - other.average())
    assert {(e.value, e.low, e.high) for e in judge.differences(one, one).values()} == {(0.0, 0.0, 0.0)}
    raw = evaluator.run(Candidate("kv", (0, 1), "v"), "test", whitened=False)
    assert list(raw.tasks()) == ["sts", "retrieval"]
    assert not judge.method(raw)["mean"]
    same = compared_figures(one, one, one, judge)
    assert {f.ok for f in same.values()} == {True}
    assert same["fast_over_best"].value == 1
    sts = compared_figures(one, one, other, judge)["sts_best_minus_hidden"]
    assert sts.value == pytest.approx(one.group("sts") - other.group("sts"))


def test_candidates_cover_every_hidden_state_and_half_the_depth() -> None:
    assert {c.layers[0] for c in hidden_candidates(30)} == set(range(31))
    for form in FORMS:
        kv = kv_candidates(30, form)
        assert len(kv) == len(set(kv))
        assert {c.depth for c in kv} >= {4, 15, 30}
        assert all(max(c.layers) < 30 and len(set(c.layers)) == len(c.layers) for c in kv)
        assert kv_candidates(5, form)  # a shallow model has candidates too
        assert kv_candidates(1, form)
    # The prompt's last token is always the same: layer 0 knows nothing of the text.
    assert all(0 not in c.layers for c in kv_candidates(30, "prompt") if c.weights == "last")


# ---------------------------------------------------------------------- measures


def test_measures_are_those_of_the_libraries() -> None:
    from scipy.stats import spearmanr
    from sklearn.metrics import ndcg_score, v_measure_score

    rng = np.random.default_rng(0)
    queries, documents = rng.normal(size=(4, 6)), rng.normal(size=(20, 6))
    gains = rng.integers(0, 3, size=(4, 20))
    gains[:, 0] = 1
    judged = [{i: float(g) for i, g in enumerate(row) if g} for row in gains]
    similarity = unit(queries) @ unit(documents).T
    wanted = [ndcg_score(gains[i : i + 1], similarity[i : i + 1], k=10) for i in range(4)]
    np.testing.assert_allclose(ndcg_at_10(similarity, judged), wanted)
    a, b = rng.normal(size=30), rng.integers(0, 4, size=30)
    assert rank_correlation_of(np.arange(30), a, b) == pytest.approx(spearmanr(a, b).statistic)
    assert rank_correlation_of(np.arange(3), np.ones(3), np.arange(3.0)) == 0
    labels, found = rng.integers(0, 5, 60), rng.integers(0, 4, 60)
    assert v_measure(labels, found) == pytest.approx(v_measure_score(labels, found))
    assert v_measure(labels, labels) == pytest.approx(1)
    assert v_measure(np.zeros(3, int), np.zeros(3, int)) == 1


def test_clusters_find_what_lies_together() -> None:
    rng = np.random.default_rng(0)
    labels = np.repeat(np.arange(3), 10)
    vectors = np.eye(3)[labels] + rng.normal(scale=0.05, size=(30, 3))
    assert v_measure(labels, clusters(vectors, 3)) == pytest.approx(1)


def test_the_interval_of_a_biased_measure_lies_around_it() -> None:
    judge = Judge({"x": 40}, 200)
    rng = np.random.default_rng(1)
    labels, found = rng.integers(0, 12, 40), rng.integers(0, 12, 40)

    def value(p: Any) -> float:
        rows = np.arange(40) if p is None else p["x"]
        return v_measure(labels[rows], found[rows])

    plain, centred = judge.estimate(value), judge.estimate(value, centred=True)
    assert plain.low is not None
    assert plain.value is not None
    assert plain.low > plain.value  # repeats look like agreement
    assert centred.low < plain.value < centred.high  # type: ignore[operator]


# ---------------------------------------------------------------------- the whole


@pytest.fixture(scope="module")
def whole(tiny_engine: TransformersEngine, tmp_path_factory: pytest.TempPathFactory) -> Any:
    options = EvaluationOptions(
        forms=("plain", "prompt", "twice"), search=True, train=True, references=("bm25",), dimension=8, fit_texts=60,
        rounds=20, every=6,
    )  # fmt: skip
    folder = tmp_path_factory.mktemp("whole")
    return evaluate_embeddings(tiny_engine, made_up_tasks(), options, folder=folder, progress=False), options, folder


def test_every_kind_of_method_stands_in_the_report(whole: Any, tiny_engine: TransformersEngine) -> None:
    report, _, _ = whole
    for name in (
        "`best`", "`fast`", "`paper-mteb`", "as `best`, half the depth", BEST_HIDDEN, CHOSEN, CHOSEN_HALF,
        "hidden state, mean, best layer", "hidden state, last token, best layer", "last hidden state, mean",
        "hidden state, in a prompt, best layer and weights", "keys and values, text twice, chosen on dev rows",
        "keys and values, in a prompt, tokens beside the last", "BM25", "`best`, trained projection",
        f"{BEST_HIDDEN}, trained projection",
    ):  # fmt: skip
        assert name in report.methods, name
    layers = tiny_engine.info.num_layers
    for m in report.methods.values():
        if m.side != "reference":
            assert m.ms > 0
            assert 0 <= m.depth <= layers
            assert m.share == pytest.approx(m.depth / layers)
    assert report.methods[CHOSEN_HALF].depth <= layers // 2
    assert report.methods["BM25"].rows.tasks() == {"retrieval": ["made_up_facts"]}
    assert report.figures["BM25"]["tasks"]["made_up_facts"].value > 0.9  # the queries say the documents' words
    assert {a for a, _, _ in report.compared} >= {"`best`", "`fast`", CHOSEN_HALF}


def test_a_second_run_reads_nothing_anew(
    whole: Any, tiny_engine: TransformersEngine, monkeypatch: pytest.MonkeyPatch
) -> None:
    report, options, folder = whole
    monkeypatch.setattr(Reader, "_chunk", None)
    again = evaluate_embeddings(tiny_engine, made_up_tasks(), options, folder=folder, progress=False)
    for name, figures in report.figures.items():
        assert again.figures[name] == figures, name
    hurried = EvaluationOptions(dimension=7, seconds=0)
    with pytest.raises(OutOfTimeError):
        evaluate_embeddings(tiny_engine, made_up_tasks(), hurried, folder=folder, progress=False)


def test_options_that_mean_nothing_are_refused() -> None:
    with pytest.raises(InvalidInputError, match="plain, prompt, twice"):
        EvaluationOptions(forms=("loud",))
    with pytest.raises(InvalidInputError, match="minilm, bm25"):
        EvaluationOptions(references=("nobody",))
    with pytest.raises(SpecError):
        EvaluationOptions(presets=("nicest",))
    with pytest.raises(InvalidInputError):
        EvaluationOptions(dimension=0)


def test_a_reference_that_is_not_installed_is_left_out_only_if_nobody_asked(
    tiny_engine: TransformersEngine, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "bm25s", None)
    monkeypatch.setattr("kvroute.embedding_evaluation.run.REFERENCES", ("bm25",))
    options: dict[str, Any] = {"dimension": 8, "fit_texts": 60, "rounds": 20, "every": 6}
    run: Callable[..., Any] = lambda **more: evaluate_embeddings(  # noqa: E731
        tiny_engine, made_up_tasks(), EvaluationOptions(**options, **more), folder=tmp_path, progress=False
    )
    with pytest.warns(RuntimeWarning, match="bm25 is left out"):
        report = run()
    assert "eval" in report.left_out["bm25"]
    with pytest.raises(ImportError, match="eval"):
        run(references=("bm25",))


def test_a_folder_of_sentence_transformers_is_a_reference(
    forms: dict[str, States], tmp_path: Path, tiny_tokenizer: Any
) -> None:
    from sentence_transformers import SentenceTransformer
    from sentence_transformers.sentence_transformer.modules import StaticEmbedding

    made = StaticEmbedding(tiny_tokenizer._tokenizer, embedding_dim=8)  # the kind that model2vec distils
    model = SentenceTransformer(modules=[made], device="cpu")
    model.save(str(tmp_path / "static"))
    evaluator = Evaluator(made_up_for(forms), forms, dimension=5, fit_texts=10, seed=0)
    texts = forms["plain"].texts
    found = reference(str(tmp_path / "static"), evaluator, texts, texts[:3], progress=False)
    assert (found.name, found.dimension) == ("static", 8)
    assert found.raw is not None
    assert found.raw.tasks() == found.rows.tasks()
    np.testing.assert_allclose(found.vectors, model.encode(texts, show_progress_bar=False), atol=1e-6)
    (tmp_path / "nothing").mkdir()
    with pytest.raises(ModelLoadError, match="nothing"):
        reference(str(tmp_path / "nothing"), evaluator, texts, texts[:3], progress=False)
