"""Tables of pairs: whatever texts hold comes back, and what is not meant is refused with its line."""

import csv
import io
import json
import logging
import subprocess
import sys

import pytest
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st

from colbert_nb.data import parse_rows
from colbert_nb.data_files import clean_text
from colbert_nb.data_tables import label_value, leaks, most_shared, read_pairs, read_texts, table_rows, text_lines

quick = settings(max_examples=40, derandomize=True, deadline=None, suppress_health_check=list(HealthCheck))
texts = st.text(st.characters(codec="utf-8"), min_size=1, max_size=30).filter(str.strip)
AWKWARD = [('say "no"', 'a,b;c\td'), ("two\r\nlines", "three\n\nlines"), ("\ufeffmark", "a\u2028 \u0085 \x0bb"), ('"', '""'), ("'", "\\,"),
           ("NaN", "null"), ("007", "1e5"), (" a ", "é\U0001f600")]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tmp_path_factory.mktemp("tables")


def written(folder, name, text, encoding="utf-8"):
    path = folder / name
    path.write_bytes(text.encode(encoding))
    return path


def as_csv(rows, **options):
    out = io.StringIO()
    csv.writer(out, **options).writerows(rows)
    return out.getvalue()


@quick
@given(st.lists(st.tuples(texts, texts), min_size=1, max_size=8), st.sampled_from(["utf-8", "utf-8-sig", "utf-16", "utf-32"]),
       st.sampled_from(["\n", "\r\n"]), st.sampled_from([csv.QUOTE_MINIMAL, csv.QUOTE_ALL]), st.sampled_from([",", ";", "\t"]))
@example(AWKWARD, "utf-8", "\n", csv.QUOTE_MINIMAL, ",")
@example(AWKWARD, "utf-16", "\r\n", csv.QUOTE_ALL, ";")
def test_what_is_written_as_csv_is_read(folder, rows, encoding, end, quoting, delimiter):
    if quoting == csv.QUOTE_MINIMAL:  # Python's writer leaves a lone \r bare, which ends a line
        rows = [tuple(text.replace("\r", "x") for text in row) for row in rows]
    path = written(folder, "pairs.csv", as_csv([("query", "passage"), *rows], lineterminator=end, quoting=quoting, delimiter=delimiter), encoding)
    given = [tuple(row.values()) for _, row in table_rows(path, delimiter=delimiter, encoding=encoding.removesuffix("-sig"))]
    assert given == rows
    assert list(read_pairs(path, delimiter=delimiter, encoding=encoding.removesuffix("-sig"))) == [tuple(map(clean_text, row)) for row in rows]


@quick
@given(st.lists(st.tuples(texts, texts), min_size=1, max_size=8))
@example(AWKWARD)
def test_all_forms_of_a_table_hold_the_same(folder, rows):
    rows = [tuple(map(clean_text, row)) for row in rows]
    json_lines = "".join(json.dumps({"query": q, "passage": p}) + "\n" for q, p in rows)
    tabs = "query\tpassage\n" + "".join(f"{q}\t{p}\n" for q, p in rows)
    found = [read_pairs(written(folder, "pairs.jsonl", json_lines)), read_pairs(written(folder, "pairs.tsv", tabs)),
             read_pairs(written(folder, "bare.tsv", tabs.partition("\n")[2]), columns=["query", "passage"])]
    assert [list(part) for part in found] == [rows] * 3
    assert found[0].lines == found[2].lines == [n + 1 for n in range(len(rows))] and found[1].lines == [n + 2 for n in range(len(rows))]


@quick
@given(st.text(st.characters(codec="utf-8"), max_size=60), st.sampled_from([".csv", ".tsv", ".jsonl"]))
def test_any_text_is_read_or_refused_with_the_name_of_the_file(folder, text, ending):
    path = written(folder, f"any{ending}", text)
    try:
        rows = read_pairs(path)
    except ValueError as error:
        assert f"any{ending}" in str(error)
    else:
        assert rows and len(rows.lines) == len(rows)


@quick
@given(st.binary(max_size=40))
def test_any_bytes_are_text_or_refused(folder, data):
    path = folder / "any.txt"
    path.write_bytes(data)
    try:
        lines = list(text_lines(path))
    except ValueError as error:
        assert "any.txt" in str(error)
    else:
        assert "".join(lines).encode() == data.removeprefix(b"\xef\xbb\xbf")


@pytest.mark.parametrize("encoding", ["utf-8", "utf-16", "cp1252"])
def test_lines_are_counted_as_an_editor_does(folder, encoding):
    text = 'query,passage\n"a","one\ntwo"\n\n"b","é"\n"c",\n'
    with pytest.raises(ValueError, match=r"lines\.csv line 6, passage: expected a text"):
        read_pairs(written(folder, "lines.csv", text, encoding), encoding=encoding)


def test_every_faulty_row_is_named(folder):
    text = "query,passage\n" + "".join(f"q{n},{'' if n % 5 == 0 else 'p'}\n" for n in range(100))
    with pytest.raises(ValueError) as error:
        read_pairs(written(folder, "many.csv", text))
    assert "many.csv line 2, passage" in str(error.value) and "20 rows have a fault, in lines 2, 7, 12, 17" in str(error.value)


REFUSED = {  # name -> content, options, parts of the error
    "a quote left open": ("a.csv", 'query,passage\na,b\nc,"d\ne,f\n', {}, ["a.csv line 3", "Close each quote"]),
    "text after a quote": ("a.csv", 'query,passage\n"a"b,c\n', {}, ["a.csv line 2"]),
    "more cells": ("a.csv", "query,passage\na,b,c\n", {}, ["a.csv line 2", "expected 2 cells", "got 3"]),
    "fewer cells": ("a.tsv", "query\tpassage\na\n", {}, ["a.tsv line 2", "got 1"]),
    "a column twice": ("a.csv", "query,query,passage\na,b,c\n", {}, ["'query' twice"]),
    "semicolons": ("a.csv", "query;passage\na, c;b\n", {}, ["';' between them"]),
    "other case": ("a.csv", "QUERY,passage\na,b\n", {}, ["query_column='QUERY'"]),
    "no such column": ("a.csv", "query,passage\na,b\n", {"label_column": "grade"}, ["'grade'", "label_column"]),
    "nothing": ("a.csv", "", {}, ["an empty file"]),
    "blank lines": ("a.jsonl", "\n \n", {}, ["an empty file"]),
    "a header": ("a.csv", "query,passage\n", {}, ["the header alone"]),
    "two meanings": ("a.csv", "query,passage,negative,label\na,b,c,1\n", {}, ["negatives or labels"]),
    "no ending": ("pairs", "query,passage\na,b\n", {}, [".csv, .tsv or .jsonl"]),
    "names for JSON": ("a.jsonl", '{"query": "a"}\n', {"columns": ["query"]}, ["no names of columns"]),
    "a list": ("a.jsonl", '["a", "b"]\n', {}, ["a.jsonl line 1", "an object"]),
    "half a row": ("a.jsonl", '{"query": "a", "passage": "b"}\n{"query": "a"}\n', {}, ["a.jsonl line 2", "'passage'"]),
    "null": ("a.jsonl", '{"query": "a", "passage": null}\n', {}, ["a.jsonl line 1, passage", "NoneType"]),
    "half a character": ("a.jsonl", '{"query": "a\\ud83d", "passage": "b"}\n', {}, ["a.jsonl line 1, query", "surrogate"]),
    "an empty list": ("a.jsonl", '{"query": "a", "passage": []}\n', {}, ["a.jsonl line 1", "an empty list"]),
    "a long delimiter": ("a.csv", "query||passage\na||b\n", {"delimiter": "||"}, ["one character"]),
    "no encoding": ("a.csv", "query,passage\na,b\n", {"encoding": "latin-99"}, ["'latin-99'"]),
}


@pytest.mark.parametrize("case", REFUSED)
def test_refused(folder, case):
    name, text, options, parts = REFUSED[case]
    with pytest.raises(ValueError) as error:
        read_pairs(written(folder, name, text), **options)
    assert all(part in str(error.value) for part in parts), str(error.value)


def test_a_file_in_another_encoding_is_refused_at_its_line(folder):
    path = written(folder, "old.csv", "query,passage\na,b\ncafé,c\n", "cp1252")
    with pytest.raises(ValueError, match="old.csv line 3: expected utf-8, got the byte 0xe9"):
        read_pairs(path)
    assert read_pairs(path, encoding="cp1252")[1] == ("café", "c")
    with pytest.raises(ValueError, match="utf-16"):
        read_pairs(written(folder, "wide.csv", "query,passage\n", "utf-16"))


def test_labels_and_negatives_are_found_by_name(folder):
    labelled = read_pairs(written(folder, "a.csv", "label,passage,query,note\n1,p,q,x\n0.0,r,q,y\n"))
    assert labelled.labelled and list(labelled) == [("q", "p", 1), ("q", "r", 0)]
    triplets = read_pairs(written(folder, "a.jsonl", '{"query": "q", "passage": ["p", "s"], "negative": ["n"]}\n'))
    assert not triplets.labelled and list(triplets) == [("q", ["p", "s"], ["n"])]
    named = read_pairs(written(folder, "b.csv", "q,a,wrong,label\nx,y,z,9\n"), query_column="q", passage_column="a", negative_column="wrong")
    assert list(named) == [("x", "y", "z")]


@pytest.mark.parametrize("cell, value", [("1", 1), ("-1", -1), ("1.00", 1), ("1.5", "1.5"), (" yes ", "yes"), ("nan", "nan"), (True, True), ("", ""),
                                         ("9" * 12, "9" * 12)])
def test_label_value(cell, value):
    assert label_value(cell) == value and type(label_value(cell)) is type(value)


def test_a_contradiction_is_named_by_its_lines(folder):
    rows = read_pairs(written(folder, "torn.csv", 'query,passage,label\nq,"p\np",1\nq,r,1\nq,p p,0\n'))
    with pytest.raises(ValueError, match=r"torn.csv line 5: .* positive in torn.csv line 2 and negative in torn.csv line 5"):
        parse_rows(rows, pairs_with_labels=True)
    rows = read_pairs(written(folder, "text.csv", "query,passage,label\nq,p,yes\n"))
    with pytest.raises(ValueError, match=r"text.csv line 2: expected the label 1 or 0, got str 'yes'"):
        parse_rows(rows, pairs_with_labels=True)


def test_repeated_rows_are_counted(folder, caplog):
    with caplog.at_level(logging.WARNING, logger="colbert_nb"):
        read_pairs(written(folder, "twice.csv", "query,passage\na,b\nc,d\na,b\na , b\n"))
    assert "2 of 4 rows repeat an earlier one and add nothing, the first is line 4" in caplog.text


def test_a_cell_may_be_longer_than_the_csv_module_allows(folder):
    before, long = csv.field_size_limit(), "word " * 50_000
    assert read_pairs(written(folder, "long.csv", f"query,passage\nq,{long}\n"))[0][1] == long.strip()
    assert csv.field_size_limit() == before


def test_texts_and_their_ids(folder):
    assert list(read_texts(written(folder, "c.txt", "a b\n\n c,d\n"))) == ["a b", "c,d"]
    found = read_texts(written(folder, "c.jsonl", '{"_id": 7, "title": "x", "text": "a"}\n{"_id": "b", "text": "c"}\n'))
    assert list(found) == ["a", "c"] and found.ids == ["7", "b"]
    assert list(read_texts(written(folder, "c.csv", "text,passage\na,b\n"))) == ["b"]
    for name, text, part in (("c.csv", "id,text\n1,a\n1,b\n", "line 3: expected each id once"), ("c.csv", "id,text\n,a\n", "expected an id"),
                             ("c.jsonl", '{"text": "a"}\n{"tixt": "b"}\n', "c.jsonl line 2"), ("c.txt", "", "a text at least")):
        with pytest.raises(ValueError, match=part):
            read_texts(written(folder, name, text))


def test_what_a_test_shares_with_the_training():
    train = parse_rows([("How do I sort?", "sorted"), ("copy", "shutil"), ("move", "shutil")])
    test = parse_rows([("how do  i SORT?", "x"), ("where", "Shutil"), ("new", "y")])
    assert leaks(train, test) == (["how do  i SORT?"], ["Shutil"])
    assert leaks(train, parse_rows([("new", "y")])) == ([], [])
    assert most_shared(train) == (2, "shutil")


def test_reading_needs_no_torch():
    code = "import sys, colbert_nb.data_tables, colbert_nb.data; print([m for m in ('torch', 'transformers', 'pandas') if m in sys.modules])"
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True).stdout.strip() == "[]"
