"""What each choice of training is worth: one setting changed at a time, several seeds, real weights.

    python benchmarks/ablations.py --data docs
    python benchmarks/ablations.py --data FOLDER                 # a collection in BEIR's format
    python benchmarks/ablations.py --data docs --only dropout,expansion --seeds 1 2 3
    python benchmarks/ablations.py --data docs --only none       # prints the stored tables

A seed draws everything: which queries train and which test, the order of the triples, the weights of a random
projection, dropout. All settings of one seed see the same split, so their differences are paired. Each finished run is
one record of results/ablations_<data>.json, written at once; a run whose record is there is not done again. Only quality
is measured here, never time, so the script may share a machine. nbs/07_training_ablations.ipynb shows the records.
"""

import argparse
import datetime
import fcntl
import json
import logging
import os
import re
import tempfile
from pathlib import Path

import torch
from hardware import machine

from colbert_nb.corpus import RetrievalDataset, docstring_corpus, load_beir, minilm_path
from colbert_nb.mining import HardNegativeMiner
from colbert_nb.training_ablations import BASE, ablation_run, ablation_table

RESULTS = Path(__file__).parent / "results"
FIXED = {"batch_size": 16, "query_maxlen": 32, "doc_maxlen": 48}
PACKAGES = ("colbert_nb", "torch", "transformers", "sentence-transformers")
WITHOUT = {"query_expansion": False}
ABLATIONS = {
    "dropout": {"dropout 0": {}, "dropout 0.1, the encoder's own": {"dropout": None}},
    "projection": {"principal directions": {}, "random": {"init": "random"}},
    "in_batch": {"with in-batch negatives": {}, "without": {"use_ib_negatives": False}},
    "negatives": {"mined": {}, "random": {"negatives": "random"}},
    "untrained": {"with expansion": {"triples": 0}, "without": {"triples": 0} | WITHOUT,
                  "with expansion, random projection": {"triples": 0, "init": "random"}},
    **{f"expansion_{rate:g}_{n}": {"with expansion": {"learning_rate": rate, "triples": n},
                                   "without": {"learning_rate": rate, "triples": n} | WITHOUT}
       for n in (100, 400, 750) for rate in (5e-5, 5e-6, 1e-4)},
}


def load(data: str) -> tuple[str, RetrievalDataset]:
    "Name and collection of --data, without empty passages and without a title that the text repeats."
    if data == "docs":
        return "docs", docstring_corpus()
    full = load_beir(data)
    kept = [p for p, text in enumerate(full.corpus) if text.strip()]
    place = {p: i for i, p in enumerate(kept)}
    qrels = {q: {place[p]: grade for p, grade in judged.items() if p in place} for q, judged in full.qrels.items()}
    texts = [re.sub(r"^(.{10,}) (?=\1)", "", full.corpus[p]) for p in kept]
    return Path(data).resolve().name, RetrievalDataset(texts, full.queries, qrels)


def mined_negatives(name: str, data: RetrievalDataset, cache: Path, **rules) -> dict[int, list[int]]:
    "Ten hard negatives of every query, by the miner's rules or the package's default window of ranks, mined once and kept in `cache`."
    file = cache / "_".join(["mined", name, *(f"{rule}={value}" for rule, value in rules.items())])
    file = file.with_name(f"{file.name}.json")
    if not file.is_file():
        from sentence_transformers import SentenceTransformer

        dense = SentenceTransformer(str(minilm_path()), device="cpu")
        dense.max_seq_length = 64
        positives = {q: list(judged) for q, judged in data.qrels.items()}
        mined = HardNegativeMiner(dense, index="exact", **rules).mine(data.queries, data.corpus, positives, 10)
        cache.mkdir(parents=True, exist_ok=True)
        file.write_text(json.dumps(mined))
    return {int(q): passages for q, passages in json.loads(file.read_text()).items()}


def read(file: Path) -> list[dict]:
    "The records there are."
    return json.loads(file.read_text(encoding="utf-8")) if file.is_file() else []


def key(record: dict) -> str:
    "What makes two records the same run."
    return json.dumps([record["settings"], record["seed"]], sort_keys=True)


def add(file: Path, record: dict) -> None:
    "One more record in the file, which is read again, since another process may have added to it, and replaced whole."
    folder = os.open(file.parent, os.O_RDONLY)
    try:
        fcntl.flock(folder, fcntl.LOCK_EX)
        records = {key(r): r for r in read(file)} | {key(record): record}
        beside = file.with_suffix(".part")
        beside.write_text("[\n" + ",\n".join(json.dumps(r) for r in records.values()) + "\n]\n", encoding="utf-8")
        os.replace(beside, file)
    finally:
        os.close(folder)


def origin(packages: tuple[str, ...] = PACKAGES) -> dict:
    "Where and when a record was made, and with which versions."
    here, threads = machine(*packages), torch.get_num_threads()
    return {"hardware": f"{here['processor']}, {threads} thread{'s' * (threads > 1)}", "date": datetime.date.today().isoformat(),
            "versions": here["versions"]}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", default="docs", help="'docs', or a folder in BEIR's format")
    parser.add_argument("--only", default=",".join(ABLATIONS),
                        help=f"some of {', '.join(ABLATIONS)}, or the beginning of several; 'none' prints what there is")
    parser.add_argument("--seeds", type=int, nargs="+", default=[1, 2, 3])
    parser.add_argument("--results", type=Path, default=RESULTS, help="folder of the records")
    parser.add_argument("--cache", type=Path, default=Path(tempfile.gettempdir()) / "colbert_nb_ablations", help="for mined negatives")
    given = parser.parse_args()
    names = [] if given.only == "none" else given.only.split(",")
    wanted = [a for a in ABLATIONS if any(a.startswith(name) for name in names)]
    if unknown := [name for name in names if not any(a.startswith(name) for a in ABLATIONS)]:
        parser.error(f"expected --only with names of {', '.join(ABLATIONS)}, got {', '.join(unknown)}")
    logging.getLogger("transformers").setLevel(logging.ERROR)
    name, data = load(given.data)
    given.results.mkdir(exist_ok=True)
    file = given.results / f"ablations_{name}.json"
    mined = mined_negatives(name, data, given.cache) if wanted else {}
    for ablation in wanted:
        for seed in given.seeds:
            for change in ABLATIONS[ablation].values():
                record = {"data": name, "seed": seed, "settings": BASE | change}
                if key(record) in map(key, read(file)):
                    continue
                record |= ablation_run(data, record["settings"], seed, mined=mined, n_test=150 if name == "docs" else None, **FIXED)
                add(file, record := record | {"fixed": FIXED} | origin())
                logging.info("%s, seed %d, %s: nDCG@10 %.4f", ablation, seed, change, record["results"]["nDCG@10"])
    for ablation, variants in ABLATIONS.items():
        if table := ablation_table({name: read(file)}, variants):
            print(f"\n{ablation}\n\n{table}")


if __name__ == "__main__":
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(message)s", datefmt="%H:%M:%S")
    main()
