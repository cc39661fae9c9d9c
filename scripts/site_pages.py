"""Notebooks as pages: what is shown of each cell, in the order of the notebook, after nbdev's and Quarto's `#|` lines."""

import ast
import re
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

import nbformat
from site_api import Module, Source, Symbol, defined

HIDDEN = ("hide", "include: false", "exporti")
NO_SOURCE = ("hide_input", "echo: false")
NO_OUTPUT = ("hide_output", "output: false")


@dataclass
class Markdown:
    text: str


@dataclass
class Code:
    source: str
    fold: str = ""                # "" not folded, "true" folded, "show" open
    summary: str = "Code"         # what stands for it where it is folded


@dataclass
class Outputs:
    outputs: list
    alt: str                      # what the pictures show
    cell: int


@dataclass
class Api:
    symbols: list[Symbol]
    shows_source: bool            # the code above is open, so what a reader sees there is left out or folded here


Block = Markdown | Code | Outputs | Api


@dataclass
class Page:
    path: Path                    # of the notebook, from the folder of notebooks
    title: str
    subtitle: str
    module: str                   # that the notebook is exported to, or ""
    blocks: list[Block] = field(default_factory=list)
    section: tuple[str, ...] = () # of the sidebar

    @property
    def address(self) -> str:
        "Of the page on the site: as nbdev, the number of the notebook is left out."
        return self.path.with_name(re.sub(r"^\d+[a-zA-Z0-9]*_", "", self.path.stem) + ".html").as_posix()


def directives(source: str) -> tuple[dict[str, str], str]:
    "The `#|` lines of a cell as {name: value}, and the cell without them."
    lines = re.findall(r"^#\|\s*(.*?)\s*$", source, re.M)
    split = [line.partition(":") if ":" in line else line.partition(" ") for line in lines]
    return {name.strip(): value.strip().strip("\"'") for name, _, value in split}, re.sub(r"^#\|.*\n?", "", source, flags=re.M).strip("\n")


def _marked(marks: dict[str, str], names: tuple[str, ...]) -> bool:
    return any(marks.get(name.partition(": ")[0], None) == name.partition(": ")[2] for name in names)


def _is_preamble(node: ast.AST) -> bool:
    "What every module starts with and no page explains: an import, alone or for types, a logger, the list of what else is public."
    if isinstance(node, ast.If):
        return all(map(_is_preamble, [*node.body, *node.orelse]))
    named = isinstance(node, ast.Assign) and ast.unparse(node.targets[0]) == "_all_"
    return isinstance(node, (ast.Import, ast.ImportFrom)) or named or isinstance(node, ast.Assign) and "getLogger" in ast.unparse(node.value)


def _exported(source: str, found: list[Symbol], before: str) -> tuple[str, str]:  # `fold` and `summary` of `Code`
    """How the code of an `export` cell is shown, which Quarto would hide: folded for imports alone and where entries say what the cell
    defines, and open where nothing else would stand in its place, or the text before it ends with a colon."""
    body = ast.parse(source).body
    if all(map(_is_preamble, body)):
        return "true", "Imports"
    entries = any(symbol.kind != "constant" for symbol in found) or found and any(map(_is_preamble, body))
    return "true" if entries and not before.rstrip().endswith(":") else "", "Code"


def _blocks(cells: list, module: Module | None) -> Iterator[Block]:
    before = ""                   # the text that stands above a cell
    for number, cell in enumerate(cells):
        if cell.cell_type == "markdown":
            if cell.source.strip():
                yield Markdown(cell.source)
                before = cell.source
            continue
        if cell.cell_type != "code":
            continue
        marks, source = directives(cell.source)
        if _marked(marks, HIDDEN):
            continue
        exported = module and ("export" in marks or "exports" in marks)
        found = [module.symbols[s.name] for s in defined(Source(source), module.name)] if exported else []
        fold, summary = marks.get("code-fold", "").replace("false", ""), "Code"
        if "export" in marks and "code-fold" not in marks:
            fold, summary = _exported(source, found, before)
        visible = bool(source.strip()) and not _marked(marks, NO_SOURCE)
        if visible:
            yield Code(source, fold, summary)
        if found:
            yield Api(found, visible and not fold)
        shown = cell.outputs and not exported and not _marked(marks, NO_OUTPUT)
        if shown:
            yield Outputs(cell.outputs, marks.get("fig-alt", ""), number)
        before = "" if visible or found or shown else before


def read_page(folder: Path, path: Path, modules: dict[str, Module]) -> Page:
    "The page of a notebook, which starts with `# Title` and, below it, `> subtitle`."
    cells = list(nbformat.read(folder / path, as_version=4).cells)
    head = re.match(r"\s*#\s+(?P<title>.+?)\s*(?:\n+>\s*(?P<subtitle>.+?)\s*)?(?:\n|$)", cells[0].source)
    if cells[0].cell_type != "markdown" or not head:
        raise ValueError(f"{path}: expected '# Title' at the top of the first cell, got {cells[0].source[:60]!r}")
    cells[0] = nbformat.from_dict({**cells[0], "source": cells[0].source[head.end():].strip()})
    exp = next((m[1] for c in cells if c.cell_type == "code" and (m := re.search(r"^#\|\s*default_exp\s+(\S+)", c.source, re.M))), "")
    page = Page(path, head["title"], head["subtitle"] or "", exp)
    page.blocks = list(_blocks(cells, modules.get(exp)))
    return page


def sidebar(contents: list, section: tuple[str, ...] = ()) -> Iterator[tuple[tuple[str, ...], str]]:
    "(sections, notebook) of each entry of the sidebar in `_quarto.yml`, from top to bottom."
    for entry in contents:
        if isinstance(entry, str):
            yield section, entry
        elif "section" in entry:
            yield from sidebar(entry["contents"], (*section, entry["section"]))
        else:
            raise ValueError(f"expected a notebook or a section in the sidebar, got {entry!r}")
