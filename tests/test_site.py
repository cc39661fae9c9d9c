"""The site that `make docs` builds: whole, readable, and searched in a browser."""

import ast
import html
import json
import posixpath
import re
import sys
from html.parser import HTMLParser
from pathlib import Path

import nbformat
import pandas as pd
import pytest
import yaml

from browser import Browser, chromium, served

ROOT = Path(__file__).parent.parent
sys.path.insert(0, str(ROOT / "scripts"))
import site_build  # noqa: E402
import site_render  # noqa: E402
from site_api import read_module  # noqa: E402
from site_pages import Code, Markdown, Outputs, directives  # noqa: E402

BASE = "/colbert_nb/"


class Seen(HTMLParser):
    "What a test asks of a page: its anchors, links, pictures without a description, text outside of code, landmarks."

    def __init__(self, page: str):
        super().__init__()
        self.anchors, self.links, self.bare, self.text, self.tags, self.code = [], [], [], [], [], 0
        self.feed(page)

    def handle_starttag(self, tag, attributes):
        given = dict(attributes)
        self.tags.append(tag)
        self.anchors += [given["id"]] if "id" in given else []
        self.links += [given[name] for name in ("href", "src") if given.get(name)]
        if tag == "img" and not (given.get("alt") or "").strip():
            self.bare.append(given["src"])
        self.code += tag in ("pre", "code", "script", "style")

    def handle_endtag(self, tag):
        self.code -= tag in ("pre", "code", "script", "style")

    def handle_data(self, data):
        if not self.code:
            self.text.append(data)


@pytest.fixture(scope="session")
def site():
    return site_build.read_site(ROOT)


@pytest.fixture(scope="session")
def built(site, tmp_path_factory) -> Path:
    out = tmp_path_factory.mktemp("site")
    site_build.build(site, out)
    return out


@pytest.fixture(scope="session")
def pages(built) -> dict[str, Seen]:
    return {p.relative_to(built).as_posix(): Seen(p.read_text(encoding="utf-8")) for p in sorted(built.rglob("*.html"))}


def place(address: str, link: str) -> str:
    "Where a link of a page leads, from the top of the site."
    if link.startswith(BASE):
        return link[len(BASE):]
    return posixpath.normpath(posixpath.join(posixpath.dirname(address), link)) if link else address


def test_every_link_and_anchor_leads_somewhere(built, pages):
    broken = []
    for address, page in pages.items():
        for link in page.links:
            if re.match(r"https?:|data:|mailto:", link):
                continue
            path, _, anchor = link.partition("#")
            path = place(address, path)
            if not (built / path).is_file() or anchor and path in pages and anchor not in pages[path].anchors:
                broken.append((address, link))
    assert not broken


def test_anchors_are_unique(pages):
    assert not {(address, a) for address, page in pages.items() for a in page.anchors if page.anchors.count(a) > 1}


def test_every_public_name_has_an_entry(site, pages):
    missing = []
    for name, module in site.modules.items():
        home = next((p.address for p in site.pages if p.module == name), None)
        listed = {n for row in site_build.api_entries(site) if row["module"] is module for n, *_ in row["entries"]}
        for public in module.public:
            here = public in module.symbols and home and public in pages[home].anchors
            if not (here or public in module.borrowed) or public not in listed:
                missing.append(f"{name}.{public}")
    assert not missing


def test_every_notebook_is_in_the_sidebar(site, pages):
    stored = {p.relative_to(site.folder).as_posix() for p in site.folder.rglob("*.ipynb") if "checkpoints" not in str(p)}
    assert {p.path.as_posix() for p in site.pages} == stored
    for address, page in pages.items():
        assert {p.address for p in site.pages} | {"api.html"} <= {place(address, link) for link in page.links}, address


def test_nothing_raw_is_shown(pages):
    raw = {address: found for address, page in pages.items()
           if (found := re.findall(r"#\|.*|^:::.*|\$\$|\{\{<|(?<!\w)@(?:fig|tbl|sec)-\w+|\*\*\w+|\]\([\w#.]", "\n".join(page.text), re.M))}
    assert not raw


def test_no_directive_is_shown_in_code(built):
    mark = re.compile(r"#\|\s*(export|hide|echo|output|fig-|default_exp|eval|slow|notest)")
    assert not [p.name for p in built.rglob("*.html") if mark.search(p.read_text(encoding="utf-8"))]


def defined_in(source: str) -> list[str]:
    "The source of what a cell defines; imports, loggers and nbdev's `_all_` left out."
    parts = [(node, ast.get_source_segment(source, node)) for node in ast.parse(source).body]
    return [text for node, text in parts if not isinstance(node, (ast.Import, ast.ImportFrom)) and "getLogger" not in text
            and not text.startswith(("_all_", "if TYPE_CHECKING"))]


def test_the_package_can_be_rebuilt_from_the_pages(site, built):
    "What an exported cell defines, public or private, stands on the page as code."
    missing = []
    for page in site.pages:
        blocks = re.findall(r'<pre class="code"><code>(.*?)</code></pre>', (built / page.address).read_text(encoding="utf-8"), re.S)
        shown = "\n\n".join(html.unescape(re.sub("<[^>]*>", "", block)) for block in blocks)
        text = (built / f"{page.address}.md").read_text(encoding="utf-8")
        for cell in nbformat.read(site.folder / page.path, as_version=4).cells:
            marks = directives(cell.source)[0] if cell.cell_type == "code" else {}
            if {"export", "exports"} & set(marks) and "hide" not in marks:
                missing += [(page.address, part[:80]) for part in defined_in(cell.source) if part not in shown or part not in text]
    assert not missing


def test_a_colon_leads_to_something(site):
    "A sentence that ends with a colon is followed by open code or by what a cell gave."
    hanging = [(page.address, block.text[-80:]) for page in site.pages for block, after in zip(page.blocks, [*page.blocks[1:], None])
               if isinstance(block, Markdown) and block.text.rstrip().endswith(":")
               and not (isinstance(after, Outputs) or isinstance(after, Code) and after.fold != "true")]
    assert not hanging


def test_every_picture_is_described(pages):
    assert not {address: page.bare for address, page in pages.items() if page.bare}


def test_landmarks(pages):
    for address, page in pages.items():
        assert page.tags.count("main") == page.tags.count("h1") == 1 and {"header", "nav", "footer"} <= set(page.tags), address
        assert page.links.count("#site-content") == 1 and "site-content" in page.anchors, address


def test_nothing_is_fetched_from_elsewhere(built):
    fetched = r'<(?:script|img|iframe|source)[^>]*\ssrc="(?:https?:)?//|<link[^>]*rel="(?:stylesheet|preload|icon)"[^>]*href="(?:https?:)?//'
    assert not [p.name for p in built.rglob("*.html") if re.search(fetched, p.read_text(encoding="utf-8"))]
    for name in ("site.css", "site.js"):
        assert not re.search(r"@import|url\(|fetch\(|https?:", (built / "assets" / name).read_text(encoding="utf-8"))


def test_each_page_has_its_notebook_and_its_text(site, built, pages):
    for page in site.pages:
        assert (built / "notebooks" / page.path).read_bytes() == (site.folder / page.path).read_bytes()
        assert site.colab(page) in pages[page.address].links
        assert (built / f"{page.address}.md").read_text(encoding="utf-8").startswith(f"# {page.title}\n")
    names = (built / "llms.txt").read_text(encoding="utf-8")
    assert names.startswith(f"# {site.website['title']}\n\n> ") and all(f"/{p.address}.md)" in names for p in site.pages)


def test_what_quarto_would_render(site, tmp_path):
    site_build.prepare(site, tmp_path / "proc")
    for page in site.pages:
        notebook = nbformat.read(tmp_path / "proc" / page.path, as_version=4)
        head = yaml.safe_load(notebook.cells[0].source.strip("-\n"))
        assert head["output-file"] == Path(page.address).name and head["title"] == page.title
        assert not [c for c in notebook.cells if {"hide", "export", "exports", "default_exp"} & set(directives(c.source)[0])]
        source = nbformat.read(site.folder / page.path, as_version=4)
        stored = sum("image/png" in o.get("data", {}) for c in source.cells if c.cell_type == "code" and "hide" not in directives(c.source)[0]
                     and directives(c.source)[0].get("output") != "false" for o in c.outputs)
        assert stored == sum("image/png" in o.get("data", {}) for c in notebook.cells if c.cell_type == "code" for o in c.outputs)


QUARTO = """#!{python}
import json, pathlib, sys
folder = pathlib.Path(sys.argv[2])
(folder / "_docs").mkdir()
(folder / "_docs" / "index.html").write_text(json.dumps([sys.argv[1:], sorted(p.name for p in folder.iterdir() if p.is_file())]))
"""


@pytest.mark.skipif(sys.platform == "win32", reason="the program that stands in for Quarto starts with #!")
def test_the_site_is_built_with_quarto_where_it_is_installed(site, tmp_path, monkeypatch):
    "A program of that name on PATH is given the prepared pages; what it makes becomes the site, with the pages as text beside it."
    program = tmp_path / "bin" / "quarto"
    program.parent.mkdir()
    program.write_text(QUARTO.replace("{python}", sys.executable))
    program.chmod(0o755)
    top = tmp_path / "top"
    (top / "nbs").mkdir(parents=True)
    (top / "_quarto.yml").write_bytes((ROOT / "_quarto.yml").read_bytes())
    small = site_build.Site(site.settings, site.website, top / "nbs", site.pages[:1], site.modules)
    monkeypatch.setattr(site_build, "read_site", lambda: small)
    monkeypatch.setenv("PATH", str(program.parent))
    monkeypatch.setattr(sys, "argv", ["site_build.py", "--out", str(tmp_path / "site")])
    assert site_build.main() == 0
    arguments, files = json.loads((tmp_path / "site" / "index.html").read_text())
    assert arguments == ["render", str(top / "_proc"), "--no-cache"] and files == ["404.qmd", "_quarto.yml", site.pages[0].path.name]
    assert (tmp_path / "site" / "llms.txt").is_file() and not (top / "_proc" / "_docs").exists()
    assert site_build.main() == 0                                                  # once more, over an older site


def test_what_quarto_is_told(site):
    "The addresses are those of settings.ini, and the folder of the site is the one that is moved to its place."
    told, settings = yaml.safe_load((ROOT / "_quarto.yml").read_text(encoding="utf-8")), site.settings
    assert told["project"] == {**told["project"], "type": "website", "output-dir": "_docs"}
    assert told["website"]["site-url"] == settings["doc_host"] + settings["doc_baseurl"] and told["website"]["repo-url"] == settings["git_url"]
    assert told["website"]["repo-subdir"] == settings["nbs_path"]


def made(tmp_path: Path, *cells, name: str = "01_made.ipynb", modules: dict | None = None) -> str:
    "The page of a notebook with these cells: a text is a Markdown cell, a pair is code and its outputs."
    (tmp_path / "nbs").mkdir(exist_ok=True)
    v4 = nbformat.v4
    rows = [v4.new_markdown_cell(c) if isinstance(c, str) else v4.new_code_cell(c[0], outputs=c[1]) for c in cells]
    nbformat.write(v4.new_notebook(cells=rows), tmp_path / "nbs" / name)
    page = site_build.read_page(tmp_path / "nbs", Path(name), modules or {})
    return site_render.Renderer([page], {"maxsim": ("scoring.html", "maxsim"), "top_k": ("evaluation.html", "top_k")}, "").page(page)[0]


def text(value: str) -> list:
    return [nbformat.v4.new_output("execute_result", {"text/plain": value})]


def test_cells_are_shown_as_marked(tmp_path):
    page = made(tmp_path, "# Made", ("#| hide\nsecret = 1", text("hidden")), ("#| echo: false\nsilent", text("shown")),
                ("#| output: false\nloud", text("gone")), ("#| code-fold: true\nfolded = 2", []), ("plain", text("<b>")))
    assert not re.search("secret|hidden|silent|gone", page)
    assert "shown" in page and "loud" in page and "&lt;b&gt;" in page
    assert re.search(r'<details class="fold"><summary>Code</summary>.*folded', page)


def test_exported_cells_are_shown(tmp_path):
    "Open where no entry says what a cell defines; imports alone are folded."
    page = made(tmp_path, "# Made", ("#| export\nimport json\nimport logging\n\nlog = logging.getLogger()", []),
                ("#| export\ndef _helper(): pass", []), ("#| export\nif True:\n    import csv\nelse:\n    csv = None", []))
    assert page.count("<details") == 1 and re.search(r'<details class="fold"><summary>Imports</summary>.*json.*</details>.*_helper.*csv', page, re.S)


def test_exported_cells_with_an_entry_are_folded(tmp_path, site):
    "But for one that a sentence introduces; code and entry are both there."
    cells = ("#| export\ndef top_k():\n    'Best.'", [])
    (tmp_path / "made.py").write_text(cells[0].partition("\n")[2], encoding="utf-8")
    modules = {"made": read_module(tmp_path / "made.py")}
    plain = made(tmp_path, "# Made", ("#| default_exp made", []), "It is short.", cells, modules=modules)
    assert '<details class="fold"><summary>Code</summary>' in plain and 'id="top_k"' in plain and plain.count("Best.") == 2
    led = made(tmp_path, "# Made", ("#| default_exp made", []), "It is short:", cells, modules=modules)
    assert "<details" not in led and 'id="top_k"' in led and led.count("Best.") == 2


def test_formulas():
    inline = site_render.formula(r"\{\, p' : x'_i \,\}", block=False)
    assert '<mo lspace="0.278em" rspace="0.278em">:</mo>' in inline                # as in TeX, room around "such that"
    assert "<msup>" not in inline and "<msub><mrow><mi>x</mi><mo" in inline       # a prime is small by itself
    display = site_render.formula(r"a = \left( b \qquad c \right) \qquad d = {e \qquad f}, \qquad\qquad g", block=True)
    assert display.count("<math") == 3 and display.count("<div") == 1             # parts that may stand below each other


def test_functions_and_signs_in_formulas():
    "With the room that TeX leaves beside them: log 6, not log6; -1, not - 1."
    def spaces(latex: str) -> list[tuple]:
        found = re.findall('<mo[^>]*?lspace="([^"]*" rspace="[^"]*)"[^>]*>([^<]*)</mo>', site_render.formula(latex, block=False))
        return [(sign, room) for room, sign in found]

    assert spaces(r"2 \log 6") == [("log", '0.167em" rspace="0.167em')]
    assert spaces(r"(\log_2(i))") == [("log", '0" rspace="0')]                      # nothing before a parenthesis or after one
    assert spaces(r"x = -\infty") == spaces(r"(-y)") == spaces("-1") == [("\u2212", '0" rspace="0')]
    assert not spaces("(a) - b") and not spaces("x_1 - 1")                         # a difference has room as it is
    assert spaces(r"A \setminus B") == [("\\", '0.222em" rspace="0.222em')]


def test_long_lines_of_outputs(tmp_path):
    "A message goes on in the next line; what stands in columns does not, and is scrolled."
    message, tensor = "expected a list of texts, got one string 'sort'; write [text]", "tensor([[ 0.5, -0.5],\n        [ 1.0, 2.0]]) " + 60 * "x"
    table = "name              value\none                   1\n" + 60 * "-"
    messages = repr([message, message]).replace(", 'exp", ",\n 'exp")
    page = made(tmp_path, "# Made", ("refused", text(messages)), ("tensor", text(tensor)), ("table", text(table)))
    assert page.count('<pre class="output wrapped">') == 1 and page.count(html.escape(message)) == 2
    assert page.count('<pre class="output">') == 2 and html.escape(table) in page


FRAME = """<table border="1" class="dataframe"><thead><tr style="text-align: right;"><th></th><th>advice</th><th>score</th></tr></thead>
<tbody><tr><th>0</th><td>take 2 passages</td><td>-0.5</td></tr><tr><th>max_score</th><td>3</td><td>NaN</td></tr></tbody></table>"""


def test_words_of_a_table_stand_left(tmp_path):
    page = made(tmp_path, "# Made", ("frame", [nbformat.v4.new_output("execute_result", {"text/html": FRAME, "text/plain": ""})]))
    assert re.findall('class="words">(.*?)</t', page) == ["", "advice", "0", "take 2 passages", "max_<wbr>score", "3"]


def test_sentences_of_a_table_have_room(tmp_path):
    frame = FRAME.replace("take 2 passages", "take 2 passages or more")
    page = made(tmp_path, "# Made", ("frame", [nbformat.v4.new_output("execute_result", {"text/html": frame, "text/plain": ""})]))
    assert re.findall('class="words sentences">(.*?)</t', page) == ["advice", "take 2 passages or more", "3"]


def test_numbers_beside_a_name_of_several_rows_stand_right(tmp_path):
    frame = pd.DataFrame({"score": [0.5, 0.7, 0.9]}, index=pd.MultiIndex.from_tuples([("read", 1), ("read", 2), ("skip", 1)])).to_html()
    page = made(tmp_path, "# Made", ("frame", [nbformat.v4.new_output("execute_result", {"text/html": frame, "text/plain": ""})]))
    assert 'rowspan="2"' in page and re.findall(r'class="words"[^>]*>(.*?)</t', page) == ["", "", "read", "1", "2", "skip", "1"]


def test_markdown_of_a_page(tmp_path):
    page = made(tmp_path, "# Made", "## Same\n\nSee [there](01_made.ipynb#same) and `top_k`, not `maxsim`; it costs $5 or $6.\n\n## Same\n\n"
                "$$\\max_j q_j$$\n\n::: {.callout-note}\n## Mind\n\nthe gap\n:::\n\n| a | b |\n|---|--:|\n| 1 | `x` |")
    assert 'id="same"' in page and 'id="same-1"' in page and 'href="made.html#same"' in page
    assert 'href="evaluation.html#top_k"' in page and "scoring.html" not in page   # a plain word is no link
    assert "$5 or $6" in page and "<munder>" in page and ":::" not in page
    assert '<p class="callout-title">Mind</p>' in page and "the gap" in page and '<div class="table"' in page


def test_what_the_search_shows_of_a_sentence(tmp_path):
    cell = nbformat.v4.new_markdown_cell("# Made\n\nA *hard* negative,\n**near** by.")
    nbformat.write(nbformat.v4.new_notebook(cells=[cell]), tmp_path / "01_made.ipynb")
    page = site_build.read_page(tmp_path, Path("01_made.ipynb"), {})
    assert site_render.Renderer([page], {}, "").page(page)[2][0].text == ["", "A hard negative, near by."]


def test_long_names_in_a_table(tmp_path):
    "They are cut after an underscore, or a phone shows half of the table; in a sentence they stay whole."
    page = made(tmp_path, "# Made", "A `drop_same_text`.\n\n| rule |\n|---|\n| `drop_same_text` or `top_k` or `a<b` |\n"
                "| no.such.thing, encoder.layer.0.attention.query |")
    assert "no.such.thing, encoder.<wbr>layer.<wbr>0.<wbr>attention.<wbr>query" in page
    assert page.count("<code>drop_same_text</code>") == page.count("<code>drop_<wbr>same_<wbr>text</code>") == 1
    assert 'top_k"><code>top_<wbr>k</code></a>' in page and "<code>a&lt;b</code>" in page


def test_a_formula_that_cannot_be_shown_is_named(tmp_path):
    with pytest.raises(ValueError, match="nosuchcommand"):
        made(tmp_path, "# Made", "$$\\nosuchcommand{x}$$")
    with pytest.raises(ValueError, match="JupyterLab"):
        made(tmp_path, "# Made", "$$\\texttt{\\textbackslash 0}$$")


def test_a_folder_that_holds_no_site_is_left_alone(tmp_path, site):
    (tmp_path / "letter").write_text("dear")
    for write in (site_build.build, site_build.prepare):
        with pytest.raises(ValueError, match="expected a folder that is empty or holds a site"):
            write(site, tmp_path)
    assert (tmp_path / "letter").exists()


MADE = '''"Doc"
__all__ = ["log", "A", "B", "f", "C"]
from logging import getLogger
log = getLogger()
A, B = 1, 2

def f(
    x: int,  # a number
    *rest,
    y: str = "é, ü", # a word
) -> dict:  # what
    "Do."

class C:
    "See."
    def __init__(self, z=1): pass
    def go(self): "Went."

@dataclass
class D:
    n: int
    rows: dict = field(default_factory=dict)  # by name
    read: bool = field(default=False, init=False)
'''


def test_api_is_read_from_the_source(tmp_path):
    (tmp_path / "made.py").write_text(MADE, encoding="utf-8")
    module = read_module(tmp_path / "made.py")
    f, c = module.symbols["f"], module.symbols["C"]
    assert module.public == ["A", "B", "f", "C"] and f.signature == 'f(x, *rest, y="é, ü")' and f.line == 7 and f.doc == "Do."
    assert [p.note for p in f.parameters] == ["a number", "", "a word"] and (f.returns.type, f.returns.note) == ("dict", "what")
    assert module.symbols["D"].signature == "D(n, rows={})"
    assert c.signature == "C(z=1)" and module.symbols["C.go"].signature == "C.go()" and c.members == [module.symbols["C.go"]]


@pytest.fixture(scope="module")
def browser():
    if not chromium():
        pytest.skip("no Chromium here: the site is not opened in a browser")
    with Browser() as tab:
        yield tab


def searched(browser: Browser, words: str) -> list[str]:
    browser.press("/")
    browser.until("document.activeElement.id === 'site-query' && window.siteIndex !== undefined")
    browser.type(words)
    browser.until("document.querySelectorAll('#site-results li').length")
    return browser.run("[...document.querySelectorAll('#site-results a')].map(link => link.getAttribute('href'))")


def test_search_in_a_browser(browser, built):
    "From a folder without a server: the search finds a name and goes to it."
    browser.window(1280)
    browser.open((built / "index.html").as_uri())
    assert searched(browser, "maxsim_pairwise")[0] == "scoring.html#maxsim_pairwise"
    browser.press("Enter")
    assert browser.until("location.pathname.endsWith('/scoring.html') && document.readyState === 'complete' && location.hash") == "#maxsim_pairwise"
    assert browser.until("Math.abs(document.getElementById('maxsim_pairwise').getBoundingClientRect().top) < innerHeight")
    assert not browser.problems


CUT = """[...document.querySelectorAll("article :is(pre, .table, .formula, figure)")].filter(part => part.checkVisibility()
  && part.scrollWidth > part.clientWidth + 1 && (getComputedStyle(part).overflowX !== "auto"
  || [...part.children].some(child => child.getBoundingClientRect().left < part.getBoundingClientRect().left - 1))
).map(part => part.outerHTML.slice(0, 80))"""


def test_code_fits_beside_the_menu(browser, built):
    "In a window of 1280 px, with room for a scroll bar, a line of 120 characters of code is seen whole."
    browser.window(1265)
    browser.open((built / "scoring.html").as_uri())
    browser.run("document.querySelector('article pre.code code').textContent = 'x'.repeat(120)")
    assert browser.run("(part => part.scrollWidth <= part.clientWidth)(document.querySelector('article pre.code'))")


def test_pages_in_a_browser(browser, built, site):
    "From a server, below a folder of it: no error, no request elsewhere, nothing wider than a phone; and the page for what is not there."
    with served(built, BASE) as address:
        browser.window(390, dark=True)
        wide, cut = {}, {}
        for page in site.pages:
            browser.open(address + page.address)
            if browser.run("document.documentElement.scrollWidth") > 390:
                wide[page.address] = browser.run("document.documentElement.scrollWidth")
            if found := browser.run(CUT):
                cut[page.address] = found
            assert not browser.problems, page.address
        assert not wide
        assert not cut                                     # what is wider can be scrolled to, from its first character to its last
        assert browser.run("getComputedStyle(document.body).backgroundColor") == "rgb(18, 22, 27)"
        browser.run("document.getElementById('site-theme-button').click()")
        assert browser.run("getComputedStyle(document.body).backgroundColor") == "rgb(255, 255, 255)"
        assert not browser.run("document.getElementById('site-menu').checkVisibility()")
        browser.run("document.getElementById('site-menu-button').click()")
        assert browser.run("document.getElementById('site-menu').checkVisibility()")
        place = browser.run("(r => [r.top, r.bottom - innerHeight])(document.getElementById('site-menu').getBoundingClientRect())")
        assert place == [browser.run("document.querySelector('.top').offsetHeight"), 0]   # below the head, and scrolled to its end by itself
        browser.open(address + "no/such/page.html")
        assert browser.run("document.querySelector('h1').textContent") == "Page not found"
        assert browser.run("getComputedStyle(document.querySelector('.top')).position") == "sticky"  # it has its style, and its links hold
        assert searched(browser, "hard negatives")[0].startswith(BASE + "mining")
