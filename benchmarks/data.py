"""What large training data costs: seconds and memory from the folder to the first batch, and to the first optimiser step.

    python benchmarks/data.py                         # 10^5, 10^6 and 10^7 triples; some minutes to make the data
    python benchmarks/data.py --triples 100000        # one size alone
    python benchmarks/data.py --folder FOLDER         # keep the made data there, for another time

The data is made by seed: twenty triples a query, one passage for ten triples, passages of some sixty words; so the largest
size has half a million queries and a million passages. It is written by `export_training_data`, as any data is. Each
size is measured in two processes of their own. One loads the folder, checks the triples, builds the collator and makes
one batch of 32, step by step. The other calls `train_colbert`, which does all this and more, and is stopped after its
first step; the encoder is a tiny random BERT, so that what is measured is the data. Both report the memory that is theirs
alone (anonymous pages: on Linux, from /proc) and the resident memory, in which the mapped files count as far as the
system holds them. "Of the data" is the peak less what the process held before it opened the folder.
"""

import argparse
import datetime
import json
import os
import subprocess
import sys
import tempfile
import threading
import time
from pathlib import Path

from hardware import machine

HERE = Path(__file__).parent
SIZES = (100_000, 1_000_000, 10_000_000)
WORDS = 20_000
BARS = {"seconds": 60.0, "megabytes": 1000.0}  # for ten million triples: to the end of the first step, and of the data


def make_data(folder: Path, n_triples: int) -> Path:
    "Training data of random words, through the package's own export."
    import numpy as np

    from colbert_nb.data import Examples, export_training_data

    draw = np.random.default_rng(n_triples)
    n_queries, n_passages = n_triples // 20, n_triples // 10
    words = [f"word{i}" for i in range(WORDS)]

    def texts(n: int, least: int, most: int, name: str) -> list[str]:
        lengths = draw.integers(least, most, n)
        numbers = iter(draw.integers(0, WORDS, int(lengths.sum())).tolist())
        return [" ".join([*(words[next(numbers)] for _ in range(length)), f"{name}{i}"]) for i, length in enumerate(lengths.tolist())]

    queries, corpus = texts(n_queries, 5, 12, "query"), texts(n_passages, 30, 90, "passage")
    positives = {q: ps for q, ps in enumerate(np.sort(draw.integers(0, n_passages, (n_queries, 2)), 1).tolist())}
    rows = np.empty((n_triples, 3), np.int32)
    rows[:, 0] = draw.permutation(np.arange(n_triples) % n_queries)
    known = np.array(list(positives.values()), np.int32)
    rows[:, 1] = known[rows[:, 0], draw.integers(0, 2, n_triples)]
    rows[:, 2] = draw.integers(0, n_passages, n_triples)
    rows = rows[(known[rows[:, 0]] != rows[:, 2:]).all(1)]
    validation = [{"query": queries[q], "positives": positives[q], "candidates": sorted({*positives[q], *range(q, q + 48)})}
                  for q in range(200)]
    examples = Examples(queries, corpus, {q: sorted(set(ps)) for q, ps in positives.items()})
    return export_training_data(folder, examples, rows, validation=validation)


def make_encoder(folder: Path) -> Path:
    "A random BERT of one small layer, with a word for a token."
    import torch
    from tokenizers import Tokenizer, models, pre_tokenizers, processors
    from transformers import BertConfig, BertModel, PreTrainedTokenizerFast

    special = ["[PAD]", "[unused0]", "[unused1]", "[UNK]", "[CLS]", "[SEP]", "[MASK]"]
    vocabulary = {word: i for i, word in enumerate(special + [f"word{i}" for i in range(WORDS)])}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token="[UNK]"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer.post_processor = processors.TemplateProcessing(
        single="[CLS] $A [SEP]", special_tokens=[(t, vocabulary[t]) for t in ("[CLS]", "[SEP]")])
    PreTrainedTokenizerFast(tokenizer_object=tokenizer, unk_token="[UNK]", pad_token="[PAD]", cls_token="[CLS]",
                            sep_token="[SEP]", mask_token="[MASK]").save_pretrained(folder)
    torch.manual_seed(0)
    BertModel(BertConfig(vocab_size=len(vocabulary), hidden_size=32, num_hidden_layers=1, num_attention_heads=2,
                         intermediate_size=64, max_position_embeddings=256)).save_pretrained(folder)
    return folder


class Memory:
    "Watches this process's memory from a thread: the highest anonymous and resident size so far, in MB."

    def __init__(self):
        self.anonymous, self.resident, self.going = 0.0, 0.0, True
        self.first = self.look()
        self.thread = threading.Thread(target=self.watch, daemon=True)
        self.thread.start()

    def look(self) -> float:
        lines = dict(line.split(":", 1) for line in Path("/proc/self/status").read_text().splitlines() if line.startswith("Rss") or line.startswith("VmRSS"))
        now = {name: int(value.split()[0]) / 1000 for name, value in lines.items()}
        self.anonymous, self.resident = max(self.anonymous, now["RssAnon"]), max(self.resident, now["VmRSS"])
        return now["RssAnon"]

    def watch(self) -> None:
        while self.going:
            self.look()
            time.sleep(0.002)


class Stop(Exception):
    pass


def measure(mode: str, folder: Path, encoder: Path) -> dict:
    "In a process of its own: seconds and MB of each part."
    from colbert_nb.data import load_training_data
    from colbert_nb.encoder import ColBERT
    from colbert_nb.training import TripleCollator
    from colbert_nb.training_run import train_colbert
    from transformers import TrainerCallback

    model = ColBERT.from_pretrained(encoder, dim=16, device="cpu", doc_maxlen=128, init="random")
    memory, start, parts = Memory(), time.perf_counter(), {}

    def part(name: str) -> None:
        parts[name] = {"seconds": time.perf_counter() - start, "anonymous_mb": memory.look() - memory.first}

    if mode == "parts":
        data = load_training_data(folder)
        part("loaded")
        collator = TripleCollator(data, model.tokenizer, chunk_size=8)
        collator.check_negatives()
        part("checked")
        collator(list(range(32)))
        part("first batch")
    else:
        class First(TrainerCallback):
            def on_step_begin(self, args, state, control, **options): part("first step begins")

            def on_step_end(self, args, state, control, **options):
                part("first step done")
                raise Stop

        with tempfile.TemporaryDirectory() as run:
            try: train_colbert(model, folder, Path(run) / "run", batch_size=32, callbacks=[First()], progress=False)
            except Stop: pass
    memory.going = False
    return {"parts": parts, "seconds": list(parts.values())[-1]["seconds"], "before_mb": memory.first,
            "data_mb": memory.anonymous - memory.first, "anonymous_mb": memory.anonymous, "resident_mb": memory.resident}


def main() -> None:
    options = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    options.add_argument("--triples", type=int, nargs="+", default=list(SIZES))
    options.add_argument("--folder", type=Path, help="where the made data is kept; none: a temporary folder")
    options.add_argument("--out", type=Path, default=HERE / "results" / "data.json")
    options.add_argument("--measure", nargs=3, help=argparse.SUPPRESS)  # mode, data, encoder: in a process of its own
    args = options.parse_args()
    if args.measure:
        print(json.dumps(measure(args.measure[0], *map(Path, args.measure[1:]))))
        return
    before = os.getloadavg()[0] if hasattr(os, "getloadavg") else None  # of an idle machine it is near 0
    with tempfile.TemporaryDirectory() as temporary:
        home = (args.folder or Path(temporary)).resolve()
        home.mkdir(parents=True, exist_ok=True)
        encoder, rows = make_encoder(Path(temporary) / "encoder"), []
        for n in args.triples:
            folder = home / str(n)
            if not folder.is_dir():
                print(f"making {n:,} triples", file=sys.stderr)
                subprocess.run([sys.executable, "-c", "import sys; sys.path.insert(0, sys.argv[1]); from data import make_data, Path; "
                                "make_data(Path(sys.argv[2]), int(sys.argv[3]))", str(HERE), str(folder), str(n)], check=True)
            counts = json.loads((folder / "manifest.json").read_bytes())["counts"]
            files = sum(file.stat().st_size for file in folder.iterdir()) / 1e6
            for mode in ("parts", "train"):
                done = subprocess.run([sys.executable, __file__, "--measure", mode, str(folder), str(encoder)], check=True,
                                      stdout=subprocess.PIPE, text=True)
                rows.append({"triples": n, "mode": mode, "counts": counts, "files_mb": files, **json.loads(done.stdout.splitlines()[-1])})
    result = {"rows": rows, "bars": BARS, "date": datetime.date.today().isoformat(), "load_before": before,
              **machine("torch", "transformers", "numpy")}
    args.out.parent.mkdir(parents=True, exist_ok=True)
    args.out.write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")
    print(table(result))


def table(result: dict) -> str:
    "The stored result as one table."
    lines = ["| triples | passages | files, MB | to the first batch, s | to the end of the first step, s | of the data, MB | whole process, MB |", "|" + "---:|" * 7]
    for n in dict.fromkeys(row["triples"] for row in result["rows"]):
        parts, train = (next(r for r in result["rows"] if r["triples"] == n and r["mode"] == mode) for mode in ("parts", "train"))
        lines.append(f"| {n:,} | {parts['counts']['passages']:,} | {parts['files_mb']:.0f} | {parts['seconds']:.1f} | {train['seconds']:.1f} "
                     f"| {train['data_mb']:.0f} | {train['anonymous_mb']:.0f} |")
    return "\n".join(lines) + f"\n\n{result['processor']}, {result['cores']} cores (load {result['load_before']:.1f} before the run), Python {result['python']}, {result['date']}"


if __name__ == "__main__":
    main()
