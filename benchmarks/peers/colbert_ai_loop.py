"""colbert-ai's model, loss and batches in a plain loop, as a runner (see pacing.py).

Its own Trainer needs CUDA, so the loop is written out here, line by line that of `colbert.training.training.train`. Two
mends let its model load on transformers 5, and its C++ extension, which training never calls, is not built."""

import contextlib

from pacing import Pacer, no_dropout, read_job  # first: colbert prints while it is imported

import colbert.modeling.base_colbert as base
import torch
import transformers
from colbert.data import Collection, Queries
from colbert.infra import ColBERTConfig
from colbert.modeling.colbert import ColBERT
from colbert.training.lazy_batcher import LazyBatcher

factory = base.class_factory


def mended(name: str):
    "Its model class with what transformers 5 wants of it."
    made = factory(name)
    made.all_tied_weights_keys, made._keys_to_ignore_on_load_unexpected = {}, {"cls"}
    return made


base.class_factory, ColBERT.loaded_extensions = mended, True
job = read_job()
queries = {text: i for i, text in enumerate(dict.fromkeys(q for q, *_ in job["rows"]))}
corpus = {text: i for i, text in enumerate(dict.fromkeys(p for _, *ps in job["rows"] for p in ps))}
triples = [[queries[q], *(corpus[p] for p in ps)] for q, *ps in job["rows"]] * job["epochs"]
config = ColBERTConfig.from_existing(ColBERTConfig.load_from_checkpoint(job["checkpoint"]), ColBERTConfig(
    checkpoint=job["checkpoint"], bsize=job["batch_size"], accumsteps=1, nway=len(triples[0]) - 1, use_ib_negatives=True,
    query_maxlen=job["query_maxlen"], doc_maxlen=job["doc_maxlen"], lr=job["learning_rate"]))
reader = LazyBatcher(config, triples, Queries(data={i: text for text, i in queries.items()}), Collection(data=list(corpus)))
model = ColBERT(name=job["checkpoint"], colbert_config=config).to(job["device"])
with torch.inference_mode():
    Q = model.query(*reader.query_tokenizer.tensorize([row[0] for row in job["rows"][:4]]))
    D, mask = model.doc(*reader.doc_tokenizer.tensorize([row[1] for row in job["rows"][:4]]), keep_dims="return_mask")
    scores = model.score(Q, D, mask).tolist()

model.train()
if job["same_flags"]:
    no_dropout(model)
optimizer = torch.optim.AdamW(model.parameters(), lr=config.lr, eps=1e-8, **(dict(fused=True, weight_decay=0.0) if job["same_flags"] else {}))
total = min(job["max_steps"] or 10**9, len(triples) // job["batch_size"])
schedule = transformers.get_scheduler(job["schedule"], optimizer, job["warmup_steps"], total)
labels = torch.zeros(config.bsize, dtype=torch.long, device=job["device"])
precision = (lambda: torch.autocast(job["device"], torch.bfloat16)) if job["bf16"] else contextlib.nullcontext

pacer = Pacer(job, lambda: (model.bert.state_dict(), model.linear.weight),
              {"torch": torch.__version__, "transformers": transformers.__version__, "colbert-ai": "0.2.22"}, scores)
pacer.begin()
for batches in reader:
    for Q, D, _ in batches:
        with precision():
            scores, in_batch = model(Q, D)
            loss = torch.nn.CrossEntropyLoss()(scores.view(-1, config.nway), labels[:len(Q[0])]) + in_batch
        loss.backward()
    torch.nn.utils.clip_grad_norm_(model.parameters(), 2.0)
    optimizer.step()
    schedule.step()
    optimizer.zero_grad()
    if pacer.step():
        break
pacer.done()
