"""One checkpoint, five loaders: what each library makes of a folder that `ColBERT.save_pretrained` wrote.

Every library runs in an environment of its own, made from the pins in benchmarks/peers and kept in benchmarks/.envs. It
loads each checkpoint, encodes the same queries and passages, and scores them with its own MaxSim; this script compares
with ours. RAGatouille and PyLate also index 1,000 passages and search them. The result goes to
benchmarks/results/interop.json, and the exit status is 1 where a library differs that is not `known` to, or no longer does.

    make interop                                             # with runs/first_colbert/best where make tutorial made it
    python tests/interop/run.py --trained CHECKPOINT         # another trained checkpoint
"""

import argparse
import datetime
import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import torch

HERE = Path(__file__).resolve().parent
ROOT = HERE.parent.parent
sys.path[:0] = [str(ROOT), str(ROOT / "benchmarks"), str(HERE)]

from checkpoints import N_PASSAGES, N_QUERIES, Checkpoint, real_checkpoints, tiny_checkpoints  # noqa: E402
from environments import peer_python  # noqa: E402
from hardware import machine  # noqa: E402

from colbert_nb.encoder import ColBERT  # noqa: E402
from colbert_nb.evaluation import evaluate, top_k  # noqa: E402
from colbert_nb.scoring import maxsim_packed, pad  # noqa: E402

PEERS = {"colbert-ai": "colbert_ai", "RAGatouille": "ragatouille", "PyLate": "pylate",
         "sentence-transformers": "sentence_transformers"}  # loader -> environment
TOLERANCE = 1e-4


def known(loader: str, checkpoint: Checkpoint) -> str | None:
    "Why a library is known not to give our vectors and ranking; None where it has to."
    if loader in ("colbert-ai", "RAGatouille"):
        if not checkpoint.settings["mask_punctuation"]:
            return "its encoder fails without mask_punctuation"
        if not checkpoint.settings["query_expansion"]:
            return "it always fills queries up"
        if checkpoint.name.endswith("narrow window") and loader == "RAGatouille":
            return "transformers 4.48 gives other vectors to masks that have no token of the query in their window"
    if checkpoint.loaders:
        return "artifact.metadata has no word for it"
    return None


class Vectors:
    "What one loader computed of one checkpoint."

    def __init__(self, queries: list[torch.Tensor], documents: list[torch.Tensor], scores: torch.Tensor | None = None, found=None):
        self.queries, self.documents, self.found = queries, documents, found
        Q, Q_mask = pad(queries)
        lengths = torch.tensor([len(d) for d in documents])
        self.exact = maxsim_packed(Q, torch.cat(documents), lengths, Q_mask)  # (queries, documents)
        self.scores = self.exact if scores is None else scores

    def padding_scored(self) -> torch.Tensor:  # (queries scored, documents)
        "MaxSim in which a zero vector behind every shorter document takes part."
        longest = max(len(d) for d in self.documents)
        rows = [torch.stack([(q @ d.T).amax(1).clamp_min(0 if len(d) < longest else -1).sum() for d in self.documents])
                for q in self.queries[:len(self.scores)]]
        return torch.stack(rows)

    @classmethod
    def read(cls, file: Path) -> "Vectors":
        "The vectors in a file of loaders.py."
        arrays = {name: torch.tensor(array) for name, array in np.load(file).items()}
        parts = [list(arrays[kind].float().split(arrays[f"{kind[:-1]}_lengths" if kind == "documents" else "query_lengths"].tolist()))
                 for kind in ("queries", "documents")]
        return cls(*parts, arrays["scores"].float(), arrays["found"].tolist() if "found" in arrays else None)


def ours(checkpoint: Checkpoint) -> Vectors:
    "Our own vectors of a saved checkpoint."
    model = ColBERT.from_pretrained(checkpoint.path, device="cpu")
    return Vectors(model.encode_queries(checkpoint.queries), model.encode_documents(checkpoint.documents))


def difference(own: list[torch.Tensor], theirs: list[torch.Tensor]) -> float | str:
    "The largest difference of a number, or what differs in the shapes."
    for row, (a, b) in enumerate(zip(own, theirs, strict=True)):
        if a.shape != b.shape:
            return f"{b.shape[0]} vectors of text {row}, not {a.shape[0]}"
    return max(float((a - b).abs().max()) for a, b in zip(own, theirs))


def same_ranking(own: torch.Tensor, theirs: torch.Tensor, k: int = 10) -> bool:
    "Whether their first passages of each query are ours, where ours are not tied within the tolerance."
    order = theirs.argsort(dim=1, descending=True, stable=True)[:, :k]
    sorted_own = own.sort(1, descending=True).values[:, :k]
    return bool(((own.gather(1, order) - sorted_own).abs() <= TOLERANCE * own.abs().max()).all())


def ndcg(scores: torch.Tensor, qrels: dict) -> float:
    "nDCG@10 of a table of scores."
    best, ids = top_k(scores, 10)
    run = {str(q): {str(p): float(s) for p, s in zip(row, values)} for q, (row, values) in enumerate(zip(ids.tolist(), best.tolist()))}
    return evaluate(run, qrels, ["nDCG@10"])["nDCG@10"]


def ndcg_found(found: list[list[int]], qrels: dict) -> float:
    "nDCG@10 of lists of passages, best first."
    run = {str(q): {str(p): -float(rank) for rank, p in enumerate(row) if p >= 0} for q, row in enumerate(found)}
    return evaluate(run, qrels, ["nDCG@10"])["nDCG@10"]


def compare(checkpoint: Checkpoint, own: Vectors, theirs: Vectors) -> dict:
    "One cell of the table."
    rows, most = len(theirs.scores), TOLERANCE * float(own.exact.abs().max())
    result = {"queries": difference(own.queries, theirs.queries), "documents": difference(own.documents, theirs.documents),
              "maxsim": float((theirs.exact[:rows] - theirs.scores).abs().max()), "ranking": same_ranking(own.exact[:rows], theirs.scores)}
    if result["maxsim"] > most and float((theirs.padding_scored() - theirs.scores).abs().max()) <= most:
        result["maxsim"] = "padding is scored"
    result["same"] = all(type(result[kind]) is float and result[kind] <= TOLERANCE for kind in ("queries", "documents")) \
        and (type(result["maxsim"]) is str or result["maxsim"] <= most) and result["ranking"]
    if checkpoint.qrels:
        result["nDCG@10"] = ndcg(theirs.exact, checkpoint.qrels)
    if theirs.found is not None:
        exact = top_k(theirs.exact, 10)[1].tolist()
        shared = [len(set(a) & set(b)) / 10 for a, b in zip(exact, theirs.found)]
        result["index"] = {"overlap@10": sum(shared) / len(shared), "nDCG@10": ndcg_found(theirs.found, checkpoint.qrels)}
    return result


def run_loader(loader: str, checkpoints: list[Checkpoint], envs: Path, work: Path) -> tuple[dict[str, str | None], dict[str, str]]:
    "What the library said of each checkpoint (None: nothing, it loaded), and its versions. Vectors are left in files."
    out = work / loader
    out.mkdir(parents=True, exist_ok=True)
    job = {"loader": loader, "out": str(out), "checkpoints": [
        {"name": c.name, "path": str(c.path), "queries": c.queries, "documents": c.documents, "search": c.search, "scored": c.scored,
         "doc_maxlen": 64} for c in checkpoints]}
    (out / "job.json").write_text(json.dumps(job), encoding="utf-8")
    environment = {k: v for k, v in os.environ.items() if k != "PYTHONPATH"}
    environment |= {"HF_HUB_OFFLINE": "1", "TOKENIZERS_PARALLELISM": "false", "GIT_PYTHON_REFRESH": "quiet", "CUDA_VISIBLE_DEVICES": ""}
    python = peer_python(PEERS[loader], envs)
    environment["TORCH_EXTENSIONS_DIR"] = str(Path(python).parent.parent / "extensions")  # compiled for this environment's torch
    environment["PATH"] = os.pathsep.join((str(Path(python).parent), environment.get("PATH", "")))  # ninja, for colbert-ai's extension
    with (out / "log.txt").open("w") as log:
        command = [python, str(HERE / "loaders.py"), str(out / "job.json")]
        ran = subprocess.run(command, stdout=subprocess.PIPE, stderr=log, text=True, env=environment)
    lines = [json.loads(line) for line in ran.stdout.splitlines()]
    said = {line["checkpoint"]: line["error"] and line["error"].replace(f"{work}/", "") for line in lines}  # no paths in the record
    for checkpoint in checkpoints:
        said.setdefault(checkpoint.name, f"the process ended with status {ran.returncode}")
    return said, lines[-1]["versions"] if lines else {}


def table(record: dict, loaders: list[str]) -> str:
    "A row a checkpoint, a column a library, in Markdown."
    def cell(result: dict | None) -> str:
        if result is None:
            return ""
        said = "same" if result["same"] else result.get("known") or result.get("error") or "differs"
        return said + (f", nDCG@10 {result['nDCG@10']:.3f}" if "nDCG@10" in result else "")
    lines = ["| checkpoint | " + " | ".join(loaders) + " |", "|---" * (len(loaders) + 1) + "|"]
    lines += [f"| {name} | " + " | ".join(cell(row.get(loader)) for loader in loaders) + " |" for name, row in record["checkpoints"].items()]
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--trained", type=Path, help="a trained checkpoint, tried beside the others")
    parser.add_argument("--loaders", nargs="+", choices=PEERS, default=list(PEERS), help="a part of them; the results of the others stay as they are")
    parser.add_argument("--checkpoints", nargs="+", metavar="NAME", help="as in the table; the results of the others stay as they are")
    parser.add_argument("--envs", type=Path, default=ROOT / "benchmarks/.envs")
    parser.add_argument("--work", type=Path, default=ROOT / "benchmarks/.work/interop")
    parser.add_argument("--out", type=Path, default=ROOT / "benchmarks/results/interop.json")
    args = parser.parse_args()
    args.work.mkdir(parents=True, exist_ok=True)
    work = args.work.resolve()

    wanted = lambda name: not args.checkpoints or name in args.checkpoints
    checkpoints = tiny_checkpoints(work / "checkpoints", wanted) + real_checkpoints(work / "checkpoints", args.trained, wanted)
    record: dict = {"checkpoints": {}, "loaders": {}}
    if (args.checkpoints or args.loaders != list(PEERS)) and args.out.is_file():
        record = json.loads(args.out.read_text(encoding="utf-8"))
    own = {}
    for checkpoint in checkpoints:
        own[checkpoint.name] = ours(checkpoint)
        files = sorted(p.relative_to(checkpoint.path).as_posix() for p in checkpoint.path.rglob("*") if p.is_file())
        judged = {"nDCG@10": ndcg(own[checkpoint.name].exact, checkpoint.qrels)} if checkpoint.qrels else {}
        record["checkpoints"].setdefault(checkpoint.name, {}).update({"files": files, "ours": judged})
    surprises = []
    for loader in args.loaders:
        asked = [c for c in checkpoints if not c.loaders or loader in c.loaders]
        said, versions = run_loader(loader, asked, args.envs, work)
        record["loaders"][loader] = versions
        for checkpoint in asked:
            error = said[checkpoint.name]
            cell = {"error": error, "same": False} if error else \
                compare(checkpoint, own[checkpoint.name], Vectors.read(work / loader / f"{checkpoint.name}.npz"))
            if (reason := known(loader, checkpoint)) is not None:
                cell["known"] = reason
            if cell["same"] != (reason is None):
                surprises.append(f"{loader}, {checkpoint.name}: {json.dumps(cell)}")
            record["checkpoints"][checkpoint.name][loader] = cell
            print(f"{loader} | {checkpoint.name} | {json.dumps(cell)}", file=sys.stderr, flush=True)
    record |= {"tolerance": TOLERANCE, "passages": N_PASSAGES, "queries": N_QUERIES, "date": datetime.date.today().isoformat(),
               "command": "make interop", **machine("colbert-nb", "torch", "transformers", "sentence-transformers")}
    args.out.write_text(json.dumps(record, indent=1) + "\n", encoding="utf-8")
    print(table(record, list(record["loaders"])))
    if surprises:
        sys.exit("not as known:\n" + "\n".join(surprises))


if __name__ == "__main__":
    main()
