"""Compressed search: which engine is taken, what fast-plaid is handed (a stand-in takes its place), colbert-ai's own indexer and
searcher, and its C++ against the functions of torch where COLBERT_NB_COMPILE=1 is set and a compiler is there."""

import importlib.metadata
import importlib.util
import json
import logging
import os
import shutil
import sys
from types import ModuleType

import numpy as np
import pytest
import torch
from tiny import WORDS, fresh

from colbert_nb import search_engines
from colbert_nb.search import SearchIndex
from colbert_nb.search_engines import ColbertAIEngine, check_kernels, choose_engine, colbert_ai_here, compiler_refusal, torch_of_build
from colbert_nb.search_plaid import PlaidIndex, check_nbits
from colbert_nb.search_residuals import decompress, filter_passages, lookup_segments, maxsim_segments, train_centroids

TEXTS = [" ".join(WORDS[(7 * i + j * (i + 1)) % 60] for j in range(4 + i % 9)) for i in range(60)]
QUERIES = [f"{WORDS[3]} {WORDS[10]}", WORDS[20], f"{WORDS[41]} {WORDS[5]} {WORDS[6]}"]
HERE = torch.__version__.split("+")[0]
BUILD = HERE.replace(".", "")  # how fast-plaid's versions end
UPSTREAM = dict(engine="colbert-ai")
EVERYTHING = dict(probes=10_000, candidates=10_000)


@pytest.fixture(scope="module")
def one(encoder):
    "A model that counts the passages that it encodes."
    model = fresh(encoder)
    encode, model.encoded = model.encode_documents, 0

    def counted(texts, **options):
        model.encoded += len(texts)
        return encode(texts, **options)

    model.encode_documents = counted
    model.config.configure(nbits=2)
    return model


@pytest.fixture(scope="module")
def built(one, tmp_path_factory):
    "An index by colbert-ai."
    return PlaidIndex(one, tmp_path_factory.mktemp("built") / "index", **UPSTREAM).index(TEXTS)


def installed(monkeypatch, version):
    "Make the system say that a version of fast-plaid is installed."
    find, read = importlib.util.find_spec, importlib.metadata.version
    monkeypatch.setattr(importlib.util, "find_spec", lambda name, *rest: name if name == "fast_plaid" else find(name, *rest))
    monkeypatch.setattr(importlib.metadata, "version", lambda name: version if name == "fast-plaid" else read(name))


class StandIn:
    "What is used of fast-plaid 1.4 to 1.7, exact: vectors in one file, in its order, renumbered by `delete` as there."

    calls: list[tuple] = []

    def __init__(self, index, device):
        self.file, self.rows = os.path.join(index, "rows.npz"), []
        if os.path.exists(self.file):
            with np.load(self.file) as kept:
                self.rows = [torch.from_numpy(kept[name]) for name in kept.files]
        assert device == "cpu"

    def _write(self):
        np.savez(self.file, **{f"{i:06}": row.numpy() for i, row in enumerate(self.rows)})

    def close(self):
        self.calls.append(("close",))

    def create(self, documents_embeddings, nbits, seed, start_from_scratch):
        assert type(documents_embeddings) is list and all(row.dtype == torch.float16 and row.ndim == 2 for row in documents_embeddings)
        assert start_from_scratch == 0  # otherwise it keeps vectors in a pickle
        self.calls.append(("create", len(documents_embeddings), nbits, seed, torch.initial_seed()))
        self.rows = documents_embeddings
        self._write()

    def update(self, documents_embeddings, seed, start_from_scratch, buffer_size):
        assert (start_from_scratch, buffer_size) == (0, 1)
        self.calls.append(("update", len(documents_embeddings)))
        self.rows = self.rows + documents_embeddings
        self._write()

    def delete(self, subset):
        self.calls.append(("delete", subset))
        self.rows = [row for i, row in enumerate(self.rows) if i not in subset]
        self._write()

    def search(self, queries_embeddings, top_k, show_progress, n_ivf_probe, n_full_scores):
        assert not show_progress and top_k <= len(self.rows)
        self.calls.append(("search", tuple(queries_embeddings.shape), n_ivf_probe, n_full_scores))
        best = []
        for q in queries_embeddings:
            scores = torch.stack([(row.float() @ q.T).amax(0).sum() for row in self.rows])
            order = scores.argsort(descending=True, stable=True)[:top_k]
            best.append([(int(p), float(scores[p])) for p in order])
        return best


@pytest.fixture
def fast(monkeypatch):
    "fast-plaid is installed, for this PyTorch; a list of the calls that it gets."
    installed(monkeypatch, f"1.7.0.{BUILD}")
    package, module = ModuleType("fast_plaid"), ModuleType("fast_plaid.search")
    module.FastPlaid = StandIn
    monkeypatch.setitem(sys.modules, "fast_plaid", package)
    monkeypatch.setitem(sys.modules, "fast_plaid.search", module)
    monkeypatch.setattr(StandIn, "calls", [])
    return StandIn.calls


def ids_of(found):
    return [[hit.id for hit in row] for row in found]


# The engine


@pytest.mark.parametrize("version, built_for", [("1.7.0.2110", "2.11.0"), ("1.4.6.290", "2.9.0"), ("1.4.6.271", "2.7.1"), ("1.2.5.2100", "2.10.0"),
                                                ("1.2.0", None), ("1.7.0.rc1", None), ("2", None)])
def test_a_version_says_its_torch(version, built_for):
    assert torch_of_build(version) == built_for


def test_without_fast_plaid_colbert_ai_is_taken_and_logged(monkeypatch, caplog):
    monkeypatch.setattr(search_engines.importlib.util, "find_spec", lambda name: None)
    with caplog.at_level(logging.INFO, "colbert_nb"):
        assert choose_engine().name == "colbert-ai"
    assert "fast-plaid is not installed" in caplog.text and HERE in caplog.text and caplog.records[-1].levelno == logging.INFO


def test_a_build_for_another_torch_is_not_imported(monkeypatch, caplog):
    installed(monkeypatch, "1.7.0.260")
    monkeypatch.setitem(sys.modules, "fast_plaid", None)  # importing it would raise
    assert choose_engine().name == "colbert-ai"
    assert "built for PyTorch 2.6.0" in caplog.text and caplog.records[-1].levelno == logging.WARNING
    with pytest.raises(ValueError, match="got none that runs: fast-plaid 1.7.0.260 is built for PyTorch 2.6.0.*pass engine='colbert-ai'"):
        choose_engine("fast-plaid")


def test_a_build_for_this_torch_is_taken(fast, caplog):
    with caplog.at_level(logging.INFO, "colbert_nb"):
        assert choose_engine().name == "fast-plaid"
    assert f"built for PyTorch {HERE}" in caplog.text
    assert choose_engine("colbert-ai").name == "colbert-ai"


def test_without_a_compiler_c_plus_plus_is_refused_before_any_work(one, tmp_path, monkeypatch):
    monkeypatch.setattr(shutil, "which", lambda name, path=None: None)
    before = one.encoded
    with pytest.raises(ValueError, match=r"without a C\+\+ compiler \(g\+\+\), ninja.*kernels='torch'"):
        PlaidIndex(one, tmp_path, engine="colbert-ai", kernels="c++")
    assert one.encoded == before and not list(tmp_path.iterdir())
    assert check_kernels("torch") == "torch" and PlaidIndex(one, tmp_path, engine="colbert-ai").engine.kernels == "torch"


@pytest.mark.parametrize("options, words", [({"engine": "faiss"}, "engine as one of"), ({"kernels": "cuda", "engine": "colbert-ai"}, "kernels as one of"),
                                            ({"nbits": 3}, "nbits as one of"), ({"nbits": True}, "nbits as one of"), ({"nbits": 4}, "pass nbits=2")])
def test_wrong_settings_are_refused(one, tmp_path, options, words):
    with pytest.raises(ValueError, match=words):
        PlaidIndex(one, tmp_path / "index", **{**UPSTREAM, **options})
    assert not (tmp_path / "index").exists()


def test_the_trainers_bits_are_the_default(one, built):
    assert check_nbits(one) == 2 == built.nbits
    assert json.loads((built.path / "manifest.json").read_text())["plaid"]["nbits"] == 2


# fast-plaid, by what it is handed


def test_fast_plaid_gets_the_vectors_and_gives_the_exact_ranking(one, tmp_path, fast):
    index, exact = PlaidIndex(one, tmp_path / "index").index(TEXTS), SearchIndex(one).index(TEXTS)
    assert fast[0] == ("create", len(TEXTS), 2, 42, 42) and fast[1] == ("close",)
    found, wanted = index.search(QUERIES, 10), exact.search(QUERIES, 10)
    assert [[hit.score for hit in row] for row in found] == [pytest.approx([hit.score for hit in row], abs=1e-4) for row in wanted]
    assert all(hit.text == TEXTS[int(hit.id)] for row in found for hit in row)
    assert [call[2:] for call in fast if call[0] == "search"][0] == (8, 4096)
    index.search(QUERIES, 10, probes=3, candidates=77)
    assert fast[-1][2:] == (3, 77)


def test_queries_of_different_lengths_are_not_padded(encoder, tmp_path, fast):
    bare = fresh(encoder, query_expansion=False)
    index = PlaidIndex(bare, tmp_path / "index", nbits=1).index(TEXTS)
    lengths = [len(q) for q in bare.encode_queries(QUERIES)]
    together, alone = index.search(QUERIES), [index.search([query])[0] for query in QUERIES]
    assert ids_of(together) == ids_of(alone) and len(set(lengths)) > 1
    assert sorted(shape[:2] for kind, shape, *_ in (call for call in fast if call[0] == "search"))[-1][0] == 1


def test_changes_by_fast_plaid(one, tmp_path, fast):
    "Added, replaced, deleted, saved and loaded: the ids, texts and ranking of an exact index with the same changes."
    indexes = PlaidIndex(one, tmp_path / "plaid").index(TEXTS[:40]), SearchIndex(one, tmp_path / "exact").index(TEXTS[:40])

    def agree():
        a, b = indexes
        assert sorted(a.ids) == sorted(b.ids) and len(a) == len(b)
        for row, wanted in zip(a.search(QUERIES, 60), b.search(QUERIES, 60)):
            assert [hit.score for hit in row] == pytest.approx([hit.score for hit in wanted], abs=1e-4)
            assert {hit.id: hit.text for hit in row} == {hit.id: hit.text for hit in wanted}

    for change in (lambda i: i.add(TEXTS[40:45], ids=[*"abcde"]), lambda i: i.delete(["0", "c", "39"]),
                   lambda i: i.add([TEXTS[50], TEXTS[51]], ids=["a", "new"], replace=True), lambda i: i.add(TEXTS[52:54]),
                   lambda i: i.compact(), lambda i: i.index(TEXTS[10:50], overwrite=True)):
        for index in indexes:
            change(index)
        agree()
    indexes = tuple(type(index).load(index.save(tmp_path / "copies" / type(index).__name__), one) for index in indexes)
    agree()
    assert sorted(p.name for p in (tmp_path / "plaid").iterdir() if p.is_dir()) == ["plaid.6"]
    with pytest.raises(ValueError, match="ids that the index does not have"):
        indexes[0].add(["word1"], ids=["1"])
    with pytest.raises(ValueError, match="nothing was deleted"):
        indexes[0].delete(["1", "none"])
    with pytest.raises(ValueError, match="keeps a passage"):
        indexes[0].delete(indexes[0].ids)


@pytest.mark.parametrize("name", ["create", "update", "delete"])
def test_a_stopped_change_leaves_the_index_and_what_was_encoded(one, tmp_path, fast, monkeypatch, name):
    index = PlaidIndex(one, tmp_path / "index").index(TEXTS[:40])
    before, files = ids_of(index.search(QUERIES)), sorted(p.name for p in (tmp_path / "index").iterdir())

    def stopped(self, *args, **options):
        raise OSError("no space left")

    calls = {"create": lambda i: i.index(TEXTS[:50], overwrite=True), "update": lambda i: i.add(TEXTS[40:50]), "delete": lambda i: i.delete(["3"])}
    with monkeypatch.context() as patch, pytest.raises(OSError):
        patch.setattr(StandIn, name, stopped)
        calls[name](index)
    again = PlaidIndex.load(tmp_path / "index", one)
    assert ids_of(again.search(QUERIES)) == ids_of(index.search(QUERIES)) == before
    encoded = one.encoded
    calls[name](again)
    assert one.encoded == encoded and len(again) == {"create": 50, "update": 50, "delete": 39}[name]
    assert sorted(p.name for p in (tmp_path / "index").iterdir() if "plaid" not in p.name and p.name != "deleted.0") \
        == [name.replace(".0", f".{again._files.manifest['generation']}") for name in files if "plaid" not in name]


def test_two_that_write_by_turns(one, tmp_path, fast):
    first = PlaidIndex(one, tmp_path / "index").index(TEXTS[:40])
    second = PlaidIndex(one, tmp_path / "index")
    first.add(TEXTS[40:42])
    for call in (lambda: second.add(TEXTS[42:43]), lambda: second.delete(["0"])):
        with pytest.raises(ValueError, match="load it again"):
            call()
    assert len(PlaidIndex(one, tmp_path / "index")) == 42


def test_an_index_of_an_engine_that_is_gone_is_refused(one, tmp_path, fast, monkeypatch):
    index = PlaidIndex(one, tmp_path / "index").index(TEXTS[:40])
    installed(monkeypatch, "1.7.0.260")
    with pytest.raises(ValueError, match="expected fast-plaid.*built for PyTorch 2.6.0"):
        PlaidIndex.load(index.path, one)


def test_another_version_of_the_engine_is_a_warning(one, tmp_path, fast, monkeypatch, caplog):
    PlaidIndex(one, tmp_path / "index").index(TEXTS[:40])
    installed(monkeypatch, f"1.8.0.{BUILD}")
    assert len(PlaidIndex.load(tmp_path / "index", one)) == 40 and "written by fast-plaid 1.7.0" in caplog.text


# colbert-ai, itself


def test_colbert_ai_finds_nearly_what_an_exact_search_finds(one, built):
    exact = ids_of(SearchIndex(one).index(TEXTS).search(QUERIES, 10))
    found = ids_of(built.search(QUERIES, 10, **EVERYTHING))
    assert all(len(row) == 10 for row in found)
    assert np.mean([len(set(a) & set(b)) / 10 for a, b in zip(exact, found)]) > 0.7
    assert ids_of(built.search(QUERIES, 100, **EVERYTHING))[0][:10] == found[0]


def test_the_same_passages_give_the_same_files(one, built, tmp_path):
    again = PlaidIndex(one, tmp_path / "again", **UPSTREAM).index(TEXTS)
    for path in sorted(built._folder.iterdir()):
        other = again._folder / path.name
        if path.suffix == ".pt":
            a, b = (torch.load(p, weights_only=True) for p in (path, other))  # and nothing of them is a pickle of code
            assert all(torch.equal(x, y) for x, y in zip(a, b)) if isinstance(a, tuple) else torch.equal(a, b)
        else:
            assert path.read_bytes() == other.read_bytes()
            assert str(tmp_path) not in other.read_text()


def test_a_search_for_few_does_not_cut_a_later_one_short(built):
    few, many = built.search(QUERIES, 3), built.search(QUERIES, 40, probes=200)
    assert all(len(row) == 3 for row in few) and all(len(row) == 40 for row in many)


def test_deleted_passages_are_left_out_and_none_can_be_added(one, built, tmp_path):
    index = PlaidIndex.load(built.save(tmp_path / "copy"), one)
    before = ids_of(index.search(QUERIES, 60, **EVERYTHING))
    gone = before[0][:5]
    index.delete(gone)
    after = ids_of(index.search(QUERIES, 60, **EVERYTHING))
    assert after == [[name for name in row if name not in gone] for row in before]
    assert ids_of(PlaidIndex.load(index.save(tmp_path / "again"), one).search(QUERIES, 60, **EVERYTHING)) == after
    for call in (lambda: index.add(["word1"]), lambda: index.add(["word1"], ids=["1"], replace=True)):
        with pytest.raises(ValueError, match="expected an engine that adds passages, got colbert-ai"):
            call()
    with pytest.raises(ValueError, match="colbert-ai cannot take them out"):
        index.compact()
    index.delete(index.ids)
    assert index.search(QUERIES) == [[], [], []] and index.index(TEXTS[5:], overwrite=True).compact() is index


def test_colbert_ai_and_this_process_are_afterwards_what_they_were(built):
    from colbert.infra.config.settings import RunSettings
    from colbert.search.strided_tensor import StridedTensor
    state, environment = torch.get_rng_state(), dict(os.environ)
    built._opened = None
    built.search(QUERIES)
    assert torch.equal(state, torch.get_rng_state()) and environment == dict(os.environ)
    assert RunSettings.total_visible_gpus == torch.cuda.device_count() and "segmented_lookup" not in vars(StridedTensor)


def test_bad_calls_are_refused(one, built, tmp_path):
    for call, words in ((lambda: built.search("a query"), "put a single one into a list"), (lambda: built.search(QUERIES, 0), "k as a whole"),
                        (lambda: built.search(QUERIES, probes=0), "probes"), (lambda: built.search(QUERIES, 5, candidates=19), "candidates"),
                        (lambda: built.index(TEXTS), "without passages"), (lambda: built.save(built.path), "another folder"),
                        (lambda: PlaidIndex(one, **UPSTREAM).search(QUERIES), "never filled"),
                        (lambda: PlaidIndex(one, **UPSTREAM).index(TEXTS[:2]), "256 token vectors or more"),
                        (lambda: PlaidIndex(one, built.path, nbits=1), "expected nbits=2"), (lambda: SearchIndex(one, built.path), "kind 'exact'"),
                        (lambda: PlaidIndex(one, built.path, engine="fast-plaid"), "expected engine='colbert-ai'"),
                        (lambda: PlaidIndex(one, SearchIndex(one, tmp_path / "exact").index(TEXTS[:2]).path), "kind 'PLAID'")):
        with pytest.raises(ValueError, match=words):
            call()


def test_without_texts(one, tmp_path):
    index = PlaidIndex(one, tmp_path / "index", keep_texts=False, **UPSTREAM).index(TEXTS)
    assert index.search(QUERIES)[0][0].text is None and index._files.manifest["sizes"]["texts"] == 0


# The functions of torch


def test_centroids_are_those_of_scipy():
    from scipy.cluster.vq import kmeans2
    points = torch.randn(500, 8, generator=torch.Generator().manual_seed(3))
    theirs, _ = kmeans2(points.numpy(), train_centroids(points, 20, rounds=0).numpy(), iter=4, minit="matrix")
    assert torch.allclose(train_centroids(points, 20, rounds=4), torch.from_numpy(theirs), atol=1e-4)


def test_fewer_vectors_than_centroids_and_equal_vectors():
    assert len(train_centroids(torch.randn(5, 4), 9)) == 5
    assert torch.equal(train_centroids(torch.ones(30, 4), 3), torch.ones(3, 4))


compiled = pytest.mark.skipif(os.environ.get("COLBERT_NB_COMPILE") != "1" or compiler_refusal() is not None,
                              reason=f"compiles for minutes: set COLBERT_NB_COMPILE=1; missing here: {compiler_refusal() or 'nothing'}")


@compiled
@pytest.mark.timeout(900)
def test_torch_and_c_plus_plus_give_the_same(one, built):
    draw = torch.Generator().manual_seed(5)
    doclens = torch.randint(1, 12, (80,), generator=draw)
    offsets = torch.cat([torch.zeros(1, dtype=torch.long), doclens.cumsum(0)])
    codes = torch.randint(0, 30, (int(doclens.sum()),), generator=draw, dtype=torch.int32)
    table, scores = torch.randn(30, 6, generator=draw), torch.randn(len(codes), 6, generator=draw)
    some = torch.randperm(80, generator=draw)[:50].sort().values.int()
    compiled_index = ColbertAIEngine("c++")
    opened = compiled_index.open(built._folder)
    with colbert_ai_here("c++"):
        from colbert.modeling.colbert import ColBERT as Upstream
        from colbert.search.index_storage import IndexScorer
        from colbert.search.strided_tensor import StridedTensor
        for near, candidates in ((table.amax(1) > 1, 20), (table.amax(1) > 0, 44), (table.amax(1) > 9, 400)):
            theirs = IndexScorer.filter_pids(some, table, codes, doclens, offsets, near, candidates)
            assert filter_passages(some, table, codes, doclens, offsets, near, candidates).tolist() == theirs.tolist()
        assert torch.allclose(maxsim_segments(scores, doclens), Upstream.segmented_maxsim(scores, doclens), atol=1e-6)
        at, long = offsets[:-1][some.long()], some.long()
        assert torch.equal(lookup_segments(codes, long, doclens[long], at), StridedTensor.segmented_lookup(codes, long, doclens[long], at))
        ranker, codec = opened.ranker, opened.ranker.codec
        arguments = (torch.arange(0, 60, 3).int(), ranker.doclens, ranker.offsets, codec.bucket_weights, codec.reversed_bit_map,
                     codec.decompression_lookup_table, ranker.embeddings.residuals, ranker.embeddings.codes, codec.centroids, codec.dim, codec.nbits)
        assert torch.allclose(decompress(*arguments), IndexScorer.decompress_residuals(*arguments))
    plain = ColbertAIEngine("torch")
    Q = list(one.encode_queries(QUERIES))
    for settings in ({}, {"probes": 4, "candidates": 100}):
        for (a, x), (b, y) in zip(compiled_index.search(opened, Q, 10, **settings), plain.search(plain.open(built._folder), Q, 10, **settings)):
            assert a == b and x == pytest.approx(y, abs=1e-4)


@compiled
@pytest.mark.timeout(900)
def test_colbert_ai_opens_the_folder_with_its_own_model(one, built, tmp_path):
    from colbert_nb.colbert_ai_mends import upstream_on_this_machine
    saved = one.save_pretrained(tmp_path / "model")
    with upstream_on_this_machine(without=["extension"]):
        from colbert import Searcher
        searcher = Searcher(index=built._folder.name, index_root=str(built.path), checkpoint=str(saved), collection=TEXTS, verbose=0)
        found = [searcher.search(query, k=10) for query in QUERIES]
    for row, (pids, _, scores) in zip(built.search(QUERIES, 10), found):
        assert [int(hit.id) for hit in row] == pids and [hit.score for hit in row] == pytest.approx(scores, abs=1e-3)
