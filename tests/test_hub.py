"""A push to the Hub, by the unmodified client: what goes up and comes back, and every request of it failing in turn."""

import hashlib
import json
import logging
import re
import shutil
import threading
import time
import traceback
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from hub_client import ended, point_client, start
from hub_server import HubServer, Repository
from tiny import fresh

import colbert_nb.hub
import colbert_nb.hub_errors
from colbert_nb.encoder import ColBERT
from colbert_nb.hub import HubError, export_to_huggingface_hub

TOKEN = "hf_" + "Ab3" * 11 + "x"
TEXTS = ["word1 word2 word3", "word4", "word5 word6 word7 word8"]


@pytest.fixture(scope="module")
def checkpoint(encoder, tmp_path_factory):
    return fresh(encoder).save_pretrained(tmp_path_factory.mktemp("pushed") / "checkpoint")


@pytest.fixture
def hub(tmp_path, monkeypatch):
    "The server, the client pointed at it, and no waiting between tries."
    with HubServer(tmp_path / "hub") as server:
        server.add_user("ada", TOKEN, orgs=("team",))
        server.add_user("ada", TOKEN + "read", role="read")
        server.add_user("bob", TOKEN + "bob")
        point_client(monkeypatch, server.url, tmp_path / "home")
        monkeypatch.setattr("huggingface_hub.utils._http.time", SimpleNamespace(**{**vars(time), "sleep": lambda _: None}))
        monkeypatch.setattr(colbert_nb.hub_errors, "WAITS", (0, 0, 0, 0))
        yield server


@pytest.fixture
def unchecked(monkeypatch):
    "The checkpoint is not looked at again, where only the requests are at stake."
    monkeypatch.setattr(colbert_nb.hub, "check_checkpoint", Path)


def push(checkpoint, name="ada/model", **options):
    return export_to_huggingface_hub(checkpoint, name, **{"token": TOKEN, **options})


def pushed_files(hub, name="ada/model", revision="main"):
    return {path: content for path, content in hub.files(name, revision).items() if path != ".gitattributes"}


def failure(kind, *arguments, **options):
    "The error of a push that fails; its words hold no token, and it keeps its cause."
    with pytest.raises(HubError) as found:
        push(*arguments, **options)
    error = found.value
    assert error.kind == kind, f"{error.kind}: {error}"
    assert TOKEN not in "".join(traceback.format_exception(error))
    return error


def whole(hub, checkpoint, name="ada/model", revision="main"):
    "Whether the checkpoint's files are at the revision, each with its content, and a card with them."
    files = pushed_files(hub, name, revision)
    local = {path.name: path.read_bytes() for path in checkpoint.iterdir()}
    return files.pop("README.md", b"").startswith(b"---\n") and files == local


def other_weights(checkpoint, folder, number):
    "A copy with another projection."
    from safetensors.torch import load_file, save_file
    shutil.copytree(checkpoint, folder)
    tensors = load_file(folder / "model.safetensors")
    tensors["linear.weight"] = tensors["linear.weight"] + number
    save_file(tensors, folder / "model.safetensors", {"format": "pt"})
    return folder


# There and back
def test_a_push_and_the_model_back(hub, checkpoint, monkeypatch):
    url = push(checkpoint)
    assert url == f"{hub.url}/ada/model/commit/{hub.commits('ada/model')[0]['id']}" and whole(hub, checkpoint)
    assert len(hub.commits("ada/model")) == 2
    model = ColBERT.from_pretrained(checkpoint, device="cpu").eval()
    wanted = model.encode_documents(TEXTS, show_progress=False)
    for revision in (None, url.rsplit("/", 1)[1]):
        back = ColBERT.from_pretrained("ada/model", revision=revision, device="cpu").eval()
        assert all(torch.equal(a, b) for a, b in zip(wanted, back.encode_documents(TEXTS, show_progress=False)))
    from huggingface_hub import constants
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    before = len(hub.requests)
    back = ColBERT.from_pretrained("ada/model", device="cpu").eval()
    assert all(torch.equal(a, b) for a, b in zip(wanted, back.encode_documents(TEXTS, show_progress=False))) and len(hub.requests) == before


def test_a_second_push_commits_only_what_changed(hub, checkpoint, tmp_path):
    first = push(checkpoint)
    assert push(checkpoint) == first and len(hub.commits("ada/model")) == 2
    changed = other_weights(checkpoint, tmp_path / "changed", 1.0)
    assert push(changed) != first and len(hub.commits("ada/model")) == 3 and whole(hub, changed)


@pytest.fixture(scope="module")
def minilm(tmp_path_factory):
    "The 90 MB of MiniLM as a ColBERT."
    from colbert_nb.corpus import minilm_path
    return ColBERT.from_pretrained(minilm_path(), dim=128, device="cpu").save_pretrained(tmp_path_factory.mktemp("minilm") / "checkpoint")


@pytest.mark.parametrize("way", ["xet", "lfs"])
def test_the_real_weights_by_both_ways(hub, minilm, tmp_path, monkeypatch, way):
    "Up from here, and down into another process, whose client reads the way from its environment."
    from huggingface_hub import constants
    monkeypatch.setattr(constants, "HF_HUB_DISABLE_XET", way == "lfs")
    push(minilm)
    code = "import huggingface_hub; print(huggingface_hub.snapshot_download('ada/model'))"
    settings = {"HF_HUB_DISABLE_XET": "1"} if way == "lfs" else {}
    back = Path(ended(start(code, url=hub.url, home=tmp_path / "other", token=TOKEN, **settings)).strip())
    assert (minilm / "model.safetensors").stat().st_size > 90_000_000 and whole(hub, minilm)
    assert all((back / path.name).read_bytes() == path.read_bytes() for path in minilm.iterdir())
    assert bool(hub.xet_files()) == (way == "xet") == any("xet-read-token" in path for _, path in hub.requests)


def test_the_trainer_pushes_what_it_trained(hub, checkpoint, tmp_path):
    "With the language and the counts of its data on the card."
    from colbert_nb.trainer import RAGTrainer
    trainer = RAGTrainer("mine", checkpoint, language_code="de", n_usable_gpus=0)
    with pytest.raises(ValueError, match="no trained model"):
        trainer.push_to_hub("ada/model", token=TOKEN)
    pairs = [(f"word{i}", f"word{i} word{i + 1} word{i + 2}") for i in range(20)]
    trainer.prepare_training_data(pairs, data_out_path=tmp_path / "data", mine_hard_negatives=False, num_new_negatives=2)
    trainer.model_path = checkpoint
    url = trainer.push_to_hub("ada/model", token=TOKEN, private=True)
    assert url.endswith(hub.commits("ada/model")[0]["id"]) and whole(hub, checkpoint) and hub.repositories["model", "ada/model"].private
    card, counts = hub.files("ada/model")["README.md"].decode(), json.loads((tmp_path / "data" / "manifest.json").read_text())["counts"]
    assert "language: de\n" in card and all(f"| {name.capitalize()} | {counts[name]} |" in card for name in ("queries", "passages", "triples"))


@pytest.mark.parametrize("use_tmp_dir", [False, True])
def test_the_onnx_file_goes_with_it(hub, checkpoint, tmp_path, monkeypatch, use_tmp_dir):
    folder = shutil.copytree(checkpoint, tmp_path / "folder")

    onnx = pytest.importorskip("onnx")
    graph = onnx.helper.make_model(onnx.helper.make_graph([], "empty", [], []))
    report = {"batches": [3], "lengths": [2, 9], "float32": {"largest_difference": 1e-7}}
    graph.metadata_props.add(key="colbert_nb", value=json.dumps({"report": report}))
    content = graph.SerializeToString(deterministic=True)

    def export(colbert_path, out_path, out_file_name):
        (Path(out_path) / out_file_name).write_bytes(content)
        return Path(out_path) / out_file_name

    monkeypatch.setattr("colbert_nb.onnx.export_to_vespa_onnx", export)
    url = push(folder, export_vespa_onnx=True, use_tmp_dir=use_tmp_dir)
    assert hub.files("ada/model")["vespa_colbert.onnx"] == content and (folder / "vespa_colbert.onnx").exists() != use_tmp_dir
    assert "2 to 9 tokens: no number differs by more than 1.0e-07" in hub.files("ada/model")["README.md"].decode()
    assert push(folder, export_vespa_onnx=True, use_tmp_dir=use_tmp_dir) == url and len(hub.commits("ada/model")) == 2


# What goes
JUNK = ("optimizer.pt", "scheduler.pt", "rng_state.pth", "trainer_state.json", "training_args.bin", "log.jsonl", "events.out.tfevents.1",
        "page.ipynb", ".env", ".git/config", ".ipynb_checkpoints/config.json", "checkpoint-5/model.safetensors", "checkpoint-5/optimizer.pt",
        "data/triples.jsonl", "corpus.train.colbert.tsv", "train.py", "model.safetensors.bak", "pytorch_model.bin", "1_Pooling/config.json")


@pytest.mark.parametrize("use_tmp_dir", [False, True])
def test_only_the_checkpoint_goes(hub, checkpoint, tmp_path, use_tmp_dir):
    folder = shutil.copytree(checkpoint, tmp_path / "folder")
    for name in JUNK:
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text("secret")
    push(folder, use_tmp_dir=use_tmp_dir)
    assert whole(hub, checkpoint)


def test_a_dry_run_asks_nothing_and_lists_what_would_go(hub, checkpoint):
    listed = push(checkpoint, dry_run=True)
    assert not hub.requests
    local = {path.name: path.read_bytes() for path in checkpoint.iterdir()}
    assert {f.name: (f.size, f.sha256) for f in listed if f.name != "README.md"} == {
        name: (len(content), hashlib.sha256(content).hexdigest()) for name, content in local.items()}
    (card,) = (f for f in listed if f.name == "README.md")
    push(checkpoint)
    assert hashlib.sha256(hub.files("ada/model")["README.md"]).hexdigest() == card.sha256


def test_a_damaged_checkpoint_is_refused_before_a_request(hub, checkpoint, tmp_path):
    folder = other_weights(checkpoint, tmp_path / "folder", float("nan"))
    (folder / "tokenizer.json").unlink()
    with pytest.raises(ValueError, match="(?s)tokenizer.json.*NaN|NaN.*tokenizer.json"):
        push(folder)
    assert not hub.requests


# Where it goes
def test_a_branch_and_a_tag(hub, checkpoint, tmp_path):
    url = push(checkpoint, revision="try/one", tag="v1", private=True)
    oid, refs = url.rsplit("/", 1)[1], hub.refs("ada/model")
    assert refs["refs/heads/try/one"] == refs["refs/tags/v1"] == oid != refs["refs/heads/main"] and whole(hub, checkpoint, revision="v1")
    assert hub.repositories["model", "ada/model"].private
    assert push(checkpoint, revision="try/one", tag="v1", private=True) == url
    failure("tag", other_weights(checkpoint, tmp_path / "changed", 1.0), revision="try/one", tag="v1")


def test_a_pull_request_by_someone_else(hub, checkpoint, tmp_path):
    push(checkpoint)
    changed = other_weights(checkpoint, tmp_path / "changed", 1.0)
    url = push(changed, token=TOKEN + "bob", create_pr=True)
    refs = hub.refs("ada/model")
    assert url.endswith(refs["refs/pr/1"]) and whole(hub, changed, revision="refs/pr/1") and whole(hub, checkpoint)
    push(changed, token=TOKEN + "bob", create_pr=True)
    assert hub.refs("ada/model") == refs, "the same proposal was made twice"


def test_a_public_repository_is_not_taken_for_a_private_one(hub, checkpoint):
    hub.create("ada/model")
    failure("public", checkpoint, private=True)
    assert len(hub.commits("ada/model")) == 1


def test_a_card_that_is_there_is_kept(hub, checkpoint):
    hub.create("ada/model")
    hub.commit("ada/model", {"README.md": b"---\nlicense: mit\n---\n# By hand\n", "notes.txt": b"kept"}, author="ada")
    push(checkpoint)
    assert hub.files("ada/model")["README.md"].endswith(b"# By hand\n") and hub.files("ada/model")["notes.txt"] == b"kept"
    push(checkpoint, replace_model_card=True)
    files = pushed_files(hub)
    assert files.pop("notes.txt") == b"kept" and b"By hand" not in files["README.md"] and b"ColBERT" in files["README.md"]


# Faults
ONCE = {"503": {"status": 503}, "cut": {"status": None}, "lost": {"status": None, "after": True}, "504 late": {"status": 504, "after": True}}
PUSHES = {"plain": {}, "commit": {}, "lfs": {}, "branch and tag": {"revision": "try/one", "tag": "v1", "private": True},
          "pull request": {"create_pr": True}}


@pytest.mark.parametrize("kind, fault", [("plain", "503"), ("plain", "cut"), ("plain", "lost"), ("commit", "504 late"),
                                         ("branch and tag", "503"), ("branch and tag", "lost"), ("pull request", "503"),
                                         ("pull request", "lost"), ("lfs", "503"), ("lfs", "lost")])
def test_one_fault_at_each_request_ends_in_success(hub, checkpoint, unchecked, monkeypatch, kind, fault):
    "Each request of a push fails once, in turn: there is one commit, one pull request, and all files."
    from huggingface_hub import constants
    monkeypatch.setattr(constants, "HF_HUB_DISABLE_XET", kind == "lfs")
    options, amiss = PUSHES[kind], {}

    def prepare(name):
        if "create_pr" in options:
            hub.create(name)
        hub.requests.clear()

    prepare("ada/model")
    push(checkpoint, "ada/model", **options)
    asked = [f"{method} {path}" for method, path in hub.requests]
    assert all(any(part in request for request in asked) for part in ("/commit/", "/info/lfs/" if kind == "lfs" else "xet-write-token"))
    revision = {"branch and tag": "try/one", "pull request": "refs/pr/1"}.get(kind, "main")
    own = re.compile({"plain": "", "lfs": "lfs|/storage/"}.get(kind, "/commit/|/branch/|/tag/|/refs|discussions"))  # else as in plain
    for i, request in enumerate(asked):
        if not own.search(request):
            continue
        name = f"ada/model{i}"
        prepare(name)
        hub.fail(skip=i, **ONCE[fault])
        try:
            url = push(checkpoint, name, **options)
            count, refs = len(hub.commits(name, revision)) - 1, hub.refs(name)
            right = count == 1 and whole(hub, checkpoint, name, revision) and url.endswith(refs.get("refs/tags/v1", url))
            if not right or "refs/pr/2" in refs:
                amiss[request] = f"{count} commits, {sorted(refs)}, {sorted(hub.files(name, revision))}"
        except (HubError, ValueError) as error:
            amiss[request] = f"{type(error).__name__}: {error}"
        hub.heal()
    assert not amiss, json.dumps(amiss, indent=1)


@pytest.mark.parametrize("status, kind", [(503, "unavailable"), (None, "no_reach")])
def test_a_server_that_goes_away_is_a_clear_error(hub, checkpoint, unchecked, status, kind):
    "From each request on nothing is answered: an error that says so, and a later push mends what was left."
    push(checkpoint, "ada/plain")
    asked = [path for _, path in hub.requests]
    commit = next(i for i, path in enumerate(asked) if "/commit/" in path)
    for i, path in enumerate(asked):
        name = "ada/model" if i <= commit else f"ada/model{i}"
        hub.fail(skip=i, status=status, times=None)
        error = failure(kind, checkpoint, name)
        hub.heal()
        count = len(hub.commits(name)) if ("model", name) in hub.repositories else 0
        assert error.__cause__ is not None and count == (i > 0) + (i > commit), path
    for name in ("ada/model", f"ada/model{len(asked) - 1}"):
        push(checkpoint, name)
        assert len(hub.commits(name)) == 2 and whole(hub, checkpoint, name)


def test_another_writer_in_between(hub, checkpoint):
    "The branch moves between looking and committing: the push is made again on top, and the other's file stays."
    hub.create("ada/model")
    hub.when("POST", "/commit/", lambda: hub.commit("ada/model", {"notes.txt": b"theirs"}))
    push(checkpoint)
    files = pushed_files(hub)
    assert files["notes.txt"] == b"theirs" and len(hub.commits("ada/model")) == 3
    assert {path.name: path.read_bytes() for path in checkpoint.iterdir()}.items() <= files.items()


def test_writers_without_end(hub, checkpoint):
    hub.create("ada/model")
    hub.when("POST", "/commit/", lambda: hub.commit("ada/model", {"notes.txt": f"{len(hub.requests)}".encode()}), times=None)
    assert failure("changed", checkpoint).__cause__.response.status_code == 412


def test_two_push_at_once(hub, checkpoint, tmp_path, unchecked):
    folders = [checkpoint, other_weights(checkpoint, tmp_path / "other", 1.0)]
    urls = []
    threads = [threading.Thread(target=lambda f=f: urls.append(push(f, replace_model_card=True))) for f in folders]
    for thread in threads: thread.start()
    for thread in threads: thread.join()
    oids = [c["id"] for c in hub.commits("ada/model")]
    assert len(oids) == 3 and {url.rsplit("/", 1)[1] for url in urls} == set(oids[:2])
    assert any(whole(hub, folder) for folder in folders)


def test_what_arrived_is_compared(hub, checkpoint, monkeypatch):
    "A server that lists another hash for the weights than was sent."
    listing = Repository.tree

    def wrong(self, *arguments, **options):
        entries = listing(self, *arguments, **options)
        for entry in entries:
            if "lfs" in entry: entry["lfs"] = {**entry["lfs"], "oid": "0" * 64}
        return entries

    hub.when("POST", "/commit/", lambda: monkeypatch.setattr(Repository, "tree", wrong), after=True)
    assert "model.safetensors" in str(failure("mismatch", checkpoint))


# Refusals
def test_without_a_token_nothing_is_asked(hub, checkpoint):
    failure("no_token", checkpoint, token=None)
    assert not hub.requests


@pytest.mark.parametrize("token, name, kind", [("hf_" + "Zz9" * 11, "ada/model", "wrong_token"), (TOKEN + "read", "ada/model", "read_only"),
                                               (TOKEN, "bob/model", "other_namespace"), (TOKEN + "bob", "team/model", "other_namespace")])
@pytest.mark.parametrize("there", [False, True])
def test_who_may_not(hub, checkpoint, unchecked, token, name, kind, there):
    if there: hub.create(name)
    error = failure(kind, checkpoint, name, token=token)
    assert error.__cause__ is not None and token not in "".join(traceback.format_exception(error))
    assert not there or len(hub.commits(name)) == 1


@pytest.mark.parametrize("name", ["", "ada/", "/model", "a/b/c", "ada/mo del", "ada/model.git", "ada/-model", "ada/mo--del", "ada/..",
                                  "ada/" + "x" * 97, None, 3, "https://huggingface.co/ada/model"])
def test_bad_names_are_refused_before_a_request(hub, checkpoint, unchecked, name):
    with pytest.raises(ValueError):
        push(checkpoint, name)
    assert not hub.requests


def test_no_reach(checkpoint, tmp_path, monkeypatch, unchecked):
    with HubServer(tmp_path / "hub") as hub:
        point_client(monkeypatch, hub.url, tmp_path / "home")
    monkeypatch.setattr(colbert_nb.hub_errors, "WAITS", (0, 0))
    assert hub.url in str(failure("no_reach", checkpoint)) and not hub.requests
    from huggingface_hub import constants
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    assert "HF_HUB_OFFLINE" in str(failure("no_reach", checkpoint))


def test_full_refused_and_disliked(hub, checkpoint, unchecked):
    hub.quota = 1000
    assert failure("quota", checkpoint).__cause__.response.status_code == 413
    hub.quota = None
    hub.fail("POST", "/commit/", status=413, times=None)
    failure("quota", checkpoint)
    hub.heal()
    hub.fail("POST", "/validate-yaml", status=400, message="the licence is no licence", times=None)
    assert "the licence is no licence" in str(failure("card", checkpoint))
    hub.heal()
    hub.fail("POST", "/preupload/", status=418, message="a teapot", times=None)
    assert "a teapot" in str(failure("refused", checkpoint))
    hub.heal()
    hub.fail("GET", "xet-write-token", status=403, times=None)
    failure("refused", checkpoint)
    assert len(hub.commits("ada/model")) == 1


def test_a_model_of_another_kind_is_not_overwritten(hub, checkpoint):
    hub.create("ada/model")
    hub.commit("ada/model", {"config.json": b'{"model_type": "gpt2"}'})
    failure("other_model", checkpoint)
    assert len(hub.commits("ada/model")) == 2


def test_the_token_is_nowhere(hub, checkpoint, tmp_path, caplog, capfd, monkeypatch):
    "Not in the logs at their most talkative, not in what is printed, not in any file, here or there."
    monkeypatch.setenv("HF_TOKEN", TOKEN)
    folder = shutil.copytree(checkpoint, tmp_path / "folder")
    caplog.set_level(logging.DEBUG)
    for name in ("colbert_nb", "huggingface_hub", "httpx2"):
        caplog.set_level(logging.DEBUG, logger=name)
        monkeypatch.setattr(logging.getLogger(name), "propagate", True)
    push(folder, token=None, tag="v1")
    hub.fail(status=503, times=None, skip=3)
    failure("unavailable", folder, "ada/other", token=None)
    hub.heal()
    failure("other_namespace", folder, "bob/model", token=None)
    out, errors = capfd.readouterr()
    assert "ada/model" in caplog.text and TOKEN not in caplog.text + out + errors
    assert not [name for name, content in hub.files("ada/model").items() if TOKEN.encode() in content]
    assert not [path for path in (*folder.rglob("*"), *(tmp_path / "home").rglob("*")) if path.is_file() and TOKEN.encode() in path.read_bytes()]
    assert sorted(path.name for path in folder.iterdir()) == sorted(path.name for path in checkpoint.iterdir())
