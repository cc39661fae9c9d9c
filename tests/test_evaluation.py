"""Evaluation beyond the page: ties, run files, bad input, unusual texts, a small stand-in for the model."""

import json
import math
import os
from types import SimpleNamespace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from colbert_nb.evaluation import (PackedIndex, bm25_run, compare, dense_run, embed_corpus, evaluate, plot_heatmap, plot_results, ranking,
                                   read_trec_run, rerank, save_results, search, top_k, write_trec_run)


class Words:
    """A model whose token vectors are one fixed unit vector for each word."""

    device = torch.device("cpu")

    def __init__(self, dim=8):
        self.dim, self.vocabulary, self.encoded = dim, {}, []
        self.tokenizer = SimpleNamespace(tokenizer=self, queries=self.batch, documents=self.batch)

    def vector(self, word):
        generator = torch.Generator().manual_seed(self.vocabulary.setdefault(word, len(self.vocabulary)))
        return torch.nn.functional.normalize(torch.randn(self.dim, generator=generator), dim=0)

    def encode_queries(self, texts, *, batch_size=32, show_progress=None, packed=False):
        vectors = [torch.stack([self.vector(w) for w in t.split()]) if t.split() else torch.zeros(0, self.dim) for t in texts]
        return (torch.cat(vectors), torch.tensor([len(v) for v in vectors])) if packed else vectors

    def encode_documents(self, texts, **options):
        self.encoded += texts
        return self.encode_queries(texts, **options)

    def batch(self, texts):
        for word in texts[0].split():
            self.vector(word)
        ids = torch.tensor([[self.vocabulary[w] for w in texts[0].split()]])
        return SimpleNamespace(input_ids=ids, keep=torch.ones_like(ids, dtype=torch.bool))

    def convert_ids_to_tokens(self, ids):
        return [list(self.vocabulary)[i] for i in ids]


CORPUS = ["sort an array", "invert a matrix", "sort a list of words", "solve a linear system", "draw a random sample", "sort an array"]
QUERIES = ["sort words", "linear matrix", "an array"]

ids = st.text(st.characters(exclude_categories=["Z", "C"]), min_size=1, max_size=6).filter(lambda s: s.split() == [s])
scores = st.floats(allow_nan=False)
runs = st.dictionaries(ids, st.dictionaries(ids, scores, min_size=1, max_size=5), max_size=5)


@settings(max_examples=150, deadline=None)
@given(run=runs)
def test_a_run_file_reads_back_as_the_same_run(run, tmp_path_factory):
    path = write_trec_run(run, tmp_path_factory.getbasetemp() / "run.trec", tag="tag")
    assert read_trec_run(path) == run
    for line in path.read_bytes().decode("utf-8").split("\n")[:-1]:
        q, q0, p, rank, score, tag = line.split()
        assert (q0, tag) == ("Q0", "tag") and ranking(run[q])[int(rank) - 1] == p


@settings(max_examples=50, deadline=None)
@given(st.dictionaries(st.integers(0, 40), st.sampled_from([0.0, 0.5, 1.0]), min_size=1, max_size=20), st.randoms())
def test_the_order_of_a_run_does_not_change_its_metrics(numbers, random):
    names = [str(n) for n in numbers]
    shuffled = random.sample(names, len(names))
    one, two = ({"0": {p: numbers[int(p)] for p in order}} for order in (names, shuffled))
    qrels = {0: {n: 1 for n in list(numbers)[:3]}}
    assert ranking(one["0"]) == ranking(two["0"]) == sorted(names, key=lambda p: (-numbers[int(p)], int(p)))
    assert evaluate(one, qrels) == evaluate(two, qrels)


@settings(max_examples=50, deadline=None)
@given(st.lists(st.sampled_from([0, 0, 1, 2, 3]), min_size=1, max_size=25).filter(any), st.integers(1, 12), st.integers(0, 3))
def test_metrics_follow_their_definitions(grades, k, unseen):
    run = {"0": {str(i): -float(i) for i in range(len(grades))}}
    qrels = {0: {i: g for i, g in enumerate(grades) if g} | {1000 + i: 1 for i in range(unseen)}}
    gain = lambda values: sum(g / math.log2(i + 2) for i, g in enumerate(values[:k]))
    first = next(i for i, g in enumerate(grades) if g)
    expected = {f"nDCG@{k}": gain(grades) / gain(sorted(qrels[0].values(), reverse=True)),
                f"MRR@{k}": 1 / (first + 1) if first < k else 0.0,
                f"Recall@{k}": sum(g > 0 for g in grades[:k]) / len(qrels[0])}
    assert evaluate(run, qrels, list(expected)) == pytest.approx(expected)


def test_scores_too_close_for_float32_and_infinite_ones_keep_their_order():
    run = {"0": {"2": 1.0 + 1e-12, "1": 1.0, "3": -math.inf}}
    assert evaluate(run, {0: {2: 1}}, ["MRR@10"]) == {"MRR@10": 1.0}
    assert evaluate(run, {0: {3: 1}}, ["MRR@10"])["MRR@10"] == pytest.approx(1 / 3)


def test_two_names_of_one_metric_have_one_value():
    run, qrels = {"0": {"1": 1.0, "2": 0.5}, "1": {"1": 1.0}}, {0: {2: 1}, 1: {1: 1}}
    assert evaluate(run, qrels, ["MRR@10", "RR@10", "MRR@10"]) == {"MRR@10": 0.75, "RR@10": 0.75}


def test_queries_without_passages_or_judgments(caplog):
    run, qrels = {"0": {"1": 1.0}, "1": {}, "9": {"1": 1.0}}, {0: {1: 1}, 1: {1: 1}, 2: {1: 1}}
    assert evaluate(run, qrels, ["MRR@10"]) == pytest.approx({"MRR@10": 1 / 3})
    assert "1 of 3 judged queries are not in the run" in caplog.text
    assert evaluate(run, qrels, ["MRR@10"], per_query=True) == {"0": {"MRR@10": 1.0}, "1": {"MRR@10": 0.0}, "2": {"MRR@10": 0.0}}


@pytest.mark.parametrize("block", [(1, 1), (2, 4), (256, 16_384)])
@pytest.mark.parametrize("k", [1, 3, 100])
def test_search_in_blocks_is_search(block, k):
    model = Words()
    run = search(model, QUERIES, CORPUS, k=k, block=block)
    for q, query in enumerate(model.encode_queries(QUERIES)):
        expected = torch.stack([(query @ d.T).amax(1).sum() for d in model.encode_documents(CORPUS)])
        order = expected.argsort(descending=True, stable=True)[:k].tolist()
        assert ranking(run[str(q)]) == list(run[str(q)]) == [str(p) for p in order]
        torch.testing.assert_close(torch.tensor(list(run[str(q)].values())), expected[order])


def test_equal_passages_stand_in_their_order_and_empty_ones_are_left_out():
    run = search(Words(), ["sort an array"], ["sort an array"] * 5 + [""] + ["sort an array"], k=4, block=(1, 2))
    assert list(run["0"]) == ["0", "1", "2", "3"]
    assert set(search(Words(), ["sort"], ["sort", "", "array"])["0"]) == {"0", "2"}


@pytest.mark.parametrize("slab", [1, 2, 100])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_an_index_holds_what_the_model_says(slab, dtype):
    model = Words()
    index = embed_corpus(model, CORPUS, dtype=dtype, slab=slab)
    vectors = [v.to(dtype) for v in model.encode_documents(CORPUS)]
    assert index.vectors.dtype == dtype and len(index) == len(CORPUS) and torch.equal(index.vectors, torch.cat(vectors))
    for (D, lengths), part in ((index.rows(1, 4), [1, 2, 3]), (index.select([5, 0, 0]), [5, 0, 0])):
        assert torch.equal(D, torch.cat([vectors[p] for p in part])) and lengths.tolist() == [len(vectors[p]) for p in part]
    assert index.rows(0, 6)[0].data_ptr() == index.vectors.data_ptr()


def test_a_corpus_in_slabs_shows_one_bar(model, capsys):
    embed_corpus(model, CORPUS, slab=2, batch_size=1, show_progress=True)
    drawn = capsys.readouterr().err
    assert drawn.count("  0%|") == 1 and f"{len(CORPUS)}/{len(CORPUS)} " in drawn and "/2 " not in drawn


@pytest.mark.parametrize("with_index", [False, True])
def test_rerank_scores_its_candidates_as_search_does(with_index):
    model = Words()
    everything, index = search(model, QUERIES, CORPUS), embed_corpus(model, CORPUS) if with_index else None
    model.encoded.clear()
    candidates = {2: [5, 0, 3], 0: [3], 1: []}
    run = rerank(model, QUERIES, CORPUS, candidates, index=index)
    assert {q: set(p) for q, p in run.items()} == {"2": {"0", "3", "5"}, "0": {"3"}, "1": set()}
    for q in run:
        assert run[q] == pytest.approx({p: everything[q][p] for p in run[q]})
        assert list(run[q].values()) == sorted(run[q].values(), reverse=True)
    assert model.encoded == ([] if with_index else [CORPUS[p] for p in (0, 3, 5)])
    assert rerank(model, QUERIES, CORPUS, {}) == {} and rerank(model, QUERIES, CORPUS, {1: []}) == {"1": {}}


def test_bm25_stems_leaves_out_what_has_no_word_in_common_and_is_quiet(capfd):
    run = bm25_run(["sorting of arrays", "the of", "zebra", "été 北京"], CORPUS + ["", "été"], k=3)
    assert list(run["0"])[:2] == ["0", "5"] and run["0"]["0"] == run["0"]["5"] and len(run["0"]) == 3
    assert run["1"] == run["2"] == {} and list(run["3"]) == ["7"]
    assert capfd.readouterr() == ("", "")


def test_bm25_in_another_language():
    corpus = ["die Häuser der Stadt", "ein Hund läuft"]
    assert list(bm25_run(["Haus"], corpus, language="german")["0"]) == ["0"]
    assert bm25_run(["Haus"], corpus)["0"] == {}
    assert list(bm25_run(["talot"], ["talossa", "koira"], language="finnish")["0"]) == ["0"]


class Dense:
    """What `dense_run` asks of a SentenceTransformer."""

    def encode_query(self, texts, **options):
        return torch.tensor([[float(len(t)), 1.0] for t in texts])

    encode_document = encode_query


def test_dense_run_ranks_by_cosine_and_takes_embeddings_of_any_kind(monkeypatch):
    import sentence_transformers
    monkeypatch.setattr(sentence_transformers, "SentenceTransformer", Dense)
    embeddings = Dense().encode_document(CORPUS)
    expected = torch.nn.functional.cosine_similarity(Dense().encode_query(QUERIES)[:, None], embeddings[None], dim=-1)
    run = dense_run(Dense(), QUERIES, CORPUS)
    for q in range(len(QUERIES)):
        assert [run[str(q)][str(p)] for p in range(len(CORPUS))] == pytest.approx(expected[q].tolist())
    assert dense_run(Dense(), QUERIES, CORPUS, corpus_embeddings=embeddings.numpy()) == run
    assert dense_run(Dense(), QUERIES, CORPUS, corpus_embeddings=7 * embeddings)["0"] == pytest.approx(run["0"], abs=1e-6)
    assert [len(passages) for passages in dense_run(Dense(), QUERIES, CORPUS, k=2).values()] == [2, 2, 2]


RESULTS = {"bm25": {"nDCG@10": 0.5, "MRR@10": 0.4}, "ours": {"nDCG@10": 0.7}}


def test_results_are_written_whole_and_shown_with_the_best_in_bold(tmp_path):
    path = save_results(tmp_path / "new" / "results.json", RESULTS)
    assert json.loads(path.read_text()) == RESULTS and os.listdir(path.parent) == ["results.json"]
    with pytest.raises(ValueError, match="MRR@10 of bm25, got nan"):
        save_results(path, {"bm25": {"MRR@10": math.nan}})
    assert json.loads(path.read_text()) == RESULTS
    assert repr(compare(RESULTS)).splitlines() == ["| system | nDCG@10 | MRR@10 |", "| --- | ---: | ---: |",
                                                   "| bm25 | 0.500 | **0.400** |", "| ours | **0.700** | – |"]


def test_a_write_that_fails_leaves_the_old_file_alone(tmp_path, monkeypatch):
    path = write_trec_run({"0": {"1": 1.0}}, tmp_path / "run.trec")
    def full(*_): raise OSError("disk full")
    monkeypatch.setattr(os, "replace", full)
    with pytest.raises(OSError, match="disk full"):
        write_trec_run({"0": {"2": 1.0}}, path)
    assert read_trec_run(path) == {"0": {"1": 1.0}} and os.listdir(tmp_path) == ["run.trec"]


def test_pictures_show_what_they_are_given():
    import matplotlib
    matplotlib.use("Agg")
    import matplotlib.pyplot as plt
    figure = plot_results(RESULTS, highlight="bm25")
    assert [axis.get_title() for axis in figure.axes] == ["nDCG@10", "MRR@10"]
    assert [text.get_text() for text in figure.axes[1].texts] == ["0.400", "–"]
    model = Words()
    figure = plot_heatmap(model, "sort words", " ".join(CORPUS[2].split() * 3 + ["end"]), max_tokens=4)
    axis = figure.axes[0]
    assert axis.get_title(loc="left") == "MaxSim 2.00, 4 of 16 passage tokens"
    assert [t.get_text() for t in axis.get_yticklabels()] == ["sort  1.00", "words  1.00"]
    assert len(axis.patches) == 2 and {"sort", "words"} <= {t.get_text() for t in axis.get_xticklabels()}
    assert not plt.get_fignums()


INDEX = PackedIndex(torch.zeros(3, 8), torch.tensor([1, 2]))
BAD = {
    "no judgments": (lambda: evaluate({"0": {"1": 1.0}}, {}), "expected judged queries"),
    "foreign ids": (lambda: evaluate({"q1": {"d1": 1.0}}, {0: {1: 1}}), r"qrels of \['0'\] and a run of \['q1'\]"),
    "metric": (lambda: evaluate({"0": {"1": 1.0}}, {0: {1: 1}}, ["NDGC@10"]), "got 'NDGC@10'"),
    "metric of nothing": (lambda: evaluate({"0": {"1": 1.0}}, {0: {1: 1}}, ["nDCG@"]), "got 'nDCG@'"),
    "not a number": (lambda: evaluate({"0": {"1": math.nan}}, {0: {1: 1}}), "passage '1', got NaN"),
    "nan scores": (lambda: top_k(torch.tensor([[1.0, math.nan]]), 1), "got NaN"),
    "one query": (lambda: search(Words(), "text", CORPUS), "queries as a list .* got 'text'"),
    "no query": (lambda: search(Words(), [], CORPUS), r"queries as a list .* got \[\]"),
    "no passage": (lambda: bm25_run(QUERIES, []), r"corpus as a list .* got \[\]"),
    "a passage of numbers": (lambda: bm25_run(QUERIES, ["a", 3]), "row 1 of corpus, got int"),
    "k": (lambda: search(Words(), QUERIES, CORPUS, k=0), "k of 1 or more, got 0"),
    "neither": (lambda: search(Words(), QUERIES, None), "corpus or an index"),
    "another index": (lambda: search(Words(), QUERIES, CORPUS, index=INDEX), "6 passages, got one of 2"),
    "another index to rerank": (lambda: rerank(Words(), QUERIES, CORPUS, {0: [1]}, index=INDEX), "6 passages, got one of 2"),
    "passage position": (lambda: rerank(Words(), QUERIES, CORPUS, {0: [1, 6, -1]}), r"query 0 with passages \[6, -1\]"),
    "query position": (lambda: rerank(Words(), QUERIES, CORPUS, {3: [1]}), "below 3 queries .* got query 3"),
    "language": (lambda: bm25_run(QUERIES, CORPUS, language="klingon"), "english, .* got 'klingon'"),
    "no words": (lambda: bm25_run(QUERIES, ["the", "..."]), "got none but stop words"),
    "embeddings": (lambda: dense_run("x", QUERIES, CORPUS, corpus_embeddings=torch.zeros(2, 3)), "6 passages, got 2"),
    "nothing to compare": (lambda: compare({"bm25": {}}), "one system with one metric"),
    "no number": (lambda: compare({"bm25": {"nDCG@10": "0.5"}}), "nDCG@10 of bm25, got '0.5'"),
    "index of a text": (lambda: embed_corpus(Words(), "text"), "corpus as a list"),
    "heatmap of a list": (lambda: plot_heatmap(Words(), ["query"], "passage"), "row 0 of queries, got list"),
}


@pytest.mark.parametrize("call, message", BAD.values(), ids=BAD)
def test_bad_input_is_refused_with_what_was_expected_and_got(call, message):
    with pytest.raises(ValueError, match=message):
        call()


@pytest.mark.parametrize("run, tag", [({"a b": {"1": 1.0}}, "t"), ({"0": {"": 1.0}}, "t"), ({"0": {"1\u2028": 1.0}}, "t"), ({"0": {"1": 1.0}}, "my run"),
                                      ({"0": {1: 1.0}}, "t"), ({"0": {"1": math.nan}}, "t")])
def test_run_files_refuse_what_could_not_be_read_back(run, tag, tmp_path):
    with pytest.raises(ValueError, match="expected"):
        write_trec_run(run, tmp_path / "run.trec", tag=tag)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("text, message", [("0 Q0 1 1 0.5\n", "line 1, got '0 Q0 1 1 0.5'"), ("0 Q0 1 1 0.5 t\n\n", "line 2"),
                                           ("0 Q0 1 1 high t\n", "line 1"), ("0 Q0 1 1 0.5 t\n0 Q0 1 2 0.4 t\n", "'1' of '0' again on line 2")])
def test_a_broken_run_file_is_refused_with_its_line(text, message, tmp_path):
    (tmp_path / "run.trec").write_text(text)
    with pytest.raises(ValueError, match=message):
        read_trec_run(tmp_path / "run.trec")
