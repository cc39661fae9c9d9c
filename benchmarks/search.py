"""Exact and compressed search on the same vectors: recall, quality, latency and bytes.

    python benchmarks/search.py runs/first_colbert/best
    python benchmarks/search.py CHECKPOINT --fast-plaid .venv-plaid/bin/python    # a Python that has fast-plaid
    python benchmarks/search.py CHECKPOINT --only colbert-ai --compile             # its own C++ too, which is compiled for minutes
    python benchmarks/search.py CHECKPOINT --only none                             # prints the stored table

The tutorial's checkpoint, its corpus and its 400 test queries; and, at two bits and with 100 of the queries alone, a made
collection of four times as many passages, copies whose vectors are moved by noise. The model encodes once; every engine gets the
same half-precision vectors, and a process of its own. Recall is against exact MaxSim in single precision over the same passages. Latency is that of one query at a
time on all cores, from its vectors to ids, the median of 100; a build is timed once. Bytes are those on the disk, without ids and
texts. fast-plaid runs where a Python is named that has it: each of its builds needs one PyTorch exactly. nbs/12_search_plaid.ipynb
shows results/search.json; rows that are not measured again are kept.
"""

import argparse
import datetime
import importlib.metadata
import json
import os
import platform
import random
import shutil
import statistics
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import torch

HERE = Path(__file__).parent
OUT = HERE / "results" / "search.json"
BITS = {"docs": (1, 2, 4), "made": (2,)}
QUERIES = {"docs": None, "made": 100}  # how many are searched; None: all
WIDE = {"probes": 8, "candidates": 4096}  # fast-plaid's defaults, for colbert-ai, whose own are fewer
SYSTEMS = ("exact", "colbert-ai", "fast-plaid")
LABELS = ("exact", "colbert-ai", "colbert-ai, 8 probes", "colbert-ai in C++", "colbert-ai in C++, 8 probes", "fast-plaid")
NOISE = 0.05  # standard deviation of what is added to each number of a vector of length 1 in the made copies


def load(folder: Path) -> tuple[np.ndarray, np.ndarray, list[torch.Tensor]]:
    "Vectors, ends and queries that `prepare` wrote."
    ends, lengths = np.load(folder / "ends.npy"), np.load(folder / "query_lengths.npy")
    return np.load(folder / "vectors.npy", mmap_mode="c"), ends, list(torch.from_numpy(np.load(folder / "queries.npy")).split(lengths.tolist()))


def build(job: dict, vectors: np.ndarray, ends: np.ndarray, place: Path) -> tuple[dict, float, int]:
    "Build what the job names: calls that give positions, by label, the seconds of building, and the bytes."
    start = time.perf_counter()
    if job["system"] == "exact":
        from colbert_nb.search_files import IndexFiles

        files = IndexFiles.create(place, vectors.shape[1])
        run = files.begin("vectors", 0)
        files.append_passages(run, vectors, np.diff(ends), [str(i) for i in range(len(ends) - 1)], [b""] * (len(ends) - 1))
        files.commit(run)
        seconds = time.perf_counter() - start
        return {"exact": exact_search(place)}, seconds, files.manifest["sizes"]["vectors"] + files.manifest["sizes"]["offsets"]
    from colbert_nb.search_engines import choose_engine

    engine, calls = choose_engine(job["system"]), {}
    engine.build(place, vectors, ends, job["bits"])
    seconds = time.perf_counter() - start
    engines = {job["system"]: engine}
    if job["system"] == "colbert-ai" and job["compile"]:
        engines["colbert-ai in C++"] = choose_engine("colbert-ai", kernels="c++")
    for label, engine in engines.items():
        calls[label] = positions(engine, engine.open(place), {})
        if job["system"] == "colbert-ai":
            calls[f"{label}, {WIDE['probes']} probes"] = positions(engine, engine.open(place), WIDE)
    return calls, seconds, sum(p.stat().st_size for p in place.rglob("*") if p.is_file())  # opened, since fast-plaid writes files then, too


def positions(engine, opened, settings: dict):
    "A call from a query's vectors to positions."
    return lambda q, k: engine.search(opened, [q], k, **settings)[0][0]


def exact_search(place: Path):
    "`SearchIndex.search` from a query's vectors on: its model is replaced by one that gives them."
    from colbert_nb import search_stored
    from colbert_nb.search import SearchIndex
    from colbert_nb.search_files import IndexFiles

    class Given:
        device, vectors = torch.device("cpu"), None

        def encode_queries(self, texts, **options):
            return [self.vectors]

    model = Given()
    index = SearchIndex.__new__(SearchIndex)
    index.model, index._files, index._keep_texts, index.path = model, IndexFiles.open(place), False, place
    index._ready = lambda: None
    search_stored.StoredIndex._read(index)

    def call(q, k):
        model.vectors = q
        return [int(hit.id) for hit in index.search(["given"], k)[0]]

    return call


def work(job: dict) -> list[dict]:
    "One system on one collection: rows of what is measured."
    vectors, ends, Q = load(Path(job["data"]))
    wanted, place, rows, Q = np.load(Path(job["data"]) / "wanted.npy"), Path(job["place"]), [], Q[: job["queries"]]
    shutil.rmtree(place, ignore_errors=True)
    calls, seconds, size = build(job, vectors, ends, place)
    packages = ("torch", "fast-plaid") if job["system"] == "fast-plaid" else ("torch", "colbert-ai")
    for label, search in calls.items():
        row, runs = {"system": label, "bits": job["bits"]}, {}
        for k in (10, 100):
            runs[k] = [search(q, k) for q in Q]
            row[f"recall@{k}"] = float(np.mean([len(set(ids) & set(best[:k].tolist())) / k for ids, best in zip(runs[k], wanted)]))
        times = []
        for q in Q[:100]:
            start = time.perf_counter()
            search(q, 10)
            times.append(time.perf_counter() - start)
        rows.append(row | {"ms": 1000 * statistics.median(times), "ms, nine of ten": 1000 * statistics.quantiles(times, n=10)[-1],
                           "build, s": seconds, "bytes a passage": size / (len(ends) - 1), "passages": len(ends) - 1, "vectors": int(ends[-1]), "top": runs[10],
                           "python": platform.python_version(), "versions": {name: importlib.metadata.version(name) for name in packages}})
    shutil.rmtree(place)
    return rows


def prepare(checkpoint: str, folder: Path, n_test: int, passages: int | None, copies: int, collections: list[str]) -> dict:
    "Encode once; write vectors, queries and the exact answers of the collections. Returns the judgments of the queries."
    from colbert_nb.corpus import docstring_corpus, split_queries
    from colbert_nb.encoder import ColBERT
    from colbert_nb.scoring import maxsim_packed

    dataset = docstring_corpus()
    test = dataset.select(split_queries(dataset.qrels, {"test": 400, "validation": 40, "train": None}, seed=42)["test"][:n_test])
    kept = list(range(len(dataset.corpus)))
    if passages:
        judged = {p for row in test.qrels.values() for p in row}
        others = random.Random(42).sample([p for p in kept if p not in judged], max(0, passages - len(judged)))
        kept = sorted(judged | set(others))
    place_of = {p: i for i, p in enumerate(kept)}
    qrels = {q: {place_of[p]: grade for p, grade in row.items()} for q, row in test.qrels.items()}
    if not (folder / "encoded.npz").is_file():
        folder.mkdir(parents=True, exist_ok=True)
        model = ColBERT.from_pretrained(checkpoint, device="cpu")
        vectors, counts = model.encode_documents([dataset.corpus[p] for p in kept], packed=True, show_progress=True)
        queries = model.encode_queries(test.queries)
        np.savez(folder / "encoded.npz", vectors=vectors.numpy(), counts=counts.numpy(), queries=torch.cat(list(queries)).float().numpy(),
                 query_lengths=np.array([len(q) for q in queries]))
    stored = {name: torch.from_numpy(array) for name, array in np.load(folder / "encoded.npz").items()}
    for name in collections:
        place, D, lengths = folder / name, stored["vectors"], stored["counts"]
        if (place / "wanted.npy").is_file():
            continue
        if name == "made":
            noise = torch.Generator().manual_seed(0)
            moved = [torch.nn.functional.normalize(D + NOISE * torch.randn(D.shape, generator=noise), dim=1) for _ in range(copies - 1)]
            D, lengths = torch.cat([D, *moved]), lengths.repeat(copies)
        place.mkdir(parents=True, exist_ok=True)
        np.save(place / "vectors.npy", D.half().numpy())
        np.save(place / "ends.npy", np.concatenate([[0], lengths.numpy().cumsum()]))
        np.save(place / "queries.npy", stored["queries"].numpy())
        np.save(place / "query_lengths.npy", stored["query_lengths"].numpy())
        best = [maxsim_packed(q[None], D, lengths)[0].topk(100).indices.tolist() for q in stored["queries"].split(stored["query_lengths"].tolist())]
        np.save(place / "wanted.npy", np.array(best))
    return qrels


def table(result: dict) -> str:
    "The stored result as markdown."
    names = ("collection", "system", "bits", "recall@10", "recall@100", "nDCG@10", "ms a query", "bytes a passage", "build, s")
    lines = ["| " + " | ".join(names) + " |", "|---" * len(names) + "|"]
    for row in result["rows"]:
        quality = f"{row['nDCG@10']:.3f}" if "nDCG@10" in row else ""
        lines.append(f"| {row['collection']} | {row['system']} | {row['bits'] or ''} | {row['recall@10']:.3f} | {row['recall@100']:.3f} | {quality} "
                     f"| {row['ms']:.1f} | {row['bytes a passage']:.0f} | {row['build, s']:.1f} |")
    return "\n".join(lines) + f"\n\n{result['processor']}, {result['cores']} cores, {result['date']}"


def main() -> None:
    options = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    options.add_argument("checkpoint", help="a trained ColBERT, such as the tutorial's; or, with --worker, a job")
    options.add_argument("--only", nargs="*", choices=[*SYSTEMS, "none"], help="systems to measure; the stored rows of the others are kept")
    options.add_argument("--collections", nargs="*", choices=["docs", "made"], default=["docs", "made"])
    options.add_argument("--fast-plaid", metavar="PYTHON", help="a Python that has fast-plaid, numpy and the PyTorch that it needs")
    options.add_argument("--compile", action="store_true", help="measure colbert-ai's C++ beside the functions of torch")
    options.add_argument("--n-test", type=int, default=400, help="test queries; with another number than before, take another --folder")
    options.add_argument("--passages", type=int, help="a sample of the passages, the judged ones among them; likewise; default: all")
    options.add_argument("--copies", type=int, default=4, help="how many times as large the made collection is")
    options.add_argument("--folder", type=Path, default=Path("runs/search"), help="for vectors and indexes; vectors that are there are taken")
    options.add_argument("--out", type=Path, default=OUT)
    options.add_argument("--worker", action="store_true", help=argparse.SUPPRESS)
    args = options.parse_args()
    if args.worker:
        print(json.dumps(work(json.loads(args.checkpoint))))
        return
    from hardware import machine

    from colbert_nb.evaluation import evaluate

    result = json.loads(args.out.read_bytes()) if args.out.is_file() else {"rows": []}
    systems = SYSTEMS if args.only is None else args.only
    judged = {} if systems == ["none"] else prepare(args.checkpoint, args.folder, args.n_test, args.passages, args.copies, args.collections)
    for collection in args.collections:
        for system in systems:
            if system == "none" or system == "fast-plaid" and not args.fast_plaid:
                continue
            for bits in (0,) if system == "exact" else BITS[collection]:
                job = {"system": system, "bits": bits, "data": str(args.folder / collection), "place": str(args.folder / "index"),
                       "compile": args.compile, "queries": QUERIES[collection]}
                python = args.fast_plaid if system == "fast-plaid" else sys.executable
                ran = subprocess.run([python, __file__, json.dumps(job), "--worker"], stdout=subprocess.PIPE, text=True, check=True,
                                     env={**os.environ, "PYTHONPATH": str(HERE.parent)})
                for row in json.loads(ran.stdout.splitlines()[-1]):
                    top, row = row.pop("top"), {"collection": collection, **row, "date": datetime.date.today().isoformat()}
                    if collection == "docs":
                        run = {str(q): {str(p): -float(i) for i, p in enumerate(ids)} for q, ids in enumerate(top)}
                        row["nDCG@10"] = evaluate(run, judged)["nDCG@10"]
                    same = ("collection", "system", "bits")
                    result["rows"] = [old for old in result["rows"] if any(old[key] != row[key] for key in same)] + [row]
                    print(row["system"], bits, {key: round(value, 3) for key, value in row.items() if isinstance(value, float)}, flush=True)
                result["rows"].sort(key=lambda row: (row["collection"], LABELS.index(row["system"]), row["bits"]))
                result |= {"threads": os.environ.get("OMP_NUM_THREADS", "all"), "wide": WIDE, "queries": args.n_test, "copies": args.copies,
                           "date": datetime.date.today().isoformat(), **machine("torch", "transformers", "colbert-ai")}
                args.out.parent.mkdir(parents=True, exist_ok=True)
                args.out.write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")
    print(table(result))


if __name__ == "__main__":
    main()
