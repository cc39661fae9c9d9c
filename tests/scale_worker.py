"""What each of several processes does in tests/test_scale.py: `scale_worker.py ENCODER FOLDER SCENARIO...`; answers go to FOLDER/rank."""

import dataclasses
import json
import os
import sys
from pathlib import Path

import torch
from tiny import OPTIONS, StopAt, difference, fresh, made_data
from transformers import TrainerCallback

from colbert_nb import training_run
from colbert_nb.training import TripleCollator
from colbert_nb.training_folder import read_log
from colbert_nb.training_losses import choose_loss
from colbert_nb.training_run import TrainingModule, train_colbert
from colbert_nb.training_scale import gather_passages, join_processes, on_rank_0

LONG = OPTIONS | dict(batch_size=8, epochs=1, accumsteps=2, matryoshka_dims=[4])  # parts of four triples, the last of one
encoder, folder = Path(sys.argv[1]), Path(sys.argv[2])


def gradients(batch, module, loss, scale) -> dict:
    module.zero_grad()
    scores = module(**{name: batch[name] for name in ("queries", "documents", "places", "shares")})
    own = scores[:, :len(batch["target"].positives)]
    sum(loss(part, batch["target"]).sum() if len(part) else part.sum() for part in own).mul(scale / batch["n"]).backward()
    return {name: p.grad.clone() for name, p in module.model.named_parameters() if p.grad is not None}


def same_gradients(who, sizes=(16, 5, 1)) -> dict:
    "Batches of all processes against the same batch in one; 1 triple leaves a process without a query and one without a passage."
    data, found = made_data(), {}
    data = dataclasses.replace(data, triples=data.triples.tolist() + [[q, q, (q + 3) % 40] for q in range(6)])
    for n in sizes:
        for use_ib_negatives in (True, False):
            for name in ("contrastive", "colbert-ai"):
                rows, loss = list(range(n)) if n < 16 else [*range(8), *range(31, 39)], choose_loss(name, data, use_ib_negatives)
                model = fresh(encoder)
                batch = TripleCollator(data, model.tokenizer, use_ib_negatives, chunk_size=4)(rows)
                alone = gradients(batch, TrainingModule(model, dims=(4,)), loss, 1)
                module = torch.nn.parallel.DistributedDataParallel(TrainingModule(model, dims=(4,), gather=gather_passages))
                own = TripleCollator(data, model.tokenizer, use_ib_negatives, chunk_size=4, world_size=who.world_size, rank=who.rank)(rows)
                module.zero_grad()
                scores = module(**{name: own[name] for name in ("queries", "documents", "places", "shares")})[:, :len(own["target"].positives)]
                value = sum(loss(part, own["target"]).sum() if len(part) else part.sum() for part in scores)
                (value * who.world_size / own["n"]).backward()
                shared = {name: p.grad for name, p in model.named_parameters() if p.grad is not None}
                found[f"{n} {use_ib_negatives} {name}"] = difference(alone, shared)
    return found


def a_gradient(who) -> dict:
    "One batch, where it is only asked whether the processes find each other."
    return same_gradients(who, sizes=(5,))


def runs(who) -> dict:
    "Whole runs: plain, cached, and one that is cut off and gone on with. Says how they ended, and who wrote and validated what."
    written, validated, found = set(), [], {}
    sys.addaudithook(lambda event, args: event == "open" and isinstance(args[1], str) and set(args[1]) & set("wax+")
                     and str(args[0]).startswith(str(folder / "run")) and written.add(str(args[0])))
    validate = training_run.validate
    training_run.validate = lambda *args, **options: validated.append(1) or validate(*args, **options)
    for name, options in {"run": LONG, "run_cached": LONG | dict(mini_batch_size=2), "run_dropout": LONG | dict(dropout=0.1, mini_batch_size=2)}.items():
        model = fresh(encoder)
        best = train_colbert(model, made_data(), folder / name, **options)
        found[name] = {"best": str(best), "difference": difference(model.state_dict(), fresh(best).state_dict() if best.is_dir() else {})}
    try: train_colbert(fresh(encoder), made_data(), folder / "run_cut", callbacks=[StopAt(3)], **LONG | dict(dropout=0.1, mini_batch_size=2))
    except KeyboardInterrupt: found["cut"] = True
    train_colbert(fresh(encoder), made_data(), folder / "run_cut", resume=True, **LONG | dict(dropout=0.1, mini_batch_size=2))
    return found | {"written": sorted(written), "validated": len(validated), "lines": len(read_log(folder / "run"))}


def refusals(who) -> dict:
    "Errors that one process finds, or that lie between two, come out in all."
    found = {}
    def refused(name, function):
        try: function()
        except Exception as error: found[name] = f"{type(error).__name__}: {error}"
    refused("settings", lambda: train_colbert(fresh(encoder), made_data(), folder / "a", **OPTIONS | dict(learning_rate=1e-3 * (1 + who.rank))))
    refused("a run is there", lambda: train_colbert(fresh(encoder), made_data(), folder / "there", **OPTIONS))
    refused("odd", lambda: on_rank_0(lambda: {}["key"]))
    refused("bad", lambda: on_rank_0(lambda: int("x")))
    return found


class Breaks(TrainerCallback):
    def on_step_end(self, args, state, control, **kwargs):
        if state.global_step == 2 and os.environ["RANK"] == "1": raise RuntimeError("process 1 breaks")


def broken(who) -> dict:
    train_colbert(fresh(encoder), made_data(), folder / "broken", callbacks=[Breaks()], **OPTIONS)
    return {}


if __name__ == "__main__":
    torch.set_num_threads(1)
    who = join_processes()
    answers = {"world_size": who.world_size}
    for name in sys.argv[3:]:
        answers[name] = globals()[name](who)
        (folder / f"rank{who.rank}").write_text(json.dumps(answers))
