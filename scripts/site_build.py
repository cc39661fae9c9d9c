"""Build the site from the notebooks as they are stored: nothing is executed, nothing is fetched.

    python scripts/site_build.py                 into _docs; with Quarto where it is installed
    python scripts/site_build.py --no-quarto     with this builder even then
    python scripts/site_build.py --prepare DIR   write what Quarto would render into DIR, and render nothing

The address of a page is that of its notebook without the number, as nbdev has it: nbs/02_scoring.ipynb is scoring.html.
Both ways of building give the same addresses and anchors, and llms.txt with a Markdown file for every page.
"""

import argparse
import configparser
import json
import logging
import os
import re
import shutil
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path

import jinja2
import nbformat
import yaml
from site_api import Module, Symbol, read_package
from site_pages import Api, Code, Markdown, Outputs, Page, read_page, sidebar
from site_render import ANSI, Heading, Part, Renderer, index_of, local_files

ROOT = Path(__file__).resolve().parent.parent
THEME = Path(__file__).resolve().parent / "site_theme"
API = "api.html"
MISSING = "404.html"
log = logging.getLogger("site")


@dataclass
class Site:
    "All that pages are made from."
    settings: dict[str, str]          # of settings.ini
    website: dict                     # of _quarto.yml
    folder: Path                      # of the notebooks
    pages: list[Page]                 # in the order of the sidebar
    modules: dict[str, Module]

    @property
    def repository(self) -> str:
        return f"{self.settings['git_url']}/blob/{self.settings['branch']}"

    def notebook(self, page: Page) -> str:
        "A page's notebook, from the top of the repository."
        return f"{self.settings['nbs_path']}/{page.path.as_posix()}"

    def colab(self, page: Page) -> str:
        settings = self.settings
        return f"https://colab.research.google.com/github/{settings['user']}/{settings['repo']}/blob/{settings['branch']}/{self.notebook(page)}"

    def links(self) -> dict[str, tuple[str, str]]:
        "Where each symbol is described, as {name: (page, anchor)}: by its name where only one module has it, and as `module.name`."
        found: dict[str, tuple[str, str]] = {}
        twice = set()
        for page in self.pages:
            for symbol in shown(page):
                for part in (symbol, *symbol.members):
                    twice |= {part.name} & set(found)
                    found[part.name] = found[f"{part.module}.{part.name}"] = (page.address, part.name)
            if page.module:
                found.setdefault(page.module, (page.address, ""))
        return {name: place for name, place in found.items() if name not in twice}


def shown(page: Page) -> list[Symbol]:
    return [symbol for block in page.blocks if isinstance(block, Api) for symbol in block.symbols]


def read_site(root: Path = ROOT) -> Site:
    parser = configparser.ConfigParser()
    parser.read(root / "settings.ini", encoding="utf-8")
    settings = dict(parser["DEFAULT"])
    website = yaml.safe_load((root / "_quarto.yml").read_text(encoding="utf-8"))["website"]
    folder, modules = root / settings["nbs_path"], read_package(root / settings["lib_path"])
    pages = []
    for section, name in sidebar(website["sidebar"]["contents"]):
        if not (folder / name).is_file():
            raise ValueError(f"_quarto.yml: expected a notebook of {folder.name}/ in the sidebar, got {name!r}")
        page = read_page(folder, Path(name), modules)
        page.section = section
        pages.append(page)
    addresses = [page.address for page in pages]
    if again := [address for address in addresses if addresses.count(address) > 1 or address in (API, MISSING)]:
        raise ValueError(f"expected a page's name without its number once in the sidebar, got {again[0]!r} twice")
    return Site(settings, website, folder, pages, modules)


# this builder ------------------------------------------------------------------------------------------------------------


def tree(pages: list[Page], depth: int = 0) -> list[dict]:
    "The sidebar as nested sections."
    rows: list[dict] = []
    for page in pages:
        if len(page.section) == depth:
            rows.append({"page": page})
        elif rows and rows[-1].get("section") == page.section[depth]:
            rows[-1]["pages"].append(page)
        else:
            rows.append({"section": page.section[depth], "pages": [page]})
    return [{**row, "rows": tree(row["pages"], depth + 1)} if "section" in row else row for row in rows]


def api_entries(site: Site) -> list[dict]:
    "For each module with a page: what it defines, and the names that it takes from another module for its users."
    places = {(symbol.module, symbol.name): page for page in site.pages for symbol in shown(page)}
    rows = []
    for page in site.pages:
        if module := site.modules.get(page.module):
            entries = []
            for name in module.public:
                owner = module.borrowed.get(name, module.name) if name not in module.symbols else module.name
                if place := places.get((owner, name)):
                    entries.append((name, place, site.modules[owner].symbols[name]))
            rows.append({"module": module, "page": page, "entries": entries})
    return rows


def empty(out: Path, sign: str = "index.html") -> None:
    "Make room for a site, or for what Quarto renders (`sign` is 404.qmd), where there is none, or an older one."
    if out.exists() and (not out.is_dir() or any(out.iterdir()) and not (out / sign).is_file()):
        raise ValueError(f"expected a folder that is empty or holds a site with {sign}, got {out}; name another one")
    shutil.rmtree(out, ignore_errors=True)


def write(out: Path, address: str, content: str | bytes) -> None:
    (out / address).parent.mkdir(parents=True, exist_ok=True)
    (out / address).write_bytes(content.encode() if isinstance(content, str) else content)


def build(site: Site, out: Path) -> None:
    "Write the site into a folder, which is emptied first."
    empty(out)
    renderer = Renderer(site.pages, site.links(), f"{site.repository}/{site.settings['lib_path']}")
    environment = jinja2.Environment(loader=jinja2.FileSystemLoader(THEME), autoescape=True, trim_blocks=True, lstrip_blocks=True,
                                     undefined=jinja2.StrictUndefined)
    common = {"site": site, "sidebar": tree(site.pages), "home": f"{site.settings['doc_host']}{site.settings['doc_baseurl']}/",
              "description": site.website["description"]}
    html_of = environment.get_template("page.html").render
    found: list[tuple[Page, list[Part]]] = []
    for i, page in enumerate(site.pages):
        try:
            body, headings, parts = renderer.page(page)
        except Exception as error:
            raise ValueError(f"{page.path}: {error}") from error
        found.append((page, parts))
        near = {"before": site.pages[i - 1] if i else None, "after": site.pages[i + 1] if i + 1 < len(site.pages) else None}
        notebook = f"notebooks/{page.path.as_posix()}"
        write(out, notebook, (site.folder / page.path).read_bytes())
        write(out, page.address, html_of(**common, **near, page=page, body=body, headings=[h for h in headings if h.level < 4], notebook=notebook,
                                         root="../" * page.address.count("/"), url=renderer.relative, inline=renderer.inline))
    for page, module in ((Page(Path(API), "API", "Every public name, by module, in the order of the stages.", ""), api_entries(site)),
                         (Page(Path(MISSING), "Page not found", "There is no page at this address.", ""), None)):
        renderer.here = page.path.as_posix()
        root = "" if module else site.settings["doc_baseurl"] + "/"   # a page that is not there may have been looked for anywhere
        missing = (THEME / "404.md").read_text(encoding="utf-8").replace("](/", f"]({root}")
        body = environment.get_template("api.html").render(rows=module, inline=renderer.inline) if module else renderer.md.render(missing)
        headings = [Heading(2, row["module"].name, row["module"].name) for row in module or []]
        write(out, page.path.as_posix(), html_of(**common, before=None, after=None, page=page, body=body, headings=headings, root=root,
                                                 url=lambda address, root=root: root + address, inline=renderer.inline, notebook=""))
    for address, content in {**renderer.files, **local_files(site.folder, renderer.local)}.items():
        write(out, address, content)
    for name in ("site.css", "site.js"):
        write(out, f"assets/{name}", (THEME / name).read_bytes())
    write(out, "assets/search.js", index_of(found))
    write(out, ".nojekyll", "")
    write_texts(site, out)


# for language models -----------------------------------------------------------------------------------------------------


def as_markdown(site: Site, page: Page) -> str:
    "A page as Markdown: prose, code, and outputs but for the pictures, of which the description is kept."
    parts = [f"# {page.title}", f"> {page.subtitle}" if page.subtitle else ""]
    for block in page.blocks:
        if isinstance(block, Markdown):
            parts.append(re.sub(r"\]\((?!https?:|#)([\w./-]+)\.ipynb(#[\w.-]*)?\)", lambda m: f"]({_text_address(site, page, m[1])})", block.text))
        elif isinstance(block, Code):
            parts.append(f"```python\n{block.source}\n```")
        elif isinstance(block, Outputs):
            for output in block.outputs:
                data = output.get("data", {})
                if "text/markdown" in data:
                    parts.append(data["text/markdown"])
                elif "image/png" in data or "image/svg+xml" in data:
                    parts.append(f"[Picture: {block.alt}]")
                elif text := ANSI.sub("", data.get("text/plain", output.get("text", ""))).rstrip():
                    parts.append(f"```\n{text}\n```")
    return "\n\n".join(filter(None, (part.strip("\n") for part in parts))) + "\n"


def _text_address(site: Site, page: Page, name: str) -> str:
    full = os.path.normpath(page.path.parent / f"{name}.ipynb").replace(os.sep, "/")
    address = next((p.address for p in site.pages if p.path.as_posix() == full), name)
    return os.path.relpath(address, Path(page.address).parent).replace(os.sep, "/") + ".md"


def write_texts(site: Site, out: Path) -> None:
    "llms.txt (see llmstxt.org), llms-full.txt, and each page as Markdown beside it."
    lines, whole, section = [f"# {site.website['title']}", f"> {site.website['description']}"], [], None
    for page in site.pages:
        text = as_markdown(site, page)
        write(out, f"{page.address}.md", text)
        whole.append(text)
        if page.section != section:
            section = page.section
            lines.append(f"## {': '.join(section) or 'Start'}\n")
        note = f": {page.subtitle}" if page.subtitle else ""
        lines[-1] += f"\n- [{page.title}]({site.settings['doc_host']}{site.settings['doc_baseurl']}/{page.address}.md){note}"
    write(out, "llms.txt", "\n\n".join(lines) + "\n")
    write(out, "llms-full.txt", "\n\n".join(whole))


# Quarto ------------------------------------------------------------------------------------------------------------------


def api_cell(site: Site, symbol: Symbol) -> str:
    "A symbol as Markdown for Quarto, with the anchor that this builder gives it."
    lines = [f"### {symbol.name} {{#{symbol.name}}}", f"[source]({site.repository}/{site.settings['lib_path']}/{symbol.module}.py#L{symbol.line})",
             f"```python\n{symbol.signature}\n```", symbol.doc]
    rows = ["| " + " | ".join(f"`{part}`".replace("|", r"\|") if part else "" for part in (p.name, p.type, p.default)) + f" | {p.note} |"
            for p in symbol.parameters if p.type or p.note]
    if rows:
        lines.append("\n".join(["| parameter | type | default | |", "|---|---|---|---|", *rows]))
    return "\n\n".join(filter(None, lines))


def prepare(site: Site, out: Path) -> None:
    "Write the notebooks as Quarto should render them: what is hidden left out, API entries and links put in."
    empty(out, "404.qmd")
    for page in site.pages:
        links = [{"text": "Open in Colab", "href": site.colab(page), "icon": "box-arrow-up-right"},
                 {"text": "Download notebook", "href": site.repository.replace("/blob/", "/raw/") + "/" + site.notebook(page), "icon": "download"}]
        head = {"title": page.title, "description": page.subtitle, "output-file": Path(page.address).name, "code-links": links}
        cells = [nbformat.v4.new_raw_cell(f"---\n{yaml.safe_dump(head, sort_keys=False, allow_unicode=True)}---")]
        for before, block in zip([None, *page.blocks], page.blocks):
            if isinstance(block, Markdown):
                cells.append(nbformat.v4.new_markdown_cell(block.text))
            elif isinstance(block, Code):
                fold = f"#| code-fold: {block.fold}\n#| code-summary: {block.summary}\n" if block.fold else ""
                cells.append(nbformat.v4.new_code_cell(fold + block.source))
            elif isinstance(block, Api):
                cells += [nbformat.v4.new_markdown_cell(api_cell(site, part)) for symbol in block.symbols for part in (symbol, *symbol.members)]
            else:
                if not isinstance(before, Code):
                    cells.append(nbformat.v4.new_code_cell("#| echo: false"))
                if block.alt:
                    cells[-1].source = f"#| fig-alt: {json.dumps(block.alt, ensure_ascii=False)}\n" + cells[-1].source
                cells[-1].outputs = block.outputs
        for number, cell in enumerate(cells):
            cell.id = f"cell-{number}"
        kernel = {"display_name": "python3", "language": "python", "name": "python3"}
        notebook = nbformat.v4.new_notebook(cells=cells, metadata={"kernelspec": kernel})
        write(out, page.path.as_posix(), nbformat.writes(notebook))
    write(out, "404.qmd", f"---\ntitle: Page not found\n---\n\n{(THEME / '404.md').read_text(encoding='utf-8')}")
    write(out, "_quarto.yml", (site.folder.parent / "_quarto.yml").read_bytes())


def with_quarto(site: Site, out: Path, quarto: str) -> None:
    prepared = site.folder.parent / "_proc"
    prepare(site, prepared)
    subprocess.run([quarto, "render", str(prepared), "--no-cache"], check=True)
    empty(out)
    shutil.move(prepared / "_docs", out)
    write_texts(site, out)


def main() -> int:
    logging.basicConfig(level=logging.INFO, format="%(message)s", stream=sys.stdout)
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=ROOT / "_docs", help="folder of the site, which is emptied first (default: _docs)")
    parser.add_argument("--no-quarto", action="store_true")
    parser.add_argument("--prepare", type=Path, metavar="DIR")
    args = parser.parse_args()
    site, start, quarto = read_site(), time.perf_counter(), shutil.which("quarto")
    if args.prepare:
        prepare(site, args.prepare)
    elif quarto and not args.no_quarto:
        with_quarto(site, args.out, quarto)
    else:
        build(site, args.out)
    log.info("%d pages in %.1f s: %s", len(site.pages), time.perf_counter() - start, args.prepare or args.out / "index.html")
    return 0


if __name__ == "__main__":
    sys.exit(main())
