"""BM25 and ColBERT as miners: against their references, with rules, and while the weights change."""

import json
import logging

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from tiny import WORDS, fresh, made_data, make_encoder

from colbert_nb.data import load_training_data, prepare
from colbert_nb.evaluation import bm25_run, search
from colbert_nb.mining import HardNegativeMiner
from colbert_nb.mining_others import BM25Miner, ColBERTMiner, make_miner
from colbert_nb.trainer import RAGTrainer

texts = st.lists(st.lists(st.sampled_from(WORDS[:12]), min_size=1, max_size=6).map(" ".join), min_size=1, max_size=30)


@pytest.fixture(scope="module")
def late(tmp_path_factory):
    return fresh(make_encoder(tmp_path_factory.mktemp("encoder")), init="random")


@settings(max_examples=40, deadline=None)
@given(corpus=texts, queries=texts, k=st.integers(1, 40))
def test_words_rank_as_bm25_run_does(corpus, queries, k):
    ids, scores = BM25Miner("en").fit(corpus).search(queries, k)
    run = bm25_run(queries, corpus, k=k)
    assert ids.shape == scores.shape == (len(queries), min(k, len(corpus)))
    for q in range(len(queries)):
        there = ids[q] >= 0
        assert [str(p) for p in ids[q][there]] == list(run[str(q)]) and np.allclose(scores[q][there], list(run[str(q)].values()))
        assert not there[there.argmin():].any() or there.all()


@settings(max_examples=40, deadline=None)
@given(corpus=texts, queries=texts, data=st.data())
def test_words_never_give_a_positive_nor_a_passage_without_a_word(corpus, queries, data):
    positives = {q: data.draw(st.lists(st.integers(0, len(corpus) - 1), max_size=2, unique=True)) for q in range(len(queries))}
    mined = BM25Miner("en", drop_same_text=False).mine(queries, corpus, positives, 5)
    for q, negatives in mined.items():
        shares = [p for p in range(len(corpus)) if set(corpus[p].split()) & set(queries[q].split()) and p not in positives[q]]
        assert set(negatives) <= set(shares) and (len(negatives) > 0) == (len(shares) > 0)


def test_margins_on_the_scores_of_words():
    corpus = ["sort an array", "sort array array", "array of strings", "strings", "cosine", "sort sort sort"] * 3
    corpus = [f"{text} number{i}" for i, text in enumerate(corpus)]
    miner = BM25Miner("en", min_rank=0, max_rank=20, sampling="top", absolute_margin=0.0)
    mined = miner.mine(["sort array"], corpus, {0: [0, 2]}, 20)
    scores = {int(p): s for p, s in bm25_run(["sort array"], corpus)["0"].items()}
    assert mined == {0: [p for p, s in scores.items() if s <= scores[2] and p not in (0, 2)]} and mined[0]


def test_languages(caplog):
    assert BM25Miner("en-GB").language == BM25Miner("English").language == "english" and BM25Miner("de").language == "german"
    caplog.set_level(logging.WARNING)
    german = BM25Miner("de").fit(["die Häuser am See", "der Wald"])
    assert german.search(["Haus"], 2)[0].tolist() == [[0, -1]]
    assert not caplog.records
    with caplog.at_level(logging.WARNING, "colbert_nb.mining_others"):
        assert BM25Miner("tlh").fit(["qapla batlh", "tlhingan hol"]).search(["batlh"], 1)[0].tolist() == [[0]]
    assert "'tlh'" in caplog.text


def test_bm25_refuses():
    for corpus, word in (([], "empty"), (["the of", "..."], "words"), (["a", 3], "passage 1")):
        with pytest.raises(ValueError, match=word):
            BM25Miner().fit(corpus)
    with pytest.raises(ValueError, match="one vector"):
        BM25Miner(max_positive_similarity=0.9)
    with pytest.raises(TypeError):
        BM25Miner(index="exact")


def test_a_colbert_ranks_as_search_does(late):
    data = made_data()
    miner = ColBERTMiner(late, min_rank=2, max_rank=12, sampling="top")
    mined = miner.mine(list(data.queries), list(data.corpus), {q: [q] for q in range(30)}, 10)
    run = search(late, list(data.queries), list(data.corpus), k=40)
    for q, negatives in mined.items():
        assert negatives == [int(p) for p in run[str(q)] if int(p) != q][2:12]
    assert miner.mine(list(data.queries), list(data.corpus), {q: [q] for q in range(30)}, 10, chunk_size=7) == mined


def test_margins_on_maxsim(late):
    data = made_data()
    queries, corpus = list(data.queries[:5]), list(data.corpus)
    miner = ColBERTMiner(late, min_rank=0, max_rank=40, sampling="top", absolute_margin=0.1)
    mined = miner.mine(queries, corpus, {q: [q] for q in range(5)}, 40)
    run = search(late, queries, corpus, k=40)
    for q, negatives in mined.items():
        assert negatives == [int(p) for p, s in run[str(q)].items() if s + 0.1 <= run[str(q)][str(q)] and int(p) != q]
    assert any(mined.values())


def test_new_weights_are_mined_with_and_old_ones_not_encoded_again(late, caplog):
    data, known = made_data(), {q: [q] for q in range(30)}
    queries, corpus = list(data.queries), list(data.corpus)
    miner = ColBERTMiner(late, sampling="top", min_rank=0, max_rank=5)
    with caplog.at_level(logging.INFO, "colbert_nb.mining_others"):
        before = miner.mine(queries, corpus, known, 5)
        assert miner.mine(queries, corpus, known, 5) == before and caplog.text.count("encoding 40 passages") == 1
        weight = late.linear.weight.detach().clone()
        with torch.no_grad():
            late.linear.weight[0] *= -3
        after = miner.mine(queries, corpus, known, 5)
        assert after != before and after == ColBERTMiner(late, sampling="top", min_rank=0, max_rank=5).mine(queries, corpus, known, 5)
        with torch.no_grad():
            late.linear.weight.copy_(weight)
        assert miner.mine(queries, corpus, known, 5) == before
    late.train()
    miner.mine(queries, corpus, known, 5)
    assert late.training and late.eval()


def test_weights_that_give_no_number_are_refused(late, tmp_path):
    late.save_pretrained(tmp_path / "late")
    broken = ColBERTMiner(tmp_path / "late", device="cpu")
    with torch.no_grad():
        broken.load().linear.weight.fill_(float("nan"))
    with pytest.raises(ValueError, match="NaN"):
        broken.mine(["word1"], ["word1 word2", "word3"], {}, 1)


def test_one_name_for_each(late, tmp_path):
    late.save_pretrained(tmp_path / "late")
    for model, kind, name in (("BM25", BM25Miner, "bm25"), (late, ColBERTMiner, "ColBERT"), (tmp_path / "late", ColBERTMiner, "late"),
                              (str(tmp_path / "late"), ColBERTMiner, "late"), ("org/dense", HardNegativeMiner, "org/dense")):
        miner = make_miner(model, language_code="de", device=torch.device("cpu"), min_rank=3)
        assert type(miner) is kind and miner.settings["model"] == name and miner.rules.min_rank == 3
        assert str(tmp_path) not in str(miner.settings)
    assert make_miner("bm25", language_code="de").language == "german"
    assert make_miner(tmp_path / "late", device="cpu").fit(["word1", "word2"]).search(["word1"], 1)[0].shape == (1, 1)
    with pytest.raises(ValueError, match="artifact.metadata"):
        ColBERTMiner(tmp_path)
    with pytest.raises(ValueError, match="folder"):
        make_miner(tmp_path / "nothing")
    with pytest.raises(TypeError):
        make_miner("bm25", index="auto")


def test_queries_below_the_minimum_give_no_triple_and_others_are_filled(tmp_path, caplog):
    rows = [("word1 word2", "word1 word2 word3"), ("word4", "word4 word5"), ("word6", "word6 word7")]
    rows += [(f"word{i} word1", f"word{i} word1 word8") for i in range(10, 20)]
    miner = BM25Miner(min_rank=0, max_rank=20, minimum=1)
    data = load_training_data(prepare(rows, tmp_path / "data", miner=miner, num_new_negatives=12, validation_fraction=0))
    assert miner.poor_queries == [1, 2] and set(data.triples[:, 0].tolist()) == {0, *range(3, 13)}
    assert "2 of 13 queries have fewer mined negatives than the miner's minimum" in caplog.text
    assert "11 of 13 queries have fewer than 12 mined negatives" in caplog.text and "make up" in caplog.text
    assert len(data.triples) == 11 * 12 and sorted(data.positives) == list(range(13))


def test_the_trainer_passes_miners_and_rules_through(late, tmp_path):
    late.save_pretrained(tmp_path / "late")
    rows = [(f"word{i} word1", f"word{i} word1 word{i + 1}") for i in range(10, 40)]
    trainer = RAGTrainer("name", tmp_path / "late", "de", n_usable_gpus=0)
    prepare = lambda name, **options: trainer.prepare_training_data(rows, data_out_path=tmp_path / name, num_new_negatives=3, **options)
    prepare("words", hard_negative_model="bm25", mining={"relative_margin": 0.1, "minimum": 1})
    assert type(trainer.miner) is BM25Miner and trainer.miner.language == "german"
    assert (trainer.miner.rules.relative_margin, trainer.miner.rules.min_rank, trainer.miner.rules.max_rank) == (0.1, 10, 110)
    assert json.loads((tmp_path / "words" / "manifest.json").read_text())["settings"]["miner"]["relative_margin"] == 0.1
    for model in (late, tmp_path / "late"):
        prepare("rows", hard_negative_model=model, hard_negative_minimum_rank=2, seed=7)
        assert type(trainer.miner) is ColBERTMiner and trainer.miner.rules.seed == 7 and trainer.miner.rules.min_rank == 2
    own = BM25Miner(min_rank=0, max_rank=5)
    prepare("own", hard_negative_model=own)
    assert trainer.miner is own and own.verdict is not None
    for wrong in (dict(hard_negative_model=own, mining={"min_rank": 3}), dict(mine_hard_negatives=False, mining={"min_rank": 3}),
                  dict(hard_negative_model="bm25", mining={"max_positive_similarity": 0.9}), dict(mining={"max_rank": 3})):
        with pytest.raises(ValueError):
            prepare("new", **wrong)
    assert not (tmp_path / "new").exists()
