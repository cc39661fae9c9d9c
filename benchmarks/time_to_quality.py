"""The time that colbert_nb needs to reach the quality that a peer has after all its steps.

Both train on the same triples in the same order from the same checkpoint, as in training.py, and one evaluator judges the
weights after every few steps. The time of a step is the median of all steps of a system, so that time = steps * median;
`--speed` takes these medians from a result of training.py instead, made with the same lengths on an idle machine.
On a collection in BEIR format the queries are dealt into folds: each fold is tested once, by models trained on the others.

    python benchmarks/time_to_quality.py --data docs --speed benchmarks/results/training_docs.json
    python benchmarks/time_to_quality.py --data FOLDER --folds 5
"""

import argparse
import datetime
import json
import random
import statistics
import sys
from pathlib import Path

from training import HERE, LABELS, SYSTEMS, Judge, Runner, hardware, mined, python_of, read_data, test_pool, write_triples

from colbert_nb.corpus import minilm_path
from colbert_nb.encoder import ColBERT


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0], formatter_class=argparse.ArgumentDefaultsHelpFormatter)
    parser.add_argument("--data", default="docs", help="docs, or a folder in BEIR format")
    parser.add_argument("--peers", default="pylate", help="which of " + ", ".join(s for s in SYSTEMS if s != "ours"))
    parser.add_argument("--folds", type=int, default=1, help="folds by query; 1: one split with --test-queries")
    parser.add_argument("--steps", type=int, default=60, help="steps of each system")
    parser.add_argument("--every", type=int, default=10, help="steps between two judgments")
    parser.add_argument("--doc-maxlen", type=int, default=64)
    parser.add_argument("--query-maxlen", type=int, default=32)
    parser.add_argument("--batch-size", type=int, default=16)
    parser.add_argument("--learning-rate", type=float, default=5e-5)
    parser.add_argument("--test-queries", type=int, default=200)
    parser.add_argument("--pool", type=int, default=400, help="passages that the test queries rank; more where more are relevant")
    parser.add_argument("--seed", type=int, default=42)
    parser.add_argument("--speed", type=Path, help="a result of training.py with the seconds a step")
    parser.add_argument("--envs", type=Path, default=HERE / ".envs")
    parser.add_argument("--work", type=Path, default=HERE / ".work")
    parser.add_argument("--out", type=Path, help="default: benchmarks/results/training_quality_DATA.json")
    args = parser.parse_args()

    name = "docs" if args.data == "docs" else Path(args.data).name
    work = args.work / f"{name}-{args.doc_maxlen}"
    systems = ["ours", *args.peers.split(",")]
    pythons = {system: python_of(system, args.envs) for system in systems}
    dataset, train, test = read_data(args.data, args.test_queries, args.seed)
    negatives, lengths = mined(dataset, args.work / f"mined-{name}.json"), {"query_maxlen": args.query_maxlen, "doc_maxlen": args.doc_maxlen}
    if not (work / "initial").is_dir():
        work.mkdir(parents=True, exist_ok=True)
        ColBERT.from_pretrained(minilm_path(), dim=128, init="pca", sample=dataset.corpus, seed=args.seed, **lengths).save_pretrained(work / "initial")
    splits = [(train, test)]
    if args.folds > 1:
        queries = sorted(dataset.qrels)
        random.Random(args.seed).shuffle(queries)
        splits = [([q for i, q in enumerate(queries) if i % args.folds != fold], queries[fold::args.folds]) for fold in range(args.folds)]

    curves, seconds = [], {system: [] for system in systems}
    for fold, (train, test) in enumerate(splits):
        triples = work / f"triples-fold-{fold}.jsonl"
        n_triples = write_triples(dataset, train, negatives, triples, args.seed)
        judge = Judge(dataset, test, test_pool(dataset, test, negatives, args.pool, args.seed), [], args.batch_size)
        curves.append({})
        for system in systems:
            job = {"checkpoint": str(work / "initial"), "triples": str(triples), **lengths, "batch_size": args.batch_size,
                   "learning_rate": args.learning_rate, "schedule": "constant_with_warmup", "warmup_steps": min(5, args.steps // 2), "epochs": 10,
                   "max_steps": args.steps, "seconds": None, "rounds": 1, "loss_step": None, "save_every": args.every, "seed": args.seed,
                   "device": "cpu", "options": {}, "bf16": False, "same_flags": False, "out": str(work / "folds" / f"{system}-{fold}")}
            runner = Runner(pythons[system], system, job)
            try:
                runner.event()
                runner.go()
                seconds[system] += runner.event()["seconds"][3:]
            finally:
                runner.stop()
            folders = [work / "initial"] + [Path(job["out"]) / f"step-{n}" for n in range(args.every, args.steps + 1, args.every)]
            curves[-1][system] = [judge(folder, **lengths)["nDCG@10"] for folder in folders]
            print(fold, system, [round(value, 3) for value in curves[-1][system]], file=sys.stderr)

    result = {"data": name, "date": datetime.date.today().isoformat(), "hardware": hardware(), "triples": n_triples,
              "settings": {k: v.name if isinstance(v, Path) else v for k, v in vars(args).items() if k not in ("envs", "work", "out", "data")},
              "curves": curves}
    result["seconds_per_step"] = {system: statistics.median(values) for system, values in seconds.items()}
    if args.speed:
        stored = json.loads(args.speed.read_text())
        if stored["settings"]["doc_maxlen"] != args.doc_maxlen or stored["settings"]["batch_size"] != args.batch_size:
            raise ValueError(f"expected a result with doc_maxlen={args.doc_maxlen} and batch_size={args.batch_size} in {args.speed}")
        result["seconds_per_step"] = {row["system"]: row["seconds_per_step"] for row in stored["rows"] if row["mode"] == "defaults"}
    mean = {system: [statistics.mean(fold[system][i] for fold in curves) for i in range(len(curves[0][system]))] for system in systems}
    best = max(systems[1:], key=lambda system: mean[system][-1])
    reached = next((i for i, value in enumerate(mean["ours"]) if value >= mean[best][-1]), None)
    step = result["seconds_per_step"]
    result |= {"mean": mean, "best_peer": best, "peer_seconds": args.steps * step[best],
               "our_steps": None if reached is None else reached * args.every,
               "our_seconds": None if reached is None else reached * args.every * step["ours"]}
    result["ratio"] = result["peer_seconds"] / result["our_seconds"] if reached else None
    out = args.out or HERE / "results" / f"training_quality_{name}.json"
    out.parent.mkdir(parents=True, exist_ok=True)
    out.write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")
    print("| system | s/step | " + " | ".join(f"nDCG@10 after {i * args.every} steps" for i in range(len(mean["ours"]))) + " |")
    print("| --- |" + " ---: |" * (len(mean["ours"]) + 1))
    for system in systems:
        print(f"| {LABELS[system]} | {step[system]:.2f} | " + " | ".join(f"{value:.3f}" for value in mean[system]) + " |")
    said = "never reaches it" if reached is None else f"reaches it after {result['our_seconds']:.0f} s, {result['ratio']:.2f} times sooner" if reached else "has it before training"
    print(f"\n{LABELS[best]} ends at {mean[best][-1]:.3f} after {result['peer_seconds']:.0f} s; colbert_nb {said}.")


if __name__ == "__main__":
    main()
