"""Run notebooks and keep their outputs, or write README.md from nbs/index.ipynb.

    python scripts/notebooks.py run nbs/02_scoring.ipynb [...]   execute in a fresh kernel, store outputs in place
    python scripts/notebooks.py readme [--check]                 README.md from nbs/index.ipynb, without Quarto
"""

import argparse
import base64
import logging
import re
import sys
import time
from pathlib import Path

import nbformat

ROOT = Path(__file__).resolve().parent.parent
log = logging.getLogger("notebooks")


def run(path: Path, timeout: int = 1800) -> None:
    """Execute `path` from its own folder in a fresh kernel and store the outputs, cleaned."""
    from nbclient import NotebookClient
    from nbdev.clean import clean_nb, write_nb
    from execnb.nbio import read_nb

    nb = nbformat.read(path, as_version=4)
    skipped = {i: c for i, c in enumerate(nb.cells) if re.search(r"^#\|\s*eval:\s*false", c.source, re.M)}
    kept = [c for i, c in enumerate(nb.cells) if i not in skipped]
    start = time.perf_counter()
    live = nbformat.from_dict({**nb, "cells": kept})
    NotebookClient(live, timeout=timeout, kernel_name="python3",
                   resources={"metadata": {"path": str(path.parent)}}).execute()
    done = iter(live.cells)
    nb.cells = [skipped[i] if i in skipped else next(done) for i in range(len(nb.cells))]
    for cell in nb.cells:
        if cell.cell_type == "code":
            cell.outputs = [o for o in cell.outputs if o.get("name") != "stderr"]
    nbformat.write(nb, path)
    cleaned = read_nb(path)
    clean_nb(cleaned)
    write_nb(cleaned, path)
    log.info("%s: %.0f s", path.name, time.perf_counter() - start)


def readme(root: Path = ROOT) -> dict[Path, bytes]:
    """README.md and its pictures as {path: bytes}, from nbs/index.ipynb."""
    nb = nbformat.read(root / "nbs/index.ipynb", as_version=4)
    parts, pictures = ["<!-- Written from nbs/index.ipynb by scripts/notebooks.py readme. Do not edit. -->"], {}
    for number, cell in enumerate(nb.cells):
        directives = set(re.findall(r"^#\|\s*(hide|echo: false|output: false)\s*$", cell.source, re.M))
        if "hide" in directives:
            continue
        alt = re.search(r'^#\|\s*fig-alt:\s*"?(.*?)"?\s*$', cell.source, re.M)
        source = "\n".join(l for l in cell.source.splitlines() if not l.startswith("#|")).strip()
        if cell.cell_type == "markdown":
            parts.append(re.sub(r"\]\((?!http|#)([\w./-]+\.ipynb)\)", r"](nbs/\1)", cell.source))
            continue
        if source and "echo: false" not in directives:
            parts.append(f"```python\n{source}\n```")
        if "output: false" in directives:
            continue
        for o, output in enumerate(cell.get("outputs", [])):
            data = output.get("data", {})
            if "image/png" in data:
                file = root / "nbs/images" / f"index_{number}_{o}.png"
                pictures[file] = base64.b64decode(data["image/png"])
                parts.append(f"![{alt[1] if alt else ''}]({file.relative_to(root).as_posix()})")
            elif "text/markdown" in data:
                parts.append("".join(data["text/markdown"]))
            else:
                text = "".join(data.get("text/plain", output.get("text", "")))
                parts.append("\n".join("    " + line for line in text.rstrip().splitlines()))
    text = "\n\n".join(p.strip("\n") for p in parts) + "\n"
    return {root / "README.md": text.encode(), **pictures}


def main() -> int:
    logging.basicConfig(level=logging.INFO, format="%(message)s")
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = parser.add_subparsers(dest="command", required=True)
    runner = commands.add_parser("run")
    runner.add_argument("notebooks", nargs="+", type=Path)
    writer = commands.add_parser("readme")
    writer.add_argument("--check", action="store_true", help="write nothing; fail where a file differs")
    args = parser.parse_args()
    if args.command == "run":
        for path in args.notebooks:
            run(path)
        return 0
    stale = [p for p, content in readme().items() if not p.exists() or p.read_bytes() != content]
    if args.check:
        for path in stale:
            log.error("%s is not what nbs/index.ipynb gives; run: python scripts/notebooks.py readme",
                      path.relative_to(ROOT))
        return 1 if stale else 0
    for path, content in readme().items():
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(content)
    return 0


if __name__ == "__main__":
    sys.exit(main())
