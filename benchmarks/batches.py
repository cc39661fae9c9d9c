"""What a large batch costs with gradient caching: seconds a triple and peak memory, beside small batches in the plain way.

    python benchmarks/batches.py                       # some ten minutes on two cores
    python benchmarks/batches.py --cases 1024/32       # one case alone; the others of the stored result are kept

all-MiniLM-L6-v2, 128 dimensions, queries of 32 tokens, passages of at most 64, one negative a triple drawn by seed, all
in-batch negatives, on the summaries and docstrings of numpy, scipy and scikit-learn. Each case runs `train_colbert` in a
process of its own: "1024/32" is batch_size=1024 with mini_batch_size=32, "32" is batch_size=32 without. Seconds are those
from the beginning of a step to its end, optimizer and all, the median over the steps after the first (the only one of a
large batch). Memory is the highest anonymous memory of the process during the steps, and what of it came after the first
step began. The bars: 1,024 triples take at most 1.7 times the seconds a triple of 32, and no more memory than 32.
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

from hardware import machine

HERE = Path(__file__).parent
CASES = {"32": 8, "128": 3, "128/32": 3, "1024/32": 1}  # steps
BARS = {"seconds_a_triple": 1.7, "memory": 1.0}  # 1024/32 as a multiple of 32


class Memory:
    "The highest anonymous memory of this process so far, in MB, looked at from a thread."

    def __init__(self):
        self.peak, self.going = 0.0, True
        threading.Thread(target=self.watch, daemon=True).start()

    def look(self) -> float:
        line = next(line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith("RssAnon"))
        now = int(line.split()[1]) / 1000
        self.peak = max(self.peak, now)
        return now

    def watch(self) -> None:
        while self.going:
            self.look()
            time.sleep(0.005)


def measure(case: str) -> dict:
    "One case, in this process."
    from transformers import TrainerCallback

    from colbert_nb.corpus import docstring_corpus, minilm_path
    from colbert_nb.data import Examples, TrainingData, make_triples
    from colbert_nb.encoder import ColBERT
    from colbert_nb.training_run import train_colbert

    size, mini = (int(part) if part else None for part in (case + "/").split("/")[:2])
    source = docstring_corpus()
    examples = Examples(source.queries, source.corpus, {q: list(ps) for q, ps in source.qrels.items()})
    data = TrainingData(source.queries, source.corpus, make_triples(examples, num_new_negatives=1), examples.positives, [])
    model = ColBERT.from_pretrained(minilm_path(), device="cpu", init="pca", sample=source.corpus, doc_maxlen=64, query_maxlen=32)
    memory, times, before = Memory(), [], []

    class Clock(TrainerCallback):
        def on_step_begin(self, args, state, control, **options):
            before.append(memory.look())
            if len(before) == 1:
                memory.peak = before[0]
            self.start = time.perf_counter()

        def on_step_end(self, args, state, control, **options):
            times.append(time.perf_counter() - self.start)
            if len(times) == CASES[case]:
                memory.going = False

    with tempfile.TemporaryDirectory() as folder:
        train_colbert(model, data, Path(folder) / "run", batch_size=size, mini_batch_size=mini, maxsteps=CASES[case],
                      learning_rate=2e-5, callbacks=[Clock()], progress=False)
    steady = statistics.median(times[1:] or times)
    return {"case": case, "batch_size": size, "mini_batch_size": mini, "steps": times, "seconds_a_triple": steady / size,
            "peak_mb": memory.peak, "of_the_steps_mb": memory.peak - before[0]}


def table(result: dict) -> str:
    "The stored result as one table; ratios are to the case 32."
    rows = result["rows"]
    base = rows.get("32")
    ratio = lambda row, name: f" ({row[name] / base[name]:.2f})" if base else ""
    lines = ["| batch_size | mini_batch_size | ms a triple | memory of the steps, MB | whole process, MB |", "|" + "---:|" * 5]
    for row in rows.values():
        lines.append(f"| {row['batch_size']:,} | {row['mini_batch_size'] or 'none'} | {1000 * row['seconds_a_triple']:.0f}{ratio(row, 'seconds_a_triple')} "
                     f"| {row['of_the_steps_mb']:.0f}{ratio(row, 'of_the_steps_mb')} | {row['peak_mb']:.0f} |")
    return "\n".join(lines) + f"\n\n{result['processor']}, {result['cores']} cores, Python {result['python']}, {result['date']}"


def main() -> None:
    options = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    options.add_argument("--cases", nargs="+", choices=list(CASES), default=list(CASES))
    options.add_argument("--out", type=Path, default=HERE / "results" / "batches.json")
    options.add_argument("--measure", choices=list(CASES), help=argparse.SUPPRESS)  # in a process of its own
    args = options.parse_args()
    if args.measure:
        print(json.dumps(measure(args.measure)))
        return
    rows = json.loads(args.out.read_bytes())["rows"] if args.out.is_file() else {}
    for case in args.cases:
        done = subprocess.run([sys.executable, __file__, "--measure", case], check=True, stdout=subprocess.PIPE, text=True)
        rows[case] = json.loads(done.stdout.splitlines()[-1])
    result = {"rows": {case: rows[case] for case in CASES if case in rows}, "bars": BARS, "date": datetime.date.today().isoformat(),
              **machine("torch", "transformers")}
    args.out.parent.mkdir(parents=True, exist_ok=True)
    args.out.write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")
    print(table(result))


if __name__ == "__main__":
    main()
