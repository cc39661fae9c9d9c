"""Exact search against brute force, graphs that are saved, stopped, killed and mistaken for others, and the choice between them."""

import json
import logging
import time
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from killing import imported, kill_at

from colbert_nb.mining_graph import VoyagerIndex, fingerprint
from colbert_nb.mining_index import ExactIndex, choose_index, largest, make_index
from colbert_nb.mining_vectors import embed_texts


def clustered(n, dim=32, topics=20, seed=0):
    draw = np.random.default_rng(seed)
    spread = np.arange(1, dim + 1) ** -0.5
    centres = 0.3 + draw.standard_normal((topics, dim)) * spread
    vectors = centres[draw.integers(topics, size=n)] + 0.7 * draw.standard_normal((n, dim)) * spread
    return (vectors / np.linalg.norm(vectors, axis=1, keepdims=True)).astype(np.float32)


def recall(found, truth):
    return np.mean([len(set(a) & set(b)) / len(b) for a, b in zip(found.tolist(), truth.tolist())])


def nearest(vectors, queries, ids, scores, k):
    "The answer is right: `k` different places, the cosines theirs and those of the `k` largest, in order."
    cosines = queries.astype(np.float64) @ vectors.T.astype(np.float64)
    assert ids.shape == scores.shape == (len(queries), k) and ids.dtype == np.int64 and scores.dtype == np.float32
    assert all(len(set(row)) == k for row in ids.tolist())
    assert np.abs(np.take_along_axis(cosines, ids, 1) - scores).max(initial=0) < 1e-5
    assert np.abs(-np.sort(-cosines, axis=1)[:, :k] - scores).max(initial=0) < 1e-5
    assert (np.diff(scores, axis=1) <= 0).all()


@settings(max_examples=60, deadline=None)
@given(n=st.integers(1, 300), n_queries=st.integers(0, 20), n_block=st.integers(1, 320), q_block=st.integers(1, 24), data=st.data())
def test_exact_search_equals_brute_force_whatever_the_blocks(n, n_queries, n_block, q_block, data):
    vectors, queries, k = clustered(n, 8, seed=n), clustered(n_queries, 8, seed=n_queries + 1000), data.draw(st.integers(1, n))
    ids, scores = ExactIndex(vectors, n_passages_a_block=n_block, n_queries_a_block=q_block).search(queries, k)
    nearest(vectors, queries, ids, scores, k)


@settings(max_examples=40, deadline=None)
@given(n=st.integers(1, 3000), k=st.integers(1, 12), levels=st.integers(1, 50), seed=st.integers(0, 10**6))
def test_largest_of_a_row_with_many_ties(n, k, levels, seed):
    scores = torch.randint(levels, (3, n), generator=torch.Generator().manual_seed(seed)).float()
    values, places = largest(scores, min(k, n))
    assert (values == scores.topk(min(k, n), dim=1).values).all() and (scores.gather(1, places) == values).all()
    assert all(len(set(row)) == min(k, n) for row in places.tolist())


def test_vectors_in_a_map_are_searched_without_a_warning(tmp_path, recwarn):
    vectors = clustered(500)
    mapped = embed_texts(lambda texts: vectors[[int(t) for t in texts]], [str(i) for i in range(500)], key="v", cache=tmp_path, batch_size=99)
    ids, scores = ExactIndex(mapped).search(mapped[:20], 50)
    nearest(vectors, vectors[:20], ids, scores, 50)
    graph = VoyagerIndex(mapped, storage="float8")
    assert recall(graph.search(mapped[:20], 50)[0], ids) > 0.95
    assert not [w for w in recwarn if "writable" in str(w.message)]


def test_rows_in_another_order_of_memory():
    vectors = clustered(300)
    turned = np.asfortranarray(vectors)
    assert (ExactIndex(turned).search(turned[::2], 9)[0] == ExactIndex(vectors).search(vectors[::2].copy(), 9)[0]).all()
    assert (VoyagerIndex(turned).search(turned[::2], 9)[0] == VoyagerIndex(vectors).search(vectors[::2].copy(), 9)[0]).all()


@pytest.mark.parametrize("storage", ["float32", "float8"])
def test_graph_finds_nearly_all_with_right_cosines(storage):
    vectors = clustered(4200, 64)
    base, queries = vectors[:4000], vectors[4000:]
    index = VoyagerIndex(base, storage=storage)
    ids, scores = index.search(queries, 100)
    truth = ExactIndex(base).search(queries, 100)[0]
    assert recall(ids, truth) >= 0.95
    assert np.abs(np.take_along_axis(queries @ base.T, ids, 1) - scores).max() < 1e-5 and (np.diff(scores, axis=1) <= 0).all()
    assert (VoyagerIndex(base, storage=storage).search(queries, 100)[0] == ids).all()
    assert index.search(queries[:0], 5)[0].shape == (0, 5)
    one, _ = index.search(queries[7:8], 100)
    assert (one == ids[7:8]).all()


def test_a_graph_may_be_asked_for_everything():
    vectors = clustered(60)
    for storage in ("float32", "float8"):
        ids, scores = VoyagerIndex(vectors, storage=storage).search(vectors[:5], 60)
        assert all(sorted(row) == list(range(60)) for row in ids.tolist())


def test_a_graph_that_reaches_too_few_is_searched_exactly_and_says_so(caplog):
    import voyager

    vectors = clustered(200)
    index = VoyagerIndex(vectors)

    class Refuses:
        def query(self, *args, **kwargs):
            raise voyager.RecallError("too few")

    index.index = Refuses()
    with caplog.at_level(logging.WARNING, "colbert_nb.mining_graph"):
        ids, scores = index.search(vectors[:3], 20)
    nearest(vectors, vectors[:3], ids, scores, 20)
    assert "3 queries are searched exactly" in caplog.text


def test_storage_goes_by_size(monkeypatch):
    monkeypatch.setattr("colbert_nb.mining_graph.FLOAT8_ABOVE", 100 * 4 * 32)
    assert VoyagerIndex(clustered(100)).settings["storage"] == "float32"
    assert VoyagerIndex(clustered(101)).settings["storage"] == "float8"
    assert VoyagerIndex(clustered(101), storage="float32").settings["storage"] == "float32"


def test_saved_index_answers_alike(tmp_path):
    vectors = clustered(900)
    for storage in ("float32", "float8"):
        index = VoyagerIndex(vectors, storage=storage, m=8, ef_construction=60, seed=3)
        index.save(tmp_path / storage)
        loaded = VoyagerIndex.load(tmp_path / storage, vectors)
        assert loaded.settings == index.settings
        for a, b in zip(index.search(vectors[:30], 40), loaded.search(vectors[:30], 40)):
            assert (a == b).all()
    index.save(tmp_path / "float32")
    assert VoyagerIndex.load(tmp_path / "float32", vectors).settings["storage"] == "float8"


def wait_for_the_end(flag: Path):
    flag.touch()
    time.sleep(600)


def build_until(place: str, saves: int, folder: Path, flag: Path):
    "What the killed process does: build, and stop at a place where it can be killed."
    import voyager

    from colbert_nb import mining_graph

    done, save = [], VoyagerIndex.save
    whole_folder = mining_graph.whole_folder

    def counted(self, folder):
        if place == "adding" and len(done) == saves:
            wait_for_the_end(flag)
        done.append(1)
        save(self, folder)

    class Folder:
        def __init__(self, folder):
            self.inner = whole_folder(folder)

        def __enter__(self):
            return self.inner.__enter__()

        def __exit__(self, *error):
            if place == "saving" and len(done) > saves:
                wait_for_the_end(flag)
            return self.inner.__exit__(*error)

    VoyagerIndex.save, mining_graph.whole_folder = counted, Folder
    VoyagerIndex(clustered(1000), folder=folder, save_every=300)


@pytest.mark.parametrize("place, saves", [("adding", 0), ("adding", 2), ("saving", 1), ("saving", 3)])
def test_killed_build_is_gone_on_with(tmp_path, place, saves, caplog):
    "Killed while it adds vectors or while it writes: the next call ends with the bytes of a build that nobody stopped."
    context = imported("colbert_nb.mining_graph", "voyager")
    folder, flag = tmp_path / "index", tmp_path / "flag"
    process = context.Process(target=build_until, args=(place, saves, folder, flag))
    kill_at(process, flag)
    vectors = clustered(1000)
    if saves:
        with pytest.raises(ValueError, match=f"stopped after {300 * saves} of 1000 vectors"):
            VoyagerIndex.load(folder, vectors)
    with caplog.at_level(logging.INFO, "colbert_nb.mining_graph"):
        VoyagerIndex(vectors, folder=folder, save_every=300)
    assert (f"{300 * saves} of 1000 vectors are in the saved index" in caplog.text) == bool(saves)
    VoyagerIndex(vectors, folder=tmp_path / "undisturbed", save_every=300)
    for name in ("index.voyager", "settings.json"):
        assert (folder / name).read_bytes() == (tmp_path / "undisturbed" / name).read_bytes()


def test_an_index_of_something_else_is_refused_by_name(tmp_path):
    vectors = clustered(400)
    index = VoyagerIndex(vectors, folder=tmp_path / "index")
    changed = vectors.copy()
    changed[17] = changed[18]
    for other, word in ((changed, "other vectors.*delete"), (vectors[:399], "n=399, got 400.*delete"),
                        (np.ascontiguousarray(vectors[:, :16]), "dim=16, got 32.*delete")):
        for call in (VoyagerIndex.load, lambda folder, vectors: VoyagerIndex(vectors, folder=folder)):
            with pytest.raises(ValueError, match=word):
                call(tmp_path / "index", other)
    for name, value in dict(m=8, ef_construction=50, seed=1, storage="float8").items():
        with pytest.raises(ValueError, match=f"{name}="):
            VoyagerIndex(vectors, folder=tmp_path / "index", **{name: value})
    assert (VoyagerIndex(vectors, folder=tmp_path / "index").search(vectors[:9], 9)[0] == index.search(vectors[:9], 9)[0]).all()


def test_damaged_and_foreign_folders_are_refused(tmp_path):
    vectors, folder = clustered(200), tmp_path / "index"
    VoyagerIndex(vectors).save(folder)
    content, described = ((folder / name).read_bytes() for name in ("index.voyager", "settings.json"))
    for bad in (content[:-1], b"", content[:500] + b"?" + content[501:]):
        (folder / "index.voyager").write_bytes(bad)
        with pytest.raises(ValueError, match="not the file that settings.json describes; delete"):
            VoyagerIndex.load(folder, vectors)
    (folder / "index.voyager").write_bytes(content)
    for bad in (b"", b"[]", b"{}", described[:-5]):
        (folder / "settings.json").write_bytes(bad)
        with pytest.raises(ValueError, match="saved index"):
            VoyagerIndex.load(folder, vectors)
    with pytest.raises(ValueError, match="saved index"):
        VoyagerIndex.load(tmp_path / "nothing", vectors)
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine/thesis.txt").write_text("years of work")
    for call in (lambda: VoyagerIndex(vectors).save(tmp_path / "mine"), lambda: VoyagerIndex(vectors, folder=tmp_path / "mine")):
        with pytest.raises(ValueError, match="name another"):
            call()
    assert (tmp_path / "mine/thesis.txt").read_text() == "years of work"


@pytest.mark.parametrize("make", [ExactIndex, VoyagerIndex, make_index])
@pytest.mark.parametrize("vectors, word", [([[1.0, 0.0]], "got list"), (np.ones((3, 2)), "got float64"), (np.ones(3, np.float32), r"shape \(3,\)"),
                                           (np.ones((0, 4), np.float32), r"shape \(0, 4\)"), (None, "NoneType")])
def test_what_are_no_vectors(make, vectors, word):
    with pytest.raises(ValueError, match=word):
        make(vectors)


@pytest.mark.parametrize("make", [ExactIndex, VoyagerIndex])
def test_what_is_no_search(make):
    index = make(clustered(50))
    for queries, k, word in ((clustered(3), 51, "from 1 to 50.*got 51"), (clustered(3), 0, "got 0"),
                             (clustered(3, 16), 5, "32 dimensions as in the index, got 16"), (clustered(3)[0], 5, "queries as a float32 array"),
                             (clustered(3).astype(np.float16), 5, "float16")):
        with pytest.raises(ValueError, match=word):
            index.search(queries, k)


@pytest.mark.parametrize("options, word", [(dict(storage="int4"), "storage"), (dict(m=0), "m, ef_construction"), (dict(query_ef=0), "query_ef"),
                                           (dict(save_every=0), "save_every")])
def test_settings_that_are_none(options, word):
    with pytest.raises(ValueError, match=word):
        VoyagerIndex(clustered(20), **options)


def test_fingerprint_knows_order_shape_and_numbers():
    vectors = clustered(20)
    others = [vectors[::-1], vectors[:19], vectors.reshape(10, 64), np.where(np.arange(32) == 5, np.nextafter(vectors, 2), vectors)]
    assert len({fingerprint(v) for v in [vectors, *others]}) == 5 and fingerprint(vectors.copy()) == fingerprint(vectors)


@given(n=st.integers(1, 10**7), q=st.integers(0, 10**7))
def test_choice_is_by_size_alone_and_never_turns_back(n, q):
    first = choose_index(n, q)
    assert first == choose_index(n, q) and first in ("exact", "voyager")
    if first == "voyager":
        assert choose_index(n, 2 * q) == choose_index(n, q, built=True) == "voyager"


def test_make_index_follows_the_rule_and_says_so(tmp_path, monkeypatch, caplog):
    vectors, asked = clustered(100), []
    with caplog.at_level(logging.INFO, "colbert_nb.mining_index"):
        assert type(make_index(vectors, n_queries=5)) is ExactIndex
    assert caplog.messages == ["index of 100 passages for 5 queries: exact"]
    assert type(make_index(vectors, "voyager")) is VoyagerIndex and type(make_index(vectors, "exact")) is ExactIndex

    def rule(n, q, built=False):
        asked.append((n, q, built))
        return "voyager"

    monkeypatch.setattr("colbert_nb.mining_index.choose_index", rule)
    for _ in range(2):
        assert make_index(vectors, seed=5, folder=tmp_path / "index").settings["seed"] == 5
    assert asked == [(100, 100, False), (100, 100, True)] and json.loads((tmp_path / "index/settings.json").read_text())["done"] == 100
    with pytest.raises(ValueError, match="seed=6, got 5"):
        make_index(vectors, seed=6, folder=tmp_path / "index")
    with pytest.raises(ValueError, match="'faiss'"):
        make_index(vectors, "faiss")


def test_names_of_the_graph_are_found_where_they_were():
    from colbert_nb import mining_graph, mining_index

    for name in ("BATCH", "FLOAT8_ABOVE", "VoyagerIndex", "fingerprint", "wide_enough"):
        assert getattr(mining_index, name) is getattr(mining_graph, name) and name in mining_index.__all__
    with pytest.raises(AttributeError, match="no attribute 'nothing'"):
        mining_index.nothing
