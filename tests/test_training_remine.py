"""Rounds of training with the model's own negatives: what is mined, stopped runs, refused input."""

from dataclasses import replace

import numpy as np
import pytest
from tiny import OPTIONS, StopAt, difference, fresh, made_data, make_encoder, weights

import colbert_nb.training_remine
from colbert_nb.evaluation import search
from colbert_nb.training_remine import mine_triples, train_with_own_negatives
from colbert_nb.training_run import train_colbert

ROUNDS = dict(re_mine_every=4, num_new_negatives=3, mining={"min_rank": 1, "max_rank": 20}, maxsteps=10) | OPTIONS | dict(epochs=3, eval_steps=2, save_steps=2)


@pytest.fixture(scope="module")
def encoder(tmp_path_factory):
    return make_encoder(tmp_path_factory.mktemp("encoder"))


@pytest.fixture(scope="module")
def whole(encoder, tmp_path_factory):
    run = tmp_path_factory.mktemp("runs") / "whole"
    model = fresh(encoder, init="random")
    return run, train_with_own_negatives(model, made_data(), run, **ROUNDS), model


def test_mined_triples_are_what_the_model_ranks_high(encoder):
    model, data = fresh(encoder, init="random"), made_data()
    triples = mine_triples(model, data, num_new_negatives=3, min_rank=1, max_rank=4, sampling="top")
    run = search(model, list(data.queries), list(data.corpus), k=40)
    assert set(triples[:, 0].tolist()) == set(range(30)) and triples.dtype == np.int32
    for q in range(30):
        rows = triples[triples[:, 0] == q]
        assert set(rows[:, 1].tolist()) == {q}
        assert set(rows[:, 2].tolist()) == set([int(p) for p in run[str(q)] if int(p) != q][1:4])
    assert (triples == mine_triples(model, data, num_new_negatives=3, min_rank=1, max_rank=4, sampling="top")).all()


def test_queries_without_triples_are_left_alone_and_ids_stay(encoder):
    data = made_data()
    some = replace(data, triples=data.triples[np.isin(data.triples[:, 0], (3, 17, 29))])
    triples = mine_triples(fresh(encoder, init="random"), some, num_new_negatives=2, max_rank=30, min_rank=0)
    assert set(triples[:, 0].tolist()) == {3, 17, 29} and (triples[:, 1] == triples[:, 0]).all()


def test_a_run_leaves_rounds_and_a_best(whole):
    run, best, model = whole
    assert sorted(p.name for p in run.iterdir()) == ["best", "round-0", "round-1", "round-2", "run.json", "triples-1.npy", "triples-2.npy"]
    assert best == run / "best" and difference(weights(best), {k: v.cpu() for k, v in model.state_dict().items()}) == 0
    assert difference(weights(best), weights(run / "round-2" / "best")) == 0
    assert not np.array_equal(np.load(run / "triples-1.npy"), np.load(run / "triples-2.npy"))


def test_one_round_is_a_plain_run(encoder, tmp_path):
    options = OPTIONS | dict(maxsteps=4)
    one, other = fresh(encoder, init="random"), fresh(encoder, init="random")
    train_with_own_negatives(one, made_data(), tmp_path / "rounds", re_mine_every=100, **options)
    train_colbert(other, made_data(), tmp_path / "plain", **options)
    assert difference(one.state_dict(), other.state_dict()) == 0


@pytest.mark.parametrize("step", [2, 4, 7])
def test_stopped_and_resumed(step, whole, encoder, tmp_path):
    run, _, model = whole

    class Stop(StopAt):
        seen = 0

        def on_step_end(self, args, state, control, **kwargs):
            self.seen += 1
            if self.seen == self.step:
                raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        train_with_own_negatives(fresh(encoder, init="random"), made_data(), tmp_path / "run", callbacks=[Stop(step)], **ROUNDS)
    again = fresh(encoder, init="random")
    train_with_own_negatives(again, made_data(), tmp_path / "run", resume=True, **ROUNDS)
    assert difference(again.state_dict(), model.state_dict()) < 1e-6
    for number in (1, 2):
        assert np.array_equal(np.load(tmp_path / "run" / f"triples-{number}.npy"), np.load(run / f"triples-{number}.npy"))


def test_stopped_while_it_mines(whole, encoder, tmp_path, monkeypatch):
    def stop(*args, **kwargs):
        raise KeyboardInterrupt

    monkeypatch.setattr(colbert_nb.training_remine, "mine_triples", stop)
    with pytest.raises(KeyboardInterrupt):
        train_with_own_negatives(fresh(encoder, init="random"), made_data(), tmp_path / "run", **ROUNDS)
    assert sorted(p.name for p in (tmp_path / "run").iterdir()) == ["round-0", "run.json"]
    monkeypatch.undo()
    again = fresh(encoder, init="random")
    train_with_own_negatives(again, made_data(), tmp_path / "run", resume=True, **ROUNDS)
    assert difference(again.state_dict(), whole[2].state_dict()) < 1e-6


def test_a_finished_run_is_loaded_and_mines_nothing(whole, encoder, monkeypatch):
    run, best, model = whole
    monkeypatch.setattr(colbert_nb.training_remine, "mine_triples", None)
    again = fresh(encoder, init="random")
    assert train_with_own_negatives(again, made_data(), run, resume=True, **ROUNDS) == best
    assert difference(again.state_dict(), model.state_dict()) == 0


def test_overwrite_begins_again(encoder, tmp_path, whole):
    options = ROUNDS | {"maxsteps": 6}
    train_with_own_negatives(fresh(encoder, init="random"), made_data(), tmp_path / "run", **options | {"mining": {"max_rank": 15}})
    again = fresh(encoder, init="random")
    train_with_own_negatives(again, made_data(), tmp_path / "run", overwrite=True, **ROUNDS)
    assert difference(again.state_dict(), whole[2].state_dict()) < 1e-6


@pytest.mark.parametrize("wrong, word", [
    (dict(re_mine_every=0), "re_mine_every"), (dict(re_mine_every=True), "re_mine_every"), (dict(re_mine_every="4"), "re_mine_every"),
    (dict(mining={"max_rank": 0}), "max_rank"), (dict(mining={"max_positive_similarity": 0.9}), "one vector"), (dict(batch_size=1), "batch_size"),
    (dict(warmup_steps=3), "warmup_steps"), (dict(loss="best"), "loss"),
])
def test_bad_settings_are_refused_before_a_step(wrong, word, encoder, tmp_path):
    with pytest.raises(ValueError, match=word):
        train_with_own_negatives(fresh(encoder, init="random"), made_data(), tmp_path / "run", **ROUNDS | wrong)
    assert not (tmp_path / "run").exists()


def test_other_settings_other_data_and_scores_are_refused(whole, encoder, tmp_path):
    run, _, _ = whole
    model, data = fresh(encoder, init="random"), made_data()
    with pytest.raises(ValueError, match="resume=True"):
        train_with_own_negatives(model, data, run, **ROUNDS)
    for change in (dict(re_mine_every=5), dict(mining={"min_rank": 1, "max_rank": 21}), dict(learning_rate=2e-3)):
        with pytest.raises(ValueError, match="begun with"):
            train_with_own_negatives(model, data, run, resume=True, **ROUNDS | change)
    with pytest.raises(ValueError, match="begun with"):
        train_with_own_negatives(model, replace(data, triples=data.triples[:20]), run, resume=True, **ROUNDS | {"maxsteps": 10, "epochs": 4})
    scored = replace(data, scores=np.zeros((len(data.triples), 2), dtype=np.float32))
    with pytest.raises(ValueError, match="scores"):
        train_with_own_negatives(model, scored, tmp_path / "run", **ROUNDS)
    assert not (tmp_path / "run").exists()
