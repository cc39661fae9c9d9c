"""colbert-ai's trainer: parity, errors in the caller, a process left as it was, files that hold nothing personal."""

import io
import json
import logging
import multiprocessing
import os
import random
import subprocess
import sys
import warnings
from contextlib import redirect_stdout
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.distributed as dist
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn
from transformers import get_linear_schedule_with_warmup

from colbert_nb.colbert_ai import check_groups, check_upstream, train_with_colbert_ai, write_inputs
from colbert_nb.colbert_ai_mends import MENDS, import_colbert_ai, upstream_on_this_machine
from colbert_nb.data import TrainingData
from colbert_nb.encoder import ColBERT
from colbert_nb.scoring import maxsim
from colbert_nb.training_folder import read_log
from colbert_nb.training_run import train_colbert
from tiny import WORDS, fresh

OPTIONS = dict(batch_size=6, learning_rate=1e-3, maxsteps=20, warmup_steps=3)


def made_data(nway: int = 2, n: int = 60, scores=None) -> TrainingData:
    "Passages of three to twelve words; query i is the last two words of passage i."
    draw = torch.Generator().manual_seed(1)
    passages = [[WORDS[w] for w in torch.randint(60, (3 + i % 10,), generator=draw)] for i in range(40)]
    triples = [[i % 30, i % 30, *((i % 30 + 7 * k + i // 30) % 40 for k in range(1, nway))] for i in range(n)]
    return TrainingData([" ".join(p[-2:]) for p in passages[:30]], [" ".join(p) for p in passages], triples,
                        {q: [q] for q in range(30)}, [], scores=scores)


@pytest.fixture
def data() -> TrainingData:
    return made_data()


def losses(run: Path) -> list[float]:
    return [line["loss"] for line in read_log(run)]


def two_terms(scores, nway, use_ib_negatives=True):
    "colbert-ai's loss, written out query by query."
    total = 0
    for i, row in enumerate(scores):
        own = row[i * nway:(i + 1) * nway]
        rest = torch.cat([row[:i * nway], own[:1], row[(i + 1) * nway:]])
        total = total + own.logsumexp(0) - own[0] + (rest.logsumexp(0) - own[0] if use_ib_negatives else 0)
    return total / len(scores)


def plain_loop(model, data, *, batch_size, learning_rate, maxsteps, warmup_steps=None, accumsteps=1, use_ib_negatives=True, nway=2):
    optimizer = torch.optim.AdamW(model.parameters(), lr=learning_rate, eps=1e-8)
    schedule = get_linear_schedule_with_warmup(optimizer, warmup_steps, maxsteps) if warmup_steps is not None else None
    found, part = [], batch_size // accumsteps
    for step in range(min(maxsteps, len(data.triples) // batch_size)):
        found.append(0)
        for start in range(step * batch_size, (step + 1) * batch_size, part):
            rows = data.triples[start:start + part, :1 + nway]
            queries = model.tokenizer.queries([data.queries[q] for q in rows[:, 0]])
            documents = model.tokenizer.documents([data.corpus[p] for p in rows[:, 1:].flatten()])
            scores = maxsim(model(queries), model(documents), queries.keep, documents.keep)
            loss = two_terms(scores, nway, use_ib_negatives) / accumsteps
            loss.backward()
            found[-1] += loss.item()
        nn.utils.clip_grad_norm_(model.parameters(), 2.0)
        optimizer.step()
        if schedule:
            schedule.step()
        optimizer.zero_grad()
    return found


# Parity

@pytest.mark.parametrize("options, nway", [({}, 2), ({"use_ib_negatives": False}, 2), ({"accumsteps": 2}, 2), ({}, 4),
                                           ({"warmup_steps": None, "maxsteps": 5}, 3)])
def test_a_plain_loop_has_its_losses(encoder, tmp_path, options, nway):
    data, options = made_data(nway, n=123), OPTIONS | options
    theirs, ours = fresh(encoder), fresh(encoder)
    best = train_with_colbert_ai(theirs, data, tmp_path / "run", dropout=0.0, **options)
    expected = plain_loop(ours, data, nway=nway, **options)
    found = losses(tmp_path / "run")
    assert len(found) == len(expected) == min(20, options["maxsteps"])
    assert max(abs(a - b) for a, b in zip(found, expected)) < 1e-3
    assert found[-1] != found[0]
    stored = ColBERT.from_pretrained(best, device="cpu")
    for name, weight in theirs.state_dict().items():
        assert torch.equal(stored.state_dict()[name], weight)
        torch.testing.assert_close(ours.state_dict()[name], weight, rtol=0, atol=2e-3)


def test_nway_takes_the_first_of_each_group(encoder, tmp_path):
    data = made_data(4, n=12)
    train_with_colbert_ai(fresh(encoder), data, tmp_path / "run", nway=2, dropout=0.0, **OPTIONS)
    assert losses(tmp_path / "run") == pytest.approx(plain_loop(fresh(encoder), data, nway=2, **OPTIONS), abs=1e-4)


@pytest.mark.parametrize("alpha", [1.0, 0.5])
def test_a_teacher_is_followed(encoder, tmp_path, alpha):
    scores = torch.rand(12, 3, generator=torch.Generator().manual_seed(2)) * 8
    data = made_data(3, n=12, scores=scores.tolist())
    train_with_colbert_ai(fresh(encoder), data, tmp_path / "run", dropout=0.0, use_ib_negatives=False, distillation_alpha=alpha, **OPTIONS)
    student, rows = fresh(encoder), data.triples[:6]
    queries = student.tokenizer.queries([data.queries[q] for q in rows[:, 0]])
    documents = student.tokenizer.documents([data.corpus[p] for p in rows[:, 1:].flatten()])
    with torch.no_grad():
        every = maxsim(student(queries), student(documents), queries.keep, documents.keep)
    own = torch.stack([every[i, 3 * i:3 * i + 3] for i in range(6)]).log_softmax(1)
    teacher = (alpha * scores[:6]).log_softmax(1)
    assert losses(tmp_path / "run")[0] == pytest.approx((teacher.exp() * (teacher - own)).sum(1).mean().item(), abs=1e-5)
    train_with_colbert_ai(fresh(encoder), data, tmp_path / "ignored", dropout=0.0, ignore_scores=True, **OPTIONS)
    assert losses(tmp_path / "ignored") == pytest.approx(plain_loop(fresh(encoder), data, nway=3, **OPTIONS), abs=1e-4)


def test_dropout_is_the_encoders_own_unless_told(encoder, data, tmp_path):
    runs = {name: fresh(encoder) for name in ("own", "again", "none", "much")}
    for name, model in runs.items():
        dropout = {"none": 0.0, "much": 0.5}.get(name)
        best = train_with_colbert_ai(model, data, tmp_path / name, dropout=dropout, **OPTIONS)
        assert json.loads((best / "config.json").read_text())["hidden_dropout_prob"] == 0.1  # the model's, not the run's
    own, again, none, much = (losses(tmp_path / name) for name in runs)
    assert own == again and own != none and much != own
    assert (tmp_path / "own/best/model.safetensors").read_bytes() == (tmp_path / "again/best/model.safetensors").read_bytes()


def test_the_order_is_the_callers(encoder, data, tmp_path):
    order = [i for _ in range(2) for i in reversed(range(18))]
    train_with_colbert_ai(fresh(encoder), data, tmp_path / "ordered", order=order, dropout=0.0, **OPTIONS)
    turned = TrainingData(data.queries, data.corpus, data.triples[order], data.positives, [])
    train_with_colbert_ai(fresh(encoder), turned, tmp_path / "turned", dropout=0.0, **OPTIONS)
    assert losses(tmp_path / "ordered") == losses(tmp_path / "turned") and len(losses(tmp_path / "turned")) == 6


def test_any_sequence_is_an_order(encoder, data, tmp_path):
    class Endless:  # has a length and items, and never says that it is at its end
        def __len__(self):
            return 12

        def __getitem__(self, i):
            return i % 12
    train_with_colbert_ai(fresh(encoder), data, tmp_path / "run", order=Endless(), **OPTIONS)
    assert len(losses(tmp_path / "run")) == 2


@pytest.mark.parametrize("scored", [False, True])
@pytest.mark.parametrize("options", [{}, {"accumsteps": 2}, {"use_ib_negatives": False}])
def test_our_trainer_has_its_losses(encoder, tmp_path, options, scored):
    scores = (torch.rand(120, 3, generator=torch.Generator().manual_seed(3)) * 6).tolist() if scored else None
    data, options = made_data(3, n=120, scores=scores), OPTIONS | options | dict(dropout=0.0)
    train_with_colbert_ai(fresh(encoder), data, tmp_path / "theirs", **options)
    train_colbert(fresh(encoder), data, tmp_path / "ours", loss="colbert-ai", shuffle=False, bf16=False, **options)
    theirs, ours = losses(tmp_path / "theirs"), losses(tmp_path / "ours")
    assert len(ours) == len(theirs) == 20
    assert max(abs(a - b) for a, b in zip(theirs, ours)) < 1e-3


def test_the_engine_of_train_colbert(encoder, data, tmp_path):
    options = dict(batch_size=6, learning_rate=1e-3, epochs=2, dropout=0.0, engine="colbert-ai")
    best = train_colbert(fresh(encoder), data, tmp_path / "shuffled", **options, seed=1)
    assert best == tmp_path / "shuffled" / "best" and len(losses(tmp_path / "shuffled")) == 20
    ours = train_colbert(fresh(encoder), data, tmp_path / "ours", **options | dict(engine="colbert_nb", bf16=False), loss="colbert-ai", seed=1)
    assert losses(tmp_path / "shuffled") == pytest.approx(losses(tmp_path / "ours"), abs=1e-3)  # the same seed, the same order
    assert ours.is_dir()
    finished = fresh(encoder)
    assert train_colbert(finished, data, tmp_path / "shuffled", **options, seed=1, resume=True) == best
    assert torch.equal(finished.linear.weight, ColBERT.from_pretrained(best, device="cpu").linear.weight)
    with pytest.raises(ValueError, match="mini_batch_size"):
        train_colbert(fresh(encoder), data, tmp_path / "refused", **options, mini_batch_size=2)


# What a run leaves

def test_the_run_folder_holds_a_log_and_a_checkpoint_and_nothing_personal(model, data, tmp_path, capfd, monkeypatch, caplog):
    (tmp_path / "here").mkdir()
    monkeypatch.chdir(tmp_path / "here")
    with caplog.at_level(logging.DEBUG, logger="colbert_nb"):
        best = train_with_colbert_ai(model, data, tmp_path / "run", **OPTIONS)
    assert best == tmp_path / "run" / "best" and sorted(p.name for p in (tmp_path / "run").iterdir()) == ["best", "log.jsonl"]
    assert not list((tmp_path / "here").iterdir()) and sorted(p.name for p in tmp_path.iterdir()) == ["here", "run"]
    assert capfd.readouterr() == ("", "")
    assert "Done with all triples" in caplog.text  # what it prints is in the log
    for path in (p for p in (tmp_path / "run").rglob("*") if p.suffix in (".json", ".jsonl", ".metadata")):
        text = path.read_text(encoding="utf-8")
        assert str(tmp_path) not in text and os.uname().nodename not in text and "cmd" not in text, path.name
    lines = read_log(tmp_path / "run")
    assert [line["step"] for line in lines] == list(range(1, 11))
    assert {"loss", "learning_rate", "positive", "hardest_negative"} < set(lines[0])
    rates = [line["learning_rate"] for line in lines]
    assert rates[0] == 0 and max(rates) == 1e-3 and rates[3] == max(rates) and rates[-1] < rates[4]
    settings = json.loads((best / "artifact.metadata").read_text())
    assert settings["bsize"] == 6 and settings["lr"] == 1e-3 and settings["warmup"] == 3 and settings["query_expansion"]
    assert not model.training


def state():
    from colbert.data import examples
    from colbert.infra import ColBERTConfig
    from colbert.infra.config.settings import RunSettings
    from colbert.infra.launcher import Launcher
    from colbert.infra.run import Run
    from colbert.modeling import base_colbert
    from colbert.modeling.colbert import ColBERT as Upstream
    from colbert.training import training
    return [base_colbert.class_factory, Launcher.launch, ColBERTConfig.save_for_checkpoint, RunSettings.script_name_,
            torch.nn.parallel.DistributedDataParallel, hasattr(Upstream, "loaded_extensions"), hasattr(examples, "open"),
            training.MixedPrecisionManager, training.print_progress, len(Run().stack), random.getstate(),
            np.random.get_state()[1].tolist(), torch.get_rng_state().tolist(), dict(os.environ), sys.stdout, sys.excepthook,
            warnings.filters[:], dist.is_initialized(), multiprocessing.get_start_method(allow_none=True)]


@pytest.mark.parametrize("how", ["well", "error", "interrupt"])
def test_the_process_is_left_as_it_was(model, data, tmp_path, how, monkeypatch):
    import_colbert_ai()
    from colbert.modeling.colbert import ColBERT as Upstream
    forward, count = Upstream.forward, []

    def fails(self, Q, D):
        count.append(1)
        if len(count) == 3:
            raise {"error": RuntimeError("out of memory"), "interrupt": KeyboardInterrupt()}[how]
        return forward(self, Q, D)

    if how != "well":
        monkeypatch.setattr(Upstream, "forward", fails)
    before, weights = state(), {name: weight.clone() for name, weight in model.state_dict().items()}
    if how == "well":
        train_with_colbert_ai(model, data, tmp_path / "run", **OPTIONS)
    else:
        with pytest.raises({"error": RuntimeError, "interrupt": KeyboardInterrupt}[how]):  # here, not in another process
            train_with_colbert_ai(model, data, tmp_path / "run", **OPTIONS)
        assert all(torch.equal(weights[name], weight) for name, weight in model.state_dict().items())
        assert [p.name for p in (tmp_path / "run").iterdir()] == ["log.jsonl"] and len(losses(tmp_path / "run")) == 2
    assert all(a == b for a, b in zip(before, state()))
    if how != "well":
        monkeypatch.setattr(Upstream, "forward", forward)
        assert train_with_colbert_ai(model, data, tmp_path / "run", **OPTIONS).is_dir()  # the folder can be used again


def test_a_checkpoint_saved_on_the_way_is_kept_and_named(model, data, tmp_path, monkeypatch):
    import_colbert_ai()
    from colbert.training import training
    manage, seen = training.manage_checkpoints, []

    def every_step(config, colbert, optimizer, step, **options):
        manage(config, colbert, optimizer, 2000, **options)
        seen.append(step)
        if len(seen) == 2:
            raise RuntimeError("the disk is full")

    monkeypatch.setattr(training, "manage_checkpoints", every_step)
    with pytest.raises(RuntimeError, match="disk is full") as caught:
        train_with_colbert_ai(model, data, tmp_path / "run", **OPTIONS)
    (note,) = caught.value.__notes__
    saved = Path(note.removeprefix("colbert-ai's last checkpoint is "))
    ColBERT.from_pretrained(saved, device="cpu")
    assert os.uname().nodename not in (saved / "artifact.metadata").read_text()
    assert not (tmp_path / "run/best").exists()


def test_a_loss_that_is_not_finite_ends_the_run(model, data, tmp_path):
    with torch.no_grad():
        model.linear.weight.mul_(0)  # zero vectors: the gradient of their length is not finite
    model.linear.weight.data[0, 0] = torch.nan
    with pytest.raises((FloatingPointError, ValueError)):
        train_with_colbert_ai(model, data, tmp_path / "run", **OPTIONS)
    assert not (tmp_path / "run/best").exists()


def test_a_learning_rate_too_high_names_the_step(model, data, tmp_path):
    with pytest.raises(FloatingPointError, match=r"loss is nan at step \d+.*lower learning_rate"):
        train_with_colbert_ai(model, data, tmp_path / "run", **OPTIONS | {"learning_rate": 1e30, "warmup_steps": None})
    assert not (tmp_path / "run/best").exists()


@pytest.mark.skipif(sys.platform == "win32", reason="the locale is set by the environment")
def test_a_process_without_git_or_utf8(tmp_path):
    "Importing patches nothing and leaves no trace; texts are read as UTF-8."
    data = TrainingData(["Größe \u2028 東京", "q"], ["Ünï\u0085 c", "é", "z"], [[0, 0, 1], [1, 1, 2]], {}, [])
    paths = write_inputs(tmp_path, data, range(2), 2)
    code = ("import locale, multiprocessing, os, sys\n"
            "before = dict(os.environ)\n"
            "import colbert_nb.colbert_ai\n"
            "from colbert_nb.colbert_ai_mends import import_colbert_ai, upstream_on_this_machine\n"
            "assert 'colbert' not in sys.modules and locale.getencoding().lower() not in ('utf-8', 'utf8')\n"
            "import_colbert_ai()\n"
            "from colbert.infra.launcher import Launcher\n"
            "assert Launcher.launch.__name__ == 'launch'\n"
            "with upstream_on_this_machine():\n"
            "    from colbert.data import Collection, Queries\n"
            "    queries, corpus = Queries(sys.argv[1]), Collection(sys.argv[2])\n"
            "assert ascii(list(queries.values()) + corpus.data) == sys.argv[3]\n"
            "assert multiprocessing.get_start_method(allow_none=True) is None and dict(os.environ) == before")
    environment = os.environ | {"LC_ALL": "POSIX", "PYTHONUTF8": "0", "PYTHONCOERCECLOCALE": "0", "PATH": ""}
    ran = subprocess.run([sys.executable, "-c", code, paths["queries"], paths["collection"], ascii(data.queries + data.corpus)],
                         capture_output=True, text=True, env=environment)
    assert ran.returncode == 0 and ran.stdout == "", ran.stdout + ran.stderr


texts = st.text(st.characters(exclude_categories=["Cs"]), min_size=1, max_size=20).map(
    lambda text: " ".join(text.replace("\t", " ").replace("\r", " ").replace("\n", " ").split(" ")).strip()).filter(bool)


@settings(max_examples=60, deadline=None)
@given(st.lists(texts, min_size=3, max_size=6), st.data())
def test_colbert_ai_reads_back_what_is_written(tmp_path_factory, passages, draw):
    import_colbert_ai()
    from colbert.data import Collection, Examples, Queries
    triples = draw.draw(st.lists(st.tuples(*[st.integers(0, 2)] * 3), min_size=1, max_size=5))
    scored = draw.draw(st.booleans())
    scores = [[0.5, float(i)] for i in range(len(triples))] if scored else None
    data = TrainingData(passages[:3], passages, triples, {}, [], scores=scores)
    order = draw.draw(st.lists(st.integers(0, len(triples) - 1), min_size=1, max_size=8))
    paths = write_inputs(tmp_path_factory.mktemp("written"), data, order, 2)
    with redirect_stdout(io.StringIO()):
        queries, corpus, rows = Queries(paths["queries"]), Collection(paths["collection"]), Examples(paths["triples"], nway=2)
    assert list(queries.items()) == list(enumerate(passages[:3])) and corpus.data == passages
    expected = [[q, *([[p, s] for p, s in zip(ps, scores[i])] if scored else ps)] for i in order for q, *ps in [triples[i]]]
    assert rows.data == expected


# What is refused

@pytest.mark.parametrize("options, words", [
    (dict(batch_size=61), "60: colbert-ai leaves out.* pass batch_size=60 or less"), (dict(batch_size=0), "batch_size"), (dict(batch_size=2.0), "batch_size"),
    (dict(accumsteps=4), "equal parts"), (dict(accumsteps=0), "accumsteps"), (dict(maxsteps=0), "maxsteps"), (dict(maxsteps=True), "maxsteps"),
    (dict(nway=1), "nway"), (dict(nway=3), "pass nway=2"), (dict(nway="2"), "nway"), (dict(order=range(5)), "pass batch_size=5"),
])
def test_settings_that_cannot_be_meant(model, data, tmp_path, options, words):
    with pytest.raises(ValueError, match=words):
        train_with_colbert_ai(model, data, tmp_path / "run", **OPTIONS | options)
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize("triple, words", [([0, 1, 40], "triple 4: expected positions"), ([30, 1, 2], "triple 4: expected positions"),
                                           ([0, 1, -1], "triple 4: expected 2 passages, got 1")])
def test_triples_that_colbert_ai_would_stumble_over(model, data, tmp_path, triple, words):
    data.triples[4] = triple
    with pytest.raises(ValueError, match=words):
        train_with_colbert_ai(model, data, tmp_path / "run", **OPTIONS)


def test_groups_of_several_sizes():
    ragged = TrainingData(["q"], list("abcd"), [[0, 0, 1, 2], [0, 0, 1]], {}, [])
    with pytest.raises(ValueError, match="triple 1: expected 3 passages, got 2.*pass nway=2"):
        check_groups(ragged)
    assert check_groups(ragged, 2) == 2


@pytest.mark.parametrize("options, words", [(dict(query_expansion=False), "query_expansion=True"), (dict(mask_punctuation=False), "mask_punctuation=True"),
                                            (dict(skip_punctuation_before_encoding=True), "skip_punctuation_before_encoding=False"),
                                            (dict(dtype=torch.bfloat16), "dtype=torch.float32")])
def test_models_that_colbert_ai_cannot_train(encoder, data, tmp_path, options, words):
    with pytest.raises(ValueError, match=words):
        train_with_colbert_ai(fresh(encoder, **options), data, tmp_path / "run", **OPTIONS)
    assert not (tmp_path / "run/best").exists()


def test_a_text_of_two_lines(model, data, tmp_path):
    data.corpus[7] = "two\nlines"
    with pytest.raises(ValueError, match="passage 7"):
        train_with_colbert_ai(model, data, tmp_path / "run", **OPTIONS)


def test_a_run_is_not_written_over(model, data, tmp_path):
    (tmp_path / "run/best").mkdir(parents=True)
    with pytest.raises(ValueError, match="holds 'best'"):
        train_with_colbert_ai(model, data, tmp_path / "run", **OPTIONS)


def test_one_of_several_processes(model, data, tmp_path, monkeypatch):
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(ValueError, match="one process"):
        train_with_colbert_ai(model, data, tmp_path / "run", **OPTIONS)


@pytest.mark.parametrize("name", [name for name in MENDS if name not in ("launcher", "files", "script name")])
@pytest.mark.skipif(torch.cuda.is_available(), reason="some mends are for a CPU")
def test_each_mend_is_needed(model, data, tmp_path, name, monkeypatch):
    monkeypatch.setattr("colbert_nb.colbert_ai.upstream_on_this_machine", lambda: upstream_on_this_machine(without=[name]))
    def compiler(**options):
        raise OSError("no compiler")
    import_colbert_ai()
    monkeypatch.setattr("colbert.modeling.colbert.load", compiler)
    repository = tmp_path / "repository"
    repository.mkdir()
    git = lambda *words: subprocess.run(["git", "-c", "user.name=a", "-c", "user.email=a@b", *words], cwd=repository, check=True, capture_output=True)
    git("init", "-q"), git("commit", "-q", "--allow-empty", "-m", "first"), git("checkout", "-q", "--detach")
    monkeypatch.chdir(repository)
    with pytest.raises((AttributeError, OSError, ValueError, TypeError)):
        train_with_colbert_ai(model, data, tmp_path / "run", **OPTIONS)


@pytest.mark.parametrize("options, words", [
    (dict(keep=5), "keep=2"), (dict(matryoshka_dims=(32,)), "matryoshka_dims"), (dict(callbacks=[1]), "callbacks"), (dict(report_to="wandb"), "report_to"),
    (dict(loss="contrastive"), "loss as one of"), (dict(bf16=True), "bf16 as one of"), (dict(max_grad_norm=1.0), "max_grad_norm=2.0")])
def test_options_that_colbert_ai_does_not_have(options, words):
    defaults = dict(keep=2, matryoshka_dims=(), callbacks=(), loss="auto", bf16="auto", max_grad_norm=2.0, epochs=1)
    check_upstream(dict(defaults, callbacks=[], epochs=3, loss="colbert-ai", bf16=False), defaults)
    with pytest.raises(ValueError, match=words):
        check_upstream(defaults | options, defaults)
