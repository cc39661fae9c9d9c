"""Encoders of every family, tiny and random, with tokenizers trained on the spot: encode, train, save, load, the same vectors."""

import json
import logging
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from tiny import made_data
from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, processors, trainers
from transformers import (AutoModel, BertConfig, DebertaV2Config, DistilBertConfig, ElectraConfig, ModernBertConfig, MPNetConfig,
                          PreTrainedTokenizerFast, RobertaConfig, XLMRobertaConfig)

from colbert_nb.encoder import ColBERT
from colbert_nb.training_run import train_colbert

TRAINING = replace(made_data(), validation=[])  # without validation the last step is returned
TEXTS = [*TRAINING.corpus, "The query of a question; search the document, passage, text!", "Größe über 東京 ...", "a b c d e f g h i j k l m n o p q r s t u v w x y z"]
QUERIES = ["word1 word2", "Größe?", "word3 " * 80, "", "東京 !"]
DOCUMENTS = ["word1, word2!", "...", "word5 " * 80, "", "Größe über 東京"]
CLASSIC = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]"]  # pad, unknown, first, last, mask
FAIRSEQ = ["<pad>", "<unk>", "<s>", "</s>", "<mask>"]


def train_tokenizer(kind: str, names: list[str], order: list[int], *, free: tuple = (), named: bool = True) -> PreTrainedTokenizerFast:
    "A tokenizer with ids of special tokens in `order`, and the tokens `free` behind them."
    special = [names[i] for i in order] + list(free)
    shared = dict(special_tokens=special, show_progress=False)
    if kind == "wordpiece":
        core = Tokenizer(models.WordPiece(unk_token=names[1]))
        core.normalizer, core.pre_tokenizer = normalizers.BertNormalizer(), pre_tokenizers.BertPreTokenizer()
        trainer = trainers.WordPieceTrainer(vocab_size=220, **shared)
    elif kind == "bytes":
        core = Tokenizer(models.BPE(unk_token=names[1]))
        core.pre_tokenizer, core.decoder = pre_tokenizers.ByteLevel(add_prefix_space=False), decoders.ByteLevel()
        trainer = trainers.BpeTrainer(vocab_size=400, initial_alphabet=pre_tokenizers.ByteLevel.alphabet(), **shared)
    else:
        core = Tokenizer(models.Unigram())
        core.normalizer, core.pre_tokenizer, core.decoder = normalizers.NFKC(), pre_tokenizers.Metaspace(), decoders.Metaspace()
        trainer = trainers.UnigramTrainer(vocab_size=150, unk_token=names[1], **shared)
    core.train_from_iterator(TEXTS, trainer)
    core.post_processor = processors.TemplateProcessing(
        single=f"{names[2]} $A {names[3]}", special_tokens=[(token, core.token_to_id(token)) for token in names[2:4]])
    mask = {"mask_token": names[4]} if named and names[4] in special else {}
    return PreTrainedTokenizerFast(tokenizer_object=core, pad_token=names[0], unk_token=names[1], cls_token=names[2],
                                   sep_token=names[3], **mask)


SIZE = dict(hidden_size=32, num_hidden_layers=2, num_attention_heads=2, intermediate_size=64)
PADDED_SECOND = [2, 0, 3, 1, 4]  # <s> <pad> </s> <unk> <mask>, as fairseq has them
FAMILIES = {  # tokenizer, its special tokens, config, most tokens of a text
    "bert": ("wordpiece", CLASSIC, range(5), lambda n: BertConfig(vocab_size=n, max_position_embeddings=64, **SIZE), 64),
    "bert_with_unused": ("wordpiece", CLASSIC, range(5), lambda n: BertConfig(vocab_size=n, max_position_embeddings=64, **SIZE), 64),
    "roberta": ("bytes", FAIRSEQ, PADDED_SECOND, lambda n: RobertaConfig(
        vocab_size=n, max_position_embeddings=66, pad_token_id=1, type_vocab_size=1, **SIZE), 64),
    "xlm-roberta": ("unigram", FAIRSEQ, PADDED_SECOND, lambda n: XLMRobertaConfig(
        vocab_size=n, max_position_embeddings=66, pad_token_id=1, type_vocab_size=1, **SIZE), 64),
    "modernbert": ("bytes", CLASSIC, range(5), lambda n: ModernBertConfig(
        vocab_size=n + 40, max_position_embeddings=8192, local_attention=16, pad_token_id=0, bos_token_id=2, cls_token_id=2,
        eos_token_id=3, sep_token_id=3, **SIZE), 8192),
    "electra": ("wordpiece", CLASSIC, range(5), lambda n: ElectraConfig(
        vocab_size=n, embedding_size=24, max_position_embeddings=64, **SIZE), 64),
    "distilbert": ("wordpiece", CLASSIC, range(5), lambda n: DistilBertConfig(
        vocab_size=n, dim=32, n_layers=2, n_heads=2, hidden_dim=64, max_position_embeddings=64), 64),
    "deberta-v2": ("unigram", CLASSIC, range(5), lambda n: DebertaV2Config(
        vocab_size=n, relative_attention=True, position_buckets=8, pos_att_type=["p2c", "c2p"], position_biased_input=False,
        type_vocab_size=0, max_position_embeddings=64, **SIZE), 64),
    "mpnet": ("wordpiece", FAIRSEQ, PADDED_SECOND, lambda n: MPNetConfig(
        vocab_size=n, max_position_embeddings=66, pad_token_id=1, **SIZE), 64),
}


def make(name: str, folder: Path, **tokenizer_options) -> Path:
    kind, names, order, config, _ = FAMILIES[name]
    free = ("[unused0]", "[unused1]") if name == "bert_with_unused" else ()
    tokenizer = train_tokenizer(kind, names, list(order), free=free, **tokenizer_options)
    torch.manual_seed(0)
    AutoModel.from_config(config(len(tokenizer))).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    return {name: make(name, tmp_path_factory.mktemp(name)) for name in FAMILIES}


@pytest.fixture(params=FAMILIES)
def family(request):
    return request.param


def load(folder, **options):
    return ColBERT.from_pretrained(folder, device="cpu", **options)


def fresh(folder, **options):
    return load(folder, **{**dict(dim=16, query_maxlen=8, doc_maxlen=16), **options})


def contents(folder):
    return {p.relative_to(folder).as_posix(): p.read_bytes() for p in folder.rglob("*") if p.is_file()}


def same(xs, ys, atol=0.0):
    assert len(xs) == len(ys)
    for x, y in zip(xs, ys):
        assert x.shape == y.shape
        torch.testing.assert_close(x, y, rtol=0, atol=atol)


@pytest.mark.filterwarnings("ignore")
def test_ten_steps_save_load_and_the_same_vectors(folders, family, tmp_path, caplog):
    with caplog.at_level(logging.INFO, "colbert_nb"):
        model = fresh(folders[family])
    assert "from scratch" in caplog.text
    before = {name: weight.clone() for name, weight in model.state_dict().items()}
    vectors = model.encode_documents(DOCUMENTS)
    best = train_colbert(model, TRAINING, tmp_path / "run", batch_size=6, learning_rate=1e-3, maxsteps=10, epochs=2)
    trained = model.state_dict()
    assert not [name for name, weight in model.named_parameters() if weight.requires_grad and not weight.isfinite().all()]
    markers = [model.tokenizer.query_marker_id, model.tokenizer.doc_marker_id]
    table = next(name for name, weight in model.named_parameters() if weight is model.encoder.get_input_embeddings().weight)
    assert ((trained[table][markers] - before[table][markers]).abs().max(1).values > 0).all()
    assert max((a - b).abs().max() for a, b in zip(model.encode_documents(DOCUMENTS), vectors)) > 1e-3
    caplog.clear()
    with caplog.at_level(logging.INFO, "colbert_nb"):
        again = load(best)
    assert "fine-tuning" in caplog.text and "is new" not in caplog.text
    same(again.encode_queries(QUERIES), model.encode_queries(QUERIES))
    same(again.encode_documents(DOCUMENTS), model.encode_documents(DOCUMENTS))
    third = again.save_pretrained(tmp_path / "third")
    assert contents(third).items() <= contents(best).items()


def test_ids_are_first_token_marker_text_last_token(folders, family):
    model = fresh(folders[family], query_maxlen=12)
    own, words = model.tokenizer, model.tokenizer.tokenizer
    pieces = words("word1 word2", add_special_tokens=False)["input_ids"]
    first, last = words("")["input_ids"]
    marked = lambda marker, fill=(): [first, marker, *pieces, last, *fill]
    missing = 12 - len(pieces) - 3
    assert own.queries(["word1 word2"]).input_ids.tolist() == [marked(own.query_marker_id, [words.mask_token_id] * missing)]
    assert own.documents(["word1 word2"]).input_ids.tolist() == [marked(own.doc_marker_id)]
    assert len({own.query_marker_id, own.doc_marker_id, *words.all_special_ids[:5]} | {words.unk_token_id}) >= 6


def test_a_text_has_the_same_vectors_in_any_company(folders, family):
    model = fresh(folders[family])
    same(model.encode_documents(DOCUMENTS), [model.encode_documents([text])[0] for text in DOCUMENTS], atol=1e-5)
    same(model.encode_queries(QUERIES), [model.encode_queries([text])[0] for text in QUERIES], atol=1e-5)


@pytest.mark.parametrize("family", [name for name in FAMILIES if name != "bert_with_unused"])
def test_new_rows_start_from_near_tokens_and_others_stay(folders, family):
    plain = AutoModel.from_pretrained(folders[family]).get_input_embeddings().weight
    model = fresh(folders[family])
    own, table = model.tokenizer, model.encoder.get_input_embeddings().weight
    near = lambda words: [i for i in own.tokenizer(words, add_special_tokens=False)["input_ids"] if i != own.tokenizer.unk_token_id]
    for marker, words in ((own.query_marker_id, "query question search"), (own.doc_marker_id, "document passage text")):
        torch.testing.assert_close(table[marker], plain[near(words)].mean(0))
    others = [i for i in range(len(plain)) if i not in (own.query_marker_id, own.doc_marker_id)]
    assert torch.equal(table[others], plain[others]) and model.encoder.config.vocab_size == len(table) >= len(plain)
    assert not torch.equal(table[own.query_marker_id], table[own.doc_marker_id])


def test_a_vocabulary_with_markers_is_left_alone(folders):
    model = fresh(folders["bert_with_unused"])
    assert len(model.encoder.get_input_embeddings().weight) == json.loads((folders["bert_with_unused"] / "config.json").read_text())["vocab_size"]
    same([model.encoder.get_input_embeddings().weight], [AutoModel.from_pretrained(folders["bert_with_unused"]).get_input_embeddings().weight])


def test_a_table_with_room_does_not_grow(folders):
    model = fresh(folders["modernbert"])
    assert model.encoder.config.vocab_size == json.loads((folders["modernbert"] / "config.json").read_text())["vocab_size"]


def test_texts_as_long_as_the_positions(folders, family):
    limit = FAMILIES[family][-1]
    if limit > 1000:
        model = fresh(folders[family], doc_maxlen=2000)
        assert 1000 < len(model.encode_documents(["word5 word6 " * 800])[0]) <= 2000
    else:
        model = fresh(folders[family], doc_maxlen=limit, query_maxlen=limit)
        assert len(model.encode_queries(["word5"])[0]) == limit and len(model.encode_documents(["word5 " * 100])[0]) == limit
    with pytest.raises(ValueError, match=f"at most {limit}"):
        fresh(folders[family], doc_maxlen=limit + 1)


def test_added_markers_are_the_same_twice(folders, tmp_path):
    saved = [fresh(folders["roberta"]).save_pretrained(tmp_path / name) for name in "ab"]
    assert contents(saved[0]) == contents(saved[1])
    assert json.loads((saved[0] / "artifact.metadata").read_text())["query_token_id"] == "[unused0]"


# the mask token

def test_without_a_mask_token_queries_are_not_filled(tmp_path, caplog):
    folder = make_maskless(tmp_path / "plain")
    with caplog.at_level(logging.WARNING, "colbert_nb"):
        model = fresh(folder)
    assert "no mask token" in caplog.text and not model.query_expansion
    assert len(model.encode_queries(["word1"])[0]) < 8
    again = load(model.save_pretrained(tmp_path / "saved"))
    assert not again.query_expansion
    same(again.encode_queries(QUERIES), model.encode_queries(QUERIES))
    with pytest.raises(ValueError, match="this tokenizer has none"):
        fresh(folder, query_expansion=True)


def make_maskless(folder):
    tokenizer = train_tokenizer("bytes", FAIRSEQ, PADDED_SECOND[:4])
    torch.manual_seed(0)
    AutoModel.from_config(RobertaConfig(vocab_size=len(tokenizer), max_position_embeddings=66, pad_token_id=1, **SIZE)).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


def test_a_mask_token_that_nobody_named(tmp_path, caplog):
    with caplog.at_level(logging.WARNING, "colbert_nb"):
        model = fresh(make("xlm-roberta", tmp_path / "plain", named=False))
    assert not caplog.text and model.query_expansion and model.tokenizer.tokenizer.mask_token == "<mask>"
    assert len(model.encode_queries(["word1"])[0]) == 8


def test_the_trainer_counts_lengths_for_any_vocabulary(folders, family):
    from colbert_nb.trainer import length_tokenizer
    from colbert_nb.tokenization import token_lengths
    texts = ["word1 word2", ""]
    assert torch.equal(token_lengths(length_tokenizer(folders[family]), texts), token_lengths(fresh(folders[family]).tokenizer, texts))
