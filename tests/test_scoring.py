"""Scoring beyond the page: random shapes and masks against the formula, bad input, memory, precision."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from colbert_nb.scoring import maxsim, maxsim_packed, maxsim_pairwise, pack, pad, pad_packed


def texts(lengths, dim, seed):
    """One (tokens, dim) tensor of unit vectors for each length."""
    generator = torch.Generator().manual_seed(seed)
    return [torch.nn.functional.normalize(torch.randn(n, dim, generator=generator), dim=-1) for n in lengths]


def formula(queries, passages):
    """The definition, one dot product at a time, in float64."""
    rows = [[sum((max(float(q.double() @ d.double()) for d in passage) if len(passage) else float("-inf") for q in query), 0.0)
             for passage in passages] for query in queries]
    return torch.tensor(rows, dtype=torch.float32).view(len(queries), len(passages))


lengths = st.lists(st.integers(0, 7), min_size=1, max_size=6)
shapes = dict(query_lengths=st.lists(st.integers(1, 5), min_size=1, max_size=4), doc_lengths=lengths,
              dim=st.integers(1, 5), seed=st.integers(0, 2**20), chunk=st.integers(1, 300))


@settings(max_examples=60, deadline=None)
@given(**shapes)
def test_all_forms_follow_the_formula(query_lengths, doc_lengths, dim, seed, chunk):
    queries, passages = texts(query_lengths, dim, seed), texts(doc_lengths, dim, seed + 1)
    expected = formula(queries, passages)
    (Q, Q_mask), (D, D_mask) = pad(queries), pad(passages)
    close = dict(rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(maxsim(Q, D, Q_mask, D_mask), expected, **close)
    torch.testing.assert_close(maxsim(Q, D, Q_mask, D_mask, chunk_size=chunk), expected, **close)
    torch.testing.assert_close(maxsim_packed(Q, *pack(passages), Q_mask), expected, **close)
    torch.testing.assert_close(maxsim_packed(Q, *pack(passages), Q_mask, max_elements=chunk), expected, **close)
    n = min(len(queries), len(passages))
    torch.testing.assert_close(maxsim_pairwise(Q[:n], D[:n], Q_mask[:n], D_mask[:n]), expected[:n, :n].diagonal(), **close)


@settings(max_examples=30, deadline=None)
@given(**shapes)
def test_gradients_agree_and_are_finite(query_lengths, doc_lengths, dim, seed, chunk):
    dim += 1  # unit vectors of one number tie, and a tie may send its gradient either way
    queries, passages = texts(query_lengths, dim, seed), texts([n + 1 for n in doc_lengths], dim, seed + 1)
    (Q, Q_mask), (D, D_mask), (P, sizes) = pad(queries), pad(passages), pack(passages)
    for x in (Q, D, P):
        x.requires_grad_()
    padded = torch.autograd.grad(maxsim(Q, D, Q_mask, D_mask).tanh().sum(), [Q, D])
    chunked = torch.autograd.grad(maxsim(Q, D, Q_mask, D_mask, chunk_size=chunk).tanh().sum(), [Q, D])
    flat = torch.autograd.grad(maxsim_packed(Q, P, sizes, Q_mask, max_elements=chunk).tanh().sum(), [Q, P])
    for one, two in zip(padded, chunked):
        torch.testing.assert_close(one, two)
    torch.testing.assert_close(padded[0], flat[0])
    torch.testing.assert_close(padded[1][D_mask], flat[1])
    assert not padded[1][~D_mask].any() and not padded[0][~Q_mask].any()


@settings(max_examples=40, deadline=None)
@given(doc_lengths=lengths, dim=st.integers(1, 4), seed=st.integers(0, 99))
def test_pack_and_pad_hold_the_same_vectors(doc_lengths, dim, seed):
    vectors = texts(doc_lengths, dim, seed)
    packed, sizes = pack(vectors)
    padded, mask = pad(vectors)
    assert sizes.tolist() == doc_lengths and mask.sum(1).tolist() == doc_lengths
    assert torch.equal(padded[mask], packed) and not padded[~mask].any()
    for one, two in zip(vectors, packed.split(sizes.tolist())):
        assert torch.equal(one, two)


def test_query_without_a_counting_token_scores_zero_and_passage_without_one_minus_infinity():
    Q, D = torch.stack(texts([3, 3], 4, 0)), torch.stack(texts([5, 5], 4, 1))
    none, some = torch.zeros(2, 3, dtype=torch.bool), torch.tensor([[1] * 5, [0] * 5])
    assert torch.equal(maxsim(Q, D, none), torch.zeros(2, 2))
    assert torch.equal(maxsim_packed(Q, D.flatten(0, 1), torch.tensor([5, 5]), none), torch.zeros(2, 2))
    assert maxsim(Q, D, None, some)[:, 1].tolist() == [-torch.inf] * 2
    assert maxsim_packed(Q, D[0], torch.tensor([5, 0]))[:, 1].tolist() == [-torch.inf] * 2
    assert maxsim_pairwise(Q, D, None, some)[1] == -torch.inf


def test_masks_of_any_number_type_mean_the_same():
    Q, D = torch.stack(texts([3, 3], 4, 0)), torch.stack(texts([5, 5], 4, 1))
    mask = torch.tensor([[1, 1, 0, 1, 0], [0, 1, 1, 1, 1]])
    expected = maxsim(Q, D, None, mask.bool())
    for dtype in (torch.int64, torch.uint8, torch.float32, torch.bfloat16):
        assert torch.equal(maxsim(Q, D, None, mask.to(dtype)), expected)


def test_inputs_are_left_as_they_were():
    Q, D = torch.stack(texts([3, 3], 4, 0)), torch.stack(texts([5, 5], 4, 1))
    mask = torch.tensor([[1, 1, 0, 1, 0], [0, 1, 1, 1, 1]])
    before = [x.clone() for x in (Q, D, mask)]
    maxsim(Q, D, None, mask), maxsim_pairwise(Q, D, None, mask), maxsim_packed(Q, D.flatten(0, 1), torch.tensor([5, 5]))
    assert all(torch.equal(x, y) for x, y in zip((Q, D, mask), before))


@pytest.mark.parametrize("dtype, tolerance", [(torch.float64, 1e-6), (torch.bfloat16, 2e-2), (torch.float16, 3e-3)])
def test_precision_of_the_vectors(dtype, tolerance):
    Q, D = torch.stack(texts([32] * 3, 16, 0)), torch.stack(texts([40] * 5, 16, 1))
    expected = maxsim(Q, D)
    for scores in (maxsim(Q.to(dtype), D.to(dtype)), maxsim_packed(Q.to(dtype), D.to(dtype).flatten(0, 1), torch.tensor([40] * 5))):
        assert scores.dtype == (torch.float64 if dtype == torch.float64 else torch.float32)
        torch.testing.assert_close(scores.float(), expected, rtol=tolerance, atol=0)


def test_many_queries_on_long_passages_are_cut_into_blocks_of_queries():
    Q, D = torch.stack(texts([32] * 600, 4, 0)), torch.stack(texts([256] * 2, 4, 1))
    expected = torch.cat([maxsim(part, D) for part in Q.split(50)])
    torch.testing.assert_close(maxsim(Q, D), expected)
    torch.testing.assert_close(maxsim_packed(Q, D.flatten(0, 1), torch.tensor([256, 256])), expected)


def test_no_query_or_no_passage_gives_an_empty_table():
    Q, D = torch.stack(texts([3, 3], 4, 0)), torch.stack(texts([5, 5], 4, 1))
    assert maxsim(Q[:0], D).shape == (0, 2) and maxsim(Q, D[:0]).shape == (2, 0)
    assert maxsim_packed(Q[:0], D[0], torch.tensor([5])).shape == (0, 1)
    assert maxsim_pairwise(Q[:0], D[:0]).shape == (0,)


def test_the_training_graph_keeps_no_block_of_similarities():
    Q, D = torch.stack(texts([32] * 16, 8, 0)).requires_grad_(), torch.stack(texts([64] * 64, 8, 1)).requires_grad_()
    kept = []
    with torch.autograd.graph.saved_tensors_hooks(lambda x: kept.append(x.numel()) or x, lambda x: x):
        maxsim(Q, D, None, torch.ones(64, 64)).sum().backward()
    assert max(kept) < 16 * 32 * 64 * 64 / 8


Q, D = torch.zeros(2, 3, 4), torch.zeros(5, 6, 4)
BAD = {
    "a text for a batch": (lambda: maxsim(Q[0], D), r"expected Q of shape .*got \(3, 4\)"),
    "passages of no token": (lambda: maxsim(Q, D[:, :0]), r"expected D of shape .*got \(5, 0, 4\)"),
    "other vector sizes": (lambda: maxsim(Q, torch.zeros(5, 6, 8)), "got 4 and 8"),
    "query mask": (lambda: maxsim(Q, D, torch.ones(2, 4)), r"expected Q_mask of shape \(2, 3\)"),
    "passage mask": (lambda: maxsim(Q, D, None, torch.ones(5)), r"expected D_mask of shape \(5, 6\)"),
    "chunk": (lambda: maxsim(Q, D, chunk_size=0), "chunk_size of 1 or more, got 0"),
    "pairs": (lambda: maxsim_pairwise(Q, D), "got 2 queries and 5 passages"),
    "packed padded": (lambda: maxsim_packed(Q, D, torch.tensor([6])), r"expected D \(total_tokens, dim\)"),
    "lengths too short": (lambda: maxsim_packed(Q, D[0], torch.tensor([5])), "add up to the 6 rows of D, got a sum of 5"),
    "negative length": (lambda: maxsim_packed(Q, D[0], torch.tensor([7, -1])), "smallest length of -1"),
    "lengths of no passage": (lambda: maxsim_packed(Q, D[0], torch.tensor([], dtype=torch.long)), "whole-numbered lengths"),
    "broken lengths": (lambda: maxsim_packed(Q, D[0], torch.tensor([6.0])), "torch.float32"),
    "no list": (lambda: pack([]), "got an empty list"),
    "other dims": (lambda: pad([D[0], torch.zeros(2, 3)]), r"got a tensor of shape \(2, 3\) at row 1"),
    "no tensor": (lambda: pack([D[0], [[1.0] * 4]]), "got list at row 1"),
    "first is no tensor": (lambda: pack(["text"]), "got str at row 0"),
    "a number": (lambda: pack([torch.tensor(1.0)]), r"got a tensor of shape \(\) at row 0"),
    "pad_packed": (lambda: pad_packed(D[0], torch.tensor([1, 2])), "add up to the 6 rows"),
    "max_elements": (lambda: maxsim_packed(Q, D[0], torch.tensor([6]), max_elements=0), "max_elements of 1 or more, got 0"),
    "packed query mask": (lambda: maxsim_packed(Q, D[0], torch.tensor([6]), torch.ones(3, 2)), r"Q_mask of shape \(2, 3\)"),
}


@pytest.mark.parametrize("call, message", BAD.values(), ids=BAD)
def test_bad_input_is_refused_with_what_was_expected_and_got(call, message):
    with pytest.raises(ValueError, match=message):
        call()
