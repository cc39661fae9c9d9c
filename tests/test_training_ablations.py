"""Ablations: what a run trains and tests on, the paired interval, and the file of records."""

import json
import runpy
import sys
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings, strategies as st

from colbert_nb.corpus import RetrievalDataset
from colbert_nb.training_ablations import (BASE, ablation_data, ablation_pool, ablation_split, ablation_table, ablation_triples, paired_difference,
                                           runs_of, setting_difference)

ROOT = Path(__file__).parent.parent


def collection(n_queries: int = 12, n_passages: int = 40) -> RetrievalDataset:
    "Each query has one, two or three passages of its own."
    qrels, free = {}, iter(range(n_passages))
    for q in range(n_queries):
        qrels[q] = {next(free): 1 for _ in range(1 + q % 3)}
    return RetrievalDataset([f"passage {p}" for p in range(n_passages)], [f"query {q}" for q in range(n_queries)], qrels)


def record(seed: int, change: dict, values: list[float], queries: list[int]) -> dict:
    return {"seed": seed, "settings": BASE | change, "per_query": values, "queries": queries, "steps": 25,
            "results": {"nDCG@10": float(np.mean(values))}}


@pytest.mark.parametrize("n_test", [None, 4])
def test_split_is_drawn_by_the_seed_and_tests_no_training_query(n_test):
    data = collection()
    train, test = ablation_split(data, 1, n_test)
    assert not set(train) & set(test) and len(test) == (n_test or 6)
    assert (train, test) == ablation_split(data, 1, n_test) != ablation_split(data, 2, n_test)


@pytest.mark.parametrize("mined", [None, {q: [39, 38, 37] for q in range(12)}])
def test_triples_never_hold_a_positive_as_a_negative(mined):
    data = collection()
    rows = ablation_triples(data, list(range(12)), 24, 3, mined)
    assert len(rows) == 24 and len({(q, p) for q, p, _ in rows}) == 24
    assert all(p in data.qrels[q] and n not in data.qrels[q] for q, p, n in rows)
    assert ablation_triples(data, list(range(12)), 5, 3, mined) == rows[:5]


def test_training_data_have_the_queries_of_the_triples_and_all_their_positives():
    data = collection()
    training = ablation_data(data, rows := ablation_triples(data, [7, 2, 5], 4, 3))
    assert training.queries == ["query 7", "query 2", "query 5"][:len(training.queries)] and training.corpus == data.corpus
    assert [(int(training.queries[q].split()[1]), p, n) for q, p, n in training.triples.tolist()] == rows
    assert all(training.positives[i].tolist() == list(data.qrels[int(query.split()[1])]) for i, query in enumerate(training.queries))


def test_more_triples_than_there_are_is_refused():
    with pytest.raises(ValueError, match="expected 25 triples or more from 12 training queries, got 24"):
        ablation_triples(collection(), list(range(12)), 25, 3)


@pytest.mark.parametrize("mined", [None, {q: [39, 38, 37] for q in range(12)}])
def test_pool_holds_every_relevant_passage_and_is_the_same_each_time(mined):
    data, test = collection(), [0, 4, 5]
    pool = ablation_pool(data, test, 8, 1, mined)
    relevant = {p for q in test for p in data.qrels[q]}
    assert relevant < set(pool) and len(pool) == 8 and pool == sorted(set(pool)) == ablation_pool(data, test, 8, 1, mined)
    assert ablation_pool(data, test, 2, 1, mined) == sorted(relevant)
    with pytest.raises(ValueError, match="a smaller one"):
        ablation_pool(data, test, 41, 1, mined)


@settings(deadline=None, max_examples=50)
@given(st.lists(st.tuples(st.floats(0, 1), st.floats(0, 1), st.integers(0, 5)), min_size=1, max_size=30))
def test_interval_holds_for_any_values(rows):
    first, second, queries = zip(*rows)
    d = paired_difference(first, second, queries, draws=50)
    assert min(np.subtract(first, second)) - 1e-9 <= d.low <= d.high <= max(np.subtract(first, second)) + 1e-9
    swapped = paired_difference(second, first, queries, draws=50)
    assert np.allclose([d.mean, d.low, d.high], [-swapped.mean, -swapped.high, -swapped.low])


def test_a_query_seen_under_several_seeds_counts_once():
    "Copies of the same differences tell nothing new, so the interval stays as wide."
    d = np.random.default_rng(0).normal(0, 1, 100)
    once, copied = (paired_difference(np.tile(d, n), np.zeros(100 * n), np.tile(np.arange(100), n)) for n in (1, 4))
    assert once == pytest.approx(copied)
    alone = paired_difference(np.tile(d, 4), np.zeros(400))
    assert alone.high - alone.low < 0.7 * (copied.high - copied.low)


def test_settings_are_compared_over_the_seeds_that_both_have():
    rows = [record(1, {}, [0.5, 0.5], [0, 1]), record(2, {}, [0.1, 0.1], [0, 2]), record(1, {"dropout": None}, [0.4, 0.5], [0, 1])]
    assert set(runs_of(rows, {})) == {1, 2}
    assert setting_difference(rows, {"dropout": None}, {}).mean == pytest.approx(-0.05)
    table = ablation_table({"docs": rows}, {"without": {}, "with": {"dropout": None}, "not run": {"init": "random"}})
    assert [row[1] for row in table] == ["without", "with"] and "-0.050" in repr(table)
    with pytest.raises(ValueError, match="runs of the same seeds"):
        setting_difference(rows, {"init": "random"}, {})


def test_the_script_goes_on_where_it_stopped(tmp_path, monkeypatch):
    "Runs whose records are there are not done again; a new one is added without harm to the others."
    monkeypatch.syspath_prepend(ROOT / "benchmarks")  # as it is for a script that is started
    script = runpy.run_path(str(ROOT / "benchmarks/ablations.py"))
    main, calls = script["main"], []

    def run(data, settings, seed, **_):
        calls.append((seed, settings["dropout"]))
        if len(calls) == 3:
            raise KeyboardInterrupt
        return {k: v for k, v in record(seed, {}, [0.5], [0]).items() if k not in ("seed", "settings")}

    monkeypatch.setitem(main.__globals__, "ablation_run", run)
    monkeypatch.setitem(main.__globals__, "mined_negatives", lambda *_: {})
    monkeypatch.setitem(main.__globals__, "load", lambda _: ("docs", collection()))
    monkeypatch.setattr(sys, "argv", ["ablations.py", "--only", "dropout", "--results", str(tmp_path)])
    with pytest.raises(KeyboardInterrupt):
        main()
    main()
    assert calls == [(1, 0.0), (1, None), (2, 0.0), (2, 0.0), (2, None), (3, 0.0), (3, None)]
    stored = json.loads((tmp_path / "ablations_docs.json").read_text())
    assert [(r["seed"], r["settings"]["dropout"]) for r in stored] == [(s, d) for s in (1, 2, 3) for d in (0.0, None)]
    assert all(r["versions"]["torch"] and r["hardware"] and r["date"] for r in stored)
