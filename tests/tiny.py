"""What several tests of training share: a tiny encoder, made data, and comparisons."""

from pathlib import Path

import torch
from transformers import BertConfig, BertModel, PreTrainedTokenizerFast, TrainerCallback

from colbert_nb.data import TrainingData
from colbert_nb.encoder import ColBERT

WORDS = [f"word{i}" for i in range(60)]


def make_encoder(folder: Path) -> Path:
    "A random BERT of two small layers, with a word tokenizer."
    from tokenizers import Tokenizer, models, pre_tokenizers, processors
    special = ["[PAD]", "[unused0]", "[unused1]", "[UNK]", "[CLS]", "[SEP]", "[MASK]"]
    vocabulary = {word: i for i, word in enumerate(special + WORDS)}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token="[UNK]"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer.post_processor = processors.TemplateProcessing(
        single="[CLS] $A [SEP]", special_tokens=[(t, vocabulary[t]) for t in ("[CLS]", "[SEP]")])
    PreTrainedTokenizerFast(tokenizer_object=tokenizer, unk_token="[UNK]", pad_token="[PAD]", cls_token="[CLS]",
                            sep_token="[SEP]", mask_token="[MASK]").save_pretrained(folder)
    torch.manual_seed(0)
    BertModel(BertConfig(vocab_size=len(vocabulary), hidden_size=32, num_hidden_layers=2, num_attention_heads=2,
                         intermediate_size=64, max_position_embeddings=64)).save_pretrained(folder)
    return folder


def fresh(encoder: Path, **options) -> ColBERT:
    return ColBERT.from_pretrained(encoder, dim=16, device="cpu", query_maxlen=8, doc_maxlen=16, **options)


def made_data() -> TrainingData:
    "Passages of three to twelve words; query i is two words of passage i."
    draw = torch.Generator().manual_seed(1)
    passages = [[WORDS[w] for w in torch.randint(60, (3 + i % 10,), generator=draw)] for i in range(40)]
    triples = [[q, q, (q + 7) % 40] for q in range(30)] + [[q, q, (q + 11) % 40] for q in range(3)]
    validation = [{"query": " ".join(passages[p][:2]), "positives": [p], "candidates": [p, *range(10)]} for p in range(30, 40)]
    return TrainingData([" ".join(p[-2:]) for p in passages[:30]], [" ".join(p) for p in passages], triples,
                        {q: [q] for q in range(30)}, validation)


OPTIONS = dict(batch_size=6, learning_rate=1e-3, epochs=2)


def weights(folder: Path) -> dict:
    return ColBERT.from_pretrained(folder, device="cpu").state_dict()


def difference(a: dict, b: dict) -> float:
    assert a.keys() == b.keys()
    return max((a[k] - b[k]).abs().max().item() for k in a if a[k].is_floating_point())


class StopAt(TrainerCallback):
    def __init__(self, step):
        self.step = step

    def on_step_end(self, args, state, control, **kwargs):
        if state.global_step == self.step:
            raise KeyboardInterrupt


# Batches
