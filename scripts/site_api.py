"""What the package defines, read from its source without importing it: signatures, docstrings, a note for each parameter."""

import ast
import io
import tokenize
from collections.abc import Iterator
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path


@dataclass
class Parameter:
    name: str      # with its stars
    type: str      # "" where there is none
    default: str   # "" where there is none
    note: str      # the comment on its line


@dataclass
class Symbol:
    module: str                 # without the package's name
    name: str                   # `maxsim`, `ColBERT.encode_queries`
    kind: str                   # class, function, property or constant
    line: int                   # where the definition starts in the module, decorators included
    source: str
    doc: str = ""
    parameters: list[Parameter] = field(default_factory=list)
    returns: Parameter | None = None
    members: list["Symbol"] = field(default_factory=list)  # public methods and properties of a class
    bases: list[str] = field(default_factory=list)

    @property
    def signature(self) -> str:
        "`name(parameters)` without types, which the list of parameters gives; one parameter a line where it is long."
        if self.kind in ("constant", "property"):
            return self.name
        shown = [p.name + (f"={p.default}" if p.default else "") for p in self.parameters]
        line = f"{self.name}({', '.join(shown)})"
        return line if len(line) <= 90 else f"{self.name}(\n    " + ",\n    ".join(shown) + ",\n)"

    @cached_property
    def summary(self) -> str:
        return self.doc.strip().split("\n\n")[0].replace("\n", " ")


class Source:
    "One module's text, its tree, and the comment that ends each line."

    def __init__(self, text: str):
        self.text, self.lines, self.tree = text, text.splitlines(), ast.parse(text)
        self.comments = {t.start[0]: t.string.lstrip("# ").strip() for t in tokenize.generate_tokens(io.StringIO(text).readline)
                         if t.type == tokenize.COMMENT}

    def part(self, node: ast.AST | None) -> str:
        "The source of a node, on one line."
        if node is None:
            return ""
        lines = [line.encode() for line in self.lines[node.lineno - 1:node.end_lineno]]  # the tree counts bytes
        lines[-1] = lines[-1][:node.end_col_offset]
        lines[0] = lines[0][node.col_offset:]
        return " ".join(b" ".join(lines).decode().split())

    def block(self, node: ast.AST) -> tuple[int, str]:
        "First line of a definition, and its source."
        first = min([node.lineno, *(d.lineno for d in getattr(node, "decorator_list", []))])
        return first, "\n".join(self.lines[first - 1:node.end_lineno])

    def parameters(self, node: ast.FunctionDef, method: bool) -> list[Parameter]:
        args = node.args
        plain = [*args.posonlyargs, *args.args]
        rows = list(zip(plain, [None] * (len(plain) - len(args.defaults)) + args.defaults, [""] * len(plain)))[int(method):]
        if args.vararg:
            rows.append((args.vararg, None, "*"))
        rows += zip(args.kwonlyargs, args.kw_defaults, [""] * len(args.kwonlyargs))
        if args.kwarg:
            rows.append((args.kwarg, None, "**"))
        last = {(default or arg).end_lineno: arg.arg for arg, default, _ in rows}  # a comment belongs to the last one on its line
        ends = node.returns.lineno if node.returns else node.body[0].lineno
        found = []
        for number, (arg, default, stars) in enumerate(rows):
            line = (default or arg).end_lineno
            note = self.comments.get(line, "") if last[line] == arg.arg and line != ends else ""
            if args.kwonlyargs and arg is args.kwonlyargs[0] and not args.vararg:
                found.append(Parameter("*", "", "", ""))
            found.append(Parameter(stars + arg.arg, self.part(arg.annotation), self.part(default), note))
            if args.posonlyargs and number + int(method) + 1 == len(args.posonlyargs):
                found.append(Parameter("/", "", "", ""))
        return found

    def returns(self, node: ast.FunctionDef) -> Parameter | None:
        if not node.returns or self.part(node.returns) == "None":
            return None
        return Parameter("", self.part(node.returns), "", self.comments.get(node.returns.end_lineno, ""))


def _function(source: Source, module: str, node: ast.FunctionDef, owner: str = "") -> Symbol:
    marks = [source.part(d) for d in node.decorator_list]
    line, text = source.block(node)
    kind = "property" if any(m.split(".")[-1] in ("property", "cached_property") for m in marks) or "as_prop=True" in str(marks) else "function"
    return Symbol(module, f"{owner}.{node.name}" if owner else node.name, kind, line, text, ast.get_docstring(node) or "",
                  source.parameters(node, bool(owner) and "staticmethod" not in marks), source.returns(node))


def _class(source: Source, module: str, node: ast.ClassDef) -> Symbol:
    line, text = source.block(node)
    found = Symbol(module, node.name, "class", line, text, ast.get_docstring(node) or "", bases=[source.part(base) for base in node.bases])
    for part in node.body:
        if isinstance(part, ast.FunctionDef) and part.name == "__init__":
            found.parameters = source.parameters(part, True)
        elif isinstance(part, ast.FunctionDef) and (part.name[0] != "_" or part.name == "__call__" and ast.get_docstring(part)):
            found.members.append(_function(source, module, part, node.name))
    if not found.parameters and ("dataclass" in " ".join(map(source.part, node.decorator_list)) or "NamedTuple" in map(source.part, node.bases)):
        found.parameters = [Parameter(p.target.id, source.part(p.annotation), _default(source, p.value), source.comments.get(p.end_lineno, ""))
                            for p in node.body if isinstance(p, ast.AnnAssign) and isinstance(p.target, ast.Name)
                            and "init=False" not in source.part(p.value)]
    return found


def _default(source: Source, value: ast.AST | None) -> str:
    "What a field of a dataclass is where it is not given: the value inside of `field(...)`."
    given = {k.arg: source.part(k.value) for k in value.keywords} if isinstance(value, ast.Call) and source.part(value.func) == "field" else {}
    made = given.get("default_factory", "")
    return given.get("default") or {"dict": "{}", "list": "[]"}.get(made, made and f"{made}()") or ("" if given else source.part(value))


def _patched(source: Source, node: ast.FunctionDef) -> str:
    "The class that fastcore's `@patch` adds a method to, or \"\"."
    if any(source.part(d).split("(")[0] in ("patch", "patch_to") for d in node.decorator_list) and node.args.args:
        return source.part(node.args.args[0].annotation).strip("\"'")
    return ""


def defined(source: Source, module: str) -> list[Symbol]:
    "Public classes, functions and constants of a module, or of a cell, in the order of the text."
    found = []
    for node in source.tree.body:
        if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef)) and node.name[0] != "_":
            found.append(_function(source, module, node, _patched(source, node)))
        elif isinstance(node, ast.ClassDef) and node.name[0] != "_":
            found.append(_class(source, module, node))
        elif isinstance(node, (ast.Assign, ast.AnnAssign)) and node.value is not None:
            if "getLogger" in source.part(node.value):
                continue
            targets = [name.id for target in (node.targets if isinstance(node, ast.Assign) else [node.target])
                       for name in (target.elts if isinstance(target, ast.Tuple) else [target]) if isinstance(name, ast.Name)]
            line, text = source.block(node)
            found += [Symbol(module, name, "constant", line, text, source.comments.get(node.end_lineno, "")) for name in targets if name[0] != "_"]
    return found


@dataclass
class Module:
    name: str
    doc: str
    public: list[str]              # `__all__`, but for loggers
    symbols: dict[str, Symbol]     # by name, members as `Class.member`
    borrowed: dict[str, str]       # public name -> module of the package that it is imported from


def _top_level(tree: ast.Module) -> Iterator[ast.stmt]:
    "The statements of a module, with those under `if TYPE_CHECKING:`, where names are imported that come when they are asked for."
    for node in tree.body:
        lazy = isinstance(node, ast.If) and isinstance(node.test, ast.Name) and node.test.id == "TYPE_CHECKING"
        yield from node.body if lazy else [node]


def read_module(path: Path) -> Module:
    source = Source(path.read_text(encoding="utf-8"))
    symbols = {}
    for symbol in defined(source, path.stem):
        symbols[symbol.name] = symbol
        symbols.update({member.name: member for member in symbol.members})
    public, borrowed, loggers = [], {}, set()
    own = f"{path.parent.name}."
    for node in _top_level(source.tree):
        if isinstance(node, ast.ImportFrom) and node.module and (node.level == 1 or node.module.startswith(own)):
            borrowed.update({a.asname or a.name: node.module.removeprefix(own) for a in node.names})
        elif isinstance(node, ast.Assign) and isinstance(node.targets[0], ast.Name):
            if node.targets[0].id == "__all__":
                public = ast.literal_eval(node.value)
            elif "getLogger" in source.part(node.value):
                loggers.add(node.targets[0].id)
    return Module(path.stem, ast.get_docstring(source.tree) or "", [name for name in public if name not in loggers], symbols, borrowed)


def read_package(folder: Path) -> dict[str, Module]:
    "The modules of a package by name, those with an underscore left out."
    return {p.stem: read_module(p) for p in sorted(folder.glob("*.py")) if p.stem[0] != "_"}
