"""Training: what does not teach. Batches from random data, equal and resumed runs, refused input, what a run leaves behind."""

import inspect
import json
import math
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import BertConfig, BertModel, EarlyStoppingCallback, PreTrainedTokenizerFast, TrainerCallback

from colbert_nb.data import TrainingData
from colbert_nb.encoder import ColBERT
from colbert_nb.training import (ShuffledTriples, TripleCollator, batch_columns, batch_scores, check_training, checkpoints,
                                 choose_engine, contrastive_loss, plan_steps, read_log, train_colbert, validation_pool)

WORDS = [f"word{i}" for i in range(60)]


@pytest.fixture(scope="session")
def encoder(tmp_path_factory) -> Path:
    "A random BERT of two small layers, with a word tokenizer."
    from tokenizers import Tokenizer, models, pre_tokenizers, processors
    folder = tmp_path_factory.mktemp("tiny")
    special = ["[PAD]", "[unused0]", "[unused1]", "[UNK]", "[CLS]", "[SEP]", "[MASK]"]
    vocabulary = {word: i for i, word in enumerate(special + WORDS)}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token="[UNK]"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer.post_processor = processors.TemplateProcessing(
        single="[CLS] $A [SEP]", special_tokens=[(t, vocabulary[t]) for t in ("[CLS]", "[SEP]")])
    PreTrainedTokenizerFast(tokenizer_object=tokenizer, unk_token="[UNK]", pad_token="[PAD]", cls_token="[CLS]",
                            sep_token="[SEP]", mask_token="[MASK]").save_pretrained(folder)
    torch.manual_seed(0)
    BertModel(BertConfig(vocab_size=len(vocabulary), hidden_size=32, num_hidden_layers=2, num_attention_heads=2,
                         intermediate_size=64, max_position_embeddings=64)).save_pretrained(folder)
    return folder


@pytest.fixture
def model(encoder) -> ColBERT:
    return fresh(encoder)


def fresh(encoder: Path, **options) -> ColBERT:
    return ColBERT.from_pretrained(encoder, dim=16, device="cpu", query_maxlen=8, doc_maxlen=16, **options)


@pytest.fixture
def data() -> TrainingData:
    return made_data()


def made_data() -> TrainingData:
    "Passages of three to twelve words; query i is two words of passage i."
    draw = torch.Generator().manual_seed(1)
    passages = [[WORDS[w] for w in torch.randint(60, (3 + i % 10,), generator=draw)] for i in range(40)]
    triples = [[q, q, (q + 7) % 40] for q in range(30)] + [[q, q, (q + 11) % 40] for q in range(3)]
    validation = [{"query": " ".join(passages[p][:2]), "positives": [p], "candidates": [p, *range(10)]} for p in range(30, 40)]
    return TrainingData([" ".join(p[-2:]) for p in passages[:30]], [" ".join(p) for p in passages], triples,
                        {q: [q] for q in range(30)}, validation)


OPTIONS = dict(batch_size=6, learning_rate=1e-3, epochs=2)


def weights(folder: Path) -> dict:
    return ColBERT.from_pretrained(folder, device="cpu").state_dict()


def difference(a: dict, b: dict) -> float:
    assert a.keys() == b.keys()
    return max((a[k] - b[k]).abs().max().item() for k in a if a[k].is_floating_point())


class StopAt(TrainerCallback):
    def __init__(self, step):
        self.step = step

    def on_step_end(self, args, state, control, **kwargs):
        if state.global_step == self.step:
            raise KeyboardInterrupt


# Batches

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
    batch = TripleCollator(data, tiny_tokenizer, in_batch, chunk_size=2)(data.triples)
    texts = [row[keep.bool()].tolist() for chunk in batch["documents"] for row, keep in zip(chunk.input_ids, chunk.attention_mask)]
    assert len({tuple(t) for t in texts}) == len(texts) == batch["allowed"].shape[1]  # each distinct text once
    tokens = lambda p: tiny_tokenizer.documents([data.corpus[p]]).input_ids[0].tolist()
    for row, (query, positive, *negatives) in enumerate(data.triples):
        known = [tokens(p) for q, ps in data.positives.items() if data.queries[q] == data.queries[query] for p in ps]
        inside = [text for text, allowed in zip(texts, batch["allowed"][row]) if allowed]
        assert texts[batch["positives"][row]] == tokens(positive) and tokens(positive) in inside
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
    columns, positives, allowed = batch_columns([(0, 0, 1, 2), (1, 3, 4, 0)], {0: {0}, 1: {3}}, use_ib_negatives=False)
    assert columns == [0, 1, 2, 3, 4] and positives.tolist() == [0, 3]
    assert allowed.tolist() == [[True, True, True, False, False], [True, False, False, True, True]]


def test_chunks_and_tokenising_once_change_nothing(model, data):
    whole, chunks = (TripleCollator(data, model.tokenizer, chunk_size=size)(data.triples[:9]) for size in (100, 3))
    results = []
    for batch in (whole, chunks):
        model.zero_grad()
        scores = batch_scores(model, batch["queries"], batch["documents"])
        contrastive_loss(scores, batch["positives"], batch["allowed"]).backward()
        results.append((scores.detach(), model.linear.weight.grad.clone()))
    torch.testing.assert_close(results[0], results[1], rtol=1e-5, atol=1e-6)
    collator = TripleCollator(data, model.tokenizer)
    collator.documents.limit = 5
    for start in range(0, 30, 6):
        again = collator(data.triples[start:start + 6])
        fresh_batch = TripleCollator(data, model.tokenizer)(data.triples[start:start + 6])
        assert all(torch.equal(a, b) for x, y in zip(again["documents"], fresh_batch["documents"]) for a, b in zip(x, y))


@pytest.mark.parametrize("expansion", [True, False])
def test_cached_rows_are_the_tokenizers(encoder, data, expansion):
    model = fresh(encoder, query_expansion=expansion)
    batch = TripleCollator(data, model.tokenizer)(data.triples[:5])
    for ours, theirs in zip(batch["queries"], model.tokenizer.queries([data.queries[q] for q, *_ in data.triples[:5]])):
        assert torch.equal(ours, theirs)


def test_order_is_by_seed_and_each_pass_holds_every_triple():
    triples = [[i, i, i + 1] for i in range(11)]
    items = lambda seed: [ShuffledTriples(triples, 33, seed)[i] for i in range(33)]
    assert items(1) == items(1) != items(2)
    assert all(sorted(items(1)[i:i + 11]) == triples for i in (0, 11, 22)) and items(1)[:11] != items(1)[11:22]


# Runs

def test_equal_seeds_give_equal_weights_and_logs(encoder, data, tmp_path):
    paths = [train_colbert(fresh(encoder), data, tmp_path / name, **OPTIONS) for name in "ab"]
    assert difference(*map(weights, paths)) == 0
    for name in ("log.jsonl", "run.json", "best/artifact.metadata", "best/model.safetensors"):
        assert (tmp_path / "a" / name).read_bytes() == (tmp_path / "b" / name).read_bytes()
    other = train_colbert(fresh(encoder), data, tmp_path / "c", **OPTIONS, seed=1)
    assert difference(weights(paths[0]), weights(other)) > 1e-5


@pytest.mark.parametrize("step, options", [(1, {}), (4, {}), (5, {"accumsteps": 3}), (10, {"dropout": 0.1}), (11, {"dropout": 0.1})])
def test_a_stopped_run_ends_with_the_weights_of_an_undisturbed_one(encoder, data, tmp_path, step, options):
    options = OPTIONS | options
    train_colbert(fresh(encoder), data, tmp_path / "whole", **options)
    with pytest.raises(KeyboardInterrupt):
        train_colbert(fresh(encoder), data, tmp_path / "cut", callbacks=[StopAt(step)], **options)
    (tmp_path / "cut" / ".checkpoint-9.part").mkdir()
    resumed = fresh(encoder)
    best = train_colbert(resumed, data, tmp_path / "cut", resume=True, **options)
    assert list(checkpoints(tmp_path / "whole")) == list(checkpoints(tmp_path / "cut"))
    for whole, cut in zip(checkpoints(tmp_path / "whole").values(), checkpoints(tmp_path / "cut").values()):
        assert difference(weights(whole), weights(cut)) <= 1e-6
    assert read_log(tmp_path / "whole") == read_log(tmp_path / "cut")
    assert difference(weights(best), resumed.state_dict()) == 0
    assert not [p for p in (tmp_path / "cut").iterdir() if p.name.startswith(".")]


def test_a_finished_run_is_returned_and_an_absent_one_begun(encoder, data, tmp_path):
    best = train_colbert(fresh(encoder), data, tmp_path / "run", resume=True, **OPTIONS)
    before = {p: p.stat().st_mtime_ns for p in best.iterdir()}
    model = fresh(encoder)
    assert train_colbert(model, data, tmp_path / "run", resume=True, **OPTIONS) == best
    assert before == {p: p.stat().st_mtime_ns for p in best.iterdir()} and difference(weights(best), model.state_dict()) == 0


def test_the_best_checkpoint_is_returned_and_two_more_are_kept(encoder, data, tmp_path, monkeypatch):
    values = iter([0.1, 0.2, 0.9, 0.3, 0.4, 0.5, 0.4, 0.3, 0.2, 0.1, 0.0, 0.0])
    monkeypatch.setattr("colbert_nb.training.validate", lambda *args, **kwargs: next(values))
    best = train_colbert(fresh(encoder), data, tmp_path / "run", **OPTIONS)
    kept = list(checkpoints(tmp_path / "run"))
    assert len(kept) == 3 and kept[0] == 4 and kept[-1] == 11
    assert difference(weights(best), weights(tmp_path / "run" / "checkpoint-4")) == 0
    names = {p.name for p in best.iterdir()}
    assert {"config.json", "model.safetensors", "tokenizer.json", "tokenizer_config.json", "artifact.metadata"} <= names
    assert not [p for p in best.rglob("*") if p.suffix in (".bin", ".pt", ".pth", ".pkl")]
    steps = {line["step"]: line["nDCG@10"] for line in read_log(tmp_path / "run") if "nDCG@10" in line}
    assert steps[0] == 0.1 and steps[4] == 0.9


def test_without_validation_the_last_checkpoint_is_the_best(encoder, data, tmp_path):
    data.validation.clear()
    best = train_colbert(fresh(encoder), data, tmp_path / "run", **OPTIONS)
    assert difference(weights(best), weights(tmp_path / "run" / "checkpoint-11")) == 0


def test_early_stopping_of_transformers_works(encoder, data, tmp_path, monkeypatch):
    values = iter([0.1, 0.9, 0.3, 0.2, 0.1])
    monkeypatch.setattr("colbert_nb.training.validate", lambda *args, **kwargs: next(values))
    train_colbert(fresh(encoder), data, tmp_path / "run", callbacks=[EarlyStoppingCallback(2)], **OPTIONS)
    assert max(line["step"] for line in read_log(tmp_path / "run")) == 6
    assert difference(weights(tmp_path / "run" / "best"), weights(tmp_path / "run" / "checkpoint-2")) == 0


def test_parts_of_a_step_without_in_batch_negatives_give_the_whole_steps_weights(encoder, data, tmp_path):
    options = OPTIONS | dict(use_ib_negatives=False, batch_size=8, epochs=1)  # 33 triples: the last step has one
    a, b = (train_colbert(fresh(encoder), data, tmp_path / str(n), accumsteps=n, **options) for n in (1, 4))
    last = [list(checkpoints(x.parent).values())[-1] for x in (a, b)]
    assert difference(*map(weights, last)) < 1e-5


def test_training_learns_and_leaves_the_model_as_it_was_otherwise(encoder, data, tmp_path):
    model = fresh(encoder)
    attention, rates = model.encoder.config._attn_implementation, [m.p for m in model.modules() if isinstance(m, torch.nn.Dropout)]
    train_colbert(model, data, tmp_path / "run", **OPTIONS | dict(epochs=8, learning_rate=3e-3))
    lines = [line for line in read_log(tmp_path / "run") if "loss" in line]
    assert sum(line["loss"] for line in lines[-5:]) < 0.7 * sum(line["loss"] for line in lines[:5])
    assert [line["step"] for line in lines] == list(range(1, 45))
    assert lines[0]["learning_rate"] < lines[3]["learning_rate"] == pytest.approx(3e-3, rel=0.3) and lines[-1]["learning_rate"] < 2e-4
    assert lines[-1]["positive"] > lines[-1]["hardest_negative"]
    assert model.encoder.config._attn_implementation == attention and not model.training
    assert rates == [m.p for m in model.modules() if isinstance(m, torch.nn.Dropout)]


def test_a_folder_of_training_data_will_do(encoder, data, tmp_path):
    (tmp_path / "data").mkdir()
    write = lambda name, lines: (tmp_path / "data" / name).write_text("".join(f"{line}\n" for line in lines))
    write("queries.train.colbert.tsv", (f"{i}\t{t}" for i, t in enumerate(data.queries)))
    write("corpus.train.colbert.tsv", (f"{i}\t{t}" for i, t in enumerate(data.corpus)))
    write("triples.train.colbert.jsonl", map(json.dumps, data.triples))
    assert train_colbert(fresh(encoder), tmp_path / "data", tmp_path / "run", **OPTIONS).is_dir()


def test_nothing_is_printed_and_nothing_written_elsewhere(encoder, data, tmp_path, capfd, monkeypatch):
    (tmp_path / "here").mkdir()
    monkeypatch.chdir(tmp_path / "here")
    train_colbert(fresh(encoder), data, tmp_path / "run", **OPTIONS)
    assert not list((tmp_path / "here").iterdir()) and {p.name for p in tmp_path.iterdir()} == {"here", "run"}
    assert capfd.readouterr() == ("", "")
    for path in (p for p in (tmp_path / "run").rglob("*") if p.suffix in (".json", ".jsonl", ".metadata")):
        assert str(tmp_path) not in path.read_text(encoding="utf-8"), path.name


def test_the_hash_seed_and_the_process_do_not_matter(encoder, data, tmp_path):
    """The same run in another process whose sets are in another order."""
    train_colbert(fresh(encoder), data, tmp_path / "here", **OPTIONS)
    script = ("import sys; from pathlib import Path; from test_training import *\n"
              "data = made_data()\n"
              "train_colbert(fresh(Path(sys.argv[1])), data, sys.argv[2], **OPTIONS)")
    environment = os.environ | {"PYTHONHASHSEED": "7", "PYTHONPATH": str(Path(__file__).parent)}
    subprocess.run([sys.executable, "-c", script, str(encoder), str(tmp_path / "there")], check=True, env=environment)
    for name in ("log.jsonl", "run.json", "best/model.safetensors"):
        assert (tmp_path / "here" / name).read_bytes() == (tmp_path / "there" / name).read_bytes()


# What is refused

@pytest.mark.parametrize("options, words", [
    (dict(batch_size=1), "batch_size as a whole number of 2 or more"), (dict(batch_size=0, use_ib_negatives=False), "batch_size"),
    (dict(batch_size=2.0), "batch_size"), (dict(batch_size=True), "batch_size"),
    (dict(maxsteps=0), "maxsteps"), (dict(accumsteps=0), "accumsteps"), (dict(accumsteps=-1), "accumsteps"),
    (dict(batch_size=6, accumsteps=4), "equal parts"), (dict(batch_size=6, accumsteps=6), "parts of 2 or more"),
    (dict(epochs=0), "epochs"), (dict(epochs=1.5), "epochs"), (dict(warmup_steps=-1), "warmup_steps"), (dict(warmup_steps="some"), "warmup_steps"),
    (dict(warmup_steps=1000), "'auto' takes a tenth"), (dict(learning_rate=0), "learning_rate"), (dict(learning_rate=float("nan")), "learning_rate"),
    (dict(learning_rate="1e-5"), "learning_rate"), (dict(keep=0), "keep"), (dict(dropout=1.0), "dropout"), (dict(max_grad_norm=-1), "max_grad_norm"),
    (dict(seed=-1), "seed"), (dict(chunk_size=0), "chunk_size"), (dict(validation_passages=0), "validation_passages"),
    (dict(validation_metric="F-score"), "metric"), (dict(per_device_train_batch_size=4), "batch_size instead of"),
    (dict(nonsense=1), "nonsense"), (dict(max_steps=3), "maxsteps instead of"),
])
def test_settings_that_cannot_be_meant(model, data, tmp_path, options, words):
    with pytest.raises(ValueError, match=words):
        train_colbert(model, data, tmp_path / "run", **OPTIONS | options)
    assert not (tmp_path / "run").exists()
    if options.keys() <= set(inspect.signature(train_colbert).parameters) - {"validation_metric"}:
        with pytest.raises(ValueError, match=words):
            check_training(len(data.triples), tmp_path / "run", **OPTIONS | options)


@pytest.mark.parametrize("triple", [[0, 1], [0, 1, 40], [0, -1, 2], [30, 1, 2], [0, 1, "2"], [0, 1, [2, 0.5]], [0, 1, True]])
def test_triples_that_are_none(model, data, tmp_path, triple):
    data.triples[4] = triple
    with pytest.raises(ValueError, match="triple 4: expected .query, positive, negative"):
        train_colbert(model, data, tmp_path / "run", **OPTIONS)
    assert not (tmp_path / "run").exists()


def test_a_positive_among_the_negatives(model, data, tmp_path):
    data.triples[5] = [5, 5, 7, 8]
    data.positives[5] = [5, 8]
    with pytest.raises(ValueError, match="triple 5: .* got passage 8"):
        train_colbert(model, data, tmp_path / "run", **OPTIONS)
    data.positives[5] = [5]
    data.corpus[8] = data.corpus[5]  # another number, the same text
    with pytest.raises(ValueError, match="triple 5: .* got passage 8"):
        train_colbert(model, data, tmp_path / "run", **OPTIONS)


def test_no_triples_and_few_triples(encoder, data, tmp_path, caplog):
    few = TrainingData(data.queries, data.corpus, data.triples[:5], data.positives, [])
    with caplog.at_level("WARNING"):
        train_colbert(fresh(encoder), few, tmp_path / "few", batch_size=32, accumsteps=2)
    assert "5 triples are fewer than batch_size=32" in caplog.text and (tmp_path / "few/best").is_dir()
    with pytest.raises(ValueError, match="one triple or more"):
        train_colbert(fresh(encoder), TrainingData(data.queries, data.corpus, [], {}, []), tmp_path / "none")
    assert not (tmp_path / "none").exists()


def test_plans_cover_every_triple():
    for n in range(1, 40):
        for batch_size, accumsteps in ((2, 1), (8, 1), (8, 4), (32, 4)):
            plan = plan_steps(n, batch_size=batch_size, accumsteps=accumsteps, epochs=3)
            assert plan.n_items == 3 * n and plan.steps == -(-3 * n // plan.batch_size) and plan.batch_size <= min(n, batch_size)
            assert plan.batch_size % plan.accumsteps == 0 and plan.warmup_steps == plan.steps // 10
            assert plan.batch_size // plan.accumsteps <= batch_size // accumsteps


def test_folders_that_are_not_a_run_are_left_alone(encoder, data, tmp_path):
    (tmp_path / "run").mkdir()
    (tmp_path / "run/notes.txt").write_text("mine")
    for options in ({}, {"overwrite": True}, {"resume": True}):
        with pytest.raises(ValueError, match="notes.txt"):
            train_colbert(fresh(encoder), data, tmp_path / "run", **OPTIONS, **options)
    with pytest.raises(ValueError, match="expected a new folder"):
        train_colbert(fresh(encoder), data, tmp_path / "run/notes.txt", **OPTIONS)
    assert [p.name for p in (tmp_path / "run").iterdir()] == ["notes.txt"]


def test_an_earlier_run_is_replaced_only_when_asked(encoder, data, tmp_path):
    train_colbert(fresh(encoder), data, tmp_path / "run", **OPTIONS)
    (tmp_path / "run/results.json").write_text("{}")
    before = {p: p.read_bytes() for p in (tmp_path / "run").rglob("*") if p.is_file()}
    longer = OPTIONS | {"epochs": 3}
    with pytest.raises(ValueError, match="overwrite=True"):
        check_training(len(data.triples), tmp_path / "run", **OPTIONS)
    check_training(len(data.triples), tmp_path / "run", **OPTIONS, resume=True)
    for options, words in ((longer, "overwrite=True"), (longer | {"resume": True}, "epochs=2 .* got 3")):
        with pytest.raises(ValueError, match=words):
            train_colbert(fresh(encoder), data, tmp_path / "run", **options)
    data.corpus[0] += " word1"
    with pytest.raises(ValueError, match="sha256"):
        train_colbert(fresh(encoder), data, tmp_path / "run", **OPTIONS, resume=True)
    assert before == {p: p.read_bytes() for p in (tmp_path / "run").rglob("*") if p.is_file()}
    train_colbert(fresh(encoder), data, tmp_path / "run", **longer, overwrite=True)
    assert max(checkpoints(tmp_path / "run")) == 17 and (tmp_path / "run/results.json").exists()


def test_a_loss_that_is_not_finite_ends_the_run_and_names_the_last_good_checkpoint(encoder, data, tmp_path):
    class Spoil(TrainerCallback):
        def on_step_end(self, args, state, control, model, **kwargs):
            if state.global_step == 5:
                model.model.linear.weight.data.fill_(float("nan"))

    data.validation.clear()
    with pytest.raises(FloatingPointError, match="checkpoint-4"):
        train_colbert(fresh(encoder), data, tmp_path / "run", callbacks=[Spoil()], **OPTIONS)


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
