"""The audit's tables against plain code, and what it refuses."""

from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from colbert_nb.mining_audit import audit, audit_changes, audit_query, audit_ranks, audit_rules, audit_suspects, usual_changes
from colbert_nb.mining_rules import RULES, MiningRules, choose, cross_encoder_scores, dense_scores, judge, text_keys

N_QUERIES, N_PASSAGES = 20, 90


def unit(rows, seed):
    vectors = np.random.default_rng(seed).standard_normal((rows, 6)).astype(np.float32)
    return vectors / np.linalg.norm(vectors, axis=1, keepdims=True)


VECTORS, QUERY_VECTORS = unit(N_PASSAGES, 0), unit(N_QUERIES, 1)
QUERIES, CORPUS = [f"query {q}" for q in range(N_QUERIES)], [f"passage {p}" for p in range(N_PASSAGES)]
ALL = QUERY_VECTORS @ VECTORS.T
IDS = np.argsort(-ALL, axis=1, kind="stable")[:, :60]
POSITIVES = {q: [q, q + 20][: 1 + q % 2] for q in range(N_QUERIES - 1)}
RULE = MiningRules(min_rank=2, max_rank=50, n=4, relative_margin=0.1, max_score=0.8, drop_same_text=True)


def judged(rules=RULE, **changed):
    inputs = dict(n_passages=N_PASSAGES, keys=text_keys(CORPUS), pair_scores=dense_scores(QUERY_VECTORS, VECTORS), vectors=VECTORS)
    return judge(rules, IDS, np.take_along_axis(ALL, IDS, axis=1), POSITIVES, **{**inputs, **changed})


def test_one_query_shows_every_ranked_passage_and_its_fate():
    verdict = judged()
    mined = choose(RULE, verdict, QUERIES)
    for q in range(N_QUERIES):
        table = audit_query(verdict, mined, q, CORPUS)
        assert table["passage"].tolist() == IDS[q].tolist() and table["text"].tolist() == [CORPUS[p] for p in IDS[q]]
        assert set(table[table["fate"] == "positive"]["passage"]) == set(POSITIVES.get(q, ())) & set(IDS[q].tolist())
        assert table[table["mined"]]["passage"].tolist() == mined.negatives[q] and set(table[table["mined"]]["fate"]) <= {"kept"}
        ranks = table["rank"].dropna().tolist()
        assert ranks == list(range(len(ranks))) and table["rank"].isna().sum() == (table["fate"] == "positive").sum()


@settings(max_examples=25, derandomize=True, deadline=None)
@given(ranks=st.integers(1, 70), first=st.integers(0, 20), bound=st.floats(0.125, 0.75))
def test_ranks_agree_with_plain_code(ranks, first, bound):
    rules = MiningRules(min_rank=first, max_rank=50, max_score=bound)
    verdict = judged(rules)
    table = audit_ranks(verdict, ranks)
    others = [[p for p in IDS[q].tolist() if p not in POSITIVES.get(q, ())] for q in range(N_QUERIES)]
    kept = [set(verdict.ids[q][verdict.code[q] == 0].tolist()) for q in range(N_QUERIES)]
    for rank in table.index[:-1]:
        there = [(q, row[rank]) for q, row in enumerate(others) if rank < len(row)]
        scores = [ALL[q, p] for q, p in there]
        row = table.loc[rank]
        assert row["queries"] == len(there) and np.isclose(row["mean"], np.mean(scores), atol=1e-6)
        assert np.allclose(row[["low", "high"]].astype(float), np.percentile(scores, [10, 90]), atol=1e-6)
        assert np.isclose(row["kept"], np.mean([p in kept[q] for q, p in there]))
    assert len(table) == min(ranks, max(map(len, others))) + 1
    places = [sum(ALL[q, x] > ALL[q, p] + 1e-6 for x in others[q]) for q, known in POSITIVES.items() for p in known]
    counted = np.bincount(np.minimum(places, len(table) - 1), minlength=len(table))
    assert counted.tolist() == [*table["positives"].iloc[:-1], table["positives"].iloc[-1]]


def test_positives_are_counted_as_found_where_no_scores_were_given():
    verdict = judged(MiningRules(max_rank=50), pair_scores=None, vectors=None)
    table = audit_ranks(verdict)
    assert table["positives"].sum() == (verdict.code == RULES.index("positive")).sum() < sum(map(len, POSITIVES.values()))


def test_rules_are_counted_in_order_and_alone():
    verdict = judged()
    table = audit_rules(verdict)
    assert list(table.index) == ["kept", "min_rank", "drop_same_text", "max_score", "relative_margin"]
    counts = verdict.counts()
    assert {name: n for name, n in table["dropped"].items() if n} == {name: n for name, n in counts.items() if name not in ("positive", "max_rank")}
    known = np.array([[p in POSITIVES.get(q, ()) for p in row] for q, row in enumerate(IDS.tolist())])
    rank = np.cumsum(~known, axis=1) - 1
    above = (np.take_along_axis(ALL, IDS, axis=1) > 0.8) & ~known & (rank < 50)
    assert table.loc["max_score", "alone"] == above.sum() >= table.loc["max_score", "dropped"]
    assert table.loc["min_rank", ["dropped", "alone", "queries"]].tolist() == [40, 40, 20]


def test_suspects_are_the_mined_negatives_with_the_strongest_evidence_first():
    rules = MiningRules(min_rank=0, max_rank=50, n=6)
    verdict = judged(rules)
    mined = choose(rules, verdict, QUERIES)
    table = audit_suspects(verdict, mined, QUERIES, CORPUS, n=None)
    assert sorted(zip(table["query"], table["passage"])) == sorted((q, p) for q, row in mined.negatives.items() for p in row)
    for row in table.itertuples():
        known = POSITIVES.get(row.query)
        assert np.isclose(row.score, ALL[row.query, row.passage], atol=1e-6) and row.text == CORPUS[row.passage]
        if known is None:
            assert np.isnan(row.gap) and np.isnan(row.evidence) and row.positive_text == ""
            continue
        assert np.isclose(row.gap, row.score - min(ALL[row.query, p] for p in known), atol=1e-6)
        assert np.isclose(row.to_positive, max(VECTORS[row.passage] @ VECTORS[p] for p in known), atol=1e-6)
    rated = table.dropna(subset="evidence")
    expected = (rated["gap"].rank(pct=True) + rated["to_positive"].rank(pct=True)) / 2
    assert np.allclose(rated["evidence"], expected) and rated["evidence"].is_monotonic_decreasing
    assert table["evidence"].isna().tolist() == sorted(table["evidence"].isna()) and table["cross_gap"].isna().all()
    head = audit_suspects(verdict, mined, QUERIES, CORPUS, n=3)
    assert head.equals(table.head(3))


def test_a_cross_encoder_is_evidence_and_is_not_asked_again_for_the_rules():
    asked = []

    class Model:
        def predict(self, pairs, **options):
            asked.extend(pairs)
            return np.array([len(p) + len(q) for q, p in pairs], np.float32)

    rules = replace(RULE, cross_encoder_absolute_margin=0.0, relative_margin=None)
    verdict = judged(rules, cross_encoder=cross_encoder_scores(Model(), QUERIES, CORPUS))
    asked.clear()
    table, mined = audit_rules(verdict), choose(rules, verdict, QUERIES)
    suspects = audit_suspects(verdict, mined, QUERIES, CORPUS)
    assert not asked and table["alone"].isna().tolist() == [name in ("kept", "cross_encoder_absolute_margin") for name in table.index]
    assert (suspects["cross_gap"].dropna() <= 0).all() and suspects["cross_gap"].notna().any()


def test_changes_are_what_mining_again_gives():
    verdict = judged()
    tried = {"no margin": dict(relative_margin=None), "late": dict(min_rank=20), "few": dict(n=2), "strict": dict(max_score=0.2, minimum=4)}
    table = audit_changes(verdict, QUERIES, tried)
    assert list(table.index) == ["as it is", *tried]
    before = choose(RULE, verdict, QUERIES).negatives
    weakest = {q: min(ALL[q, p] for p in known) for q, known in POSITIVES.items()}
    for label, changed in tried.items():
        rules = replace(RULE, **changed)
        again = judged(rules)
        mined, row = choose(rules, again, QUERIES), table.loc[label]
        pairs = [(q, p) for q, found in mined.negatives.items() for p in found]
        assert row["candidates"] == (again.code == 0).sum() and row["negatives"] == len(pairs)
        assert (row["short"], row["below"]) == (len(mined.short), len(mined.below))
        assert np.isclose(row["score"], np.mean([ALL[pair] for pair in pairs]), atol=1e-6)
        assert np.isclose(row["new"], np.mean([p not in before[q] for q, p in pairs]))
        assert row["above"] == sum(ALL[q, p] > weakest.get(q, np.inf) for q, p in pairs)
    assert table.loc["no margin", "above"] > table.loc["as it is", "above"] == 0 and table.loc["strict", "below"] > 0


def test_usual_changes_ask_for_nothing_that_is_missing():
    full, bare = judged(), judged(replace(RULE, relative_margin=None), pair_scores=None, vectors=None)
    assert "without relative_margin" in usual_changes(full) and "max_positive_similarity=0.9" in usual_changes(full)
    assert not any("margin" in label or "similarity" in label for label in usual_changes(bare))
    assert list(audit_changes(bare, QUERIES).index) == ["as it is", *usual_changes(bare)]
    assert audit_changes(bare, QUERIES)["above"].isna().all()


def test_the_whole_audit_and_its_picture():
    import matplotlib
    matplotlib.use("Agg")
    seen = audit(judged(), QUERIES, CORPUS, n=7)
    assert len(seen.suspects) == 7 and seen.changes.index[0] == "as it is" and seen.rules.index[0] == "kept"
    figure = seen.plot()
    assert len(figure.axes) == 4 and "score by rank" in figure.axes[0].get_title()
    given = audit(judged(), QUERIES, CORPUS, mined=choose(RULE, judged(), QUERIES), changes={})
    assert list(given.changes.index) == ["as it is"] and given.suspects.head(7).equals(seen.suspects)


def test_the_verdict_of_a_miner_can_be_audited(tmp_path):
    from colbert_nb.mining import HardNegativeMiner

    class Model:
        of = {**dict(zip(CORPUS, VECTORS)), **dict(zip(QUERIES, QUERY_VECTORS))}

        def encode_document(self, texts, **options): return np.stack([self.of[text] for text in texts])
        encode_query = encode_document

    miner = HardNegativeMiner(Model(), index="exact", max_rank=50, sampling="top", relative_margin=0.05)
    mined = miner.mine(QUERIES, CORPUS, POSITIVES, n=4)
    seen = audit(miner.verdict, QUERIES, CORPUS, n=None)
    assert sorted(zip(seen.suspects["query"], seen.suspects["passage"])) == sorted((q, p) for q, found in mined.items() for p in found)
    assert seen.changes.loc["without relative_margin", "above"] > seen.changes.loc["as it is", "above"] == 0


def test_what_does_not_belong_together_is_refused():
    verdict = judged()
    mined = choose(RULE, verdict, QUERIES)
    with pytest.raises(ValueError, match="20 queries and 90 passages that were judged, got 19 and 90"):
        audit(verdict, QUERIES[:-1], CORPUS)
    with pytest.raises(ValueError, match="20 queries and 90 passages that were judged, got 20 and 91"):
        audit(verdict, QUERIES, [*CORPUS, "one more"])
    for q in (-1, N_QUERIES):
        with pytest.raises(ValueError, match="query position below 20"):
            audit_query(verdict, mined, q, CORPUS)
    bare = judged(MiningRules(max_rank=50, drop_same_text=False), pair_scores=None, vectors=None)
    with pytest.raises(ValueError, match="pair_scores="):
        audit_suspects(bare, choose(bare.rules, bare, QUERIES), QUERIES, CORPUS)
    with pytest.raises(ValueError, match="search deeper"):
        audit_changes(verdict, QUERIES, {"deeper": dict(max_rank=80)})
    with pytest.raises(ValueError, match="pair_scores="):
        audit_changes(bare, QUERIES, {"margin": dict(absolute_margin=0.1)})


def test_an_empty_set_can_be_audited():
    rules = MiningRules(min_rank=0, max_rank=50, max_score=-0.999)
    seen = audit(judged(rules), QUERIES, CORPUS)
    assert seen.suspects.empty and seen.changes.loc["as it is", ["negatives", "short"]].tolist() == [0, N_QUERIES]
