"""Tokenization: equality with colbert-ai over arbitrary text, and with a tokenizer whose saved state differs; bad input by table."""

import contextlib
import io
import json
import string

import pytest
import torch
from hypothesis import example, given, settings, strategies as st
from tokenizers import Tokenizer, models, pre_tokenizers, processors
from transformers import AutoTokenizer, PreTrainedTokenizerFast

from colbert_nb.corpus import minilm_path
from colbert_nb.tokenization import ColBERTTokenizer, TokenBatch, show_tokens, token_lengths, truncated_share

bert = AutoTokenizer.from_pretrained(minilm_path())
# every character but lone surrogates, and pieces that mean something to a tokenizer
pieces = st.one_of(st.text(max_size=30), st.sampled_from(
    ["[SEP]", "[PAD]", "[MASK]", "[CLS]", "[UNK]", "[unused0]", "##ing", " ", "\u2028", "\x85", "\r\n", "\x00", "日本語", "e\u0301", "🧮", "a" * 300, "!?", "word " * 40]))
texts = st.lists(st.lists(pieces, max_size=4).map(" ".join), min_size=1, max_size=4)


@pytest.fixture(scope="module")
def reference():
    """colbert-ai's two tokenizers for given settings."""
    with contextlib.redirect_stdout(io.StringIO()):
        from colbert.infra import ColBERTConfig
        from colbert.modeling.tokenization import DocTokenizer, QueryTokenizer
    made = {}

    def get(**chosen):
        key = tuple(sorted(chosen.items()))
        if key not in made:
            config = ColBERTConfig(checkpoint=str(minilm_path()), **chosen)
            made[key] = QueryTokenizer(config, verbose=0), DocTokenizer(config)
        return made[key]
    return get


def assert_equals(ours, theirs):
    ids, attention = theirs
    assert ours.input_ids.dtype == ours.attention_mask.dtype == torch.int64 and ours.keep.dtype == torch.bool
    assert torch.equal(ours.input_ids, ids) and torch.equal(ours.attention_mask, attention)


@given(texts, st.sampled_from([4, 5, 32, 64]), st.sampled_from([4, 12, 180]), st.booleans())
@example(["[PAD] a [MASK]"], 8, 8, True)
@example(["", "x" * 3000], 32, 180, False)
@settings(max_examples=150, deadline=None)
def test_same_as_colbert_ai_for_any_text(reference, batch, query_maxlen, doc_maxlen, attend):
    chosen = dict(query_maxlen=query_maxlen, doc_maxlen=doc_maxlen, attend_to_mask_tokens=attend)
    ours, (queries, documents) = ColBERTTokenizer(bert, **chosen), reference(**chosen)
    assert_equals(ours.queries(batch), queries.tensorize(batch))
    assert ours.queries(batch).keep.all()
    theirs = documents.tensorize(batch)
    found = ours.documents(batch)
    assert_equals(found, theirs)
    skip = {bert.encode(symbol, add_special_tokens=False)[0] for symbol in string.punctuation}
    assert found.keep.tolist() == [[i not in skip and i != bert.pad_token_id for i in row] for row in theirs[0].tolist()]


def slow_document(tokenizer, text, maxlen):
    """What Vespa's `ColBertEmbedder` hands its model, one id at a time: no punctuation, then the limit, then what stands around."""
    skipped = {i for symbol in string.punctuation for i in tokenizer.encode(symbol, add_special_tokens=False)}
    words = []
    for i in tokenizer.encode(text, add_special_tokens=False, verbose=False):
        if i not in skipped and len(words) < maxlen - 3:
            words.append(i)
    return [tokenizer.cls_token_id, tokenizer.convert_tokens_to_ids("[unused1]"), *words, tokenizer.sep_token_id]


@given(texts, st.sampled_from([4, 5, 12, 180]))
@example(["[PAD] a, [SEP] b!", "", "...", "a" * 300 + ", " * 300 + "b"], 12)
@settings(max_examples=150, deadline=None)
def test_skipped_punctuation_is_that_of_a_loop(batch, maxlen):
    found = ColBERTTokenizer(bert, doc_maxlen=maxlen, skip_punctuation_before_encoding=True).documents(batch)
    rows = [slow_document(bert, text, maxlen) for text in batch]
    width = max(map(len, rows))
    assert found.input_ids.tolist() == [row + [bert.pad_token_id] * (width - len(row)) for row in rows]
    assert found.attention_mask.tolist() == [[1] * len(row) + [0] * (width - len(row)) for row in rows]
    assert torch.equal(found.keep, found.attention_mask.bool())
    assert found.input_ids.dtype == found.attention_mask.dtype == torch.int64 and found.keep.dtype == torch.bool


def test_queries_keep_their_punctuation_when_documents_lose_it():
    batch = ["is it so?", "a, b"]
    plain, skipping = ColBERTTokenizer(bert), ColBERTTokenizer(bert, skip_punctuation_before_encoding=True)
    for found, expected in zip(skipping.queries(batch), plain.queries(batch)):
        assert torch.equal(found, expected)


def test_vespas_own_examples():
    """The ids of `ColBertEmbedderTest.testInputTensorsWordPiece`."""
    tokenizer = ColBERTTokenizer(bert, query_maxlen=10, doc_maxlen=10, skip_punctuation_before_encoding=True)
    assert tokenizer.queries(["this is a query !"]).input_ids.tolist() == [[101, 1, 2023, 2003, 1037, 23032, 999, 102, 103, 103]]
    assert tokenizer.documents(["this is a query !"]).input_ids.tolist() == [[101, 2, 2023, 2003, 1037, 23032, 102]]


def test_one_very_long_text_does_not_widen_the_others():
    tokenizer = ColBERTTokenizer(bert, doc_maxlen=8, skip_punctuation_before_encoding=True)
    found = tokenizer.documents(["word, " * 100_000, *["x"] * 500])
    assert found.input_ids.shape == (501, 8) and found.attention_mask.sum(1).tolist() == [8] + [4] * 500


@given(texts, st.integers(4, 40))
@settings(max_examples=100, deadline=None)
def test_shape_and_marker(batch, maxlen):
    tokenizer = ColBERTTokenizer(bert, query_maxlen=maxlen, doc_maxlen=maxlen)
    for found, marker in ((tokenizer.queries(batch), 1), (tokenizer.documents(batch), 2)):
        assert found.input_ids.shape == found.attention_mask.shape == found.keep.shape
        assert found.input_ids.shape[0] == len(batch) and 3 <= found.input_ids.shape[1] <= maxlen
        assert (found.input_ids[:, 0] == 101).all() and (found.input_ids[:, 1] == marker).all()
    assert tokenizer.queries(batch).input_ids.shape[1] == maxlen


@given(texts)
@settings(max_examples=60, deadline=None)
def test_a_text_does_not_depend_on_its_batch(batch):
    tokenizer = ColBERTTokenizer(bert, query_expansion=False)
    for together, encode in ((tokenizer.queries(batch), tokenizer.queries), (tokenizer.documents(batch), tokenizer.documents)):
        for row, text in enumerate(batch):
            alone = encode([text])
            width = alone.input_ids.shape[1]
            assert torch.equal(together.input_ids[row, :width], alone.input_ids[0])
            assert torch.equal(together.keep[row, :width], alone.keep[0]) and not together.keep[row, width:].any()
            assert not together.attention_mask[row, width:].any()


@given(texts)
@settings(max_examples=60, deadline=None)
def test_lengths_say_what_is_cut(batch):
    lengths = token_lengths(ColBERTTokenizer(bert), batch)
    wide = ColBERTTokenizer(bert, doc_maxlen=int(lengths.max()) + 1).documents(batch)
    assert lengths.tolist() == wide.attention_mask.sum(1).tolist()
    cut = ColBERTTokenizer(bert, query_maxlen=12, doc_maxlen=12)
    share = (lengths > 12).float().mean().item()
    assert truncated_share(cut, batch, batch) == {"queries": share, "documents": share}
    assert truncated_share(cut, documents=batch) == {"documents": share}


@given(texts)
@settings(max_examples=60, deadline=None)
def test_lengths_without_skipped_punctuation(batch):
    lengths = [len(slow_document(bert, text, 10**6)) for text in batch]
    tokenizer = ColBERTTokenizer(bert, query_maxlen=12, doc_maxlen=12, skip_punctuation_before_encoding=True)
    assert token_lengths(tokenizer, batch, "document").tolist() == lengths
    assert torch.equal(token_lengths(tokenizer, batch), token_lengths(ColBERTTokenizer(bert), batch))
    assert truncated_share(tokenizer, documents=batch)["documents"] == pytest.approx(sum(n > 12 for n in lengths) / len(batch))


@pytest.mark.parametrize("change", [
    dict(truncation={"direction": "Left", "max_length": 4, "strategy": "OnlyFirst", "stride": 2}, padding=None),
    dict(padding={"strategy": {"Fixed": 9}, "direction": "Left", "pad_to_multiple_of": 8, "pad_id": 7, "pad_type_id": 1, "pad_token": "x"}),
    dict(truncation=None, padding=None)])
def test_saved_truncation_and_padding_do_not_matter(tmp_path, change):
    bert.save_pretrained(tmp_path)
    saved = json.loads((tmp_path / "tokenizer.json").read_text(encoding="utf-8"))
    (tmp_path / "tokenizer.json").write_text(json.dumps({**saved, **change}), encoding="utf-8")
    other, batch = AutoTokenizer.from_pretrained(tmp_path), ["a short one", "a longer one, " * 30, ""]
    for encode in ("queries", "documents"):
        for found, expected in zip(getattr(ColBERTTokenizer(other), encode)(batch), getattr(ColBERTTokenizer(bert), encode)(batch)):
            assert torch.equal(found, expected)


def test_padding_on_the_left_is_not_taken_over(tmp_path):
    bert.save_pretrained(tmp_path)
    left = AutoTokenizer.from_pretrained(tmp_path, padding_side="left")
    batch = ["one", "one two three"]
    assert torch.equal(ColBERTTokenizer(left).documents(batch).input_ids, ColBERTTokenizer(bert).documents(batch).input_ids)


def test_tuples_and_other_markers():
    tokenizer = ColBERTTokenizer(bert, query_token_id="[unused5]", doc_token_id="[MASK]", mask_punctuation=False)
    assert tokenizer.query_marker_id == 6 and tokenizer.doc_marker_id == 103 and tokenizer.skiplist.numel() == 0
    found = tokenizer.documents(("a, b", "c"))
    assert torch.equal(found.keep, found.attention_mask.bool())


def test_to_moves_all_three():
    batch = ColBERTTokenizer(bert).queries(["x"]).to("meta")
    assert isinstance(batch, TokenBatch) and {t.device.type for t in batch} == {"meta"}


def word_tokenizer(special):
    """A fast tokenizer of whole words with the special tokens given."""
    vocabulary = {t: i for i, t in enumerate(["[UNK]", "[CLS]", "[SEP]", "[PAD]", "[MASK]", "[unused0]", "[unused1]", "a", "b", ","])}
    core = Tokenizer(models.WordLevel(vocabulary, unk_token="[UNK]"))
    core.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    core.post_processor = processors.BertProcessing(("[SEP]", 2), ("[CLS]", 1))
    return PreTrainedTokenizerFast(tokenizer_object=core, unk_token="[UNK]", **special)


def test_symbols_of_two_pieces_are_skipped_whole():
    """Vocabularies that mark where a word begins: colbert-ai's list holds the first piece of a symbol, Vespa's holds all."""
    vocabulary = {t: i for i, t in enumerate(["[UNK]", "[CLS]", "[SEP]", "[PAD]", "[MASK]", "[unused0]", "[unused1]", "\u2581", ",", "a"])}
    core = Tokenizer(models.BPE(vocabulary, [], unk_token="[UNK]"))
    core.pre_tokenizer = pre_tokenizers.Metaspace()
    core.post_processor = processors.BertProcessing(("[SEP]", 2), ("[CLS]", 1))
    marking = PreTrainedTokenizerFast(tokenizer_object=core, unk_token="[UNK]", pad_token="[PAD]", mask_token="[MASK]")
    kept = lambda batch: batch.input_ids[0][batch.keep[0]].tolist()
    assert kept(ColBERTTokenizer(marking).documents(["a, a"])) == [1, 6, 9, 8, 9, 2]
    assert kept(ColBERTTokenizer(marking, skip_punctuation_before_encoding=True).documents(["a, a"])) == [1, 6, 9, 9, 2]
    assert kept(ColBERTTokenizer(marking, skiplist_words=[","]).documents(["a, a"])) == [1, 6, 7, 9, 7, 9, 2]
    assert kept(ColBERTTokenizer(marking, skiplist_words=("a",)).documents(["a, a"])) == [1, 6, 7, 8, 7, 2]
    assert kept(ColBERTTokenizer(marking, skiplist_words=[]).documents(["a, a"])) == [1, 6, 7, 9, 8, 7, 9, 2]
    assert kept(ColBERTTokenizer(marking, skiplist_words=[","], mask_punctuation=False).documents(["a, a"])) == [1, 6, 7, 9, 8, 7, 9, 2]
    vespa = ColBERTTokenizer(marking, skip_punctuation_before_encoding=True, skiplist_words=["a"])
    assert kept(vespa.documents(["a, a"])) == [1, 6, 9, 9, 2]


def test_a_tokenizer_without_mask_serves_without_expansion():
    plain = word_tokenizer(dict(pad_token="[PAD]"))
    with pytest.raises(ValueError, match="query_expansion=False"):
        ColBERTTokenizer(plain)
    found = ColBERTTokenizer(plain, query_expansion=False, mask_punctuation=False).queries(["a b", "a"])
    assert found.input_ids.tolist() == [[1, 5, 7, 8, 2], [1, 5, 7, 2, 3]]
    assert found.keep.tolist() == [[True] * 5, [True] * 4 + [False]]


def test_a_tokenizer_without_padding_is_refused():
    with pytest.raises(ValueError, match="padding token"):
        ColBERTTokenizer(word_tokenizer(dict(mask_token="[MASK]")))


@pytest.mark.parametrize("chosen, message", [
    (dict(query_maxlen=3), "query_maxlen: expected a whole number of 4 or more"), (dict(doc_maxlen=0), "doc_maxlen: expected"),
    (dict(doc_maxlen=-5), "doc_maxlen: expected"), (dict(query_maxlen=32.0), "query_maxlen: expected .* got 32.0"),
    (dict(query_maxlen="32"), "query_maxlen: expected"), (dict(doc_maxlen=True), "doc_maxlen: expected"), (dict(doc_maxlen=None), "doc_maxlen"),
    (dict(mask_punctuation=False, skip_punctuation_before_encoding=True), "mask_punctuation=True with skip_punctuation"),
    (dict(skiplist_words="!,"), "expected a list of tokens or None"), (dict(skiplist_words=[",", 5]), "expected a list of tokens"),
    (dict(skiplist_words=[",", "never seen"]), "vocabulary, got 'never seen'"),
    (dict(query_token_id="[Q]"), r"got '\[Q\]'"), (dict(doc_token_id="never seen"), "got 'never seen'")])
def test_bad_settings(chosen, message):
    with pytest.raises(ValueError, match=message):
        ColBERTTokenizer(bert, **chosen)


def test_only_fast_tokenizers():
    with pytest.raises(ValueError, match="fast tokenizer .* got str"):
        ColBERTTokenizer("bert-base-uncased")


@pytest.mark.parametrize("bad, message", [
    ([], "one or more strings"), ("text", "wrap a single text in a list"), (None, "got None"), (5, "got 5"), ({"a": 1}, "expected a list"),
    (iter(["a"]), "expected a list"), (["a", None], "row 1: expected a string, got NoneType"), ([b"a"], "row 0: expected a string, got bytes"),
    ([["a"]], "row 0: expected a string, got list"), (["a", "b", "\ud800x"], "row 2: .* lone surrogate")])
@pytest.mark.parametrize("method", ["queries", "documents", "lengths"])
@pytest.mark.parametrize("skip", [False, True])
def test_bad_texts(bad, message, method, skip):
    tokenizer = ColBERTTokenizer(bert, skip_punctuation_before_encoding=skip)
    with pytest.raises(ValueError, match=message):
        token_lengths(tokenizer, bad) if method == "lengths" else getattr(tokenizer, method)(bad)


def test_token_strip():
    tokenizer = ColBERTTokenizer(bert, query_maxlen=8)
    assert repr(show_tokens(tokenizer, "sort <b>")) == "[CLS] [unused0] sort < b > [SEP] ~[MASK]"
    drawn = show_tokens(tokenizer, "<script>", "document")
    assert repr(drawn) == "[CLS] [unused1] -< script -> [SEP]"
    assert "<script" not in drawn._repr_html_() and "&lt;" in drawn._repr_html_() and drawn._repr_html_().count("line-through") == 2
    for ask in (show_tokens, token_lengths):
        with pytest.raises(ValueError, match="kind: expected"):
            ask(tokenizer, "x", "passage")
