"""Vespa: bits, inputs and files over drawn values; nothing but ValueError for damaged files; an application through its ONNX file."""

import json
import math
import shutil
import zipfile
from pathlib import Path

import numpy as np
import onnx
import pytest
from hypothesis import given, settings, strategies as st
from onnx import TensorProto, helper
from tiny import WORDS, fresh, make_encoder

from colbert_nb.encoder import ColBERT
from colbert_nb.vespa import application_embedder, export_vespa_application, query_tensor, write_feed
from colbert_nb.vespa_check import check_schema, check_services, parse_schema
from colbert_nb.vespa_embedder import (VESPA_DEFAULTS, VespaEmbedder, differences, embedder_settings, pack_bits, transformer_input, unpack_bits,
                                       vespa_run, vespa_scores)
from colbert_nb.vespa_files import schema_text, services_xml, vector_fields
from colbert_nb.vespa_rank import Calculator, Tensor


@pytest.fixture(scope="module")
def encoder(tmp_path_factory):
    return make_encoder(tmp_path_factory.mktemp("encoder"))


@pytest.fixture(scope="module")
def checkpoint(encoder, tmp_path_factory):
    return fresh(encoder, skip_punctuation_before_encoding=True).save_pretrained(tmp_path_factory.mktemp("colbert") / "checkpoint")


@pytest.fixture(scope="module")
def application(checkpoint, tmp_path_factory):
    return export_vespa_application(checkpoint, tmp_path_factory.mktemp("vespa") / "application", vectors=["bits", "float"], matryoshka_dims=[8],
                                    check=False)


@pytest.fixture
def quick(application, monkeypatch):
    "Further applications take the ONNX file that one has; the exporter has tests of its own."
    import colbert_nb.onnx

    def copied(colbert_path, out_path, **options):
        out_path.mkdir()
        shutil.copy(Path(colbert_path) / "tokenizer.json", out_path)
        return Path(shutil.copy(application / "models/vespa_colbert.onnx", out_path))
    monkeypatch.setattr(colbert_nb.onnx, "export_to_vespa_onnx", copied)


# What is computed

@given(st.integers(1, 5), st.integers(1, 4), st.integers(0, 2**32 - 1))
def test_bits_are_those_of_a_loop(tokens, n_bytes, seed):
    vectors = np.random.default_rng(seed).integers(-1, 2, (tokens, 8 * n_bytes)).astype(np.float32)
    packed = pack_bits(vectors)
    assert packed.dtype == np.int8 and packed.shape == (tokens, n_bytes)
    for row, bits in zip(vectors, packed):
        assert [int(byte) % 256 for byte in bits] == [sum(2 ** (7 - i) for i in range(8) if row[8 * k + i] > 0) for k in range(n_bytes)]
    assert np.array_equal(unpack_bits(packed), (vectors > 0).astype(np.float32))


@given(st.lists(st.integers(5, 40), max_size=30), st.integers(4, 12), st.integers(4, 12), st.integers(4, 12), st.sets(st.integers(5, 40)))
def test_inputs_keep_to_their_lengths(words, queries, documents, most, skipped):
    chosen = VESPA_DEFAULTS | {"max_tokens": most, "max_query_tokens": queries, "max_document_tokens": documents}
    ids, attention = transformer_input(words, "query", chosen, frozenset(skipped))
    assert len(ids) == len(attention) == min(queries, most) and ids[:2] == [101, 1]
    assert [i for i, a in zip(ids, attention) if a] == [101, 1, *words[:min(queries, most) - 3], 102]
    assert {i for i, a in zip(ids, attention) if not a} <= {103}
    ids, attention = transformer_input(words, "document", chosen, frozenset(skipped))
    assert ids == [101, 2, *[w for w in words if w not in skipped][:min(documents, most) - 3], 102] and attention == [1] * len(ids)


@given(st.integers(0, 2**32 - 1), st.lists(st.integers(1, 6), min_size=1, max_size=6), st.booleans())
@settings(max_examples=50)
def test_scores_are_those_of_the_expression(seed, lengths, bits):
    draw = np.random.default_rng(seed)
    query, documents = draw.normal(size=(3, 16)).astype(np.float32), [draw.normal(size=(n, 16)).astype(np.float32) for n in lengths]
    kept = [pack_bits(d) for d in documents] if bits else documents
    field = "unpack_bits(attribute(c))" if bits else "attribute(c)"
    tensor = lambda dim, values: Tensor((dim, "x"), values, frozenset("x"))
    found = [Calculator({"query(qt)": tensor("qt", query), "attribute(c)": tensor("dt", d)}).calculate(
        f"sum(reduce(sum(query(qt) * {field}, x), max, dt), qt)").values for d in kept]
    assert np.allclose(vespa_scores(query, kept), found, atol=1e-4)
    run = vespa_run([query], kept, k=3)["0"]
    assert list(run) == [str(i) for i in sorted(range(len(kept)), key=lambda i: -vespa_scores(query, kept)[i])[:3]]


def test_equal_scores_stand_in_the_order_of_the_documents():
    same = [np.eye(8, dtype=np.float32)[:2]] * 4
    assert list(vespa_run([np.eye(8, dtype=np.float32)], same)["0"]) == ["0", "1", "2", "3"]


# Files that are damaged

SCHEMA, SERVICES = schema_text(16, vectors=["bits", "float"], dims=[8]), services_xml(VESPA_DEFAULTS)


@given(st.sampled_from([(SCHEMA, check_schema), (SERVICES, check_services)]), st.data())
@settings(max_examples=300, deadline=None)
def test_a_damaged_file_is_refused_or_read_and_nothing_else(case, data):
    text, check = case
    start = data.draw(st.integers(0, len(text) - 1))
    end = data.draw(st.integers(start, min(len(text), start + 30)))
    try:
        check(text[:start] + data.draw(st.text("abx{}()<>:.,|0 \n\"#é", max_size=5)) + text[end:])
    except ValueError:
        pass


def test_a_schema_has_one_place_for_each_line():
    lines = SCHEMA.splitlines()
    for number, line in enumerate(lines):
        if line.strip() not in ("}", ""):
            with pytest.raises(ValueError):
                check_schema("\n".join([*lines[:number], line.replace(line.split()[0], "what" + line.split()[0], 1), *lines[number + 1:]]))
    assert parse_schema("# a remark\n" + SCHEMA.replace("rank-profile bm25", "\n  rank-profile bm25")).name == "doc"


@pytest.mark.parametrize("change, message", [
    (("<search/>", ""), "search once"), (("<search/>", "<search/><search/>"), "2 times"), (('mode="index"', ""), "attribute mode"),
    (('mode="index"', 'mode="index" global="true"'), "global not to be there"), (("<max-tokens>512</max-tokens>", "<max-tokens>0</max-tokens>"), "max-tokens"),
    (("models/vespa_colbert.onnx", "/etc/model.onnx"), "path"), (("colbert-embedder", "bert-embedder"), "type"), (("services", "service"), "services"),
    (("<query-token-id>1</query-token-id>", "<query-token-id>[unused0]</query-token-id>"), "query-token-id"),
    (("<max-document-tokens>512", "<max-document-tokens>513"), "at most max-tokens")])
def test_services_by_table(change, message):
    with pytest.raises(ValueError, match=message):
        check_services(SERVICES.replace(*change))


@pytest.mark.parametrize("expression", [
    "", "sum(", "sum(query(qt),", "sum(query(qt),)", "query(qt) +", "1 2", ")", "reduce(query(qt))", "reduce(query(qt), max, )", "loop", "query(qt", "sum(query(qt), x, x, q)"])
def test_expressions_that_cannot_be_read(expression):
    features = {"query(qt)": Tensor(("qt", "x"), np.ones((2, 8), np.float32), frozenset("x"))}
    with pytest.raises(ValueError):
        Calculator(features, {"loop": "1 + again", "again": "loop"}).calculate(expression)


def test_precedence_is_the_usual_one():
    calculate = lambda text: float(Calculator({}).calculate(text).values)
    assert calculate("1 + 2 * 3 - 8 / 4 / 2") == 6 and calculate("(1 + 2) * 3") == 9 and calculate("2 - 3 - 4") == -5 and calculate("0.5*4") == 2


def test_fields_and_their_sizes():
    assert vector_fields(128, ["bits", "bfloat16"], [64]) == {"colbert": ("bits", 128), "colbert_64": ("bits", 64),
                                                              "colbert_bfloat16": ("bfloat16", 128), "colbert_bfloat16_64": ("bfloat16", 64)}
    text = schema_text(20, vectors=["float"])
    assert "tensor<float>(dt{}, x[20])" in text and "unpack_bits" not in text
    assert math.prod(t.size("x") for t in check_schema(SCHEMA)["colbert_8"].features.values() if "qt_8" in t.dims) == 8


# Feeding

@given(st.lists(st.text(st.characters(exclude_categories=["Cs"])), min_size=1, max_size=4))
@settings(max_examples=60, deadline=None)
def test_any_text_is_one_line_of_the_feed(tmp_path_factory, corpus):
    path = write_feed(tmp_path_factory.mktemp("feed") / "feed.jsonl", corpus, titles=corpus, name="texts")
    rows = [json.loads(line) for line in path.read_text(encoding="utf-8").split("\n")[:-1]]
    assert [row["put"] for row in rows] == [f"id:texts:texts::{i}" for i in range(len(corpus))]
    for row, text in zip(rows, corpus):
        assert len(row["fields"]["text"]) == len(text) and row["fields"]["title"] == row["fields"]["text"]
        assert all(a == b or a == " " for a, b in zip(row["fields"]["text"], text)) and "\x00" not in row["fields"]["text"]


@pytest.mark.parametrize("options, message", [
    (dict(corpus=["a", None]), "row 1: expected text"), (dict(corpus=["a\ud800"]), "row 0"), (dict(corpus=["a"], titles=[]), "0 titles"),
    (dict(corpus=["a", "b"], ids=["1", "1"]), "1 ids")])
def test_feeds_that_are_refused(tmp_path, options, message):
    with pytest.raises(ValueError, match=message):
        write_feed(tmp_path / "feed.jsonl", **options)
    assert not list(tmp_path.iterdir())


def test_query_tensors_are_json():
    assert json.loads(json.dumps(query_tensor(np.ones((2, 2), np.float32)))) == {"0": [1.0, 1.0], "1": [1.0, 1.0]}
    with pytest.raises(ValueError, match="vectors of one query"):
        query_tensor(np.ones(3))


# The embedder

def test_ids_of_another_vocabulary_are_configured(encoder):
    model = fresh(encoder, skip_punctuation_before_encoding=True)
    chosen = embedder_settings(model)
    assert chosen | {"transformer_start_sequence_token": 4, "transformer_end_sequence_token": 5, "transformer_mask_token": 6, "max_tokens": 64,
                     "max_query_tokens": 8, "max_document_tokens": 16} == chosen
    vespa, texts = VespaEmbedder(model), [" ".join(WORDS[i:i + n]) for i, n in ((0, 3), (5, 30))]
    for text in texts:
        assert np.allclose(vespa.embed_query(text), model.encode_queries([text])[0], atol=1e-5)
        assert np.allclose(vespa.embed_document(text), model.encode_documents([text])[0], atol=1e-5)
    assert differences(model) == []


@pytest.mark.parametrize("options, parts", [
    (dict(), ["before the encoder"]), (dict(query_expansion=False), ["fills every query", "before the encoder"]),
    (dict(attend_to_mask_tokens=True), ["does not attend", "before the encoder"]), (dict(mask_punctuation=False), ["trained to score it"])])
def test_differences_are_named(encoder, options, parts):
    found = differences(fresh(encoder, **options))
    assert len(found) == len(parts) and all(part in text for part, text in zip(parts, found))


def graph(path, inputs, output):
    "An ONNX file that gives ones, with chosen names."
    ids = [helper.make_tensor_value_info(name, TensorProto.INT64, ["b", "s"]) for name in inputs]
    nodes = [helper.make_node("Cast", [inputs[0]], ["f"], to=TensorProto.FLOAT), helper.make_node("Unsqueeze", ["f", "axis"], [output])]
    axis = helper.make_tensor("axis", TensorProto.INT64, [1], [2])
    made = helper.make_graph(nodes, "g", ids, [helper.make_tensor_value_info(output, TensorProto.FLOAT, ["b", "s", 1])], [axis])
    onnx.save(helper.make_model(made, opset_imports=[helper.make_opsetid("", 18)], ir_version=9), path)


@pytest.mark.parametrize("inputs, output", [
    (["input_ids", "attention_mask", "token_type_ids"], "contextual"), (["input_ids"], "contextual"), (["input_ids", "attention_mask"], "last_hidden_state")])
def test_a_file_that_vespa_cannot_feed_is_refused(checkpoint, tmp_path, inputs, output):
    (tmp_path / "tokenizer.json").write_bytes((checkpoint / "tokenizer.json").read_bytes())
    graph(tmp_path / "model.onnx", inputs, output)
    with pytest.raises(ValueError, match="all that Vespa feeds"):
        VespaEmbedder(tmp_path / "model.onnx")


def test_the_tokenizers_own_limit_is_obeyed(checkpoint, tmp_path):
    saved = json.loads((checkpoint / "tokenizer.json").read_text(encoding="utf-8"))
    saved["truncation"] = {"direction": "Right", "max_length": 4, "strategy": "LongestFirst", "stride": 0}
    (tmp_path / "tokenizer.json").write_text(json.dumps(saved), encoding="utf-8")
    graph(tmp_path / "model.onnx", ["input_ids", "attention_mask"], "contextual")
    assert len(VespaEmbedder(tmp_path / "model.onnx").embed_document(" ".join(WORDS))) == 4 + 3


# The application

def test_an_application_computes_what_the_checkpoint_does(checkpoint, application):
    model, served = ColBERT.from_pretrained(checkpoint, device="cpu"), application_embedder(application)
    for text in (" ".join(WORDS[:3]), " ".join(WORDS[5:40])):
        assert np.allclose(served.embed_query(text), model.encode_queries([text])[0], atol=1e-4)
        assert np.allclose(served.embed_document(text), model.encode_documents([text])[0], atol=1e-4)
        assert np.array_equal(served.embed_document(text, bits=True, dim=8), pack_bits(served.embed_document(text)[:, :8]))
    assert list(check_schema((application / "schemas/doc.sd").read_text())) == ["default", "bm25", "colbert", "colbert_8", "colbert_float", "colbert_float_8"]


def test_the_zip_holds_the_folder(application):
    with zipfile.ZipFile(application.with_name("application.zip")) as archive:
        files = {name: archive.read(name) for name in archive.namelist()}
    assert files == {p.relative_to(application).as_posix(): p.read_bytes() for p in application.rglob("*") if p.is_file()}
    assert sorted(files) == ["README.md", "models/tokenizer.json", "models/vespa_colbert.onnx", "schemas/doc.sd", "services.xml"]


def test_written_again_it_is_the_same(checkpoint, tmp_path, quick):
    zips = []
    for _ in range(2):
        export_vespa_application(checkpoint, tmp_path / "application", check=False)
        zips.append((tmp_path / "application.zip").read_bytes())
    assert zips[0] == zips[1] and sorted(p.name for p in tmp_path.iterdir()) == ["application", "application.zip"]


def test_a_model_that_vespa_cannot_feed_gets_its_onnx_file_alone(checkpoint, tmp_path, quick):
    model = ColBERT.from_pretrained(checkpoint, device="cpu")
    model.tokenizer.tokenizer.backend_tokenizer.post_processor = None
    model.save_pretrained(tmp_path / "odd")
    with pytest.raises(ValueError, match="no application was written: expected a tokenizer that puts one token"):
        export_vespa_application(tmp_path / "odd", tmp_path / "application", check=False)
    assert sorted(p.name for p in (tmp_path / "application").rglob("*")) == ["models", "tokenizer.json", "vespa_colbert.onnx"]
    assert not (tmp_path / "application.zip").exists()


def test_what_vespa_does_otherwise_is_said(encoder, tmp_path, caplog, quick):
    fresh(encoder, query_expansion=False).save_pretrained(tmp_path / "bare")
    folder = export_vespa_application(tmp_path / "bare", tmp_path / "application", check=False)
    assert "fills every query" in caplog.text and "fills every query" in (folder / "README.md").read_text()


def test_other_files_are_left_alone(checkpoint, tmp_path):
    (tmp_path / "notes.txt").write_text("keep")
    with pytest.raises(ValueError, match="notes.txt"):
        export_vespa_application(checkpoint, tmp_path)
    assert [p.name for p in tmp_path.iterdir()] == ["notes.txt"]
