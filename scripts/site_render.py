"""Markdown, code, formulas, outputs and API entries as HTML: nothing in it needs a network."""

import base64
import html
import itertools
import json
import posixpath
import re
import struct
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path
from xml.etree import ElementTree

from latex2mathml.converter import convert
from markdown_it import MarkdownIt
from markdown_it.token import Token
from mdit_py_plugins.container import container_plugin
from mdit_py_plugins.dollarmath import dollarmath_plugin
from mdit_py_plugins.footnote import footnote_plugin
from pygments import highlight
from pygments.formatters import HtmlFormatter
from pygments.lexers import get_lexer_by_name
from pygments.util import ClassNotFound
from site_api import Symbol
from site_pages import Api, Code, Markdown, Outputs, Page

ANSI = re.compile(r"\x1b\[[0-9;]*[A-Za-z]")
CODE = ' class="typed"'
FORMATTER = HtmlFormatter(nowrap=True)
SETMINUS = "\u2216"
SPACES = {"|": "0", ":": "0.278em", SETMINUS: "0.222em"}      # around these operators, where browsers differ from TeX
PRIMES = "\u2032\u2033\u2034"             # raised and small by themselves
FUNCTIONS = {"arg", "cos", "exp", "ln", "log", "max", "min", "sin", "tanh"}
SIGNS = {":": ("mo", ":"), "\u221e": ("mi", "\u221e"), "\u29f5": ("mo", SETMINUS), SETMINUS: ("mo", SETMINUS)}  # ":" as in "such that"
SCRIPTS = ("msub", "msup", "msubsup", "munder", "mover", "munderover")
LIMITS = {"msub": "munder", "msubsup": "munderover"}
CALLOUT = re.compile(r"\{\s*\.callout-(\w+)(?:.*?title=\"([^\"]*)\")?.*?\}")


def slug(text: str) -> str:
    "A heading's anchor, as Pandoc makes it, so that a link holds on a site that Quarto built."
    text = re.sub(r"[^\w\s.-]", "", text).strip().lower()
    return re.sub(r"^[^a-z]+", "", re.sub(r"\s+", "-", text)) or "section"


@cache
def lexer(language: str):
    try:
        return get_lexer_by_name(language or "text")
    except ClassNotFound:
        return get_lexer_by_name("text")


def coloured(source: str, language: str = "python") -> str:
    return highlight(source, lexer(language), FORMATTER).rstrip()


def code(source: str, language: str) -> str:
    return f'<pre class="code"><code>{coloured(source, language)}</code></pre>'


def lines_of(latex: str) -> list[str]:
    "A display formula cut at each `\\qquad` outside of braces: where the window is narrow, the parts stand below each other."
    found, depth = [""], 0
    for part in re.split(r"(\\(?:qquad|left|right|begin|end)(?![a-zA-Z])|\\[{}]|[{}])", latex):
        if part == r"\qquad" and not depth:
            found.append("")
            continue
        depth += (part in ("{", r"\left", r"\begin")) - (part in ("}", r"\right", r"\end"))
        found[-1] += part
    return list(filter(str.strip, found))


def primes_at_full_size(tree: ElementTree.Element) -> None:
    "A prime beside its letter: as a superscript, a sign that is small and raised already would be made so once more."
    for node in tree.iter():
        if node.tag not in ("msup", "msubsup") or (node[-1].text or " ") not in PRIMES:
            continue
        node[-1].tag, node[-1].attrib = "mo", {"lspace": "0", "rspace": "0", "form": "postfix"}
        if node.tag == "msup":
            node.tag = "mrow"
        else:
            base, below, prime = node
            row = ElementTree.Element("mrow")
            row.extend([base, prime])
            node.tag, node[:] = "msub", [row, below]


def formula(latex: str, block: bool) -> str:
    "A formula as MathML, which browsers lay out by themselves. A command that is not known is a `ValueError`."
    typed = []
    if r"\textbackslash" in latex:
        raise ValueError(f"expected a formula that JupyterLab shows, too, got \\textbackslash in {latex!r}, which its MathJax does not know")

    def keep(found: re.Match) -> str:
        text = html.escape(re.sub(r"\\([{}_%&#$])", r"\1", found[2]), quote=False).replace(" ", "\u00a0")
        typed.append(f'<mtext{CODE if found[1] == "texttt" else ""}>{text}</mtext>')
        return rf"\text{{typed{len(typed) - 1}}}"

    source = re.sub(r"\\(texttt|text)\{((?:[^{}\\]|\\.)*)\}", keep, latex.strip())
    source = re.sub(r"\\(mathbf|mathcal|mathrm)\s+(\w)", r"\\\1{\2}", source)
    source = re.sub(r"\\arg(?![a-zA-Z])", r"\\operatorname{arg}", source)
    mathml = "".join(_mathml(part, block) for part in (lines_of(source) if block else [source]))
    if unknown := re.search(r"\\\w*", re.sub(r"<[^>]*>", " ", mathml)):
        raise ValueError(f"expected a formula that can be shown, got {unknown[0]} in {latex!r}; write it with other commands")
    mathml = mathml.replace(SETMINUS, "\\")               # few fonts have the sign of \setminus
    mathml = re.sub(r"<mtext>typed(\d+)</mtext>", lambda found: typed[int(found[1])], mathml)
    return f'<div class="formula">{mathml}</div>' if block else mathml


def _mathml(source: str, block: bool) -> str:
    "What latex2mathml makes, with the spaces and limits that TeX has and it has not."
    tree = ElementTree.fromstring(convert(source, display="block" if block else "inline").replace("negativethinmathspace", "-0.167em"))
    for node in tree.iter():
        node.tag = node.tag.rpartition("}")[2]
        if node.tag in ("mi", "mo") and node.text in SIGNS:
            node.tag, node.text = SIGNS[node.text]
    primes_at_full_size(tree)
    for node in tree.iter():
        if block and node.tag in LIMITS and node[0].text in ("max", "min"):  # limits stand below, as TeX sets them
            node.tag = LIMITS[node.tag]
    for node in tree.iter():
        if node.tag not in SCRIPTS:
            _spaces(list(node))
    return ElementTree.tostring(tree, encoding="unicode")


def _core(node: ElementTree.Element) -> ElementTree.Element:
    "What stands on the line of a part with or without scripts."
    return _core(node[0]) if node.tag in SCRIPTS else node


def _spaces(row: list[ElementTree.Element]) -> None:
    "Room beside the operators that stand in one row: functions such as `log`, signs of numbers, and those of `SPACES`."
    for before, child, after in zip([None, *row], row, [*row[1:], None]):
        core, text = _core(child), _core(child).text or ""
        opens = before is None or before.tag == "mo" and before.text not in tuple(")]}|‖!⌋⌉")
        if core.tag == "mo" and text.isalpha() or core.tag == "mi" and text in FUNCTIONS:
            core.tag = "mo"
            core.attrib.update(lspace="0" if opens else "0.167em", rspace="0" if after is None or after.text in tuple("([{,)]}") else "0.167em")
        elif child.tag == "mo" and text in tuple("−-+") and opens:         # no difference: the sign of what follows
            child.attrib.update(form="prefix", lspace="0", rspace="0")
        elif child.tag == "mo" and text in SPACES:
            child.attrib.update(lspace=SPACES[text], rspace=SPACES[text])


def in_columns(lines: list[str]) -> bool:
    "Whether what stands in a line belongs to what stands above it, as in a table or a tensor."
    return sum(bool(re.search(r"\S {2,}\S", line)) for line in lines) > 1 or any(re.match(r" {6,}[\[\d.-]", line) for line in lines)


def plain(text: str, kind: str = "output") -> str:
    "What a cell gave as text. A line that a phone cuts goes on below, a little to the right, but where the text is in columns."
    text = ANSI.sub("", text).rstrip()
    lines = text.split("\n")
    if max(map(len, lines)) <= 50 or in_columns(lines):
        return f'<pre class="{kind}">{html.escape(text)}</pre>'
    return f'<pre class="{kind} wrapped">' + "".join(f"<span>{html.escape(line)}\n</span>" for line in lines) + "</pre>"


def words_left(table: str) -> str:
    """The HTML of a DataFrame, whose numbers stand right, with each column of words, of sentences and of row names marked, its head too.

    Names may go on after an underscore."""
    cells, taken = {}, {}  # where a cell begins: its row, columns, text, whether it names; and the row in which a column is free again
    for row, line in enumerate(re.finditer(r"<tr.*?</tr>", table, re.S)):
        end = 0
        for cell in re.finditer(r"<(t[hd])([^>]*)>(.*?)</t[hd]>", line[0], re.S):
            first = next(column for column in itertools.count(end) if taken.get(column, 0) <= row)
            span = {name: int(n) for name, n in re.findall(r'(rowspan|colspan)="(\d+)"', cell[2])}
            end = first + span.get("colspan", 1)
            taken |= dict.fromkeys(range(first, end), row + span.get("rowspan", 1))
            cells[line.start() + cell.start()] = row, range(first, end), cell[3], cell[1] == "th"
    number = re.compile(r"\s*(?:[-+\u2212]?[\d.,]+(?:e[-+]?\d+)?\s?%?|NaN|nan|None|True|False|inf|-inf|<NA>|&lt;NA&gt;|)\s*")
    head, marks = table.partition("<tbody>")[0].count("<tr"), {}
    for row, (column, *_), text, names in cells.values():
        if row >= head and (names or not number.fullmatch(text)) and marks.get(column) != "words sentences":
            marks[column] = "words sentences" if len(text.split()) > 4 else "words"

    def marked(cell: re.Match) -> str:
        found = {marks.get(column) for column in cells[cell.start()][1]} if cell.start() in cells else {None}
        return cell[0] + (f' class="{found.pop()}"' if len(found) == 1 and None not in found else "")

    return re.sub(r"(?<=\w_)(?=\w)(?![^<]*>)", "<wbr>", re.sub(r"<t[hd](?=[ >])", marked, table))


def picture_size(data: bytes) -> tuple[int, int]:
    "Width and height of a PNG."
    return struct.unpack(">II", data[16:24])


@dataclass
class Heading:
    level: int
    text: str
    anchor: str
    symbol: bool = False


@dataclass
class Part:
    "What the search finds: a heading and the text below it."
    heading: str
    anchor: str
    text: list[str] = field(default_factory=list)
    symbol: bool = False


class Renderer:
    "Renders the pages of one site, whose addresses and symbols it knows."

    def __init__(self, pages: list[Page], links: dict[str, tuple[str, str]], source_url: str):
        self.addresses = {p.path.as_posix(): p.address for p in pages}
        self.links, self.source_url = links, source_url      # links: name -> (page, anchor)
        self.files: dict[str, bytes] = {}                    # pictures, by address
        self.local: set[str] = set()                         # files beside the notebooks that pages show or link
        md = self.md = MarkdownIt("commonmark", {"html": True, "typographer": False}).enable(["table", "strikethrough"])
        md.use(dollarmath_plugin, double_inline=True, allow_space=False, allow_digits=False,
               renderer=lambda text, options: formula(text, options["display_mode"]))
        md.use(footnote_plugin)
        md.use(container_plugin, "callout", validate=lambda params, *_: bool(CALLOUT.search(params)), render=self._callout)
        md.add_render_rule("fence", lambda _, tokens, i, *rest: code(tokens[i].content.rstrip("\n"), tokens[i].info.strip(" {}.").split(" ")[0]))
        md.add_render_rule("code_inline", lambda _, tokens, i, *rest: self._code_inline(tokens[i]))
        md.add_render_rule("text", lambda _, tokens, i, *rest: self._text(tokens[i]))
        md.add_render_rule("code_block", lambda _, tokens, i, *rest: code(tokens[i].content.rstrip("\n"), "text"))
        md.add_render_rule("table_open", lambda *_: '<div class="table"><table>')
        md.add_render_rule("table_close", lambda *_: "</table></div>")

    # one page ------------------------------------------------------------------------------------------------------------

    def page(self, page: Page) -> tuple[str, list[Heading], list[Part]]:
        "The body of a page, its headings, and what the search should find in it."
        self.here, self.headings, self.parts, self.seen = page.address, [], [Part(page.title, "", [page.subtitle])], set()
        symbols = [s for block in page.blocks if isinstance(block, Api) for s in block.symbols]
        self.reserved = {s.name for s in symbols} | {m.name for s in symbols for m in s.members}
        return "\n".join(self._block(page, block) for block in page.blocks), self.headings, self.parts

    def _block(self, page: Page, block) -> str:
        if isinstance(block, Markdown):
            return self.markdown(block.text)
        if isinstance(block, Code):
            self.parts[-1].text.append(block.source)
            shown, opened = code(block.source, "python"), " open" if block.fold == "show" else ""
            return f'<details class="fold"{opened}><summary>{block.summary}</summary>{shown}</details>' if block.fold else shown
        if isinstance(block, Outputs):
            return "\n".join(filter(None, (self._output(page, block, number, output) for number, output in enumerate(block.outputs))))
        plain = [s for s in block.symbols if s.kind == "constant" and block.shows_source]
        return self._constants(plain) + "\n".join(self._symbol(symbol, block.shows_source) for symbol in block.symbols if symbol not in plain)

    # markdown ------------------------------------------------------------------------------------------------------------

    def markdown(self, text: str, headings: bool = True) -> str:
        tokens = self.md.parse(text)
        self._titles_of_callouts(tokens)
        for i, token in enumerate(tokens):
            if token.type == "inline":
                for child in token.children if i and tokens[i - 1].type in ("td_open", "th_open") else ():
                    child.meta = {"cell": True}
                self._inline(token, link_code=not (i and tokens[i - 1].type == "heading_open"))
            if token.type == "heading_open" and headings:
                self._heading(token, tokens[i + 1], tokens[i + 2])
            elif headings and token.type == "inline" and not (i and tokens[i - 1].type == "heading_open"):
                self.parts[-1].text.append(self._words(token))
        return self.md.renderer.render(tokens, self.md.options, {})

    def inline(self, text: str) -> str:
        tokens = self.md.parseInline(text)
        self._inline(tokens[0])
        return self.md.renderer.render(tokens, self.md.options, {})

    def _code_inline(self, token: Token) -> str:
        return f"<code>{self._breaks(token, html.escape(token.content, quote=False))}</code>"

    def _text(self, token: Token) -> str:
        return re.sub(r"\S{24,}", lambda long: self._breaks(token, long[0]), html.escape(token.content))

    @staticmethod
    def _breaks(token: Token, text: str) -> str:
        "A name in a sentence, or in a cell of a table, where a long one may go on in the next line after a dot or an underscore."
        return re.sub(r"(?<=\w[._])(?=\w)", "<wbr>", text) if token.meta.get("cell") else text

    @staticmethod
    def _words(token: Token) -> str:
        return "".join(t.content if t.type in ("text", "code_inline", "math_inline") else " " if t.type.endswith("break") else ""
                       for t in token.children or [])

    def _inline(self, token: Token, link_code: bool = True) -> None:
        "Links to notebooks become links to pages, names of the package links to where they are described."
        depth, children = 0, []
        for child in token.children or []:
            if child.type == "link_open":
                depth += 1
                child.attrSet("href", self.target(child.attrGet("href")))
            elif child.type == "link_close":
                depth -= 1
            elif child.type == "image":
                child.attrSet("src", self.target(child.attrGet("src")))
                child.attrSet("loading", "lazy")
            found = self.link(child.content) if child.type == "code_inline" and link_code and not depth else ""
            if found:
                opening, closing = Token("html_inline", "", 0), Token("html_inline", "", 0)
                opening.content, closing.content = f'<a href="{found}">', "</a>"
                children += [opening, child, closing]
            else:
                children.append(child)
        if token.children is not None:
            token.children = children

    def link(self, name: str) -> str:
        "Where a name is described, from this page; \"\" for a plain word, for a name of this page, and for what is no name of the package."
        name = re.sub(r"\(.*\)$", "", name.removeprefix("colbert_nb."))
        if re.fullmatch(r"[a-z]+", name) or name not in self.links or self.links[name][0] == self.here:
            return ""
        address, anchor = self.links[name]
        return self.relative(address) + f"#{anchor}"

    def relative(self, address: str) -> str:
        return posixpath.relpath(address, posixpath.dirname(self.here) or ".")

    def target(self, href: str) -> str:
        "A link or picture in a notebook, as it stands on the site."
        if re.match(r"[a-z][a-z0-9+.-]*:|#|/", href) or not href:
            return href
        path, mark, anchor = href.partition("#")
        full = posixpath.normpath(posixpath.join(posixpath.dirname(self.here), path))
        if full in self.addresses:
            return self.relative(self.addresses[full]) + mark + anchor
        self.local.add(full)
        return href

    def _heading(self, token: Token, inline: Token, closing: Token) -> None:
        text, level = self._words(inline), int(token.tag[1])
        if attributes := re.search(r"\s*\{#([\w.-]+)[^}]*\}\s*$", text):
            anchor, text = attributes[1], text[:attributes.start()]
            inline.children[-1].content = re.sub(r"\s*\{#[^}]*\}\s*$", "", inline.children[-1].content)
        else:
            anchor = slug(text)
        anchor = self._free(anchor)
        level = max(level, 2)                                # the page's title is the only first one
        token.tag = closing.tag = f"h{level}"
        token.attrSet("id", anchor)
        self.headings.append(Heading(level, text, anchor))
        self.parts.append(Part(text, anchor))
        mark = Token("html_inline", "", 0)
        mark.content = f' <a class="mark" href="#{anchor}" aria-label="Link to this section">#</a>'
        inline.children.append(mark)

    def _free(self, anchor: str) -> str:
        free, number = anchor, 0
        while free in self.seen or free in self.reserved:
            number += 1
            free = f"{anchor}-{number}"
        self.seen.add(free)
        return free

    @staticmethod
    def _titles_of_callouts(tokens: list[Token]) -> None:
        "A heading at the top of a callout is its title."
        for i, token in enumerate(tokens):
            if token.type == "container_callout_open" and i + 1 < len(tokens) and tokens[i + 1].type == "heading_open":
                token.meta = {"title": tokens[i + 2].content}
                for part in tokens[i + 1:i + 4]:
                    part.type, part.hidden, part.children, part.content, part.tag = "html_block", True, None, "", ""

    @staticmethod
    def _callout(renderer, tokens, i, options, env) -> str:
        if tokens[i].nesting < 0:
            return "</div></div>"
        kind, title = CALLOUT.search(tokens[i].info).groups()
        title = (tokens[i].meta or {}).get("title") or title or kind.capitalize()
        return f'<div class="callout {html.escape(kind)}" role="note"><p class="callout-title">{html.escape(title)}</p><div>'

    # outputs -------------------------------------------------------------------------------------------------------------

    def _output(self, page: Page, block: Outputs, number: int, output) -> str:
        if output.output_type == "stream":
            return plain(output.text)
        if output.output_type == "error":
            return plain(output.ename + ": " + output.evalue, "output error")
        data = output.data
        if "text/html" in data:
            shown = words_left(re.sub(r"<style.*?</style>", "", data["text/html"], flags=re.S))
            return f'<div class="output table">{shown.replace(chr(60) + "table border=" + chr(34) + "1" + chr(34), "<table")}</div>'
        if "text/markdown" in data:
            return f'<div class="output">{self.markdown(data["text/markdown"], headings=False)}</div>'
        if "image/svg+xml" in data:
            return self._picture(page, block, number, data["image/svg+xml"].encode(), "svg")
        if "image/png" in data:
            return self._picture(page, block, number, base64.b64decode(data["image/png"]), "png")
        return plain(data.get("text/plain", ""))

    def _picture(self, page: Page, block: Outputs, number: int, data: bytes, kind: str) -> str:
        address = f"images/{page.address.removesuffix('.html').replace('/', '_')}_{block.cell}_{number}.{kind}"
        self.files[address] = data
        size = ' width="{}" height="{}"'.format(*picture_size(data)) if kind == "png" else ""
        return (f'<figure><img src="{self.relative(address)}" alt="{html.escape(block.alt)}"{size} '
                f'loading="lazy" decoding="async"></figure>')

    # API -----------------------------------------------------------------------------------------------------------------

    def _constants(self, symbols: list[Symbol]) -> str:
        "Constants whose values the code above shows."
        self.parts += [Part(symbol.name, symbol.name, [symbol.doc, symbol.source], symbol=True) for symbol in symbols]
        names = ", ".join(f'<a id="{s.name}" href="{self._source(s)}"><code>{s.name}</code></a>' for s in symbols)
        return f'<p class="constants">Constants: {names}</p>' if symbols else ""

    def _source(self, symbol: Symbol) -> str:
        return f"{self.source_url}/{symbol.module}.py#L{symbol.line}"

    def _symbol(self, symbol: Symbol, source_shown: bool) -> str:
        self.headings.append(Heading(3, symbol.name, symbol.name, symbol=True))
        self.parts.append(Part(symbol.name, symbol.name, [symbol.doc, *(f"{p.name} {p.note}" for p in symbol.parameters)], symbol=True))
        more = "".join(self._member(member) for member in symbol.members)
        rows = self._parameters(symbol)
        named = " and ".join(filter(None, ["Fields" if rows and not symbol.members and symbol.kind == "class" else "Parameters" if rows else "",
                                           "methods" if more else ""]))
        inside = rows + more
        bases = [self.inline(f"`{base}`") for base in symbol.bases if base not in ("object", "NamedTuple")]
        parts = [f'<section class="api" id="{symbol.name}" aria-label="{symbol.name}">', self._head(symbol)]
        if symbol.kind == "constant":
            parts.append("" if source_shown else code(symbol.source, "python"))
        if symbol.doc:
            parts.append(self.markdown(symbol.doc, headings=False))
        if bases:
            parts.append(f"<p>Extends {', '.join(bases)}.</p>")
        if inside:
            parts.append(f'<details{"" if source_shown else " open"}><summary>{named.capitalize()}</summary>{inside}</details>')
        return "\n".join([*filter(None, parts), "</section>"])

    def _head(self, symbol: Symbol) -> str:
        shown = symbol.signature if symbol.kind != "class" or symbol.parameters else symbol.name
        if symbol.kind == "class":
            shown = "class " + shown
        return (f'<div class="api-head"><pre><code>{coloured(shown)}</code>'
                f'</pre><a class="source" href="{self._source(symbol)}" aria-label="Source of {symbol.name}">source</a></div>')

    def _member(self, member: Symbol) -> str:
        self.parts.append(Part(member.name, member.name, [member.doc, *(f"{p.name} {p.note}" for p in member.parameters)], symbol=True))
        doc = self.markdown(member.doc, headings=False) if member.doc else ""
        return f'<div class="member" id="{member.name}">{self._head(member)}{doc}{self._parameters(member)}</div>'

    def _parameters(self, symbol: Symbol) -> str:
        "A list of parameters and what is returned, without those of which nothing is known."
        rows = []
        for p in symbol.parameters:
            if p.type or p.note:
                default = f" = {p.default}" if p.default else ""
                rows.append((f"{p.name}{': ' + p.type if p.type else ''}{default}", p.note))
        if symbol.returns:
            rows.append((f"→ {symbol.returns.type}", symbol.returns.note))
        return ('<dl class="parameters">' + "".join(f"<div><dt><code>{html.escape(name)}</code></dt><dd>{self.inline(note)}</dd></div>"
                                                   for name, note in rows) + "</dl>") if rows else ""


def index_of(pages: list[tuple[Page, list[Part]]]) -> str:
    "What the browser searches, as a script, which a page may load from a folder without a server."
    rows = []
    for page, parts in pages:
        for part in parts:
            text = re.sub(r"\s+", " ", " ".join(filter(None, part.text))).strip()
            rows.append([page.address + (f"#{part.anchor}" if part.anchor else ""), page.title, part.heading, text, int(part.symbol)])
    return "window.siteIndex = " + json.dumps(rows, ensure_ascii=False, separators=(",", ":")) + ";\n"


def local_files(folder: Path, names: set[str]) -> dict[str, bytes]:
    "Files beside the notebooks that pages link to; those that are not there are left to the check of links."
    return {name: (folder / name).read_bytes() for name in sorted(names) if not name.startswith("..") and (folder / name).is_file()}
