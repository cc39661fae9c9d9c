"""What mining costs by the size of the collection: search, graphs, and whole miners beside one another.

    python benchmarks/mining.py --sizes 10000 100000       # some minutes on two cores
    python benchmarks/mining.py --sizes 1000000            # an hour or more, nearly all of it in building graphs by one thread
    python benchmarks/mining.py --sizes 0                  # the tutorial's corpus alone: real embeddings as a check
    python benchmarks/mining.py --cases exact miner        # some cases alone; the others of the stored result are kept
    python benchmarks/mining.py --folder FOLDER            # keep the made vectors there, for another time

Vectors have 384 dimensions and are made by seed as a mixture of clusters with the mean and the covariance of real ones: those
of all-MiniLM-L6-v2 for the tutorial's corpus (summaries and docstrings of numpy, scipy and scikit-learn, 64 tokens). Topics of
very different size lie in wider topics, and these in wider ones (`LEVELS`): chosen so that, for as many passages as the real ones,
the cosines by rank, the number of directions that the variance fills and the recall of Voyager's defaults are near the real ones.
"shape" in the result sets made and real side by side. 1,000 queries of the same mixture.

Each case runs in a process of its own. `exact`, `voyager`, `float8` and `float32` are this package's indexes: build and query
seconds, recall@100 against exact search. `ragatouille` is Voyager as RAGatouille's SimpleMiner calls it: default M and
ef_construction, all cores, one query at a time, k=110. `miner` and `sentence-transformers` are mining end
to end with embeddings cached in both: ten negatives a query, ranks 10 to 110, the nearest taken, one positive a query (its nearest
passage); the median of five runs after a first one. Memory is the highest anonymous memory of the process, so that memory-mapped
files do not count, and beside it the highest resident memory, in which they do. Growth is the ratio to the size before.
"""

import argparse
import datetime
import json
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from pathlib import Path

import numpy as np
from hardware import machine

HERE = Path(__file__).parent
SIZES, N_QUERIES, DIM = (0, 10_000, 100_000, 1_000_000), 1000, 384
LEVELS = ((3, 0.3), (30, 0.1), (300, 0.1))  # passages a topic, and the part of the covariance that lies between such topics
CASES = ("exact", "voyager", "float8", "float32", "ragatouille", "miner", "sentence-transformers")
BARS = {"recall@100": 0.95, "megabytes": 4000.0, "times as fast as sentence-transformers": {"10000": 1.0, "100000": 2.0}}


class Memory:
    "The highest memory of this process so far, in MB, looked at from a thread: anonymous, and resident in all."

    def __init__(self):
        self.anonymous = self.resident = 0.0
        threading.Thread(target=self.watch, daemon=True).start()

    def look(self) -> None:
        status = dict(line.split(":", 1) for line in Path("/proc/self/status").read_text().splitlines())
        anonymous, resident = (int(status[name].split()[0]) / 1000 for name in ("RssAnon", "VmRSS"))
        self.anonymous, self.resident = max(self.anonymous, anonymous), max(self.resident, resident)

    def watch(self) -> None:
        while True:
            self.look()
            time.sleep(0.01)


def real_vectors(folder: Path) -> tuple[np.ndarray, np.ndarray]:
    "Embeddings of the tutorial's passages and of a thousand of its queries."
    files = [folder / f"real-{name}.npy" for name in ("passages", "queries")]
    if not all(file.is_file() for file in files):
        from sentence_transformers import SentenceTransformer

        from colbert_nb.corpus import docstring_corpus, minilm_path
        from colbert_nb.mining_vectors import embed_texts, model_key

        source = docstring_corpus()
        model = SentenceTransformer(str(minilm_path()), device="cpu")
        model.max_seq_length = 64
        for file, texts in zip(files, (source.corpus, source.queries)):
            np.save(file, embed_texts(model.encode, texts, key=model_key(model), cache=folder / "real", show_progress=True))
    return np.load(files[0]), np.load(files[1])[:N_QUERIES]


def made_vectors(folder: Path, n: int) -> tuple[np.ndarray, np.ndarray]:
    "`n` passages and a thousand queries of one mixture with the mean and covariance of the real ones; n=0: the real ones."
    if not n:
        return real_vectors(folder)
    path = folder / f"made-{n}.npy"
    if not path.is_file():
        real, _ = real_vectors(folder)
        mean = real.mean(axis=0)
        values, directions = np.linalg.eigh(np.cov(real, rowvar=False))
        root = (directions * np.sqrt(np.maximum(values, 0))).T.astype(np.float32)  # (DIM, DIM)
        draw = np.random.default_rng(n)
        groups, scale, inside = [], [], None  # of the finest topics first: each lies in one of the next level
        for size, share in LEVELS:
            n_topics = max(2, n // size)
            weight = 1 / np.sqrt(np.arange(1, n_topics + 1))
            members = n + N_QUERIES if inside is None else inside
            groups.append(draw.choice(n_topics, members, p=weight / weight.sum()))
            scale.append(np.sqrt(share) * draw.standard_normal((n_topics, DIM), dtype=np.float32) @ root)
            inside = n_topics
        rest = np.sqrt(1 - sum(share for _, share in LEVELS))
        part = path.with_suffix(".part")
        rows = np.lib.format.open_memmap(part, "w+", np.float32, (n + N_QUERIES, DIM))
        for start in range(0, len(rows), 50_000):
            block = rows[start : start + 50_000]
            block[:] = mean + rest * draw.standard_normal(block.shape, dtype=np.float32) @ root
            topic = np.arange(start, start + len(block))
            for group, moved in zip(groups, scale):
                topic = group[topic]
                block += moved[topic]
            block /= np.linalg.norm(block, axis=1, keepdims=True)
        rows.flush()
        part.rename(path)
    rows = np.load(path, mmap_mode="r")
    return rows[:n], np.array(rows[n:])


def truth(folder: Path, n: int) -> tuple[np.ndarray, np.ndarray]:
    "Ids and cosines of the 111 nearest passages of each query, by exact search."
    from colbert_nb.mining_index import ExactIndex

    path = folder / f"truth-{n}.npz"
    if not path.is_file():
        vectors, queries = made_vectors(folder, n)
        ids, cosines = ExactIndex(vectors).search(queries, 111)
        np.savez(path, ids=ids, cosines=cosines)
    with np.load(path) as found:
        return found["ids"], found["cosines"]


def shape(folder: Path, n: int) -> dict:
    "What one can compare of two collections of vectors."
    vectors, _ = made_vectors(folder, n)
    cosines = truth(folder, n)[1].mean(axis=0)
    some = np.array(vectors[:: max(1, len(vectors) // 4000)])
    values = np.maximum(np.linalg.eigvalsh(np.cov(some, rowvar=False)), 0)
    return {"cosine at rank 1": float(cosines[0]), "at rank 10": float(cosines[9]), "at rank 100": float(cosines[99]),
            "of any two": float((some * np.roll(some, len(some) // 2, axis=0)).sum(axis=1).mean()), "directions": float(values.sum() ** 2 / (values**2).sum())}


def recall(found: np.ndarray, ids: np.ndarray) -> float:
    return float(np.mean([len(set(f[:100]) & set(t[:100])) / 100 for f, t in zip(found.tolist(), ids.tolist())]))


def measure_index(case: str, folder: Path, n: int) -> dict:
    "One index, in this process: k=110 for all queries, twice; the second search counts. A build that was stopped is timed from there."
    from colbert_nb.mining_graph import VoyagerIndex
    from colbert_nb.mining_index import ExactIndex

    vectors, queries = made_vectors(folder, n)
    memory, kept = Memory(), folder / f"graph-{n}-{case}"
    start, cpu, note, settings = time.perf_counter(), time.process_time(), kept.with_suffix(".json"), kept / "settings.json"
    before = json.loads(settings.read_bytes())["done"] if case != "exact" and settings.is_file() else 0
    if case == "exact":
        index = ExactIndex(vectors)
    else:
        index = VoyagerIndex(vectors, storage="auto" if case == "voyager" else case, folder=kept)
    cost = {"build_s": time.perf_counter() - start, "build_processor_s": time.process_time() - cpu, "build_from": before}
    if note.is_file():  # the graph was there, and this what building it took
        cost = json.loads(note.read_bytes())
    elif case != "exact":
        note.write_text(json.dumps(cost))
    index.search(queries, 110)
    middle = time.perf_counter()
    ids = index.search(queries, 110)[0]
    return {**cost, "query_s": time.perf_counter() - middle,
            "recall@100": recall(ids, truth(folder, n)[0]), "anonymous_mb": memory.anonymous, "resident_mb": memory.resident}


def measure_ragatouille(folder: Path, n: int) -> dict:
    "Voyager with the settings of RAGatouille's SimpleMiner."
    import voyager

    vectors, queries = made_vectors(folder, n)
    vectors = np.array(vectors)  # it holds all embeddings
    memory, start, cpu = Memory(), time.perf_counter(), time.process_time()
    index = voyager.Index(voyager.Space.Cosine, num_dimensions=DIM, storage_data_type=voyager.StorageDataType.Float32)
    index.add_items(vectors, ids=list(range(len(vectors))), num_threads=-1)  # it passes a list, which Voyager 2.2 refuses
    built, cpu = time.perf_counter(), time.process_time() - cpu
    ids = np.array([index.query(query, k=110)[0] for query in queries])
    return {"build_s": built - start, "build_processor_s": cpu, "query_s": time.perf_counter() - built,
            "recall@100": recall(ids, truth(folder, n)[0]), "anonymous_mb": memory.anonymous, "resident_mb": memory.resident}


def texts(n: int, name: str) -> list[str]:
    "`n` texts of some sixty words, each another."
    draw = np.random.default_rng(n)
    words = [f"word{i}" for i in range(5000)]
    numbers = draw.integers(0, len(words), (1000, 60)).tolist()
    stock = [" ".join(words[i] for i in row) for row in numbers]
    return [f"{name} {i} {stock[i % 1000]}" for i in range(n)]


def stored_model(folder: Path, n: int):
    "MiniLM whose answers are looked up among the made vectors, so that both miners find the same embeddings in their caches."
    from sentence_transformers import SentenceTransformer

    from colbert_nb.corpus import minilm_path

    vectors, queries = made_vectors(folder, n)

    class Stored(SentenceTransformer):
        def encode_document(self, texts, **options):
            return np.array(vectors[[int(text.split(" ", 2)[1]) for text in texts]])

        def encode_query(self, texts, **options):
            return np.array(queries[[int(text.split(" ", 2)[1]) for text in texts]])

    return Stored(str(minilm_path()), device="cpu")


def measure_miner(case: str, folder: Path, n: int, runs: int = 5) -> dict:
    "Mining end to end: the embeddings are in the cache after the first run."
    ids, _ = truth(folder, n)
    n_passages = len(made_vectors(folder, n)[0])
    passages, queries = texts(n_passages, "passage"), texts(N_QUERIES, "query")
    known = {q: [int(row[0])] for q, row in enumerate(ids)}
    wanted = ids[:, 11:21]  # the positive is rank 0, ten are passed over
    model = stored_model(folder, n)
    if case == "miner":
        from colbert_nb.mining import HardNegativeMiner

        def mine():
            miner = HardNegativeMiner(model, sampling="top", index="auto", cache=folder / f"cache-ours-{n}", show_progress=False)
            mined = miner.mine(queries, passages, known, n=10)
            return np.array([mined[q] for q in range(len(queries))])
    else:
        from datasets import Dataset
        from sentence_transformers.util import mine_hard_negatives

        rows = Dataset.from_dict({"query": queries, "passage": [passages[known[q][0]] for q in known]})

        def mine():
            found = mine_hard_negatives(rows, model, corpus=passages, range_min=10, range_max=110, num_negatives=10,
                                        sampling_strategy="top", output_format="n-tuple", verbose=False,
                                        cache_folder=str(folder / f"cache-theirs-{n}"))
            return np.array([[int(row[f"negative_{i}"].split(" ", 2)[1]) for i in range(1, 11)] for row in found])
    memory, seconds = Memory(), []
    for _ in range(runs + 1):
        start = time.perf_counter()
        found = mine()
        seconds.append(time.perf_counter() - start)
    return {"first_s": seconds[0], "seconds": seconds[1:], "median_s": statistics.median(seconds[1:]),
            "same_as_exact": float(np.mean(found == wanted)), "anonymous_mb": memory.anonymous, "resident_mb": memory.resident}


def measure(case: str, folder: Path, n: int) -> dict:
    if case == "ragatouille":
        return measure_ragatouille(folder, n)
    if case in ("miner", "sentence-transformers"):
        return measure_miner(case, folder, n)
    return measure_index(case, folder, n)


def table(result: dict) -> str:
    "The stored result as two tables: search, and mining end to end."
    lines = ["| passages | index | build, processor s | growth | 1,000 queries, s | growth | recall@100 | anonymous MB | resident MB |",
             "|---:|---|" + "---:|" * 7]
    rows, before = result["rows"], {}
    for n in result["sizes"]:
        for case in CASES[:5]:
            if row := rows.get(f"{n} {case}"):
                last = before.get(case) if n else None
                growth = [f"{row[name] / last[name]:.1f}" if last and last[name] > 0.001 else "" for name in ("build_processor_s", "query_s")]
                build = f"{row['build_processor_s']:.2f}"
                if row.get("build_from"):
                    build, growth[0] = f"{build}, from {row['build_from']:,} on", ""
                lines.append(f"| {result['passages'][n]:,} | {case} | {build} | {growth[0]} | {row['query_s']:.2f} | {growth[1]} "
                             f"| {row['recall@100']:.4f} | {row['anonymous_mb']:,.0f} | {row['resident_mb']:,.0f} |")
                if int(n):
                    before[case] = row
    lines += ["", "| passages | miner, s | sentence-transformers, s | times as fast | the same negatives | MB | MB of sentence-transformers |",
              "|" + "---:|" * 7]
    for n in result["sizes"]:
        ours, theirs = rows.get(f"{n} miner"), rows.get(f"{n} sentence-transformers")
        if ours and theirs:
            lines.append(f"| {result['passages'][n]:,} | {ours['median_s']:.2f} | {theirs['median_s']:.2f} | {theirs['median_s'] / ours['median_s']:.2f} "
                         f"| {ours['same_as_exact']:.4f}, {theirs['same_as_exact']:.4f} | {ours['anonymous_mb']:,.0f} | {theirs['anonymous_mb']:,.0f} |")
    names = list(next(iter(result["shape"].values())))
    lines += ["", "| vectors | " + " | ".join(names) + " |", "|---|" + "---:|" * len(names)]
    lines += [f"| {'made, ' if int(n) else 'real, '}{result['passages'][n]:,} | " + " | ".join(f"{row[name]:.3g}" for name in names) + " |"
              for n, row in result["shape"].items()]
    return "\n".join(lines) + f"\n\n{result['processor']}, {result['cores']} cores, Python {result['python']}, {result['date']}"


def main() -> None:
    options = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    options.add_argument("--sizes", nargs="+", type=int, default=list(SIZES), help="numbers of passages; 0: the tutorial's corpus")
    options.add_argument("--cases", nargs="+", choices=CASES, default=list(CASES))
    options.add_argument("--folder", type=Path, help="keep made vectors and caches there (some 6 GB for a million passages)")
    options.add_argument("--out", type=Path, default=HERE / "results" / "mining.json")
    options.add_argument("--measure", nargs=2, help=argparse.SUPPRESS)  # a case and a size, in a process of its own
    args = options.parse_args()
    if args.measure:
        case, n = args.measure
        found = shape(args.folder, int(n)) if case == "shape" else measure(case, args.folder, int(n))
        print(json.dumps(found))
        return
    result = json.loads(args.out.read_bytes()) if args.out.is_file() else {"rows": {}, "shape": {}, "passages": {}}
    with tempfile.TemporaryDirectory() as temporary:
        folder = (args.folder or Path(temporary)).resolve()
        folder.mkdir(parents=True, exist_ok=True)

        def apart(case: str, n: int) -> dict:
            command = [sys.executable, __file__, "--measure", case, str(n), "--folder", str(folder)]
            return json.loads(subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True).stdout.splitlines()[-1])

        for n in args.sizes:
            result["shape"][str(n)] = apart("shape", n)
            result["passages"][str(n)] = n or len(real_vectors(folder)[0])
            for case in args.cases:
                result["rows"][f"{n} {case}"] = apart(case, n)
                print(n, case, json.dumps(result["rows"][f"{n} {case}"]), file=sys.stderr, flush=True)
    result |= {"sizes": sorted(result["passages"], key=int), "queries": N_QUERIES, "bars": BARS, "date": datetime.date.today().isoformat(),
               **machine("torch", "voyager", "sentence-transformers", "numpy")}
    args.out.parent.mkdir(parents=True, exist_ok=True)
    args.out.write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")
    print(table(result))


if __name__ == "__main__":
    main()
