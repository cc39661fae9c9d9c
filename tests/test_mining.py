"""Mining under bad input, odd collections, and against brute force."""

import logging
import random

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from colbert_nb.mining import (HARD_NEGATIVE_MODELS, ExactIndex, HardNegativeMiner, VoyagerIndex,
                               hard_negative_model_name, rank_window)


class Letters:
    "Stands in for a sentence-transformers model: a text's vector depends on its characters alone."

    def __init__(self, dim=16):
        self.dim, self.calls = dim, []

    def _encode(self, texts, batch_size, normalize_embeddings, show_progress_bar, convert_to_numpy):
        vectors = np.stack([np.random.default_rng(list(t.encode())).standard_normal(self.dim) for t in texts])
        return vectors / np.linalg.norm(vectors, axis=1, keepdims=True)

    def encode_query(self, texts, **kwargs):
        self.calls.append(("query", len(texts)))
        return self._encode(texts, **kwargs)

    def encode_document(self, texts, **kwargs):
        self.calls.append(("document", len(texts)))
        return self._encode(texts, **kwargs)


def texts(n, kind="passage"):
    return [f"{kind} {i}" for i in range(n)]


def others_of(miner, query, known):
    order = np.argsort(-(miner.embed([query], "query") @ miner.embeddings.T)[0])
    return [int(p) for p in order if p not in known]


@settings(max_examples=40, deadline=None)
@given(n_passages=st.integers(2, 60), n=st.integers(1, 12), first=st.integers(0, 20), width=st.integers(1, 40),
       sampling=st.sampled_from(["random", "top"]), index=st.sampled_from(["exact", "voyager"]), data=st.data())
def test_negatives_lie_in_the_window_and_are_no_positives(n_passages, n, first, width, sampling, index, data):
    corpus, queries = texts(n_passages), texts(4, "query")
    positives = {q: data.draw(st.lists(st.integers(0, n_passages - 1), max_size=3, unique=True)) for q in range(3)}
    miner = HardNegativeMiner(Letters(), min_rank=first, max_rank=first + width, sampling=sampling, index=index)
    mined = miner.mine(queries, corpus, positives, n)
    assert list(mined) == [0, 1, 2, 3]
    for q, negatives in mined.items():
        others = others_of(miner, queries[q], positives.get(q, []))
        low, high = rank_window(len(others), first, first + width)
        window = others[low:high]
        assert len(negatives) == min(n, len(window))
        places = [window.index(p) for p in negatives]
        assert places == sorted(set(places))
        if sampling == "top":
            assert places == list(range(len(places)))
    assert miner.short_queries == [q for q, negatives in mined.items() if len(negatives) < n]


@given(st.integers(0, 10**7), st.integers(0, 500), st.integers(1, 500))
def test_window_is_within_the_collection_and_never_empty(n_others, first, width):
    low, high = rank_window(n_others, first, first + width)
    assert 0 <= low <= high <= n_others or (low, high) == (0, 0)
    assert (low < high) == (n_others > 0)
    if n_others >= first + width:
        assert (low, high) == (first, first + width)


def test_same_seed_same_negatives_and_a_query_does_not_depend_on_its_neighbours():
    corpus, queries = texts(300), texts(40, "query")
    positives = {q: [q] for q in range(40)}
    run = lambda seed, keep: HardNegativeMiner(Letters(), seed=seed).mine(
        [queries[q] for q in keep], corpus, {i: positives[q] for i, q in enumerate(keep)}, 5)
    everyone = list(range(40))
    shuffled = random.Random(0).sample(everyone, 40)
    first, moved = run(1, everyone), run(1, shuffled)
    assert first == run(1, everyone) != run(2, everyone)
    assert all(first[q] == moved[i] for i, q in enumerate(shuffled))


def test_chunks_change_nothing_and_the_corpus_is_embedded_once():
    model, corpus, queries = Letters(), texts(200), texts(25, "query")
    miner = HardNegativeMiner(model, index="exact")
    whole = miner.mine(queries, corpus, {}, 4)
    assert miner.mine(queries, corpus, {}, 4, chunk_size=7) == whole
    assert [size for kind, size in model.calls if kind == "document"] == [200]
    miner.mine(queries, corpus + ["one more"], {}, 4)
    assert [size for kind, size in model.calls if kind == "document"] == [200, 201]


def test_many_positives_do_not_use_up_the_window():
    corpus, queries = texts(200), texts(1, "query")
    miner = HardNegativeMiner(Letters(), index="exact", sampling="top").fit(corpus)
    known = others_of(miner, queries[0], [])[:60]
    assert miner.mine(queries, corpus, {0: known}, 10)[0] == others_of(miner, queries[0], known)[10:20]


def test_voyager_finds_what_exact_search_finds():
    draw = np.random.default_rng(3)
    vectors = draw.standard_normal((8, 64))[draw.integers(8, size=4100)] + draw.standard_normal((4100, 64))
    vectors = (vectors / np.linalg.norm(vectors, axis=1, keepdims=True)).astype(np.float32)
    base, queries = vectors[:4000], vectors[4000:]
    graph, again = VoyagerIndex(base), VoyagerIndex(base)
    ids, scores = graph.search(queries, 100)
    truth, true_scores = ExactIndex(base).search(queries, 100)
    assert np.mean([len(set(a) & set(b)) / 100 for a, b in zip(ids.tolist(), truth.tolist())]) >= 0.95
    assert np.abs(np.take_along_axis(queries @ base.T, ids, 1) - scores).max() < 1e-4
    assert (again.search(queries, 100)[0] == ids).all()


def test_voyager_that_cannot_reach_enough_falls_back_openly(caplog):
    same = np.tile(np.eye(1, 8, dtype=np.float32), (50, 1))
    ids, _ = VoyagerIndex(same).search(same[:2], 50)
    assert sorted(ids[0]) == list(range(50))
    import voyager

    class Refuses:
        def query(self, *args, **kwargs):
            raise voyager.RecallError("too few")

    index = VoyagerIndex(same)
    index.index = Refuses()
    with caplog.at_level(logging.WARNING, "colbert_nb.mining"):
        assert index.search(same[:2], 20)[0].shape == (2, 20)
    assert "searched exactly" in caplog.text


def test_small_collections_are_logged(caplog):
    with caplog.at_level(logging.WARNING, "colbert_nb.mining"):
        mined = HardNegativeMiner(Letters()).mine(texts(3, "query"), texts(6), {0: [0], 1: [1], 2: [0, 1, 2, 3, 4, 5]}, 10)
    assert {q: len(found) for q, found in mined.items()} == {0: 5, 1: 5, 2: 0}
    assert "only 6 passages" in caplog.text and "3 of 3 queries have fewer than 10" in caplog.text
    caplog.clear()
    with caplog.at_level(logging.WARNING, "colbert_nb.mining"):
        HardNegativeMiner(Letters()).mine(texts(3, "query"), texts(200), {0: [0]}, 10)
    assert not caplog.records


@pytest.mark.parametrize("arguments, word", [
    (dict(min_rank=-1), "min_rank"), (dict(min_rank=110), "max_rank"), (dict(max_rank=5), "max_rank"),
    (dict(sampling="best"), "sampling"), (dict(index="faiss"), "index"),
])
def test_bad_settings_are_refused(arguments, word):
    with pytest.raises(ValueError, match=word):
        HardNegativeMiner(Letters(), **arguments)


def test_bad_calls_are_refused(tmp_path):
    miner = HardNegativeMiner(Letters())
    with pytest.raises(ValueError, match="folder"):
        HardNegativeMiner(tmp_path / "nothing")
    with pytest.raises(ValueError, match="fit"):
        miner.search(["a"], 3)
    with pytest.raises(ValueError, match="empty corpus"):
        miner.mine(["a"], [], {}, 3)
    with pytest.raises(ValueError, match="n, the negatives"):
        miner.mine(["a"], ["b"], {}, 0)
    assert miner.mine(["a"], ["b"], {0: [0]}, 3) == {0: []} and miner.short_queries == [0]
    assert miner.mine([], ["b"], {}, 3) == {}


def test_vectors_that_are_not_finite_are_refused():
    class Broken(Letters):
        def _encode(self, texts, **kwargs):
            vectors = super()._encode(texts, **kwargs)
            vectors[-1] = np.nan
            return vectors

    with pytest.raises(ValueError, match="document 4, 'passage 4'"):
        HardNegativeMiner(Broken()).fit(texts(5))


def test_model_table(caplog):
    assert hard_negative_model_name("en-GB", "base") == "BAAI/bge-base-en-v1.5"
    assert hard_negative_model_name("ZH_tw", "large") == "thenlper/gte-large-zh"
    assert hard_negative_model_name("fr") == "OrdalieTech/Solon-embeddings-base-0.1"
    assert not caplog.records
    for unknown in ("tlh", "other", ""):
        assert hard_negative_model_name(unknown, "large") == "intfloat/multilingual-e5-large"
    assert len(caplog.records) == 3
    assert all(set(row) == {"small", "base", "large"} for row in HARD_NEGATIVE_MODELS.values())
    with pytest.raises(ValueError, match="'tiny'"):
        hard_negative_model_name("en", "tiny")


def test_settings_hold_no_path(tmp_path):
    (tmp_path / "my-model").mkdir()
    settings = HardNegativeMiner(tmp_path / "my-model").settings
    assert settings["model"] == "my-model" and str(tmp_path) not in str(settings)
    assert HardNegativeMiner("BAAI/bge-small-en-v1.5").settings["model"] == "BAAI/bge-small-en-v1.5"
