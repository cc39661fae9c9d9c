"""Batches and the loss: what does not teach. Random data, chunks, cached tokens."""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from tiny import WORDS, fresh

from colbert_nb.data import TrainingData
from colbert_nb.training import TripleCollator, batch_columns, batch_scores, contrastive_loss


@st.composite
def small_data(draw):
    n_queries, n_passages = draw(st.integers(1, 6)), draw(st.integers(2, 9))
    texts = draw(st.lists(st.sampled_from(["word1 word2", "word3", "word4 word5 word6", "word7", "word8 word9"]),
                          min_size=n_passages, max_size=n_passages))
    queries = draw(st.lists(st.sampled_from(WORDS[:4]), min_size=n_queries, max_size=n_queries))
    positives = {q: draw(st.lists(st.integers(0, n_passages - 1), min_size=1, max_size=4, unique=True)) for q in range(n_queries)}
    triples = [[q, draw(st.sampled_from(positives[q])), *draw(st.lists(st.integers(0, n_passages - 1), min_size=1, max_size=3))]
               for q in draw(st.lists(st.integers(0, n_queries - 1), min_size=1, max_size=8))]
    return TrainingData(queries, texts, triples, positives, [])


@pytest.fixture(scope="session")
def tiny_tokenizer(encoder):
    return fresh(encoder).tokenizer


@settings(max_examples=150, deadline=None)
@given(data=small_data(), in_batch=st.booleans())
def test_no_positive_is_ever_a_negative(tiny_tokenizer, data, in_batch):
    """In no row of any batch, by number or by text, whatever the triples say."""
    batch = TripleCollator(data, tiny_tokenizer, in_batch, chunk_size=2)(range(len(data.triples)))
    texts = [row[keep.bool()].tolist() for chunk in batch["documents"] for row, keep in zip(chunk.input_ids, chunk.attention_mask)]
    texts = [texts[i] for i in batch["places"]]
    assert len({tuple(t) for t in texts}) == len(texts) == batch["target"].allowed.shape[1]  # each distinct text once
    tokens = lambda p: tiny_tokenizer.documents([data.corpus[p]]).input_ids[0].tolist()
    for row, (query, positive, *negatives) in enumerate(data.triples.tolist()):
        negatives = [p for p in negatives if p >= 0]
        known = [tokens(p) for q, ps in data.positives.items() if data.queries[q] == data.queries[query] for p in ps]
        inside = [text for text, allowed in zip(texts, batch["target"].allowed[row]) if allowed]
        assert texts[batch["target"].positives[row]] == tokens(positive) and tokens(positive) in inside
        assert not [text for text in inside if text in known and text != tokens(positive)]
        expected = [t for t in (texts if in_batch else [tokens(p) for p in negatives]) if t not in known]
        assert sorted(map(tuple, {*map(tuple, expected), tuple(tokens(positive))})) == sorted(map(tuple, inside))


@settings(max_examples=100, deadline=None)
@given(st.data())
def test_the_loss_is_the_formula(draw):
    n, m = draw.draw(st.integers(1, 5)), draw.draw(st.integers(1, 6))
    scores = torch.tensor(draw.draw(st.lists(st.floats(-30, 30), min_size=n * m, max_size=n * m))).view(n, m)
    positives = torch.tensor(draw.draw(st.lists(st.integers(0, m - 1), min_size=n, max_size=n)))
    allowed = torch.tensor(draw.draw(st.lists(st.booleans(), min_size=n * m, max_size=n * m))).view(n, m)
    allowed[torch.arange(n), positives] = True
    expected = [math.log(sum(math.exp(s - scores[i, p].item()) for s, a in zip(scores[i].tolist(), allowed[i]) if a))
                for i, p in enumerate(positives.tolist())]
    assert contrastive_loss(scores, positives, allowed).item() == pytest.approx(sum(expected) / n, rel=1e-4, abs=1e-5)


def test_several_negatives_stand_in_a_row():
    columns, target = batch_columns([(0, 0, 1, 2), (1, 3, 4, 0)], {0: {0}, 1: {3}}, use_ib_negatives=False)
    assert columns == [0, 1, 2, 3, 4] and target.positives.tolist() == [0, 3]
    assert target.allowed.tolist() == [[True, True, True, False, False], [True, False, False, True, True]]


def test_chunks_and_tokenising_once_change_nothing(model, data):
    whole, chunks = (TripleCollator(data, model.tokenizer, chunk_size=size)(range(9)) for size in (100, 3))
    results = []
    for batch in (whole, chunks):
        model.zero_grad()
        scores = batch_scores(model, batch["queries"], batch["documents"], batch["places"])
        contrastive_loss(scores, batch["target"].positives, batch["target"].allowed).backward()
        results.append((scores.detach(), model.linear.weight.grad.clone()))
    torch.testing.assert_close(results[0], results[1], rtol=1e-5, atol=1e-6)
    collator = TripleCollator(data, model.tokenizer)
    collator.documents.limit = 5
    for start in range(0, 30, 6):
        again = collator(range(start, start + 6))
        fresh_batch = TripleCollator(data, model.tokenizer)(range(start, start + 6))
        assert all(torch.equal(a, b) for x, y in zip(again["documents"], fresh_batch["documents"]) for a, b in zip(x, y))


@pytest.mark.parametrize("expansion", [True, False])
def test_cached_rows_are_the_tokenizers(encoder, data, expansion):
    model = fresh(encoder, query_expansion=expansion)
    batch = TripleCollator(data, model.tokenizer)(range(5))
    for ours, theirs in zip(batch["queries"][0], model.tokenizer.queries([data.queries[q] for q, *_ in data.triples[:5]])):
        assert torch.equal(ours, theirs)
