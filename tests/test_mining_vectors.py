"""A cache of vectors: processes that are killed, models that fail, files that are damaged, and names that must differ."""

import json
import time
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from killing import imported, kill_at

from colbert_nb import mining_vectors
from colbert_nb.mining_vectors import embed_texts, model_key, texts_key, unit_rows

TEXTS = [f"passage {i} {'of many words ' * (i % 5)}" for i in range(50)]


def encode(texts):
    "A text's vector depends on its characters alone."
    return np.stack([np.random.default_rng(list(text.encode())).standard_normal(12) for text in texts])


class Counting:
    def __init__(self):
        self.seen = []

    def __call__(self, texts):
        self.seen += texts
        return encode(texts)


def run(cache, encode=encode, texts=TEXTS, batch_size=8, **options):
    return embed_texts(encode, texts, key="a model", cache=cache, batch_size=batch_size, **options)


def wait_for_the_end(flag: Path):
    flag.touch()
    time.sleep(600)


def embed_until(place: str, batch: int, cache: Path, flag: Path):
    "What the killed process does: embed, and stop at a place where it can be killed."
    calls, whole_file, replace = [], mining_vectors.whole_file, mining_vectors.os.replace

    def counted(texts):
        calls.append(texts)
        if place == "embedding" and len(calls) == batch:
            wait_for_the_end(flag)
        return encode(texts)

    def no_note(path, *args):
        if place == "note" and len(calls) == batch:
            wait_for_the_end(flag)
        return whole_file(path, *args)

    def half_a_batch(number):
        if place == "rows" and len(calls) == batch:
            part = next(cache.glob(".*.part"))
            with open(part, "r+b") as file:
                file.truncate(part.stat().st_size - 100)
            wait_for_the_end(flag)

    def no_name(source, target):
        if place == "name" and str(target).endswith(".npy"):
            wait_for_the_end(flag)
        replace(source, target)

    mining_vectors.whole_file, mining_vectors.os.replace = no_note, no_name
    mining_vectors.os.fsync = half_a_batch
    run(cache, counted)


@pytest.fixture(scope="module")
def processes():
    "Starts processes that have everything imported."
    return imported("colbert_nb.mining_vectors")


@pytest.mark.parametrize("place, batch, kept", [("embedding", 1, 0), ("embedding", 4, 24), ("rows", 1, 0), ("rows", 3, 16),
                                                ("note", 1, 0), ("note", 5, 32), ("note", 7, 48), ("name", 7, 50)])
def test_killed_process_is_gone_on_with(processes, tmp_path, place, batch, kept):
    "Wherever it was killed, only whole batches are kept, and the file ends with the bytes of a run that nobody stopped."
    cache, flag = tmp_path / "cache", tmp_path / "flag"
    process = processes.Process(target=embed_until, args=(place, batch, cache, flag))
    kill_at(process, flag)
    assert not list(cache.glob("*.npy"))
    later = Counting()
    path = Path(run(cache, later).filename)
    assert later.seen == TEXTS[kept:]
    assert path.read_bytes() == Path(run(tmp_path / "undisturbed").filename).read_bytes()
    assert [p.name for p in cache.iterdir()] == [path.name]


@settings(max_examples=25, deadline=None)
@given(n=st.integers(1, 40), batch_size=st.integers(1, 12), stops=st.lists(st.integers(0, 45), max_size=4), torn=st.binary(max_size=90))
def test_exceptions_in_mid_batch(tmp_path_factory, n, batch_size, stops, torn):
    "Any number of failures, each after so many texts, with torn rows behind: the same bytes, and no whole batch twice."
    cache, seen = tmp_path_factory.mktemp("cache"), []

    def failing(left):
        def encode_some(texts):
            nonlocal left
            left -= len(texts)
            if left < 0:
                raise RuntimeError("no memory")
            seen.extend(texts)
            return encode(texts)
        return encode_some

    for stop in stops:
        try:
            run(cache, failing(stop), TEXTS[:n], batch_size)
        except RuntimeError:
            for part in cache.glob(".*.part"):
                with open(part, "ab") as file:
                    file.write(torn)
    found = run(cache, failing(n), TEXTS[:n], batch_size)
    assert seen == TEXTS[:n]
    assert Path(found.filename).read_bytes() == Path(run(tmp_path_factory.mktemp("plain"), texts=TEXTS[:n], batch_size=batch_size).filename).read_bytes()
    assert (found == run(None, texts=TEXTS[:n])).all()


def test_rows_have_length_1_and_the_map_is_read_only(tmp_path):
    found = run(tmp_path)
    assert isinstance(found, np.memmap) and found.dtype == np.float32 and found.shape == (50, 12)
    assert np.abs(np.linalg.norm(found, axis=1) - 1).max() < 1e-6
    with pytest.raises(ValueError, match="read-only"):
        found[0, 0] = 1
    wanted = encode(TEXTS)
    assert np.abs(found - wanted / np.linalg.norm(wanted, axis=1, keepdims=True)).max() < 1e-6
    kept = run(None)
    assert not isinstance(kept, np.memmap) and (kept == found).all()


def test_vectors_of_length_1_keep_their_bytes():
    rows = torch.nn.functional.normalize(torch.randn(100, 384, generator=torch.Generator().manual_seed(0)))
    assert unit_rows(rows, [""] * 100).tobytes() == rows.numpy().tobytes()
    half = unit_rows(rows.half(), [""] * 100)
    assert np.abs(np.linalg.norm(half, axis=1) - 1).max() < 2e-6


def test_very_long_and_very_short_vectors():
    found = unit_rows(np.array([[3e30, 4e30], [3e-30, 4e-30]], np.float32), ["long", "short"])
    assert np.abs(found - [0.6, 0.8]).max() < 1e-6


@given(st.lists(st.text(max_size=6), min_size=1, max_size=6), st.lists(st.text(max_size=6), min_size=1, max_size=6),
       st.text(max_size=4), st.text(max_size=4))
def test_other_texts_other_key(a, b, key, other):
    assert (texts_key(a, key) == texts_key(b, other)) == (a == b and key == other)


def test_texts_cut_elsewhere_have_another_key():
    texts = [f"text {i}" for i in range(25)]
    first = texts_key(texts)
    assert first == texts_key(tuple(texts)) and texts_key(["\ud800"]) != texts_key(["\ud801"])
    moved = texts[:10] + [texts[10][:-1]] + [texts[10][-1] + texts[11]] + texts[12:]
    assert "".join(moved) == "".join(texts) and texts_key(moved) != first


@pytest.mark.parametrize("texts, word", [([], "list of texts"), ("one text", "single text"), (["a", None], "row 1"), (["a", 3.5, b"c"], "row 1")])
def test_what_is_no_text_is_refused_before_the_model_is_asked(tmp_path, texts, word):
    asked = Counting()
    with pytest.raises(ValueError, match=word):
        run(tmp_path, asked, texts)
    assert not asked.seen and not list(tmp_path.iterdir())


def spoil(value):
    def encode_some(texts):
        vectors = encode(texts)
        if TEXTS[19] in texts:
            vectors[texts.index(TEXTS[19])] = value
        return vectors
    return encode_some


@pytest.mark.parametrize("answer, words", [
    (spoil(np.nan), "got nan for passage 19, 'passage 19"),
    (spoil(np.inf), "got inf for passage 19"),
    (spoil(0), "a zero vector for passage 19"),
    (lambda texts: encode(texts)[1:], r"expected \d+ vectors for passage 0 to \d+, got an array of shape \(\d+, 12\)"),
    (lambda texts: None, "expected .* vectors for passage 0"),
    (lambda texts: encode(texts)[:, :0], "expected .* vectors for passage 0"),
    (lambda texts: [np.ones((len(text), 4)) for text in texts], "one vector a text"),
])
@pytest.mark.parametrize("cached", [True, False])
def test_models_that_fail_are_refused_by_row(tmp_path, answer, words, cached):
    with pytest.raises(ValueError, match=words):
        run(tmp_path if cached else None, answer, what="passage")
    assert not list(tmp_path.glob("*.npy"))
    assert (run(tmp_path) == run(None)).all()


def test_a_dimension_that_changes_between_batches_is_refused(tmp_path):
    with pytest.raises(ValueError, match="expected 12 dimensions as before, got 5 for text 8"):
        run(tmp_path, lambda texts: encode(texts)[:, : 12 if TEXTS[0] in texts else 5])


def test_without_a_cache_the_model_is_asked_once(tmp_path):
    calls = []
    run(None, lambda texts: calls.append(len(texts)) or encode(texts))
    run(tmp_path, lambda texts: calls.append(len(texts)) or encode(texts))
    assert calls == [50, 8, 8, 8, 8, 8, 8, 2]


def test_damaged_files_are_refused_with_the_remedy(tmp_path):
    path = Path(run(tmp_path).filename)
    content = path.read_bytes()
    other = tmp_path / "other.npy"
    np.save(other, np.zeros((50, 12)))
    for bad in (content[:-4], content[:50], b"", content + b"more", other.read_bytes(), content.replace(b"(50, 12)", b"(49, 12)")):
        path.write_bytes(bad)
        with pytest.raises(ValueError, match="delete it and run again"):
            run(tmp_path)
    path.unlink()
    assert (run(tmp_path) == run(None)).all()


def test_damaged_progress_is_refused_with_the_remedy(tmp_path):
    def stop(texts):
        if TEXTS[30] in texts:
            raise KeyboardInterrupt
        return encode(texts)

    with pytest.raises(KeyboardInterrupt):
        run(tmp_path, stop)
    note, part = (next(tmp_path.glob(f".*.{end}")) for end in ("json", "part"))
    assert json.loads(note.read_text())["done"] == 24
    rows, promised = part.read_bytes(), note.read_text()
    for bad in ("", "[]", "{}", '{"done": 24, "dim": "x", "offset": 1}'):
        note.write_text(bad)
        with pytest.raises(ValueError, match="note of an interrupted run.*delete"):
            run(tmp_path)
    note.write_text(promised)
    part.write_bytes(rows[:-1])
    with pytest.raises(ValueError, match="expected 24 rows of 12 dimensions.*delete"):
        run(tmp_path)
    part.write_bytes(rows)
    with pytest.raises(ValueError, match="expected 12 dimensions as before, got 5"):
        run(tmp_path, lambda texts: encode(texts)[:, :5])
    part.unlink()
    assert (run(tmp_path) == run(None)).all()


def test_batch_size_is_checked():
    with pytest.raises(ValueError, match="batch_size"):
        run(None, batch_size=0)


@pytest.fixture(scope="module")
def dense(encoder):
    return lambda: sentence_model(encoder)


def sentence_model(encoder):
    from sentence_transformers import SentenceTransformer
    from sentence_transformers.sentence_transformer import modules

    words = modules.Transformer(str(encoder))
    words.max_seq_length = 16
    return SentenceTransformer(modules=[words, modules.Pooling(32, pooling_mode="mean")], device="cpu")


def test_same_model_same_key_whatever_it_did_before(dense):
    used, fresh = dense(), dense()
    used.encode(["word1 word2", "word3"])
    assert model_key(used) == model_key(fresh) == model_key(used)
    assert model_key(used, "query") != model_key(used)


def test_whatever_changes_the_vectors_changes_the_key(dense):
    from sentence_transformers.sentence_transformer import modules

    model, found = dense(), []
    found.append(model_key(model))
    with torch.no_grad():
        next(model.parameters())[3, 3] += 1
    found.append(model_key(model))
    model.max_seq_length = 8
    found.append(model_key(model))
    model.prompts["document"] = "passage: "
    found.append(model_key(model))
    model.truncate_dim = 16
    found.append(model_key(model))
    model[1] = modules.Pooling(32, pooling_mode="cls")
    found.append(model_key(model))
    model.half()
    found.append(model_key(model))
    backend = model.tokenizer.backend_tokenizer
    from tokenizers import normalizers
    backend.normalizer = normalizers.Lowercase()
    next(model.parameters()).data = next(model.parameters()).data.clone()
    found.append(model_key(model))
    assert len(set(found)) == len(found)


def test_a_step_of_training_changes_the_key(dense):
    model = dense()
    before, optimizer = model_key(model), torch.optim.SGD(model.parameters(), lr=0.1)
    features = model.tokenizer(["word1 word2"], return_tensors="pt")
    model(dict(features))["sentence_embedding"].sum().backward()
    optimizer.step()
    assert model_key(model) != before


def test_weights_are_hashed_once(dense, monkeypatch):
    model, calls = dense(), []
    model_key(model)
    monkeypatch.setattr(mining_vectors, "tokenizer_key", lambda model: calls.append(model) or "")
    model_key(model), model_key(model, "query")
    assert not calls


@pytest.mark.parametrize("model", [object(), Counting(), torch.nn.Linear(2, 2), "a-model"])
def test_no_key_for_what_is_no_model(model):
    with pytest.raises(ValueError, match="sentence-transformers model"):
        model_key(model)


def test_kind_is_checked(dense):
    with pytest.raises(ValueError, match="'document' or 'query'"):
        model_key(dense(), "passage")
