"""Gradient caching and several processes: the same gradients, weights and logs as the plain step in one process."""

import json
import os
import socket
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from tiny import OPTIONS, difference, fresh, made_data, weights

from colbert_nb import training_scale
from colbert_nb.data import TrainingData
from colbert_nb.scoring import maxsim
from colbert_nb.training import TripleCollator
from colbert_nb.training_folder import read_log
from colbert_nb.training_losses import choose_loss
from colbert_nb.training_run import TrainingModule, train_colbert
from colbert_nb.training_scale import BlockMaxSim, cached_step, check_same, join_processes, on_rank_0, score_blocks

HERE = Path(__file__).parent
LONG = OPTIONS | dict(batch_size=8, epochs=1, accumsteps=2, matryoshka_dims=[4])


# Scores


@settings(deadline=None, max_examples=60)
@given(st.integers(1, 5), st.integers(1, 4), st.integers(1, 5), st.integers(1, 6), st.integers(0, 10**6), st.sampled_from([1, 7, 2**21]))
def test_scores_and_gradients_of_blocks_are_those_of_maxsim(n, query_tokens, docs, doc_tokens, seed, budget):
    draw = torch.Generator().manual_seed(seed)
    X = [torch.nn.functional.normalize(torch.randn(a, b, 3, generator=draw), dim=-1) for a, b in ((n, query_tokens), (docs, doc_tokens))]
    masks = [torch.rand(x.shape[:2], generator=draw) < 0.7 for x in X]
    weight, results = torch.randn(n, docs, generator=draw), []
    blocks = lambda count, numbers, device: [slice(i, i + max(1, budget // max(1, numbers))) for i in range(0, count, max(1, budget // max(1, numbers)))]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(training_scale, "_blocks", blocks)
        for score in (lambda Q, D: maxsim(Q, D, *masks), lambda Q, D: BlockMaxSim.apply(Q, masks[0], D, masks[1])):
            Q, D = (x.clone().requires_grad_() for x in X)
            scores = score(Q, D)
            scores.masked_fill(scores == -torch.inf, 0).mul(weight).sum().backward()
            results.append((scores.detach(), Q.grad, D.grad))
    for a, b in zip(*results):
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-5)


def test_chunks_of_any_length_are_scored_as_one(model, data):
    from colbert_nb.training import score_chunks
    model.tokenizer.query_expansion = False
    batch = TripleCollator(data, model.tokenizer, chunk_size=2)(list(range(10)))
    with torch.no_grad():
        Q, D = ([(model(chunk), chunk.keep) for chunk in batch[name]] for name in ("queries", "documents"))
    assert len({V.shape[1] for V, _ in D}) > 2
    for dim in (None, 4):
        torch.testing.assert_close(score_blocks(Q, D, dim), score_chunks(Q, D, dim), rtol=1e-5, atol=1e-5)


# Gradient caching


def with_teacher(data: TrainingData) -> TrainingData:
    draw = torch.Generator().manual_seed(3)
    return TrainingData(data.queries, data.corpus, data.triples, data.positives, data.validation,
                        scores=torch.randn(len(data.triples), 2, generator=draw).numpy())


@pytest.mark.parametrize("name", ["contrastive", "colbert-ai", "kl", "margin_mse"])
@pytest.mark.parametrize("size", [1, 3, 100])
def test_gradients_are_those_of_the_plain_step(model, data, name, size):
    data = with_teacher(data)
    loss, module = choose_loss(name, data), TrainingModule(model, dims=(4, 8))
    batch = TripleCollator(data, model.tokenizer, chunk_size=4)(list(range(16)))
    value = lambda scores: sum(loss(part, batch["target"]).sum() for part in scores) / 16
    plain = value(module(**{k: batch[k] for k in ("queries", "documents", "places", "shares")}))
    plain.backward()
    wanted = {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}
    model.zero_grad()
    seen = []

    def encode(chunk):
        seen.append((torch.is_grad_enabled(), len(chunk.keep)))
        return module(chunk)

    cached = cached_step(encode, batch["queries"], batch["documents"], n_queries=size, n_documents=2 * size,
                         loss=lambda Q, D: value(module.scores(Q, D, batch["places"], batch["shares"], score_blocks)))
    assert abs(cached - plain.detach()) < 1e-5
    largest = max(1.0, max(g.abs().max().item() for g in wanted.values()))  # margins of a random teacher give gradients of ten and more
    assert difference(wanted, {n: p.grad for n, p in model.named_parameters() if p.grad is not None}) < 1e-5 * largest
    assert max(n for gradients, n in seen if gradients) <= 2 * size and sum(n for gradients, n in seen if gradients) * 2 == sum(n for _, n in seen)


def test_dropout_draws_the_same_masks_twice_and_leaves_the_generator_where_the_plain_step_does(encoder, data):
    found = []
    for cached in (False, True):
        module = TrainingModule(fresh(encoder), dropout=0.3).train()
        batch = TripleCollator(data, module.model.tokenizer, chunk_size=4)(list(range(8)))
        value = lambda scores: -scores[0, :, :5].log_softmax(1)[:, 0].mean()
        torch.manual_seed(5)
        if cached:
            cached_step(module, batch["queries"], batch["documents"], n_queries=100, n_documents=100,
                        loss=lambda Q, D: value(module.scores(Q, D, batch["places"], batch["shares"], score_blocks)))
        else:
            value(module(**{k: batch[k] for k in ("queries", "documents", "places", "shares")})).backward()
        found.append(({n: p.grad for n, p in module.named_parameters() if p.grad is not None}, torch.rand(3)))
    assert difference(found[0][0], found[1][0]) < 1e-5 and torch.equal(found[0][1], found[1][1])


def test_runs_with_and_without_end_alike(encoder, data, tmp_path):
    a, b = (train_colbert(fresh(encoder), data, tmp_path / str(size), mini_batch_size=size, **LONG) for size in (None, 2))
    assert difference(weights(a), weights(b)) < 1e-5
    for x, y in zip(read_log(a.parent), read_log(b.parent)):
        assert x == pytest.approx(y, abs=1e-4)


def test_half_precision(encoder, data, tmp_path):
    options = OPTIONS | dict(epochs=1, maxsteps=3, bf16=True, learning_rate=1e-4)
    a, b = (train_colbert(fresh(encoder), data, tmp_path / str(size), mini_batch_size=size, **options) for size in (None, 2))
    for x, y in zip(read_log(a.parent), read_log(b.parent)):
        assert x.get("loss", 0) == pytest.approx(y.get("loss", 0), rel=2e-2) and x.get("grad_norm", 0) == pytest.approx(y.get("grad_norm", 0), rel=5e-2)


# Several processes


def free_port() -> int:
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        return s.getsockname()[1]


def launch(launcher: list[str], *args, timeout: float = 300) -> subprocess.CompletedProcess:
    environment = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": f"{HERE}{os.pathsep}{os.environ.get('PYTHONPATH', '')}"}
    for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT"):
        environment.pop(name, None)
    return subprocess.run([sys.executable, "-m", *launcher, str(HERE / "scale_worker.py"), *map(str, args)], env=environment,
                          capture_output=True, text=True, timeout=timeout)


def torchrun(n: int) -> list[str]:
    return ["torch.distributed.run", "--nproc-per-node", str(n), "--master-addr", "127.0.0.1", "--master-port", str(free_port())]


def answers(folder: Path, n: int) -> list[dict]:
    return [json.loads((folder / f"rank{i}").read_text()) for i in range(n)]


@pytest.fixture(scope="module")
def two(encoder, tmp_path_factory):
    "Two processes, started once for several tests."
    folder = tmp_path_factory.mktemp("two")
    (folder / "there").mkdir()
    (folder / "there/run.json").write_text("{}")
    done = launch(torchrun(2), encoder, folder, "same_gradients", "runs", "refusals")
    assert done.returncode == 0, done.stderr[-3000:]
    return folder, answers(folder, 2), done


def test_two_processes_give_the_gradients_of_one(two):
    for answer in two[1]:
        assert answer["world_size"] == 2 and len(answer["same_gradients"]) == 12
        assert max(answer["same_gradients"].values()) < 1e-5, answer["same_gradients"]


def test_two_processes_end_with_the_weights_and_the_log_of_one(encoder, two, tmp_path):
    folder, found, _ = two
    best = train_colbert(fresh(encoder), made_data(), tmp_path / "one", **LONG)
    for name in ("run", "run_cached"):
        assert difference(weights(best), weights(folder / name / "best")) < 1e-5
        assert len(read_log(tmp_path / "one")) == len(read_log(folder / name))
        for one, several in zip(read_log(tmp_path / "one"), read_log(folder / name)):
            assert one == pytest.approx(several, abs=1e-4)
        assert [answer["runs"][name] for answer in found] == [{"best": str(folder / name / "best"), "difference": 0.0}] * 2


def test_a_run_of_two_processes_is_gone_on_with(two):
    folder, found, _ = two
    assert all(answer["runs"]["cut"] for answer in found)
    assert difference(weights(folder / "run_dropout/best"), weights(folder / "run_cut/best")) < 1e-6
    assert read_log(folder / "run_dropout") == read_log(folder / "run_cut")


def test_process_0_writes_and_validates_and_the_others_do_not(two):
    folder, (first, second), _ = two
    assert first["runs"]["written"] and first["runs"]["validated"] > 4
    assert second["runs"]["written"] == [] and second["runs"]["validated"] == 0
    names = {p.name for p in (folder / "run").rglob("rng_state*")}
    assert names == {"rng_state_0.pth", "rng_state_1.pth"} and not list(folder.rglob(".*part*"))


def test_errors_come_out_in_every_process(two):
    folder, found, _ = two
    for answer in found:
        assert "ValueError: expected the same settings in every process, got learning_rate=0.001 in process 0 and 0.002 in process 1" in answer["refusals"]["settings"]
        assert answer["refusals"]["a run is there"].startswith("ValueError: expected a new output_dir")
        assert "KeyError" in answer["refusals"]["odd"] and answer["refusals"]["bad"].startswith("ValueError: invalid literal")
    assert not (folder / "a").exists()


def test_accelerate_launch_starts_them_too_and_one_broken_process_ends_all(encoder, tmp_path):
    "The limit is far below the half hour that a process would wait for one that is gone."
    done = launch(["accelerate.commands.launch", "--multi_gpu", "--num_processes", "2", "--num_machines", "1", "--mixed_precision", "no",
                   "--dynamo_backend", "no", "--main_process_port", str(free_port())], encoder, tmp_path, "a_gradient", "broken", timeout=300)
    assert max(value for answer in answers(tmp_path, 2) for value in answer["a_gradient"].values()) < 1e-5, done.stderr[-3000:]
    assert done.returncode != 0 and "process 1 breaks" in done.stderr
    assert not (tmp_path / "broken/best").exists()


def test_one_process_needs_no_connection():
    assert join_processes() == (0, 1, 0) and not torch.distributed.is_initialized()
    assert on_rank_0(lambda: 7) == 7
    check_same({"settings": {"seed": 1}})
