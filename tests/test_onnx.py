"""The ONNX file answers as the model does, for every family of encoders; without PyTorch; and what is in the way stays."""

import json
import subprocess
import sys

import numpy as np
import pytest
import torch
import transformers
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from tiny import make_encoder

from colbert_nb.encoder import ColBERT
from colbert_nb.onnx import TOLERANCE, compare_with_model, export_to_vespa_onnx, runtime_settings, tokenizer_json
from colbert_nb.onnx_quantize import measure_cost
from colbert_nb.onnx_runtime import OnnxColBERT, TokenRules

SIZES = dict(vocab_size=67, hidden_size=16, num_hidden_layers=1, num_attention_heads=2, intermediate_size=32)
POSITIONS = dict(SIZES, max_position_embeddings=42, pad_token_id=0)  # they count from the padding's id on
FAMILIES = {
    "xlm-roberta": lambda: transformers.XLMRobertaConfig(**POSITIONS),
    "mpnet": lambda: transformers.MPNetConfig(**{**POSITIONS, "max_position_embeddings": 520}),  # it counts from 1 whatever the padding is
    "modernbert": lambda: transformers.ModernBertConfig(**SIZES, pad_token_id=0, bos_token_id=4, eos_token_id=5, cls_token_id=4, sep_token_id=5,
                                                        global_attn_every_n_layers=2, local_attention=8, max_position_embeddings=40),
}


def checkpoint_of(folder, family=None, **options):
    "A saved ColBERT on a random encoder."
    encoder = make_encoder(folder / "encoder")
    if family:
        torch.manual_seed(0)
        transformers.AutoModel.from_config(FAMILIES[family]()).save_pretrained(encoder)
    sizes = {"dim": 16, "query_maxlen": 8, "doc_maxlen": 16, **options}
    return ColBERT.from_pretrained(encoder, device="cpu", **sizes).save_pretrained(folder / "colbert")


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    "A checkpoint and its file."
    folder = tmp_path_factory.mktemp("onnx")
    checkpoint = checkpoint_of(folder)
    return checkpoint, export_to_vespa_onnx(checkpoint, folder / "vespa")


TEXTS = ["word1 word2", "", "word3", "word1 " * 40, "unknown [MASK] [PAD] word5", "word9 word8 word7"]


@pytest.mark.parametrize("family", FAMILIES)
def test_every_family_passes_the_check_and_encodes_as_the_model(family, tmp_path):
    checkpoint = checkpoint_of(tmp_path, family, dim=12)
    small = OnnxColBERT(export_to_vespa_onnx(checkpoint, tmp_path / "vespa"))
    model = ColBERT.from_pretrained(checkpoint, device="cpu")
    assert small.settings["report"]["float32"]["largest_difference"] <= TOLERANCE
    for ours, theirs in ((small.encode_queries, model.encode_queries), (small.encode_documents, model.encode_documents)):
        for got, wanted in zip(ours(TEXTS), theirs(TEXTS)):
            assert got.shape == tuple(wanted.shape) and np.abs(got - wanted.numpy()).max() < 1e-5


def test_a_quantized_file_is_checked_and_near(made, tmp_path):
    checkpoint, file = made
    smaller = export_to_vespa_onnx(checkpoint, tmp_path, quantize="int8")
    report = OnnxColBERT(smaller).settings["report"]
    assert report["quantize"] == "int8" and report["float32"]["largest_difference"] <= TOLERANCE and report["int8"]["mean_cosine"] > 0.95
    assert smaller.stat().st_size < file.stat().st_size
    cost = measure_cost(ColBERT.from_pretrained(checkpoint, device="cpu"), smaller, TEXTS[:1], TEXTS, {0: {0: 1}})
    assert cost["token_cosine"] > 0.9 and set(cost) == {"token_cosine", "overlap@10", "nDCG@10 model", "nDCG@10 file", "nDCG@10 change"}


@pytest.fixture(scope="module")
def rules(made):
    "Rules and tokenizer of every choice, made once."
    choices = ({}, {"query_expansion": False}, {"attend_to_mask_tokens": True}, {"mask_punctuation": False}, {"skip_punctuation_before_encoding": True})
    models = [ColBERT.from_pretrained(made[0], device="cpu", **options) for options in choices]
    return [(TokenRules(tokenizer_json(model), runtime_settings(model)), model.tokenizer) for model in models]


WORDS = st.lists(st.sampled_from(["word1", "word2", ",", "!", "[MASK]", "[PAD]", "[SEP]", "é", "\u2028", "  "]), max_size=30).map(" ".join)


@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(st.lists(st.one_of(WORDS, st.text(st.characters(exclude_categories=["Cs"]), max_size=40)), min_size=1, max_size=5))
def test_ids_and_masks_are_the_tokenizers_own(rules, texts):
    for ours, theirs in rules:
        for kind in ("queries", "documents"):
            for got, wanted in zip(getattr(ours, kind)(texts), getattr(theirs, kind)(texts)):
                assert np.array_equal(got, wanted.numpy())


def test_encodes_where_torch_cannot_be_imported(made):
    code = ("import sys\n"
            "for name in ('torch', 'transformers', 'onnx', 'sentence_transformers'): sys.modules[name] = None\n"
            "from colbert_nb.onnx_runtime import OnnxColBERT\n"
            "model = OnnxColBERT(sys.argv[1], threads=1)\n"
            "print([len(v) for v in model.encode_queries(['word1']) + model.encode_documents(['word1 word2', ''])], model.encode_queries([]))")
    ran = subprocess.run([sys.executable, "-c", code, str(made[1].parent)], capture_output=True, text=True)
    assert ran.stdout.strip() == "[8, 5, 3] []", ran.stderr


def test_two_models_do_not_share_a_tokenizer(made, tmp_path):
    checkpoint, file = made
    (tmp_path / "theirs.onnx").write_bytes(file.read_bytes())
    (tmp_path / "tokenizer.json").write_text("{}")
    with pytest.raises(ValueError, match="theirs.onnx"):
        export_to_vespa_onnx(checkpoint, tmp_path)
    with pytest.raises(ValueError, match="got another in its place"):
        OnnxColBERT(tmp_path / "theirs.onnx")


def test_the_tokenizer_cuts_nothing_and_the_report_says_what_was_done(made):
    stored = json.loads((made[1].parent / "tokenizer.json").read_text(encoding="utf-8"))
    report = OnnxColBERT(made[1]).settings["report"]
    assert stored["truncation"] is None and stored["padding"] is None
    assert report["checked"] and report["batches"] == [1, 2, 7] and report["opset"] == 18
    again = compare_with_model(made[1], ColBERT.from_pretrained(made[0], device="cpu"))
    assert again["largest_difference"] <= TOLERANCE
