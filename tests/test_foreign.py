"""Folders of PyLate, sentence-transformers and old colbert-ai: the same vectors here, or a reason why not."""

import json
import logging
import shutil
import string
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from tiny import made_data
from torch import nn
from test_backbones import make
from transformers import AutoModel, AutoTokenizer, BertConfig, BertModel

from colbert_nb.corpus import minilm_path
from colbert_nb.encoder import ColBERT
from colbert_nb.encoder_foreign import convert_dnn, fold_dense
from colbert_nb.encoder_settings import encoder_folder, read_modules
from colbert_nb.training_run import train_colbert

QUERIES = ["what is late interaction?", "and !", "a " * 60, "Größe über 東京", ""]
DOCUMENTS = ["A passage, with punctuation!", "... !!!", "x", "many, many words. " * 100, ""]
TRAINING = replace(made_data(), validation=[])  # without validation the last step is returned
SMALL = dict(hidden_size=64, num_hidden_layers=1, num_attention_heads=2, intermediate_size=64)
pytestmark = pytest.mark.filterwarnings("ignore")


@pytest.fixture(scope="module")
def plain(tmp_path_factory):
    folder = tmp_path_factory.mktemp("plain")
    torch.manual_seed(0)
    BertModel(BertConfig(**SMALL)).save_pretrained(folder)
    AutoTokenizer.from_pretrained(minilm_path()).save_pretrained(folder)
    return folder


def load(folder, **options):
    return ColBERT.from_pretrained(folder, device="cpu", **options)


def edit(file, **changes):
    file.write_text(json.dumps({**(json.loads(file.read_text()) if file.is_file() else {}), **changes}))


def same(xs, ys, atol=1e-5):
    assert len(xs) == len(ys)
    for x, y in zip(xs, ys):
        assert x.shape == y.shape
        torch.testing.assert_close(torch.as_tensor(x).cpu(), y, rtol=0, atol=atol)


def same_model(theirs, ours):
    same(theirs.encode_query(QUERIES), ours.encode_queries(QUERIES))
    same(theirs.encode_document(DOCUMENTS), ours.encode_documents(DOCUMENTS))


# sentence-transformers

def multi_vector(plain, folder, *, dims=(64, 16), prompts=("", ""), words=(), residual=False, **knobs):
    "A MultiVectorEncoder of sentence-transformers, saved; and the object."
    from sentence_transformers import MultiVectorEncoder
    from sentence_transformers.base.modules import Dense, Normalize, Transformer
    from sentence_transformers.multi_vector_encoder.modules import MultiVectorMask
    torch.manual_seed(1)
    body = Transformer(str(plain), **knobs)
    dense = [Dense(a, b, bias=False, activation_function=nn.Identity(), module_input_name="token_embeddings", use_residual=residual)
             for a, b in zip(dims, dims[1:])]
    body.tokenizer.add_special_tokens({"additional_special_tokens": [p.strip() for p in prompts if p.startswith("[")]})
    model = MultiVectorEncoder(modules=[body, *dense, MultiVectorMask(list(words)), Normalize(module_input_name="token_embeddings")],
                               device="cpu", prompts=dict(zip(("query", "document"), prompts)))
    model.save_pretrained(str(folder))
    return model


MARKED = dict(prompts=("[unused0] ", "[unused1] "), words=string.punctuation)


@pytest.mark.parametrize("options", [
    {}, MARKED, dict(prompts=("[unused0] ", "")),
    dict(MARKED, document_length=30, query_expansion={"strategy": "fixed", "length": 12}),
    dict(MARKED, document_length=30, query_length=9),
    dict(document_length=30, query_expansion={"strategy": "fixed", "length": 12, "attend": True}),
    dict(MARKED, dims=(64, 32, 16)), dict(MARKED, dims=(64, 64, 16), residual=True), dict(MARKED, dims=(64,)),
])
def test_vectors_of_sentence_transformers(plain, tmp_path, options, caplog):
    theirs = multi_vector(plain, tmp_path / "mve", **options)
    with caplog.at_level(logging.INFO, "colbert_nb"):
        ours = load(tmp_path / "mve")
    assert "fine-tuning" in caplog.text and "sentence-transformers' format" in caplog.text
    same_model(theirs, ours)
    caplog.clear()
    again = load(ours.save_pretrained(tmp_path / "ours"))
    assert ("has no marker tokens" in caplog.text) == ("" in options.get("prompts", ("", "")))
    same(again.encode_queries(QUERIES), ours.encode_queries(QUERIES), atol=0)
    same(again.encode_documents(DOCUMENTS), ours.encode_documents(DOCUMENTS), atol=0)


def test_what_its_default_makes_of_an_encoder(plain, tmp_path):
    from sentence_transformers import MultiVectorEncoder
    theirs = MultiVectorEncoder(str(plain), device="cpu")
    theirs.save_pretrained(str(tmp_path / "mve"))
    same_model(theirs, load(tmp_path / "mve")) if theirs[1].out_features <= 64 else refused(tmp_path / "mve", "hidden size 64")


def test_trained_there_and_trained_on_here(plain, tmp_path, caplog):
    theirs = multi_vector(plain, tmp_path / "mve", **MARKED, document_length=20, query_expansion={"strategy": "fixed", "length": 8})
    optimizer = torch.optim.AdamW(theirs.parameters(), lr=1e-2)
    for _ in range(3):
        features = theirs.preprocess(DOCUMENTS, task="document") if hasattr(theirs, "preprocess") else theirs.tokenize(DOCUMENTS)
        theirs(features)["token_embeddings"][..., 0].sum().backward()
        optimizer.step()
        optimizer.zero_grad()
    theirs.save_pretrained(str(tmp_path / "trained"))
    ours = load(tmp_path / "trained")
    same_model(theirs, ours)
    with caplog.at_level(logging.WARNING, "colbert_nb"):
        best = train_colbert(ours, TRAINING, tmp_path / "run", batch_size=6, learning_rate=1e-4, maxsteps=10, epochs=2)
    same(load(best).encode_documents(DOCUMENTS), ours.encode_documents(DOCUMENTS), atol=0)
    assert (load(best).tokenizer.query_maxlen, load(best).tokenizer.doc_maxlen) == (8, 20)


def test_settings_can_be_chosen_anew(plain, tmp_path):
    multi_vector(plain, tmp_path / "mve", **MARKED, document_length=20)
    model = load(tmp_path / "mve", doc_maxlen=40, query_maxlen=10, query_expansion=True, mask_punctuation=False)
    own = model.tokenizer
    assert (own.doc_maxlen, own.query_maxlen, own.query_expansion, own.mask_punctuation) == (40, 10, True, False)
    with pytest.raises(ValueError, match="expected dim=16"):
        load(tmp_path / "mve", dim=8)


def refused(folder, message, **options):
    with pytest.raises(ValueError, match=message):
        load(folder, **options)


@pytest.mark.parametrize("options, message", [
    (dict(prompts=("query: ", "")), "'query: ', which is text"),
    (dict(query_expansion={"strategy": "fixed", "length": 8, "token": "[SEP]"}), "mask token"),
])
def test_what_has_no_place_here(plain, tmp_path, options, message):
    multi_vector(plain, tmp_path / "mve", **options)
    refused(tmp_path / "mve", message)


def test_a_skiplist_of_words_is_kept_or_given_up(plain, tmp_path):
    theirs = multi_vector(plain, tmp_path / "mve", words=["many", "no such word", "!"])
    ours = load(tmp_path / "mve")
    same_model(theirs, ours)
    assert ours.tokenizer.skiplist_words == ["many", "!"]
    again = load(ours.save_pretrained(tmp_path / "ours"))
    same(again.encode_documents(DOCUMENTS), ours.encode_documents(DOCUMENTS), atol=0)
    without = load(tmp_path / "mve", mask_punctuation=False).tokenizer
    assert not without.mask_punctuation and without.skiplist_words is None and not len(without.skiplist)


def test_nothing_is_stored_where_the_rules_agree(plain, tmp_path):
    multi_vector(plain, tmp_path / "mve", **MARKED)
    stored = json.loads((load(tmp_path / "mve").save_pretrained(tmp_path / "ours") / "artifact.metadata").read_text())
    assert stored["skiplist_words"] is None and stored["mask_punctuation"] is True


def test_a_floor_for_queries_is_warned_of(plain, tmp_path, caplog):
    theirs = multi_vector(plain, tmp_path / "mve", query_expansion={"strategy": "min", "length": 8})
    ours = load(tmp_path / "mve")
    assert "are cut here" in caplog.text
    same(theirs.encode_query(["a b"]), ours.encode_queries(["a b"]))


@pytest.mark.parametrize("damage, message", [
    (lambda f: edit(f / "1_Dense/config.json", bias=True), "without bias"),
    (lambda f: edit(f / "1_Dense/config.json", activation_function="torch.nn.modules.activation.Tanh"), "Tanh"),
    (lambda f: (f / "1_Dense/model.safetensors").unlink(), "1_Dense"),
    (lambda f: (f / "1_Dense/model.safetensors").write_bytes(b"x"), "damaged"),
    (lambda f: save_file({"linear.weight": torch.ones(4, 5)}, f / "1_Dense/model.safetensors"), "64 columns"),
    (lambda f: (f / "modules.json").write_text("[MultiVector"), "damaged file"),
    (lambda f: (f / "modules.json").write_text('[{"type": "MultiVectorX", "path": "../x"}]'), "lies elsewhere"),
    (lambda f: (f / "modules.json").write_text('[{"type": "MultiVectorX", "path": "/etc"}]'), "lies elsewhere"),
    (lambda f: (f / "modules.json").write_text((f / "modules.json").read_text().replace("normalize.Normalize", "pool.TokenPooling")), "TokenPooling"),
    (lambda f: edit(f / "2_MultiVectorMask/config.json", keep_only_token_ids=[5]), "leaves words"),
    (lambda f: edit(f / "2_MultiVectorMask/config.json", skiplist_words=[1]), "list of strings"),
    (lambda f: edit(f / "sentence_bert_config.json", do_lower_case=True), "do_lower_case"),
])
def test_damage_is_refused_by_name(plain, tmp_path, damage, message):
    multi_vector(plain, tmp_path / "mve", **MARKED)
    damage(tmp_path / "mve")
    refused(tmp_path / "mve", message)


# PyLate

def pylate_folder(plain, folder, prefixes=("[Q] ", "[D] "), dims=(64, 16), **settings):
    "As PyLate 1.6 saves it: prefixes added to vocabulary and table, padding is [MASK], settings at the top."
    tokenizer = AutoTokenizer.from_pretrained(plain)
    tokenizer.add_tokens([prefix for prefix in prefixes if prefix])
    tokenizer.pad_token = tokenizer.mask_token
    torch.manual_seed(2)
    body = AutoModel.from_pretrained(plain)
    body.resize_token_embeddings(len(tokenizer), mean_resizing=False)
    body.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    types = ["sentence_transformers.models.Transformer", *["pylate.models.Dense.Dense"] * (len(dims) - 1)]
    paths = ["", *[f"{i}_Dense" for i in range(1, len(dims))]]
    (folder / "modules.json").write_text(json.dumps([{"idx": i, "name": str(i), "path": p, "type": t} for i, (p, t) in enumerate(zip(paths, types))]))
    for path, a, b in zip(paths[1:], dims, dims[1:]):
        (folder / path).mkdir()
        edit(folder / path / "config.json", in_features=a, out_features=b, bias=False, use_residual=False,
             activation_function="torch.nn.modules.linear.Identity")
        save_file({"linear.weight": torch.randn(b, a)}, folder / path / "model.safetensors")
    edit(folder / "config_sentence_transformers.json", **{**dict(
        prompts={"query": "", "document": ""}, default_prompt_name=None, similarity_fn_name="MaxSim", query_prefix=prefixes[0],
        document_prefix=prefixes[1], query_length=12, document_length=30, attend_to_expansion_tokens=False,
        skiplist_words=list(string.punctuation), do_query_expansion=True), **settings})
    edit(folder / "sentence_bert_config.json", max_seq_length=29, do_lower_case=False)
    return folder


@torch.no_grad()
def as_pylate(folder, texts, query):
    "PyLate's `tokenize` and `encode`, for one text at a time."
    top = json.loads((folder / "config_sentence_transformers.json").read_text())
    tokenizer, body = AutoTokenizer.from_pretrained(folder), AutoModel.from_pretrained(folder).eval()
    prefix = tokenizer.convert_tokens_to_ids(top["query_prefix" if query else "document_prefix"])
    length = top["query_length" if query else "document_length"]
    fill = query and top["do_query_expansion"]
    skip = [tokenizer.convert_tokens_to_ids(word) for word in top["skiplist_words"]]
    vectors = []
    for text in texts:
        out = tokenizer([text], padding="max_length" if fill else True, truncation=True, max_length=length - 1, return_tensors="pt")
        second = lambda rows, value: torch.cat([rows[:, :1], torch.tensor([[value]]), rows[:, 1:]], 1)
        ids, attention = second(out["input_ids"], prefix), second(out["attention_mask"], 1)
        if query and top["attend_to_expansion_tokens"]:
            attention.fill_(1)
        states = body(ids, attention_mask=attention).last_hidden_state
        for dense in sorted(folder.glob("*_Dense")):
            states = states @ load_file(dense / "model.safetensors")["linear.weight"].T
        keep = torch.ones_like(ids[0], dtype=torch.bool) if fill else attention[0].bool() & (query | ~torch.isin(ids[0], torch.tensor(skip)))
        vectors.append(nn.functional.normalize(states[0][keep], dim=1))
    return vectors


@pytest.mark.parametrize("options", [{}, dict(attend_to_expansion_tokens=True), dict(do_query_expansion=False), dict(dims=(64, 32, 16)),
                                     dict(prefixes=("[unused0]", "[unused1]"))])
def test_vectors_of_pylate(plain, tmp_path, options, caplog):
    (tmp_path / "pylate").mkdir()
    folder = pylate_folder(plain, tmp_path / "pylate", **options)
    with caplog.at_level(logging.INFO, "colbert_nb"):
        ours = load(folder)
    assert "fine-tuning" in caplog.text and "PyLate's format" in caplog.text
    same(as_pylate(folder, QUERIES, True), ours.encode_queries(QUERIES))
    same(as_pylate(folder, DOCUMENTS, False), ours.encode_documents(DOCUMENTS))
    again = load(ours.save_pretrained(tmp_path / "ours"))
    same(again.encode_queries(QUERIES), ours.encode_queries(QUERIES), atol=0)
    same(again.encode_documents(DOCUMENTS), ours.encode_documents(DOCUMENTS), atol=0)


def test_sentence_transformers_reads_pylate_as_we_do(plain, tmp_path):
    from sentence_transformers import MultiVectorEncoder
    (tmp_path / "pylate").mkdir()
    folder = pylate_folder(plain, tmp_path / "pylate", prefixes=("[unused0]", "[unused1]"))
    same_model(MultiVectorEncoder(str(folder), device="cpu"), load(folder))


# vocabularies of pieces, in which the libraries mean other tokens by punctuation

PIECES = ["word1, word2!", "... (word3) word4.", "word5; " * 80, "", "Größe: über 東京", "a - b / c"]


@pytest.fixture(params=["xlm-roberta", "deberta-v2"], scope="module")
def pieces(request, tmp_path_factory):
    return make(request.param, tmp_path_factory.mktemp(request.param))


def by_first_piece(folder):
    "Vectors of the checkpoint as colbert-ai reads it."
    edit(folder / "artifact.metadata", skiplist_words=None)
    return load(folder).encode_documents(PIECES)


def kept_through_saving(ours, folder):
    again = load(ours.save_pretrained(folder))
    same(again.encode_documents(PIECES), ours.encode_documents(PIECES), atol=0)
    assert [len(v) for v in by_first_piece(folder)] != [len(v) for v in ours.encode_documents(PIECES)]


def test_pieces_of_sentence_transformers(pieces, tmp_path, caplog):
    theirs = multi_vector(pieces, tmp_path / "mve", dims=(32, 16), words=string.punctuation, document_length=30, query_length=20)
    ours = load(tmp_path / "mve")
    assert "punctuation" not in caplog.text
    same(theirs.encode_document(PIECES), ours.encode_documents(PIECES))
    same(theirs.encode_query(PIECES), ours.encode_queries(PIECES))
    kept_through_saving(ours, tmp_path / "ours")


def test_sentence_transformers_skips_the_same_when_it_reads_ours(pieces, tmp_path):
    from sentence_transformers import MultiVectorEncoder
    multi_vector(marked_copy(pieces, tmp_path / "marked"), tmp_path / "mve", dims=(32, 16), **MARKED, document_length=30)
    ours = load(tmp_path / "mve")
    back = MultiVectorEncoder(str(ours.save_pretrained(tmp_path / "ours")), device="cpu")
    masks = [module for module in back if hasattr(module, "skiplist_words")]
    assert [sorted(mask._skiplist_ids.tolist()) for mask in masks] == [ours.tokenizer.skiplist.tolist()]


def marked_copy(pieces, folder):
    "The encoder with markers in its vocabulary."
    tokenizer, body = AutoTokenizer.from_pretrained(pieces), AutoModel.from_pretrained(pieces)
    tokenizer.add_special_tokens({"additional_special_tokens": ["[unused0]", "[unused1]"]})
    body.resize_token_embeddings(len(tokenizer), mean_resizing=False)
    body.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


@pytest.mark.parametrize("words", [list(string.punctuation), [",", "!", "\u2581"]])
def test_pieces_of_pylate(pieces, tmp_path, words):
    "The tokenizer lacks some symbols, and for these PyLate leaves unknown tokens out."
    (tmp_path / "pylate").mkdir()
    folder = pylate_folder(pieces, tmp_path / "pylate", dims=(32, 16), skiplist_words=words)
    ours = load(folder)
    same(as_pylate(folder, PIECES, False), ours.encode_documents(PIECES))
    same(as_pylate(folder, PIECES, True), ours.encode_queries(PIECES))
    unknown = ours.tokenizer.tokenizer.unk_token
    assert (unknown in ours.tokenizer.skiplist_words) == any(word not in ours.tokenizer.tokenizer.get_vocab() for word in words)
    kept_through_saving(ours, tmp_path / "ours")


def test_pylate_settings_that_are_left_out(plain, tmp_path):
    (tmp_path / "pylate").mkdir()
    folder = pylate_folder(plain, tmp_path / "pylate")
    (folder / "config_sentence_transformers.json").write_text('{"query_prefix": "[Q] ", "document_prefix": "[D] "}')
    own = load(folder).tokenizer
    assert (own.query_maxlen, own.doc_maxlen, own.query_expansion, own.mask_punctuation) == (32, 180, True, True)


def test_pylate_trains_on(plain, tmp_path):
    (tmp_path / "pylate").mkdir()
    ours = load(pylate_folder(plain, tmp_path / "pylate"))
    best = train_colbert(ours, TRAINING, tmp_path / "run", batch_size=6, learning_rate=1e-4, maxsteps=10, epochs=2)
    same(load(best).encode_queries(QUERIES), ours.encode_queries(QUERIES), atol=0)


# plain folders of sentence-transformers

def test_a_pooled_model_is_its_encoder(plain, tmp_path, caplog):
    from sentence_transformers import SentenceTransformer
    from sentence_transformers.models import Dense, Pooling, Transformer
    body = Transformer(str(plain))
    SentenceTransformer(modules=[body, Pooling(64), Dense(64, 8)], device="cpu").save_pretrained(str(tmp_path / "st"))
    with caplog.at_level(logging.INFO, "colbert_nb"):
        ours = load(tmp_path / "st", dim=16)
    assert "from scratch" in caplog.text
    same(load(plain, dim=16).encode_documents(DOCUMENTS), ours.encode_documents(DOCUMENTS), atol=0)


def test_an_encoder_one_folder_down(plain, tmp_path):
    folder = tmp_path / "old"
    shutil.copytree(plain, folder / "0_Transformer")
    types = (("sentence_transformers.models.Transformer", "0_Transformer"), ("sentence_transformers.models.Pooling", "1_Pooling"))
    (folder / "modules.json").write_text(json.dumps([{"idx": i, "path": path, "type": kind} for i, (kind, path) in enumerate(types)]))
    assert encoder_folder(folder) == folder / "0_Transformer" and len(read_modules(folder)) == 2
    same(load(plain, dim=16).encode_documents(DOCUMENTS), load(folder, dim=16).encode_documents(DOCUMENTS), atol=0)


def test_the_trainer_counts_with_the_lengths_of_the_folder(plain, tmp_path):
    from colbert_nb.trainer import length_tokenizer
    multi_vector(plain, tmp_path / "mve", **MARKED, document_length=20, query_expansion={"strategy": "fixed", "length": 8})
    shutil.rmtree(tmp_path / "mve/1_Dense")
    counting = length_tokenizer(tmp_path / "mve")
    assert (counting.query_maxlen, counting.doc_maxlen) == (8, 20)


# the Hub

def test_subfolders_are_fetched_from_the_hub(plain, tmp_path, monkeypatch):
    multi_vector(plain, tmp_path / "mve", **MARKED)
    asked = []

    def snapshot_download(name, *, revision, allow_patterns, ignore_patterns):
        asked.append(allow_patterns)
        return str(tmp_path / "mve")
    monkeypatch.setattr("huggingface_hub.snapshot_download", snapshot_download)
    same(load("someone/late").encode_documents(DOCUMENTS), load(tmp_path / "mve").encode_documents(DOCUMENTS), atol=0)
    assert "1_Dense/*.safetensors" in asked[1] and not any(pattern.startswith("*") for pattern in asked[1])


# old files of colbert-ai

def dnn(model, file, prefix="", **more):
    weights = {f"{prefix}bert.{name}": weight for name, weight in model.encoder.state_dict().items()}
    weights |= {f"{prefix}bert.embeddings.position_ids": torch.arange(512)[None], f"{prefix}linear.weight": model.linear.weight.data}
    torch.save({"epoch": 0, "batch": 1, "optimizer_state_dict": {}, "model_state_dict": weights, **more}, file)
    return file


@pytest.mark.parametrize("prefix", ["", "module."])
def test_a_dnn_file_is_converted(plain, tmp_path, prefix):
    model = load(plain, dim=16, query_maxlen=20, doc_maxlen=180)
    folder = convert_dnn(dnn(model, tmp_path / "a.dnn", prefix), plain, tmp_path / "new", query_maxlen=20)
    same(load(folder).encode_documents(DOCUMENTS), model.encode_documents(DOCUMENTS), atol=0)
    same(load(folder).encode_queries(QUERIES), model.encode_queries(QUERIES), atol=0)


class Trap:
    def __reduce__(self):
        return Path.touch, (Path("trap_was_sprung"),)


def test_a_dnn_file_runs_nothing(plain, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    file = dnn(load(plain, dim=16), tmp_path / "a.dnn", arguments=Trap())
    for attempt in (lambda: convert_dnn(file, plain, tmp_path / "new"), lambda: load(file)):
        with pytest.raises(ValueError, match="nothing of it was run|convert_dnn"):
            attempt()
    assert not Path("trap_was_sprung").exists() and not (tmp_path / "new").exists()


def test_a_dnn_file_without_projection(plain, tmp_path):
    torch.save({"model_state_dict": {"a": torch.ones(1)}}, tmp_path / "a.dnn")
    with pytest.raises(ValueError, match="linear.weight"):
        convert_dnn(tmp_path / "a.dnn", plain, tmp_path / "new")


def test_folding_is_multiplying(tmp_path):
    torch.manual_seed(3)
    layers = [nn.Linear(8, 8, bias=False), nn.Linear(8, 4, bias=False)]
    for i, layer in enumerate(layers):
        (tmp_path / str(i)).mkdir()
        save_file({"linear.weight": layer.weight.data}, tmp_path / str(i) / "model.safetensors")
        edit(tmp_path / str(i) / "config.json", use_residual=i == 0)
    x = torch.randn(5, 8)
    torch.testing.assert_close(x @ fold_dense([tmp_path / "0", tmp_path / "1"], 8).T, layers[1](layers[0](x) + x))
