"""A trained checkpoint in PyTorch and as ONNX files: latency, throughput, size, and what the smaller files cost in quality.

    python benchmarks/onnx_speed.py runs/first_colbert/best            # some ten minutes on two cores
    python benchmarks/onnx_speed.py CHECKPOINT --parts speed           # the other part of the stored result is kept

Speed: the same ids, full rows, batches of 1x32 (a query), 8x180 and 32x180, on one thread and on all. The systems take
turns in each round, and the median over the rounds counts. PyTorch is colbert_nb's own forward pass in the faster of its
two kinds of attention; bfloat16 is measured where the processor has it. Quality: the test queries of the tutorial over all
passages of its corpus. The bars: on one thread, float32 at least 1.5 times as fast as PyTorch at 1x32 and as fast at
8x180, int8 3 and 1.7 times; int8 at most 0.01 below in nDCG@10.
"""

import argparse
import datetime
import json
import os
import statistics
import time
from pathlib import Path

import numpy as np
import onnxruntime
import torch
from hardware import machine

from colbert_nb.corpus import docstring_corpus, split_queries
from colbert_nb.encoder import ColBERT
from colbert_nb.onnx import INPUTS, TokenVectors, export_to_vespa_onnx
from colbert_nb.onnx_quantize import measure_cost

HERE = Path(__file__).parent
SHAPES = {"1x32": (1, 32), "8x180": (8, 180), "32x180": (32, 180)}
ROUNDS = {"1x32": (15, 10), "8x180": (7, 1), "32x180": (3, 1)}  # rounds, calls a round
FILES = {"onnx fp32": {}, "onnx fp32, opset 23": {"opset": 23}, "onnx int8": {"quantize": "int8"}, "onnx fp16": {"quantize": "fp16"}}
BARS = {"onnx fp32": {"1x32": 1.5, "8x180": 1.0}, "onnx int8": {"1x32": 3.0, "8x180": 1.7}}


def has_bf16() -> bool:
    "Whether the processor multiplies bfloat16 itself; without, PyTorch imitates it slowly."
    return bool(torch.cpu._is_avx512_bf16_supported() or torch.cpu._is_amx_tile_supported())


def files_of(checkpoint: str, folder: Path) -> dict[str, Path]:
    "The ONNX files, each in a folder of its own; those that are there are taken."
    made = {}
    for name, options in FILES.items():
        place = folder / name.replace(",", "").replace(" ", "_")
        made[name] = place / "vespa_colbert.onnx"
        if not made[name].is_file():
            export_to_vespa_onnx(checkpoint, place, **options)
    return made


def torch_runner(checkpoint: str, attention: str, dtype: torch.dtype):
    "A call on numpy arrays."
    module = TokenVectors(ColBERT.from_pretrained(checkpoint, device="cpu", attn_implementation=attention, dtype=dtype)).eval()

    def run(feed):
        with torch.inference_mode():
            return module(*(torch.from_numpy(feed[name]) for name in INPUTS))

    return run


def onnx_runner(file: Path, threads: int):
    "A call on numpy arrays."
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads, options.log_severity_level = threads, 3
    session = onnxruntime.InferenceSession(str(file), options, providers=["CPUExecutionProvider"])
    return lambda feed: session.run(None, feed)


def speed(checkpoint: str, files: dict[str, Path]) -> dict:
    "Seconds a call by threads, shape and system: the median over the rounds."
    kinds = {"torch fp32, eager": ("eager", torch.float32), "torch fp32, sdpa": ("sdpa", torch.float32)}
    if has_bf16():
        kinds["torch bf16"] = ("sdpa", torch.bfloat16)
    plain, found = {name: torch_runner(checkpoint, *kind) for name, kind in kinds.items()}, {}
    for threads in sorted({1, os.cpu_count()}):
        torch.set_num_threads(threads)
        runners = plain | {name: onnx_runner(file, threads) for name, file in files.items()}
        found[str(threads)] = {}
        for shape, (rows, length) in SHAPES.items():
            draw = np.random.default_rng(0)
            feed = {"input_ids": draw.integers(1000, 20000, (rows, length)), "attention_mask": np.ones((rows, length), np.int64)}
            times = {name: [] for name in runners}
            rounds, calls = ROUNDS[shape]
            for run in runners.values():
                run(feed)
            for _ in range(rounds):
                for name, run in runners.items():
                    start = time.perf_counter()
                    for _ in range(calls):
                        run(feed)
                    times[name].append((time.perf_counter() - start) / calls)
            found[str(threads)][shape] = {name: statistics.median(t) for name, t in times.items()}
    return found


class Once:
    "A model that encodes the same texts once, however often it is asked."

    def __init__(self, model):
        self.model, self.kept = model, {}

    def encode_queries(self, texts, **options):
        if "queries" not in self.kept:
            self.kept["queries"] = self.model.encode_queries(texts, **options)
        return self.kept["queries"]

    def encode_documents(self, texts, **options):
        if "documents" not in self.kept:
            self.kept["documents"] = self.model.encode_documents(texts, **options)
        return self.kept["documents"]


def quality(checkpoint: str, files: dict[str, Path], n_test: int, seed: int) -> dict:
    "nDCG@10 and nearness to the model, on the test queries that the tutorial holds back."
    dataset = docstring_corpus()
    test = dataset.select(split_queries(dataset.qrels, {"test": n_test, "validation": 40, "train": None}, seed=seed)["test"])
    model = Once(ColBERT.from_pretrained(checkpoint, device="cpu"))
    return {name: measure_cost(model, file, test.queries, dataset.corpus, test.qrels) for name, file in files.items()}


def ratios(times: dict) -> dict:  # system -> how many times as fast as the faster of PyTorch's two
    base = min(seconds for name, seconds in times.items() if name.startswith("torch fp32"))
    return {name: base / seconds for name, seconds in times.items()}


def table(result: dict) -> str:
    "The stored result as markdown."
    parts = []
    for threads, shapes in result.get("speed", {}).items():
        parts += [f"threads: {threads}", "| system | " + " | ".join(f"{s}, ms (x torch; texts/s)" for s in shapes) + " |", "|---|" + "---:|" * len(shapes)]
        for name in next(iter(shapes.values())):
            cells = [f"{1000 * t[name]:.1f} ({ratios(t)[name]:.2f}; {SHAPES[s][0] / t[name]:.0f})" for s, t in shapes.items()]
            parts.append(f"| {name} | " + " | ".join(cells) + " |")
    for name, row in result.get("quality", {}).items():
        parts.append(f"{name}: " + ", ".join(f"{key} {value:.4f}" for key, value in row.items()))
    parts.append("MB: " + ", ".join(f"{name} {size / 1e6:.1f}" for name, size in result["bytes"].items()))
    return "\n".join(parts) + f"\n\n{result['processor']}, {result['cores']} cores, Python {result['python']}, {result['date']}"


def main() -> None:
    options = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    options.add_argument("checkpoint", help="a trained ColBERT, such as the tutorial's")
    options.add_argument("--parts", nargs="*", choices=["speed", "quality"], default=["speed", "quality"])
    options.add_argument("--folder", type=Path, default=Path("runs/onnx_speed"), help="for the ONNX files; those that are there are taken")
    options.add_argument("--n-test", type=int, default=400, help="test queries, as in the tutorial")
    options.add_argument("--seed", type=int, default=42)
    options.add_argument("--out", type=Path, default=HERE / "results" / "onnx.json")
    args = options.parse_args()
    result = json.loads(args.out.read_bytes()) if args.out.is_file() else {}
    files = files_of(args.checkpoint, args.folder)
    weights = Path(args.checkpoint) / "model.safetensors"
    result["bytes"] = {"torch fp32": weights.stat().st_size if weights.is_file() else 0} | {name: file.stat().st_size for name, file in files.items()}
    if "speed" in args.parts:
        result["speed"] = speed(args.checkpoint, files)
    if "quality" in args.parts:
        measured = {name: file for name, file in files.items() if "opset" not in FILES[name]}
        result["quality"] = quality(args.checkpoint, measured, args.n_test, args.seed)
    result |= {"bars": BARS, "bf16": has_bf16(), "date": datetime.date.today().isoformat(), **machine("torch", "transformers", "onnx", "onnxruntime")}
    args.out.parent.mkdir(parents=True, exist_ok=True)
    args.out.write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")
    print(table(result))


if __name__ == "__main__":
    main()
