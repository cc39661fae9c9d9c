"""What the encoder's pages do not teach: damaged files, foreign folders, atomic writing, odd texts, other families."""

import json
import logging
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file
from transformers import (AlbertConfig, AutoModel, AutoTokenizer, BertConfig, BertForMaskedLM, BertModel, DebertaV2Config,
                          DistilBertConfig, DistilBertModel, ElectraConfig, GPT2Config, ModernBertConfig, MPNetConfig, RobertaConfig,
                          T5Config, ViTConfig)

from colbert_nb import encoder_files
from colbert_nb.corpus import minilm_path
from colbert_nb.encoder import ColBERT, check_encoder, is_colbert_checkpoint, pca_projection

QUERIES = ["what is late interaction?", "[MASK] and !", "a " * 60, "Größe über 東京"]
DOCUMENTS = ["A passage, with punctuation!", "... !!!", "x", "many, many words. " * 100, "Größe über 東京 \u2028 end"]
SMALL = dict(hidden_size=128, num_hidden_layers=1, num_attention_heads=2, intermediate_size=64)
WEIGHTS, WEIGHTS_BIN = "model.safetensors", "pytorch_model.bin"


@pytest.fixture(scope="session")
def tokenizer():
    return AutoTokenizer.from_pretrained(minilm_path())


@pytest.fixture(scope="session")
def plain(tmp_path_factory, tokenizer):
    "A small random BERT with MiniLM's vocabulary."
    folder = tmp_path_factory.mktemp("plain")
    torch.manual_seed(0)
    BertModel(BertConfig(**SMALL)).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


@pytest.fixture(scope="session")
def checkpoint(plain, tmp_path_factory):
    return load(plain, dim=16).save_pretrained(tmp_path_factory.mktemp("saved") / "checkpoint")


@pytest.fixture
def copy(checkpoint, tmp_path):
    return Path(shutil.copytree(checkpoint, tmp_path / "copy"))


def load(folder, **arguments):
    return ColBERT.from_pretrained(folder, device="cpu", **arguments)


def contents(folder):
    return {p.name: p.read_bytes() for p in sorted(folder.iterdir())}


def edit(file, **changes):
    file.write_text(json.dumps({**json.loads(file.read_text()), **changes}))


def to_bin(folder):
    torch.save(load_file(folder / WEIGHTS), folder / WEIGHTS_BIN)
    (folder / WEIGHTS).unlink()


def same(xs, ys, atol=0.0):
    assert len(xs) == len(ys)
    for x, y in zip(xs, ys):
        assert x.shape == y.shape
        torch.testing.assert_close(x, y, rtol=0, atol=atol)


# what a checkpoint is

def test_two_saves_give_the_same_bytes(plain, checkpoint, tmp_path):
    assert contents(load(plain, dim=16).save_pretrained(tmp_path / "again")) == contents(checkpoint)
    assert contents(load(checkpoint).save_pretrained(tmp_path / "third")) == contents(checkpoint)


def test_bytes_do_not_depend_on_the_hash_seed(plain, checkpoint, tmp_path):
    code = ("import sys; from colbert_nb.encoder import ColBERT; "
            "ColBERT.from_pretrained(sys.argv[1], dim=16, device='cpu').save_pretrained(sys.argv[2])")
    ran = subprocess.run([sys.executable, "-c", code, plain, tmp_path / "other"], capture_output=True, text=True,
                         env={**os.environ, "PYTHONHASHSEED": "7"}, timeout=120)
    assert ran.returncode == 0, ran.stderr
    assert ran.stdout == ran.stderr == ""
    assert contents(tmp_path / "other") == contents(checkpoint)


def test_saved_files_name_no_path_and_no_host(checkpoint):
    for name, content in contents(checkpoint).items():
        for word in (str(checkpoint.parent), os.getcwd(), os.uname().nodename + '"'):
            assert word.encode() not in content, (name, word)
        if name not in (WEIGHTS, "tokenizer.json"):
            assert not {"is_local", "name_or_path", "_name_or_path", "checkpoint", "meta"} & set(json.loads(content)), name
            assert json.loads(content).get("root", "experiments") == "experiments", name


def test_tokenizer_is_saved_uncut_and_left_as_it_was(plain, tmp_path):
    model = load(plain)
    before = json.loads(model.tokenizer.tokenizer.backend_tokenizer.to_str())
    stored = json.loads((model.save_pretrained(tmp_path / "m") / "tokenizer.json").read_text(encoding="utf-8"))
    assert stored["truncation"] is None and stored["padding"] is None
    assert json.loads(model.tokenizer.tokenizer.backend_tokenizer.to_str()) == before


def test_colbert_ai_reads_the_settings(copy):
    from colbert.infra.config import ColBERTConfig
    config = ColBERTConfig.load_from_checkpoint(str(copy))
    assert (config.dim, config.doc_maxlen, config.query_maxlen, config.similarity) == (16, 256, 32, "cosine")


def test_settings_survive_a_round_trip(plain, tmp_path):
    chosen = dict(query_maxlen=12, doc_maxlen=40, mask_punctuation=False, attend_to_mask_tokens=True, query_expansion=False)
    model = load(load(plain, dim=8, **chosen).save_pretrained(tmp_path / "m"))
    assert {k: getattr(model.config, k) for k in chosen if k != "query_expansion"} == {k: v for k, v in chosen.items() if k != "query_expansion"}
    assert model.config.dim == 8 and {k: getattr(model.tokenizer, k) for k in chosen} == chosen


def test_skipped_punctuation_survives_a_round_trip(plain, checkpoint, tmp_path):
    stored = lambda folder: json.loads((folder / "artifact.metadata").read_text())["skip_punctuation_before_encoding"]
    model = load(plain, dim=16, skip_punctuation_before_encoding=True)
    folder = model.save_pretrained(tmp_path / "m")
    assert stored(folder) is True and stored(checkpoint) is False
    assert load(folder).tokenizer.skip_punctuation_before_encoding
    same(load(folder).encode_documents(DOCUMENTS), model.encode_documents(DOCUMENTS))
    same(load(folder).encode_queries(QUERIES), load(checkpoint).encode_queries(QUERIES))
    same(load(folder, skip_punctuation_before_encoding=False).encode_documents(DOCUMENTS), load(checkpoint).encode_documents(DOCUMENTS))
    same(load(checkpoint, skip_punctuation_before_encoding=True).encode_documents(DOCUMENTS), model.encode_documents(DOCUMENTS))


def test_skipped_punctuation_is_not_seen(checkpoint):
    model = load(checkpoint, skip_punctuation_before_encoding=True)
    with_it, without = model.encode_documents(["one, two! (three)", "one two three"])
    same([with_it], [without], atol=1e-6)
    seen = load(checkpoint).encode_documents(["one, two! (three)"])[0]
    assert seen.shape == with_it.shape and (seen - with_it).abs().max() > 0.01


def test_a_checkpoint_that_says_nothing_reads_punctuation(copy):
    content = json.loads((copy / "artifact.metadata").read_text())
    del content["skip_punctuation_before_encoding"]
    (copy / "artifact.metadata").write_text(json.dumps(content))
    assert not load(copy).tokenizer.skip_punctuation_before_encoding


# fewer numbers

@pytest.mark.parametrize("dim", [1, 7, 16])
def test_truncated_is_truncating_and_normalising(checkpoint, tmp_path, dim):
    model = load(checkpoint)
    before = {name: weight.clone() for name, weight in model.state_dict().items()}
    small = model.truncated(dim)
    cut = lambda vectors: [torch.nn.functional.normalize(v[:, :dim], dim=1) for v in vectors]
    for encode in ("encode_queries", "encode_documents"):
        same(getattr(small, encode)(DOCUMENTS), cut(getattr(model, encode)(DOCUMENTS)), atol=1e-6)
    again = load(small.save_pretrained(tmp_path / "m"))
    assert again.config.dim == dim and model.config.dim == 16
    same(again.encode_documents(DOCUMENTS), small.encode_documents(DOCUMENTS))
    assert json.loads((tmp_path / "m/artifact.metadata").read_text())["dim"] == dim
    small.linear.weight.data.zero_()
    assert all(torch.equal(weight, before[name]) for name, weight in model.state_dict().items())


def test_truncated_keeps_settings_mode_and_precision(plain):
    model = load(plain, dim=16, doc_maxlen=40, skip_punctuation_before_encoding=True, dtype=torch.bfloat16).train()
    small = model.truncated(8)
    assert small.training and small.encoder is model.encoder and small.tokenizer is model.tokenizer
    assert small.linear.weight.dtype == torch.bfloat16 and small.linear.weight.requires_grad and small.config.doc_maxlen == 40
    assert not model.eval().truncated(8).training


@pytest.mark.parametrize("dim", [0, -1, 17, 8.0, "8", True, None])
def test_truncated_out_of_range(checkpoint, dim):
    with pytest.raises(ValueError, match="dim from 1 to 16, the size of this model's vectors, got"):
        load(checkpoint).truncated(dim)


def test_training_settings_are_stored(checkpoint, tmp_path):
    model = load(checkpoint)
    model.config.configure(nway=4, use_ib_negatives=True, lr=1e-5)
    again = load(model.save_pretrained(tmp_path / "m"))
    assert (again.config.nway, again.config.use_ib_negatives, again.config.lr) == (4, True, 1e-5)


# other libraries

@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("attend, skip, dim", [(False, False, 24), (True, False, 24), (False, True, 24), (False, False, 12)])
def test_vectors_are_those_of_colbert_ai_and_sentence_transformers(plain, tmp_path, monkeypatch, attend, skip, dim):
    from colbert.infra import ColBERTConfig
    from colbert.modeling import base_colbert, checkpoint as upstream
    from colbert.modeling.colbert import ColBERT as Upstream
    from sentence_transformers import MultiVectorEncoder
    model = load(plain, dim=24, query_maxlen=20, doc_maxlen=60, attend_to_mask_tokens=attend, init="pca", sample=DOCUMENTS).truncated(dim)
    if skip:
        model.tokenizer = load(plain, query_maxlen=20, doc_maxlen=60, skip_punctuation_before_encoding=True).tokenizer
    folder = str(model.save_pretrained(tmp_path / "m"))
    if skip:
        assert load(folder).tokenizer.skip_punctuation_before_encoding
        model = load(folder, skip_punctuation_before_encoding=False)
    factory = base_colbert.class_factory

    def mended(name):
        cls = factory(name)
        cls.all_tied_weights_keys, cls._keys_to_ignore_on_load_unexpected = {}, {"cls"}
        return cls
    monkeypatch.setattr(Upstream, "loaded_extensions", True, raising=False)
    monkeypatch.setattr(base_colbert, "class_factory", mended)
    theirs = upstream.Checkpoint(folder, ColBERTConfig(), verbose=0)
    same(list(theirs.queryFromText(QUERIES)), model.encode_queries(QUERIES), atol=1e-5)
    same(theirs.docFromText(DOCUMENTS, bsize=2, keep_dims=False)[0], model.encode_documents(DOCUMENTS), atol=1e-5)
    other = MultiVectorEncoder(folder, device="cpu")
    same(other.encode_query(QUERIES), model.encode_queries(QUERIES), atol=1e-5)
    same(other.encode_document(DOCUMENTS), model.encode_documents(DOCUMENTS), atol=1e-5)


def test_a_checkpoint_as_transformers_4_wrote_it(copy, checkpoint):
    "Half precision, position_ids among the weights, colbert-ai's own metadata with run settings, no expansion key."
    weights = {k: v.half() for k, v in load_file(copy / WEIGHTS).items()}
    weights["bert.embeddings.position_ids"] = torch.arange(512).unsqueeze(0)
    save_file(weights, copy / WEIGHTS, metadata={"format": "pt"})
    stored = json.loads((copy / "artifact.metadata").read_text())
    del stored["query_expansion"]
    (copy / "artifact.metadata").write_text(json.dumps({**stored, "root": "/elsewhere", "checkpoint": "x", "model_name": "y",
                                                        "meta": {"hostname": "h"}, "gpus": 8}))
    model = load(copy)
    assert model.linear.weight.dtype == torch.float32 and model.query_expansion
    same(model.encode_documents(DOCUMENTS), load(checkpoint).encode_documents(DOCUMENTS), atol=5e-3)


@pytest.mark.parametrize("legacy", [False, True])
def test_weights_in_a_bin_file(copy, checkpoint, legacy):
    torch.save(load_file(copy / WEIGHTS), copy / WEIGHTS_BIN, _use_new_zipfile_serialization=not legacy)
    (copy / WEIGHTS).unlink()
    same(load(copy).encode_documents(DOCUMENTS), load(checkpoint).encode_documents(DOCUMENTS))


def shard(folder):
    weights = load_file(folder / WEIGHTS)
    names = sorted(weights)
    parts = {f"model-0000{i + 1}-of-00002.safetensors": names[i::2] for i in (0, 1)}
    for part, chosen in parts.items():
        save_file({n: weights[n] for n in chosen}, folder / part, metadata={"format": "pt"})
    (folder / WEIGHTS).unlink()
    (folder / f"{WEIGHTS}.index.json").write_text(json.dumps(
        {"metadata": {}, "weight_map": {n: part for part, chosen in parts.items() for n in chosen}}))
    return list(parts)


def test_weights_in_several_files(copy, checkpoint):
    shard(copy)
    same(load(copy).encode_documents(DOCUMENTS), load(checkpoint).encode_documents(DOCUMENTS))


def test_a_missing_part_is_named(copy):
    part = shard(copy)[1]
    (copy / part).unlink()
    with pytest.raises(ValueError, match=part):
        load(copy)


def test_other_families_and_heads(tmp_path, tokenizer):
    torch.manual_seed(0)
    BertForMaskedLM(BertConfig(**SMALL)).save_pretrained(tmp_path / "masked")
    DistilBertModel(DistilBertConfig(dim=128, n_layers=1, n_heads=2, hidden_dim=64)).save_pretrained(tmp_path / "distil")
    for name, prefix in (("masked", "bert."), ("distil", "distilbert.")):
        tokenizer.save_pretrained(tmp_path / name)
        first = load(tmp_path / name, dim=16)
        folder = first.save_pretrained(tmp_path / f"{name}_colbert")
        assert all(k.startswith(prefix) or k == "linear.weight" for k in load_file(folder / WEIGHTS))
        same(load(folder).encode_documents(DOCUMENTS), first.encode_documents(DOCUMENTS))
    again = load(tmp_path / "masked", dim=16).save_pretrained(tmp_path / "again")
    assert contents(again) == contents(tmp_path / "masked_colbert")


FAMILY = dict(SMALL, vocab_size=30522, pad_token_id=0)


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("config", [
    RobertaConfig(**FAMILY), MPNetConfig(**FAMILY), ElectraConfig(embedding_size=32, **FAMILY), AlbertConfig(embedding_size=32, **FAMILY),
    DebertaV2Config(relative_attention=True, position_buckets=8, pos_att_type=["p2c", "c2p"], **FAMILY),
    ModernBertConfig(bos_token_id=101, cls_token_id=101, eos_token_id=102, sep_token_id=102, **FAMILY)], ids=lambda c: c.model_type)
def test_every_trainable_weight_of_a_family_gets_a_gradient(config, tmp_path, tokenizer):
    "Several processes that train together wait for every weight that says it is trained."
    torch.manual_seed(0)
    AutoModel.from_config(config).save_pretrained(tmp_path / "plain")
    tokenizer.save_pretrained(tmp_path / "plain")
    model = load(tmp_path / "plain", dim=16, doc_maxlen=40)
    again = load(model.save_pretrained(tmp_path / "colbert"))
    same(again.encode_documents(DOCUMENTS), model.encode_documents(DOCUMENTS))
    direction = torch.randn(16, generator=torch.Generator().manual_seed(0))
    (model(model.tokenizer.documents(DOCUMENTS)) @ direction).square().sum().backward()
    assert not [name for name, weight in model.named_parameters() if weight.requires_grad and weight.grad is None]
    assert {name.split(".")[1] for name, weight in model.named_parameters() if not weight.requires_grad} <= {"pooler"}


# what is refused

@pytest.mark.parametrize("damage, message", [
    (lambda f: (f / WEIGHTS).unlink(), WEIGHTS),
    (lambda f: (f / WEIGHTS).write_bytes((f / WEIGHTS).read_bytes()[:-1000]), WEIGHTS),
    (lambda f: (f / WEIGHTS).write_bytes(b""), WEIGHTS),
    (lambda f: (f / WEIGHTS).write_bytes(b"<html>not found</html>"), WEIGHTS),
    (lambda f: (to_bin(f), (f / WEIGHTS_BIN).write_bytes((f / WEIGHTS_BIN).read_bytes()[:5000])), WEIGHTS_BIN),
    (lambda f: (to_bin(f), (f / WEIGHTS_BIN).write_bytes(b"\x00garbage")), WEIGHTS_BIN),
    (lambda f: (to_bin(f), (f / WEIGHTS_BIN).write_bytes(b"")), WEIGHTS_BIN),
    (lambda f: (f / "config.json").unlink(), "config.json"),
    (lambda f: (f / "config.json").write_text("{"), "config.json"),
    (lambda f: (f / "config.json").write_text("[]"), "config.json"),
    (lambda f: (f / "config.json").write_text('{"model_type": "unheard_of"}'), "unheard_of"),
    (lambda f: (f / "tokenizer.json").write_text("{}"), "tokenizer"),
    (lambda f: (f / "tokenizer.json").unlink(), "tokenizer.json"),
    (lambda f: (f / "artifact.metadata").write_text("dim: 16"), "artifact.metadata"),
    (lambda f: (f / "artifact.metadata").write_bytes(b"\xff\xfe"), "artifact.metadata"),
    (lambda f: edit(f / "artifact.metadata", dim=32), r"linear.weight of shape \(32, 128\)"),
    (lambda f: edit(f / "artifact.metadata", dim="16"), "dim"),
    (lambda f: edit(f / "artifact.metadata", similarity="l2"), "cosine"),
    (lambda f: edit(f / "artifact.metadata", doc_maxlen=600), "at most 512"),
    (lambda f: edit(f / "artifact.metadata", query_token_id="[never]"), "never"),
    (lambda f: edit(f / "config.json", hidden_size=64), "fit its config.json|shape"),
    (lambda f: edit(f / "config.json", num_hidden_layers=2), "encoder.layer.1"),
    (lambda f: edit(f / "config.json", vocab_size=50), "last id"),
])
def test_damage_is_refused_by_name(copy, damage, message):
    damage(copy)
    with pytest.raises(ValueError, match=message):
        load(copy)


def test_weights_that_are_not_numbers_are_refused(copy):
    for name in ("linear.weight", "bert.encoder.layer.0.output.dense.weight"):
        weights = load_file(copy / WEIGHTS)
        keep, weights[name] = weights[name], weights[name].clone().fill_(float("nan"))
        save_file(weights, copy / WEIGHTS, metadata={"format": "pt"})
        with pytest.raises(ValueError, match="NaN"):
            load(copy)
        save_file({**weights, name: keep}, copy / WEIGHTS, metadata={"format": "pt"})
    load(copy)


def test_a_projection_that_is_missing_is_refused(copy):
    weights = load_file(copy / WEIGHTS)
    del weights["linear.weight"]
    save_file(weights, copy / WEIGHTS, metadata={"format": "pt"})
    with pytest.raises(ValueError, match="linear.weight"):
        load(copy)


class Trap:
    def __reduce__(self):
        return Path.touch, (Path("trap_was_sprung"),)


def test_a_pickle_is_not_run(copy, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (copy / WEIGHTS).unlink()
    torch.save({"linear.weight": Trap()}, copy / WEIGHTS_BIN)
    with pytest.raises(ValueError, match=WEIGHTS_BIN):
        load(copy)
    assert not Path("trap_was_sprung").exists()


@pytest.mark.parametrize("config", [GPT2Config(), T5Config(), BertConfig(is_decoder=True), ViTConfig()])
def test_what_is_no_text_encoder_is_refused(config, tmp_path):
    config.save_pretrained(tmp_path)
    with pytest.raises(ValueError, match="expected a text encoder"):
        load(tmp_path)


@pytest.mark.parametrize("name", ["no/such/folder/here", "./none", "~none/at/all", Path("none"), "", None, 3, "a b", "x.dnn", "setup.py"])
def test_no_such_folder(name):
    with pytest.raises(ValueError, match="expected a (model|checkpoint) folder"):
        load(name)


def test_a_hub_id_that_cannot_be_had_keeps_its_cause():
    with pytest.raises(ValueError, match="the Hub did not give it") as caught:
        load("colbert-nb/there-is-no-such-model")
    assert caught.value.__cause__ is not None


def test_a_hub_id_in_the_cache_is_loaded(checkpoint, monkeypatch):
    asked = []

    def snapshot_download(name, *, revision, allow_patterns, ignore_patterns):
        asked.append((name, revision, allow_patterns))
        return str(checkpoint)
    monkeypatch.setattr("huggingface_hub.snapshot_download", snapshot_download)
    model = load("someone/colbert", revision="v1")
    assert model.config.dim == 16 and [a[:2] for a in asked] == [("someone/colbert", "v1")]
    assert not any(p.endswith((".py", ".bin")) for p in asked[0][2])
    check_encoder("someone/colbert")
    assert "*.safetensors" not in asked[1][2] and {"*.json", "*.txt", "artifact.metadata"} <= set(asked[1][2])


@pytest.mark.parametrize("arguments, message", [
    (dict(dim=129), "hidden size 128, got 129"), (dict(dim=0), "dim from 1"), (dict(dim=1.5), "dim from 1"),
    (dict(dim=True), "dim from 1"), (dict(doc_maxlen=513), "at most 512"), (dict(query_maxlen=513), "at most 512"),
    (dict(doc_maxlen=3), "doc_maxlen"), (dict(query_maxlen=0), "query_maxlen"), (dict(query_maxlen="32"), "query_maxlen"),
    (dict(init="PCA"), "'random' or 'pca'"), (dict(init="pca"), "sample"), (dict(init="pca", sample=[]), "sample"),
    (dict(init="pca", sample="one string"), "list"), (dict(init="pca", sample=["fine", 3]), "string"),
    (dict(mask_punctuation=False, skip_punctuation_before_encoding=True), "mask_punctuation=True with skip_punctuation"),
])
def test_bad_settings_are_refused_before_weights_are_read(plain, monkeypatch, arguments, message):
    def never(*args, **kwargs):
        raise AssertionError("weights were read")
    monkeypatch.setattr(AutoModel, "from_pretrained", never)
    with pytest.raises(ValueError, match=message):
        load(plain, **arguments)


def test_a_late_interaction_folder_of_another_format_is_not_read_as_plain(plain, tmp_path):
    folder = Path(shutil.copytree(plain, tmp_path / "pylate"))
    (folder / "modules.json").write_text('[{"type": "pylate.models.Dense.Dense", "path": "1_Dense"}]')
    with pytest.raises(ValueError, match="late-interaction model of PyLate or sentence-transformers"):
        load(folder)
    load(minilm_path())


# the projection

def test_principal_directions_are_orthonormal_and_repeat(plain):
    model = load(plain, dim=16)
    first, second = (pca_projection(model.encoder, model.tokenizer, DOCUMENTS, 16, batch_size=n) for n in (1, 5))
    torch.testing.assert_close(first @ first.T, torch.eye(16), atol=1e-5, rtol=0)
    torch.testing.assert_close(first, second, atol=1e-3, rtol=0)
    torch.testing.assert_close(pca_projection(model.encoder, model.tokenizer, DOCUMENTS, 4), first[:4], atol=1e-3, rtol=0)


class Counted(list):
    asked = 0

    def __getitem__(self, item):
        self.asked += 1
        return super().__getitem__(item)

    def __iter__(self):
        raise AssertionError("every passage was read")


def test_a_sample_is_drawn_before_it_is_read(plain):
    sample = Counted([f"passage {i} of many, {i * 7} and {i * 13}" for i in range(3000)])
    model = load(plain, dim=4, init="pca", sample=sample)
    assert sample.asked == 512
    same([load(plain, dim=4, init="pca", sample=(x for x in list.__iter__(sample))).linear.weight], [model.linear.weight])


def test_repeated_texts_do_not_fill_a_projection(plain):
    with pytest.raises(ValueError, match="at least dim=64"):
        load(plain, dim=64, init="pca", sample=["the same few words"] * 100)


def test_all_directions_are_refused_with_advice_that_helps(plain):
    sample = [f"passage {i} of many, {i * 7} and {i * 13}" for i in range(200)]  # far more tokens than the encoder has numbers
    hidden = json.loads((plain / "config.json").read_text())["hidden_size"]
    with pytest.raises(ValueError, match=f"more texts do not add .* take dim={hidden - 1} or less, or init='random'"):
        load(plain, dim=hidden, init="pca", sample=sample)
    assert load(plain, dim=hidden - 1, init="pca", sample=sample).linear.weight.shape == (hidden - 1, hidden)


def test_a_new_projection_can_be_trained(plain):
    for init in ("pca", "random"):
        model = load(plain, dim=16, init=init, sample=DOCUMENTS)
        model(model.tokenizer.documents(DOCUMENTS)).sum().backward()
        missing = [n for n, p in model.named_parameters() if p.requires_grad and p.grad is None]
        assert not missing and model.linear.weight.grad.abs().sum() > 0


def test_a_checkpoint_keeps_its_projection_whatever_init_says(checkpoint, caplog):
    with caplog.at_level(logging.INFO, "colbert_nb"):
        model = load(checkpoint, init="pca", sample=DOCUMENTS)
    same([model.linear.weight], [load(checkpoint).linear.weight])
    assert "fine-tuning" in caplog.text


def test_seed_decides_and_the_global_state_is_left(plain):
    torch.manual_seed(1)
    state = torch.get_rng_state()
    first, second, other = (load(plain, dim=16, seed=s).linear.weight for s in (1, 1, 2))
    assert torch.equal(torch.get_rng_state(), state)
    assert torch.equal(first, second) and not torch.equal(first, other)


# encoding

@settings(max_examples=15, deadline=None)
@given(texts=st.lists(st.text(st.characters(exclude_categories=["Cs"]), max_size=60), max_size=7),
       batch_size=st.integers(1, 4))
def test_any_text_in_any_company(checkpoint, texts, batch_size):
    model = MODELS.setdefault(checkpoint, load(checkpoint)) if checkpoint not in MODELS else MODELS[checkpoint]
    vectors = model.encode_documents(texts, batch_size=batch_size)
    assert len(vectors) == len(texts)
    for text, vector in zip(texts, vectors):
        same([vector], model.encode_documents([text]), atol=1e-5)
        torch.testing.assert_close(vector.norm(dim=1), torch.ones(len(vector)), atol=1e-5, rtol=0)
    packed, lengths = model.encode_documents(texts, batch_size=batch_size, packed=True)
    assert lengths.tolist() == [len(v) for v in vectors] and packed.shape == (sum(map(len, vectors)), 16)


MODELS: dict = {}


@pytest.mark.parametrize("texts, message", [("one", "list"), ([None], "query 0"), (["a", 3], "query 1"), (["\ud800"], "surrogate")])
def test_what_is_no_text_is_refused(checkpoint, texts, message):
    with pytest.raises(ValueError, match=message):
        load(checkpoint).encode_queries(texts)


def test_encoding_keeps_the_mode_and_the_batch_size_is_checked(checkpoint):
    model = load(checkpoint).train()
    same(model.encode_documents(DOCUMENTS), model.encode_documents(DOCUMENTS))
    assert model.training and model.encoder.training
    for bad in (0, -1, 2.0, True, None):
        with pytest.raises(ValueError, match="batch_size"):
            model.encode_queries(QUERIES, batch_size=bad)


def test_vectors_may_enter_a_gradient(checkpoint):
    scale = torch.ones(1, requires_grad=True)
    (load(checkpoint).encode_queries(QUERIES)[0] * scale).sum().backward()
    assert scale.grad is not None


def test_no_bar_where_nobody_looks(checkpoint, capfd):
    model = load(checkpoint)
    model.encode_documents(DOCUMENTS)
    assert capfd.readouterr() == ("", "")
    model.encode_documents(DOCUMENTS, show_progress=True)
    assert "5/5" in capfd.readouterr().err


@pytest.mark.parametrize("attention", ["eager", "sdpa"])
def test_attention_implementations_agree(checkpoint, attention):
    same(load(checkpoint, attn_implementation=attention).encode_documents(DOCUMENTS),
         load(checkpoint).encode_documents(DOCUMENTS), atol=1e-5)


def test_half_precision(checkpoint):
    model = load(checkpoint, dtype=torch.bfloat16)
    assert {v.dtype for v in model.encode_documents(DOCUMENTS)} == {torch.bfloat16}
    assert model.encode_documents([], packed=True)[0].dtype == torch.bfloat16


# writing

def test_a_failed_save_leaves_the_old_folder(copy, monkeypatch):
    before, model = contents(copy), load(copy)

    def full_disk(*args, **kwargs):
        raise OSError("no space left")
    monkeypatch.setattr(encoder_files, "write_json", full_disk)
    with pytest.raises(OSError, match="no space"):
        model.save_pretrained(copy)
    assert contents(copy) == before and list(copy.parent.iterdir()) == [copy]


def test_a_failed_rename_brings_the_old_folder_back(copy, monkeypatch):
    before, model, rename = contents(copy), load(copy), Path.rename

    def fails_for_the_new(self, target):
        asked.append((self.name, target.name))
        if self.name.endswith(".part"):
            raise OSError("busy")
        return rename(self, target)
    asked = []
    monkeypatch.setattr(Path, "rename", fails_for_the_new)
    with pytest.raises(OSError, match="busy"):
        model.save_pretrained(copy)
    assert asked == [("copy", ".copy.old"), (".copy.part", "copy"), (".copy.old", "copy")]
    assert contents(copy) == before and list(copy.parent.iterdir()) == [copy]


def test_what_a_killed_process_left_between_the_renames_is_put_right(copy):
    before, model = contents(copy), load(copy)
    copy.rename(copy.with_name(".copy.old"))
    model.save_pretrained(copy)
    assert contents(copy) == before and list(copy.parent.iterdir()) == [copy]


def test_other_files_are_never_replaced(copy, tmp_path):
    model = load(copy)
    (copy / "results.json").write_text("{}")
    (tmp_path / "file").write_text("mine")
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine/config.json").write_text("{}")
    upstream = Path(shutil.copytree(copy, tmp_path / "upstream", ignore=lambda *_: ["results.json"]))
    (upstream / "artifact.metadata").write_text('{"dim": 16}')
    before = contents(copy)
    for path in (copy, tmp_path / "file", tmp_path / "mine", upstream):
        with pytest.raises(ValueError, match="nothing was changed"):
            model.save_pretrained(path)
    assert contents(copy) == before and (tmp_path / "mine/config.json").read_text() == "{}"


def test_an_empty_folder_and_missing_parents_are_fine(checkpoint, tmp_path):
    model = load(checkpoint)
    (tmp_path / "empty").mkdir()
    for path in (tmp_path / "empty", tmp_path / "a/b/c", tmp_path / "name.with.dots", tmp_path / "überall"):
        assert is_colbert_checkpoint(model.save_pretrained(path))
    assert not [p for p in tmp_path.rglob(".*")]
