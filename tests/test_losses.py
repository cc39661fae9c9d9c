"""Losses: what does not teach. Plain loops over random batches, colbert-ai and sentence-transformers as judges, refused input."""

import logging
import math
from dataclasses import replace
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from tiny import OPTIONS, fresh, made_data
from torch import nn

from colbert_nb.data import TrainingData
from colbert_nb.evaluation import evaluate, search
from colbert_nb.scoring import maxsim
from colbert_nb.training import TripleCollator, batch_columns, batch_scores, score_chunks
from colbert_nb.training_losses import LOSSES, check_dims, choose_loss, evaluate_dims, own_occurrences
from colbert_nb.training_run import TrainingModule, train_colbert

SCORED, PLAIN = SimpleNamespace(scores=np.zeros((1, 2), np.float32)), SimpleNamespace(scores=None)


def softmax(values):
    top = max(values)
    parts = [math.exp(v - top) for v in values]
    return [p / sum(parts) for p in parts]


def cross_entropy(right, values):
    return -math.log(math.exp(right - max(values)) / sum(math.exp(v - max(values)) for v in values))


def divergence(teacher, student):
    return sum(t * (math.log(t) - math.log(s)) for t, s in zip(softmax(teacher), softmax(student)) if t)


@st.composite
def batches(draw):
    "Triples of two to four passages, some of them shared, with a score of every pair and a teacher's scores of each triple."
    n_queries, n_passages = draw(st.integers(1, 5)), draw(st.integers(4, 8))
    number = st.floats(-20, 20, width=32)
    scores = [draw(st.lists(number, min_size=n_passages, max_size=n_passages)) for _ in range(n_queries)]
    triples, teacher = [], []
    for _ in range(draw(st.integers(1, 6))):
        passages = draw(st.lists(st.integers(0, n_passages - 1), min_size=2, max_size=4))
        if passages[0] in passages[1:]:
            passages = [passages[0], *((passages[0] + 1 + p) % n_passages for p in range(len(passages) - 1))]
        triples.append((draw(st.integers(0, n_queries - 1)), *passages))
        teacher.append(draw(st.lists(number, min_size=len(passages), max_size=len(passages))))
    known = {q: {t[1] for t in triples if t[0] == q} | set(draw(st.lists(st.integers(0, n_passages - 1), max_size=2)))
             for q in range(n_queries)}
    return scores, triples, known, teacher


def by_loops(name, in_batch, s, triples, known, teacher, scored=True):
    "The loss of every triple, from the triples alone: no columns, no masks, no tensors."
    values = []
    for i, ((query, positive, *negatives), taught) in enumerate(zip(triples, teacher)):
        own, right = [s[query][p] for p in (positive, *negatives)], s[query][positive]
        elsewhere = [p for j, (_, *row) in enumerate(triples) if j != i for p in row]
        unknown = {p for p in elsewhere if p not in known[query] and p != positive}
        if name == "contrastive":
            values.append(cross_entropy(right, [right, *(s[query][p] for p in (unknown if in_batch else set()) | {
                p for p in negatives if p not in known[query]})]))
            continue
        if name == "margin_mse":
            margins = [(right - s[query][p]) - (taught[0] - t) for p, t in zip(negatives, taught[1:])]
            value = sum(m * m for m in margins) / len(margins)
        else:
            value = divergence(taught, own) if scored else cross_entropy(right, own)
        if in_batch:
            others = elsewhere if name == "colbert-ai" else unknown - set(negatives)
            value += cross_entropy(right, [right, *(s[query][p] for p in others)])
        values.append(value)
    return values


def table(scores, triples, known, teacher=None, in_batch=True):
    "The same batch as the losses see it."
    columns, target = batch_columns([[*t, *[-1] * (5 - len(t))] for t in triples], known, in_batch)
    if teacher:
        width = target.group.shape[1]
        target = target._replace(teacher=torch.tensor([[*t, *[math.nan] * (width - len(t))] for t in teacher]))
    return torch.tensor([[scores[t[0]][p] for p in columns] for t in triples], requires_grad=True), target


@pytest.mark.parametrize("name, scored", [("contrastive", False), ("kl", True), ("margin_mse", True), ("colbert-ai", True), ("colbert-ai", False)])
@pytest.mark.parametrize("in_batch", [True, False])
@settings(max_examples=60, deadline=None)
@given(batch=batches())
def test_every_loss_is_what_plain_loops_give(name, scored, in_batch, batch):
    """Rows of several lengths, passages shared and repeated, other positives in the batch; no gradient is NaN."""
    scores, triples, known, teacher = batch
    table_, target = table(scores, triples, known, teacher if scored else None, in_batch)
    ours = choose_loss(name, SCORED if scored else PLAIN, in_batch)(table_, target)
    expected = torch.tensor(by_loops(name, in_batch, scores, triples, known, teacher, scored))
    torch.testing.assert_close(ours, expected, rtol=1e-4, atol=1e-4)
    ours.sum().backward()
    assert table_.grad.isfinite().all()


@settings(max_examples=60, deadline=None)
@given(batch=batches())
def test_a_passage_counts_where_it_stands(batch):
    scores, triples, known, _ = batch
    columns, target = batch_columns([[*t, *[-1] * (5 - len(t))] for t in triples], known)
    assert own_occurrences(target).tolist() == [[row[1:].count(p) for p in columns] for row in triples]


# The references


def texts_of(n_triples, nway, seed, dim=6):
    "Vectors of queries and of distinct passages, and triples in which passages repeat; the last stands twice in one triple."
    draw = torch.Generator().manual_seed(seed)
    unit = lambda *shape: nn.functional.normalize(torch.randn(*shape, generator=draw), dim=-1).requires_grad_()
    queries, passages = unit(n_triples, 4, dim), unit(n_triples + nway, 5, dim)
    keep = torch.rand(len(passages), 5, generator=draw) > 0.3
    keep[:, 0] = True
    triples = [(i, i, *((i + 1 + j) % len(passages) for j in range(nway - 1))) for i in range(n_triples)]
    triples[-1] = (*triples[-1][:3], *[triples[-1][2]] * (nway - 2))
    triples[0] = (0, 1, *range(2, nway + 1))  # shares its positive with the second query
    return queries, passages, keep, triples


def gradients(value, *tensors):
    for tensor in tensors:
        tensor.grad = None
    value.backward()
    return [value.detach(), *(tensor.grad.clone() for tensor in tensors)]


@pytest.mark.parametrize("in_batch", [True, False])
@pytest.mark.parametrize("scored", [True, False])
@pytest.mark.parametrize("n_triples, nway", [(1, 2), (5, 2), (4, 4)])
def test_colbert_ai_gives_the_same_values_and_gradients(n_triples, nway, scored, in_batch):
    """Its own scoring and in-batch term, and the lines of its training loop, on a batch in which passages repeat."""
    from colbert_nb.colbert_ai_mends import import_colbert_ai
    import_colbert_ai()
    from colbert.infra import ColBERTConfig
    from colbert.modeling.colbert import ColBERT as Upstream

    Q, D, keep, triples = texts_of(n_triples, nway, seed=nway)
    upstream = SimpleNamespace(colbert_config=ColBERTConfig(nway=nway, use_ib_negatives=in_batch))
    teacher = torch.randn(n_triples, nway, generator=torch.Generator().manual_seed(3)) * 4
    row = [p for _, *passages in triples for p in passages]
    all_D, all_keep = D[row], keep[row].unsqueeze(2)
    scores = Upstream.score(upstream, Q.repeat_interleave(nway, 0), all_D, all_keep).view(-1, nway)
    if scored:
        theirs = nn.KLDivLoss(reduction="batchmean", log_target=True)(scores.log_softmax(-1), (teacher * 0.7).log_softmax(-1))
    else:
        theirs = nn.CrossEntropyLoss()(scores, torch.zeros(n_triples, dtype=torch.long))
    if in_batch:
        theirs = theirs + Upstream.compute_ib_loss(upstream, Q, all_D, all_keep)
    expected = gradients(theirs, Q, D)

    columns, target = batch_columns(triples, {}, in_batch)
    target = target._replace(teacher=teacher if scored else None)
    loss = choose_loss("colbert-ai", SCORED if scored else PLAIN, in_batch, distillation_alpha=0.7)
    ours = gradients(loss(score_chunks([(Q, torch.ones(Q.shape[:2], dtype=torch.bool))], [(D[columns], keep[columns])]), target).mean(), Q, D)
    torch.testing.assert_close(ours, expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("name", ["kl", "margin_mse"])
def test_sentence_transformers_gives_the_same_values_and_gradients(name):
    """Its losses of multi-vector models, with ready vectors in place of a model."""
    from sentence_transformers.multi_vector_encoder import losses
    Q, D, keep, triples = texts_of(4, 3, seed=1)
    teacher = torch.randn(4, 3, generator=torch.Generator().manual_seed(3)) * 4
    model = lambda features, task=None: {"token_embeddings": features["vectors"], "attention_mask": features["attention_mask"]}
    loss = {"kl": losses.MultiVectorDistillKLDivLoss, "margin_mse": losses.MultiVectorMarginMSELoss}[name](None)
    loss.model = model
    columns = [list(column) for column in zip(*triples)]
    features = [{"vectors": Q, "attention_mask": torch.ones(4, 4)}, *({"vectors": D[c], "attention_mask": keep[c].float()} for c in columns[1:])]
    expected = gradients(loss(features, teacher), Q, D)
    columns, target = batch_columns(triples, {}, False)
    scores = score_chunks([(Q, torch.ones(4, 4, dtype=torch.bool))], [(D[columns], keep[columns])])
    ours = gradients(choose_loss(name, SCORED, False)(scores, target._replace(teacher=teacher)).mean(), Q, D)
    torch.testing.assert_close(ours, expected, rtol=1e-5, atol=1e-5)


# From data to a value


def unjudged():
    "Made data without validation: the last step is the result."
    return replace(made_data(), validation=[])


def scored_data():
    "Made data whose triples have one to three negatives and a teacher's scores."
    plain, draw = unjudged(), torch.Generator().manual_seed(2)
    triples = [[q, q, *((q + 3 + j) % 40 for j in range(1 + q % 3))] for q in range(30)]
    scores = [(8 * torch.rand(len(t) - 1, generator=draw)).tolist() for t in triples]
    return TrainingData(plain.queries, plain.corpus, triples, plain.positives, plain.validation, scores)


@pytest.mark.parametrize("name", LOSSES)
@pytest.mark.parametrize("processes", [1, 2, 3])
def test_a_batch_of_rows_of_several_lengths_over_processes(model, name, processes):
    """Each process holds its own queries and all columns; together they have the values of the triples one by one."""
    data, rows = scored_data(), [3, 8, 1, 5, 10]
    loss = choose_loss(name, data)
    parts = [TripleCollator(data, model.tokenizer, world_size=processes, rank=r, chunk_size=2)(rows) for r in range(processes)]
    with torch.no_grad():
        documents = [batch_scores(model, [q for p in parts for q in p["queries"]], p["documents"], p["places"]) for p in parts if p["documents"]]
    columns = torch.cat(documents, dim=1)  # queries in the order of the processes
    order, values, start = [i for r in range(processes) for i in range(r, len(rows), processes)], {}, 0
    for part in parts:
        n = len(part["target"].positives)
        values |= dict(zip(order[start:start + n], loss(columns[start:start + n], part["target"]).tolist()))
        start += max(n, 1)
    triples = [[int(x) for x in row if x >= 0] for row in data.triples[rows]]
    with torch.no_grad():
        vectors = {p: model.encode_documents([data.corpus[p]])[0] for t in triples for p in t[1:]}
        queries = {t[0]: model.encode_queries([data.queries[t[0]]])[0] for t in triples}
    s = {q: {p: float(maxsim(Q[None], D[None])) for p, D in vectors.items()} for q, Q in queries.items()}
    teacher = [[float(x) for x in row if x == x] for row in data.scores[rows]]
    expected = by_loops(name, True, s, triples, {q: set(data.positives[q].tolist()) for q in queries}, teacher)
    torch.testing.assert_close(torch.tensor([values[i] for i in range(len(rows))]), torch.tensor(expected), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("name", ["kl", "margin_mse"])
def test_training_on_scores_comes_closer_to_the_teacher(model, name, tmp_path):
    data = scored_data()
    collator, loss = TripleCollator(data, model.tokenizer, use_ib_negatives=False), choose_loss(name, data, False)
    def distance():
        batch = collator(range(len(data.triples)))
        with torch.no_grad():
            return loss(batch_scores(model, batch["queries"], batch["documents"], batch["places"]), batch["target"]).mean()
    before = distance()
    train_colbert(model, data, tmp_path / "run", loss=name, use_ib_negatives=False, **OPTIONS | {"epochs": 6, "learning_rate": 3e-3},
                  lr_scheduler_type="constant")
    assert distance() < 0.8 * before


# Names and refusals


def test_auto_takes_the_teacher_where_there_is_one(caplog):
    assert choose_loss("auto", PLAIN).name == "contrastive" and choose_loss("auto", SCORED).name == "kl"
    assert not caplog.records
    with caplog.at_level(logging.WARNING):
        choose_loss("contrastive", SCORED)
    assert "teacher" in caplog.text


@pytest.mark.parametrize("arguments, message", [
    (("hinge", PLAIN), "expected loss as 'auto' or one of 'contrastive', 'colbert-ai', 'kl', 'margin_mse', got 'hinge'"),
    ((None, PLAIN), "got None"), ((["kl"], SCORED), "got \\['kl'\\]"),
    (("kl", PLAIN), "teacher's scores for loss='kl'"), (("margin_mse", PLAIN), "teacher's scores for loss='margin_mse'")])
def test_a_loss_that_cannot_be_is_refused(arguments, message):
    with pytest.raises(ValueError, match=message):
        choose_loss(*arguments)


@pytest.mark.parametrize("alpha", [0, -1.0, math.nan, math.inf, True, "1", None])
def test_an_alpha_that_cannot_be_is_refused(alpha):
    with pytest.raises(ValueError, match="distillation_alpha"):
        choose_loss("kl", SCORED, distillation_alpha=alpha)


@pytest.mark.parametrize("dims", [[128], [0], [-1], [64, 64], [64.0], [True], 64, "64", None, ["64"], [129]])
def test_dims_that_cannot_be_are_refused(dims):
    with pytest.raises(ValueError, match="expected matryoshka_dims as a list of distinct whole numbers from 1 to 127"):
        check_dims(dims, 128)


def test_dims_that_can_be():
    assert check_dims([64, 32], 128) == (64, 32) and check_dims((), 128) == ()


# The first numbers of each vector


def test_the_trainer_scores_what_a_truncated_model_scores(model, data):
    batch = TripleCollator(data, model.tokenizer, chunk_size=3)(range(6))
    parts = [batch[name] for name in ("queries", "documents", "places")]
    with torch.no_grad():
        scores = TrainingModule(model, dims=(8, 4)).eval()(*parts, batch["shares"])
        for part, dim in zip(scores, (16, 8, 4)):
            torch.testing.assert_close(part, batch_scores(model.truncated(dim), *parts), rtol=1e-5, atol=1e-5)


def test_evaluation_a_dimension_is_that_of_truncated_models(model, data):
    qrels = {q: {q: 1} for q in range(30)}
    results = evaluate_dims(model, data.queries, data.corpus, qrels, [8, 3], ("nDCG@10", "MRR@10"))
    assert list(results) == [16, 8, 3]
    for dim, values in results.items():
        run = search(model.truncated(dim), data.queries, data.corpus, show_progress=False)
        assert values == pytest.approx(evaluate(run, qrels, ("nDCG@10", "MRR@10")), abs=1e-9)
    with pytest.raises(ValueError, match="matryoshka_dims"):
        evaluate_dims(model, data.queries, data.corpus, qrels, [16])


def test_trained_dims_stand_alone(encoder, tmp_path):
    """The same steps with and without: the loss of the first four numbers falls further with."""
    data = unjudged()
    collator = TripleCollator(data, fresh(encoder).tokenizer)
    batch, losses = collator(range(30)), {}
    for dims in ((), (4,)):
        model = fresh(encoder)
        train_colbert(model, data, tmp_path / str(len(dims)), matryoshka_dims=dims, **OPTIONS | {"epochs": 8})
        with torch.no_grad():
            scores = batch_scores(model.truncated(4), batch["queries"], batch["documents"], batch["places"])
        losses[dims] = choose_loss("contrastive", data)(scores, batch["target"]).mean().item()
    assert losses[4,] < 0.95 * losses[()]
