"""What hard negatives are worth: models trained with negatives from several sources, beside one another.

    python benchmarks/mining_quality.py --data docs                    # seeds 1, 2 and 3, 150 test queries
    python benchmarks/mining_quality.py --data FOLDER                  # a collection in BEIR's format: five folds, three seeds
    python benchmarks/mining_quality.py --data docs --only none        # prints the stored table

Sources: "random" passages; "windowed", ten drawn from ranks 10 to 110 of MiniLM's ranking; "filtered", the ten nearest of a hundred
and ten that score at least a twentieth below the query's weakest positive and are no near-duplicate of one (cosine 0.95). "two
rounds" trains with windowed negatives in two runs, the second going on from the first; "self-mined" does the same, but for the second
the model that came out of the first mines, with the same window (`re_mine_every` in colbert_nb.training_remine). Compare these two
for the gain of re-mining, since two runs warm up twice. A query for which a source has no negative takes a random passage.

All runs of one seed and fold see the same queries, so that differences are paired. Each finished run is one record of
results/mining_quality_<data>.json, written at once; a run whose record is there is not done again. Only quality is measured
here, never time, so the script may share a machine. nbs/06_mining_audit.ipynb shows the records.
"""

import argparse
import logging
import random
import tempfile
from pathlib import Path

import numpy as np
from ablations import RESULTS, add, key, load, mined_negatives, origin, read

from colbert_nb.corpus import RetrievalDataset, minilm_path
from colbert_nb.training_ablations import ablation_data, ablation_pool, ablation_split, ablation_triples

SOURCES = ("random", "windowed", "filtered", "two rounds", "self-mined")
RULES = {"windowed": {}, "filtered": {"min_rank": 0, "sampling": "top", "relative_margin": 0.05, "max_positive_similarity": 0.95}}
FIXED = {"triples": 320, "batch_size": 16, "query_maxlen": 32, "doc_maxlen": 48, "learning_rate": 5e-5, "folds": 5}
POOL = {"docs": 600}  # passages that are searched; of other collections 500, which a fold of 45 queries still fills


def split(data: RetrievalDataset, seed: int, fold: int | None) -> tuple[list[int], list[int]]:
    "Training queries in their order, and test queries: a fold of five where one is given."
    if fold is None:
        return ablation_split(data, seed, 150)
    order = random.Random(0).sample(sorted(data.qrels), len(data.qrels))
    test = sorted(order[fold :: FIXED["folds"]])
    train = [q for q in order if q not in set(test)]
    return random.Random(seed).sample(train, len(train)), test


def run(data: RetrievalDataset, mined: dict[str, dict], source: str, seed: int, fold: int | None, n_pool: int) -> dict:
    "Train with one source of negatives, and search a pool of the windowed negatives and the positives of the test queries."
    from colbert_nb.encoder import ColBERT
    from colbert_nb.evaluation import METRICS, evaluate, search
    from colbert_nb.training_remine import train_with_own_negatives
    from colbert_nb.training_run import train_colbert

    train, test = split(data, seed, fold)
    negatives = None if source == "random" else mined["filtered" if source == "filtered" else "windowed"]
    if negatives is not None:
        rng = random.Random(seed)
        negatives = {q: negatives.get(q) or rng.sample(sorted(set(range(len(data.corpus))) - set(data.qrels[q])), 10) for q in train}
    rows = ablation_triples(data, train, min(FIXED["triples"], sum(len(data.qrels[q]) for q in train)), seed, negatives)
    pool = ablation_pool(data, test, n_pool, seed, mined["windowed"])
    model = ColBERT.from_pretrained(minilm_path(), init="pca", sample=data.corpus, query_maxlen=FIXED["query_maxlen"],
                                    doc_maxlen=FIXED["doc_maxlen"], device="cpu", seed=seed)
    training = ablation_data(data, rows)
    options = {"batch_size": FIXED["batch_size"], "learning_rate": FIXED["learning_rate"], "dropout": 0.0, "bf16": False,
               "progress": False, "save_strategy": "no"}
    half = len(rows) // FIXED["batch_size"] // 2
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "run"
        if source == "self-mined":
            train_with_own_negatives(model, training, path, re_mine_every=half, seed=seed, **options)
        elif source == "two rounds":
            for turn in (0, 1):
                train_colbert(model, training, path / str(turn), maxsteps=half, seed=seed + turn, **options)
        else:
            train_colbert(model, training, path, seed=seed, **options)
    found = search(model, [data.queries[q] for q in test], [data.corpus[p] for p in pool], show_progress=False)
    column = {p: i for i, p in enumerate(pool)}
    judged = {i: {column[p]: g for p, g in data.qrels[q].items()} for i, q in enumerate(test)}
    table = evaluate(found, judged, METRICS, per_query=True)
    values = {name: [table[str(i)][name] for i in range(len(test))] for name in METRICS}
    return {"results": {name: round(float(np.mean(numbers)), 4) for name, numbers in values.items()},
            "per_query": [round(v, 4) for v in values["nDCG@10"]], "queries": test, "steps": len(rows) // FIXED["batch_size"],
            "short": sum(len(mined["filtered"].get(q, ())) < 10 for q in train) if source == "filtered" else 0}


def table(records: list[dict]) -> str:
    "One line a source: the mean over seeds, its deviation between seeds, and the paired difference to windowed negatives."
    from colbert_nb.training_ablations import paired_difference

    lines = ["| negatives | nDCG@10 | deviation between seeds | against windowed | 95 % | runs |", "|---|---:|---:|---:|---|---:|"]
    reference = {(r["seed"], r["settings"]["fold"]): r for r in records if r["settings"]["source"] == "windowed"}
    for source in SOURCES:
        runs = [r for r in records if r["settings"]["source"] == source]
        if not runs:
            continue
        seeds = sorted({r["seed"] for r in runs})
        means = [np.mean([r["results"]["nDCG@10"] for r in runs if r["seed"] == seed]) for seed in seeds]
        pairs = [(r, reference[r["seed"], r["settings"]["fold"]]) for r in runs if (r["seed"], r["settings"]["fold"]) in reference]
        end = " |  |"
        if pairs and source != "windowed":
            flat = lambda k, name: [v for pair in pairs for v in pair[k][name]]
            d = paired_difference(flat(0, "per_query"), flat(1, "per_query"), flat(0, "queries"))
            end = f" {d.mean:+.3f} | {d.low:+.3f} to {d.high:+.3f} |"
        lines.append(f"| {source} | {np.mean(means):.3f} | {np.std(means, ddof=1) if len(means) > 1 else float('nan'):.3f} |{end} {len(runs)} |")
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", default="docs", help="'docs', or a folder in BEIR's format")
    parser.add_argument("--only", default=",".join(SOURCES), help=f"some of {', '.join(SOURCES)}; 'none' prints what there is")
    parser.add_argument("--seeds", type=int, nargs="+", default=[1, 2, 3])
    parser.add_argument("--results", type=Path, default=RESULTS, help="folder of the records")
    parser.add_argument("--cache", type=Path, default=Path(tempfile.gettempdir()) / "colbert_nb_mining", help="for mined negatives")
    given = parser.parse_args()
    wanted = [] if given.only == "none" else given.only.split(",")
    if unknown := [source for source in wanted if source not in SOURCES]:
        parser.error(f"expected --only with names of {', '.join(SOURCES)}, got {', '.join(unknown)}")
    logging.getLogger("transformers").setLevel(logging.ERROR)
    name, data = load(given.data)
    file = given.results / f"mining_quality_{name}.json"
    given.results.mkdir(exist_ok=True)
    given.cache.mkdir(parents=True, exist_ok=True)
    mined = {source: mined_negatives(name, data, given.cache, **rules) for source, rules in RULES.items()} if wanted else {}
    for seed in given.seeds:
        for fold in [None] if name == "docs" else range(FIXED["folds"]):
            for source in wanted:
                record = {"data": name, "seed": seed, "settings": {"source": source, "fold": fold} | FIXED | {"pool": POOL.get(name, 500)}}
                if key(record) in map(key, read(file)):
                    continue
                record |= run(data, mined, source, seed, fold, record["settings"]["pool"])
                add(file, record := record | origin())
                logging.info("seed %d, fold %s, %s: nDCG@10 %.4f", seed, fold, source, record["results"]["nDCG@10"])
    print(table(read(file)))


if __name__ == "__main__":
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(message)s", datefmt="%H:%M:%S")
    main()
