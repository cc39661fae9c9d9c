"""colbert-ai's model, loss and batches in a plain loop, as a runner (see pacing.py).

Its own Trainer needs CUDA, so the loop is written out here, line by line that of `colbert.training.training.train`. Two
mends let its model load on transformers 5, and its C++ extension, which training never calls, is not built."""

import contextlib

import torch
import transformers
from pacing import Pacer, no_dropout, read_job

job = read_job()
transformers.PreTrainedModel.all_tied_weights_keys = {}

import colbert.modeling.hf_colbert as hf  # noqa: E402
from colbert.infra import ColBERTConfig  # noqa: E402
from colbert.modeling.colbert import ColBERT  # noqa: E402
from colbert.training.lazy_batcher import LazyBatcher  # noqa: E402

ColBERT.loaded_extensions = True
factory = hf.class_factory


def mended(name: str):
    "Its model class, with the set that transformers 5 wants where it has a list."
    made = factory(name)
    made._keys_to_ignore_on_load_unexpected = set(made._keys_to_ignore_on_load_unexpected)
    return made


import colbert.modeling.base_colbert as base  # noqa: E402

base.class_factory = mended

queries = {text: i for i, text in enumerate(dict.fromkeys(q for q, *_ in job["rows"]))}
corpus = {text: i for i, text in enumerate(dict.fromkeys(p for _, *ps in job["rows"] for p in ps))}
triples = [[queries[q], *(corpus[p] for p in ps)] for q, *ps in job["rows"]]
config = ColBERTConfig.from_existing(ColBERTConfig.load_from_checkpoint(job["checkpoint"]), ColBERTConfig(
    checkpoint=job["checkpoint"], bsize=job["batch_size"], accumsteps=1, nway=len(triples[0]) - 1, use_ib_negatives=True,
    query_maxlen=job["query_maxlen"], doc_maxlen=job["doc_maxlen"], lr=job["learning_rate"]))
config.total_visible_gpus = torch.cuda.device_count()

import tempfile  # noqa: E402
from pathlib import Path  # noqa: E402

from colbert.data import Collection, Examples, Queries  # noqa: E402

reader = LazyBatcher(config, Examples(data=triples * job["epochs"]), Queries(data={i: q for q, i in queries.items()}), Collection(data=list(corpus)))
model = ColBERT(name=job["checkpoint"], colbert_config=config).to(job["device"])
if job["device"] == "cpu":
    model.use_gpu = False
with torch.inference_mode():
    Q = model.query(*reader.query_tokenizer.tensorize([row[0] for row in job["rows"][:4]]))
    D, mask = model.doc(*reader.doc_tokenizer.tensorize([row[1] for row in job["rows"][:4]]), keep_dims="return_mask")
    scores = model.score(Q, D, mask).tolist()

model.train()
if job["same_flags"]:
    no_dropout(model)
optimizer = torch.optim.AdamW(model.parameters(), lr=config.lr, eps=1e-8, **(dict(fused=True, weight_decay=0.0) if job["same_flags"] else {}))
total = min(job["max_steps"] or 10**9, len(triples) * job["epochs"] // job["batch_size"])
schedule = transformers.get_scheduler(job["schedule"], optimizer, job["warmup_steps"], total)
labels = torch.zeros(config.bsize, dtype=torch.long, device=job["device"])
precision = (lambda: torch.autocast(job["device"], torch.bfloat16)) if job["bf16"] else contextlib.nullcontext

pacer = Pacer(job, lambda: (model.bert.state_dict(), model.linear.weight),
              {"torch": torch.__version__, "transformers": transformers.__version__, "colbert-ai": "0.2.22"}, scores)
pacer.begin()
for batches in reader:
    total_loss = 0.0
    for Q, D, _ in batches:
        with precision():
            scores, in_batch = model(Q, D)
            loss = torch.nn.CrossEntropyLoss()(scores.view(-1, config.nway), labels[:len(Q[0])]) + in_batch
        loss.backward()
        total_loss += loss.item()
    torch.nn.utils.clip_grad_norm_(model.parameters(), 2.0)
    optimizer.step()
    schedule.step()
    optimizer.zero_grad()
    if pacer.step(total_loss):
        break
pacer.done()
