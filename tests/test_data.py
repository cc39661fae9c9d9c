"""Training data: what rows mean, what is refused, what the files hold, and that nothing is lost."""

import contextlib
import hashlib
import io
import itertools
import json
import logging
import os
import random
import subprocess
import sys
import tempfile
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
from hypothesis import HealthCheck, assume, example, given, settings
from hypothesis import strategies as st

from colbert_nb import data_files
from colbert_nb.data import (Examples, TrainingData, check_folder, choose_negatives, clean_text, deal_pairs, draw_outside,
                             export_training_data, load_training_data, make_triples, parse_rows, prepare,
                             split_validation, validation_rows)

FILES = {"queries.train.colbert.tsv", "corpus.train.colbert.tsv", "triples.train.colbert.jsonl", "qrels.train.tsv",
         "validation.jsonl", "manifest.json"}
quick = settings(max_examples=60, derandomize=True, deadline=None, suppress_health_check=list(HealthCheck))
texts = st.text(min_size=1, max_size=30).filter(str.strip)
BREAKERS = ["a\tb", "a\r\nb", "a\rb", "a\u2028b", "a\u2029b", "a\u0085b", "a\x0bb\x0cc\x1cd\x1de\x1ef", "\ufeffa",
            "a\u00a0", "\u3000a\u3000", "a\x00b", '"a"', "0\t1", "a\\nb", "\U0001f468\u200d\U0001f469", "e\u0301", "\u202eabc"]


def pairs(n):
    return [(f"query {i}", f"passage {i}") for i in range(n)]


def contents(folder):
    return {path.name: path.read_bytes() for path in Path(folder).iterdir()}


def colbert_reads(folder):
    "Queries, passages, triples and qrels by colbert-ai's own loaders, which print."
    with contextlib.redirect_stdout(io.StringIO()):
        from colbert.data import Collection, Queries
        from colbert.data import Examples as Triples
        from colbert.evaluation.loaders import load_qrels

        queries = Queries(path=str(folder / data_files.QUERIES))
        assert list(queries.keys()) == list(range(len(queries)))
        return (list(queries.values()), Collection(path=str(folder / data_files.CORPUS)).data,
                Triples(path=str(folder / data_files.TRIPLES)).data, load_qrels(str(folder / data_files.QRELS)))


# texts


@quick
@given(st.text())
def test_cleaned_text_is_one_line_with_the_same_words(text):
    if not text.strip():
        with pytest.raises(ValueError, match="empty or blank"):
            clean_text(text)
        return
    cleaned = clean_text(text)
    assert clean_text(cleaned) == cleaned == cleaned.strip()
    assert cleaned.split() == text.split()
    assert not set(cleaned) & set("\r\n\t")


@pytest.mark.parametrize("text, cleaned", [("a\r\nb", "a b"), ("a\t\t\n b", "a  b"), ("\ufeffa", "\ufeffa"),
                                           (np.str_(" a "), "a"), ("a\u2028b", "a\u2028b")])
def test_clean_text_by_example(text, cleaned):
    assert clean_text(text) == cleaned and type(clean_text(text)) is str


@quick
@given(st.lists(st.tuples(texts, texts), min_size=2, max_size=12), st.lists(texts, max_size=6))
@example([(text, text) for text in BREAKERS], BREAKERS)
@example(list(itertools.pairwise(BREAKERS)), ["plain"])
def test_any_text_reads_back_here_and_in_colbert_ai(rows, documents):
    examples = parse_rows(rows, all_documents=[*documents, "passage", "another passage"])
    assume(any(len(p) < len(examples.corpus) for p in examples.positives.values()))
    triples = make_triples(examples)
    with tempfile.TemporaryDirectory() as home:
        folder = export_training_data(Path(home) / "data", examples, triples, validation=validation_rows(examples))
        assert set(contents(folder)) == FILES and os.listdir(home) == ["data"]
        data = load_training_data(folder)
        queries, corpus, theirs, qrels = colbert_reads(folder)
    assert data.queries == queries == examples.queries
    assert data.corpus == corpus == examples.corpus
    assert data.triples.tolist() == theirs == [list(t) for t in triples]
    assert data.positives == examples.positives
    assert {q: set(p) for q, p in qrels.items()} == {q: set(p) for q, p in examples.positives.items()}
    assert [row["query"] for row in data.validation] == examples.queries
    wanted = {query: set() for query in examples.queries}
    for query, passage in rows:
        wanted[clean_text(query)].add(clean_text(passage))
    assert {examples.queries[q]: {examples.corpus[p] for p in ps} for q, ps in examples.positives.items()} == wanted


# rows


def test_all_forms_of_rows_mean_the_same():
    triplets = [("q", ["a", {"content": "b"}], "c"), ("r", "c", ("a", "d"))]
    labelled = [("q", "a", 1), ("q", ("b",), 1), ("q", "c", 0), ("r", "c", 1), ("r", ["a", "d"], 0)]
    one, two = parse_rows(triplets), parse_rows(iter(labelled), pairs_with_labels=True)
    assert one == two == Examples(["q", "r"], ["a", "b", "c", "d"], {0: [0, 1], 1: [2]}, {0: [2], 1: [0, 3]})
    for yes, no in ((True, False), ("yes", "no"), (np.int64(1), np.int64(0)), (1.0, -1.0)):
        rows = [(q, p, yes if label else no) for q, p, label in labelled]
        assert parse_rows(rows, pairs_with_labels=True, positive_label=yes, negative_label=no) == two


def test_rows_are_merged_over_the_whole_input():
    rows = [("q", "a"), ("r", "a"), ("q\n", "b"), (" q", "a "), ("q", ["a", "c", "a"])]
    assert parse_rows(rows) == Examples(["q", "r"], ["a", "b", "c"], {0: [0, 1, 2], 1: [0]}, {})


def test_duplicates_add_nothing():
    rows = [("q", "a", "n"), ("q", "a", "m"), ("r", "b", "n")]
    assert parse_rows(rows * 3) == parse_rows(rows)
    assert make_triples(parse_rows(rows * 3)) == make_triples(parse_rows(rows))


def test_all_documents_extend_the_corpus_only():
    examples = parse_rows(pairs(2), all_documents=({"content": t} if t == "x" else t for t in ["x", "passage 1 ", "y"]))
    assert examples.corpus == ["passage 0", "passage 1", "x", "y"]
    assert examples.positives == parse_rows(pairs(2)).positives


def test_a_query_with_negatives_alone_is_left_out_and_reported(caplog):
    rows = [("q", "a", 0), ("r", "b", 1), ("r", "a", 0)]
    examples = parse_rows(rows, pairs_with_labels=True)
    assert (examples.queries, examples.positives, examples.negatives) == (["r"], {0: [1]}, {0: [0]})
    assert "1 of 2 queries have no positive" in caplog.text


GOOD = ("query", "passage")
BAD_ROWS = {  # rows, options, parts of the error
    "empty": ([], {}, ["raw_data: expected a row at least, got none"]),
    "spent generator": ((r for r in ()), {}, ["got none"]),
    "text": ("query", {}, ["raw_data", "iterable", "str 'query'"]),
    "dict": ({"query": "passage"}, {}, ["iterable", "dict"]),
    "a set": ({GOOD}, {}, ["fixed order", "set", "sort"]),
    "nothing": (None, {}, ["iterable", "NoneType"]),
    "row is a text": ([GOOD, "ab"], {}, ["row 1", "tuple or list", "str 'ab'"]),
    "row is a dict": ([{"query": "q", "passage": "p"}], {}, ["row 0", "tuple or list", "for r in rows"]),
    "one value": ([("q",)], {}, ["row 0", "1 values"]),
    "four values": ([("q", "p", "n", "m")], {}, ["row 0", "4 values", "go in a list"]),
    "mixed lengths": ([GOOD, (*GOOD, "negative")], {}, ["row 1", "expected 2 values, as in row 0, got 3"]),
    "query is a number": ([GOOD, (7, "p")], {}, ["row 1, query", "string", "int 7"]),
    "query is a dict": ([({"content": "q"}, "p")], {}, ["row 0, query", "string", "dict"]),
    "query is a list": ([(["q"], "p")], {}, ["row 0, query", "string", "list"]),
    "query is missing": ([GOOD, (None, "p")], {}, ["row 1, query", "NoneType"]),
    "query is bytes": ([(b"q", "p")], {}, ["row 0, query", "bytes"]),
    "blank query": ([GOOD, (" \t\u2003", "p")], {}, ["row 1, query", "blank"]),
    "empty passage": ([GOOD, ("q", "")], {}, ["row 1, passage", "empty"]),
    "passage is missing": ([("q", float("nan"))], {}, ["row 0, passage", "float nan"]),
    "no passages": ([("q", [])], {}, ["row 0, passage", "empty list"]),
    "a bad passage of several": ([("q", ["a", 3])], {}, ["row 0, passage 1", "int 3"]),
    "dict without content": ([("q", {"text": "p"})], {}, ["row 0, passage", "'content'"]),
    "blank content": ([("q", {"content": " "})], {}, ["row 0, passage", "blank"]),
    "lone surrogate": ([GOOD, ("q", "abc\udfff")], {}, ["row 1, passage", "'\\udfff'", "character 3", "errors="]),
    "negative is a number": ([(*GOOD, 1)], {}, ["row 0, negative", "pairs_with_labels=True"]),
    "negative is a numpy number": ([(*GOOD, np.int64(0))], {}, ["row 0, negative", "pairs_with_labels=True"]),
    "negative is blank": ([(*GOOD, ["n", " "])], {}, ["row 0, negative 1", "blank"]),
    "label is neither": ([(*GOOD, 1), ("q", "p", 2)], {"pairs_with_labels": True}, ["row 1", "1 or 0", "int 2"]),
    "label is a text": ([(*GOOD, "1")], {"pairs_with_labels": True}, ["row 0", "str '1'", "positive_label"]),
    "label is missing": ([(*GOOD, None)], {"pairs_with_labels": True}, ["row 0", "NoneType"]),
    "label is a list": ([(*GOOD, [1])], {"pairs_with_labels": True}, ["row 0", "list [1]"]),
    "no label": ([GOOD], {"pairs_with_labels": True}, ["row 0", "label", "pairs_with_labels=False"]),
    "labels alike": ([(*GOOD, 1)], {"pairs_with_labels": True, "negative_label": 1}, ["positive_label", "both"]),
    "no positive": ([(*GOOD, 0)], {"pairs_with_labels": True}, ["expected a positive", "positive_label"]),
    "both in one row": ([("q", "p", "p ")], {}, ["row 0", "positive in row 0 and negative in row 0", "'p'", "'q'"]),
    "positive after negative": ([("q", "a", "p"), ("x", "p", "y"), ("q", "p", "b")], {},
                                ["row 2", "positive in row 2 and negative in row 0"]),
    "negative after positive": ([("q", "p", 1), ("q", "r", 1), (" q", "p\n", 0)], {"pairs_with_labels": True},
                                ["row 2", "positive in row 0 and negative in row 2"]),
    "document is a number": ([GOOD], {"all_documents": ["d", 5]}, ["all_documents item 1", "int 5"]),
    "document is blank": ([GOOD], {"all_documents": ["d", "\n"]}, ["all_documents item 1", "blank"]),
    "documents are a set": ([GOOD], {"all_documents": {"a", "b"}}, ["all_documents", "fixed order"]),
    "documents are a text": ([GOOD], {"all_documents": "abc"}, ["all_documents", "iterable", "str 'abc'"]),
}


class Miner:
    "Finds what it is told to; remembers what it was asked."

    def __init__(self, found=()):
        self.found, self.calls = found, []

    def mine(self, queries, corpus, positives, n):
        self.calls.append((queries, corpus, positives, n))
        return {q: list(self.found) for q in range(len(queries))}


@pytest.mark.parametrize("case", BAD_ROWS)
def test_bad_rows_are_refused_before_anything_happens(case, tmp_path):
    rows, options, parts = BAD_ROWS[case]
    with pytest.raises(ValueError) as parsed:
        parse_rows(rows, **options)
    miner = Miner()
    with pytest.raises(ValueError) as prepared:
        prepare(rows, tmp_path / "new" / "data", miner=miner, **options)
    assert all(part in str(parsed.value) for part in parts), parsed.value
    assert str(prepared.value) == str(parsed.value)
    assert not miner.calls and not list(tmp_path.iterdir())


BAD_OPTIONS = {
    "one passage": ([GOOD], {}, ["collection", "got none", "all_documents"]),
    "every passage answers": ([("q", ["a", "b"]), ("r", ["b", "a"])], {}, ["collection", "2 passages"]),
    "no negatives wanted": (pairs(9), {"num_new_negatives": 0}, ["num_new_negatives=0", "triplets"]),
    "negative number": (pairs(9), {"num_new_negatives": -1}, ["num_new_negatives", "0 or more", "-1"]),
    "no whole number": (pairs(9), {"num_new_negatives": 2.5}, ["num_new_negatives", "float 2.5"]),
    "truth for a number": (pairs(9), {"num_new_negatives": True}, ["num_new_negatives", "bool"]),
    "seed": (pairs(9), {"seed": "42"}, ["seed", "str '42'"]),
    "fraction of one": (pairs(9), {"validation_fraction": 1}, ["validation_fraction", "below 1"]),
    "fraction below zero": (pairs(9), {"validation_fraction": -0.1}, ["validation_fraction", "-0.1"]),
    "fraction is no number": (pairs(9), {"validation_fraction": float("nan")}, ["validation_fraction", "nan"]),
    "validation is trained": (pairs(9), {"validation_data": [("new", "p"), ("query 3", "p")]}, ["'query 3'", "both"]),
    "validation row is bad": (pairs(9), {"validation_data": [("new", "p"), ("newer", 0)]}, ["validation_data row 1"]),
    "validation is empty": (pairs(9), {"validation_data": []}, ["validation_data", "got none"]),
}


@pytest.mark.parametrize("case", BAD_OPTIONS)
def test_bad_options_are_refused_before_anything_happens(case, tmp_path):
    rows, options, parts = BAD_OPTIONS[case]
    miner = Miner()
    with pytest.raises(ValueError) as error:
        prepare(rows, tmp_path / "data", miner=miner, **options)
    assert all(part in str(error.value) for part in parts), error.value
    assert not miner.calls and not list(tmp_path.iterdir())


# negatives and triples


@quick
@given(st.integers(0, 60), st.integers(0, 20), st.sets(st.integers(0, 59)), st.integers())
def test_draws_are_those_of_the_simple_way(total, n, excluded, seed):
    excluded = {e for e in excluded if e < total}
    allowed = [p for p in range(total) if p not in excluded]
    drawn = draw_outside(total, n, excluded, random.Random(seed))
    assert drawn == random.Random(seed).sample(allowed, min(n, len(allowed)))


def test_draws_reach_every_allowed_passage_alike():
    rng = random.Random(0)
    counts = Counter(p for _ in range(4000) for p in draw_outside(12, 3, {0, 5, 6, 11}, rng))
    assert set(counts) == {1, 2, 3, 4, 7, 8, 9, 10} and max(counts.values()) - min(counts.values()) < 250


@quick
@given(st.integers(1, 30), st.integers(1, 30), st.integers(1, 60))
def test_dealt_pairs_are_distinct_and_even(n_pos, n_neg, limit):
    dealt = deal_pairs(list(range(n_pos)), list(range(n_neg)), limit)
    assert len(dealt) == len(set(dealt)) == min(limit, n_pos * n_neg)
    for side, size in ((0, n_pos), (1, n_neg)):
        counts = Counter(pair[side] for pair in dealt)
        assert max(counts.values()) - min(counts[i] for i in range(size)) <= 1


small = st.sampled_from([f"text {i}" for i in range(12)])
triplets = st.lists(st.tuples(small, st.lists(small, min_size=1, max_size=5), st.lists(small, min_size=1, max_size=5)),
                    min_size=1, max_size=8)


@quick
@given(triplets, st.dictionaries(st.integers(0, 8), st.lists(st.integers(0, 11), max_size=20)), st.integers(0, 12),
       st.integers(1, 25))
def test_triples_keep_their_promises(rows, mined, num_new, max_triples):
    try:
        examples = parse_rows(rows, all_documents=[f"text {i}" for i in range(12)])
    except ValueError as error:
        assert "both positive and negative" in str(error)
        assume(False)
    options = dict(mined=mined, num_new_negatives=num_new, max_triples=max_triples)
    triples = make_triples(examples, **options)
    assert triples == make_triples(examples, **options)
    assert len(set(triples)) == len(triples)
    for query, positives in examples.positives.items():
        own = examples.negatives[query]
        mine = [(p, n) for q, p, n in triples if q == query]
        chosen = choose_negatives(examples, query, mined.get(query, ()), num_new_negatives=num_new)
        assert chosen[: len(own)] == own and len(set(chosen)) == len(chosen) <= len(own) + num_new
        assert not set(chosen) & set(positives)
        new = [p for p in dict.fromkeys(mined.get(query, ())) if p not in {*own, *positives}][:num_new]
        assert chosen[len(own) : len(own) + len(new)] == new
        assert len(chosen) == min(len(own) + num_new, 12 - len(positives))
        assert {p for p, _ in mine} <= set(positives) and {n for _, n in mine} <= set(chosen)
        assert len(mine) == min(max_triples, len(positives) * len(chosen))


def test_a_positive_is_never_a_negative_even_if_told_so():
    examples = Examples(["q"], ["a", "b", "c", "d"], {0: [0, 1, 0]}, {0: [1, 2, 2]})
    triples = make_triples(examples, mined={0: [0, 1, 3, 3]})
    assert sorted(triples) == [(0, 0, 2), (0, 0, 3), (0, 1, 2), (0, 1, 3)]


@pytest.mark.parametrize("position", [-1, 2, 10**9])
def test_mined_positions_must_exist(position):
    with pytest.raises(ValueError, match=f"from 0 to 1, got {position}"):
        make_triples(parse_rows(pairs(2)), mined={1: [position]})


def test_at_most_twenty_triples_a_query_and_all_positives_stay_known(tmp_path):
    rows = [("q", [f"positive {i}" for i in range(50)]), *pairs(100)]
    prepare(rows, tmp_path / "data", validation_fraction=0)
    data = load_training_data(tmp_path / "data")
    assert Counter(t[0] for t in data.triples)[0] == 20
    assert data.positives[0].tolist() == list(range(50))


def test_a_query_that_everything_answers_is_reported(caplog):
    triples = make_triples(parse_rows([("q", ["a", "b"]), ("r", "a")]))
    assert triples == [(1, 0, 1)] and "1 of 2 queries have no negative" in caplog.text and "'q'" in caplog.text


def test_a_negative_of_a_large_collection_costs_little():
    examples = Examples(["q"], range(10**12), {0: [5]}, {})
    chosen = choose_negatives(examples, 0, num_new_negatives=1000)
    assert len(set(chosen)) == 1000 and 5 not in chosen


# validation


def test_held_out_queries_share_no_passage():
    examples = parse_rows((f"q{i}", [f"p{i // 3}", f"only {i}"]) for i in range(300))
    train, valid = split_validation(examples)
    used = [{p for ps in part.positives.values() for p in ps} for part in (train, valid)]
    assert not used[0] & used[1] and 15 <= len(valid.queries) <= 30
    assert sorted(train.queries + valid.queries) == sorted(examples.queries)
    assert split_validation(examples) == (train, valid) != split_validation(examples, seed=1)
    assert train.corpus is examples.corpus and list(train.positives) == list(range(len(train.queries)))


def test_queries_that_all_share_a_passage_are_split_all_the_same(caplog):
    train, valid = split_validation(parse_rows((f"q{i}", ["everything", f"p{i}"]) for i in range(50)))
    assert (len(train.queries), len(valid.queries)) == (45, 5) and "held out by query" in caplog.text


@pytest.mark.parametrize("n, fraction, held", [(1, 0.5, 0), (2, 0.1, 1), (5, 0.0, 0), (10, 0.1, 1), (4, 0.999, 3),
                                               (3000, 0.1, 200)])
def test_how_many_are_held_out(n, fraction, held):
    train, valid = split_validation(parse_rows(pairs(n)), fraction=fraction)
    assert (len(train.queries), len(valid.queries)) == (n - held, held)


def test_validation_candidates():
    examples = parse_rows([("q", "a", ["n", "m"]), *[(f"q{i}", f"p{i}", "n") for i in range(100)]])
    row = validation_rows(examples, mined={0: [50, 51]})[0]
    assert row["query"] == "q" and row["positives"] == [0] and row["candidates"] == sorted(set(row["candidates"]))
    assert len(row["candidates"]) == 50 and {0, 1, 2, 50, 51} <= set(row["candidates"])
    many = validation_rows(parse_rows([("q", [f"p{i}" for i in range(60)])], all_documents=map(str, range(500))))[0]
    assert len(many["candidates"]) == 120 and set(many["positives"]) == set(range(60)) < set(many["candidates"])


def test_given_validation_rows_are_used(tmp_path):
    folder = prepare(pairs(10), tmp_path / "data", validation_data=[("held", ["passage 3", "new"]), ("also", "newer")],
                     all_documents=["further"])
    data = load_training_data(folder)
    assert len(data.queries) == 10 and len(data.corpus) == 13
    assert [(row["query"], row["positives"]) for row in data.validation] == [("held", [3, 10]), ("also", [11])]


def test_the_miner_is_asked_once_for_all_queries(tmp_path):
    rows = [(f"query {i}", f"passage {i}", f"own {i}") for i in range(10)]
    miner = Miner(found=[0, 2, 4])
    data = load_training_data(prepare(rows, tmp_path / "data", miner=miner, num_new_negatives=3))
    (queries, corpus, known, n), = miner.calls
    assert queries == list(data.queries) + [row["query"] for row in data.validation] and corpus == data.corpus and n == 3
    assert all(corpus[p].split()[1] == queries[q].split()[1] for q, ps in known.items() for p in ps)
    assert all(len(ps) == 2 for ps in known.values()) and len(known) == 10
    negatives = {(q, n) for q, _, n in data.triples}
    assert all((q, n) in negatives or n in known[q] for q in range(9) for n in (0, 2, 4))
    miner = Miner()
    prepare(rows, tmp_path / "data", miner=miner, num_new_negatives=0)
    assert not miner.calls


# files


def test_preparing_again_replaces_the_folder_with_the_same_bytes(tmp_path):
    first = contents(prepare(pairs(30), tmp_path / "a"))
    assert first == contents(prepare(iter(pairs(30)), tmp_path / "deep" / "down" / "b"))
    assert contents(prepare(pairs(31), tmp_path / "a")) != first
    assert contents(prepare(pairs(30), str(tmp_path / "a"))) == first
    assert sorted(os.listdir(tmp_path)) == ["a", "deep"]


SCRIPT = """
import hashlib, sys
from pathlib import Path
from colbert_nb.data import prepare
rows = [(f"qu\\u00e9ry {i % 40}", [f"p\\u00e4ssage {i} \\U0001f600", f"text {i % 7}"]) for i in range(80)]
folder = prepare(rows, sys.argv[1], all_documents={f"document {i}": 0 for i in range(50)}.keys())
print(hashlib.sha256(b"".join(p.read_bytes() for p in sorted(folder.iterdir()))).hexdigest())
"""


def test_the_same_files_whatever_the_hash_seed_and_the_locale(tmp_path):
    digests = set()
    for number, extra in enumerate([{"PYTHONHASHSEED": "0"},
                                    {"PYTHONHASHSEED": "1", "PYTHONUTF8": "0", "LC_ALL": "C", "PYTHONCOERCECLOCALE": "0"}]):
        done = subprocess.run([sys.executable, "-c", SCRIPT, str(tmp_path / str(number))], env={**os.environ, **extra},
                              capture_output=True, text=True, cwd=Path(__file__).parents[1], timeout=120)
        assert done.returncode == 0, done.stderr
        digests.add(done.stdout)
    assert len(digests) == 1


@pytest.fixture
def prepared(tmp_path):
    folder = prepare(pairs(30), tmp_path / "data")
    return folder, contents(folder)


@pytest.mark.parametrize("broken", range(1, 7))
def test_a_failure_in_mid_write_leaves_the_old_folder(prepared, broken, monkeypatch):
    folder, before = prepared
    write, calls = data_files._write, itertools.count(1)

    def failing(path, lines):
        if next(calls) == broken:
            write(path, itertools.islice(lines, 1))
            raise OSError("no space left on device")
        return write(path, lines)

    monkeypatch.setattr(data_files, "_write", failing)
    for target in (folder, folder.parent / "new"):
        calls = itertools.count(1)
        with pytest.raises(OSError, match="no space"):
            prepare(pairs(40), target)
    assert contents(folder) == before and os.listdir(folder.parent) == ["data"]


@pytest.mark.parametrize("error", [OSError, KeyboardInterrupt])
@pytest.mark.parametrize("broken", [1, 2])
def test_a_failure_while_renaming_leaves_the_old_folder(prepared, broken, error, monkeypatch):
    folder, before = prepared
    rename, calls = Path.rename, itertools.count(1)

    def failing(self, target):
        if next(calls) == broken:
            raise error("renaming failed")
        return rename(self, target)

    monkeypatch.setattr(Path, "rename", failing)
    with pytest.raises(error, match="renaming failed"):
        prepare(pairs(40), folder)
    assert contents(folder) == before and os.listdir(folder.parent) == ["data"]


def test_a_killed_process_leaves_a_whole_folder(prepared):
    folder, before = prepared
    script = ("import os, sys; from colbert_nb import data, data_files; write = data_files._write\n"
              "data_files._write = lambda path, lines: os._exit(9) if 'qrels' in path.name else write(path, lines)\n"
              "data.prepare([(f'q {i}', f'p {i}') for i in range(40)], sys.argv[1])")
    done = subprocess.run([sys.executable, "-c", script, str(folder)], cwd=Path(__file__).parents[1], timeout=120)
    assert done.returncode == 9
    assert contents(folder) == before
    assert len(contents(prepare(pairs(40), folder))) == 6


@pytest.mark.parametrize("name", ["notes.txt", ".hidden", "sub/file", "queries.train.colbert.tsv", "manifest.json"])
def test_a_folder_that_is_not_ours_is_refused(tmp_path, name):
    path = tmp_path / "data" / name
    path.parent.mkdir(parents=True)
    path.write_text("{}")
    miner = Miner()
    with pytest.raises(ValueError, match="expected an empty folder .* Nothing was changed"):
        prepare(pairs(30), tmp_path / "data", miner=miner)
    assert not miner.calls and path.read_text() == "{}" and os.listdir(tmp_path) == ["data"]


def test_a_file_added_to_our_folder_is_not_lost(prepared):
    folder, _ = prepared
    (folder / "notes.txt").write_text("mine")
    with pytest.raises(ValueError, match="notes.txt"):
        prepare(pairs(40), folder)
    assert (folder / "notes.txt").read_text() == "mine"


def test_where_a_folder_may_be(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(ValueError, match="got a file"):
        check_folder(tmp_path / "file")
    (tmp_path / "empty").mkdir()
    assert len(contents(prepare(pairs(9), tmp_path / "empty"))) == 6
    (tmp_path / "link").symlink_to(tmp_path / "empty")
    before = contents(tmp_path / "empty")
    assert contents(prepare(pairs(12), tmp_path / "link")) != before
    assert (tmp_path / "link").is_symlink() and contents(tmp_path / "empty") == contents(tmp_path / "link")


def test_the_manifest_names_no_place(prepared):
    folder, before = prepared
    manifest = json.loads(before["manifest.json"])
    assert manifest["counts"] == {"queries": 27, "passages": 30, "triples": 270, "validation_queries": 3}
    assert manifest["files"] == {name: hashlib.sha256(data).hexdigest() for name, data in before.items()
                                 if name != "manifest.json"}
    assert str(folder.parent).encode() not in before["manifest.json"]


def test_export_refuses_texts_that_would_not_read_back(tmp_path):
    for wrong in ("a\tb", " a", "a\n"):
        with pytest.raises(ValueError, match="passage 1: expected one stripped line"):
            export_training_data(tmp_path / "data", Examples(["q"], ["a", wrong], {0: [0]}), [(0, 0, 1)])
    with pytest.raises(ValueError, match="triples: expected one at least"):
        export_training_data(tmp_path / "data", Examples(["q"], ["a"], {0: [0]}), [])
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("name", sorted(FILES - {"manifest.json"}))
def test_a_changed_or_missing_file_is_noticed(prepared, name):
    folder, before = prepared
    (folder / name).write_bytes(before[name] + b"\n")
    with pytest.raises(ValueError, match=f"expected {name} as it was written"):
        load_training_data(folder)
    (folder / name).unlink()
    with pytest.raises(ValueError, match=f"expected the file {name}, which is not there"):
        load_training_data(folder)


@pytest.mark.parametrize("change", [b"", b"{", b"[]", b'{"format": "other"}',
                                    b'{"format": "colbert_nb training data", "version": 99, "files": {}}'])
def test_a_damaged_or_newer_manifest_is_no_licence_to_guess(prepared, change):
    folder, _ = prepared
    (folder / "manifest.json").write_bytes(change)
    with pytest.raises(ValueError, match="manifest.json of version 1"):
        load_training_data(folder)


def test_a_folder_that_is_not_there():
    with pytest.raises(ValueError, match="expected the file queries.train.colbert.tsv"):
        load_training_data("nowhere")


def plain_folder(folder, queries=b"0\tq\n7\tr\n", corpus=b"0\ta\n1\tb\ttitle\n2\tc\n", triples=b"[0, 0, 1]\n[7, 1, 0, 2]\n"):
    for name, data in zip((data_files.QUERIES, data_files.CORPUS, data_files.TRIPLES), (queries, corpus, triples)):
        (folder / name).write_bytes(data)
    return folder


def test_colbert_ai_files_alone_are_read_as_colbert_ai_reads_them(tmp_path):
    data = load_training_data(plain_folder(tmp_path))
    assert data == TrainingData(["q", "r"], ["a", "title | b", "c"], [[0, 0, 1], [1, 1, 0, 2]], {0: [0], 1: [1]}, [])
    assert load_training_data(plain_folder(tmp_path, corpus=b"0\ta\r\n1\tb\r\n2\tc\r\n")).corpus == ["a", "b", "c"]


BAD_FILES = {
    "triple beyond the corpus": ({"triples": b"[0, 0, 1]\n[0, 0, 3]\n"}, "triples.train.colbert.jsonl line 2"),
    "triple of an unknown query": ({"triples": b"[1, 0, 1]\n"}, "line 1"),
    "triple below zero": ({"triples": b"[0, 0, -1]\n"}, "line 1"),
    "triple without a negative": ({"triples": b"[0, 0]\n"}, "line 1"),
    "scores in one triple alone": ({"triples": b"[0, 0, 1]\n[0, [0, 1.5], [1, 0.5]]\n"}, "line 2"),
    "score that is no number": ({"triples": b"[0, [0, 1.5], [1, NaN]]\n"}, "line 1"),
    "score beyond float32": ({"triples": b"[0, [0, 1.5], [1, 0.5]]\n[0, [0, 1.5], [1, 1e39]]\n"}, "line 2"),
    "triple cut short": ({"triples": b"[0, 0, 1]\n[0, 0"}, "line 2"),
    "no json": ({"triples": b"0 0 1\n"}, "line 1"),
    "a number alone": ({"triples": b"5\n"}, "line 1"),
    "query number twice": ({"queries": b"0\tq\n0\tr\n"}, "queries.train.colbert.tsv line 2"),
    "query without tab": ({"queries": b"0 q\n"}, "line 1"),
    "query without number": ({"queries": b"one\tq\n"}, "line 1"),
    "passages out of order": ({"corpus": b"1\ta\n0\tb\n2\tc\n"}, "expected the ids 0, 1, 2"),
    "not UTF-8": ({"corpus": b"0\tcaf\xe9\n"}, "corpus.train.colbert.tsv: expected UTF-8"),
}


@pytest.mark.parametrize("case", BAD_FILES)
def test_malformed_files_are_named(tmp_path, case):
    change, part = BAD_FILES[case]
    with pytest.raises(ValueError) as error:
        load_training_data(plain_folder(tmp_path, **change))
    assert part in str(error.value) and "expected" in str(error.value)


def test_preparing_reports_its_counts(tmp_path, caplog):
    with caplog.at_level(logging.INFO, logger="colbert_nb.data"):
        prepare(pairs(30), tmp_path / "data")
    assert "27 queries, 30 passages, 270 triples and 3 validation queries" in caplog.text
