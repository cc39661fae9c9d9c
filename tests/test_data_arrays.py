"""Training data in arrays: files read as colbert-ai reads them, look-ups equal to the simple way, faults named."""

import contextlib
import io
import json
import multiprocessing
import os
import pickle
import tempfile
from pathlib import Path

import numpy as np
import pytest
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st

from colbert_nb import data_arrays
from colbert_nb.data import Examples, TrainingData, clean_text, export_training_data, load_training_data, make_triples, parse_rows
from colbert_nb.data_arrays import Positives, TextFile, first_positions
from colbert_nb.data_files import CORPUS, QUERIES, TRIPLES
from colbert_nb.data_triples import as_triples, check_negatives, check_triples, known_positives, read_triples

quick = settings(max_examples=80, derandomize=True, deadline=None, suppress_health_check=list(HealthCheck))
lines = st.text(max_size=20).map(lambda text: f"x{text}").map(clean_text)
BREAKERS = ["a\u2028b", "a\u0085b", "a\x0bb\x0cc\x1cd", "\ufeffa", "\U0001f468\u200d\U0001f469", "a\x00b", "e\u0301"]


@pytest.fixture(params=[1, 7, 1 << 22])
def block(request, monkeypatch):
    "Bytes read at a time: a file larger than that is mapped."
    monkeypatch.setattr(data_arrays, "BLOCK", request.param)


def write(folder, **files):
    for name, data in files.items():
        (Path(folder) / {"queries": QUERIES, "corpus": CORPUS, "triples": TRIPLES}[name]).write_bytes(data)
    return Path(folder)


def numbered(texts):
    return "".join(f"{i}\t{text}\n" for i, text in enumerate(texts)).encode()


# texts


@quick
@given(st.lists(lines, min_size=1, max_size=20), st.sampled_from([1, 5, 64, 1 << 22]), st.booleans())
@example(BREAKERS, 3, False)
def test_texts_read_back_whatever_the_block(texts, size, ended):
    with tempfile.TemporaryDirectory() as home, pytest.MonkeyPatch.context() as patch:
        patch.setattr(data_arrays, "BLOCK", size)
        path = Path(home) / "texts.tsv"
        path.write_bytes(numbered(texts)[: None if ended else -1])
        file = TextFile(path)
        assert len(file) == len(texts) and list(file) == texts == file[:] == [file[i] for i in range(len(texts))]
        assert file == texts and file[-1] == texts[-1] and file.numbers is None
        assert file != [*texts, "more"] and file[np.int32(0)] == texts[0] and texts[0] in file


def test_what_a_list_refuses_is_refused(tmp_path):
    (tmp_path / "t.tsv").write_bytes(b"0\ta\n1\tb\n")
    file = TextFile(tmp_path / "t.tsv")
    for wrong, kind in ((2, IndexError), (-3, IndexError), ("0", TypeError), (0.0, TypeError)):
        with pytest.raises(kind):
            file[wrong]


@pytest.mark.parametrize("content, texts", [(b"", []), (b"0\ta\tb\n", ["b | a"]), (b"0\ta\tb\tc\n", ["b | a"]), (b"7\ta\r\n0\t\n", ["a", ""])])
def test_columns_and_ends_of_lines(tmp_path, block, content, texts):
    (tmp_path / "t.tsv").write_bytes(content)
    assert list(TextFile(tmp_path / "t.tsv")) == texts


@pytest.mark.parametrize("content, line", [(b"0\ta\n\n", 2), (b"0\ta\n1 b\n", 2), (b"x\ta\n", 1), (b"0\ta\n-1\tb\n", 2), (b"0\ta\n0\tb\n", 2),
                                           (b"\ta\n", 1), (b"1234567890123456789\ta\n", 1), (b"0\ta\n1\tcaf\xe9\n2\tb\n", 2)])
def test_a_line_that_is_none_is_named(tmp_path, block, content, line):
    (tmp_path / "t.tsv").write_bytes(content)
    with pytest.raises(ValueError, match=rf"t\.tsv.* line {line}\b"):
        TextFile(tmp_path / "t.tsv")


def test_a_text_file_travels_and_notices_another_file(tmp_path, block):
    (tmp_path / "t.tsv").write_bytes(numbered(BREAKERS))
    file = TextFile(tmp_path / "t.tsv")
    assert pickle.loads(pickle.dumps(file)) == file
    if len(pickle.dumps(file)) < 10_000 and not isinstance(file.data, bytes):
        stored = pickle.dumps(file)
        (tmp_path / "t.tsv").write_bytes(b"0\tshorter\n")
        with pytest.raises(ValueError, match="Load the data again"):
            pickle.loads(stored)


@pytest.mark.skipif(not hasattr(os, "fork"), reason="no fork on this system")
def test_processes_read_one_map_at_once(tmp_path, monkeypatch):
    monkeypatch.setattr(data_arrays, "BLOCK", 1)
    texts = [f"text {i}" for i in range(300)]
    (tmp_path / "t.tsv").write_bytes(numbered(texts))
    file = TextFile(tmp_path / "t.tsv")
    with multiprocessing.get_context("fork").Pool(2) as pool:
        assert pool.map(file.__getitem__, range(300), chunksize=10) == texts


@quick
@given(st.lists(st.sampled_from(["a", "b", "ab", "", "\ud800", "e\u0301", "\u00e9"]), max_size=30))
def test_first_positions_are_those_of_a_dict(texts):
    seen = {}
    assert first_positions(texts).tolist() == [seen.setdefault(text, i) for i, text in enumerate(texts)]


# positives


pairs = st.lists(st.tuples(st.integers(0, 6), st.integers(0, 9)), max_size=40)


@quick
@given(pairs, pairs)
def test_positives_are_a_mapping_to_sorted_passages(known, asked):
    wanted = {}
    for q, p in known:
        wanted.setdefault(q, set()).add(p)
    columns = lambda pairs: np.array(pairs, np.int32).reshape(-1, 2).T
    positives = Positives.from_pairs(*columns(known), 7)
    assert {q: ps.tolist() for q, ps in positives.items()} == {q: sorted(ps) for q, ps in wanted.items()}
    assert positives == wanted == Positives.of({q: list(ps) for q, ps in wanted.items()}, 7)
    assert len(positives) == len(wanted) and list(positives) == sorted(wanted) and 7 not in positives and "0" not in positives
    assert list(zip(*(a.tolist() for a in positives.pairs()))) == sorted(set(known))
    asked = [*asked, (3, -1), (0, 10), (6, 10**9)]
    assert positives.holds(*columns(asked)).tolist() == [p in wanted.get(q, ()) for q, p in asked]
    grid = positives.holds(np.arange(7)[:, None], np.arange(-1, 12)[None])
    assert grid.tolist() == [[p in wanted.get(q, ()) for p in range(-1, 12)] for q in range(7)]


@pytest.mark.parametrize("known", [{3: [0]}, {0: [-1]}, {-1: [0]}])
def test_positives_of_what_is_not_there(known):
    with pytest.raises(ValueError, match="positives: expected queries from 0 to 2"):
        TrainingData(["a"] * 3, ["p"] * 3, [], known, [])


# triples


ids = st.integers(0, 11)
rows_of = lambda width: st.lists(st.lists(ids, min_size=2, max_size=width), min_size=1, max_size=12)


def read_simply(text, n_queries, n_passages):
    "The rows of a file by json, or the number of the first line at fault."
    rows, kinds = [], set()
    for number, line in enumerate(text.removesuffix("\n").split("\n"), 1):
        try:
            query, *passages = json.loads(line)
            scored = all(type(p) is list for p in passages)
            given = [p[1] for p in passages] if scored else None
            passages = [p[0] for p in passages] if scored else passages
            kinds.add(scored)
            fits = len(passages) > 1 and type(query) is int and 0 <= query < n_queries and len(kinds) == 1
            fits &= all(type(p) is int and 0 <= p < n_passages for p in passages)
            if scored and not all(type(s) in (int, float) and np.isfinite(np.float32(s)) for s in given): fits = False
        except (ValueError, TypeError, IndexError): fits = False
        if not fits: return number
        rows.append([query, passages, given])
    return rows


@pytest.mark.filterwarnings("ignore:overflow")
@quick
@given(rows_of(4), st.booleans(), st.sampled_from([None, ", ", ","]), st.data())
def test_triples_are_those_of_json(rows, scored, comma, draw):
    scores = st.one_of(st.floats(width=32, allow_nan=False, allow_infinity=False), st.integers(-9, 9))
    number = st.one_of(ids, ids, ids, ids, ids, ids, st.sampled_from([12, -1, True, 1.0, "2", None, 10**20]))
    break_it = draw.draw(st.booleans())
    rows = [[draw.draw(number) if break_it else q, *([p, draw.draw(scores)] if scored else p for p in ps)] for q, *ps in ([0, *r] for r in rows)]
    text = "".join(json.dumps(row, separators=(comma, ": ") if comma else None) + "\n" for row in rows)
    if comma is None: text = text.replace("[", "[ ")
    expected = read_simply(text, 12, 12)
    with tempfile.TemporaryDirectory() as home, pytest.MonkeyPatch.context() as patch:
        patch.setattr(data_arrays, "BLOCK", draw.draw(st.sampled_from([1, 40, 1 << 22])))
        folder = write(home, queries=numbered(["q"] * 12), triples=text.encode())
        queries = TextFile(folder / QUERIES)
        if isinstance(expected, int):
            with pytest.raises(ValueError, match=rf"{TRIPLES} line {expected}: expected"):
                read_triples(folder / TRIPLES, queries, 12)
            return
        triples, given = read_triples(folder / TRIPLES, queries, 12)
    assert [[q, *ps] for q, ps, _ in expected] == [[v for v in row if v >= 0] for row in triples.tolist()]
    assert (given is not None) == scored and triples.dtype == np.int32
    if scored:
        assert given.shape == triples[:, 1:].shape and (np.isnan(given) == (triples[:, 1:] < 0)).all()
        assert [np.float32(s).tolist() for _, _, row in expected for s in row] == given[triples[:, 1:] >= 0].tolist()


@quick
@given(st.integers(2, 5), st.integers(1, 5), st.data())
def test_rows_with_scores_read_back_here_and_in_colbert_ai(nway, n, draw):
    examples = parse_rows([(f"q {i}", f"p {i}") for i in range(8)])
    triples = make_triples(examples, nway=nway, max_triples=n)
    real = st.floats(width=32, allow_nan=False, allow_infinity=False)
    scores = [draw.draw(st.lists(real, min_size=nway, max_size=nway)) for _ in triples]
    with tempfile.TemporaryDirectory() as home:
        folder = export_training_data(Path(home) / "data", examples, triples, scores=scores)
        data = load_training_data(folder)
        with contextlib.redirect_stdout(io.StringIO()):
            from colbert.data import Examples as Theirs
            theirs = Theirs(path=str(folder / TRIPLES), nway=nway).data
    assert data.triples.tolist() == [list(t) for t in triples] and data.nway == nway and data.scores.dtype == np.float32
    assert data.scores.tolist() == scores
    assert theirs == [[q, *map(list, zip(ps, values))] for (q, *ps), values in zip(triples, scores)]


@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf, 1e39])
@pytest.mark.filterwarnings("ignore:overflow")
def test_a_score_that_is_no_number_is_refused_with_its_row(tmp_path, value):
    examples = Examples(["q"], ["a", "b", "c"], {0: [0]})
    with pytest.raises(ValueError, match="scores of triple 1: expected finite numbers"):
        export_training_data(tmp_path / "data", examples, [(0, 0, 1), (0, 0, 2)], scores=[[1.0, 2.0], [1.0, value]])
    assert not list(tmp_path.iterdir())


def test_rows_of_several_lengths_and_their_scores(tmp_path):
    data = TrainingData(["q", "r"], list("abcd"), [(0, 0, 1), (1, 1, 2, 3)], {0: [0], 1: [1]}, [], [[1, 2], [3, 4, 5]])
    assert data.triples.tolist() == [[0, 0, 1, -1], [1, 1, 2, 3]] and np.isnan(data.scores[0, 2])
    folder = export_training_data(tmp_path / "data", data, data.triples, scores=data.scores)
    assert load_training_data(folder) == data
    assert (folder / TRIPLES).read_text() == "[0, [0, 1.0], [1, 2.0]]\n[1, [1, 3.0], [2, 4.0], [3, 5.0]]\n"
    for scores in ([[1, 2]], [[1], [3, 4, 5]], np.zeros((2, 2), np.float32)):
        with pytest.raises(ValueError, match="scores"):
            TrainingData(data.queries, data.corpus, data.triples, data.positives, [], scores)


def test_numbers_of_queries_as_the_file_has_them(tmp_path, block):
    folder = write(tmp_path, queries=b"900\tq\n3\tr\n77\ts\n", corpus=numbered("abc"), triples=b"[3,1,2]\n[900,0,1]\n[77,2,0]\n")
    data = load_training_data(folder)
    assert data.triples.tolist() == [[1, 1, 2], [0, 0, 1], [2, 2, 0]] and data.positives == {0: [0], 1: [1], 2: [2]}
    write(tmp_path, triples=b"[3,1,2]\n[901,0,1]\n")
    with pytest.raises(ValueError, match="line 2"):
        load_training_data(folder)


@pytest.mark.parametrize("rows", [[[0, 1]], [[0, 1, "2"]], [[0, 1, True]], [[0, 1, 1.0]], [[0, 1, 2**31]], [[0, 0, 1], [0, 1, [2, 0.5]]]])
def test_rows_that_are_no_triples(rows):
    with pytest.raises(ValueError, match=rf"triple {len(rows) - 1}: expected .query, positive, negative"):
        as_triples(rows)


def test_arrays_that_are_no_triples():
    for wrong in (np.zeros((3, 2), int), np.zeros((3, 3)), np.zeros(3, int)):
        with pytest.raises(ValueError, match="triples: expected whole numbers"):
            as_triples(wrong)


# checks


@quick
@given(st.lists(st.tuples(st.integers(-1, 4), *[st.integers(-2, 5)] * 3), min_size=1, max_size=6))
def test_checked_triples_are_those_with_places_of_their_own(rows):
    data = TrainingData(["q"] * 4, ["p"] * 5, np.array(rows), {}, [])
    good = lambda q, p, n, m: 0 <= q < 4 and 0 <= p < 5 and 0 <= n < 5 and -1 <= m < 5
    bad = [i for i, row in enumerate(rows) if not good(*row)]
    if not bad: return check_triples(data)
    with pytest.raises(ValueError, match=rf"triple {bad[0]}: expected .query, positive"):
        check_triples(data)


def test_a_gap_inside_a_row_is_no_end():
    with pytest.raises(ValueError, match="triple 0"):
        check_triples(TrainingData(["q"], ["p"] * 4, [[0, 1, 2, -1, 3]], {}, []))


@quick
@given(st.lists(st.sampled_from("ab"), min_size=3, max_size=3), st.lists(st.sampled_from("pqr"), min_size=5, max_size=5),
       st.lists(st.tuples(st.integers(0, 2), *[st.integers(0, 4)] * 2), min_size=1, max_size=5), st.lists(st.tuples(st.integers(0, 2), st.integers(0, 4)), max_size=5))
def test_no_negative_is_a_positive_by_number_or_text(queries, corpus, triples, more):
    known = {}
    for q, p in more: known.setdefault(q, []).append(p)
    data = TrainingData(queries, corpus, triples, known, [])
    texts = {(queries[q], corpus[p]) for q, p, *_ in [*more, *triples]}
    bad = [i for i, (q, _, n) in enumerate(triples) if (queries[q], corpus[n]) in texts]
    first = first_positions(queries), first_positions(corpus)
    positives = known_positives(data, *first)
    assert {(queries[q], corpus[p]) for q, ps in positives.items() for p in ps} == texts
    if not bad: return check_negatives(data, positives, *first)
    q, _, n = triples[bad[0]]
    with pytest.raises(ValueError, match=rf"triple {bad[0]}: expected negatives that are no positive of query {q}, got passage {n}, '{corpus[n]}'"):
        check_negatives(data, positives, *first)


# what is loaded


def test_a_fingerprint_tells_data_apart(tmp_path):
    base = dict(queries=["q", "r"], corpus=list("abcd"), triples=[(0, 0, 1), (1, 1, 2)], positives={0: [0], 1: [1]}, validation=[])
    changes = [{}, {"queries": ["q", "s"]}, {"corpus": list("abce")}, {"triples": [(0, 0, 1), (1, 1, 3)]}, {"positives": {0: [0], 1: [1, 3]}},
               {"validation": [{"query": "q"}]}, {"scores": [[1, 2], [3, 4]]}, {"scores": [[1, 2], [3, 5]]}]
    prints = [TrainingData(**base | change).fingerprint() for change in changes]
    assert len(set(prints)) == len(prints) and prints[0] == TrainingData(**base).fingerprint()
    data = TrainingData(**base)
    one, two = (load_training_data(export_training_data(tmp_path / name, data, data.triples)) for name in "ab")
    three = load_training_data(export_training_data(tmp_path / "c", data, data.triples[::-1]))
    assert one.fingerprint() == two.fingerprint() != three.fingerprint() and one == data != three
    assert not one.triples.flags.writeable
