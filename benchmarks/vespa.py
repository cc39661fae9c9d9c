"""What a search engine makes of a model: nDCG@10 as trained, and as Vespa computes it with float vectors and with bits.

    python benchmarks/vespa.py --data docs
    python benchmarks/vespa.py --data FOLDER               # a collection in BEIR's format
    python benchmarks/vespa.py --data docs --seeds 1 --only skipped
    python benchmarks/vespa.py --data docs --only none     # prints the stored table

Each seed draws the training queries, the test queries and the order of the triples, as in ablations.py, with its settings
of training: 400 triples in steps of 16 at 5e-5, passages of 48 tokens, a pool of 600 passages. Four models a seed: with the
punctuation of documents in the encoder or without it, with query expansion or without it. Each model is searched with its
own vectors, and with the vectors that `colbert_nb.vespa_embedder` computes as Vespa does. Each finished model is one record of
results/vespa_<data>.json, written at once; a model whose record is there is not trained again. Only quality is measured here,
never time. nbs/11_vespa_embedder.ipynb shows the records.
"""

import argparse
import logging
import statistics
import tempfile
from pathlib import Path

from ablations import FIXED, RESULTS, add, key, load, mined_negatives, origin, read

from colbert_nb.corpus import RetrievalDataset, minilm_path
from colbert_nb.encoder import ColBERT
from colbert_nb.evaluation import evaluate, search
from colbert_nb.training_ablations import ablation_data, ablation_pool, ablation_split, ablation_triples
from colbert_nb.training_run import train_colbert
from colbert_nb.vespa_embedder import VespaEmbedder, pack_bits, vespa_run

PACKAGES = ("colbert_nb", "torch", "transformers", "tokenizers")
MODELS = {
    "plain": {"query_expansion": True, "skip_punctuation_before_encoding": False},
    "skipped": {"query_expansion": True, "skip_punctuation_before_encoding": True},
    "bare": {"query_expansion": False, "skip_punctuation_before_encoding": False},
    "bare_skipped": {"query_expansion": False, "skip_punctuation_before_encoding": True},
}
TRAINING = {"triples": 400, "learning_rate": 5e-5, "dropout": 0.0, "pool": 600}


def trained(data: RetrievalDataset, rows: list[tuple[int, int, int]], seed: int, settings: dict) -> ColBERT:
    "MiniLM after one pass over the triples."
    model = ColBERT.from_pretrained(minilm_path(), init="pca", sample=data.corpus, device="cpu", seed=seed, query_maxlen=FIXED["query_maxlen"],
                                    doc_maxlen=FIXED["doc_maxlen"], **settings)
    with tempfile.TemporaryDirectory() as folder:
        train_colbert(model, ablation_data(data, rows), Path(folder) / "run", batch_size=FIXED["batch_size"], learning_rate=TRAINING["learning_rate"],
                      dropout=TRAINING["dropout"], seed=seed, bf16=False, progress=False, save_strategy="no")
    return model


def measure(data: RetrievalDataset, seed: int, settings: dict, mined: dict[int, list[int]], n_test: int | None) -> dict:
    "Train one model and search the pool in every way."
    train, test = ablation_split(data, seed, n_test)
    model = trained(data, ablation_triples(data, train, TRAINING["triples"], seed, mined), seed, settings)
    pool = ablation_pool(data, test, TRAINING["pool"], seed, mined)
    queries, corpus = [data.queries[q] for q in test], [data.corpus[p] for p in pool]
    column = {p: i for i, p in enumerate(pool)}
    qrels = {i: {column[p]: g for p, g in data.qrels[q].items()} for i, q in enumerate(test)}
    vespa = VespaEmbedder(model)
    Q, D = [vespa.embed_query(q) for q in queries], [vespa.embed_document(p) for p in corpus]
    own, B = [q.numpy() for q in model.encode_queries(queries, show_progress=False)], [pack_bits(d) for d in D]
    runs = {"as trained": search(model, queries, corpus, show_progress=False),
            "vespa float": vespa_run(Q, D), "vespa bits": vespa_run(Q, B),
            "own queries, vespa float": vespa_run(own, D), "own queries, vespa bits": vespa_run(own, B)}
    tables = {name: evaluate(run, qrels, ["nDCG@10"], per_query=True) for name, run in runs.items()}
    values = {name: [table[str(i)]["nDCG@10"] for i in range(len(test))] for name, table in tables.items()}
    return {"results": {name: round(statistics.fmean(v), 4) for name, v in values.items()},
            "per_query": {name: [round(x, 4) for x in v] for name, v in values.items()}, "queries": test, "pool": len(pool),
            "document_tokens": sum(map(len, D)), "bytes": {"float": sum(d.nbytes for d in D), "bits": sum(b.nbytes for b in B)}}


def table(records: list[dict]) -> str:
    "Means over the seeds, one line a model."
    ways = list(records[0]["results"])
    lines = [["model", "seeds", *ways], ["---", "---:"] + ["---:"] * len(ways)]
    for name, settings in MODELS.items():
        rows = [r["results"] for r in records if r["settings"] == settings]
        if rows:
            lines.append([name, str(len(rows)), *(f"{statistics.fmean(r[way] for r in rows):.3f}" for way in ways)])
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", default="docs", help="'docs', or a folder in BEIR's format")
    parser.add_argument("--only", default=",".join(MODELS), help=f"some of {', '.join(MODELS)}; 'none' prints what there is")
    parser.add_argument("--seeds", type=int, nargs="+", default=[1, 2, 3])
    parser.add_argument("--results", type=Path, default=RESULTS, help="folder of the records")
    parser.add_argument("--cache", type=Path, default=Path(tempfile.gettempdir()) / "colbert_nb_ablations", help="for mined negatives")
    given = parser.parse_args()
    names = [] if given.only == "none" else given.only.split(",")
    if unknown := [name for name in names if name not in MODELS]:
        parser.error(f"expected --only with names of {', '.join(MODELS)}, got {', '.join(unknown)}")
    logging.getLogger("transformers").setLevel(logging.ERROR)
    name, data = load(given.data)
    given.results.mkdir(exist_ok=True)
    file = given.results / f"vespa_{name}.json"
    mined = mined_negatives(name, data, given.cache) if names else {}
    for seed in given.seeds:
        for chosen in names:
            record = {"data": name, "seed": seed, "settings": MODELS[chosen]}
            if key(record) in map(key, read(file)):
                continue
            record |= measure(data, seed, MODELS[chosen], mined, n_test=150 if name == "docs" else None)
            add(file, record := record | {"training": TRAINING | FIXED} | origin(PACKAGES))
            logging.info("seed %d, %s: %s", seed, chosen, record["results"])
    if records := read(file):
        print(f"\n{name}\n\n{table(records)}")


if __name__ == "__main__":
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(message)s", datefmt="%H:%M:%S")
    main()
