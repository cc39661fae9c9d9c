"""Files and folders that are whole or not there, after errors and in killed processes."""

import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from colbert_nb import files
from colbert_nb.files import whole_file, whole_folder


def tree(home):
    return {str(p.relative_to(home)): p.read_bytes() for p in sorted(Path(home).rglob("*")) if p.is_file()}


def put(folder, **contents):
    folder.mkdir(parents=True, exist_ok=True)
    for name, text in contents.items():
        (folder / name).write_text(text)


@pytest.mark.parametrize("error", [ValueError, KeyboardInterrupt, OSError])
@pytest.mark.parametrize("there", [True, False])
def test_an_error_in_the_block_leaves_what_was(tmp_path, error, there):
    if there:
        put(tmp_path, file="old")
        put(tmp_path / "folder", a="old", b="old")
    before = tree(tmp_path)
    with pytest.raises(error), whole_file(tmp_path / "file") as file:
        file.write("new")
        raise error("stop")
    with pytest.raises(error), whole_folder(tmp_path / "folder") as new:
        put(new, a="new")
        raise error("stop")
    assert tree(tmp_path) == before


@pytest.mark.parametrize("error", [OSError, KeyboardInterrupt])
@pytest.mark.parametrize("place", [1, 2])
def test_an_error_while_renaming_leaves_what_was(tmp_path, error, place, monkeypatch):
    put(tmp_path / "folder", a="old")
    rename, calls = Path.rename, []

    def failing(self, target):
        calls.append(self)
        if len(calls) == place: raise error("no")
        return rename(self, target)

    monkeypatch.setattr(Path, "rename", failing)
    with pytest.raises(error), whole_folder(tmp_path / "folder") as new:
        put(new, a="new")
    assert tree(tmp_path) == {"folder/a": b"old"} and os.listdir(tmp_path) == ["folder"]


def test_what_is_written(tmp_path):
    with whole_file(tmp_path / "deep" / "down" / "file") as file:
        file.write("caf\u00e9\u2028\n")
    assert (tmp_path / "deep/down/file").read_bytes() == "caf\u00e9\u2028\n".encode()
    with whole_folder(tmp_path / "deep" / "folder") as new:
        put(new / "sub", a="1")
        (new / "empty").mkdir()
    with whole_folder(tmp_path / "deep" / "folder") as new:
        put(new, b="2")
        assert tree(tmp_path / "deep" / "folder") == {"sub/a": b"1"}
    assert tree(tmp_path / "deep" / "folder") == {"b": b"2"} and sorted(os.listdir(tmp_path / "deep")) == ["down", "folder"]


@pytest.mark.skipif(os.name == "nt", reason="links want rights on Windows")
def test_a_link_stays_a_link(tmp_path):
    put(tmp_path, file="old")
    put(tmp_path / "folder", a="old")
    for name in ("file", "folder"):
        (tmp_path / f"to_{name}").symlink_to(tmp_path / name)
    with whole_file(tmp_path / "to_file") as file: file.write("new")
    with whole_folder(tmp_path / "to_folder") as new: put(new, a="new")
    assert (tmp_path / "to_file").is_symlink() and (tmp_path / "to_folder").is_symlink()
    assert (tmp_path / "file").read_text() == (tmp_path / "folder" / "a").read_text() == "new"


def test_a_folder_is_no_file_and_a_file_no_folder(tmp_path):
    put(tmp_path, file="old")
    put(tmp_path / "folder", a="old")
    before = tree(tmp_path)
    for replace, name in ((whole_file, "folder"), (whole_folder, "file")):
        with pytest.raises(ValueError, match="expected the name of a"), replace(tmp_path / name): pass
    assert tree(tmp_path) == before


KILLED = """
import os, signal, sys
from pathlib import Path
import files
path, stop = Path(sys.argv[1]), int(sys.argv[2])
calls = []
def counted(function):
    def call(*args, **options):
        calls.append(function)
        if len(calls) == stop: os.kill(os.getpid(), signal.SIGKILL)
        return function(*args, **options)
    return call
for place, name in ((os, "replace"), (os, "fsync"), (os, "open"), (Path, "rename"), (Path, "mkdir"), (Path, "unlink"), (files.shutil, "rmtree")):
    setattr(place, name, counted(getattr(place, name)))
with files.whole_folder(path / "folder") as new:
    for name in "ab":
        (new / name).write_text("new")
with files.whole_file(path / "file") as file: file.write("new")
"""


@pytest.mark.skipif(os.name == "nt", reason="SIGKILL")
def test_killed_at_every_step_nothing_is_half(tmp_path):
    """Some system calls are counted; at each of them in turn the process is killed, and what it leaves is mended by the next."""
    seen, stop = set(), 0
    while True:
        stop += 1
        home = tmp_path / str(stop)
        put(home, file="old")
        put(home / "folder", a="old", b="old")
        done = subprocess.run([sys.executable, "-c", KILLED, str(home), str(stop)], cwd=Path(files.__file__).parent, timeout=60)
        if not done.returncode:
            break
        assert done.returncode == -signal.SIGKILL
        left = tree(home)
        folder = {name: text for name, text in left.items() if name.startswith("folder/")}
        if not folder:  # between the two renames: both are there, whole, under other names
            assert {t for n, t in left.items() if n.startswith(".folder.old/")} == {b"old"} and ".folder.old/b" in left
            assert {t for n, t in left.items() if n.startswith(".folder.part/")} == {b"new"} and ".folder.part/b" in left
        assert not folder or set(folder) == {"folder/a", "folder/b"} and len(set(folder.values())) == 1
        assert left["file"] in (b"old", b"new")
        seen.add((*folder.values(), left["file"]))
        with pytest.raises(ValueError), whole_folder(home / "folder"): raise ValueError
        assert len(set(tree(home / "folder").values())) == 1 and set(tree(home / "folder")) == {"a", "b"}
        with whole_file(home / "file") as file: file.write("next")
        assert sorted(os.listdir(home)) == ["file", "folder"] and (home / "file").read_text() == "next"
    assert tree(home) == {"file": b"new", "folder/a": b"new", "folder/b": b"new"}
    assert seen == {(b"old", b"old", b"old"), (b"old",), (b"new", b"new", b"old"), (b"new", b"new", b"new")} and stop > 12
