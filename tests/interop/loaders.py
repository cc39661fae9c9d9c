"""Loads checkpoints in one library and writes what it computes: run by run.py in that library's own environment.

    python loaders.py JOB.json

The job names the loader, the checkpoints with their texts, and a folder for the results. For each checkpoint there is a
file of vectors and scores, or of the error that the library raised instead. Nothing of colbert_nb is imported here."""

import contextlib
import importlib.metadata
import json
import os
import sys
import traceback
from pathlib import Path

import numpy as np

RESULTS = os.fdopen(os.dup(1), "w")
os.dup2(2, 1)  # what a library prints goes to the log


class ColbertAI:
    "colbert-ai's Checkpoint. On transformers 5 its class lacks two things that `from_pretrained` asks for; they are put in."
    packages = ("colbert-ai", "transformers", "torch")

    def __init__(self, path: str):
        import colbert.modeling.base_colbert as base
        from colbert.infra import ColBERTConfig
        from colbert.modeling.checkpoint import Checkpoint
        from colbert.modeling.colbert import ColBERT
        released = getattr(base.class_factory, "released", base.class_factory)

        def mended(name: str):
            made = released(name)
            made.all_tied_weights_keys, made._keys_to_ignore_on_load_unexpected = {}, {"cls"}
            return made

        mended.released = released
        base.class_factory = mended
        ColBERT.loaded_extensions = True  # its C++ extension serves the index, not the encoder
        self.model = Checkpoint(path, colbert_config=ColBERTConfig.load_from_checkpoint(path), verbose=0)

    def queries(self, texts: list[str]) -> list[np.ndarray]:
        return [vectors.numpy() for vectors in self.model.queryFromText(texts, bsize=32)]

    def documents(self, texts: list[str]) -> list[np.ndarray]:
        return [vectors.numpy() for vectors in self.model.docFromText(texts, bsize=32, keep_dims=False)[0]]

    def scores(self, queries: list[np.ndarray], documents: list[np.ndarray]) -> np.ndarray:
        import torch
        from colbert.modeling.colbert import colbert_score
        padded = torch.nn.utils.rnn.pad_sequence([torch.tensor(d) for d in documents], batch_first=True)
        kept = torch.arange(padded.shape[1]) < torch.tensor([len(d) for d in documents])[:, None]
        return np.stack([colbert_score(torch.tensor(q)[None], padded, kept.unsqueeze(-1), config=self.model.colbert_config).numpy() for q in queries])


class RAGatouille(ColbertAI):
    "RAGatouille's RAGPretrainedModel, on transformers 4, where nothing has to be mended."
    packages = ("RAGatouille", *ColbertAI.packages)
    kept: list = []  # one that is deleted ends the settings of the newest

    def __init__(self, path: str):
        from ragatouille import RAGPretrainedModel
        self.rag = RAGPretrainedModel.from_pretrained(path, verbose=0, index_root="ragatouille")
        self.kept.append(self.rag)
        self.model = self.rag.model.inference_ckpt

    def search(self, queries: list[str], documents: list[str], doc_maxlen: int, vectors) -> list[list[int]]:
        ids = [str(number) for number in range(len(documents))]
        self.rag.index(collection=documents, document_ids=ids, index_name="passages", max_document_length=doc_maxlen, split_documents=False)
        return [[int(found["document_id"]) for found in self.rag.search(query, k=10)] for query in queries]


class PyLate:
    "PyLate's models.ColBERT."
    packages = ("pylate", "fast-plaid", "sentence-transformers", "transformers", "torch")

    def __init__(self, path: str):
        from pylate import models
        self.model = models.ColBERT(path, device="cpu")

    def queries(self, texts: list[str]) -> list[np.ndarray]:
        return self.model.encode(texts, is_query=True, show_progress_bar=False)

    def documents(self, texts: list[str]) -> list[np.ndarray]:
        return self.model.encode(texts, is_query=False, show_progress_bar=False)

    def scores(self, queries: list[np.ndarray], documents: list[np.ndarray]) -> np.ndarray:
        from pylate import rank
        ids = list(range(len(documents)))
        ranked = rank.rerank([ids] * len(queries), queries, [documents] * len(queries))
        return np.array([[score for _, score in sorted((found["id"], float(found["score"])) for found in row)] for row in ranked])

    def search(self, queries: list[str], documents: list[str], doc_maxlen: int, vectors) -> list[list[int]]:
        from pylate import indexes, retrieve
        index = indexes.PLAID(index_folder="pylate", index_name="passages", override=True, device="cpu", show_progress=False)
        index.add_documents([str(number) for number in range(len(documents))], vectors[1])
        return [[int(found["id"]) for found in row] for row in retrieve.ColBERT(index=index).retrieve(vectors[0], k=10)]


class SentenceTransformers:
    "sentence-transformers' MultiVectorEncoder."
    packages = ("sentence-transformers", "transformers", "torch")

    def __init__(self, path: str):
        from sentence_transformers import MultiVectorEncoder
        self.model = MultiVectorEncoder(path, device="cpu")

    def queries(self, texts: list[str]) -> list[np.ndarray]:
        return [vectors.numpy() for vectors in self.model.encode_query(texts, show_progress_bar=False)]

    def documents(self, texts: list[str]) -> list[np.ndarray]:
        return [vectors.numpy() for vectors in self.model.encode_document(texts, show_progress_bar=False)]

    def scores(self, queries: list[np.ndarray], documents: list[np.ndarray]) -> np.ndarray:
        import torch
        return self.model.similarity([torch.tensor(q) for q in queries], [torch.tensor(d) for d in documents]).numpy()


LOADERS = {"colbert-ai": ColbertAI, "RAGatouille": RAGatouille, "PyLate": PyLate, "sentence-transformers": SentenceTransformers}


def load_and_encode(kind: type, checkpoint: dict, out: Path) -> None:
    "Vectors of one checkpoint, scores of its first queries and, where asked for, what the index of the library finds."
    loaded = kind(checkpoint["path"])
    queries, documents = loaded.queries(checkpoint["queries"]), loaded.documents(checkpoint["documents"])
    rows = checkpoint["scored"]
    arrays = {"queries": np.concatenate(queries), "query_lengths": [len(q) for q in queries], "documents": np.concatenate(documents),
              "document_lengths": [len(d) for d in documents], "scores": loaded.scores(queries[:rows], documents)}
    if checkpoint["search"] and hasattr(loaded, "search"):
        found = loaded.search(checkpoint["queries"], checkpoint["documents"], checkpoint["doc_maxlen"], (queries, documents))
        arrays["found"] = [row + [-1] * (10 - len(row)) for row in found]
    part = out.with_suffix(f".{os.getpid()}.npz")
    np.savez(part, **{name: np.asarray(array) for name, array in arrays.items()})
    part.replace(out)


def main() -> None:
    job = json.loads(Path(sys.argv[1]).read_text(encoding="utf-8"))
    os.chdir(job["out"])
    kind = LOADERS[job["loader"]]
    versions = {name: importlib.metadata.version(name) for name in kind.packages}
    for checkpoint in job["checkpoints"]:
        said, file = None, Path(job["out"]) / f"{checkpoint['name']}.npz"
        try:
            if not file.is_file() or file.stat().st_mtime < (Path(checkpoint["path"]) / "config.json").stat().st_mtime:
                load_and_encode(kind, checkpoint, file)
        except Exception as error:  # whatever it says is what the table shows
            traceback.print_exc()
            said = f"{type(error).__name__}: {error}"
        print(json.dumps({"checkpoint": checkpoint["name"], "error": said, "versions": versions}), file=RESULTS, flush=True)


if __name__ == "__main__":
    with contextlib.redirect_stdout(sys.stderr):
        main()
    RESULTS.flush()
    os._exit(0)  # RAGatouille leaves processes and contexts behind that complain while Python ends
