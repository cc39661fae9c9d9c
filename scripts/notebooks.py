"""Run notebooks and keep their outputs, run the tutorial, or write README.md from nbs/index.ipynb.

    python scripts/notebooks.py run nbs/02_scoring.ipynb [...]   execute in a fresh kernel, store the outputs in place
    python scripts/notebooks.py tutorial NB --out FOLDER         execute a copy in the current folder, show its results
    python scripts/notebooks.py readme [--check]                 README.md from nbs/index.ipynb, without Quarto
"""

import argparse
import base64
import configparser
import json
import logging
import os
import re
import sys
import tempfile
import time
from pathlib import Path

import nbformat

ROOT = Path(__file__).resolve().parent.parent
log = logging.getLogger("notebooks")
NO_WIDGETS = "ignore:IProgress not found"  # tqdm misses ipywidgets, without which its bars are plain text: they can be stored


def directives(cell) -> set[str]:
    "The `#|` lines of a cell, such as {'hide', 'eval: false'}."
    return {" ".join(d.split()) for d in re.findall(r"^#\|(.*)$", cell.source, re.M)}


def execute(nb, folder: Path, timeout: int = 1800, on_cell=None) -> None:
    "Run the cells of `nb` in `folder` in a fresh kernel, but for those marked `#| eval: false`; outputs stay in `nb`."
    from nbclient import NotebookClient

    live = nbformat.from_dict({**nb, "cells": [c for c in nb.cells if "eval: false" not in directives(c)]})
    client = NotebookClient(live, timeout=timeout, kernel_name="python3", resources={"metadata": {"path": str(folder)}},
                            extra_arguments=["--log-level=ERROR"], log_level=logging.WARNING,
                            coalesce_streams=True)  # of a progress bar the last drawing stays, one line
    if on_cell:
        client.on_cell_start = on_cell
    with tempfile.TemporaryDirectory(ignore_cleanup_errors=True) as scratch:  # what a page leaves behind goes with it
        try:
            client.execute(env={"PYTHONWARNINGS": NO_WIDGETS, **os.environ, "TMPDIR": scratch, "TEMP": scratch})
        finally:
            done = iter(live.cells)
            nb.cells = [c if "eval: false" in directives(c) else next(done) for c in nb.cells]


def run(path: Path) -> None:
    "Execute a notebook from its own folder, as JupyterLab does, and store its outputs, cleaned as nbdev cleans them."
    from execnb.nbio import read_nb
    from nbdev.clean import clean_nb, write_nb

    nb, start = nbformat.read(path, as_version=4), time.perf_counter()
    execute(nb, path.parent)
    for cell in nb.cells:
        if cell.cell_type == "code":
            cell.outputs = [o for o in cell.outputs if o.get("name") != "stderr"]
    nbformat.write(nb, path)
    cleaned = read_nb(path)
    clean_nb(cleaned, allowed_cell_metadata_keys=["tags"])  # as settings.ini allows
    write_nb(cleaned, path)
    log.info("%s: %.0f s", path.name, time.perf_counter() - start)


def tutorial(path: Path, out: Path) -> None:
    "Execute a copy of a notebook in the current folder, heading by heading; keep it beside `out` and show its results."
    nb, start = nbformat.read(path, as_version=4), time.perf_counter()

    def on_cell(cell, cell_index):
        if cell.cell_type == "markdown" and (title := re.match(r"##? (.*)", cell.source)):
            log.info("%5.0f s  %s", time.perf_counter() - start, title[1])

    try:
        execute(nb, Path.cwd(), on_cell=on_cell)
    finally:
        out.parent.mkdir(parents=True, exist_ok=True)
        nbformat.write(nb, out.with_suffix(".ipynb"))
    log.info("%5.0f s  done: %s holds the results and the checkpoint, %s is the notebook as it ran\n",
             time.perf_counter() - start, out, out.with_suffix(".ipynb"))
    results = json.loads((out / "results.json").read_text(encoding="utf-8"))
    metrics = list(dict.fromkeys(m for row in results.values() for m in row))
    rows = [["", *metrics], *([name, *(f"{row[m]:.3f}" for m in metrics)] for name, row in results.items())]
    print("\n".join("".join(f"{c:<14}" if i == 0 else f"{c:>12}" for i, c in enumerate(row)) for row in rows))


def badges() -> str:
    "A badge a line: the newest run of each workflow on main, then the Python that settings.ini asks for."
    settings = configparser.ConfigParser()
    settings.read(ROOT / "settings.ini", encoding="utf-8")
    about = settings["DEFAULT"]
    line = []
    for file in sorted((ROOT / ".github/workflows").glob("*.yml"), key=lambda file: (file.stem != "test", file.name)):
        name = re.search(r"^name: *(.+)$", file.read_text(encoding="utf-8"), re.M)[1]
        url = f"{about['git_url']}/actions/workflows/{file.name}"
        line.append(f"[![{name}]({url}/badge.svg?branch={about['branch']})]({url})")
    line.append(f"![Python {about['min_python']} or later](https://img.shields.io/badge/python-%E2%89%A5{about['min_python']}-blue)")
    return "\n".join(line)


def readme() -> dict[Path, bytes]:
    "README.md and its pictures from nbs/index.ipynb, as {path: content}."
    nb = nbformat.read(ROOT / "nbs/index.ipynb", as_version=4)
    parts, files = ["<!-- Written from nbs/index.ipynb by `make readme`: change it there. -->"], {}
    for number, cell in enumerate(nb.cells):
        marks = directives(cell)
        if "hide" in marks:
            continue
        if cell.cell_type == "markdown":
            parts.append(re.sub(r"\]\((?!https?:|#)([\w./-]+\.ipynb)\)", r"](nbs/\1)", cell.source))
            if len(parts) == 2:  # under the title
                parts[1] = parts[1].replace("\n\n", f"\n\n{badges()}\n\n", 1)
            continue
        source = re.sub(r"^#\|.*\n?", "", cell.source, flags=re.M).strip()
        alt = next((m.split(":", 1)[1].strip(' "') for m in marks if m.startswith("fig-alt:")), "")
        if source and "echo: false" not in marks:
            parts.append(f"```python\n{source}\n```")
        for place, output in enumerate([] if "output: false" in marks else cell.outputs):
            data = output.get("data", {})
            if "image/png" in data:
                file = ROOT / f"nbs/images/index_{number}_{place}.png"
                files[file] = base64.b64decode(data["image/png"])
                parts.append(f"![{alt}]({file.relative_to(ROOT).as_posix()})")
            elif "text/markdown" in data:
                parts.append(data["text/markdown"])
            else:
                text = data.get("text/plain", output.get("text", ""))
                parts.append("\n".join("    " + line for line in text.rstrip().splitlines()))
    return {ROOT / "README.md": ("\n\n".join(p.strip("\n") for p in parts) + "\n").encode(), **files}


def write_readme(check: bool) -> int:
    "Write the files of `readme`, or with `check` name those that differ."
    stale = {p: content for p, content in readme().items() if not p.exists() or p.read_bytes() != content}
    for path, content in stale.items():
        if check:
            log.error("%s is not what nbs/index.ipynb gives: run `make readme`", path.relative_to(ROOT))
        else:
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_bytes(content)
    return int(check and bool(stale))


def main() -> int:
    logging.basicConfig(level=logging.WARNING, format="%(message)s", stream=sys.stdout)
    log.setLevel(logging.INFO)
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = parser.add_subparsers(dest="command", required=True)
    command = commands.add_parser("run", help="execute notebooks and store their outputs")
    command.add_argument("notebooks", nargs="+", type=Path)
    command = commands.add_parser("tutorial", help="execute a copy of a notebook and show its results")
    command.add_argument("notebook", type=Path)
    command.add_argument("--out", type=Path, required=True, help="folder of results.json; the copy goes beside it")
    command = commands.add_parser("readme", help="write README.md from nbs/index.ipynb")
    command.add_argument("--check", action="store_true", help="write nothing, fail where a file differs")
    args = parser.parse_args()
    if args.command == "run":
        for path in args.notebooks:
            run(path)
    elif args.command == "tutorial":
        tutorial(args.notebook, args.out)
    else:
        return write_readme(args.check)
    return 0


if __name__ == "__main__":
    sys.exit(main())
