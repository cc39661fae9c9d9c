"""Runs: equal and resumed ones, refused input, what a run leaves behind."""

import inspect
import json
import os
import subprocess
import sys
import threading
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from tiny import OPTIONS, StopAt, difference, fresh, made_data, weights
from transformers import EarlyStoppingCallback, TrainerCallback

from colbert_nb import training_run
from colbert_nb.data import TrainingData
from colbert_nb.encoder import ColBERT
from colbert_nb.training import TripleCollator
from colbert_nb.training_folder import checkpoints, read_log
from colbert_nb.training_run import check_training, train_colbert
from colbert_nb.training_step import TrainingModule


class Sparse(TrainerCallback):
    def __init__(self, seen):
        self.seen = seen

    def on_pre_optimizer_step(self, args, state, control, model, **kwargs):
        table = model.model.encoder.get_input_embeddings()
        self.seen.append((table.sparse, table.weight.grad.is_sparse))


def test_equal_seeds_give_equal_weights_and_logs(encoder, data, tmp_path):
    paths = [train_colbert(fresh(encoder), data, tmp_path / name, **OPTIONS) for name in "ab"]
    assert difference(*map(weights, paths)) == 0
    for name in ("log.jsonl", "run.json", "best/artifact.metadata", "best/model.safetensors"):
        assert (tmp_path / "a" / name).read_bytes() == (tmp_path / "b" / name).read_bytes()
    other = train_colbert(fresh(encoder), data, tmp_path / "c", **OPTIONS, seed=1)
    assert difference(weights(paths[0]), weights(other)) > 1e-5


@pytest.mark.parametrize("step, options", [(1, {}), (5, {"accumsteps": 3}), (11, {"mini_batch_size": 2, "dropout": 0.1})])
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
    monkeypatch.setattr("colbert_nb.training_run.validate", lambda *args, **kwargs: next(values))
    best = train_colbert(fresh(encoder), data, tmp_path / "run", **OPTIONS)
    kept = list(checkpoints(tmp_path / "run"))
    assert len(kept) == 3 and kept[0] == 4 and kept[-1] == 11
    assert difference(weights(best), weights(tmp_path / "run" / "checkpoint-4")) == 0
    names = {p.name for p in best.iterdir()}
    assert {"config.json", "model.safetensors", "tokenizer.json", "tokenizer_config.json", "artifact.metadata"} <= names
    assert not [p for p in best.rglob("*") if p.suffix in (".bin", ".pt", ".pth", ".pkl")]
    steps = {line["step"]: line["nDCG@10"] for line in read_log(tmp_path / "run") if "nDCG@10" in line}
    assert steps[0] == 0.1 and steps[4] == 0.9


@pytest.mark.parametrize("value, warned", [(1.0, True), (0.5, False)])
def test_of_equals_the_earliest_is_returned_and_a_perfect_validation_warned_of(encoder, data, tmp_path, monkeypatch, caplog, value, warned):
    values = iter([0.1, 0.2, *[value] * 10])
    monkeypatch.setattr("colbert_nb.training_run.validate", lambda *args, **kwargs: next(values))
    best = train_colbert(fresh(encoder), data, tmp_path / "run", **OPTIONS)
    steps = {line["step"]: line["nDCG@10"] for line in read_log(tmp_path / "run") if "nDCG@10" in line}
    first = min(step for step in steps if steps[step] == value)
    assert difference(weights(best), weights(tmp_path / "run" / f"checkpoint-{first}")) == 0
    assert any("hold out more queries" in line and f"from step {first} of 11" in line for line in caplog.messages) == warned


def test_a_word_table_that_does_not_learn_stays_as_it_is(encoder, data, tmp_path):
    "On a CPU the gradients of large tables are collected by rows, for tables that learn."
    model = fresh(encoder)
    start = torch.nn.functional.pad(model.encoder.embeddings.word_embeddings.weight.detach(), (0, 0, 0, 5000))
    model.encoder.embeddings.word_embeddings = torch.nn.Embedding.from_pretrained(start.clone(), freeze=True)
    model.encoder.config.vocab_size = len(start)
    before = model.linear.weight.detach().clone()
    train_colbert(model, data, tmp_path / "run", maxsteps=2, **OPTIONS)
    assert torch.equal(model.encoder.embeddings.word_embeddings.weight, start) and not torch.equal(model.linear.weight, before)


def test_without_validation_the_last_checkpoint_is_the_best(encoder, data, tmp_path):
    data.validation.clear()
    best = train_colbert(fresh(encoder), data, tmp_path / "run", **OPTIONS)
    assert difference(weights(best), weights(tmp_path / "run" / "checkpoint-11")) == 0


def test_early_stopping_of_transformers_works(encoder, data, tmp_path, monkeypatch):
    values = iter([0.1, 0.9, 0.3, 0.2, 0.1])
    monkeypatch.setattr("colbert_nb.training_run.validate", lambda *args, **kwargs: next(values))
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
    write("triples.train.colbert.jsonl", map(json.dumps, data.triples.tolist()))
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
    script = ("import sys; from pathlib import Path; from tiny import *; from colbert_nb.training_run import train_colbert\n"
              "data = made_data()\n"
              "train_colbert(fresh(Path(sys.argv[1])), data, sys.argv[2], **OPTIONS)")
    environment = os.environ | {"PYTHONHASHSEED": "7", "PYTHONPATH": str(Path(__file__).parent)}
    subprocess.run([sys.executable, "-c", script, str(encoder), str(tmp_path / "there")], check=True, env=environment)
    for name in ("log.jsonl", "run.json", "best/model.safetensors"):
        assert (tmp_path / "here" / name).read_bytes() == (tmp_path / "there" / name).read_bytes()


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
    rows = data.triples.tolist()
    rows[4] = triple
    with pytest.raises(ValueError, match="triple 4: expected"):
        train_colbert(model, replace(data, triples=rows), tmp_path / "run", **OPTIONS)
    assert not (tmp_path / "run").exists()


def test_a_positive_among_the_negatives(model, data, tmp_path):
    rows = data.triples.tolist()
    rows[5] = [5, 5, 7, 8]
    known = {q: [q] for q in range(30)}
    data = replace(data, triples=rows, positives=known | {5: [5, 8]})
    with pytest.raises(ValueError, match="triple 5: .* got passage 8"):
        train_colbert(model, data, tmp_path / "run", **OPTIONS)
    data = replace(data, positives=known)
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


def test_a_full_disk_ends_a_run_and_room_lets_it_go_on(encoder, data, tmp_path, monkeypatch):
    train_colbert(fresh(encoder), data, tmp_path / "whole", **OPTIONS)
    save = torch.save

    def full(content, path, *args, **kwargs):
        if "checkpoint-6." in str(path) and "scheduler" in str(path):
            raise OSError(28, "No space left on device")
        save(content, path, *args, **kwargs)

    with monkeypatch.context() as patch:
        patch.setattr(torch, "save", full)
        with pytest.raises(OSError, match="checkpoint-4, resume=True"):
            train_colbert(fresh(encoder), data, tmp_path / "run", **OPTIONS)
    names = {p.name for p in (tmp_path / "run").iterdir()}
    assert "checkpoint-4" in names and "checkpoint-6" not in names and not any(name.startswith(".") for name in names)
    train_colbert(fresh(encoder), data, tmp_path / "run", **OPTIONS, resume=True)
    assert difference(weights(tmp_path / "whole/best"), weights(tmp_path / "run/best")) <= 1e-6
    assert read_log(tmp_path / "run") == read_log(tmp_path / "whole")


def test_nothing_is_left_running_and_rates_come_back(encoder, data, tmp_path, caplog):
    model = fresh(encoder)
    rates = [m.p for m in model.modules() if isinstance(m, torch.nn.Dropout)]
    with caplog.at_level("WARNING"), pytest.raises(KeyboardInterrupt):
        train_colbert(model, data, tmp_path / "run", callbacks=[StopAt(5)], dropout=0.3, **OPTIONS)
    assert "checkpoint-4, resume=True" in caplog.text
    assert not [thread for thread in threading.enumerate() if "tokenize_ahead" in thread.name]
    assert rates == [m.p for m in model.modules() if isinstance(m, torch.nn.Dropout)] and not model.training


def test_an_error_of_the_thread_comes_out_of_the_call(encoder, data, tmp_path, monkeypatch):
    call = TripleCollator.__call__

    def spoiled(self, rows):
        if threading.current_thread() is not threading.main_thread() and 17 in rows:
            raise OverflowError("triple 17")
        return call(self, rows)

    monkeypatch.setattr(TripleCollator, "__call__", spoiled)
    with pytest.raises(OverflowError, match="triple 17"):
        train_colbert(fresh(encoder), data, tmp_path / "run", **OPTIONS)
    monkeypatch.undo()
    train_colbert(fresh(encoder), data, tmp_path / "run", **OPTIONS, resume=True)


def test_early_stopping_survives_a_stop(encoder, data, tmp_path, monkeypatch):
    by_step = {0: 0.1, 2: 0.9, 4: 0.3, 6: 0.2, 8: 0.95, 10: 0.1, 11: 0.1}

    def runs(name, **options):
        start = options.pop("start", 0)
        steps = iter(sorted(step for step in by_step if step >= start))
        monkeypatch.setattr("colbert_nb.training_run.validate", lambda *args, **kwargs: by_step[next(steps)])
        train_colbert(fresh(encoder), data, tmp_path / name, early_stopping_patience=2, **OPTIONS, **options)
        return read_log(tmp_path / name)

    class AfterSaving(TrainerCallback):
        def __init__(self, step):
            self.step = step

        def on_save(self, args, state, control, **kwargs):
            if state.global_step == self.step:
                raise KeyboardInterrupt

    whole = runs("whole")
    assert max(line["step"] for line in whole) == 6
    for saved in (4, 6):  # between the two bad values, and where stopping was settled and the best not yet written
        with pytest.raises(KeyboardInterrupt):
            runs(f"cut{saved}", callbacks=[AfterSaving(saved)])
        assert runs(f"cut{saved}", resume=True, start=saved + 1) == whole
        assert difference(weights(tmp_path / f"cut{saved}/best"), weights(tmp_path / "whole/best")) <= 1e-6


def test_what_was_picked_and_what_is_advised_is_logged_once(encoder, data, tmp_path, caplog):
    with caplog.at_level("INFO", "colbert_nb"):
        best = train_colbert(fresh(encoder), data, tmp_path / "run", **OPTIONS | dict(learning_rate=5e-6), bf16=False)
    assert caplog.text.count("learning_rate=5e-06 over") == caplog.text.count("query_expansion=True has") == 1
    assert caplog.text.count("bf16=False (as asked)") == 1 and "loss contrastive" in caplog.text
    assert json.loads((tmp_path / "run/run.json").read_text())["settings"]["learning_rate"] == 5e-6
    caplog.clear()
    with caplog.at_level("WARNING", "colbert_nb"):
        train_colbert(ColBERT.from_pretrained(best, device="cpu"), data, tmp_path / "second", **OPTIONS | dict(learning_rate=5e-6))
    assert "a short way" not in caplog.text


def test_metric_arguments_and_order_reach_the_run(encoder, data, tmp_path, monkeypatch):
    seen, call = [], TripleCollator.__call__
    monkeypatch.setattr(TripleCollator, "__call__", lambda self, rows: seen.extend(rows) or call(self, rows))
    train_colbert(fresh(encoder), data, tmp_path / "run", shuffle=False, validation_metric="Recall@5", lr_scheduler_type="constant",
                  matryoshka_dims=[8, 4], loss="colbert-ai", tokenize_ahead=False, **OPTIONS)
    assert seen == [*range(33), *range(33)]
    lines = read_log(tmp_path / "run")
    assert {line["learning_rate"] for line in lines if "loss" in line} == {1e-3} and any("Recall@5" in line for line in lines)
    settings = json.loads((tmp_path / "run/run.json").read_text())["settings"]
    assert settings["loss"] == "colbert-ai" and settings["matryoshka_dims"] == [8, 4] and settings["lr_scheduler_type"] == "constant"


def test_the_best_step_is_there_when_fewer_are_saved_than_validated(encoder, data, tmp_path, monkeypatch):
    values = iter([0.1, 0.2, 0.9, 0.3, 0.2, 0.1, 0.1, 0.1])
    monkeypatch.setattr(training_run, "validate", lambda *args, **kwargs: next(values))
    best = train_colbert(fresh(encoder), data, tmp_path / "run", save_steps=4, eval_steps=2, keep=1, **OPTIONS)
    assert best.is_dir() and 4 in checkpoints(tmp_path / "run")
    assert (best / "model.safetensors").read_bytes() == (checkpoints(tmp_path / "run")[4] / "model.safetensors").read_bytes()
    values = iter([0.1, 0.9, 0.2, 0.3, 0.2, 0.1, 0.1, 0.1])
    train_colbert(fresh(encoder), data, tmp_path / "second", save_steps=4, eval_steps=2, keep=1, **OPTIONS)
    assert 2 in checkpoints(tmp_path / "second")


@pytest.mark.parametrize("options, words", [
    (dict(loss="hinge"), "loss as 'auto'"), (dict(loss="kl"), "teacher"), (dict(matryoshka_dims=[16]), "matryoshka_dims"),
    (dict(matryoshka_dims=[4, 4]), "matryoshka_dims"), (dict(shuffle=1), "shuffle"), (dict(mini_batch_size=0), "mini_batch_size"),
    (dict(early_stopping_patience=0), "early_stopping_patience"), (dict(engine="pylate"), "engine"), (dict(bf16="yes"), "bf16"),
    (dict(engine="colbert-ai", matryoshka_dims=[8]), "engine='colbert-ai'"), (dict(engine="colbert-ai", loss="margin_mse"), "loss"),
])
def test_newer_settings_that_cannot_be_meant(model, data, tmp_path, options, words):
    with pytest.raises(ValueError, match=words):
        train_colbert(model, data, tmp_path / "run", **OPTIONS | options)
    with pytest.raises(ValueError, match="validation rows"):
        train_colbert(model, replace(data, validation=[]), tmp_path / "run", early_stopping_patience=2, **OPTIONS)
    assert not (tmp_path / "run").exists()


def test_a_tracker_gets_the_log(encoder, data, tmp_path, monkeypatch):
    pytest.importorskip("tensorboardX")
    (tmp_path / "here").mkdir()
    monkeypatch.chdir(tmp_path / "here")
    train_colbert(fresh(encoder), data, tmp_path / "run", report_to="tensorboard", **OPTIONS)
    written = b"".join(p.read_bytes() for p in (tmp_path / "run/runs").rglob("events.out.tfevents.*"))
    assert b"eval/nDCG" in written and b"train/loss" in written and not list((tmp_path / "here").iterdir())


def test_a_tracker_is_set_up_before_anything_is_logged(encoder, data, tmp_path):
    class Tracker(TrainerCallback):
        events = []

        def on_train_begin(self, args, state, control, **kwargs):
            self.events.append("begin")

        def on_log(self, args, state, control, logs=None, **kwargs):
            self.events += [(state.global_step, name) for name in logs if name in ("loss", "eval_nDCG@10")]

        def on_train_end(self, args, state, control, **kwargs):
            self.events.append("end")

    tracker = Tracker()
    train_colbert(fresh(encoder), data, tmp_path / "run", callbacks=[tracker], **OPTIONS)
    assert tracker.events[:3] == ["begin", (0, "eval_nDCG@10"), (1, "loss")] and tracker.events[-1] == "end"
    lines = [(line["step"], name) for line in read_log(tmp_path / "run") for name in ("loss", "nDCG@10") if name in line]
    assert lines == [(step, name.removeprefix("eval_")) for step, name in tracker.events[1:-1]]


@pytest.mark.parametrize("options", [{}, {"accumsteps": 2}, {"mini_batch_size": 2}])
def test_gradients_of_rows_are_the_gradients_of_the_table(encoder, data, tmp_path, options, monkeypatch):
    from transformers import BertConfig, BertModel
    torch.manual_seed(1)
    BertModel(BertConfig(vocab_size=5000, hidden_size=32, num_hidden_layers=1, num_attention_heads=2, intermediate_size=64,
                         max_position_embeddings=64)).save_pretrained(tmp_path / "wide")
    for file in encoder.glob("tokenizer*"):
        (tmp_path / "wide" / file.name).write_bytes(file.read_bytes())
    seen, init = [], TrainingModule.__init__
    model = fresh(tmp_path / "wide")
    rows = train_colbert(model, data, tmp_path / "rows", callbacks=[Sparse(seen)], **OPTIONS, **options)
    assert set(seen) == {(True, False)} and not model.encoder.get_input_embeddings().sparse
    monkeypatch.setattr(TrainingModule, "__init__", lambda self, *args, row_gradients=False, **kwargs: init(self, *args, **kwargs))
    whole = train_colbert(fresh(tmp_path / "wide"), data, tmp_path / "whole", **OPTIONS, **options)
    assert difference(weights(rows), weights(whole)) < 1e-5
