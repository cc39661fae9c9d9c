"PyLate's contrastive loss and collator in sentence-transformers' trainer, as its documentation shows, as a runner (see pacing.py)."

import torch
import transformers
from pacing import Pacer, no_dropout, read_job, trainer_callback, trainer_options

job = read_job()
import sentence_transformers  # noqa: E402
from datasets import Dataset  # noqa: E402
from pylate import __version__, losses, models, utils  # noqa: E402
from sentence_transformers import SentenceTransformerTrainer, SentenceTransformerTrainingArguments  # noqa: E402
from sentence_transformers.sampler import DefaultBatchSampler  # noqa: E402
from torch.utils.data import SequentialSampler  # noqa: E402


def in_order(dataset, batch_size, drop_last, **kwargs):
    "The rows as they stand, so that every system sees the same batches."
    return DefaultBatchSampler(SequentialSampler(dataset), batch_size=batch_size, drop_last=drop_last)


model = models.ColBERT(model_name_or_path=job["checkpoint"], query_length=job["query_maxlen"], document_length=job["doc_maxlen"],
                       device=job["device"])
Q, D = (model.encode([row[i] for row in job["rows"][:4]], is_query=i == 0, show_progress_bar=False) for i in range(2))
scores = [float((torch.as_tensor(q) @ torch.as_tensor(d).T).amax(1).sum()) for q, d in zip(Q, D)]
if job["same_flags"]:
    no_dropout(model)
columns = dict(zip(("query", "positive", "negative"), map(list, zip(*(row[:3] for row in job["rows"])))))
pacer = Pacer(job, lambda: (model[0].auto_model.state_dict(), model[1].linear.weight),
              {"torch": torch.__version__, "transformers": transformers.__version__,
               "sentence-transformers": sentence_transformers.__version__, "pylate": __version__}, scores)
SentenceTransformerTrainer(
    model=model, train_dataset=Dataset.from_dict(columns), loss=losses.Contrastive(model=model),
    data_collator=utils.ColBERTCollator(model.tokenize), callbacks=[trainer_callback(pacer)],
    args=SentenceTransformerTrainingArguments(batch_sampler=in_order, **trainer_options(job), **(dict(optim="adamw_torch_fused", max_grad_norm=2.0) if job["same_flags"] else {})),
).train()
pacer.done()
