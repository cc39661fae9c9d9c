"""Planning a run: steps, order, hardware, the pool of validation."""

import pytest
import torch

from colbert_nb.training_plan import ShuffledTriples, advise, check_arguments, choose_engine, plan_steps, validation_pool


def test_order_is_by_seed_and_each_pass_holds_every_triple():
    items = lambda seed: [ShuffledTriples(11, 33, seed)[i] for i in range(33)]
    assert items(1) == items(1) != items(2)
    assert all(sorted(items(1)[i:i + 11]) == list(range(11)) for i in (0, 11, 22)) and items(1)[:11] != items(1)[11:22]


def test_plans_cover_every_triple():
    for n in range(1, 40):
        for batch_size, accumsteps in ((2, 1), (8, 1), (8, 4), (32, 4)):
            plan = plan_steps(n, batch_size=batch_size, accumsteps=accumsteps, epochs=3)
            assert plan.n_items == 3 * n and plan.steps == -(-3 * n // plan.batch_size) and plan.batch_size <= min(n, batch_size)
            assert plan.batch_size % plan.accumsteps == 0 and plan.warmup_steps == plan.steps // 10
            assert plan.batch_size // plan.accumsteps <= batch_size // accumsteps


def test_the_pool_holds_every_positive_and_nothing_twice():
    rows = [{"query": "q", "positives": [i], "candidates": [i, *range(20, 60)]} for i in range(10)]
    for limit in (1, 10, 25, 1000):
        pool = validation_pool(rows, limit)
        assert set(range(10)) <= set(pool) and len(pool) == len(set(pool)) == min(max(10, limit), 50)
    assert validation_pool([], 5) == []


def test_the_engine_follows_the_hardware(monkeypatch):
    monkeypatch.setattr(torch.cpu, "_is_avx512_bf16_supported", lambda: True, raising=False)
    assert choose_engine("cpu").bf16 and choose_engine("cpu").attn_implementation == "eager"
    monkeypatch.setattr(torch.cpu, "_is_avx512_bf16_supported", lambda: False, raising=False)
    monkeypatch.setattr(torch.cpu, "_is_amx_tile_supported", lambda: False, raising=False)
    engine = choose_engine("cpu")
    assert not engine.bf16 and engine.attn_implementation == "sdpa" and choose_engine("cpu", bf16=True).bf16
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (7, 5))
    assert not choose_engine("cuda:0").bf16
    with pytest.raises(ValueError, match="bfloat16"):
        choose_engine("cuda:0", bf16=True)


def test_each_choice_of_the_engine_has_a_reason_and_can_be_overridden():
    line = str(choose_engine("cpu", bf16=False))
    for name in ("bf16", "attn_implementation", "dropout", "optim", "chunk_size", "tokenize_ahead"):
        assert f"{name}=" in line
    given = dict(bf16=True, attn_implementation="eager", dropout=None, optim="sgd", chunk_size=3, tokenize_ahead=False)
    engine = choose_engine("cpu", **given)
    assert {name: getattr(engine, name) for name in given} == given and str(engine).count("as asked") == len(given)


def test_order_of_the_data_where_nothing_is_shuffled():
    triples = ShuffledTriples(4, 10, shuffle=False)
    assert [triples[i] for i in range(len(triples))] == [0, 1, 2, 3, 0, 1, 2, 3, 0, 1]


def test_advice_follows_size_start_and_settings():
    small = dict(steps=58, learning_rate=5e-6, query_expansion=True, plain=True)
    rate, expansion = advise(**small)
    assert "learning_rate=5e-06" in rate and "less than 5e-5" in rate and "Try query_expansion=False" in expansion
    assert advise(**small | dict(learning_rate=5e-5)) == [expansion] and advise(**small | dict(query_expansion=False)) == [rate]
    assert advise(**small | dict(plain=False)) == advise(**small | dict(steps=31_250)) == []


def test_further_arguments_are_those_of_transformers():
    check_arguments({"weight_decay": 0.1, "report_to": "none", "lr_scheduler_type": "cosine"})
    for given, words in (({"max_steps": 3}, "maxsteps instead of"), ({"data_seed": 1}, "seed instead of"), ({"wieght_decay": 1}, "wieght_decay")):
        with pytest.raises(ValueError, match=words):
            check_arguments(given)
