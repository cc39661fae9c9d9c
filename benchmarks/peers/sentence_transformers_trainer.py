"sentence-transformers' MultiVectorEncoderTrainer, as a runner (see pacing.py)."

import torch
import transformers
from pacing import Pacer, no_dropout, read_job, trainer_callback, trainer_options

job = read_job()
import sentence_transformers  # noqa: E402
from datasets import Dataset  # noqa: E402
from sentence_transformers import MultiVectorEncoder, MultiVectorEncoderTrainer, MultiVectorEncoderTrainingArguments  # noqa: E402
from sentence_transformers.base.sampler import DefaultBatchSampler  # noqa: E402
from torch.utils.data import SequentialSampler  # noqa: E402


def in_order(dataset, batch_size, drop_last, **kwargs):
    "The rows as they stand, so that every system sees the same batches."
    return DefaultBatchSampler(SequentialSampler(dataset), batch_size=batch_size, drop_last=drop_last)


model = MultiVectorEncoder(job["checkpoint"], device=job["device"])
Q, D = (encode([row[i] for row in job["rows"][:4]])
        for i, encode in enumerate((model.encode_query, model.encode_document)))
scores = [float((torch.as_tensor(q) @ torch.as_tensor(d).T).amax(1).sum()) for q, d in zip(Q, D)]
if job["same_flags"]:
    no_dropout(model)
columns = dict(zip(("query", "positive", "negative"), map(list, zip(*(row[:3] for row in job["rows"])))))
pacer = Pacer(job, lambda: (model[0].auto_model.state_dict(), next(m.linear.weight for m in model if hasattr(m, "linear"))),
              {"torch": torch.__version__, "transformers": transformers.__version__,
               "sentence-transformers": sentence_transformers.__version__}, scores)
MultiVectorEncoderTrainer(
    model=model, train_dataset=Dataset.from_dict(columns), callbacks=[trainer_callback(pacer)],
    args=MultiVectorEncoderTrainingArguments(batch_sampler=in_order, **trainer_options(job), **(dict(optim="adamw_torch_fused", max_grad_norm=2.0) if job["same_flags"] else {})),
).train()
pacer.done()
