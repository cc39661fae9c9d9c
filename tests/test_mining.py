"""Mining under bad input, odd collections, and against brute force."""

import logging
import random

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from colbert_nb.mining import (HARD_NEGATIVE_MODELS, ExactIndex, HardNegativeMiner, VoyagerIndex,
                               hard_negative_model_name, mining_prompts, rank_window)


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
    (dict(sampling="best"), "sampling"), (dict(index="faiss"), "index"), (dict(relative_margin=1.5), "relative_margin"),
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


class Told(Letters):
    "As `Letters`, with prompts of its own, and it remembers those that it is given."

    def __init__(self, prompts):
        super().__init__()
        self.prompts, self.told = prompts, []

    def _encode(self, texts, prompt=None, **kwargs):
        self.told.append(prompt)
        return super()._encode([(prompt or "") + text for text in texts], **kwargs)


@pytest.mark.parametrize("name, query, document", [
    ("intfloat/multilingual-e5-small", "query: ", "passage: "),
    ("intfloat/e5-large-v2", "query: ", "passage: "),
    ("intfloat/multilingual-e5-large-instruct",
     "Instruct: Given a web search query, retrieve relevant passages that answer the query\nQuery: ", ""),
    ("BAAI/bge-base-en-v1.5", "Represent this sentence for searching relevant passages: ", ""),
    ("cache/models--BAAI--bge-small-en-v1.5/snapshots/0123abc", "Represent this sentence for searching relevant passages: ", ""),
    ("BAAI/bge-small-zh-v1.5", "为这个句子生成表示以用于检索相关文章：", ""),
    ("OrdalieTech/Solon-embeddings-base-0.1", "query : ", ""),
    ("BAAI/bge-m3", "", ""), ("thenlper/gte-large-zh", "", ""), ("home/bge-small-en/all-MiniLM-L6-v2", "", ""), ("", "", ""),
])
def test_prompts_of_known_families(name, query, document):
    assert mining_prompts(name, {"query": "", "document": ""}) == {"query": query, "document": document}
    assert mining_prompts(name, {"query": "q> ", "passage": "p> "}) == {"query": "q> ", "document": "p> "}


def test_every_model_of_the_table_has_its_prompts():
    without = {name for row in HARD_NEGATIVE_MODELS.values() for name in row.values() if not any(mining_prompts(name).values())}
    assert without == {f"thenlper/gte-{size}-zh" for size in ("small", "base", "large")}


def test_own_prompts_are_left_to_the_model_and_given_ones_replace_them(caplog):
    own = Told({"query": "q> ", "document": ""})
    miner = HardNegativeMiner(own)
    with caplog.at_level(logging.INFO, "colbert_nb.mining"):
        miner.mine(texts(3, "query"), texts(5), {}, 2)
    assert own.told == [None, None] and miner.settings["prompts"] == {"query": "q> ", "document": ""}
    assert sum("'q> '" in record.getMessage() for record in caplog.records) == 1
    given = Told({"query": "q> "})
    miner = HardNegativeMiner(given, prompts={"document": "passage "}).fit(["0"])
    miner.search(["query 1"], 1)
    assert given.told == ["passage ", ""]
    assert (miner.embeddings == HardNegativeMiner(Letters()).embed(["passage 0"])).all()
    with pytest.raises(ValueError, match="prompts"):
        HardNegativeMiner(given, prompts={"passage": "p"})


def test_rules_reach_the_candidates():
    corpus, queries, positives = texts(120), texts(6, "query"), {q: [q, q + 6] for q in range(6)}
    window = dict(min_rank=0, max_rank=120, index="exact", sampling="top")
    plain = HardNegativeMiner(Letters(), **window)
    everything = plain.mine(queries, corpus, positives, 120)
    vectors, asked = plain.embeddings, plain.embed(queries, "query")
    cosine, near = asked @ vectors.T, vectors @ vectors.T
    keep = {
        "max_score": lambda q, p: cosine[q, p] <= 0.3,
        "min_score": lambda q, p: cosine[q, p] >= 0.1,
        "absolute_margin": lambda q, p: cosine[q, p] + 0.1 <= cosine[q, positives[q]].min(),
        "relative_margin": lambda q, p: cosine[q, p] <= (w := cosine[q, positives[q]].min()) - abs(w) * 0.1,
        "max_positive_similarity": lambda q, p: near[p, positives[q]].max() <= 0.2,
    }
    values = {"max_score": 0.3, "min_score": 0.1, "max_positive_similarity": 0.2}
    for rule, kept in keep.items():
        miner = HardNegativeMiner(Letters(), **window, **{rule: values.get(rule, 0.1)})
        assert miner.mine(queries, corpus, positives, 120) == {q: [p for p in ps if kept(q, p)] for q, ps in everything.items()}, rule
        assert miner.settings[rule] == values.get(rule, 0.1) and miner.verdict.counts()[rule] > 0


def test_too_few_are_reported_and_not_filled(caplog):
    miner = HardNegativeMiner(Letters(), max_score=-0.2, minimum=5, index="exact")
    mined = miner.mine(texts(4, "query"), texts(40), {}, 20)
    assert miner.poor_queries == [q for q, found in mined.items() if len(found) < 5]
    assert miner.short_queries == [0, 1, 2, 3] and "fewer than" in caplog.text


def test_a_cross_encoder_has_its_word():
    class Judge:
        def predict(self, pairs, **kwargs):
            return np.array([float(passage.endswith("7")) for _, passage in pairs], dtype=np.float32)

    miner = HardNegativeMiner(Letters(), cross_encoder=Judge(), cross_encoder_max_score=0.5, min_rank=0, max_rank=50, index="exact")
    mined = miner.mine(texts(3, "query"), texts(50), {}, 50)
    assert all(sorted(found) == [p for p in range(50) if p % 10 != 7] for found in mined.values())
    for half in (dict(cross_encoder=Judge()), dict(cross_encoder_max_score=0.5)):
        with pytest.raises(ValueError, match="cross_encoder"):
            HardNegativeMiner(Letters(), **half)


def test_bad_positions_and_texts_are_refused_before_anything_is_embedded():
    model = Letters()
    miner = HardNegativeMiner(model)
    for queries, corpus, positives, word in ((["a"], ["b"], {0: [1]}, "positives of query 0"), (["a"], ["b"], {1: [0]}, "positives"),
                                             (["a"], ["b", None], {}, "passage 1"), ([3], ["b"], {}, "query 0"), ("a", ["b"], {}, "list")):
        with pytest.raises(ValueError, match=word):
            miner.mine(queries, corpus, positives, 1)
    with pytest.raises(ValueError, match="given to `mine`"):
        HardNegativeMiner(model, n=5)
    with pytest.raises(TypeError, match="min_rnak"):
        HardNegativeMiner(model, min_rnak=5)
    assert not model.calls


class Weighted(Letters, torch.nn.Module):
    "As `Letters`, with weights, so that its vectors can be told from another model's; interrupted at a call, where one is named."

    def __init__(self, stop_at=None):
        torch.nn.Module.__init__(self)
        self.dim, self.calls, self.stop_at = 16, [], stop_at
        self.weight = torch.nn.Parameter(torch.ones(16))

    def encode(self, texts):
        raise NotImplementedError

    def _encode(self, texts, **kwargs):
        if len(self.calls) == self.stop_at:
            raise KeyboardInterrupt
        return super()._encode(texts, **kwargs) * self.weight.detach().numpy()

    def other(self):
        with torch.no_grad():
            self.weight[:8] = 0.1
        return self


@pytest.mark.parametrize("index", ["voyager", "exact", "auto"])
def test_a_cache_embeds_once_and_changes_nothing(index, tmp_path):
    corpus, queries = texts(300), texts(20, "query")
    plain = HardNegativeMiner(Weighted(), index=index).mine(queries, corpus, {}, 5)
    first, second, grown = Weighted(), Weighted(), Weighted()
    options = dict(index=index, cache=tmp_path / "vectors")
    assert HardNegativeMiner(first, **options).mine(queries, corpus, {}, 5) == plain and len(first.calls) == 2
    assert HardNegativeMiner(second, **options).mine(queries, corpus, {}, 5) == plain and not second.calls
    HardNegativeMiner(grown, **options).mine(queries, corpus + ["one more"], {}, 5)
    assert grown.calls == [("document", 301)]


def test_a_cache_tells_models_apart(tmp_path):
    corpus, queries = texts(150), texts(10, "query")
    mine = lambda model, **options: HardNegativeMiner(model, **options).mine(queries, corpus, {}, 5)
    alone = mine(Weighted().other())
    assert mine(Weighted(), cache=tmp_path) != mine(Weighted().other(), cache=tmp_path) == alone
    with pytest.raises(ValueError, match="cannot be told from"):
        mine(Letters(), cache=tmp_path)


def test_an_index_of_another_size_in_the_cache_is_refused_with_the_remedy(tmp_path):
    miner = lambda: HardNegativeMiner(Weighted(), index="voyager", cache=tmp_path)
    miner().fit(texts(60))
    miner().fit(texts(70))
    small, large = sorted(tmp_path.glob("index-*"), key=lambda p: (p / "index.voyager").stat().st_size)
    for file in small.iterdir():
        (large / file.name).write_bytes(file.read_bytes())
    with pytest.raises(ValueError, match="n=70, got 60.*delete"):
        miner().fit(texts(70))


def test_a_model_that_was_trained_on_is_asked_again():
    model, corpus, queries = Weighted(), texts(150), texts(10, "query")
    miner = HardNegativeMiner(model)
    before = miner.mine(queries, corpus, {}, 5)
    assert miner.mine(queries, corpus, {}, 5) == before and model.calls.count(("document", 150)) == 1
    after = HardNegativeMiner(model.other()).mine(queries, corpus, {}, 5)
    assert miner.mine(queries, corpus, {}, 5) == after != before


def test_embedding_that_was_stopped_goes_on(tmp_path):
    corpus, queries = texts(5000), texts(10, "query")
    plain = HardNegativeMiner(Weighted(), index="exact").mine(queries, corpus, {}, 5)
    with pytest.raises(KeyboardInterrupt):
        HardNegativeMiner(Weighted(stop_at=2), index="exact", cache=tmp_path).mine(queries, corpus, {}, 5)
    rest = Weighted()
    assert HardNegativeMiner(rest, index="exact", cache=tmp_path).mine(queries, corpus, {}, 5) == plain
    assert rest.calls == [("document", 2048), ("document", 904), ("query", 10)]


@pytest.mark.parametrize("answer, word", [
    (lambda v: v[:-1], "5 vectors"), (lambda v: v[:, :0], "5 vectors"), (lambda v: v[0], "5 vectors"), (lambda v: None, "5 vectors"),
    (lambda v: v * 0, "zero vector.*'passage 0'"), (lambda v: v * np.inf, "'passage 0'"), (lambda v: [list(r) for r in v[:, :1]] + [[1, 2]], "array"),
])
def test_a_model_that_gives_no_vectors_is_refused(answer, word):
    class Bad(Letters):
        def _encode(self, texts, **kwargs):
            return answer(super()._encode(texts, **kwargs))

    with np.errstate(invalid="ignore"), pytest.raises(ValueError, match=word):
        HardNegativeMiner(Bad()).fit(texts(5))


def test_several_devices_share_the_work_in_one_pool():
    class Pooled(Letters):
        def start_multi_process_pool(self, devices):
            self.pool = {"devices": devices, "stopped": False}
            return self.pool

        def stop_multi_process_pool(self, pool):
            pool["stopped"] = True

        def _encode(self, texts, pool, **kwargs):
            assert pool is self.pool and not pool["stopped"] and pool["devices"] == ["cpu", "cpu"]
            return super()._encode(texts, **kwargs)

    model, corpus, queries = Pooled(), texts(200), texts(5, "query")
    mined = HardNegativeMiner(model, device=["cpu", "cpu"]).mine(queries, corpus, {}, 5)
    assert mined == HardNegativeMiner(Letters()).mine(queries, corpus, {}, 5) and model.pool["stopped"]
