"""Rules for negatives: against brute force, against sentence-transformers, and under bad input."""

import logging
import random
from dataclasses import replace
from types import SimpleNamespace

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from colbert_nb.mining_rules import (RULES, MiningRules, choose, cross_encoder_scores, dense_scores, flat_positives, judge,
                                     positive_cosines, rank_window, text_keys)

quick = settings(max_examples=200, derandomize=True, deadline=None)
plain = MiningRules(drop_same_text=False)


def unit(rows, dim, seed):
    vectors = np.random.default_rng(seed).standard_normal((rows, dim)).astype(np.float32)
    return vectors / np.linalg.norm(vectors, axis=1, keepdims=True)


class Made:
    "Vectors, texts and rankings of made queries and passages; texts repeat, so that there are copies."

    def __init__(self, n_queries, n_passages, positives, seed=0, k=None):
        self.queries, self.positives = [f"query {i}" for i in range(n_queries)], positives
        self.corpus = [f"Text  {p // 2}" if p % 2 else f"text {p // 2} " for p in range(n_passages)]
        self.vectors, self.query_vectors = unit(n_passages, 6, seed), unit(n_queries, 6, seed + 1)
        self.pairs = dense_scores(self.query_vectors, self.vectors)
        rows = np.repeat(np.arange(n_queries), n_passages)
        self.all = self.pairs(rows, np.tile(np.arange(n_passages), n_queries)).reshape(n_queries, n_passages)
        self.ids = np.argsort(-self.all, axis=1, kind="stable")[:, :k]
        self.scores = np.take_along_axis(self.all, self.ids, axis=1)
        self.cross = lambda rows, passages: np.cos(np.arange(len(self.corpus), dtype=np.float32))[passages] + rows % 3

    def judge(self, rules, **changed):
        given = dict(n_passages=len(self.corpus), keys=text_keys(self.corpus), pair_scores=self.pairs, vectors=self.vectors,
                     cross_encoder=self.cross)
        return judge(rules, self.ids, self.scores, self.positives, **{**given, **changed})

    def kept_simply(self, rules, q):
        "The candidates that pass, one at a time, in plain Python."
        known = set(self.positives.get(q, ()))
        others = [p for p in self.ids[q].tolist() if p not in known]
        first, last = rank_window(len(self.corpus) - len(known), rules.min_rank, rules.max_rank)
        same = lambda a, b: self.corpus[a].lower().split() == self.corpus[b].lower().split()
        cross = lambda p: self.cross(np.array([q]), np.array([p]))[0]

        def too_near(score, positive_scores, absolute, relative):
            if not known:
                return False
            weakest = min(positive_scores)
            return (absolute is not None and score + absolute > weakest) or (
                relative is not None and score > weakest - abs(weakest) * relative)

        def passes(p):
            near = max((self.vectors[p] @ self.vectors[x] for x in known), default=-1)
            return not (rules.drop_same_text and any(same(p, x) for x in known)
                        or rules.max_score is not None and self.all[q, p] > rules.max_score
                        or rules.min_score is not None and self.all[q, p] < rules.min_score
                        or too_near(self.all[q, p], [self.all[q, x] for x in known], rules.absolute_margin, rules.relative_margin)
                        or rules.max_positive_similarity is not None and near > rules.max_positive_similarity
                        or rules.cross_encoder_max_score is not None and cross(p) > rules.cross_encoder_max_score
                        or too_near(cross(p), [cross(x) for x in known], rules.cross_encoder_absolute_margin,
                                    rules.cross_encoder_relative_margin))

        return [p for p in others[first:last] if passes(p)]


some = lambda low, high: st.none() | st.floats(low, high, width=16)
rule_sets = st.builds(
    lambda first, width, **rest: MiningRules(min_rank=first, max_rank=first + width, **rest), first=st.integers(0, 5), width=st.integers(2, 40),
    max_score=some(0.125, 1), min_score=some(-1, 0.0625), absolute_margin=some(0, 0.5), relative_margin=some(0, 0.5), drop_same_text=st.booleans(),
    max_positive_similarity=some(0.25, 0.75), cross_encoder_max_score=some(-1, 3), cross_encoder_absolute_margin=some(0, 0.5),
    cross_encoder_relative_margin=some(0, 0.5), sampling=st.sampled_from(["random", "top"]), n=st.integers(2, 6), minimum=st.integers(0, 2),
    seed=st.integers(0, 3))


@quick
@given(rules=rule_sets, n_passages=st.integers(2, 50), seed=st.integers(0, 5), data=st.data())
def test_any_set_of_rules_keeps_what_plain_code_keeps(rules, n_passages, seed, data):
    passages = st.lists(st.integers(0, n_passages - 1), max_size=4)
    made = Made(4, n_passages, {q: data.draw(passages) for q in range(3)}, seed)
    verdict = made.judge(rules)
    mined = choose(rules, verdict, made.queries)
    assert list(mined.negatives) == [0, 1, 2, 3] and sum(verdict.counts().values()) == verdict.ids.size
    for q, query in enumerate(made.queries):
        simple = made.kept_simply(rules, q)
        assert verdict.ids[q][verdict.code[q] == 0].tolist() == simple
        places = list(range(len(simple)))[: rules.n]
        if rules.sampling == "random" and len(simple) > rules.n:
            places = sorted(random.Random(f"{rules.seed} {query}").sample(range(len(simple)), rules.n))
        assert mined.negatives[q] == [simple[place] for place in places]
        assert (q in mined.short) == (len(simple) < rules.n) and (q in mined.below) == (len(simple) < rules.minimum)


@pytest.mark.parametrize("name", RULES[3:])
def test_each_rule_alone_drops_and_nothing_else_does(name):
    made = Made(20, 60, {q: [q, q + 20] for q in range(20)}, seed=3)
    value = dict(min_rank=2, max_rank=30, drop_same_text=True, max_score=0.3, min_score=0.0, absolute_margin=0.1, relative_margin=0.3,
                 max_positive_similarity=0.6, cross_encoder_max_score=0.5, cross_encoder_absolute_margin=0.1, cross_encoder_relative_margin=0.3)
    off = replace(plain, min_rank=0, max_rank=58)
    assert set(made.judge(off).counts()) == {"kept", "positive"}
    counts = made.judge(replace(off, **{name: value[name]})).counts()
    assert set(counts) == {"kept", "positive", name} and counts[name] > 0


def test_window_alone_is_what_the_miner_has_always_drawn():
    made = Made(12, 400, {q: [q, 3 * q + 1] for q in range(11)}, seed=1)
    old = {}
    for q, ranked in enumerate(made.ids.tolist()):
        others = [p for p in ranked if p not in made.positives.get(q, ())][10:110]
        places = random.Random(f"42 {made.queries[q]}").sample(range(len(others)), 7)
        old[q] = [others[place] for place in sorted(places)]
    assert choose(replace(plain, n=7), made.judge(plain), made.queries).negatives == old
    deep = slice(0, 112)
    short = judge(plain, made.ids[:, deep], made.scores[:, deep], made.positives, n_passages=400)
    assert choose(replace(plain, n=7), short, made.queries).negatives == old


def test_a_draw_does_not_depend_on_other_queries():
    made, rules = Made(30, 200, {}, seed=2), replace(plain, n=5)
    whole = choose(rules, made.judge(rules), made.queries).negatives
    part = np.array([4, 17, 2])
    verdict = judge(rules, made.ids[part], made.scores[part], {}, n_passages=200)
    some = choose(rules, verdict, [made.queries[q] for q in part])
    assert [some.negatives[i] for i in range(3)] == [whole[q] for q in part.tolist()]
    assert choose(replace(rules, seed=1), made.judge(rules), made.queries).negatives != whole


def test_rows_that_end_early_shrink_the_window(caplog):
    ids, scores = np.array([[5, 3, 1, -1, -1], [0, 1, 2, 3, 4]]), np.array([[3.0, 2, 1, -np.inf, -np.inf], [5.0, 4, 3, 2, 1]])
    rules = MiningRules(min_rank=1, max_rank=5, drop_same_text=False, sampling="top", n=4, minimum=2)
    with caplog.at_level(logging.WARNING, "colbert_nb"):
        mined = choose(rules, judge(rules, ids, scores, {0: [5]}, n_passages=100), ["a", "b"])
    assert mined.negatives == {0: [3, 1], 1: [1, 2, 3, 4]} and mined.short == [0] and not mined.below
    assert "only 100 passages" in caplog.text and "1 of 2 queries have fewer than 4" in caplog.text and len(caplog.records) == 2


def test_margins_take_the_weakest_positive_even_where_it_was_not_found():
    vectors = np.array([[1, 0], [0.6, 0.8], [0.8, 0.6], [0.5, 0.866], [-1, 0]], np.float32)
    query = np.array([[1, 0]], np.float32)
    ids, scores = np.array([[0, 2, 1, 3]]), np.array([[1, 0.8, 0.6, 0.5]], np.float32)
    rules = MiningRules(min_rank=0, max_rank=2, drop_same_text=False, absolute_margin=0.05)
    kept = lambda known: judge(rules, ids, scores, {0: known}, n_passages=5, pair_scores=dense_scores(query, vectors)).counts().get("kept", 0)
    assert (kept([0]), kept([0, 1]), kept([0, 4])) == (2, 1, 0)


def test_a_relative_margin_lies_below_a_positive_whose_score_is_negative():
    rules = MiningRules(min_rank=0, max_rank=3, drop_same_text=False, relative_margin=0.1)
    verdict = judge(rules, np.array([[1, 2, 3]]), np.array([[-0.45, -0.54, -0.6]]), {0: [0]}, n_passages=4,
                    pair_scores=lambda rows, passages: np.array([-0.5]))
    assert [RULES[code] for code in verdict.code[0]] == ["relative_margin", "relative_margin", "kept"]


def test_queries_without_a_positive_are_named_where_margins_ask(caplog):
    made = Made(3, 30, {0: [1], 2: [5]})
    with caplog.at_level(logging.WARNING, "colbert_nb"):
        verdict = made.judge(MiningRules(min_rank=0, max_rank=25, absolute_margin=0.9))
    assert "1 of 3 queries have no positive: margins cannot act on them, the first is query 1" in caplog.text
    assert np.isnan(verdict.weakest).tolist() == [False, True, False] and verdict.counts()["absolute_margin"] > 0


def test_a_cross_encoder_is_asked_for_what_is_left_and_no_more():
    made, asked = Made(5, 80, {q: [q] for q in range(5)}), []

    class Model:
        def predict(self, pairs, batch_size, show_progress_bar):
            asked.extend(pairs)
            return np.array([len(q) + len(p) for q, p in pairs], np.float32)

    scores = cross_encoder_scores(Model(), made.queries, made.corpus)
    rules = MiningRules(max_rank=40, max_score=0.4, cross_encoder_max_score=14)
    before = made.judge(replace(rules, cross_encoder_max_score=None)).counts()["kept"]
    verdict = made.judge(rules, cross_encoder=scores)
    assert len(asked) == before and np.isfinite(verdict.cross).sum() == before
    assert (verdict.cross[verdict.code == 0] <= 14).all() and verdict.counts()["cross_encoder_max_score"] > 0
    made.judge(replace(rules, cross_encoder_relative_margin=0.05), cross_encoder=scores)
    assert len(asked) == 2 * before + 5


def test_pairs_are_scored_in_blocks_with_the_same_result():
    vectors, queries = unit(50, 8, 0), unit(20, 8, 1)
    rows, passages = np.repeat(np.arange(20), 50), np.tile(np.arange(50), 20)
    assert np.allclose(dense_scores(queries, vectors, block=7)(rows, passages).reshape(20, 50), queries @ vectors.T, atol=1e-6)
    known = flat_positives({q: [q, q + 5, q + 9] for q in range(0, 20, 2)}, 20, 50)
    near = positive_cosines(rows, passages, known, vectors, block=11).reshape(20, 50)
    assert np.allclose(near[4], (vectors @ vectors[[4, 9, 13]].T).max(axis=1), atol=1e-6) and np.isneginf(near[1]).all()
    assert dense_scores(queries, vectors)(rows[:0], passages[:0]).shape == (0,)


@given(st.lists(st.text(alphabet="aA b\n\tßS", max_size=6), max_size=20))
def test_texts_share_a_key_where_they_differ_in_case_and_blanks_alone(texts):
    keys = text_keys(texts)
    for a, first in zip(keys, texts):
        for b, second in zip(keys, texts):
            assert (a == b) == (first.casefold().split() == second.casefold().split())


class Stored:
    "A model whose vectors are known, as sentence-transformers' miner asks for it."
    device = "cpu"

    def __init__(self, made):
        self.of = {**dict(zip(made.corpus, made.vectors)), **dict(zip(made.queries, made.query_vectors))}

    def encode_document(self, texts, **options): return np.stack([self.of[text] for text in texts])
    encode_query = encode_document

    def similarity(self, a, b):
        from sentence_transformers.util import dot_score
        return dot_score(a, b)

    def similarity_pairwise(self, a, b):
        from sentence_transformers.util import pairwise_dot_score
        return pairwise_dot_score(a, b)


def theirs(made, n, cross_encoder=None, **options):
    from datasets import Dataset
    from sentence_transformers.util import mine_hard_negatives
    rows = [(made.queries[q], made.corpus[p]) for q, known in made.positives.items() for p in known]
    found = mine_hard_negatives(Dataset.from_dict({"query": [q for q, _ in rows], "passage": [p for _, p in rows]}), Stored(made), corpus=made.corpus,
                                num_negatives=n, cross_encoder=cross_encoder, sampling_strategy="top", verbose=False, **options)
    at = {text: p for p, text in enumerate(made.corpus)}
    mined = {q: [] for q in made.positives}
    for row in found:
        negatives = mined[made.queries.index(row["query"])]
        if at[row["negative"]] not in negatives:
            negatives.append(at[row["negative"]])
    return mined


@pytest.mark.parametrize("options", [
    dict(relative_margin=0.05), dict(relative_margin=0.4), dict(absolute_margin=0.1), dict(max_score=0.6, min_score=0.1),
    dict(absolute_margin=0.05, relative_margin=0.2, max_score=0.7, min_score=-0.2), dict(range_min=3), dict(range_min=10, range_max=40)])
def test_the_same_negatives_as_sentence_transformers(options):
    made = Made(25, 120, {q: [q, q + 30, q + 60][: 1 + q % 3] for q in range(25)}, seed=4)
    made.corpus = [f"passage {p}" for p in range(120)]
    first, last = options.get("range_min", 0), options.get("range_max", 120)
    ours = {name: value for name, value in options.items() if not name.startswith("range")}
    rules = MiningRules(min_rank=0 if last == 120 else first, max_rank=last, sampling="top", n=5, **ours)
    mined = choose(rules, made.judge(rules), made.queries).negatives
    if last == 120:  # their range_min is no share of a small collection
        mined = choose(replace(rules, n=5 + first), made.judge(rules), made.queries).negatives
        mined = {q: negatives[first:] for q, negatives in mined.items()}
    assert mined == theirs(made, 5, range_max=last, range_min=first, **ours)
    assert 0 < sum(map(len, mined.values()))


def test_the_same_candidates_pass_a_cross_encoder_as_with_sentence_transformers():
    import torch
    made = Made(10, 40, {q: [q, q + 20] for q in range(10)}, seed=5)
    made.corpus = [f"passage {p}" for p in range(40)]
    score = lambda query, passage: float(np.sin(int(query.split()[1]) + 0.7 * int(passage.split()[1])))

    class Model:
        def predict(self, pairs, convert_to_tensor=False, **options):
            scores = np.array([score(*pair) for pair in pairs], np.float32)
            return torch.from_numpy(scores) if convert_to_tensor else scores

    cross = cross_encoder_scores(Model(), made.queries, made.corpus)
    rules = MiningRules(min_rank=0, max_rank=40, sampling="top", n=40, cross_encoder_max_score=0.8, cross_encoder_relative_margin=0.1)
    mined = choose(rules, made.judge(rules, cross_encoder=cross), made.queries).negatives
    others = theirs(made, 38, Model(), range_max=38, max_score=0.8, relative_margin=0.1)
    assert {q: sorted(n) for q, n in mined.items()} == {q: sorted(n) for q, n in others.items()} and any(mined.values())


@pytest.mark.parametrize("changed, word", [
    (dict(min_rank=-1), "min_rank"), (dict(min_rank=110), "max_rank"), (dict(max_rank=10.5), "max_rank"), (dict(n=0), "n, the negatives"),
    (dict(n=True), "n: expected a whole number"), (dict(sampling="best"), "sampling"), (dict(minimum=11), "minimum"), (dict(minimum=-1), "minimum"),
    (dict(min_rank=0, max_rank=3, minimum=4), "window of 3"), (dict(max_score=float("nan")), "max_score"), (dict(min_score="0.5"), "min_score"),
    (dict(min_score=0.5, max_score=0.5), "min_score < max_score"), (dict(absolute_margin=-0.1), "absolute_margin"),
    (dict(relative_margin=5), "relative_margin.*5 %"), (dict(max_positive_similarity=1.5), "max_positive_similarity"),
    (dict(cross_encoder_relative_margin=-0.1), "cross_encoder_relative_margin"), (dict(drop_same_text=1), "drop_same_text")])
def test_settings_that_cannot_be_meant_are_refused(changed, word):
    with pytest.raises(ValueError, match=word):
        MiningRules(**changed)


@pytest.mark.parametrize("rules, changed, word", [
    (MiningRules(), dict(keys=None), "keys="), (replace(plain, absolute_margin=0.1), dict(pair_scores=None), "pair_scores="),
    (replace(plain, max_positive_similarity=0.9), dict(vectors=None), "vectors="),
    (replace(plain, cross_encoder_max_score=0.9), dict(cross_encoder=None), "cross_encoder="),
    (plain, dict(n_passages=30, keys=None, vectors=None), "below 30"), (plain, dict(n_passages=500, keys=None, vectors=None), "search deeper"),
    (plain, dict(keys=np.arange(59)), "keys: expected one for each of 60 passages, got 59"), (plain, dict(vectors=np.eye(61)), "vectors: .* got 61")])
def test_a_rule_whose_input_is_missing_is_refused(rules, changed, word):
    with pytest.raises(ValueError, match=word):
        Made(3, 60, {0: [1]}).judge(rules, **changed)


def test_arrays_that_do_not_fit_are_refused():
    made = Made(3, 60, {0: [1]})
    with pytest.raises(ValueError, match="one shape"):
        judge(plain, made.ids, made.scores[:, :5], {}, n_passages=60)
    with pytest.raises(ValueError, match="NaN for query 2"):
        judge(plain, made.ids, np.where(np.arange(3)[:, None] == 2, np.nan, made.scores), {}, n_passages=60)
    with pytest.raises(ValueError, match="nearest first"):
        judge(plain, made.ids[:, ::-1], made.scores[:, ::-1], {}, n_passages=60)
    for wrong, word in (({3: [0]}, "positions below 3"), ({1: [60]}, "query 1: .* below 60, got 60"), ({1: [-1]}, "got -1")):
        with pytest.raises(ValueError, match=word):
            judge(plain, made.ids, made.scores, wrong, n_passages=60)
    with pytest.raises(ValueError, match="3 queries that were judged, got 2"):
        choose(plain, made.judge(plain), made.queries[:2])
    bad = SimpleNamespace(predict=lambda pairs, **options: np.full(len(pairs), np.nan))
    with pytest.raises(ValueError, match="finite score.*nan for 'query 0'"):
        cross_encoder_scores(bad, made.queries, made.corpus)(np.array([0]), np.array([1]))
    with pytest.raises(ValueError, match="expected a CrossEncoder"):
        cross_encoder_scores(3, made.queries, made.corpus)


def test_no_queries_is_no_error():
    empty = judge(plain, np.empty((0, 5), np.int64), np.empty((0, 5)), {}, n_passages=9)
    assert choose(plain, empty, []).negatives == {} and empty.counts() == {}


def test_the_same_candidates_can_be_judged_again():
    made = Made(10, 80, {q: [q, q + 20] for q in range(9)}, seed=6)
    first = made.judge(MiningRules(max_rank=40))
    rules = MiningRules(max_rank=30, relative_margin=0.2, max_positive_similarity=0.5, cross_encoder_max_score=0.5)
    assert (first.again(rules).code == made.judge(rules).code).all() and first.again(first.rules).counts() == first.counts()
    bare = judge(plain, made.ids, made.scores, made.positives, n_passages=80)
    with pytest.raises(ValueError, match="pair_scores="):
        bare.again(replace(plain, absolute_margin=0.1))
    assert "absolute_margin" in bare.again(replace(plain, absolute_margin=0.9), pair_scores=made.pairs).counts()
