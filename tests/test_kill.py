"""A training process that is killed, wherever it is, and a second one that goes on."""

import json
import multiprocessing
import random
import time
from pathlib import Path

import pytest
import torch
from killing import imported, kill_at
from tiny import OPTIONS, difference, fresh, made_data, weights
from transformers import TrainerCallback

from colbert_nb.training_folder import LEFTOVER, checkpoints, read_log
from colbert_nb.training_run import train_colbert

SETTINGS = OPTIONS | dict(dropout=0.1)  # dropout draws random numbers, whose state has to come back too
LAST = 11  # steps of such a run; a checkpoint is saved at each even one, and at the last


def wait_for_the_end(flag: Path):
    flag.touch()
    time.sleep(600)


class Pause(TrainerCallback):
    def __init__(self, event: str, step: int, flag: Path):
        setattr(self, event, lambda args, state, control, **kwargs: wait_for_the_end(flag) if state.global_step == step else None)


def train_until(place: str, step: int, encoder: Path, run: Path, flag: Path):
    "What the killed process does: train, and stop at a place where it can be killed."
    torch.set_num_threads(1)
    callbacks, save, rename = [], torch.save, Path.rename
    if place.startswith("on_"):
        callbacks.append(Pause(place, step, flag))

    def half_a_file(content, path, *args, **kwargs):
        save(content, path, *args, **kwargs)
        if f"checkpoint-{step}." in str(path) and "optimizer" in str(path):
            with open(path, "r+b") as file:
                file.truncate(Path(path).stat().st_size // 2)
            wait_for_the_end(flag)

    def no_name_yet(self, target):
        if self.name in (f".checkpoint-{step}.part", ".best.part") and self.name.startswith(f".{place}"):
            wait_for_the_end(flag)
        return rename(self, target)

    if place == "file":
        torch.save = half_a_file
    Path.rename = no_name_yet
    train_colbert(fresh(encoder), made_data(), run, callbacks=callbacks, **SETTINGS)


@pytest.fixture(scope="module")
def processes():
    "Starts processes that have everything imported."
    return imported("colbert_nb.training_run", "tiny")


@pytest.fixture(scope="module")
def undisturbed(encoder, tmp_path_factory) -> Path:
    return train_colbert(fresh(encoder), made_data(), tmp_path_factory.mktemp("undisturbed") / "run", **SETTINGS).parent


def kill(processes, place, step, encoder, run, flag):
    process = processes.Process(target=train_until, args=(place, step, encoder, run, flag))
    kill_at(process, flag, 300)


draw = random.Random(20)


@pytest.mark.skipif("forkserver" not in multiprocessing.get_all_start_methods(), reason="no process can be forked on this system")
@pytest.mark.parametrize("place, step, saved", [
    ("on_step_begin", (a := draw.randrange(1, LAST)), (a - a % 2)), ("on_step_end", (b := draw.randrange(3, LAST)), (b - 1) // 2 * 2),
    ("on_log", 6, 4), ("on_save", 8, 8), ("file", 6, 4), ("checkpoint", 2, 0), ("checkpoint", 10, 8), ("best", LAST, LAST)])
def test_a_killed_run_ends_with_the_weights_of_an_undisturbed_one(processes, undisturbed, encoder, tmp_path, place, step, saved):
    run = tmp_path / "run"
    kill(processes, place, step, encoder, run, tmp_path / "flag")
    assert max(checkpoints(run), default=0) == saved and not (run / "best").exists()
    assert any(LEFTOVER.fullmatch(p.name) for p in run.iterdir()) == (place in ("file", "checkpoint", "best"))
    with open(run / "log.jsonl", "a") as file:
        file.write('{"step": 7, "lo')
    best = train_colbert(fresh(encoder), made_data(), run, resume=True, **SETTINGS)
    assert read_log(run) == read_log(undisturbed)
    for step, folder in checkpoints(run).items():
        assert difference(weights(folder), weights(checkpoints(undisturbed)[step])) <= 1e-6
    assert difference(weights(best), weights(undisturbed / "best")) <= 1e-6
    assert {p.name for p in run.iterdir()} == {p.name for p in undisturbed.iterdir()}


def test_a_kill_before_the_first_file_leaves_a_folder_to_begin_in(encoder, undisturbed, tmp_path):
    run = tmp_path / "run"
    run.mkdir()
    (run / ".run.json.part").write_text('{"form')
    best = train_colbert(fresh(encoder), made_data(), run, **SETTINGS)
    assert difference(weights(best), weights(undisturbed / "best")) <= 1e-6
    assert {p.name for p in run.iterdir()} == {p.name for p in undisturbed.iterdir()}


def test_a_log_that_was_cut_can_be_read(undisturbed, tmp_path):
    whole = (undisturbed / "log.jsonl").read_bytes()
    lines = read_log(undisturbed)
    for cut in range(len(whole) - 200, len(whole) + 1):
        (tmp_path / "log.jsonl").write_bytes(whole[:cut])
        assert read_log(tmp_path) == lines[:whole[:cut].count(b"\n")]
    (tmp_path / "log.jsonl").write_bytes(whole + b"\0" * 40 + b"\n")  # what some file systems leave after a power cut
    assert read_log(tmp_path) == lines
    (tmp_path / "log.jsonl").write_bytes(b"nothing\n" + whole)
    with pytest.raises(ValueError, match="line 1 of"):
        read_log(tmp_path)
    assert read_log(tmp_path / "nowhere") == [] and json.loads(whole.split(b"\n")[0])["step"] == 0
