"""What `save_pretrained` writes for other libraries: the same vectors there, also where colbert-ai's format has no word."""

import json
import logging
import shutil
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from test_backbones import DOCUMENTS, QUERIES, make
from tiny import fresh, made_data
from transformers import AutoModel, AutoTokenizer

from colbert_nb.encoder import ColBERT
from colbert_nb.encoder_loaders import PYLATE_FILES, blank_after, skipped_words, unsaid, warn_once
from colbert_nb.hub_check import find_problems, hub_files
from colbert_nb.training_run import train_colbert

pytestmark = pytest.mark.filterwarnings("ignore")
LENGTHS = dict(dim=16, query_maxlen=32, doc_maxlen=48, device="cpu")
TEXTS = [[text for text in texts if text] for texts in (QUERIES, DOCUMENTS)]


def same_there(ours: ColBERT, folder: Path) -> None:
    "sentence-transformers reads the folder and computes what we do."
    from sentence_transformers import MultiVectorEncoder
    theirs = MultiVectorEncoder(str(folder), device="cpu")
    queries, documents = TEXTS
    for own, other in ((ours.encode_queries(queries), theirs.encode_query(queries)), (ours.encode_documents(documents), theirs.encode_document(documents))):
        for a, b in zip(own, other, strict=True):
            torch.testing.assert_close(a, torch.as_tensor(b).cpu(), rtol=0, atol=1e-5)


def names(folder: Path) -> list[str]:
    return sorted(p.relative_to(folder).as_posix() for p in folder.rglob("*") if p.is_file())


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    return {name: make(name, tmp_path_factory.mktemp(name)) for name in ("bert", "roberta", "xlm-roberta", "modernbert")}


MARKERS = ["query_token_id", "doc_token_id"]


@pytest.mark.parametrize("family, options, expected", [
    ("bert", {}, []),
    ("bert", dict(query_expansion=False), ["query_expansion"]),
    ("bert", dict(mask_punctuation=False), ["mask_punctuation"]),
    ("bert", dict(attend_to_mask_tokens=True), []),
    ("roberta", {}, MARKERS),
    ("roberta", dict(query_expansion=False, mask_punctuation=False), ["query_expansion", "mask_punctuation", *MARKERS]),
    ("modernbert", {}, MARKERS),
    ("xlm-roberta", {}, ["skiplist_words"]),
])
def test_the_same_vectors_there(folders, tmp_path, family, options, expected):
    model = ColBERT.from_pretrained(folders[family], **LENGTHS, **options)
    folder = model.save_pretrained(tmp_path / "saved")
    settings = json.loads((folder / "artifact.metadata").read_text())
    assert unsaid(model.tokenizer.tokenizer, settings) == expected and settings["root"] == "experiments"  # RAGatouille's index asks for it
    assert {p.name for p in folder.iterdir()} & set(PYLATE_FILES) == (set(PYLATE_FILES) if expected else set())
    same_there(model, folder)
    assert json.loads((folder / "tokenizer_config.json").read_text())["tokenizer_class"] != "TokenizersBackend"
    again = ColBERT.from_pretrained(folder, device="cpu")
    assert all(torch.equal(a, b) for a, b in zip(again.encode_queries(TEXTS[0]), model.encode_queries(TEXTS[0])))
    second = again.save_pretrained(tmp_path / "second")
    assert names(second) == names(folder) and all((second / name).read_bytes() == (folder / name).read_bytes() for name in names(folder))


def foreign(encoder: Path, folder: Path, markers: list[str]) -> Path:
    "A folder of PyLate with these prefixes."
    tokenizer, model = AutoTokenizer.from_pretrained(encoder), AutoModel.from_pretrained(encoder)
    tokenizer.add_tokens([marker for marker in markers if marker])
    model.resize_token_embeddings(len(tokenizer), mean_resizing=False)
    tokenizer.save_pretrained(folder)
    model.save_pretrained(folder)
    (folder / "1_Dense").mkdir()
    save_file({"linear.weight": torch.randn(16, 32)}, folder / "1_Dense/model.safetensors")
    for name, content in (("modules.json", [{"type": "x.Transformer", "path": ""}, {"type": "pylate.models.Dense.Dense", "path": "1_Dense"}]),
                          ("1_Dense/config.json", {"in_features": 32, "out_features": 16, "bias": False}),
                          ("config_sentence_transformers.json", {"model_type": "ColBERT", "query_prefix": markers[0], "document_prefix": markers[1],
                                                                 "query_length": 32, "document_length": 48})):
        (folder / name).write_text(json.dumps(content))
    return folder


@pytest.mark.parametrize("family", ["bert", "roberta"])
@pytest.mark.parametrize("markers", [["[Q] ", "[D] "], ["", ""]])
def test_markers_of_pylate_come_back_as_they_were(folders, tmp_path, family, markers):
    model = ColBERT.from_pretrained(foreign(folders[family], tmp_path / "pylate", markers), device="cpu")
    folder = model.save_pretrained(tmp_path / "saved")
    told = json.loads((folder / "config_sentence_transformers.json").read_text())
    assert [told["query_prefix"], told["document_prefix"]] == markers and told["prompts"] == dict(zip(("query", "document"), markers))
    same_there(model, folder)


def test_words_of_the_skiplist_are_looked_up_and_not_split(folders):
    bert, xlmr = (AutoTokenizer.from_pretrained(folders[name]) for name in ("bert", "xlm-roberta"))
    assert ";" in skipped_words(bert, {"mask_punctuation": True}) and skipped_words(bert, {"mask_punctuation": False}) == []
    words = skipped_words(xlmr, {"mask_punctuation": True})
    assert set(xlmr.convert_tokens_to_ids(words)) == {ids[0] for ids in xlmr(list("!,.;?"), add_special_tokens=False)["input_ids"]} | {
        ids[0] for ids in xlmr(list("#$%"), add_special_tokens=False)["input_ids"]}
    assert skipped_words(xlmr, {"mask_punctuation": True, "skiplist_words": ["▁"]}) == ["▁"]


def test_a_blank_is_a_part_of_a_word_or_nothing(folders):
    blanks = {name: [blank_after(AutoTokenizer.from_pretrained(folders[name]), token, (blank,)) for blank in ("", " ")]
              for name, token in (("bert", "[MASK]"), ("roberta", "<mask>"))}
    assert blanks == {"bert": ["", " "], "roberta": ["", None]}


def test_a_model_without_expansion_is_warned_of_once(encoder, tmp_path, caplog):
    model = fresh(encoder, query_expansion=False)
    warn_once.cache_clear()
    with caplog.at_level(logging.WARNING, "colbert_nb"):
        for name in "ab":
            model.save_pretrained(tmp_path / name)
    assert caplog.text.count("colbert-ai and RAGatouille fill them up to query_maxlen=8") == 1
    caplog.clear()
    warn_once.cache_clear()
    fresh(encoder).save_pretrained(tmp_path / "c")
    assert not caplog.text


def test_small_files_go_where_the_checkpoint_goes(encoder, tmp_path):
    model = fresh(encoder, query_expansion=False)
    best = train_colbert(model, replace(made_data(), validation=[]), tmp_path / "run", batch_size=6, maxsteps=2)
    assert set(PYLATE_FILES) <= {p.name for p in best.iterdir()}
    assert torch.equal(load_file(best / "1_Dense/model.safetensors")["linear.weight"], load_file(best / "model.safetensors")["linear.weight"])
    assert [file.name for file in hub_files(best)] == names(best) and not find_problems(best)
    another = shutil.copytree(best, tmp_path / "another")
    save_file({"linear.weight": torch.zeros(16, 32)}, another / "1_Dense/model.safetensors")
    assert "linear.weight in 1_Dense to be the checkpoint's own" in str(find_problems(another))
    shutil.rmtree(another / "1_Dense")
    assert "which modules.json names, got none" in str(find_problems(another))


def test_small_files_go_with_the_model_that_needed_them(encoder, tmp_path):
    fresh(encoder, query_expansion=False).save_pretrained(tmp_path / "saved")
    assert (tmp_path / "saved/modules.json").is_file()
    fresh(encoder).save_pretrained(tmp_path / "saved")
    assert not (tmp_path / "saved/modules.json").exists() and not (tmp_path / "saved/1_Dense").exists()
