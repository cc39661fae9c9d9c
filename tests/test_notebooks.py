"""Every notebook's checks: one process a notebook, a time limit each."""

import re
import shutil
from pathlib import Path

import nbformat
import pytest
from pages import Pages

ROOT = Path(__file__).parent.parent
LONG = ("index", "06_mining", "06_mining_others", "07_training_scale", "07_training_losses")  # begun first, so that none is left alone at the end
PAGES = [*(ROOT / "nbs").glob("*.ipynb"), *(ROOT / "nbs/explanations").glob("*.ipynb")]
STAGES = sorted((p.relative_to(ROOT).as_posix() for p in PAGES), key=lambda name: (Path(name).stem not in LONG, name))
TUTORIALS = sorted(p.relative_to(ROOT).as_posix() for p in (ROOT / "nbs/tutorials").glob("*.ipynb"))
LIMIT = 600  # seconds; a slow machine that runs two at a time needs a third of it


@pytest.fixture(scope="session")
def pages():
    with Pages() as started:
        yield started


def check(pages: Pages, notebook: Path) -> None:
    "Run a notebook's checks; the end of its output where one fails."
    status, wrote = pages.run(notebook, LIMIT)
    assert status == 0, f"exit status {status}\n{wrote[-10_000:]}"


def copied(notebook: str, tmp_path: Path, parameters: dict | None = None) -> Path:
    "A copy of the notebook beside a copy of the benchmarks' results; `parameters` replace those of the cell tagged so."
    nb = nbformat.read(ROOT / notebook, as_version=4)
    tagged = [cell for cell in nb.cells if "parameters" in cell.metadata.get("tags", ())]
    assert len(tagged) == 1 or not parameters, f"{notebook} needs one cell tagged parameters, and has {len(tagged)}"
    for name, value in (parameters or {}).items():
        tagged[0].source, found = re.subn(rf"^{name} = .*$", f"{name} = {value!r}", tagged[0].source, flags=re.M)
        assert found == 1, f"{notebook} has no parameter {name}"
    path = tmp_path / notebook
    path.parent.mkdir(parents=True)
    nbformat.write(nb, path)
    shutil.copytree(ROOT / "benchmarks/results", tmp_path / "benchmarks/results")
    return path


LITTLE = ["asyncio", "email"]  # packages with enough docstrings for every cell, and few
SMALL = {"first_colbert": {"packages": ["numpy"], "n_test": 40, "n_validation": 12, "validation_passages": 100, "maxsteps": 2, "doc_maxlen": 16},
         "from_ragatouille": {"packages": LITTLE, "n_test": 20, "maxsteps": 1, "doc_maxlen": 16},
         "labelled_pairs": {"packages": ["email"], "n_test": 16, "n_labelled": 40, "n_asked": 30, "doc_maxlen": 16, "first_steps": 1,
                            "second_steps": 1},
         "distillation": {"teacher_packages": ["asyncio"], "packages": ["email"], "n_test": 12, "n_labelled": 16, "n_asked": 16, "n_taught": 16,
                          "teacher_steps": 1, "label_epochs": 1, "doc_maxlen": 16},
         "several_gpus": {},
         "vespa": {"packages": LITTLE, "n_test": 20, "n_passages": 40, "maxsteps": 1, "doc_maxlen": 16},
         "another_language": {"n_pairs": 600, "n_test": 40, "n_validation": 12, "vocab_size": 800, "maxsteps": 2},
         "your_own_data": {"n_modules": 6, "n_test": 30, "n_validation": 12, "maxsteps": 2, "doc_maxlen": 16}}


@pytest.mark.timeout(LIMIT + 30)
@pytest.mark.parametrize("notebook", TUTORIALS)
def test_tutorial_on_little_data(pages, notebook, tmp_path):
    "The whole page on a small corpus; cells marked `#| slow` judge the full run and are left to `make tutorial`."
    check(pages, copied(notebook, tmp_path, SMALL[Path(notebook).stem]))


@pytest.mark.timeout(LIMIT + 30)
@pytest.mark.parametrize("notebook", STAGES)
def test_stage(pages, notebook, tmp_path):
    check(pages, copied(notebook, tmp_path))


def test_a_page_leaves_nothing_in_the_temporary_folder(pages, tmp_path):
    page, told = tmp_path / "page.ipynb", tmp_path / "told"
    source = f"import tempfile\nfrom pathlib import Path\nPath({str(told)!r}).write_text(tempfile.mkdtemp())"
    nbformat.write(nbformat.v4.new_notebook(cells=[nbformat.v4.new_code_cell(source)]), page)
    check(pages, page)
    assert told.read_text() and not Path(told.read_text()).exists()
