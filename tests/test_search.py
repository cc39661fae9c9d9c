"""An index to search with: sequences of changes against a simple model of it, killed processes, damage, other models."""

import json
import os
import time
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from killing import imported, kill_at
from tiny import WORDS, fresh

from colbert_nb import evaluation, search, search_files
from colbert_nb.encoder import ColBERT
from colbert_nb.scoring import maxsim, pad
from colbert_nb.search import SearchIndex
from colbert_nb.search_files import FILES, IndexFiles
from colbert_nb.search_input import model_identity
from colbert_nb.search_passages import copy_live, read_passages

TEXTS = [" ".join(WORDS[(7 * i + j * (i + 1)) % 60] for j in range(2 + i % 9)) for i in range(40)]
QUERIES = [f"{WORDS[3]} {WORDS[10]}", f"{WORDS[20]}", f"{WORDS[41]} {WORDS[5]} {WORDS[6]}"]


@pytest.fixture(scope="module")
def one(encoder):
    "A model that encodes each text alone, once: a text has one vector whatever is beside it."
    model, known = fresh(encoder), {}
    encode = model.encode_documents

    def alone(texts, packed=True, **options):
        for text in texts:
            if text not in known:
                known[text] = encode([text])[0]
        vectors = [known[text] for text in texts]
        return torch.cat(vectors), torch.tensor([len(v) for v in vectors])

    model.encode_documents = alone
    return model


def contents(folder):
    "The files that count, as bytes, without the manifest's numbers of writes."
    files = IndexFiles.open(folder)
    return {name: files.path(name).read_bytes()[:size] if size else b"" for name, size in files.manifest["sizes"].items()}


def ids_of(found):
    return [[hit.id for hit in row] for row in found]


def wanted(model, passages, queries=QUERIES):
    "Scores of all passages by the plain definition, in half precision."
    Q, Q_mask = pad(model.encode_queries(queries))
    vectors, counts = model.encode_documents(list(passages.values()), packed=True)
    D, D_mask = pad(list(vectors.half().float().split(counts.tolist())))
    return maxsim(Q, D, Q_mask, D_mask)


def agrees(index, model, passages):
    "Whether the index is what the simple model, a dict from id to text, says."
    assert len(index) == len(passages) and set(index.ids) == set(passages)
    if not passages:
        assert index.search(QUERIES) == [[], [], []]
        return
    names, scores = list(passages), wanted(model, passages)
    for k, block in ((3, 20), (100, 2**18)):
        for q, row in enumerate(index.search(QUERIES, k, block_vectors=block)):
            expected = {name: scores[q, i].item() for i, name in enumerate(names)}
            assert len(row) == min(k, len(names)) and len({hit.id for hit in row}) == len(row)
            assert [hit.score for hit in row] == pytest.approx(sorted(expected.values(), reverse=True)[:k], abs=1e-4)
            assert all(hit.score == pytest.approx(expected[hit.id], abs=1e-4) and hit.text == passages[hit.id] for hit in row)


NAMES = st.sampled_from([str(i) for i in range(8)] + ["é\n\u2028", " a b ", '"', "𝄞"])
ROWS = st.lists(st.tuples(NAMES, st.sampled_from(TEXTS)), min_size=1, max_size=5, unique_by=lambda row: row[0])
STEPS = st.lists(st.one_of(
    st.tuples(st.sampled_from(["add", "replace", "overwrite", "stopped add"]), ROWS),
    st.tuples(st.just("delete"), st.lists(NAMES, min_size=1, max_size=4)),
    st.tuples(st.sampled_from(["compact", "save", "load"]), st.none())), max_size=12)


@settings(max_examples=20, deadline=None)
@given(steps=STEPS)
def test_any_sequence_of_changes(tmp_path_factory, one, steps):
    "Whatever is added, replaced, deleted, compacted, saved and loaded: the index is what a dict would be."
    home = tmp_path_factory.mktemp("sequence")
    index = SearchIndex(one, home / "index").index(TEXTS[:3], ["0", "1", "x"])
    passages = dict(zip(["0", "1", "x"], TEXTS))
    for number, (step, rows) in enumerate(steps):
        names, texts = zip(*rows) if step in ("add", "replace", "overwrite", "stopped add") else ((), ())
        if step == "add" and set(names) & set(passages):
            with pytest.raises(ValueError, match="ids that the index does not have"):
                index.add(texts, names)
        elif step == "add":
            index.add(texts, names, slab=2)
            passages |= dict(rows)
        elif step == "stopped add":
            with pytest.MonkeyPatch.context() as patch, pytest.raises(InterruptedError):
                def stop(*args, **changes):
                    raise InterruptedError
                patch.setattr(index._files, "commit", stop)
                index.add(texts, names, replace=True, slab=2)
        elif step == "replace":
            index.add(texts, names, replace=True, slab=2)
            passages = {name: text for name, text in passages.items() if name not in names} | dict(rows)
        elif step == "overwrite":
            index.index(texts, names, overwrite=True, slab=2)
            passages = dict(rows)
        elif step == "delete" and set(rows) - set(passages):
            with pytest.raises(ValueError, match="nothing was deleted"):
                index.delete(rows)
        elif step == "delete":
            index.delete(rows)
            passages = {name: text for name, text in passages.items() if name not in rows}
        elif step == "compact":
            index.compact()
            assert index.nbytes == sum(map(len, contents(index.path).values())) and not index._files.manifest["sizes"]["deleted"]
        elif step == "save":
            index = SearchIndex.load(index.save(home / f"saved{number}"), one)
        else:
            index = SearchIndex.load(index.path, one)
        assert index.ids == list(passages)
    agrees(index, one, passages)
    agrees(SearchIndex.load(index.path, one), one, passages)


@settings(max_examples=30, deadline=None)
@given(rows=st.lists(st.tuples(st.text(), st.text(st.characters(exclude_categories=["Cs"])), st.integers(0, 4)), max_size=8),
       slabs=st.integers(1, 4), torn=st.binary(max_size=40), dead=st.sets(st.integers(0, 7)))
def test_what_is_written_is_read(tmp_path_factory, rows, slabs, torn, dead):
    "Any ids, texts and lengths, in slabs, with torn bytes behind, copied without the deleted ones."
    folder = tmp_path_factory.mktemp("files")
    files, draw = IndexFiles.create(folder / "a", dim=3), np.random.default_rng(0)
    vectors = [draw.standard_normal((n, 3)).astype("<f2") for _, _, n in rows]
    dead = sorted(p for p in dead if p < len(rows))
    run = files.begin("rows", 0)
    for start in range(0, len(rows), slabs):
        some = rows[start:start + slabs]
        files.append_passages(run, np.concatenate([np.zeros((0, 3)), *vectors[start:start + slabs]]), [n for _, _, n in some],
                              [name for name, _, _ in some], [text.encode() for _, text, _ in some])
        files.note(run)
        for name in FILES:
            with open(files.path(name), "ab") as file: file.write(torn)
        files = IndexFiles.open(folder / "a")
        run = files.begin("rows", 0)
        assert run["done"] == min(start + slabs, len(rows))
    files.append(run, {"deleted": np.array(dead, "<i8").tobytes()})
    files.commit(run)
    held, alive = read_passages(IndexFiles.open(folder / "a")), [p for p in range(len(rows)) if p not in dead]
    assert held.ids == [name for name, _, _ in rows] and np.flatnonzero(held.alive).tolist() == alive
    copy_live(held, files, 1, block=3)
    for passages, positions in ((held, range(len(rows))), (read_passages(IndexFiles.open(folder / "a")), alive)):
        assert [passages.ids[i] for i in range(len(passages.ids))] == [rows[p][0] for p in positions]
        for i, p in enumerate(positions):
            assert passages.text(i).decode() == rows[p][1]
            assert (passages.vectors[passages.ends[i, 0]:passages.ends[i + 1, 0]] == vectors[p]).all()


def wait_for_the_end(flag):
    flag.touch()
    time.sleep(600)


def change_until(what: str, place: str, count: int, encoder: Path, folder: Path, flag: Path):
    "What the killed process does: change an index, and stop at a place where it can be killed."
    torch.set_num_threads(1)
    model, calls, fsync, whole_file = fresh(encoder), [], os.fsync, search_files.whole_file
    index = SearchIndex(model, folder)

    def counted(name, function):
        def call(*args, **options):
            if name == place:
                calls.append(name)
                if len(calls) == count:
                    wait_for_the_end(flag)
            return function(*args, **options)
        return call

    search_files.os.fsync, search_files.whole_file = counted("bytes", fsync), counted("manifest", whole_file)
    model.encode_documents = counted("encoding", model.encode_documents)
    change(index, what)


def change(index, what):
    if what == "index": index.index(TEXTS, slab=8)
    if what == "overwrite": index.index(TEXTS[20:], slab=8, overwrite=True)
    if what == "add": index.add(TEXTS[10:], ids=[f"n{i}" for i in range(30)], slab=8)
    if what == "replace": index.add(TEXTS[10:], ids=[str(i) for i in range(30)], slab=8, replace=True)
    if what == "delete": index.delete(["3", "5"])
    if what == "compact": index.delete(["3", "5"]).compact()
    return index


ENCODED_AGAIN = {("index", "encoding", 4): 40 - 24, ("index", "manifest", 6): 40 - 32, ("add", "encoding", 3): 30 - 16,
                 ("overwrite", "manifest", 3): 20 - 16, ("replace", "manifest", 4): 30 - 24}


@pytest.fixture(scope="module")
def processes():
    "Starts processes that have everything imported."
    return imported("colbert_nb.search", "tiny")


@pytest.mark.parametrize("what, place, count", [
    ("index", "bytes", 1), ("index", "encoding", 4), ("index", "bytes", 11), ("index", "manifest", 6), ("overwrite", "manifest", 3),
    ("add", "encoding", 3), ("replace", "manifest", 4), ("delete", "manifest", 1), ("compact", "bytes", 5)])
def test_killed_process_leaves_a_whole_index(processes, encoder, tmp_path, what, place, count):
    "What was there is there, and the same call ends with the bytes of one that nobody stopped."
    model, folder, flag = fresh(encoder), tmp_path / "index", tmp_path / "flag"
    if what != "index":
        SearchIndex(model, folder).index(TEXTS[:30], slab=8)
    process = processes.Process(target=change_until, args=(what, place, count, encoder, folder, flag))
    kill_at(process, flag)
    index = SearchIndex(model, folder)
    gone = 2 if what == "compact" else 0
    assert len(index) == (0 if what == "index" else 30 - gone)
    if gone:
        index.compact()
    else:
        encoded = []
        encode = model.encode_documents
        model.encode_documents = lambda texts, **options: encoded.extend(texts) or encode(texts, **options)
        change(index, what)
        if (what, place, count) in ENCODED_AGAIN:
            assert len(encoded) == ENCODED_AGAIN[what, place, count]
    undisturbed = SearchIndex(fresh(encoder), tmp_path / "undisturbed")
    if what != "index":
        undisturbed.index(TEXTS[:30], slab=8)
    change(undisturbed, what)
    assert contents(folder) == contents(undisturbed.path)
    assert index.search(QUERIES) == undisturbed.search(QUERIES)
    assert {path.name for path in folder.iterdir()} <= {"manifest.json", *(f"{name}.{index._files.manifest['generation']}" for name in FILES)}


def test_another_run_drops_the_stopped_one(one, tmp_path, caplog):
    index = SearchIndex(one, tmp_path).index(TEXTS[:5])
    with pytest.MonkeyPatch.context() as patch, pytest.raises(InterruptedError):
        def stop(*args, **changes):
            raise InterruptedError
        patch.setattr(index._files, "commit", stop)
        index.add(TEXTS[5:20], slab=4)
    caplog.clear()
    index = SearchIndex(one, tmp_path)
    assert "a run was stopped after 12 passages" in caplog.text and len(index) == 5
    index.add(TEXTS[30:32], ["a", "b"])
    assert "12 passages of a run that was stopped are dropped" in caplog.text
    agrees(index, one, dict(zip([*"01234", "a", "b"], TEXTS[:5] + TEXTS[30:32])))


def test_same_ranking_as_the_search_of_the_evaluation(model, tmp_path):
    index = SearchIndex(model, tmp_path).index(TEXTS)
    halves = evaluation.embed_corpus(model, TEXTS, dtype=torch.float16)
    run = evaluation.search(model, QUERIES, None, index=halves)
    assert ids_of(index.search(QUERIES, 100)) == [list(row) for row in run.values()]
    single = evaluation.search(model, QUERIES, TEXTS)
    for q, row in enumerate(index.search(QUERIES, 100)):
        assert all(abs(single[str(q)][hit.id] - hit.score) < 8 * 2**-11 + 1e-4 for hit in row)


def test_equal_scores_stand_in_the_order_in_which_they_came(one):
    index = SearchIndex(one).index([TEXTS[4]] * 6, [*"fbdaec"])
    assert ids_of(index.search(QUERIES[:1], 4, block_vectors=1)) == [[*"fbda"]]
    assert [hit.id for hit in index.rerank(QUERIES[0], ids=[*"cafe"])] == [*"cafe"]


def test_memory_is_that_of_a_block(one, monkeypatch):
    index, seen = SearchIndex(one).index(TEXTS), []
    score = search.maxsim_packed
    monkeypatch.setattr(search, "maxsim_packed", lambda Q, D, *rest, **more: seen.append(len(D)) or score(Q, D, *rest, **more))
    index.search(QUERIES, block_vectors=30)
    assert max(seen) <= 30 and sum(seen) == index._files.manifest["sizes"]["vectors"] // 32
    assert isinstance(index._passages.vectors, np.memmap)


def test_more_queries_than_a_batch(one):
    index = SearchIndex(one).index(TEXTS)
    many = [f"{WORDS[i % 60]} {WORDS[(i * 7) % 60]}" for i in range(70)]
    assert ids_of(index.search(many, 3)) == [ids_of(index.search([query], 3))[0] for query in many]


def test_rerank_of_texts_and_of_ids(one):
    index = SearchIndex(one).index(TEXTS)
    texts = index.rerank(QUERIES[0], TEXTS[:10], 4)
    assert texts == index.rerank(QUERIES[0], ids=[str(i) for i in range(10)], k=4)
    everything = {hit.id: hit for hit in index.search(QUERIES[:1], 100)[0]}
    assert all(hit.text == everything[hit.id].text and abs(hit.score - everything[hit.id].score) < 1e-4 for hit in texts) and len(texts) == 4
    assert SearchIndex(one).rerank(QUERIES[0], TEXTS[:2], ids=["x", "y"])[0].id in "xy"


def test_without_texts(one, tmp_path):
    index = SearchIndex(one, tmp_path, keep_texts=False).index(TEXTS)
    assert index.search(QUERIES, 1)[0][0].text is None and not contents(tmp_path)["texts"]
    assert SearchIndex(one, tmp_path).delete(["1"]).compact().search(QUERIES, 1)[0][0].text is None
    with pytest.raises(ValueError, match="keep_texts=False"):
        SearchIndex(one, tmp_path, keep_texts=True)


def test_a_temporary_index_goes_with_its_object(one, tmp_path):
    index = SearchIndex(one).index(TEXTS[:4])
    folder = index.path
    SearchIndex.load(index.save(tmp_path / "kept"), one)
    assert folder.is_dir()
    del index
    assert not folder.parent.exists() and len(SearchIndex.load(tmp_path / "kept", one)) == 4


def test_ids_go_on_after_deletions_and_compaction(one):
    index = SearchIndex(one).index(TEXTS[:3])
    assert index.delete(["2"]).compact().add(TEXTS[3:5]).ids == ["0", "1", "3", "4"]


def test_other_models_are_refused_and_other_query_settings_are_not(encoder, model, tmp_path):
    index = SearchIndex(model, tmp_path / "index").index(TEXTS[:5])
    found = index.search(QUERIES)
    folder = model.save_pretrained(tmp_path / "model")
    load = lambda **options: ColBERT.from_pretrained(folder, device="cpu", **options)
    assert SearchIndex.load(index.path, load()).search(QUERIES) == found
    assert model_identity(load(query_maxlen=16, query_expansion=False, attend_to_mask_tokens=True)) == model_identity(model)
    for options, name in (({"doc_maxlen": 12}, "doc_maxlen"), ({"mask_punctuation": False}, "mask_punctuation"),
                          ({"skip_punctuation_before_encoding": True}, "skip_punctuation_before_encoding"), ({"dtype": torch.bfloat16}, "weights")):
        with pytest.raises(ValueError, match=f"got one with other {name} .*load that model with those settings"):
            SearchIndex.load(index.path, load(**options))
    with pytest.raises(ValueError, match="with other .*dim"):
        SearchIndex.load(index.path, model.truncated(8))
    with pytest.raises(ValueError, match="with other weights"):
        SearchIndex.load(index.path, fresh(encoder, seed=1))
    other = load()
    other.encoder.config.layer_norm_eps = 1e-3
    with pytest.raises(ValueError, match="tokenizer and configuration"):
        SearchIndex.load(index.path, other)
    with torch.no_grad():
        model.linear.weight[0, 0] += 1
    for call in (lambda: index.search(QUERIES), lambda: index.add(TEXTS[5:6]), lambda: index.delete(["0"])):
        with pytest.raises(ValueError, match="with other weights"):
            call()


@pytest.mark.parametrize("texts, ids, words", [
    ("one text", None, "documents as a list"), ([], None, "documents as a list"), (None, None, "documents as a list"),
    (["a", None], None, "row 1 of documents"), (["a", " \n"], None, "row 1 of documents"), (["a\ud800"], None, "lone surrogate"),
    (["a", "b"], ["x"], "an id for each of 2"), (["a", "b"], ["x", "x"], "'x' at rows 0 and 1"), (["a"], [7], "row 0 of ids"),
    (["a"], "x", "ids as a list"), (["a"], ["0"], "ids that the index does not have")])
def test_bad_rows_are_refused_before_anything_is_encoded(one, texts, ids, words, monkeypatch):
    index = SearchIndex(one).index(TEXTS[:3])
    before = contents(index.path)
    monkeypatch.setattr(one, "encode_documents", None)
    with pytest.raises(ValueError, match=words):
        index.add(texts, ids)
    assert contents(index.path) == before


def test_bad_calls_are_refused(one, tmp_path):
    index = SearchIndex(one).index(TEXTS[:3])
    for call, words in ((lambda: index.index(TEXTS), "overwrite=True"), (lambda: index.add(["a"], slab=0), "slab"),
                        (lambda: index.search("q"), "queries as a list"), (lambda: index.search([""]), "not blank"),
                        (lambda: index.search(QUERIES, 0), "k as a whole"), (lambda: index.search(QUERIES, True), "k as a whole"),
                        (lambda: index.search(QUERIES, block_vectors=0), "block_vectors"), (lambda: index.rerank(QUERIES, TEXTS), "row 0"),
                        (lambda: index.rerank("q"), "ids as a list"), (lambda: index.rerank("q", ids=["9"]), "give their texts"),
                        (lambda: index.delete("0"), "ids as a list"), (lambda: index.save(index.path), "compact"),
                        (lambda: SearchIndex(one).search(QUERIES), "never filled"), (lambda: SearchIndex("model"), "expected a ColBERT"),
                        (lambda: SearchIndex.load(tmp_path / "none", one), "which is none")):
        with pytest.raises(ValueError, match=words):
            call()
    (tmp_path / "notes.txt").write_text("mine")
    for call in (lambda: SearchIndex(one, tmp_path), lambda: index.save(tmp_path)):
        with pytest.raises(ValueError, match="no file manifest.json"):
            call()
    assert (tmp_path / "notes.txt").read_text() == "mine"


def test_vectors_that_are_no_numbers_are_refused_by_id(model, tmp_path):
    index, encode = SearchIndex(model, tmp_path).index(TEXTS[:3]), model.encode_documents

    def spoiled(texts, **options):
        vectors, counts = encode(texts, **options)
        vectors = vectors.clone()
        vectors[int(counts[:2].sum()), 3] = float("nan")
        return vectors, counts

    before, model.encode_documents = contents(tmp_path), spoiled
    with pytest.raises(ValueError, match="NaN or infinity for document 'c'"):
        index.add(TEXTS[3:7], [*"abcd"])
    assert contents(tmp_path) == before


def test_two_that_write_by_turns(one, tmp_path):
    first = SearchIndex(one, tmp_path).index(TEXTS[:3])
    second = SearchIndex(one, tmp_path)
    first.add(TEXTS[3:4])
    for call in (lambda: second.add(TEXTS[4:5]), lambda: second.delete(["0"]), second.compact):
        with pytest.raises(ValueError, match="load it again"):
            call()
    assert sorted(ids_of(second.search(QUERIES[:1]))[0]) == ["0", "1", "2"]
    assert SearchIndex(one, tmp_path).ids == ["0", "1", "2", "3"]


def test_a_reader_goes_on_while_another_compacts(one, tmp_path):
    writer = SearchIndex(one, tmp_path).index(TEXTS)
    reader = SearchIndex(one, tmp_path)
    found = reader.search(QUERIES)
    writer.delete([str(i) for i in range(30)]).compact()
    assert reader.search(QUERIES) == found


@pytest.mark.parametrize("name", ["vectors", "offsets", "ids", "texts", "deleted"])
def test_damaged_files_are_refused_with_the_remedy(one, tmp_path, name):
    index = SearchIndex(one, tmp_path).index(TEXTS[:9]).delete(["4"])
    path = index._files.path(name)
    content = path.read_bytes()
    for bad in (content[:-1], b"", None):
        path.unlink() if bad is None else path.write_bytes(bad)
        with pytest.raises(ValueError, match="damaged: restore a copy, or build it again"):
            SearchIndex.load(tmp_path, one)
    path.write_bytes(b"\xff" * len(content))
    if name in ("offsets", "ids", "deleted"):
        with pytest.raises(ValueError, match="damaged"):
            SearchIndex.load(tmp_path, one)
    path.write_bytes(content + b"torn")
    assert len(SearchIndex.load(tmp_path, one)) == 8


@pytest.mark.parametrize("text", ["", "[]", "{}", "{", '{"format": 1, "sizes": {}}'])
def test_a_damaged_manifest_is_refused(one, tmp_path, text):
    SearchIndex(one, tmp_path).index(TEXTS[:3])
    path = tmp_path / "manifest.json"
    manifest = json.loads(path.read_text())
    path.write_text(text)
    with pytest.raises(ValueError, match="expected the manifest of an index"):
        SearchIndex.load(tmp_path, one)
    path.write_text(json.dumps(manifest | {"format": 2}))
    with pytest.raises(ValueError, match="format 2"):
        SearchIndex.load(tmp_path, one)
