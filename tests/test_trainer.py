"""RAGTrainer: bad input, the order of its checks, what reaches the stages, and what is left on disk."""

import json
import logging

import pytest
import torch
from transformers import AutoTokenizer, BertConfig, BertModel, T5Config

import colbert_nb.data
import colbert_nb.encoder
import colbert_nb.mining
import colbert_nb.training_run
from colbert_nb.corpus import minilm_path
from colbert_nb.trainer import Preset, RAGTrainer, choose_device, clean_documents, given, length_tokenizer, report_truncation

PAIRS = [(f"what is number {i}", f"number {i} follows number {i - 1}, and so on") for i in range(24)]


@pytest.fixture(scope="session")
def tiny(tmp_path_factory):
    "A BERT of one small layer with random weights and MiniLM's vocabulary."
    folder = tmp_path_factory.mktemp("models") / "tiny"
    tokenizer = AutoTokenizer.from_pretrained(minilm_path())
    torch.manual_seed(0)
    config = BertConfig(vocab_size=len(tokenizer), hidden_size=32, num_hidden_layers=1, num_attention_heads=2,
                        intermediate_size=64, max_position_embeddings=256)
    BertModel(config).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


@pytest.fixture
def prepared(tiny, tmp_path):
    trainer = RAGTrainer("run", tiny, n_usable_gpus=0)
    trainer.prepare_training_data(PAIRS, data_out_path=tmp_path / "data", mine_hard_negatives=False, num_new_negatives=2)
    return trainer


def nothing_is_loaded(*args, **kwargs):
    raise AssertionError("a model was loaded before the input was checked")


@pytest.mark.parametrize("name", ["", "  ", ".", "..", "a/b", "a\\b", "c:", "nul\0", None, 3])
def test_names_that_are_no_folder_names(name, tiny):
    with pytest.raises(ValueError, match="model_name"):
        RAGTrainer(name, tiny)


@pytest.mark.parametrize("model", ["./nothing", "/nothing/here", "a/b/c", "~/nothing here", "", None, 3, ["bert"]])
def test_models_that_are_not_there(model):
    with pytest.raises(ValueError, match="folder|Hub"):
        RAGTrainer("name", model)


def test_hub_that_does_not_answer(monkeypatch):
    def offline(*args, **kwargs):
        raise OSError("no network")

    monkeypatch.setattr("huggingface_hub.snapshot_download", offline)
    with pytest.raises(ValueError, match="somebody/some-model"):
        RAGTrainer("name", "somebody/some-model")


def test_models_that_are_no_encoders(tmp_path, tiny):
    T5Config().save_pretrained(tmp_path / "t5")
    (tmp_path / "gpt").mkdir()
    (tmp_path / "gpt/config.json").write_text('{"model_type": "gpt2"}')
    (tmp_path / "empty").mkdir()
    (tmp_path / "damaged").mkdir()
    (tmp_path / "damaged/config.json").write_text('{"model_type": ')
    for folder in ("t5", "gpt", "empty", "damaged"):
        with pytest.raises(ValueError):
            RAGTrainer("name", tmp_path / folder)
    with pytest.raises(ValueError):
        RAGTrainer("name", tiny / "config.json")


@pytest.mark.parametrize("gpus", [1.0, "1", True, None, -2, 99])
def test_devices_that_are_none(gpus, tiny):
    with pytest.raises(ValueError, match="n_usable_gpus"):
        RAGTrainer("name", tiny, n_usable_gpus=gpus)


def test_each_process_of_torchrun_has_its_gpu(monkeypatch, caplog):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    with caplog.at_level(logging.WARNING):
        assert choose_device() == torch.device("cuda", 0)
    assert "torchrun --nproc-per-node 2 script.py" in caplog.text
    caplog.clear()
    for rank in (0, 1):
        monkeypatch.setenv("LOCAL_RANK", str(rank))
        assert choose_device() == choose_device(2) == torch.device("cuda", rank) and choose_device(0) == torch.device("cpu")
    with pytest.raises(ValueError, match="--nproc-per-node 1"):
        choose_device(1)
    monkeypatch.setenv("LOCAL_RANK", "2")
    with pytest.raises(ValueError, match="--nproc-per-node 2"):
        choose_device()
    assert caplog.text == ""


def test_several_negatives_a_row_and_documents_as_in_vespa(tiny, tmp_path):
    trainer = RAGTrainer("run", tiny, n_usable_gpus=0)
    trainer.prepare_training_data(PAIRS, data_out_path=tmp_path / "data", mine_hard_negatives=False, num_new_negatives=6, nway=4)
    assert trainer.triples.shape[1] == 5
    best = trainer.train(batch_size=4, maxsteps=1, dim=16, output_dir=tmp_path / "runs", skip_punctuation_before_encoding=True)
    stored = json.loads((best / "artifact.metadata").read_text())
    assert stored["nway"] == 4 and stored["skip_punctuation_before_encoding"] is True


@pytest.mark.parametrize("language", [None, 3, "", ["en"]])
def test_languages_that_are_no_codes(language, tiny):
    with pytest.raises(ValueError, match="language"):
        RAGTrainer("name", tiny, language)


def test_nothing_heavy_is_loaded_by_the_constructor(tiny, monkeypatch):
    monkeypatch.setattr(colbert_nb.encoder.ColBERT, "from_pretrained", nothing_is_loaded)
    monkeypatch.setattr("transformers.AutoModel.from_pretrained", nothing_is_loaded)
    RAGTrainer("name", str(tiny))


@pytest.mark.parametrize("documents", ["text", b"text", {"content": "text"}, 5, [None], ["fine", 3], ["  "], [{"text": "x"}],
                                       ["\ud800"]])
def test_documents_that_are_none(documents, tiny):
    trainer = RAGTrainer("name", tiny)
    with pytest.raises(ValueError, match="documents"):
        trainer.add_documents(documents)
    assert trainer.collection == []


def test_documents_from_anything_that_can_be_read_through(tiny):
    trainer = RAGTrainer("name", tiny)
    trainer.add_documents(f"number {i}" for i in range(3))
    trainer.add_documents(({"content": "dict"}, "tuple"))
    assert trainer.collection == ["number 0", "number 1", "number 2", "dict", "tuple"]
    assert clean_documents([]) == []


def test_collection_and_documents_reach_the_data_and_the_collection_stays(tiny, tmp_path):
    trainer = RAGTrainer("name", tiny)
    trainer.add_documents(["from the collection"])
    prepare = lambda: trainer.prepare_training_data(iter(PAIRS), all_documents=iter(["from the call"]),
                                                    data_out_path=tmp_path / "data", mine_hard_negatives=False)
    files = {file.name: file.read_bytes() for file in prepare().iterdir()}
    corpus = files["corpus.train.colbert.tsv"].decode()
    assert "from the collection" in corpus and "from the call" in corpus
    assert trainer.collection == ["from the collection"]
    assert files == {file.name: file.read_bytes() for file in prepare().iterdir()}
    assert len(trainer.queries) == 22 and len(trainer.triples)
    with pytest.raises(ValueError, match="all_documents"):
        trainer.prepare_training_data(PAIRS, all_documents="text", data_out_path=tmp_path / "data")


def test_bad_rows_are_refused_before_a_model_is_loaded(tiny, tmp_path, monkeypatch):
    monkeypatch.setattr(colbert_nb.mining.HardNegativeMiner, "embed", nothing_is_loaded)
    trainer = RAGTrainer("name", tiny)
    for rows in ([], [("q", "p"), ("q", "p", "n")], [("q", 3)], [(None, "p")], [("q", " ")], [("q", "p", "p")], [("q", "p")]):
        with pytest.raises(ValueError):
            trainer.prepare_training_data(rows, data_out_path=tmp_path / "data")
    for bad in (dict(hard_negative_model_size="huge"), dict(hard_negative_minimum_rank=-1), dict(num_new_negatives=-1),
                dict(hard_negative_minimum_rank=50, hard_negative_maximum_rank=50), dict(validation_fraction=1.5),
                dict(hard_negative_model=tmp_path / "nothing")):
        with pytest.raises(ValueError):
            trainer.prepare_training_data(PAIRS, data_out_path=tmp_path / "data", **bad)
    assert not (tmp_path / "data").exists() and trainer.data_dir is None


def test_a_folder_of_other_files_is_refused_before_a_model_is_loaded(tiny, tmp_path, monkeypatch):
    monkeypatch.setattr(colbert_nb.mining.HardNegativeMiner, "embed", nothing_is_loaded)
    (tmp_path / "thesis.txt").write_text("mine")
    with pytest.raises(ValueError, match="thesis.txt"):
        RAGTrainer("name", tiny).prepare_training_data(PAIRS, data_out_path=tmp_path)
    assert [file.name for file in tmp_path.iterdir()] == ["thesis.txt"]


@pytest.mark.parametrize("arguments, expected", [
    (dict(), ("OrdalieTech/Solon-embeddings-base-0.1", 10, 110)),
    (dict(hard_negative_model_size="large"), ("OrdalieTech/Solon-embeddings-large-0.1", 10, 110)),
    (dict(hard_negative_minimum_rank=200), ("OrdalieTech/Solon-embeddings-base-0.1", 200, 300)),
    (dict(hard_negative_maximum_rank=40, hard_negative_model="some/model"), ("some/model", 10, 40)),
])
def test_what_reaches_the_miner(arguments, expected, tiny, tmp_path, monkeypatch):
    seen = []

    class Recorder:
        def __init__(self, model, *, min_rank, max_rank, seed, device):
            seen.append((model, min_rank, max_rank))
            assert seed == 42 and device == torch.device("cpu")

        def mine(self, queries, corpus, positives, n):
            assert n == 3
            return {q: [p for p in range(len(corpus)) if p not in known][:n] for q, known in positives.items()}

    monkeypatch.setattr(colbert_nb.mining, "HardNegativeMiner", Recorder)
    trainer = RAGTrainer("name", tiny, "fr", n_usable_gpus=0)
    trainer.prepare_training_data(PAIRS, data_out_path=tmp_path / "data", num_new_negatives=3, **arguments)
    assert seen == [expected]


def test_no_new_negatives_no_miner(tiny, tmp_path, monkeypatch):
    monkeypatch.setattr(colbert_nb.mining, "HardNegativeMiner", nothing_is_loaded)
    rows = [(query, passage, f"not {passage}") for query, passage in PAIRS]
    trainer = RAGTrainer("name", tiny)
    trainer.prepare_training_data(rows, data_out_path=tmp_path / "data", num_new_negatives=0)
    assert len(trainer.triples) == len(trainer.queries)


@pytest.mark.parametrize("bad", [dict(batch_size=1), dict(batch_size=0, use_ib_negatives=False), dict(maxsteps=0),
                                 dict(accumsteps=0), dict(epochs=0), dict(batch_size="32"), dict(warmup_steps=-1)])
def test_bad_sizes_are_refused_before_a_model_is_loaded(bad, prepared, tmp_path, monkeypatch):
    monkeypatch.setattr(colbert_nb.encoder.ColBERT, "from_pretrained", nothing_is_loaded)
    with pytest.raises(ValueError):
        prepared.train(output_dir=tmp_path / "runs", **bad)
    assert not (tmp_path / "runs").exists()


def test_train_wants_data_and_a_free_name(prepared, tiny, tmp_path, monkeypatch):
    monkeypatch.setattr(colbert_nb.encoder.ColBERT, "from_pretrained", nothing_is_loaded)
    with pytest.raises(ValueError, match="prepare_training_data"):
        RAGTrainer("run", tiny).train(output_dir=tmp_path / "runs")
    (tmp_path / "runs/run").mkdir(parents=True)
    (tmp_path / "runs/run/mine.txt").write_text("mine")
    with pytest.raises(ValueError, match="mine.txt"):
        prepared.train(output_dir=tmp_path / "runs")
    assert (tmp_path / "runs/run/mine.txt").read_text() == "mine"
    prepared.data_dir = tmp_path / "gone"
    with pytest.raises(ValueError, match="prepare_training_data"):
        prepared.train(output_dir=tmp_path / "other")


def test_sizes_that_the_encoder_has_not(prepared, tmp_path):
    for bad in (dict(), dict(dim=33), dict(dim=16, doc_maxlen=300), dict(dim=16, query_maxlen=257), dict(dim=16, init="best")):
        with pytest.raises(ValueError):
            prepared.train(output_dir=tmp_path / "runs", **bad)
    assert not (tmp_path / "runs").exists()


def test_a_run_and_a_second_one_from_its_checkpoint(prepared, tmp_path):
    best = prepared.train(batch_size=4, maxsteps=2, dim=16, doc_maxlen=40, query_maxlen=12, nbits=4, use_relu=True,
                          query_expansion=False, output_dir=tmp_path / "runs", learning_rate=1e-3, bf16=False)
    assert best == prepared.model_path and tmp_path / "runs/run" in best.parents
    stored = json.loads((best / "artifact.metadata").read_text())
    expected = dict(dim=16, doc_maxlen=40, query_maxlen=12, nbits=4, relu=True, query_expansion=False, use_ib_negatives=True)
    assert {name: stored[name] for name in expected} == expected
    assert length_tokenizer(best).doc_maxlen == 40

    second = RAGTrainer("second", best, n_usable_gpus=0)
    second.data_dir = prepared.data_dir
    with pytest.raises(ValueError, match="128"):
        second.train(batch_size=4, maxsteps=1, dim=128, output_dir=tmp_path / "runs")
    path = second.train(batch_size=4, maxsteps=1, query_maxlen=20, output_dir=tmp_path / "runs")
    stored = json.loads((path / "artifact.metadata").read_text())
    expected |= dict(query_maxlen=20, nbits=2, relu=False)
    assert {name: stored[name] for name in expected} == expected


def test_named_settings_and_others_reach_the_run(prepared, tmp_path):
    wanted = dict(mini_batch_size=2, matryoshka_dims=[8], dropout=0.1, shuffle=False, validation_metric="MRR@10", validation_passages=20,
                  early_stopping_patience=3, bf16=False, loss="contrastive")
    best = prepared.train(batch_size=4, maxsteps=1, dim=16, output_dir=tmp_path / "runs", max_grad_norm=1.5, **wanted)
    settings = json.loads((best.parent / "run.json").read_text())["settings"]
    expected = wanted | {"max_grad_norm": 1.5, "engine": "colbert_nb"}
    assert {name: settings[name] for name in expected} == expected
    with pytest.raises(ValueError, match="F-score"):
        prepared.train(output_dir=tmp_path / "other", validation_metric="F-score")


def test_the_same_call_gives_the_same_model(prepared, tmp_path):
    run = lambda name: prepared.train(batch_size=4, maxsteps=2, dim=16, output_dir=tmp_path / name)
    one, two = run("one"), run("two")
    assert (one / "model.safetensors").read_bytes() == (two / "model.safetensors").read_bytes()


def test_export_copies_whole_or_not_at_all(prepared, tiny, tmp_path):
    with pytest.raises(ValueError, match="prepare_training_data"):
        RAGTrainer("name", tiny).export_training_data(tmp_path / "copy")
    files = {file.name: file.read_bytes() for file in prepared.data_dir.iterdir()}
    for _ in range(2):
        copy = prepared.export_training_data(tmp_path / "deep/copy")
        assert {file.name: file.read_bytes() for file in copy.iterdir()} == files
    assert [path.name for path in (tmp_path / "deep").iterdir()] == ["copy"]
    assert prepared.export_training_data(prepared.data_dir) == prepared.data_dir
    (tmp_path / "taken").mkdir()
    (tmp_path / "taken/notes.txt").write_text("mine")
    with pytest.raises(ValueError, match="notes.txt"):
        prepared.export_training_data(tmp_path / "taken")
    with open(prepared.data_dir / "queries.train.colbert.tsv", "a", encoding="utf-8") as file:
        file.write("one more\n")
    with pytest.raises(ValueError):
        prepared.export_training_data(tmp_path / "damaged")
    assert not (tmp_path / "damaged").exists()


def test_truncation_is_counted_on_a_sample_and_said(tiny, caplog):
    tokenizer = length_tokenizer(tiny)
    short, long = "a word", "word " * 400
    with caplog.at_level(logging.INFO, "colbert_nb.trainer"):
        assert report_truncation(tokenizer, [short] * 3, [short, long]) == {"queries": 0, "documents": 0.5}
    assert [record.levelname for record in caplog.records] == ["INFO", "WARNING"]
    assert "50.0% of the documents are longer than doc_maxlen=256" in caplog.text
    share = report_truncation(tokenizer, [short], [short, long] * 200, sample=100)["documents"]
    assert 0.3 < share < 0.7 and share == report_truncation(tokenizer, [short], [short, long] * 200, sample=100)["documents"]


def test_presets_are_numbers():
    assert Preset(128) == 128 and repr(Preset(128)) == "128" and json.dumps(Preset(128)) == "128"
    assert given(Preset(128)) is None and given(128) == 128 and given(None) is None
