"""A Hub on the loopback: what huggingface_hub and hf_xet ask of huggingface.co, answered from bare git repositories.

    with HubServer(folder) as hub:
        hub.add_user("ada", token="hf_of_ada")
        HfApi(endpoint=hub.url, token="hf_of_ada").create_repo("ada/model")

Small files are blobs of the git repository, large ones are LFS pointers there; what they point to lies in `folder/objects` (came by
LFS) or in `folder/xet`, in local stores of hf_xet, which the client writes itself because the answer to its token request names
`local:///…` as the storage's address. That address is not documented: `tests/test_hub_server.py` says so where it stops working.
A store can be open in one process only, and stays open until that ends. So each token names a store of its own: to write, a copy of the
last one; to read, a copy of one that holds the revision's files. Content is linked, not copied.
Needs the standard library and git; hf_xet only where a file that came by xet is asked for without xet, and where a revision's files came
from several writers at once.
"""

import base64
import binascii
import contextlib
import fnmatch
import hashlib
import json
import os
import re
import secrets
import shutil
import socket
import subprocess
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from urllib.parse import parse_qs, quote, unquote, urlsplit

LARGE = ("*.safetensors", "*.bin", "*.onnx", "*.pt", "*.npy", "*.npz", "*.gz", "*.zip", "*.h5", "*.model", "*.parquet", "*.arrow")
LARGE_BYTES = 10 * 2**20  # the Hub keeps larger files out of git whatever their name
ATTRIBUTES = "".join(f"{pattern} filter=lfs diff=lfs merge=lfs -text\n" for pattern in LARGE).encode()
LICENSES = "apache-2.0 mit bsd-3-clause cc0-1.0 cc-by-4.0 cc-by-sa-4.0 cc-by-nc-4.0 gpl-3.0 lgpl-3.0 mpl-2.0 openrail unknown other".split()
WRONG_TOKEN = "Invalid credentials in Authorization header"  # the client knows this sentence
ASIDE = ("/api/agent-harnesses", "/api/telemetry")  # what the client asks for its own ends: neither recorded nor at fault
NAME = re.compile(r"(?!.*(?:--|\.\.))[A-Za-z0-9_](?:[\w.-]{0,94}[A-Za-z0-9_])?")


class Refused(Exception):
    "What a request is answered with instead of what it asked for."

    def __init__(self, status: int, message: str, code: str | None = None, **extra):
        super().__init__(message)
        self.status, self.message, self.code, self.extra = status, message, code, extra


@dataclass
class Answer:
    body: bytes | Path = b""
    status: int = 200
    headers: dict = field(default_factory=dict)

    @classmethod
    def of(cls, value, status: int = 200, **headers) -> "Answer":
        return cls(json.dumps(value).encode(), status, {"Content-Type": "application/json", **headers})


@dataclass
class User:
    name: str
    role: str  # of the token: "read" or "write"
    orgs: tuple[str, ...] = ()

    def owns(self, namespace: str) -> bool:
        return namespace == self.name or namespace in self.orgs


@dataclass
class Rule:
    "A fault, or a function to call, at the requests that match."
    method: str | None
    path: re.Pattern
    times: int | None
    after: bool
    skip: int = 0
    status: int | None = None
    message: str = "injected fault"
    code: str | None = None
    call: Callable | None = None


# Git
class Repository:
    "A bare git repository, and what the Hub knows of it besides."

    def __init__(self, hub: "HubServer", kind: str, name: str, private: bool):
        self.hub, self.kind, self.name, self.private = hub, kind, name, private
        self.discussions: list[dict] = []
        self.listed: dict[tuple, list[dict]] = {}  # a commit's tree and history never change
        self.logged: dict[tuple, list[dict]] = {}
        self.path = hub.folder / "repositories" / kind / f"{name}.git"
        self.path.mkdir(parents=True)
        self.git("init", "--quiet", "--bare", "--template=", "--initial-branch=main", ".")
        self.commit("refs/heads/main", None, {".gitattributes": ATTRIBUTES}, "initial commit", "system")

    @property
    def url(self) -> str:
        return self.hub.url + ("/" if self.kind == "model" else f"/{self.kind}s/") + self.name

    def git(self, *arguments: str, given: bytes | None = None, check: bool = True, **environment: str) -> bytes:
        who = {f"GIT_{who}_{what}": value for who in ("AUTHOR", "COMMITTER") for what, value in (("NAME", "hub"), ("EMAIL", "hub@localhost"))}
        quiet = {"GIT_CONFIG_NOSYSTEM": "1", "TZ": "UTC", "GIT_CONFIG_GLOBAL": os.devnull, "LC_ALL": "C"}
        inherited = {name: value for name, value in os.environ.items() if not name.startswith("GIT_")}
        done = subprocess.run(["git", *arguments], cwd=self.path, input=given, capture_output=True, check=False,
                              env=inherited | quiet | who | environment)
        if done.returncode and check:
            raise RuntimeError(f"git {arguments[0]}: {done.stderr.decode(errors='replace')}")
        return b"" if done.returncode else done.stdout

    def ref(self, name: str) -> str | None:
        return self.git("rev-parse", "--verify", "--quiet", f"{name}^{{commit}}", check=False).decode().strip() or None

    def find(self, revision: str) -> tuple[str, str | None]:
        "The commit of a branch, tag, `refs/…` or (shortened) hash, and the ref that it is the head of."
        if not re.search(r"[\s~^:?*\\\[]|\.\.|^-|@\{", revision):
            named = [revision] if revision.startswith("refs/") else [f"refs/heads/{revision}", f"refs/tags/{revision}"]
            for name in named if not re.fullmatch("[0-9a-f]{40}", revision) else ():
                if oid := self.ref(name):
                    return oid, name
            if re.fullmatch("[0-9a-f]{7,40}", revision) and (oid := self.ref(revision)):
                return oid, None
        raise Refused(404, f"Invalid rev id: {revision}", "RevisionNotFound")

    def tree(self, commit: str, path: str = "", recursive: bool = True) -> list[dict]:
        "What the Hub's tree lists, with the size and hash of the file that a pointer stands for."
        xet = self.hub.xet_files()
        return [entry | ({"xetHash": xet[entry["lfs"]["oid"]][0]} if entry.get("lfs", {}).get("oid") in xet else {})
                for entry in self.listing(commit, path.rstrip("/"), recursive)]

    def listing(self, commit: str, path: str, recursive: bool) -> list[dict]:
        if (commit, path, recursive) in self.listed:
            return self.listed[commit, path, recursive]
        options = ["-r", "-t"] if recursive else []
        entries, small = [], []
        for line in self.git("ls-tree", "-z", "-l", *options, commit, "--", *([path + "/"] if path else [])).decode().split("\0")[:-1]:
            about, name = line.split("\t", 1)
            _, kind, oid, size = about.split()
            if path and not name.startswith(path + "/"):
                continue
            entries.append({"type": "file" if kind == "blob" else "directory", "oid": oid, "size": int(size) if kind == "blob" else 0,
                            "path": name})
            if kind == "blob" and int(size) < 200:
                small.append(entries[-1])
        for entry, content in zip(small, self.blobs([entry["oid"] for entry in small])):
            if pointer := re.fullmatch(rb"version https://git-lfs\.github\.com/spec/v1\noid sha256:([0-9a-f]{64})\nsize (\d+)\n", content):
                size = int(pointer[2])
                entry.update(size=size, lfs={"oid": pointer[1].decode(), "size": size, "pointerSize": len(content)})
        return self.listed.setdefault((commit, path, recursive), entries)

    def blobs(self, oids: list[str]) -> Iterator[bytes]:
        answer, at = self.git("cat-file", "--batch", given="".join(f"{oid}\n" for oid in oids).encode()) if oids else b"", 0
        for _ in oids:
            end = answer.index(b"\n", at)
            size = int(answer[at:end].split()[2])
            yield answer[end + 1:end + 1 + size]
            at = end + size + 2

    def entry(self, commit: str, path: str) -> dict | None:
        above, _, name = path.rpartition("/")
        return next((entry for entry in self.tree(commit, above, recursive=False) if entry["path"] == path), None) if name else None

    def commit(self, ref: str, parent: str | None, changes: dict[str, bytes | None], message: str, author: str) -> str:
        "Writes the files (None removes one) on top of `parent` and moves the ref, which must still be there."
        with tempfile.TemporaryDirectory(dir=self.hub.folder) as scratch:
            kept = [path for path, content in changes.items() if content is not None]
            for i, path in enumerate(kept):
                (Path(scratch) / f"{i}").write_bytes(changes[path])
            given = "".join(f"{Path(scratch) / f'{i}'}\n" for i in range(len(kept)))
            blobs = dict(zip(kept, self.git("hash-object", "-w", "--no-filters", "--stdin-paths", given=given.encode()).decode().split()))
            lines = [f"100644 {blobs[path]}\t{path}\0" if path in blobs else f"0 {'0' * 40}\t{path}\0" for path in changes]
            index = {"GIT_INDEX_FILE": str(Path(scratch) / "index")}
            if parent:
                self.git("read-tree", parent, **index)
            self.git("update-index", "-z", "--index-info", given="".join(lines).encode(), **index)
            tree = self.git("write-tree", **index).decode().strip()
        date = f"{1767225600 + next(self.hub.clock)} +0000"  # not the clock: the same commits have the same hashes
        new = self.git("commit-tree", tree, *(["-p", parent] if parent else []), given=message.encode(), GIT_AUTHOR_NAME=author,
                       GIT_AUTHOR_DATE=date, GIT_COMMITTER_DATE=date).decode().strip()
        self.git("update-ref", ref, new, parent or "0" * 40)
        return new

    def log(self, commit: str, path: str | None = None, most: int | None = None) -> list[dict]:
        if (commit, path, most) not in self.logged:
            form = ("-z", "--format=%H%x1f%s%x1f%b%x1f%an%x1f%cd", "--date=format-local:%Y-%m-%dT%H:%M:%S.000Z")
            listed = self.git("log", *form, *([f"-{most}"] if most else []), commit, *(["--", path] if path else []))
            rows = (row.split("\x1f") for row in listed.decode().split("\0") if row)
            self.logged[commit, path, most] = [{"id": oid, "title": title, "message": body.strip(), "authors": [{"user": author}], "date": date}
                                               for oid, title, body, author, date in rows]
        return self.logged[commit, path, most]


# Xet's local store
def shard_files(shard: bytes) -> Iterator[tuple[str, str, int]]:
    "sha256, xet hash and size of the files that a shard of xet's store describes (version 2 of the format)."
    if shard[:14] != b"HFRepoMetaData" or int.from_bytes(shard[32:40], "little") != 2:
        raise ValueError("expected a shard of xet's store, version 2: the format of the installed hf_xet's local store is another")

    def digits(at: int) -> str:  # a hash is written as four 64-bit numbers
        return "".join(shard[i:i + 8][::-1].hex() for i in range(at, at + 32, 8))

    at = 48
    while shard[at:at + 32] != b"\xff" * 32:
        if at >= len(shard):
            raise ValueError("expected a row that ends the files of a shard, got none")
        name, flags, segments = digits(at), int.from_bytes(shard[at + 32:at + 36], "little"), int.from_bytes(shard[at + 36:at + 40], "little")
        size = sum(int.from_bytes(shard[row + 36:row + 40], "little") for row in range(at + 48, at + 48 * (segments + 1), 48))
        at += 48 * (segments + 1) + (48 * segments if flags & 0x80000000 else 0)
        if flags & 0x40000000:
            yield digits(at), name, size
            at += 48


def xet_url(store: Path) -> str:
    return f"local://{store.as_posix()}"


class HubServer:
    "The server; see the head of the file."

    def __init__(self, folder: str | Path, port: int = 0):
        self.folder = Path(folder).resolve()
        (self.folder / "objects").mkdir(parents=True, exist_ok=True)
        self.stores: list[Path] = []
        self.sealed: dict[Path, dict[str, tuple[str, int]]] = {}  # stores that a commit refers to, with their files
        self.users: dict[str, User] = {}  # by token
        self.repositories: dict[tuple[str, str], Repository] = {}
        self.requests: list[tuple[str, str]] = []  # method, path with its query
        self.quota: int | None = None  # bytes that one push may hold
        self.page = 1000  # entries in one answer that lists a tree or commits
        self.rules: list[Rule] = []
        self.lock = threading.RLock()
        self.clock = iter(range(10**9))
        self.secret = secrets.token_hex(8)  # stands for the signature of a storage's address
        self.shards: dict[str, dict] = {}
        self.connections: set = set()
        handler = type("Handler", (Handler,), {"hub": self})
        self.server = ThreadingHTTPServer(("127.0.0.1", port), handler)
        self.server.daemon_threads, self.server.block_on_close = True, False
        self.url = f"http://127.0.0.1:{self.server.server_address[1]}"

    def __enter__(self) -> "HubServer":
        threading.Thread(target=self.server.serve_forever, kwargs={"poll_interval": 0.02}, daemon=True).start()
        return self

    def __exit__(self, *_) -> None:
        self.server.shutdown()
        self.server.server_close()
        for connection in list(self.connections):
            with contextlib.suppress(OSError):
                connection.shutdown(socket.SHUT_RDWR)
        shutil.rmtree(self.folder / "xet", ignore_errors=True)  # a megabyte for each token

    # what a test does
    def add_user(self, name: str, token: str, role: str = "write", orgs: tuple[str, ...] = ()) -> None:
        if role not in ("read", "write"):
            raise ValueError(f"expected role 'read' or 'write', got {role!r}")
        self.users[token] = User(name, role, tuple(orgs))

    def fail(self, method: str | None = None, path: str = "", status: int | None = 503, times: int | None = 1, after: bool = False,
             skip: int = 0, message: str = "injected fault", code: str | None = None) -> None:
        """A fault at the next `times` requests (None: all) whose method and path (with query) match, the first `skip` of them left alone.
        With `status` None the connection is cut; with `after` the request is carried out and its answer is lost."""
        self.rules.append(Rule(method, re.compile(path), times, after, skip, status, message, code))

    def when(self, method: str | None, path: str, call: Callable, times: int | None = 1, after: bool = False) -> None:
        "Calls a function before (or `after`) the requests that match are carried out: another writer, say."
        self.rules.append(Rule(method, re.compile(path), times, after, call=call))

    def heal(self) -> None:
        self.rules.clear()

    def create(self, name: str, private: bool = False, kind: str = "model") -> Repository:
        with self.lock:
            self.repositories[kind, name] = Repository(self, kind, name, private)
            return self.repositories[kind, name]

    def commit(self, name: str, changes: dict[str, bytes | None], revision: str = "main", message: str = "A change", author: str = "someone",
               kind: str = "model") -> str:
        "A commit of small files that somebody else makes."
        with self.lock:
            repository = self.repositories[kind, name]
            parent, ref = repository.find(revision)
            return repository.commit(ref, parent, changes, message, author)

    def files(self, name: str, revision: str = "main", kind: str = "model") -> dict[str, bytes]:
        "The files of a revision with their contents, those of the large ones too."
        repository = self.repositories[kind, name]
        entries = [entry for entry in repository.tree(repository.find(revision)[0]) if entry["type"] == "file"]
        small = dict(zip((e["path"] for e in entries if "lfs" not in e), repository.blobs([e["oid"] for e in entries if "lfs" not in e])))
        return {e["path"]: self.object(e["lfs"]["oid"]).read_bytes() if "lfs" in e else small[e["path"]] for e in entries}

    def commits(self, name: str, revision: str = "main", kind: str = "model") -> list[dict]:
        "The commits of a revision, newest first: id, title, message, authors."
        repository = self.repositories[kind, name]
        return repository.log(repository.find(revision)[0])

    def refs(self, name: str, kind: str = "model") -> dict[str, str]:
        "Branches, tags and pull requests, with their commits."
        rows = self.repositories[kind, name].git("for-each-ref", "--format=%(refname) %(objectname) %(*objectname)").decode().splitlines()
        return {row.split()[0]: row.split()[-1] for row in rows}

    # the stores
    def new_store(self, base: Path | None = None) -> Path:
        "A local store of hf_xet, empty or with what `base` holds."
        with self.lock:
            store = self.folder / "xet" / f"{len(self.stores)}"
            store.mkdir(parents=True)
            for file in base.rglob("*") if base else ():
                if file.is_file() and "shard-session" not in file.parts:
                    (store / file.relative_to(base)).parent.mkdir(parents=True, exist_ok=True)
                    (shutil.copyfile if file.suffix == ".redb" else os.link)(file, store / file.relative_to(base))
            self.stores.append(store)
        return store

    def xet_files(self) -> dict[str, tuple[str, int]]:
        "sha256 -> xet hash and size of what the stores hold."
        with self.lock:
            return {oid: found for store in self.stores for oid, found in self.held(store).items()}

    def held(self, store: Path) -> dict[str, tuple[str, int]]:
        if store in self.sealed:
            return self.sealed[store]
        for path in store.rglob("*.mdb"):
            if path.name not in self.shards and "shard-session" not in path.parts:
                self.shards[path.name] = {oid: (name, size) for oid, name, size in shard_files(path.read_bytes())}
        return {oid: found for path in store.rglob("*.mdb") for oid, found in self.shards.get(path.name, {}).items()}

    def seal(self, oid: str) -> None:
        "A commit refers to this file: the stores that hold it are written no more."
        for store in self.stores:
            if store not in self.sealed and oid in (files := self.held(store)):
                self.sealed[store] = files

    def store_to_write(self) -> Path:
        with self.lock:
            return self.new_store(next(reversed(self.sealed), None))

    def store_to_read(self, oids: set[str]) -> Path:
        "A store that holds all these files; those of several writers are put together."
        with self.lock:
            if not oids:
                return self.new_store()
            best = max(self.sealed, key=lambda store: len(oids & self.sealed[store].keys()))
            missing = sorted(oids - self.sealed[best].keys())
            if missing:
                from hf_xet import XetSession
                paths, best = [self.object(oid) for oid in missing], self.new_store(best)
                with XetSession().new_upload_commit(endpoint=xet_url(best), token="none", token_expiry_unix_secs=2**40) as commit:
                    for oid, path in zip(missing, paths):
                        commit.start_upload_file(str(path), sha256=oid)
                self.sealed[best] = self.held(best)
            return self.new_store(best)

    def object(self, oid: str) -> Path:
        "The file with a sha256; one that came by xet is put together first."
        path = self.folder / "objects" / oid
        with self.lock:
            if not path.exists():
                if oid not in self.xet_files():
                    raise Refused(404, f"no object {oid}", "EntryNotFound")
                from hf_xet import XetFileInfo, XetSession
                self.seal(oid)
                store, part = self.store_to_read({oid}), path.with_suffix(".part")
                with XetSession().new_file_download_group(endpoint=xet_url(store), token="none", token_expiry_unix_secs=2**40) as group:
                    group.start_download_file(XetFileInfo(*self.xet_files()[oid]), str(part))
                part.rename(path)
        return path

    def holds(self, oid: str) -> bool:
        return (self.folder / "objects" / oid).exists() or oid in self.xet_files()

    def storage(self, oid: str) -> str:
        return f"{self.url}/storage/{self.secret}/{oid}"


# What the client may ask
ROUTES: list[tuple[str, re.Pattern, Callable]] = []


def route(method: str, path: str):
    "Registers a function; `{…}` in the path is one quoted part, `{…*}` the rest, REPO a repository under /api."
    path = path.replace("REPO", r"/api/(?P<kind>model|dataset|space)s/(?P<name>[^/]+/[^/]+)")
    path = re.sub(r"\{(\w+)\}", r"(?P<\1>[^/]+)", re.sub(r"\{(\w+)\*\}", r"(?P<\1>.+)", path))

    def register(function):
        ROUTES.append((method, re.compile(path), function))
        return function
    return register


class Handler(BaseHTTPRequestHandler):
    hub: HubServer
    protocol_version = "HTTP/1.1"
    timeout = 60
    disable_nagle_algorithm = True  # else a body waits 40 ms for the client to confirm the head

    def setup(self):
        super().setup()
        self.hub.connections.add(self.connection)

    def finish(self):
        self.hub.connections.discard(self.connection)
        with contextlib.suppress(OSError):
            super().finish()

    def log_message(self, *_):
        pass

    def handle(self):
        with contextlib.suppress(ConnectionError, TimeoutError):
            super().handle()

    def do(self):
        self.given = self.read_body()
        with self.given:
            rule = self.note()
            if rule and rule.call and not rule.after:
                rule.call()
            if not rule or rule.call or rule.after:
                answer = self.answer()
            if rule and rule.call and rule.after:
                rule.call()
            if rule and not rule.call:
                if rule.status is None:
                    self.close_connection = True
                    self.connection.shutdown(socket.SHUT_RDWR)
                    return
                answer = self.refuse(Refused(rule.status, rule.message, rule.code, errors=[{"message": rule.message}]))
            self.send(answer)

    do_GET = do_HEAD = do_POST = do_PUT = do_DELETE = do

    def note(self) -> Rule | None:
        "Records the request; the fault or call that it meets."
        if self.path.startswith(ASIDE):
            return None
        with self.hub.lock:
            self.hub.requests.append((self.command, self.path))
            for rule in self.hub.rules:
                if rule.times != 0 and rule.method in (None, self.command) and rule.path.search(self.path):
                    if rule.skip:
                        rule.skip -= 1
                        continue
                    rule.times = rule.times if rule.times is None else rule.times - 1
                    return rule
        return None

    def read_body(self):
        body = tempfile.SpooledTemporaryFile(max_size=2**20)
        if self.headers.get("Transfer-Encoding", "").lower() == "chunked":
            while size := int(self.rfile.readline().split(b";")[0], 16):
                body.write(self.rfile.read(size))
                self.rfile.readline()
            while self.rfile.readline().strip():
                pass
        left = int(self.headers.get("Content-Length") or 0)
        while left and (block := self.rfile.read(min(left, 2**20))):
            body.write(block)
            left -= len(block)
        body.seek(0)
        return body

    def answer(self) -> Answer:
        path, self.query = urlsplit(self.path).path, parse_qs(urlsplit(self.path).query)
        try:
            for method, pattern, function in ROUTES:
                if method == self.command.replace("HEAD", "GET") and (found := pattern.fullmatch(path)):
                    parts = {name: unquote(part) for name, part in found.groupdict().items() if part is not None}
                    self.user = self.who()
                    return function(self, **parts)
            raise Refused(404, f"no such address: {self.command} {path}")
        except Refused as refused:
            return self.refuse(refused)
        except (KeyError, TypeError, ValueError, binascii.Error) as error:  # what the client sent is not what the route reads
            return self.refuse(Refused(400, f"malformed request: {type(error).__name__}: {error}"))

    def refuse(self, refused: Refused) -> Answer:
        headers = {"X-Error-Message": re.sub(r"\s+", " ", refused.message)} | ({"X-Error-Code": refused.code} if refused.code else {})
        return Answer.of({"error": refused.message, **refused.extra}, refused.status, **headers)

    def send(self, answer: Answer) -> None:
        body, status, first = answer.body, answer.status, 0
        size = body.stat().st_size if isinstance(body, Path) else len(body)
        asked = re.fullmatch(r"bytes=(\d+)-(\d*)", self.headers.get("Range") or "")
        if asked and status == 200:
            first, last = int(asked[1]), min(int(asked[2] or size - 1), size - 1)
            status = 206 if first <= last else 416
            answer.headers["Content-Range"] = f"bytes {first}-{last}/{size}" if status == 206 else f"bytes */{size}"
            size = last - first + 1 if status == 206 else 0
        self.send_response(status)
        for name, value in {**answer.headers, "Content-Length": str(size), "X-Request-Id": f"request-{len(self.hub.requests)}"}.items():
            self.send_header(name, value)
        self.end_headers()
        if self.command == "HEAD":
            return
        if isinstance(body, Path):
            with body.open("rb") as file:
                file.seek(first)
                while size and (block := file.read(min(size, 2**20))):
                    self.wfile.write(block)
                    size -= len(block)
        else:
            self.wfile.write(body[first:first + size])

    # who asks, and what for
    def who(self) -> User | None:
        token = (self.headers.get("Authorization") or "").removeprefix("Bearer ").strip()
        if not token:
            return None
        if token not in self.hub.users:
            raise Refused(401, WRONG_TOKEN)
        return self.hub.users[token]

    def signed_in(self) -> User:
        if self.user is None:
            raise Refused(401, "Invalid username or password.")
        return self.user

    def repository(self, kind: str, name: str) -> Repository:
        "The repository, if it is there for this user: a private one is hidden from others."
        found = self.hub.repositories.get((kind, name))
        if found is None or found.private and not (self.user and self.user.owns(name.split("/")[0])):
            raise Refused(404 if self.user else 401, "Repository not found", "RepoNotFound")
        return found

    def writable(self, kind: str, name: str, pull_request: bool = False) -> Repository:
        "The repository, if this user may write to it, or propose a change."
        repository, user = self.repository(kind, name), self.signed_in()
        if user.role != "write" or not (pull_request or user.owns(name.split("/")[0])):
            raise Refused(403, "Authorization error: this token may not write here"
                               + ("" if user.role != "write" else ", pass `create_pr=1` as a query parameter to create a Pull Request"))
        return repository

    def pull_request(self, revision: str | None = None) -> bool:
        "Whether a change is proposed rather than made: in a new pull request, or in an open one."
        return self.query.get("create_pr", ["0"])[0] == "1" or bool(re.fullmatch(r"refs/pr/\d+", revision or ""))

    def json(self) -> dict:
        return json.loads(self.given.read() or b"{}")

    def pages(self, entries: list) -> Answer:
        start = int(self.query.get("cursor", ["0"])[0])
        headers = {}
        if start + self.hub.page < len(entries):
            others = "".join(f"&{name}={quote(value)}" for name, (value, *_) in self.query.items() if name != "cursor")
            headers["Link"] = f'<{self.hub.url}{urlsplit(self.path).path}?cursor={start + self.hub.page}{others}>; rel="next"'
        return Answer.of(entries[start:start + self.hub.page], **headers)


@route("GET", "/api/whoami-v2")
def whoami(request: Handler) -> Answer:
    user = request.signed_in()
    return Answer.of({"type": "user", "id": user.name, "name": user.name, "fullname": user.name, "isPro": False,
                      "orgs": [{"type": "org", "name": name, "roleInOrg": "write"} for name in user.orgs],
                      "auth": {"type": "access_token", "accessToken": {"displayName": "test", "role": user.role}}})


@route("POST", "/api/repos/create")
def create_repository(request: Handler) -> Answer:
    user, asked = request.signed_in(), request.json()
    kind, namespace = asked.get("type") or "model", asked.get("organization") or user.name
    name = f"{namespace}/{asked['name']}"
    if not NAME.fullmatch(asked["name"]) or asked["name"].endswith(".git"):
        raise Refused(400, f"Invalid repo name: {name}")
    if user.role != "write" or not user.owns(namespace):
        raise Refused(403, f'You don\'t have the rights to create a {kind} under the namespace "{namespace}"')
    with request.hub.lock:
        if there := request.hub.repositories.get((kind, name)):
            raise Refused(409, f"You already created this {kind} repo: {name}", url=there.url)
        made = request.hub.create(name, asked.get("visibility") == "private" or bool(asked.get("private")), kind)
    return Answer.of({"url": made.url, "name": name, "id": name})


@route("DELETE", "/api/repos/delete")
def delete_repository(request: Handler) -> Answer:
    user, asked = request.signed_in(), request.json()
    kind, name = asked.get("type") or "model", f"{asked.get('organization') or user.name}/{asked['name']}"
    with request.hub.lock:
        shutil.rmtree(request.writable(kind, name).path)
        del request.hub.repositories[kind, name]
    return Answer.of({})


@route("PUT", "REPO/settings")
def change_settings(request: Handler, kind: str, name: str) -> Answer:
    repository, asked = request.writable(kind, name), request.json()
    if "private" in asked or "visibility" in asked:
        repository.private = bool(asked.get("private")) or asked.get("visibility") == "private"
    return Answer.of({"private": repository.private})


@route("GET", "REPO/auth-check(?P<write>/write)?")
def check_access(request: Handler, kind: str, name: str, write: str | None = None) -> Answer:
    (request.writable if write else request.repository)(kind, name)
    return Answer.of({})


def card_problems(text: str) -> tuple[list[str], list[str]]:
    "Errors and warnings about a card's metadata: a little of what the Hub checks."
    head = re.match(r"---[ \t]*\r?\n(.*?)^---[ \t]*$", text, re.DOTALL | re.MULTILINE)
    if not head:
        return ((["metadata opens with --- and is not closed"], []) if text.startswith("---") else
                ([], ["empty or missing yaml metadata in repo card"]))
    errors = ["tabs are no yaml"] if "\t" in head[1] else []
    errors += [f"line {i}: no yaml: {line!r}" for i, line in enumerate(head[1].splitlines(), 2)
               if line.strip() and not re.match(r"[\w\"'-]+:(\s|$)|\s|- |-$|#", line)]
    license = re.search(r"^license:[ ]*['\"]?([^'\"\s]*)", head[1], re.MULTILINE)
    errors += [f'"license" must be one of {LICENSES}, got {license[1]!r}'] if license and license[1] not in LICENSES else []
    if re.search(r"^model-index:", head[1], re.MULTILINE) and not re.search(r"^[- ]+name:", head[1], re.MULTILINE):
        errors.append('"model-index[0].name" is required')
    return errors, []


@route("POST", "/api/validate-yaml")
def validate_yaml(request: Handler) -> Answer:
    errors, warnings = card_problems(request.json()["content"])
    return Answer.of({"errors": [{"message": m} for m in errors], "warnings": [{"message": m} for m in warnings]}, 400 if errors else 200)


@route("POST", "REPO/preupload/{revision}")
def preupload(request: Handler, kind: str, name: str, revision: str) -> Answer:
    "By which way each file is to come, and what is there under its name."
    repository, asked = request.writable(kind, name, request.pull_request(revision)), request.json()
    if request.hub.quota is not None and sum(file["size"] for file in asked["files"]) > request.hub.quota:
        raise Refused(413, "Storage limit reached, please upgrade your plan or remove files")
    there = {entry["path"]: entry for entry in repository.tree(repository.find(revision)[0])}
    ignored = [line.strip() for line in asked.get("gitIgnore", "").splitlines() if line.strip() and not line.startswith("#")]
    files = []
    for file in asked["files"]:
        path, sample = file["path"], base64.b64decode(file["sample"])
        large = any(fnmatch.fnmatch(path, pattern) for pattern in LARGE) or file["size"] > LARGE_BYTES or b"\0" in sample
        entry = there.get(path, {})
        files.append({"path": path, "uploadMode": "lfs" if large else "regular",
                      "shouldIgnore": any(fnmatch.fnmatch(part, rule.rstrip("/")) for rule in ignored for part in (path, *path.split("/"))),
                      "oid": entry.get("lfs", entry).get("oid")})
    return Answer.of({"files": files, "commitOid": repository.find(revision)[0]})


@route("GET", "REPO/xet-(?P<access>read|write)-token/{revision}")
def xet_token(request: Handler, kind: str, name: str, access: str, revision: str) -> Answer:
    if access == "write":
        request.writable(kind, name, request.pull_request(revision) or revision == "None")
        store = request.hub.store_to_write()
    else:
        repository = request.repository(kind, name)
        files = repository.tree(repository.find(revision)[0])
        store = request.hub.store_to_read({entry["lfs"]["oid"] for entry in files if "xetHash" in entry})
    url, token, end = xet_url(store), f"xet-{access}", int(time.time()) + 3600
    return Answer.of({"casUrl": url, "accessToken": token, "exp": end},
                     **{"X-Xet-Cas-Url": url, "X-Xet-Access-Token": token, "X-Xet-Token-Expiration": str(end)})


@route("POST", "/(?P<kind>models/|datasets/|spaces/|)(?P<name>[^/]+/[^/]+).git/info/lfs/objects/batch")
def lfs_batch(request: Handler, kind: str, name: str) -> Answer:
    asked, kind = request.json(), kind.rstrip("s/") or "model"
    upload = asked["operation"] == "upload"
    request.writable(kind, name, pull_request=True) if upload else request.repository(kind, name)
    objects = []
    for item in asked["objects"]:
        there, link = request.hub.holds(item["oid"]), {"href": request.hub.storage(item["oid"])}
        found = {"oid": item["oid"], "size": item["size"]}
        if upload and not there:
            found["actions"] = {"upload": link, "verify": {"href": f"{request.hub.url}/{name}.git/info/lfs/verify"}}
        elif not upload:
            found |= {"actions": {"download": link}} if there else {"error": {"code": 404, "message": "Object does not exist"}}
        objects.append(found)
    return Answer.of({"transfer": "basic", "objects": objects})


@route("POST", "/.+[.]git/info/lfs/verify")
def lfs_verify(request: Handler) -> Answer:
    asked = request.json()
    path = request.hub.folder / "objects" / asked["oid"]
    if not path.exists() or path.stat().st_size != asked["size"]:
        raise Refused(422, f"no object {asked['oid']} of {asked['size']} bytes")
    return Answer.of({})


@route("PUT", "/storage/{secret}/{oid}")
def store(request: Handler, secret: str, oid: str) -> Answer:
    if secret != request.hub.secret:
        raise Refused(403, "wrong signature")
    hashed, part = hashlib.sha256(), request.hub.folder / "objects" / f"{oid}.{threading.get_ident()}.part"
    with part.open("wb") as file:
        while block := request.given.read(2**20):
            hashed.update(block)
            file.write(block)
    if hashed.hexdigest() != oid:
        part.unlink()
        raise Refused(400, f"expected content with sha256 {oid}, got {hashed.hexdigest()}")
    part.replace(part.with_name(oid))
    return Answer(headers={"ETag": f'"{oid}"'})


@route("GET", "/storage/{secret}/{oid}")
def fetch(request: Handler, secret: str, oid: str) -> Answer:
    if secret != request.hub.secret:
        raise Refused(403, "wrong signature")
    return Answer(request.hub.object(oid), headers={"ETag": f'"{oid}"'})


def safe(path: str) -> str:
    parts = path.split("/")
    if not path or any(part in ("", ".", "..", ".git") for part in parts) or re.search(r"[\0-\x1f\\]", path):
        raise Refused(400, f"Invalid path: {path!r}")
    return path


@route("POST", "REPO/commit/{revision}")
def make_commit(request: Handler, kind: str, name: str, revision: str) -> Answer:
    new_request, user = request.query.get("create_pr", ["0"])[0] == "1", request.signed_in()
    repository = request.writable(kind, name, request.pull_request(revision))
    lines = [json.loads(line) for line in request.given.read().splitlines() if line.strip()]
    header = next(line["value"] for line in lines if line["key"] == "header")
    with request.hub.lock:
        head, ref = repository.find(revision)
        if not new_request and not (ref or "").startswith(("refs/heads/", "refs/pr/")):
            raise Refused(400, f"expected a branch to commit to, got {revision}")
        if ref and ref.startswith("refs/pr/"):
            check_open(request, repository, int(ref.rsplit("/", 1)[1]))
        parent = header.get("parentCommit")
        if parent and new_request:
            head = repository.find(parent)[0]
        elif parent and not head.startswith(parent):
            raise Refused(412, "A commit has happened since. Please refresh and try again.")
        changes: dict[str, bytes | None] = {}
        there = {entry["path"]: entry for entry in repository.tree(head)}
        for line in lines:
            what, value = line["key"], line["value"]
            if what == "file":
                changes[safe(value["path"])] = base64.b64decode(value["content"], validate=True)
            elif what == "lfsFile":
                if not request.hub.holds(value["oid"]):
                    raise Refused(400, "Your push was rejected because an LFS pointer pointed to a file that does not exist: "
                                       f"{value['path']} {value['oid']}")
                request.hub.seal(value["oid"])
                size = value.get("size")
                if size is None:
                    size = request.hub.object(value["oid"]).stat().st_size
                changes[safe(value["path"])] = f"version https://git-lfs.github.com/spec/v1\noid sha256:{value['oid']}\nsize {size}\n".encode()
            elif what in ("deletedFile", "deletedFolder"):
                gone = [p for p in there if p == value["path"] or what == "deletedFolder" and p.startswith(value["path"].rstrip("/") + "/")]
                if not gone:
                    raise Refused(404, f"A file with this name doesn't exist: {value['path']}", "EntryNotFound")
                changes |= {path: None for path in gone if there[path]["type"] == "file"}
            elif what != "header":
                raise Refused(400, f"unknown operation {what!r}")
        if changes.get("README.md") and (errors := card_problems(changes["README.md"].decode())[0]):
            raise Refused(400, "Invalid metadata in README.md: " + "; ".join(errors))
        message = header["summary"] + (f"\n\n{header['description']}" if header.get("description") else "")
        answer = {"success": True, "hookOutput": ""}
        if new_request:
            opened = open_discussion(request, repository, header["summary"], header.get("description", ""), True, head)
            ref, answer["pullRequestUrl"] = f"refs/pr/{opened['num']}", f"{repository.url}/discussions/{opened['num']}"
        commit = repository.commit(ref, head, changes, message, user.name)
    return Answer.of({**answer, "commitOid": commit, "commitUrl": f"{repository.url}/commit/{commit}"})


# Discussions
def open_discussion(request: Handler, repository: Repository, title: str, description: str, pull_request: bool, head: str) -> dict:
    if not 3 <= len(title.strip()) <= 200:
        raise Refused(400, f"expected a title of 3 to 200 letters, got {len(title.strip())}")
    number, author = len(repository.discussions) + 1, {"name": request.signed_in().name}
    made = {"num": number, "title": title.strip(), "status": "draft" if pull_request else "open", "isPullRequest": pull_request, "author": author,
            "createdAt": "2026-01-01T00:00:00.000Z", "repo": {"name": repository.name, "type": repository.kind},
            "events": [{"id": f"{number}", "type": "comment", "createdAt": "2026-01-01T00:00:00.000Z", "author": author,
                        "data": {"latest": {"raw": description, "html": description, "updatedAt": "2026-01-01T00:00:00.000Z"},
                                 "edited": False, "hidden": False, "history": []}}],
            "changes": {"base": "refs/heads/main"}, "filesWithConflicts": [], "diff": ""}
    if pull_request:
        repository.git("update-ref", f"refs/pr/{number}", head)
    repository.discussions.append(made)
    return made


def discussion(repository: Repository, number: str | int) -> dict:
    if not 0 < int(number) <= len(repository.discussions):
        raise Refused(404, f"no discussion {number}")
    return repository.discussions[int(number) - 1]


def check_open(request: Handler, repository: Repository, number: int) -> None:
    asked, user = discussion(repository, number), request.signed_in()
    if asked["status"] not in ("draft", "open"):
        raise Refused(400, f"pull request {number} is {asked['status']}")
    if asked["author"]["name"] != user.name and not user.owns(repository.name.split("/")[0]):
        raise Refused(403, f"pull request {number} is another's")


@route("GET", "REPO/discussions")
def list_discussions(request: Handler, kind: str, name: str) -> Answer:
    listed = request.repository(kind, name).discussions[::-1]
    if (author := request.query.get("author", [None])[0]) is not None:
        listed = [d for d in listed if d["author"]["name"] == author]
    wanted = {"pull_request": True, "discussion": False}.get(request.query.get("type", ["all"])[0])
    listed = [d for d in listed if wanted is None or d["isPullRequest"] == wanted]
    if (status := request.query.get("status", ["all"])[0]) in ("open", "closed"):
        listed = [d for d in listed if (d["status"] in ("open", "draft")) == (status == "open")]
    return Answer.of({"discussions": listed, "count": len(listed), "start": 0})


@route("POST", "REPO/discussions")
def create_discussion(request: Handler, kind: str, name: str) -> Answer:
    asked, repository = request.json(), request.writable(kind, name, pull_request=True)
    with request.hub.lock:
        made = open_discussion(request, repository, asked["title"], asked["description"], bool(asked.get("pullRequest")),
                               repository.find("main")[0])
    return Answer.of({"num": made["num"], "url": f"{repository.url}/discussions/{made['num']}", "pullRequest": made["isPullRequest"]})


@route("GET", r"REPO/discussions/(?P<number>\d+)")
def show_discussion(request: Handler, kind: str, name: str, number: str) -> Answer:
    return Answer.of(discussion(request.repository(kind, name), number))


@route("POST", r"REPO/discussions/(?P<number>\d+)/status")
def change_status(request: Handler, kind: str, name: str, number: str) -> Answer:
    repository, status = request.writable(kind, name), request.json()["status"]
    discussion(repository, number)["status"] = status
    return Answer.of({"newStatus": {"id": "status", "type": "status-change", "createdAt": "2026-01-01T00:00:00.000Z",
                                    "author": {"name": request.user.name}, "data": {"status": status}}})


@route("POST", r"REPO/discussions/(?P<number>\d+)/merge")
def merge(request: Handler, kind: str, name: str, number: str) -> Answer:
    repository = request.writable(kind, name)
    with request.hub.lock:
        asked, main = discussion(repository, number), repository.ref("refs/heads/main")
        head = repository.ref(f"refs/pr/{number}")
        if repository.git("merge-base", main, head).decode().strip() != main:
            raise Refused(409, "there are conflicts: the branch has moved")
        repository.git("update-ref", "refs/heads/main", head, main)
        asked["status"] = "merged"
    return Answer.of({})


# Branches and tags
@route("GET", "REPO/refs")
def list_refs(request: Handler, kind: str, name: str) -> Answer:
    request.repository(kind, name)
    found = {part: [{"name": ref.removeprefix(start), "ref": ref, "targetCommit": oid} for ref, oid in request.hub.refs(name, kind).items()
                    if ref.startswith(start)]
             for part, start in (("branches", "refs/heads/"), ("tags", "refs/tags/"), ("pullRequests", "refs/pr/"))}
    for asked in found["pullRequests"]:
        asked["name"] = asked["ref"]
    return Answer.of({"converts": [], **found})


def new_ref(repository: Repository, ref: str, short: str) -> None:
    if short.startswith("refs/") or re.fullmatch("[0-9a-f]{40}", short) or not repository.git("check-ref-format", "--normalize", ref, check=False):
        raise Refused(400, f"Invalid reference for a branch or tag: {short}")
    if repository.ref(ref):
        raise Refused(409, f"Reference already exists: {short}")


@route("POST", "REPO/branch/{branch}")
def create_branch(request: Handler, kind: str, name: str, branch: str) -> Answer:
    repository, start = request.writable(kind, name), request.json().get("startingPoint") or "main"
    with request.hub.lock:
        new_ref(repository, f"refs/heads/{branch}", branch)
        repository.git("update-ref", f"refs/heads/{branch}", repository.find(start)[0])
    return Answer.of({})


@route("DELETE", "REPO/branch/{branch}")
def delete_branch(request: Handler, kind: str, name: str, branch: str) -> Answer:
    repository = request.writable(kind, name)
    if branch == "main":
        raise Refused(403, "the branch main is protected")
    if not repository.ref(f"refs/heads/{branch}"):
        raise Refused(404, f"no branch {branch}", "RevisionNotFound")
    repository.git("update-ref", "-d", f"refs/heads/{branch}")
    return Answer.of({})


@route("POST", "REPO/tag/{revision}")
def create_tag(request: Handler, kind: str, name: str, revision: str) -> Answer:
    repository, asked = request.writable(kind, name), request.json()
    with request.hub.lock:
        commit = repository.find(revision)[0]
        new_ref(repository, f"refs/tags/{asked['tag']}", asked["tag"])
        message = ["-a", "-m", asked["message"]] if asked.get("message") else []
        repository.git("tag", *message, asked["tag"], commit)
    return Answer.of({})


@route("DELETE", "REPO/tag/{tag}")
def delete_tag(request: Handler, kind: str, name: str, tag: str) -> Answer:
    repository = request.writable(kind, name)
    if not repository.ref(f"refs/tags/{tag}"):
        raise Refused(404, f"no tag {tag}", "RevisionNotFound")
    repository.git("update-ref", "-d", f"refs/tags/{tag}")
    return Answer.of({})


# Reading
@route("GET", "REPO(/revision/{revision})?")
def info(request: Handler, kind: str, name: str, revision: str = "main") -> Answer:
    repository = request.repository(kind, name)
    commit = repository.find(revision)[0]
    files = [entry for entry in repository.tree(commit) if entry["type"] == "file"]
    siblings = [{"rfilename": f["path"]} for f in files]
    if request.query.get("blobs", ["false"])[0].lower() == "true":
        siblings = [{"rfilename": f["path"], "size": f["size"], "blobId": f["oid"]}
                    | ({"lfs": f["lfs"] | {"sha256": f["lfs"]["oid"]}} if "lfs" in f else {}) for f in files]
    last = repository.log(commit, most=1)[0]["date"]
    return Answer.of({"_id": name, "id": name, "modelId": name, "author": name.split("/")[0], "sha": commit, "lastModified": last,
                      "createdAt": "2026-01-01T00:00:00.000Z", "private": repository.private, "disabled": False, "gated": False, "downloads": 0,
                      "likes": 0, "tags": [], "siblings": siblings})


def with_last_commit(repository: Repository, commit: str, entry: dict) -> dict:
    last = repository.log(commit, entry["path"], most=1)[0]
    return {**entry, "lastCommit": {name: last[name] for name in ("id", "title", "date")}}


@route("GET", "REPO/tree/{revision}(/{path})?")
def show_tree(request: Handler, kind: str, name: str, revision: str, path: str = "") -> Answer:
    repository = request.repository(kind, name)
    commit = repository.find(revision)[0]
    recursive, expand = (request.query.get(option, ["false"])[0].lower() in ("true", "1") for option in ("recursive", "expand"))
    if path and (repository.entry(commit, path) or {}).get("type") != "directory":
        raise Refused(404, f"{path} does not exist on {revision}", "EntryNotFound")
    entries = repository.tree(commit, path, recursive)
    return request.pages([with_last_commit(repository, commit, entry) for entry in entries] if expand else entries)


@route("POST", "REPO/paths-info/{revision}")
def paths_info(request: Handler, kind: str, name: str, revision: str) -> Answer:
    repository, body = request.repository(kind, name), request.given.read().decode()
    commit = repository.find(revision)[0]
    asked = json.loads(body) if body.startswith("{") else parse_qs(body)
    expand = str(asked.get("expand", "")).strip("[']").lower() == "true"
    found = [entry for entry in repository.tree(commit) if entry["path"] in asked["paths"]]
    return Answer.of([with_last_commit(repository, commit, entry) for entry in found] if expand else found)


@route("GET", "REPO/commits/{revision}")
def list_commits(request: Handler, kind: str, name: str, revision: str) -> Answer:
    repository = request.repository(kind, name)
    return request.pages(repository.log(repository.find(revision)[0]))


def content(request: Handler, kind: str, name: str, revision: str, path: str) -> Answer:
    repository = request.repository(kind, name)
    commit = repository.find(revision)[0]
    entry = repository.entry(commit, path)
    if entry is None or entry["type"] != "file":
        refused = request.refuse(Refused(404, "Entry not found", "EntryNotFound"))
        refused.headers["X-Repo-Commit"] = commit
        return refused
    headers = {"X-Repo-Commit": commit, "Accept-Ranges": "bytes", "Content-Type": "application/octet-stream",
               "Content-Disposition": f"inline; filename*=UTF-8''{quote(path.rsplit('/', 1)[-1])}"}
    if "lfs" not in entry:
        return Answer(next(repository.blobs([entry["oid"]])), headers=headers | {"ETag": f'"{entry["oid"]}"'})
    oid, size = entry["lfs"]["oid"], entry["lfs"]["size"]
    headers |= {"ETag": f'"{oid}"', "X-Linked-Etag": f'"{oid}"', "X-Linked-Size": str(size)}
    if "xetHash" in entry:
        refresh = f"{request.hub.url}/api/{kind}s/{name}/xet-read-token/{commit}"
        headers |= {"X-Xet-Hash": entry["xetHash"], "X-Xet-Refresh-Route": refresh, "Link": f'<{refresh}>; rel="xet-auth"'}
    return Answer(request.hub.object(oid) if request.command == "GET" else b"", headers=headers)


@route("GET", "/api/resolve-cache/(?P<kind>model|dataset|space)s/{namespace}/{short}/{revision}/{path*}")
def resolve_cached(request: Handler, kind: str, namespace: str, short: str, revision: str, path: str) -> Answer:
    return content(request, kind, f"{namespace}/{short}", revision, path)


@route("GET", "/(?P<kind>datasets/|spaces/|)(?P<name>[^/]+/[^/]+)/(resolve|raw)/{revision}/{path*}")
def resolve(request: Handler, kind: str, name: str, revision: str, path: str) -> Answer:
    return content(request, kind.rstrip("s/") or "model", name, revision, path)
