"""Rows of several passages and their teacher's scores, from preparing to the files."""

import json
import os
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from colbert_nb.data import (Examples, TrainingData, choose_negatives, deal_pairs, group_negatives, load_training_data, make_triples,
                             parse_rows, prepare)
from colbert_nb.data_scores import score_triples

quick = settings(max_examples=80, derandomize=True, deadline=None, suppress_health_check=list(HealthCheck))


def pairs(n):
    return [(f"query {i}", f"passage {i} {'word ' * (i % 5)}") for i in range(n)]


class Teacher:
    "Scores by length, and remembers what it was asked."

    def __init__(self): self.asked = []

    def predict(self, pairs, batch_size, show_progress_bar, activation_fn):
        self.asked.append(pairs)
        return np.array([len(q) - len(p) for q, p in pairs], np.float64)


# nway


@quick
@given(st.lists(st.integers(), unique=True, max_size=15), st.integers(1, 8))
def test_groups_are_whole_distinct_and_hold_all(negatives, size):
    groups = group_negatives(negatives, size)
    if len(negatives) < size:
        assert groups == []
        return
    assert all(len(set(group)) == size for group in groups) and len(set(groups)) == len(groups) == -(-len(negatives) // size)
    flat = [n for group in groups for n in group]
    assert flat[:len(negatives)] == negatives and set(flat) == set(negatives)


@quick
@given(st.integers(2, 6), st.integers(1, 12), st.integers(0, 8), st.data())
def test_rows_of_any_width_keep_the_promises(nway, max_triples, new, draw):
    passages = st.lists(st.integers(0, 9), min_size=1, max_size=4, unique=True)
    positives = {q: draw.draw(passages) for q in range(3)}
    negatives = {0: [p for p in draw.draw(passages) if p not in positives[0]]}
    examples = Examples(["a", "b", "c"], [f"p{i}" for i in range(10)], positives, negatives)
    options = dict(num_new_negatives=new, nway=nway, max_triples=max_triples)
    chosen = {q: choose_negatives(examples, q, num_new_negatives=new) for q in positives}
    if all(len(c) < nway - 1 for c in chosen.values()):
        with pytest.raises(ValueError, match="negative"):
            make_triples(examples, **options)
        return
    rows = make_triples(examples, **options)
    assert rows == make_triples(examples, **options) and len(set(rows)) == len(rows)
    for q, ps in positives.items():
        mine = [row[1:] for row in rows if row[0] == q]
        groups = group_negatives(chosen[q], nway - 1)
        assert len(mine) == min(max_triples, len(ps) * len(groups)) and all(len(row) == nway for row in mine)
        assert all(row[0] in ps and not set(row[1:]) & set(ps) and row[1:] in groups for row in mine)


def test_two_passages_a_row_are_what_they_were():
    examples = parse_rows([(f"q{i}", [f"p{i}", f"r{i}"]) for i in range(20)])
    for q, ps in examples.positives.items():
        chosen = choose_negatives(examples, q)
        assert deal_pairs(ps, group_negatives(chosen, 1), 20) == [(p, (n,)) for p, n in deal_pairs(ps, chosen, 20)]


@pytest.mark.parametrize("nway", [1, 0, 2.0, True, "2", None])
def test_nway_that_is_none(tmp_path, nway):
    with pytest.raises(ValueError, match="nway: expected a whole number of 2 or more"):
        prepare(pairs(9), tmp_path / "data", nway=nway)
    assert not list(tmp_path.iterdir())


def test_more_negatives_than_there_are(tmp_path, caplog):
    with pytest.raises(ValueError, match="expected 11 negatives, as nway=12 wants, .* num_new_negatives=10"):
        prepare(pairs(50), tmp_path / "data", nway=12)
    assert not list(tmp_path.iterdir())
    rows = [("q", "a", ["b", "c", "d"]), ("r", "b", ["a"])]
    assert {row[0] for row in make_triples(parse_rows(rows), nway=4, num_new_negatives=0)} == {0}
    assert "1 of 2 queries have fewer than 3 negatives" in caplog.text


def test_prepared_rows_of_several_passages(tmp_path):
    folder = prepare(pairs(30), tmp_path / "data", nway=5)
    data, manifest = load_training_data(folder), json.loads((folder / "manifest.json").read_bytes())
    assert data.nway == 5 and data.scores is None and manifest["settings"]["nway"] == 5 and (data.triples >= 0).all()
    assert not any(p in data.positives[q] for q, _, *ps in data.triples.tolist() for p in ps)


# scores


@pytest.mark.parametrize("slab", [1, 7, 8192])
def test_each_pair_is_asked_once_and_lands_where_it_belongs(tmp_path, slab, monkeypatch):
    monkeypatch.setattr("colbert_nb.data_scores.SLAB", slab)
    folder, teacher = prepare(pairs(25), tmp_path / "data", nway=4), Teacher()
    before, settings = load_training_data(folder), json.loads((folder / "manifest.json").read_bytes())["settings"]
    data = score_triples(folder, teacher, show_progress=False)
    assert data == load_training_data(folder) and os.listdir(tmp_path) == ["data"]
    assert (data.triples == before.triples).all() and data.positives == before.positives and data.validation == before.validation
    for (q, *ps), scores in zip(data.triples.tolist(), data.scores.tolist()):
        assert scores == [len(data.queries[q]) - len(data.corpus[p]) for p in ps]
    asked = [pair for call in teacher.asked for pair in call]
    assert len(asked) == len(set(asked)) == len({(q, p) for q, *ps in data.triples.tolist() for p in ps})
    lengths = [len(q) + len(p) for q, p in asked]
    assert lengths == sorted(lengths, reverse=True)
    assert json.loads((folder / "manifest.json").read_bytes())["settings"] == settings | {"teacher": "Teacher"}


def test_data_in_memory_stays_in_memory(tmp_path):
    data = TrainingData(["q", "r"], list("abcd"), [(0, 0, 1), (1, 1, 2, 3)], {0: [0], 1: [1]}, [])
    scored = score_triples(data, Teacher())
    assert data.scores is None and scored.scores[1].tolist() == [0, 0, 0] and np.isnan(scored.scores[0, 2])
    written = score_triples(data, Teacher(), out=tmp_path / "out")
    assert written == scored == load_training_data(tmp_path / "out")


@pytest.fixture(scope="module")
def cross_encoder(tmp_path_factory) -> Path:
    "A random cross-encoder of one small layer."
    from tokenizers import Tokenizer, models, pre_tokenizers, processors
    from transformers import BertConfig, BertForSequenceClassification, PreTrainedTokenizerFast
    folder = tmp_path_factory.mktemp("teacher")
    words = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "query", "passage", "word", *map(str, range(30))]
    ids = {word: i for i, word in enumerate(words)}
    tokenizer = Tokenizer(models.WordLevel(ids, unk_token="[UNK]"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer.post_processor = processors.TemplateProcessing(single="[CLS] $A [SEP]", pair="[CLS] $A [SEP] $B:1 [SEP]:1",
                                                             special_tokens=[(t, ids[t]) for t in ("[CLS]", "[SEP]")])
    PreTrainedTokenizerFast(tokenizer_object=tokenizer, unk_token="[UNK]", pad_token="[PAD]", cls_token="[CLS]", sep_token="[SEP]",
                            model_max_length=32).save_pretrained(folder)
    for labels, name in ((1, ""), (3, "three")):
        torch.manual_seed(0)
        BertForSequenceClassification(BertConfig(vocab_size=len(words), hidden_size=32, num_hidden_layers=1, num_attention_heads=2, intermediate_size=64,
                                                 max_position_embeddings=32, num_labels=labels, initializer_range=0.5)).save_pretrained(folder / name)
    return folder


def test_a_cross_encoder_by_folder_and_as_a_model(cross_encoder, tmp_path):
    from sentence_transformers import CrossEncoder
    data = load_training_data(prepare(pairs(15), tmp_path / "data", nway=3))
    model = CrossEncoder(str(cross_encoder), device="cpu")
    texts = [(data.queries[q], data.corpus[p]) for q, *ps in data.triples.tolist() for p in ps]
    raw = model.predict(texts, activation_fn=torch.nn.Identity(), show_progress_bar=False)
    assert raw.std() > 0.1
    for teacher in (model, cross_encoder, str(cross_encoder)):
        assert np.allclose(score_triples(data, teacher, device="cpu", batch_size=4).scores.ravel(), raw, atol=1e-4)
    folder = tmp_path / "data"
    score_triples(folder, cross_encoder, device="cpu")
    settings = json.loads((folder / "manifest.json").read_bytes())["settings"]
    assert settings["teacher"] == cross_encoder.name and str(tmp_path) not in (folder / "manifest.json").read_text()


class Fixed(Teacher):
    def __init__(self, value): self.value = value
    def predict(self, pairs, **options): return self.value(len(pairs))


@pytest.mark.parametrize("teacher, part", [(5, "expected a CrossEncoder"), (None, "expected a CrossEncoder"), (Path("nowhere"), "expected a folder"),
                                           (Fixed(lambda n: np.full(n, np.inf)), "expected a finite score, got inf for 'query"),
                                           (Fixed(lambda n: np.zeros((n, 2))), "one score for each"), (Fixed(lambda n: np.zeros(n - 1)), "one score for each")])
def test_teachers_that_are_none_change_nothing(tmp_path, teacher, part):
    folder = prepare(pairs(15), tmp_path / "data")
    before = {p.name: p.read_bytes() for p in folder.iterdir()}
    with pytest.raises(ValueError, match=part):
        score_triples(folder, teacher)
    assert before == {p.name: p.read_bytes() for p in folder.iterdir()} and os.listdir(tmp_path) == ["data"]


def test_a_model_of_several_labels(cross_encoder, tmp_path):
    for file in cross_encoder.glob("tokenizer*"):
        (cross_encoder / "three" / file.name).write_bytes(file.read_bytes())
    with pytest.raises(ValueError, match="one score a pair, got 3 labels"):
        score_triples(prepare(pairs(15), tmp_path / "data"), cross_encoder / "three", device="cpu")


def test_what_cannot_be_written_is_refused_before_scoring(tmp_path):
    folder, teacher = prepare(pairs(15), tmp_path / "data"), Teacher()
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "notes.txt").write_text("mine")
    cases = [(folder, {"out": tmp_path / "mine"}), (folder, {"batch_size": 0}), (folder, {"batch_size": True}), (tmp_path / "mine", {})]
    for data, options in cases:
        with pytest.raises(ValueError):
            score_triples(data, teacher, **options)
    assert not teacher.asked
