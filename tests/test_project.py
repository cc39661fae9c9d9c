"""What is generated is in step with its source, and what is built installs."""

import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import nbformat
import pytest

ROOT = Path(__file__).parent.parent
FORBIDDEN = ("/tmp/", "/root/", "/home/", "site-packages", "widget-view")


def python(*args, cwd=ROOT):
    ran = subprocess.run([sys.executable, *args], cwd=cwd, capture_output=True, text=True)
    assert ran.returncode == 0, ran.stdout[-3000:] + ran.stderr[-3000:]
    return ran.stdout


@pytest.fixture(scope="module")
def tree(tmp_path_factory):
    "A copy of the files that belong to the project."
    listed = subprocess.run(["git", "ls-files", "-co", "--exclude-standard"], cwd=ROOT, capture_output=True, text=True)
    if listed.returncode:
        pytest.skip("not a git checkout")
    target = tmp_path_factory.mktemp("tree")
    for name in listed.stdout.splitlines():
        if (ROOT / name).is_file():
            (target / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy2(ROOT / name, target / name, follow_symlinks=False)
    return target


def test_export_and_clean_change_nothing(tree):
    files = [p for p in sorted(tree.rglob("*")) if p.suffix in (".py", ".ipynb") and p.is_file()]
    before = {p: p.read_bytes() for p in files}
    python("-c", "from nbdev.doclinks import nbdev_export; nbdev_export()", cwd=tree)
    python("-c", "from nbdev.clean import nbdev_clean; nbdev_clean()", cwd=tree)
    changed = [p.relative_to(tree).as_posix() for p in files if p.read_bytes() != before[p]]
    new = [p.name for p in tree.rglob("*.py") if p not in before]
    assert not changed and not new


def test_readme_is_what_the_index_gives():
    python("scripts/notebooks.py", "readme", "--check")


def test_a_tutorial_shows_its_results_and_leaves_no_temporary_files(tmp_path):
    code = ("import json, tempfile; from pathlib import Path; Path('runs/one').mkdir(parents=True); Path('told').write_text(tempfile.mkdtemp()); "
            "Path('runs/one/results.json').write_text(json.dumps({'bm25': {'nDCG@10': 0.5}}))")
    nbformat.write(nbformat.v4.new_notebook(cells=[nbformat.v4.new_code_cell(code)]), tmp_path / "page.ipynb")
    shown = python(str(ROOT / "scripts/notebooks.py"), "tutorial", "page.ipynb", "--out", "runs/one", cwd=tmp_path)
    assert shown.split()[-3:] == ["nDCG@10", "bm25", "0.500"] and (tmp_path / "runs/one.ipynb").is_file()
    left = (tmp_path / "told").read_text()
    assert left and not Path(left).exists()


@pytest.mark.parametrize("notebook", sorted((ROOT / "nbs").rglob("*.ipynb")), ids=lambda p: p.stem)
def test_stored_outputs(notebook):
    "Outputs are there, hold no error and nothing of the machine that made them."
    cells = [c for c in nbformat.read(notebook, as_version=4).cells if c.cell_type == "code"]
    assert any(c.outputs for c in cells), "no stored output: run scripts/notebooks.py run"
    assert not [c.source for c in cells for o in c.outputs if o.output_type == "error"]
    outputs = "\n".join(str(c.outputs) for c in cells)
    assert not [word for word in FORBIDDEN if word in outputs]


def test_wheel(tree, tmp_path):
    "The wheel holds the package alone, and imports from elsewhere."
    python("-m", "pip", "wheel", "--quiet", "--no-deps", "--no-build-isolation", "--wheel-dir", str(tmp_path), str(tree))
    (wheel,) = tmp_path.glob("colbert_nb-*.whl")
    names = zipfile.ZipFile(wheel).namelist()
    modules = {f"colbert_nb/{p.name}" for p in (tree / "colbert_nb").iterdir() if p.suffix == ".py"}
    assert modules | {"colbert_nb/py.typed"} <= set(names)
    assert all(n.startswith(("colbert_nb/", "colbert_nb-")) for n in names)
    assert any(n.endswith("licenses/LICENSE") for n in names)
    python("-m", "pip", "install", "--quiet", "--no-deps", "--target", str(tmp_path / "site"), str(wheel))
    code = f"import sys; sys.path.insert(0, {str(tmp_path / 'site')!r}); import colbert_nb; print(colbert_nb.__file__); " \
           "from colbert_nb import RAGTrainer, ColBERT"
    assert str(tmp_path / "site") in python("-c", code, cwd=tmp_path)


def test_import_loads_no_heavy_library():
    "Importing the package costs little more than torch and transformers: the rest waits until it is used."
    heavy = ("colbert", "sentence_transformers", "voyager", "onnx", "onnxruntime", "datasets", "matplotlib", "ir_measures",
             "bm25s", "sklearn")
    code = f"import sys, colbert_nb; colbert_nb.RAGTrainer; print([m for m in {heavy} if m in sys.modules])"
    assert python("-c", code).strip() == "[]"


def test_importing_the_package_loads_no_torch_until_a_name_is_asked_for():
    code = "import sys, colbert_nb; assert 'torch' not in sys.modules; from colbert_nb import maxsim; assert 'torch' in sys.modules"
    subprocess.run([sys.executable, "-c", code], check=True)


def test_every_public_name_can_be_imported():
    import colbert_nb

    assert all(getattr(colbert_nb, name) is not None for name in colbert_nb.__all__)
    with pytest.raises(AttributeError, match="no attribute 'ColBert'"):
        colbert_nb.ColBert
