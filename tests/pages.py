"""Runs a notebook's checks in a process of its own, as nbdev's test does.

The heavy libraries take eight to ten seconds of processor time to import, and the default corpus eight to read. On Linux
one process does both once and runs every notebook in a fork of itself; elsewhere, and for a notebook that sets variables
which the Hub's client reads as it is imported, each notebook has a fresh process.
"""

import importlib
import json
import os
import re
import signal
import subprocess
import sys
import tempfile
import traceback
from pathlib import Path

HERE = Path(__file__).parent
LOG = "output.log"
HEAVY = ("matplotlib.pyplot", "pandas", "nbdev.test", "nbdev.showdoc", "torch", "datasets", "sentence_transformers", "transformers.trainer",
         "transformers.models.auto.modeling_auto", "transformers.models.bert.tokenization_bert",
         *(f"transformers.models.{kind}.modeling_{kind}" for kind in ("bert", "roberta", "xlm_roberta", "electra", "deberta_v2")))


def check(notebook: Path, scratch: str) -> None:
    "Run one notebook in its own folder, without the cells marked notest, slow or gpu; exit with 0 where all of it passed."
    from nbdev.test import test_nb
    tempfile.tempdir = os.environ["TMPDIR"] = os.environ["TEMP"] = scratch
    passed, _ = test_nb(notebook, skip_flags=["notest", "slow", "gpu"])
    sys.exit(not passed)


def forked(notebook: Path, scratch: Path, limit: int) -> int:
    "`check` in a fork of this process, its output in `scratch / LOG`. Returns the exit status, or minus the signal that ended it."
    if child := os.fork():
        return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
    status = 1
    try:
        signal.alarm(limit)
        os.dup2(os.open(scratch / LOG, os.O_WRONLY | os.O_CREAT | os.O_TRUNC), 1)
        os.dup2(1, 2)
        os.dup2(os.open(os.devnull, os.O_RDONLY), 0)
        check(notebook, str(scratch))
    except SystemExit as end:
        status = int(end.code)
    except BaseException:
        traceback.print_exc()
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(status)


def serve() -> None:
    "Import and read what is heavy; then read one notebook a line from stdin and answer with its exit status."
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)
    for name in HEAVY:
        importlib.import_module(name)
    from colbert_nb.corpus import docstring_corpus
    docstring_corpus()  # what it has read stays in memory
    for line in sys.stdin:
        notebook, scratch, limit = json.loads(line)
        print(forked(Path(notebook), Path(scratch), limit), file=answers, flush=True)
    os._exit(0)  # at once: taking these libraries apart takes seconds


def python(call: str, **pipes) -> subprocess.Popen:
    "A Python process that evaluates `call` with this file as the module `pages`; of a main module's file it knows nothing."
    code = f"import sys; from pathlib import Path; sys.path.insert(0, {str(HERE)!r}); import pages; del sys.path[0]; pages.{call}"
    return subprocess.Popen([sys.executable, "-c", code], cwd=HERE.parent, text=True, **pipes,
                            env={**os.environ, "MPLBACKEND": "agg", "PYTHONPATH": str(HERE.parent)})


class Pages:
    "Runs notebooks, one at a time; a context manager."

    def __enter__(self):
        self.server = None
        return self

    def __exit__(self, *error):
        if self.server:
            self.server.communicate()

    def run(self, notebook: Path, limit: int) -> tuple[int, str]:
        "The exit status of `check` on `notebook`, which is ended after `limit` seconds, and what it wrote."
        with tempfile.TemporaryDirectory(ignore_cleanup_errors=True) as folder:  # a fork ends without tidying up: this does
            return self._run(notebook, Path(folder), limit)

    def _run(self, notebook: Path, scratch: Path, limit: int) -> tuple[int, str]:
        if sys.platform != "linux" or re.search(r"\bHF_[A-Z]", notebook.read_text(encoding="utf-8")):
            alone = python(f"check(Path({str(notebook)!r}), {str(scratch)!r})", stdout=subprocess.PIPE, stderr=subprocess.STDOUT)
            try:
                wrote, _ = alone.communicate(timeout=limit)
            except subprocess.TimeoutExpired:
                alone.kill()
                wrote, _ = alone.communicate()
            return alone.returncode, wrote
        if self.server is None:
            self.server = python("serve()", stdin=subprocess.PIPE, stdout=subprocess.PIPE)
        print(json.dumps([str(notebook), str(scratch), limit]), file=self.server.stdin, flush=True)
        answer, log = self.server.stdout.readline(), scratch / LOG
        wrote = log.read_text(encoding="utf-8", errors="replace") if log.exists() else ""
        if not answer:
            self.server, wrote = None, wrote + "\nthe process that runs the notebooks has ended: its own output tells why"
        return int(answer or 1), wrote
