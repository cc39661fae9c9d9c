"""The tests' own Hub is one: the unmodified client goes up and down with it, by xet and by LFS."""

import hashlib
import importlib.metadata
import random
import re
import subprocess
import threading
from pathlib import Path

import pytest
from hub_client import ended, point_client, start
from hub_server import WRONG_TOKEN, HubServer, card_problems, shard_files, xet_url
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

UP_AND_DOWN = """
import sys
from huggingface_hub import HfApi, constants, snapshot_download
folder, repository, back = sys.argv[1:]
api = HfApi()
api.create_repo(repository, exist_ok=True)
first = api.upload_folder(repo_id=repository, folder_path=folder, commit_message="Weights")
again = api.upload_folder(repo_id=repository, folder_path=folder, commit_message="Weights again")
assert first.oid == again.oid, "an unchanged folder was committed"
snapshot_download(repository, local_dir=back)
print(first.oid)
"""


@pytest.fixture
def hub(tmp_path, monkeypatch):
    with HubServer(tmp_path / "hub") as server:
        server.add_user("ada", "hf_ada")
        server.add_user("bob", "hf_bob", orgs=("team",))
        server.add_user("eve", "hf_eve", role="read")
        point_client(monkeypatch, server.url, tmp_path / "home")
        yield server


def client(hub, token: str | bool = "hf_ada"):
    from huggingface_hub import HfApi
    return HfApi(endpoint=hub.url, token=token)


def make_folder(folder: Path, seed: int = 0) -> dict[str, bytes]:
    "A folder of small and large files, and what is in it."
    draw = random.Random(seed)
    files = {"config.json": b'{"dim": 128}\n', "README.md": b"---\nlicense: mit\n---\n# A model\n", "sub/caf\u00e9 & co.txt": b"\n",
             "model.safetensors": draw.randbytes(700_000), "large.txt": b"a line\n" * 2_000_000, "binary": b"a\0b", "empty.txt": b""}
    for name, content in files.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_bytes(content)
    return files


def refused(call, *arguments, **options):
    "The error of a request that is refused: type's name, status, message."
    with pytest.raises(Exception) as error:
        call(*arguments, **options)
    return type(error.value).__name__, error.value.response.status_code, str(error.value)


# Up and down
def test_the_client_goes_up_and_down(hub, tmp_path):
    "In this process by xet: what comes back, what git holds, and what was asked."
    from huggingface_hub import snapshot_download
    files, api = make_folder(tmp_path / "folder"), client(hub)
    assert api.create_repo("ada/model", private=True) == f"{hub.url}/ada/model"
    pushed = api.upload_folder(repo_id="ada/model", folder_path=tmp_path / "folder", commit_message="All of it")
    assert list(dict.fromkeys(path.removeprefix("/api/models/ada/model") for _, path in hub.requests)) == [
        "/api/repos/create", "/api/validate-yaml", "/preupload/main", "/xet-write-token/main", "/commit/main"]
    back = Path(snapshot_download("ada/model", endpoint=hub.url, token="hf_ada"))
    assert {name: (back / name).read_bytes() for name in files} == files
    assert hub.files("ada/model") == {".gitattributes": hub.files("ada/model")[".gitattributes"], **files}
    assert pushed.commit_url == f"{hub.url}/ada/model/commit/{hub.commits('ada/model')[0]['id']}"
    assert [c["title"] for c in hub.commits("ada/model")] == ["All of it", "initial commit"]
    listed = {f.path: f for f in api.list_repo_tree("ada/model", recursive=True) if hasattr(f, "blob_id")}
    large = {name for name, f in listed.items() if f.lfs}
    assert large == {"model.safetensors", "large.txt", "binary"} == {name for name, f in listed.items() if f.xet_hash}
    assert all(listed[n].lfs.sha256 == hashlib.sha256(files[n]).hexdigest() and listed[n].size == len(files[n]) for n in large)
    assert listed["config.json"].blob_id == hashlib.sha1(b"blob 13\0" + files["config.json"]).hexdigest()
    assert not api.verify_repo_checksums("ada/model", local_dir=tmp_path / "folder").mismatches


def test_git_finds_nothing_amiss_and_clones_the_pointers(hub, tmp_path):
    files = make_folder(tmp_path / "folder")
    client(hub).create_repo("ada/model")
    client(hub).upload_folder(repo_id="ada/model", folder_path=tmp_path / "folder")
    bare = tmp_path / "hub" / "repositories" / "model" / "ada" / "model.git"
    subprocess.run(["git", "-C", str(bare), "fsck", "--strict"], check=True, capture_output=True)
    subprocess.run(["git", "clone", "--quiet", str(bare), str(tmp_path / "clone")], check=True, capture_output=True)
    assert (tmp_path / "clone" / "config.json").read_bytes() == files["config.json"]
    oid = hashlib.sha256(files["model.safetensors"]).hexdigest()
    assert (tmp_path / "clone" / "model.safetensors").read_text() == (
        f"version https://git-lfs.github.com/spec/v1\noid sha256:{oid}\nsize {len(files['model.safetensors'])}\n")


@pytest.mark.parametrize("way", ["xet", "lfs"])
def test_the_real_weights_by_both_ways(hub, tmp_path, way):
    "90 MB of MiniLM by a process of its own, which is how a user's client reads its settings."
    from colbert_nb.corpus import minilm_path
    more = {"HF_HUB_DISABLE_XET": "1"} if way == "lfs" else {}
    commit = ended(start(UP_AND_DOWN, minilm_path(), "ada/minilm", tmp_path / "back", url=hub.url, home=tmp_path / "home", token="hf_ada", **more))
    assert hub.commits("ada/minilm")[0]["id"] == commit.strip() and len(hub.commits("ada/minilm")) == 2
    for file in minilm_path().rglob("*"):
        if file.is_file() and not file.name.startswith("."):
            assert (tmp_path / "back" / file.relative_to(minilm_path())).read_bytes() == file.read_bytes(), file.name
    asked = "\n".join(path for _, path in hub.requests)
    assert ("xet-write-token" in asked and "xet-read-token" in asked) == (way == "xet")
    assert ("info/lfs/objects/batch" in asked and "/storage/" in asked) == (way == "lfs")
    assert (len(list((tmp_path / "hub" / "objects").iterdir())) > 0) == (way == "lfs") != bool(hub.xet_files())


def test_what_came_by_one_way_is_had_by_the_other(hub, tmp_path, monkeypatch):
    from huggingface_hub import constants, hf_hub_download
    content = {way: random.Random(way).randbytes(300_000) for way in ("xet", "lfs")}
    client(hub).create_repo("ada/model")
    for way, other in (("xet", "lfs"), ("lfs", "xet")):
        monkeypatch.setattr(constants, "HF_HUB_DISABLE_XET", way == "lfs")
        client(hub).upload_file(path_or_fileobj=content[way], path_in_repo=f"{way}.bin", repo_id="ada/model")
        monkeypatch.setattr(constants, "HF_HUB_DISABLE_XET", other == "lfs")
        path = hf_hub_download("ada/model", f"{way}.bin", endpoint=hub.url, cache_dir=tmp_path / way)
        assert Path(path).read_bytes() == content[way]


def test_hf_xet_still_has_its_local_store(hub):
    "The address local:///… is nowhere promised. This says what is amiss when a later hf_xet refuses it."
    hf_xet, version = pytest.importorskip("hf_xet"), importlib.metadata.version("hf-xet")
    content, store = random.Random(0).randbytes(200_000), hub.store_to_write()
    amiss = (f"hf_xet {version} has no local store as 1.8 had: tests/hub_server.py answers the token request with casUrl {xet_url(store)}, "
             "and all pushes by xet in these tests rest on it. Pin hf-xet below this version, or give the server a store that it takes: ")
    try:
        with hf_xet.XetSession().new_upload_commit(endpoint=xet_url(store), token="none", token_expiry_unix_secs=2**40) as commit:
            upload = commit.start_upload_bytes(content, sha256=hf_xet.COMPUTE_SHA256, name="weights")
        found = upload.result().xet_info
    except Exception as error:
        pytest.fail(f"{amiss}{type(error).__name__}: {error}")
    sha = hashlib.sha256(content).hexdigest()
    assert list(store.rglob("*.mdb")), f"{amiss}no shard in the store"
    assert hub.xet_files().get(sha) == (found.hash, len(content)), f"{amiss}its shards do not name the file"
    assert hub.object(sha).read_bytes() == content, f"{amiss}the file does not come back"


def test_a_shard_of_another_format_is_refused():
    for shard in (b"", b"HFRepoMetaData" + bytes(100), b"HFRepoMetaData" + bytes(18) + (3).to_bytes(8, "little") + bytes(90)):
        with pytest.raises(ValueError, match="expected a shard of xet's store, version 2"):
            list(shard_files(shard))
    with pytest.raises(ValueError, match="got none"):
        list(shard_files(b"HFRepoMetaData" + bytes(18) + (2).to_bytes(8, "little") + bytes(8)))


@given(st.lists(st.dictionaries(st.sampled_from(["a", "b.txt", "d/a", "d/e/f", "\u00fc \u6f22/x.bin", "z.onnx"]),
                                st.one_of(st.none(), st.binary(max_size=40)), min_size=1), min_size=1, max_size=4))
@settings(max_examples=6, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_any_commits_leave_the_files_that_they_say(tmp_path, hub, steps):
    "Files added, changed and removed by the client, against a dictionary."
    from huggingface_hub import CommitOperationAdd, CommitOperationDelete
    name, there, count = f"ada/model{len(hub.repositories)}", {}, 1
    client(hub).create_repo(name)
    for step in steps:
        operations = [CommitOperationAdd(path, content) for path, content in step.items() if content is not None]
        operations += [CommitOperationDelete(path) for path, content in step.items() if content is None and path in there]
        count += any(content is not None and there.get(p) != content or content is None and p in there for p, content in step.items())
        client(hub).create_commit(name, operations, commit_message="A step")
        there |= step
        there = {path: content for path, content in there.items() if content is not None}
        assert {p: c for p, c in hub.files(name).items() if p != ".gitattributes"} == there
    assert len(hub.commits(name)) == count


# Branches, tags, pull requests, several writers
def test_branches_tags_and_pull_requests(hub):
    from huggingface_hub import CommitOperationAdd
    from huggingface_hub.errors import RevisionNotFoundError
    api = client(hub)
    api.create_repo("ada/model")
    start = api.model_info("ada/model").sha
    api.create_branch("ada/model", branch="try/one")
    api.create_branch("ada/model", branch="try/one", exist_ok=True)
    assert refused(api.create_branch, "ada/model", branch="try/one")[1] == 409
    assert refused(api.create_branch, "ada/model", branch="refs/pr/5")[1] == 400
    api.upload_file(path_or_fileobj=b"1", path_in_repo="a", repo_id="ada/model", revision="try/one")
    api.create_tag("ada/model", tag="v1", revision="try/one", tag_message="The first")
    assert refused(api.create_tag, "ada/model", tag="v1")[1] == 409
    asked = client(hub, "hf_bob").create_commit("ada/model", [CommitOperationAdd("b", b"2")], commit_message="From bob", create_pr=True)
    assert asked.pr_url == f"{hub.url}/ada/model/discussions/1" and asked.pr_revision == "refs/pr/1"
    client(hub, "hf_bob").upload_file(path_or_fileobj=b"3", path_in_repo="b", repo_id="ada/model", revision="refs/pr/1")
    assert [hub.files("ada/model", r).keys() - {".gitattributes"} for r in ("main", "try/one", "v1", "refs/pr/1")] == [set(), {"a"}, {"a"}, {"b"}]
    found = api.list_repo_refs("ada/model", include_pull_requests=True)
    assert ([b.name for b in found.branches], [t.name for t in found.tags], [p.ref for p in found.pull_requests]) == (
        ["main", "try/one"], ["v1"], ["refs/pr/1"])
    assert hub.refs("ada/model")["refs/tags/v1"] == hub.refs("ada/model")["refs/heads/try/one"] == found.tags[0].target_commit != start
    (listed,) = api.get_repo_discussions("ada/model")
    assert (listed.title, listed.author, listed.is_pull_request, listed.status) == ("From bob", "bob", True, "draft")
    api.merge_pull_request("ada/model", 1)
    assert hub.files("ada/model")["b"] == b"3" and api.get_discussion_details("ada/model", 1).status == "merged"
    late = {"path_or_fileobj": b"4", "path_in_repo": "b", "repo_id": "ada/model", "revision": "refs/pr/1"}
    assert refused(client(hub, "hf_bob").upload_file, **late)[1] == 400
    api.delete_branch("ada/model", branch="try/one")
    api.delete_tag("ada/model", tag="v1")
    with pytest.raises(RevisionNotFoundError):
        api.model_info("ada/model", revision="v1")


def test_two_processes_push_at_once(hub, tmp_path):
    "Both pushes are there, one commit on the other."
    files = {f"of{i}": make_folder(tmp_path / f"{i}" / f"of{i}", seed=i) for i in range(2)}
    client(hub).create_repo("ada/model")
    code = "import sys; from huggingface_hub import upload_folder; print(upload_folder(repo_id='ada/model', folder_path=sys.argv[1]).oid)"
    both = [start(code, tmp_path / f"{i}", url=hub.url, home=tmp_path / f"home{i}", token="hf_ada") for i in range(2)]
    oids = {ended(process).strip() for process in both}
    assert {c["id"] for c in hub.commits("ada/model")[:2]} == oids and len(hub.commits("ada/model")) == 3
    code = "import huggingface_hub; print(huggingface_hub.snapshot_download('ada/model'))"
    back = Path(ended(start(code, url=hub.url, home=tmp_path / "third")).strip())
    found = hub.files("ada/model")
    for name, content in {f"{top}/{name}": content for top, inside in files.items() for name, content in inside.items()}.items():
        assert found[name] == content == (back / name).read_bytes()


def test_of_writers_on_the_same_parent_one_wins(hub):
    from huggingface_hub import CommitOperationAdd
    client(hub).create_repo("ada/model")
    parent, results = client(hub).model_info("ada/model").sha, []

    def write(i):
        try:
            client(hub).create_commit("ada/model", [CommitOperationAdd("a", f"{i}".encode())], commit_message=f"{i}", parent_commit=parent)
            results.append(200)
        except Exception as error:
            results.append(error.response.status_code)

    threads = [threading.Thread(target=write, args=(i,)) for i in range(4)]
    for thread in threads: thread.start()
    for thread in threads: thread.join()
    assert sorted(results) == [200, 412, 412, 412] and len(hub.commits("ada/model")) == 2


def test_the_same_pushes_have_the_same_hashes(tmp_path, monkeypatch):
    oids = []
    for place in ("one", "two"):
        with HubServer(tmp_path / place) as hub:
            hub.add_user("ada", "hf_ada")
            point_client(monkeypatch, hub.url, tmp_path / "home")
            client(hub).create_repo("ada/model")
            oids.append(client(hub).upload_file(path_or_fileobj=b"1", path_in_repo="a.bin", repo_id="ada/model").oid)
    assert oids[0] == oids[1]


# Who may do what
def test_who_may_see_and_write(hub):
    "Reading, writing and proposing, by the owner, another, a token that only reads, a wrong one and none."
    from huggingface_hub import CommitOperationAdd
    hub.create("ada/open"), hub.create("ada/hidden", private=True), hub.create("team/hidden", private=True), hub.create("eve/open")

    def outcome(token, repository, **options):
        api = client(hub, token)
        try:
            if options.pop("read", False):
                return api.model_info(repository).id == repository
            change = [CommitOperationAdd("a", f"by {token}".encode())]
            return bool(api.create_commit(repository, change, commit_message="Mine", **options).oid)
        except Exception as error:
            return f"{type(error).__name__} {error.response.status_code}"

    tokens = ("hf_ada", "hf_bob", "hf_eve", "hf_wrong", False)
    gone, error = "RepositoryNotFoundError 404", "HfHubHTTPError"
    assert [outcome(t, "ada/open", read=True) for t in tokens] == [True, True, True, f"{error} 401", True]
    assert [outcome(t, "ada/hidden", read=True) for t in tokens] == [True, gone, gone, f"{error} 401", "RepositoryNotFoundError 401"]
    assert [outcome(t, "team/hidden", read=True) for t in tokens[:2]] == [gone, True]
    assert [outcome(t, "ada/nothing", read=True) for t in tokens[:2]] == [gone, gone]
    assert [outcome(t, "ada/open") for t in tokens[:4]] == [True, f"{error} 403", f"{error} 403", f"{error} 401"]
    assert outcome(False, "ada/open").endswith(" 401") and outcome("hf_eve", "eve/open") == f"{error} 403"
    assert [outcome(t, "ada/open", create_pr=True) for t in tokens[:3]] == [True, True, f"{error} 403"]
    assert [outcome(t, "ada/hidden") for t in tokens[:2]] == [True, gone]


def test_creating_naming_and_settling(hub):
    api = client(hub)
    for token, name in (("hf_bob", "ada/new"), ("hf_eve", "eve/new")):
        kind, status, message = refused(client(hub, token).create_repo, name)
        assert status == 403 and "don't have the rights to create a model under the namespace" in message
    assert refused(client(hub, "hf_wrong").create_repo, "ada/new")[1] == refused(client(hub, "hf_wrong").whoami)[1] == 401
    assert client(hub, "hf_bob").create_repo("team/new").repo_id == "team/new" and not hub.repositories["model", "team/new"].private
    assert api.create_repo("ada/new", private=True).repo_id == api.create_repo("ada/new", exist_ok=True).repo_id == "ada/new"
    assert refused(api.create_repo, "ada/new")[1] == 409
    assert (api.whoami()["name"], api.whoami()["auth"]["accessToken"]["role"]) == ("ada", "write")
    assert client(hub, "hf_eve").whoami()["auth"]["accessToken"]["role"] == "read"
    api.update_repo_settings("ada/new", private=False)
    assert client(hub, False).model_info("ada/new").private is False
    api.create_repo("ada/data", repo_type="dataset")
    api.upload_file(path_or_fileobj=b"\0" * 10, path_in_repo="a.bin", repo_id="ada/data", repo_type="dataset")
    assert hub.files("ada/data", kind="dataset")["a.bin"] == bytes(10)
    api.delete_repo("ada/new")
    assert not api.repo_exists("ada/new") and api.repo_exists("ada/data", repo_type="dataset")


# What is asked of a file
def test_parts_of_a_file_and_what_is_not_there(hub, tmp_path):
    import httpx2
    from huggingface_hub import hf_hub_download
    from huggingface_hub.errors import EntryNotFoundError, RevisionNotFoundError
    api, web = client(hub), httpx2.Client()
    api.create_repo("ada/model")
    content = random.Random(1).randbytes(1000)
    for name in ("a.txt", "a.bin"):
        commit = api.upload_file(path_or_fileobj=content, path_in_repo=f"d/{name}", repo_id="ada/model").oid
        for place in (f"/ada/model/resolve/main/d/{name}", f"/api/resolve-cache/models/ada/model/{commit}/d%2F{name}"):
            for asked, got, status in (("bytes=0-9", content[:10], 206), ("bytes=990-", content[990:], 206), ("bytes=1000-", b"", 416)):
                answer = web.get(hub.url + place, headers={"Range": asked})
                assert (answer.content, answer.status_code) == (got, status)
            whole, head = web.get(hub.url + place), web.head(hub.url + place)
            assert whole.content == content and head.headers["X-Repo-Commit"] == commit and head.headers["ETag"] == whole.headers["ETag"]
    with pytest.raises(EntryNotFoundError):
        hf_hub_download("ada/model", "nothing", endpoint=hub.url)
    with pytest.raises(RevisionNotFoundError):
        hf_hub_download("ada/model", "d/a.txt", revision="nowhere", endpoint=hub.url)
    assert not api.file_exists("ada/model", "d") and api.file_exists("ada/model", "d/a.txt")
    assert refused(lambda: list(api.list_repo_tree("ada/model", "nothing")))[0] == "RemoteEntryNotFoundError"


def test_lists_come_in_pages(hub):
    from huggingface_hub import CommitOperationAdd
    api, hub.page = client(hub), 2
    api.create_repo("ada/model")
    for i in range(3):
        api.create_commit("ada/model", [CommitOperationAdd(f"d/{i}", b"x"), CommitOperationAdd(f"{i}", b"y")], commit_message=f"{i}")
    listed = list(api.list_repo_tree("ada/model", recursive=True, expand=True))
    assert [entry.path for entry in listed] == [".gitattributes", "0", "1", "2", "d", "d/0", "d/1", "d/2"]
    assert {entry.path: entry.last_commit.title for entry in listed}["d/1"] == "1"
    assert [entry.path for entry in api.list_repo_tree("ada/model", "d")] == ["d/0", "d/1", "d/2"]
    assert [c.title for c in api.list_repo_commits("ada/model")] == ["2", "1", "0", "initial commit"]
    assert {e.path: type(e).__name__ for e in api.get_paths_info("ada/model", ["d", "1", "no"])} == {"d": "RepoFolder", "1": "RepoFile"}


def test_a_card_is_checked(hub):
    api = client(hub)
    api.create_repo("ada/model")
    heads = ("license: mine\n---\n", "license: mit\n", "a:\tb\n---\n", "not yaml\n---\n", "model-index:\n- results: []\n---\n")
    for text in [f"---\n{head}" for head in heads]:
        assert card_problems(text)[0]
        with pytest.raises(ValueError, match="Invalid metadata in README.md"):
            api.upload_file(path_or_fileobj=text.encode(), path_in_repo="README.md", repo_id="ada/model")
    with pytest.warns(UserWarning, match="empty or missing yaml metadata"):
        api.upload_file(path_or_fileobj=b"# No metadata\n", path_in_repo="README.md", repo_id="ada/model")
    good = "---\nlicense: apache-2.0\ntags:\n- ColBERT\nmodel-index:\n- name: x\n  results: []\n---\n# It\n"
    api.upload_file(path_or_fileobj=good.encode(), path_in_repo="README.md", repo_id="ada/model")
    assert hub.files("ada/model")["README.md"].decode() == good and len(hub.commits("ada/model")) == 3


# Faults
def test_faults_happen_where_and_as_often_as_asked(hub):
    import httpx2
    from huggingface_hub import CommitOperationAdd
    from huggingface_hub.errors import HfHubHTTPError
    api = client(hub)
    hub.fail("POST", "/repos/create", status=503)
    assert refused(api.create_repo, "ada/model")[1] == 503
    api.create_repo("ada/model")
    hub.fail("GET", "/api/models/", status=None, times=2)
    for _ in range(2):
        with pytest.raises(httpx2.RemoteProtocolError, match="disconnected"):
            api.model_info("ada/model")
    assert api.model_info("ada/model").id == "ada/model"
    hub.fail("POST", "/commit/", status=None, after=True)
    with pytest.raises(httpx2.RemoteProtocolError):
        api.create_commit("ada/model", [CommitOperationAdd("a", b"1")], commit_message="Lost")
    assert hub.commits("ada/model")[0]["title"] == "Lost"
    hub.fail("GET", "/whoami", status=500, times=None, message="all is lost", code="Lost")
    for _ in range(3):
        with pytest.raises(HfHubHTTPError, match="all is lost"):
            api.whoami()
    hub.heal()
    assert api.whoami()["name"] == "ada"
    hub.when("POST", "/commit/", lambda: hub.commit("ada/model", {"b": b"2"}, message="Between"))
    assert refused(api.create_commit, "ada/model", [CommitOperationAdd("a", b"3")], commit_message="Late",
                   parent_commit=hub.commits("ada/model")[0]["id"])[1] == 412
    assert [c["title"] for c in hub.commits("ada/model")] == ["Between", "Lost", "initial commit"]


def test_a_full_store_and_a_missing_object(hub):
    import httpx2
    hub.quota = 1000
    api, web = client(hub), httpx2.Client()
    api.create_repo("ada/model")
    api.upload_file(path_or_fileobj=bytes(900), path_in_repo="a.bin", repo_id="ada/model")
    assert refused(api.upload_file, path_or_fileobj=bytes(1100), path_in_repo="b.bin", repo_id="ada/model")[1] == 413
    signed = {"Authorization": "Bearer hf_ada"}
    lines = ['{"key": "header", "value": {"summary": "x"}}',
             '{"key": "lfsFile", "value": {"path": "%s", "oid": "' + "0" * 64 + '", "size": 1}}']
    for path in ("c.bin", "../c.bin", ".git/config"):
        answer = web.post(f"{hub.url}/api/models/ada/model/commit/main", content="\n".join(lines) % path, headers=signed)
        assert answer.status_code == 400 and re.search("does not exist|Invalid path", answer.json()["error"])
    answer = web.put(hub.storage("0" * 64), content=b"not that")
    assert answer.status_code == 400 and not list((hub.folder / "objects").glob("0*"))
    assert web.get(f"{hub.url}/storage/guessed/{'0' * 64}").status_code == 403
    assert web.get(f"{hub.url}/api/whoami-v2", headers={"Authorization": "Bearer hf_no"}).headers["X-Error-Message"] == WRONG_TOKEN
    assert web.post(f"{hub.url}/api/models/ada/model/commit/main", content="{", headers=signed).status_code == 400
    assert web.get(f"{hub.url}/api/nothing").status_code == 404 and len(hub.commits("ada/model")) == 2


def test_a_server_that_has_ended_answers_no_more(tmp_path, monkeypatch):
    import httpx2
    with HubServer(tmp_path) as hub:
        hub.add_user("ada", "hf_ada")
        point_client(monkeypatch, hub.url, tmp_path / "home")
        client(hub).create_repo("ada/model")
    with pytest.raises(httpx2.TransportError):
        client(hub).model_info("ada/model")
