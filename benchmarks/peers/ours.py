"colbert_nb's `train_colbert`, as a runner (see pacing.py)."

from importlib.metadata import version
from pathlib import Path

import torch
import transformers
from pacing import Pacer, read_job, trainer_callback

from colbert_nb.data_files import TrainingData
from colbert_nb.encoder import ColBERT
from colbert_nb.scoring import maxsim
from colbert_nb.training_run import train_colbert


def table(rows: list[list[str]]) -> TrainingData:
    "Rows of texts as the training data of the package."
    queries = {text: i for i, text in enumerate(dict.fromkeys(q for q, *_ in rows))}
    corpus = {text: i for i, text in enumerate(dict.fromkeys(p for _, *ps in rows for p in ps))}
    triples = [[queries[q], *(corpus[p] for p in ps)] for q, *ps in rows]
    positives: dict[int, list[int]] = {}
    for q, p, *_ in triples:
        positives.setdefault(q, []).append(p)
    return TrainingData(list(queries), list(corpus), triples, {q: sorted(set(p)) for q, p in positives.items()}, [])


job = read_job()
model = ColBERT.from_pretrained(job["checkpoint"], query_maxlen=job["query_maxlen"], doc_maxlen=job["doc_maxlen"], device=job["device"])
with torch.inference_mode():
    Q, D = (tokens([row[i] for row in job["rows"][:4]]) for i, tokens in enumerate((model.tokenizer.queries, model.tokenizer.documents)))
    scores = maxsim(model(Q.to(model.device)), model(D.to(model.device)), Q.keep.to(model.device), D.keep.to(model.device)).diagonal().tolist()
pacer = Pacer(job, lambda: (model.encoder.state_dict(), model.linear.weight),
              {"torch": torch.__version__, "transformers": transformers.__version__, "colbert-nb": version("colbert-nb")}, scores)
train_colbert(
    model, table(job["rows"]), Path(job["out"]) / "trainer", overwrite=True, batch_size=job["batch_size"], epochs=job["epochs"],
    maxsteps=job["max_steps"] or 500_000, learning_rate=job["learning_rate"], warmup_steps=job["warmup_steps"], seed=job["seed"],
    shuffle=False, bf16=job["bf16"] or "auto", lr_scheduler_type=job["schedule"], save_strategy="no", progress=False,
    callbacks=[trainer_callback(pacer)], **job["options"])
pacer.done()
