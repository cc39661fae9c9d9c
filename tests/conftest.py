"""Nothing here reaches a network, and two test processes share the cores."""

import os
from pathlib import Path

import pytest

os.environ["HF_HUB_OFFLINE"] = "1"  # read by the Hub's client when it is imported
if "PYTEST_XDIST_WORKER" in os.environ:
    os.environ.setdefault("OMP_NUM_THREADS", str(max(1, (os.cpu_count() or 2) // 2)))


@pytest.hookimpl(tryfirst=True)
def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    "A file's tests stay in one process, since they share what it prepares; notebooks go to whichever process is free."
    for item in items:
        if item.path.name != "test_notebooks.py":
            item.add_marker(pytest.mark.xdist_group(item.path.stem))


@pytest.fixture(scope="session")
def encoder(tmp_path_factory) -> Path:
    "A random BERT of two small layers, with a word tokenizer."
    from tiny import make_encoder
    return make_encoder(tmp_path_factory.mktemp("tiny"))


@pytest.fixture
def model(encoder):
    "A fresh ColBERT on `encoder`."
    from tiny import fresh
    return fresh(encoder)


@pytest.fixture
def data():
    from tiny import made_data
    return made_data()
