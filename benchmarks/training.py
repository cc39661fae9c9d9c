"""Training speed, side by side: colbert_nb, colbert-ai's loop, sentence-transformers and PyLate on the same triples.

Every system starts from one checkpoint (all-MiniLM-L6-v2 with a 128-dimensional projection, in colbert-ai's format), gets
the same triples in the same order in batches of the same size, cut to the same lengths, and trains in a process of its
own, in an environment of its own that this script makes from the pins in benchmarks/peers. The processes are loaded
together and take turns, so that a change of the machine's speed meets all of them. What they write is judged by one
evaluator.

    python benchmarks/training.py                           # docstrings of installed packages, no download
    python benchmarks/training.py --data FOLDER             # a collection in BEIR format; its queries are split by seed
    python benchmarks/training.py --modes defaults,same     # and the peers with every flag that ours uses
"""

import argparse
import datetime
import json
import os
import random
import statistics
import subprocess
import sys
from pathlib import Path

import torch
from environments import peer_python
from hardware import cpu_info, machine

from colbert_nb.corpus import RetrievalDataset, docstring_corpus, load_beir, minilm_path, split_queries
from colbert_nb.encoder import ColBERT
from colbert_nb.evaluation import evaluate, search
from colbert_nb.mining import HardNegativeMiner
from colbert_nb.scoring import maxsim

HERE = Path(__file__).parent
SYSTEMS = {"ours": "ours", "colbert-ai": "colbert_ai_loop", "sentence-transformers": "sentence_transformers_trainer", "pylate": "pylate_trainer"}
PINS = {"colbert-ai": "colbert_ai", "sentence-transformers": "sentence_transformers", "pylate": "pylate"}
LABELS = {"ours": "colbert_nb", "colbert-ai": "colbert-ai, its loop", "sentence-transformers": "sentence-transformers, MultiVectorEncoderTrainer", "pylate": "PyLate"}
MODES = {"defaults": "as constructed", "bf16": "with bf16", "same": "with our flags"}


def python_of(
    system: str,
    folder: Path,  # holds the environments
) -> str:  # the interpreter that runs the system
    "The peer's own environment, made with its pins where it is missing or the pins have changed."
    return sys.executable if system == "ours" else peer_python(PINS[system], folder)


def read_data(data: str, n_test: int, seed: int) -> tuple[RetrievalDataset, list[int], list[int]]:  # with train and test queries
    "The collection, and its queries in two parts: none in both, and no passage relevant in both where that can be."
    if data == "docs":
        dataset = docstring_corpus()
        parts = split_queries(dataset.qrels, {"test": n_test, "train": None}, seed=seed)
        return dataset, parts["train"], parts["test"]
    dataset = load_beir(data)
    queries = sorted(dataset.qrels)
    random.Random(seed).shuffle(queries)
    return dataset, sorted(queries[n_test:]), sorted(queries[:n_test])


def mined(dataset: RetrievalDataset, file: Path) -> dict[int, list[int]]:
    "Four hard negatives a query, mined with the encoder that is trained from the first 64 tokens of each passage, kept in a file."
    if not file.is_file():
        from sentence_transformers import SentenceTransformer
        encoder = SentenceTransformer(str(minilm_path()))
        encoder.max_seq_length = 64
        positives = {q: sorted(judged) for q, judged in dataset.qrels.items()}
        file.write_text(json.dumps(HardNegativeMiner(encoder, index="exact").mine(dataset.queries, dataset.corpus, positives, n=4)))
    return {int(q): passages for q, passages in json.loads(file.read_text()).items()}


def write_triples(dataset: RetrievalDataset, queries: list[int], negatives: dict[int, list[int]], file: Path, seed: int) -> int:
    "One row of texts for each judged pair with one of its query's negatives, shuffled once for all systems; their number."
    pairs = [(q, p, i) for q in queries for i, p in enumerate(sorted(dataset.qrels[q])) if negatives[q]]
    random.Random(seed).shuffle(pairs)
    rows = [[dataset.queries[q], dataset.corpus[p], dataset.corpus[negatives[q][i % len(negatives[q])]]] for q, p, i in pairs]
    file.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return len(rows)


def test_pool(dataset: RetrievalDataset, queries: list[int], negatives: dict[int, list[int]], size: int, seed: int) -> list[int]:
    "Passages that every test query ranks: all relevant ones, the mined ones of each query, then any others, up to `size`."
    pool = dict.fromkeys(p for q in queries for p in sorted(dataset.qrels[q]))
    others = random.Random(seed).sample(range(len(dataset.corpus)), len(dataset.corpus))
    for p in [p for q in queries for p in negatives[q]] + others:
        if len(pool) < size:
            pool.setdefault(p)
    return sorted(pool)


class Judge:
    "One evaluator for what all systems write: nDCG@10 of test queries over a pool, and the loss over test triples."

    def __init__(self, dataset: RetrievalDataset, queries: list[int], pool: list[int], held_out: list[list[str]], batch_size: int):
        place = {p: i for i, p in enumerate(pool)}
        self.queries, self.corpus = [dataset.queries[q] for q in queries], [dataset.corpus[p] for p in pool]
        self.qrels = {i: {place[p]: g for p, g in dataset.qrels[q].items() if p in place} for i, q in enumerate(queries)}
        self.held_out, self.batch_size = held_out, batch_size

    def __call__(self, checkpoint: Path, **lengths) -> dict[str, float | None]:
        "`loss` is the softmax of a test query's positive among all passages of a batch of test triples."
        model = ColBERT.from_pretrained(checkpoint, **lengths)
        run = search(model, self.queries, self.corpus, k=10, show_progress=False)
        losses = []
        for start in range(0, len(self.held_out) - self.batch_size + 1, self.batch_size):
            rows = self.held_out[start:start + self.batch_size]
            Q = torch.nn.utils.rnn.pad_sequence(model.encode_queries([q for q, *_ in rows]), batch_first=True)
            D = model.encode_documents([p for _, *ps in rows for p in ps])
            keep = torch.nn.utils.rnn.pad_sequence([torch.ones(len(d), dtype=torch.bool) for d in D], batch_first=True)
            scores = maxsim(Q, torch.nn.utils.rnn.pad_sequence(D, batch_first=True), None, keep)
            losses.append(float(torch.nn.functional.cross_entropy(scores, torch.arange(len(rows)) * (len(rows[0]) - 1))))
        return {"nDCG@10": evaluate(run, self.qrels, ["nDCG@10"])["nDCG@10"], "loss": statistics.mean(losses) if losses else None}


class Runner:
    "A system in a process of its own, which trains when told to."

    def __init__(self, python: str, system: str, job: dict):
        Path(job["out"]).mkdir(parents=True, exist_ok=True)
        environment = {k: v for k, v in os.environ.items() if k != "PYTHONPATH"}
        if system == "ours":
            environment["PYTHONPATH"] = os.pathsep.join(p for p in sys.path if p)
        environment |= {"HF_HUB_OFFLINE": "1", "TOKENIZERS_PARALLELISM": "false", "GIT_PYTHON_REFRESH": "quiet"}
        if job["same_flags"]:  # what colbert_nb asks of the C library while it trains
            environment |= {"MALLOC_MMAP_THRESHOLD_": str(2**30), "MALLOC_TRIM_THRESHOLD_": str(2**31 - 1)}
        self.log = Path(job["out"]) / "log.txt"
        self.process = subprocess.Popen([python, str(HERE / "peers" / f"{SYSTEMS[system]}.py"), json.dumps(job)], text=True, env=environment,
                                        stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=self.log.open("w"))

    def event(self) -> dict:
        "The next event. Raises RuntimeError with the end of the log where the process has died."
        line = self.process.stdout.readline()
        if not line:
            raise RuntimeError(f"{self.log.parent.name} ended with {self.process.wait()}:\n{self.log.read_text()[-2000:]}")
        return json.loads(line)

    def go(self) -> dict:
        "One round of training, and its event."
        self.process.stdin.write("go\n")
        self.process.stdin.flush()
        return self.event()

    def stop(self) -> None:
        self.process.kill()
        self.process.wait()


def hardware() -> dict:
    "What the run was made on."
    info, here = cpu_info(), machine()
    family = f" (family {info['cpu family']}, model {info['model']})" if {"cpu family", "model"} <= set(info) else ""
    memory = Path("/proc/meminfo")
    wanted = ("avx2", "avx512f", "avx512_bf16", "amx_tile", "amx_bf16")
    return {"processor": here["processor"] + family, "cores": here["cores"],
            "instructions": [x for x in wanted if x in info.get("flags", "").split()],
            "memory_gb": round(int(memory.read_text().split()[1]) / 2**20, 1) if memory.is_file() else None,
            "gpu": torch.cuda.get_device_name(0) if torch.cuda.is_available() else None}


def has_bf16() -> bool:
    "Whether bfloat16 products are made in hardware here."
    if torch.cuda.is_available():
        return torch.cuda.get_device_capability()[0] >= 8
    return any(getattr(torch.cpu, name, bool)() for name in ("_is_avx512_bf16_supported", "_is_amx_tile_supported"))


def measure(systems: list[str], mode: str, pythons: dict[str, str], job: dict, work: Path) -> dict[str, dict]:
    "All systems loaded together, a round each in turn: what each said at its end. Ours runs as it is constructed but for bf16."
    runners, results = {}, {}
    try:
        for system in systems:
            own = job | {"out": str(work / "runs" / f"{system}-{mode}"), "bf16": mode == "bf16", "same_flags": mode == "same"}
            runners[system] = Runner(pythons[system], system, own)
        for system in systems:
            results[system] = runners[system].event()
        first = results[systems[0]]["scores"]
        for system, result in results.items():
            if not torch.allclose(torch.tensor(first), torch.tensor(result["scores"]), rtol=1e-4, atol=1e-4):
                raise RuntimeError(f"expected the scores of {systems[0]} before training, {first}, got {result['scores']} from {system}")
        for number in range(job["rounds"]):
            for system in systems[number % len(systems):] + systems[:number % len(systems)]:
                event = runners[system].go()
                print(f"{system} ({mode}): {event['steps']} steps in {event['used']:.0f} s", file=sys.stderr)
                if number == job["rounds"] - 1:
                    results[system] |= runners[system].event()
    finally:
        for runner in runners.values():
            runner.stop()
    return results


def markdown(rows: list[dict], loss_step: int, seconds: float) -> str:
    "The table."
    head = ["system", "settings", "triplets/s", "ours is faster by", "s/step", "peak memory, MB", f"loss after {loss_step} steps",
            "steps", f"nDCG@10 after {seconds:.0f} s"]
    lines = ["| " + " | ".join(head) + " |", "| --- | --- |" + " ---: |" * (len(head) - 2)]
    for row in rows:
        lines.append("| " + " | ".join([
            LABELS[row["system"]], MODES[row["mode"]], f"{row['triplets_per_second']:.2f}", f"{row['ours_is_faster_by']:.2f}",
            f"{row['seconds_per_step']:.2f}", f"{row['peak_mb']:.0f}", f"{row['loss']:.3f}" if row["loss"] else "-", str(row["steps"]), f"{row['nDCG@10']:.3f}"]) + " |")
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0], formatter_class=argparse.ArgumentDefaultsHelpFormatter)
    parser.add_argument("--data", default="docs", help="docs, or a folder in BEIR format")
    parser.add_argument("--systems", default=",".join(SYSTEMS), help="which of " + ", ".join(SYSTEMS))
    parser.add_argument("--modes", default="defaults", help="which of " + ", ".join(MODES))
    parser.add_argument("--bf16", choices=("auto", "on", "off"), default="auto", help="auto: the mode bf16 where the processor has it")
    parser.add_argument("--doc-maxlen", type=int, default=180)
    parser.add_argument("--query-maxlen", type=int, default=32)
    parser.add_argument("--batch-size", type=int, default=16)
    parser.add_argument("--learning-rate", type=float, default=5e-5)
    parser.add_argument("--rounds", type=int, default=3, help="turns of each system")
    parser.add_argument("--seconds", type=float, default=30, help="training time of a turn")
    parser.add_argument("--warmup", type=int, default=3, help="first steps that the median leaves out")
    parser.add_argument("--loss-step", type=int, default=8, help="after how many steps the loss is compared")
    parser.add_argument("--test-queries", type=int, default=200)
    parser.add_argument("--pool", type=int, default=800, help="passages that the test queries rank")
    parser.add_argument("--seed", type=int, default=42)
    parser.add_argument("--envs", type=Path, default=HERE / ".envs")
    parser.add_argument("--work", type=Path, default=HERE / ".work")
    parser.add_argument("--out", type=Path, help="default: benchmarks/results/training_DATA.json")
    parser.add_argument("--phase", choices=("all", "prepare", "measure", "report"), default="all",
                        help="prepare: environments, triples and checkpoint; measure: time and train; report: judge and print")
    args = parser.parse_args()

    name = "docs" if args.data == "docs" else Path(args.data).name
    work = args.work / f"{name}-{args.doc_maxlen}"
    work.mkdir(parents=True, exist_ok=True)
    systems = args.systems.split(",")
    pythons = {system: python_of(system, args.envs) for system in systems}
    dataset, train, test = read_data(args.data, args.test_queries, args.seed)
    negatives = mined(dataset, args.work / f"mined-{name}.json")
    n_triples = write_triples(dataset, train, negatives, work / "triples.jsonl", args.seed)
    write_triples(dataset, test, negatives, work / "held_out.jsonl", args.seed)
    held_out = [json.loads(line) for line in (work / "held_out.jsonl").open(encoding="utf-8")][:4 * args.batch_size]
    lengths = {"query_maxlen": args.query_maxlen, "doc_maxlen": args.doc_maxlen}
    if not (work / "initial").is_dir():
        ColBERT.from_pretrained(minilm_path(), dim=128, init="pca", sample=dataset.corpus, seed=args.seed, **lengths).save_pretrained(work / "initial")
    if args.phase == "prepare":
        return

    modes = [m for m in args.modes.split(",") if m != "bf16" or args.bf16 == "on" or args.bf16 == "auto" and has_bf16()]
    job = {"checkpoint": str(work / "initial"), "triples": str(work / "triples.jsonl"), **lengths, "batch_size": args.batch_size,
           "learning_rate": args.learning_rate, "schedule": "constant_with_warmup", "warmup_steps": 5, "epochs": 10, "max_steps": None,
           "seconds": args.seconds, "rounds": args.rounds, "loss_step": args.loss_step, "save_every": None, "seed": args.seed,
           "device": "cuda" if torch.cuda.is_available() else "cpu", "options": {}}
    for mode in modes if args.phase != "report" else ():
        (work / f"raw-{mode}.json").write_text(json.dumps(measure(systems, mode, pythons, job, work)))
    if args.phase == "measure":
        return

    judge = Judge(dataset, test, test_pool(dataset, test, negatives, args.pool, args.seed), held_out, args.batch_size)
    rows = []
    for mode in modes:
        raw = json.loads((work / f"raw-{mode}.json").read_text())
        seconds = {system: statistics.median(result["seconds"][args.warmup:]) for system, result in raw.items()}
        for system, result in raw.items():
            folder, steady = work / "runs" / f"{system}-{mode}", result["seconds"][args.warmup:]
            rows.append({
                "system": system, "mode": mode, "seconds_per_step": seconds[system], "triplets_per_second": args.batch_size / seconds[system],
                "ours_is_faster_by": seconds[system] / seconds["ours"], "fastest_step": min(steady), "slowest_step": max(steady),
                "steps": len(result["seconds"]), "trained_seconds": result["used"], "peak_mb": result["peak_mb"],
                "loaded_mb": result["loaded_mb"], "threads": result["threads"],
                "loss": judge(folder / "loss_step", **lengths)["loss"] if (folder / "loss_step").is_dir() else None,
                "nDCG@10": judge(folder / "final", **lengths)["nDCG@10"], "versions": result["versions"], "all_seconds": result["seconds"],
                "cpu_seconds_per_step": statistics.median(result["cpu"][args.warmup:]) if "cpu" in result else None})
    before = judge(work / "initial", **lengths)
    settings = {k: str(v) if isinstance(v, Path) else v for k, v in vars(args).items() if k not in ("envs", "work", "out", "phase", "data")}
    settings |= {k: job[k] for k in ("schedule", "warmup_steps", "device")} | {"triples": n_triples, "test_queries": len(test), "passages": len(dataset.corpus)}
    here = machine("colbert-nb", "torch", "transformers")
    result = {"data": name, "date": datetime.date.today().isoformat(), "hardware": hardware(), "settings": settings,
              "bf16": "measured" if "bf16" in modes else "left out: no bf16 instructions" if not has_bf16() else "not asked for",
              "versions": {"python": here["python"]} | here["versions"],
              "before_training": before, "rows": rows}
    out = args.out or HERE / "results" / f"training_{name}.json"
    out.parent.mkdir(parents=True, exist_ok=True)
    out.write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")
    print(markdown(rows, args.loss_step, args.seconds * args.rounds))
    print(f"\nBefore training: nDCG@10 {before['nDCG@10']:.3f}, loss {before['loss']:.3f}. bf16: {result['bf16']}.")


if __name__ == "__main__":
    main()
