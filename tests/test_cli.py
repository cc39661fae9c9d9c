"""The command line: from a file to an answer, what a pipe sees, what a script is told."""

import configparser
import json
import logging
import os
import random
import shlex
import subprocess
import sys
from pathlib import Path

import pytest
from tiny import WORDS

from colbert_nb import cli
from colbert_nb.cli import main, table_text
from colbert_nb.cli_options import COMMANDS, EXAMPLES, OPTIONS, parse

ROOT = Path(__file__).parent.parent


def shell(*words, **options):
    "The command in a process of its own, as a script runs it."
    environment = {**os.environ, "PYTHONPATH": str(ROOT), **options.pop("env", {})}
    return subprocess.run([sys.executable, "-m", "colbert_nb.cli", *map(str, words)], capture_output=True, text=True, encoding="utf-8", env=environment, **options)


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    "A folder with pairs to train on, pairs to test with, and a collection."
    draw, folder = random.Random(0), tmp_path_factory.mktemp("shell")
    passages = [" ".join(draw.choices(WORDS, k=8)) for _ in range(40)]
    pairs = [(" ".join(passage.split()[2:4]), passage) for passage in passages]
    for name, rows in (("train.csv", pairs[:28]), ("test.csv", pairs[28:])):
        (folder / name).write_text("query,passage\n" + "".join(f"{q},{p}\n" for q, p in rows), encoding="utf-8")
    (folder / "collection.jsonl").write_text("".join(json.dumps({"id": f"p{n}", "text": text}) + "\n" for n, text in enumerate(passages)))
    return folder


@pytest.fixture
def run(place, monkeypatch, capfd):
    "A command in this process, in that folder: status, standard output, standard error."
    monkeypatch.chdir(place)

    def call(line, *words):
        capfd.readouterr()
        status = main([*shlex.split(line), *map(str, words)])
        said = capfd.readouterr()
        return status, said.out, said.err

    return call


@pytest.fixture(scope="module")
def trained(place, encoder):
    "Data and a checkpoint in that folder, made by the commands."
    before = Path.cwd()
    os.chdir(place)
    try:
        assert main(["prepare", "train.csv", "--model", str(encoder), "--documents", "collection.jsonl", "--miner", "bm25", "--min-rank", "2",
                     "--negatives", "2", "--out", "data"]) == 0
        assert main(["train", "data", "--model", str(encoder), "--name", "tiny", "--batch-size", "8", "--learning-rate", "1e-3", "--dim", "16",
                     "--doc-maxlen", "16", "--query-maxlen", "8", "--set", "bf16=false", "--set", "report_to=none"]) == 0
    finally:
        os.chdir(before)
    return place / "runs/tiny/best"


# from a file to an answer


def test_prepare_writes_what_the_files_say(place, trained):
    from colbert_nb.data import load_training_data

    data = load_training_data(place / "data")
    assert len(data.corpus) == 40 and len(data.queries) + len(data.validation) == 28
    manifest = json.loads((place / "data/manifest.json").read_text())
    assert manifest["settings"]["num_new_negatives"] == 2 and manifest["settings"]["miner"]["min_rank"] == 2
    assert manifest["settings"]["miner"]["max_rank"] == 102


def test_train_takes_its_options_and_writes_a_path(run, place, trained, encoder):
    from colbert_nb import ColBERT

    model = ColBERT.from_pretrained(trained, device="cpu")
    assert (model.linear.out_features, model.tokenizer.doc_maxlen, model.tokenizer.query_maxlen) == (16, 16, 8)
    status, out, err = run("train data --name tiny --model", encoder)
    assert status == 1 and not out and "resume" in err and len(err.splitlines()) == 1
    options = "--batch-size 8 --learning-rate 1e-3 --dim 16 --doc-maxlen 16 --query-maxlen 8 --set bf16=false --set report_to=none"
    status, out, err = run(f"train data --name tiny {options} --resume --model", encoder)
    assert (status, out) == (0, f"{Path('runs/tiny/best')}\n")


def test_evaluate_compares_before_and_after(run, place, trained, encoder):
    line = "evaluate runs/tiny/best --data test.csv --documents collection.jsonl --trained-on train.csv --bm25 --metric nDCG@10 --out results.json"
    status, out, err = run(line, "--json", encoder)
    assert status == 2  # one list of models, in one place
    status, out, err = run(f"evaluate {shlex.quote(str(encoder))} {line.removeprefix('evaluate ')} --json")
    assert status == 0 and err == ""
    results = json.loads(out)
    assert list(results) == ["bm25", str(encoder), "runs/tiny/best"] and all(0 < row["nDCG@10"] <= 1 for row in results.values())
    assert json.loads((place / "results.json").read_text()) == results

    from colbert_nb import ColBERT
    from colbert_nb.data_tables import read_pairs, read_texts
    from colbert_nb.evaluation import evaluate, search

    pairs, corpus = read_pairs(place / "test.csv"), read_texts(place / "collection.jsonl")
    corpus = list(dict.fromkeys([p for _, p in pairs] + corpus))
    run_of = search(ColBERT.from_pretrained(trained), [q for q, _ in pairs], corpus)
    wanted = evaluate(run_of, {q: {corpus.index(p): 1} for q, (_, p) in enumerate(pairs)}, ["nDCG@10"])
    assert results["runs/tiny/best"] == pytest.approx(wanted)

    status, out, err = run("evaluate runs/tiny/best --data test.csv")
    assert status == 0 and [len(line.split("\t")) for line in out.splitlines()] == [4, 4]


def test_a_test_that_was_trained_on_is_refused(run, place, trained):
    text = (place / "test.csv").read_text() + (place / "train.csv").read_text().splitlines()[1].upper() + "\n"
    (place / "leak.csv").write_text(text)
    status, out, err = run("evaluate runs/tiny/best --data leak.csv --trained-on train.csv")
    assert status == 1 and "got 1 that it does" in err and not out


def test_mine_writes_triplets_that_prepare_reads(run, place, trained, encoder):
    status, out, err = run("mine train.csv --documents collection.jsonl --miner bm25 --min-rank 1 --negatives 3")
    rows = [json.loads(line) for line in out.splitlines()]
    assert status == 0 and rows and all(not set(row["passage"]) & set(row["negative"]) for row in rows)
    status, out, err = run("mine data --miner runs/tiny/best --min-rank 2 --negatives 2 --out again.jsonl")
    assert (status, out) == (0, "again.jsonl\n")
    lines = (place / "again.jsonl").read_text().splitlines()
    assert {len(json.loads(line)["negative"]) for line in lines} == {2}
    status, out, err = run("prepare again.jsonl --no-mining --negatives 0 --out again --model", encoder)
    assert (status, out) == (0, "again\n")


def test_a_beir_folder_is_read(run, place, trained, encoder):
    folder = place / "beir"
    (folder / "qrels").mkdir(parents=True)
    (folder / "corpus.jsonl").write_text("".join(json.dumps({"_id": f"d{n}", "title": "", "text": f"{WORDS[n]} {WORDS[n + 1]}"}) + "\n" for n in range(20)))
    (folder / "queries.jsonl").write_text("".join(json.dumps({"_id": f"q{n}", "text": WORDS[n]}) + "\n" for n in range(12)))
    for split, part in (("train", range(8)), ("test", range(8, 12))):
        lines = "".join(f"q{n}\td{n}\t{1 + n % 2}\n" for n in part)
        (folder / f"qrels/{split}.tsv").write_text("query-id\tcorpus-id\tscore\n" + lines)
    status, out, _ = run("prepare beir --miner bm25 --min-rank 0 --negatives 1 --out from_beir --model", encoder)
    assert (status, out) == (0, "from_beir\n")
    status, out, _ = run("evaluate runs/tiny/best --data beir --trained-on beir --json")
    assert status == 0 and "Recall@100" in json.loads(out)["runs/tiny/best"]
    status, _, err = run("evaluate runs/tiny/best --data beir --split dev")
    assert status == 1 and "dev.tsv" in err


def test_search_fills_an_index_and_asks_it(run, place, trained):
    status, out, err = run("search runs/tiny/best index --documents collection.jsonl")
    assert (status, out.splitlines()[1].split("\t")) == (0, ["index", "40"])
    query = (place / "test.csv").read_text().splitlines()[1].split(",")[0]
    status, out, err = run("search runs/tiny/best index -k 3 --json", query)
    hits = json.loads(out)
    assert status == 0 and err == "" and [hit["rank"] for hit in hits] == [1, 2, 3] and hits[0]["query"] == query
    assert hits[0]["score"] >= hits[1]["score"] and hits[0]["id"].startswith("p") and hits[0]["text"].startswith("word")
    status, out, _ = run("search runs/tiny/best index --queries test.csv -k 2")
    assert status == 0 and len(out.splitlines()) == 1 + 2 * 12
    (place / "more.txt").write_text("word1 word2\n")
    assert run("search runs/tiny/best index --documents more.txt")[0] == 1
    (place / "more.jsonl").write_text('{"id": "new", "text": "word1 word2"}\n')
    assert run("search runs/tiny/best index --documents more.jsonl --add")[:2] == (0, "index\tpassages\nindex\t41\n")
    assert run("search runs/tiny/best index --documents more.jsonl --overwrite")[:2] == (0, "index\tpassages\nindex\t1\n")


def test_export_and_push_pass_on_what_was_asked(run, trained, monkeypatch):
    from colbert_nb import hub, onnx, vespa

    asked = []
    monkeypatch.setattr(onnx, "export_to_vespa_onnx", lambda *places, **options: asked.append((places, options)) or Path("out/vespa_colbert.onnx"))
    monkeypatch.setattr(vespa, "export_vespa_application", lambda *places, **options: asked.append((places, options)) or Path("out"))
    assert run("export runs/tiny/best out --quantize int8 --opset 20")[1].strip().endswith("vespa_colbert.onnx")
    assert run("export runs/tiny/best out --to vespa --no-check")[1] == "out\n"
    assert asked == [(("runs/tiny/best", "out"), {"quantize": "int8", "opset": 20}), (("runs/tiny/best", "out"), {"check": False})]
    assert run("export runs/tiny/best out --to vespa --opset 20")[0] == 2

    status, out, _ = run("push runs/tiny/best ada/tiny --dry-run --json")
    assert status == 0 and {"model.safetensors", "artifact.metadata", "README.md"} <= {row["file"] for row in json.loads(out)}
    status, out, err = run("push runs/tiny/best tiny --dry-run")
    assert (status, out) == (1, "") and "'user/name'" in err
    monkeypatch.setattr(hub, "export_to_huggingface_hub", lambda *places, **options: asked.append((places, options)) or "https://hub/commit")
    assert run("push runs/tiny/best ada/tiny --private --message first")[1] == "https://hub/commit\n"
    assert asked[-1] == (("runs/tiny/best", "ada/tiny", False, True), {"private": True, "commit_message": "first"})


# what a script is told

REFUSED = {
    "prepare nowhere.csv --model tiny": "nowhere.csv",
    "prepare empty.csv --model tiny": "empty.csv line 3, passage",
    "prepare labels.csv --model tiny": "labels.csv line 2: expected the label 1 or 0",
    "prepare torn.csv --model tiny": "positive in torn.csv line 2 and negative in torn.csv line 3",
    "prepare train.csv --model tiny --validation empty.csv": "empty.csv line 3",
    "prepare train.csv --model tiny --documents empty.csv": "empty.csv line 3",
    "prepare train.csv --model tiny --encoding utf-99": "utf-99",
    "mine empty.csv --miner bm25": "empty.csv line 3",
    "train nowhere --model tiny --name a": "colbert-nb prepare",
    "evaluate tiny --data empty.csv": "empty.csv line 3",
    "evaluate tiny --data beir_nowhere": "nothing of that name",
    "search tiny nowhere word": "--documents FILE",
    "search tiny index --queries empty.csv --documents nothing.txt": "nothing.txt",
}
MISUSED = {"": "required", "tune": "invalid choice", "train data": "--model", "prepare a.csv --model b --neg 3": "--neg", "search a b": "give a query",
           "train a --model b --name c --batch-size many": "invalid int", "train a --model b --name c --set epochs": "NAME=VALUE",
           "train a b --model c --name d": "unrecognized arguments: b", "export a b --quantize int4": "invalid choice"}


@pytest.fixture(scope="module")
def bad(place):
    (place / "empty.csv").write_text("query,passage\na,b\nc,\n")
    (place / "labels.csv").write_text("query,passage,label\na,b,yes\n")
    (place / "torn.csv").write_text("query,passage,label\na,b,1\na,b,0\n")
    (place / "nothing.txt").write_text("\n")


@pytest.mark.parametrize("line", REFUSED)
def test_refused_in_one_line(run, bad, line):
    status, out, err = run(line)
    assert (status, out) == (1, "") and len(err.splitlines()) == 1 and REFUSED[line] in err and err.startswith(f"colbert-nb {line.split()[0]}: ")


@pytest.mark.parametrize("line", MISUSED)
def test_misused(run, line):
    status, out, err = run(line)
    assert (status, out) == (2, "") and MISUSED[line] in err.splitlines()[-1]


def test_debug_shows_where(run, bad):
    with pytest.raises(ValueError, match="line 3"):
        run("prepare empty.csv --model tiny --debug")


@pytest.mark.parametrize("error, status, said", [(KeyboardInterrupt(), 130, "--resume goes on"), (FloatingPointError("loss\nis NaN"), 1, "FloatingPointError: loss is NaN"),
                                                 (OSError("disk full"), 1, ": disk full")])
def test_what_goes_wrong_later(run, monkeypatch, error, status, said):
    def fail(args):
        raise error

    monkeypatch.setitem(cli.RUN, "train", fail)
    got = run("train data --model tiny --name a")
    assert got[0] == status and said in got[2] and len(got[2].splitlines()) == 1 and not got[1]


def test_only_the_first_process_writes(run, monkeypatch):
    monkeypatch.setitem(cli.RUN, "train", lambda args: "runs/a/best")
    assert run("train data --model tiny --name a")[1] == "runs/a/best\n"
    monkeypatch.setenv("RANK", "1")
    assert run("train data --model tiny --name a")[:2] == (0, "")


def test_the_log_goes_to_standard_error_and_is_left_as_it_was(run, monkeypatch):
    def speak(args):
        logging.getLogger("colbert_nb.trainer").info("at work")
        logging.getLogger("colbert_nb.trainer").warning("look")
        return "done"

    monkeypatch.setitem(cli.RUN, "train", speak)
    logger = logging.getLogger("colbert_nb")
    before = logger.level, list(logger.handlers)
    assert run("train data --model tiny --name a") == (0, "done\n", "look\n")
    assert run("train data --model tiny --name a --verbose") == (0, "done\n", "at work\nlook\n")
    assert (logger.level, list(logger.handlers)) == before


def test_tables():
    rows = [{"id": "a", "score": 0.12345, "text": "one\ntwo\tthree"}, {"id": "bb", "score": 12.0, "text": "é" * 400}]
    assert table_text(rows, terminal=False).splitlines()[1] == "a\t0.1235\tone two three"
    assert json.loads(table_text(rows, as_json=True)) == rows
    shown = table_text(rows, terminal=True).splitlines()
    assert shown[0].index("score") == shown[1].index("0.1235") and len(shown[2]) < 400
    assert table_text([]) == "" and table_text([], as_json=True) == "[]"


# help


@pytest.mark.parametrize("command", COMMANDS)
def test_help_shows_an_example_that_is_understood(run, command):
    status, out, err = run(f"{command} --help")
    assert status == 0 and not err and EXAMPLES[command] in out
    assert parse(shlex.split(EXAMPLES[command])[1:]).command == command
    assert command in cli.RUN and all(option in out for option in OPTIONS[command])


def test_the_readme_of_the_commands():
    status = shell("--help")
    assert status.returncode == 0 and all(command in status.stdout for command in COMMANDS) and not status.stderr


def test_help_and_refusals_import_nothing_heavy(place, bad):
    code = ("import sys; from colbert_nb.cli import main; status = [main(line.split()) for line in sys.argv[1:]]; "
            "print(status, 'torch' in sys.modules, 'transformers' in sys.modules)")
    lines = ["--help", "train --help", "train --epoch", "prepare empty.csv --model tiny", "mine torn.csv --miner bm25", "train data_nowhere --model a --name b"]
    ran = subprocess.run([sys.executable, "-c", code, *lines], capture_output=True, text=True, cwd=place, env={**os.environ, "PYTHONPATH": str(ROOT)})
    assert "[0, 0, 2, 1, 1, 1]" in ran.stdout and ran.stdout.rstrip().endswith("False False"), ran.stdout + ran.stderr


def test_a_pipe_sees_the_result_alone(place, trained):
    "In a process of its own, where every library may speak: one table, nothing else, in UTF-8."
    (place / "words.txt").write_text("word1 word2 é\nword3\n", encoding="utf-8")
    ran = shell("search", trained, place / "words", "--documents", place / "words.txt", "-k", 2, "word2 é", cwd=place, env={"PYTHONIOENCODING": "ascii"})
    assert ran.returncode == 0 and ran.stderr == ""
    assert [len(line.split("\t")) for line in ran.stdout.splitlines()] == [5] * 3 and "é" in ran.stdout


def test_the_command_is_installed_with_the_package(tmp_path):
    settings = configparser.ConfigParser(delimiters=["="])
    settings.read(ROOT / "settings.ini", encoding="utf-8")
    assert settings["DEFAULT"]["console_scripts"] == "colbert-nb=colbert_nb.cli:main"
    code = "import setuptools; setuptools.setup = lambda **options: print(options['entry_points']['console_scripts']); exec(open('setup.py').read())"
    ran = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)
    assert ran.stdout.strip() == "['colbert-nb=colbert_nb.cli:main']", ran.stderr
