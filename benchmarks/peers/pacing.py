"""What the runners share: a job is read, steps are timed, rounds wait for a word of the caller, the weights are written.

A runner is one process that trains one system. It prints a line of JSON for each event on standard output: `ready` when
all is loaded, `round` after each part of its time, `done` at its end; everything that a library prints goes to standard
error, from the moment that this file is imported. Before each round it waits for a line on standard input, so that several runners can be loaded and take turns.
Only torch and safetensors are needed here: every peer's own environment has them."""

import json
import os
import resource
import shutil
import statistics
import sys
import time
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file


EVENTS = os.fdopen(os.dup(1), "w")
os.dup2(2, 1)


def read_job() -> dict:
    "The job that the first argument holds."
    job = json.loads(sys.argv[1])
    torch.manual_seed(job["seed"])
    with open(job["triples"], encoding="utf-8") as file:
        job["rows"] = [json.loads(line) for line in file]
    return job


def peak_mb() -> float:
    "The largest resident memory of this process so far."
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024


def no_dropout(model) -> None:
    "Dropout of rate 0 everywhere, the encoder's attention among it."
    for module in model.modules():
        if isinstance(module, torch.nn.Dropout):
            module.p = 0.0


class Pacer:
    "Times steps, waits between rounds, says when the time is over."

    def __init__(
        self,
        job: dict,
        weights,  # gives the encoder's and the projection's state as they are now: (dict, Tensor)
        versions: dict,
        scores: list[float],  # of the first rows, before training: all systems must give the same
    ):
        self.job, self.weights, self.versions, self.scores = job, weights, versions, scores
        self.steps, self.cpu, self.used, self.rounds, self.last, self.last_cpu = [], [], 0.0, 0, None, None

    def say(self, event: str, **values) -> None:
        EVENTS.write(json.dumps({"event": event, **values}) + "\n")
        EVENTS.flush()

    def begin(self) -> None:
        "Right before the first batch is fetched."
        self.say("ready", versions=self.versions, scores=self.scores, threads=torch.get_num_threads(), loaded_mb=peak_mb())
        self._wait()

    def _wait(self) -> None:
        if not sys.stdin.readline():
            raise SystemExit("the caller is gone")
        self.last, self.last_cpu = time.perf_counter(), time.process_time()

    def step(self) -> bool:
        "After each optimizer step. True: the time is over, train no more."
        seconds = time.perf_counter() - self.last
        self.steps.append(seconds)
        self.cpu.append(time.process_time() - self.last_cpu)
        self.used += seconds
        if len(self.steps) == self.job["loss_step"]:
            self.save("loss_step")
        if self.job["save_every"] and len(self.steps) % self.job["save_every"] == 0:
            self.save(f"step-{len(self.steps)}")
        typical = statistics.median(self.steps[-5:])
        over = self.job["max_steps"] is not None and len(self.steps) >= self.job["max_steps"]
        if over or self.job["seconds"] is not None and self.used + typical > (self.rounds + 1) * self.job["seconds"]:
            self.rounds += 1
            self.say("round", steps=len(self.steps), used=self.used)
            if over or self.rounds == self.job["rounds"]:
                return True
            self._wait()
        self.last, self.last_cpu = time.perf_counter(), time.process_time()
        return False

    def save(self, name: str) -> None:
        "The initial checkpoint's folder with the weights as they are now: one format, one evaluator for all."
        folder = Path(self.job["out"]) / name
        shutil.rmtree(folder, ignore_errors=True)
        shutil.copytree(self.job["checkpoint"], folder)
        initial = load_file(folder / "model.safetensors")
        encoder, linear = self.weights()
        state = {f"bert.{key}": value for key, value in encoder.items()} | {"linear.weight": linear}
        missing = [key for key in initial if key not in state]
        if missing:
            raise ValueError(f"expected weights named as in the initial checkpoint, got none for {missing[:3]}")
        save_file({key: state[key].detach().cpu().contiguous().clone() for key in initial}, folder / "model.safetensors",
                  metadata={"format": "pt"})

    def done(self) -> None:
        peak = peak_mb()
        self.save("final")
        self.say("done", seconds=self.steps, cpu=self.cpu, peak_mb=peak, used=self.used)


def trainer_callback(pacer: Pacer):
    "The pacer as a callback of transformers' Trainer."
    from transformers import TrainerCallback

    class Paced(TrainerCallback):
        def on_train_begin(self, args, state, control, **kwargs):
            pacer.begin()

        def on_step_end(self, args, state, control, **kwargs):
            control.should_training_stop |= pacer.step()

    return Paced()


def trainer_options(job: dict) -> dict:
    "What is the same for every run through transformers' Trainer; the rest are its defaults."
    return dict(output_dir=f"{job['out']}/trainer", per_device_train_batch_size=job["batch_size"], num_train_epochs=job["epochs"],
                max_steps=job["max_steps"] or -1, learning_rate=job["learning_rate"], lr_scheduler_type=job["schedule"],
                warmup_steps=job["warmup_steps"], seed=job["seed"], save_strategy="no", report_to="none", disable_tqdm=True,
                logging_strategy="no", bf16=job["bf16"])
