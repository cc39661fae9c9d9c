"""The checkpoints that every loader is given, all written by `ColBERT.save_pretrained`, and the texts that they encode."""

import json
import random
import shutil
import sys
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

import torch
from safetensors.torch import save_file
from transformers import AutoModel, AutoTokenizer

from colbert_nb.corpus import docstring_corpus, minilm_path, split_queries
from colbert_nb.encoder import ColBERT
from colbert_nb.encoder_loaders import PYLATE_FILES

sys.path.insert(0, str(Path(__file__).parent.parent))
import test_backbones  # noqa: E402  tiny encoders of every family

N_QUERIES, N_PASSAGES, SEED = 200, 1000, 42
TUTORIAL_SPLIT = {"test": 400, "validation": 40, "train": None}  # as in nbs/tutorials/first_colbert.ipynb


@dataclass
class Checkpoint:
    "A saved model with the texts that every loader encodes."
    name: str
    path: Path
    queries: list[str]
    documents: list[str]
    qrels: dict[int, dict[int, int]] = field(default_factory=dict)  # empty: nothing is judged
    search: bool = False  # also index the passages in the libraries that have an index
    scored: int = 20  # queries whose MaxSim each library computes itself
    loaders: tuple[str, ...] = ()  # the libraries that are asked; empty: all
    settings: dict = field(default_factory=dict)  # what its artifact.metadata says

    def __post_init__(self):
        self.settings = json.loads((self.path / "artifact.metadata").read_text(encoding="utf-8"))


def test_collection() -> tuple[list[str], list[str], dict[int, dict[int, int]]]:
    "Queries that the tutorial tests with, passages with all that are relevant among them, and the judgments."
    dataset = docstring_corpus()
    chosen = split_queries(dataset.qrels, TUTORIAL_SPLIT, seed=SEED)["test"][:N_QUERIES]
    pool = dict.fromkeys(p for q in chosen for p in sorted(dataset.qrels[q]))
    for p in random.Random(SEED).sample(range(len(dataset.corpus)), len(dataset.corpus)):
        if len(pool) < N_PASSAGES:
            pool.setdefault(p)
    place = {p: i for i, p in enumerate(sorted(pool))}
    qrels = {i: {place[p]: grade for p, grade in dataset.qrels[q].items()} for i, q in enumerate(chosen)}
    return [dataset.queries[q] for q in chosen], [dataset.corpus[p] for p in place], qrels


def real_checkpoints(folder: Path, trained: Path | None, wanted: Callable[[str], bool]) -> list[Checkpoint]:
    "MiniLM with and without query expansion and, where there is one, a trained checkpoint; of them those whose names are wanted."
    queries, documents, qrels = test_collection()
    fresh = lambda **options: ColBERT.from_pretrained(minilm_path(), dim=128, init="pca", sample=docstring_corpus().corpus, doc_maxlen=64,
                                                      device="cpu", **options)
    names, bare = ["MiniLM, no query expansion", "MiniLM, query expansion", *["trained"] * (trained is not None)], "trained, artifact.metadata alone"
    made = []
    for name in filter(wanted, names):
        model = ColBERT.from_pretrained(trained, device="cpu") if name == "trained" else fresh(query_expansion="no query" not in name)
        path = model.save_pretrained(folder / name)
        few = slice(0, 20), slice(0, 100)
        made.append(Checkpoint(name, path, queries[few[0]], documents[few[1]]) if "no query" in name else
                    Checkpoint(name, path, queries, documents, qrels, search=name == names[-1]))
    if made and made[-1].name == "trained" and wanted(bare) and (made[-1].path / "modules.json").is_file():
        shutil.rmtree(folder / bare, ignore_errors=True)
        shutil.copytree(made[-1].path, folder / bare, ignore=shutil.ignore_patterns(*PYLATE_FILES))
        made.append(Checkpoint(bare, folder / bare, queries, documents, qrels, loaders=("PyLate", "sentence-transformers")))
    return made


def pylate_folder(encoder: Path, folder: Path) -> Path:
    "A folder as PyLate saves it: its markers hold a blank, and are no special tokens."
    tokenizer, model = AutoTokenizer.from_pretrained(encoder), AutoModel.from_pretrained(encoder)
    tokenizer.add_tokens(["[Q] ", "[D] "])
    model.resize_token_embeddings(len(tokenizer), mean_resizing=False)
    tokenizer.save_pretrained(folder)
    model.save_pretrained(folder)
    (folder / "1_Dense").mkdir()
    torch.manual_seed(SEED)
    hidden, identity = model.config.hidden_size, "torch.nn.modules.linear.Identity"
    save_file({"linear.weight": torch.randn(16, hidden)}, folder / "1_Dense/model.safetensors", metadata={"format": "pt"})
    parts = [("", "sentence_transformers.models.Transformer"), ("1_Dense", "pylate.models.Dense.Dense")]
    dense = {"in_features": hidden, "out_features": 16, "bias": False, "activation_function": identity}
    settings = {"model_type": "ColBERT", "prompts": {}, "query_prefix": "[Q] ", "document_prefix": "[D] ", "query_length": 32, "document_length": 48,
                "do_query_expansion": True}
    modules = [{"idx": i, "name": str(i), "path": path, "type": kind} for i, (path, kind) in enumerate(parts)]
    for name, content in (("1_Dense/config.json", dense), ("modules.json", modules), ("config_sentence_transformers.json", settings)):
        (folder / name).write_text(json.dumps(content), encoding="utf-8")
    return folder


def tiny_checkpoints(folder: Path, wanted: Callable[[str], bool]) -> list[Checkpoint]:
    "Small random encoders of every family, with tokenizers trained on the spot, and settings that are rare."
    queries = [text for text in test_backbones.QUERIES if text]
    documents = [text for text in [*test_backbones.DOCUMENTS, *test_backbones.TEXTS] if text]
    encoders = {family: test_backbones.make(family, folder / f"{family} encoder") for family in test_backbones.FAMILIES}
    config = json.loads((encoders["modernbert"] / "config.json").read_text(encoding="utf-8"))
    encoders["modernbert, narrow window"] = Path(shutil.copytree(encoders["modernbert"], folder / "narrow encoder", dirs_exist_ok=True))
    (encoders["modernbert"] / "config.json").write_text(json.dumps(config | {"local_attention": 128}), encoding="utf-8")  # as published
    fresh = lambda family, **options: test_backbones.fresh(encoders[family], query_maxlen=32, doc_maxlen=48, **options)
    models = {f"tiny {family}": fresh(family) for family in encoders}
    models["tiny roberta, no query expansion"] = fresh("roberta", query_expansion=False)
    models["tiny bert, masks attended"] = fresh("bert", attend_to_mask_tokens=True)
    models["tiny bert, punctuation scored"] = fresh("bert", mask_punctuation=False)
    shutil.rmtree(folder / "of PyLate", ignore_errors=True)
    models["tiny bert of PyLate"] = ColBERT.from_pretrained(pylate_folder(encoders["bert"], folder / "of PyLate"), device="cpu")
    return [Checkpoint(name, model.save_pretrained(folder / name), queries, documents) for name, model in models.items() if wanted(name)]
