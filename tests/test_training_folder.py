"""The folder of a run: what is a checkpoint, what a log says, what a run may be begun in, how it ends early."""

import errno
import json
import logging

import pytest
from hypothesis import given
from hypothesis import strategies as st
from safetensors import SafetensorError

from colbert_nb.training_folder import LEFTOVER, STATE, check_output, checkpoints, cut_log, open_run, plot_log, read_log, told

DESCRIPTION = {"settings": {"seed": 42}, "data": {"sha256": "1f3a"}}
VALUES = st.dictionaries(st.text(min_size=1), st.none() | st.integers() | st.floats(allow_nan=False) | st.text())


def complete(run, step):
    (run / f"checkpoint-{step}" / STATE).mkdir(parents=True)
    (run / f"checkpoint-{step}" / STATE / "trainer_state.json").write_text("{}")


@given(st.lists(VALUES), st.data())
def test_a_log_can_be_cut_anywhere(tmp_path_factory, lines, data):
    run = tmp_path_factory.mktemp("log")
    whole = "".join(json.dumps(line) + "\n" for line in lines).encode()
    cut = data.draw(st.integers(0, len(whole)))
    (run / "log.jsonl").write_bytes(whole[:cut])
    assert read_log(run) == lines[:whole[:cut].count(b"\n")]


def test_the_log_ends_where_the_run_goes_on(tmp_path):
    (tmp_path / "log.jsonl").write_text('{"step": 0, "nDCG@10": 0.5}\n{"step": 1, "loss": 2}\n{"step": 2, "loss": 1}\n{"ste')
    cut_log(tmp_path, 1)
    assert [line["step"] for line in read_log(tmp_path)] == [0, 1]
    cut_log(tmp_path, -1)
    assert read_log(tmp_path) == [] and (tmp_path / "log.jsonl").read_bytes() == b""


def test_only_complete_folders_with_the_right_name_are_checkpoints(tmp_path):
    for step in (2, 10, 9):
        complete(tmp_path, step)
    for name in (".checkpoint-12.part", "checkpoint-13.old", "checkpoint-x", "my-checkpoint-14"):
        (tmp_path / name / STATE).mkdir(parents=True)
        (tmp_path / name / STATE / "trainer_state.json").write_text("{}")
    (tmp_path / "checkpoint-15").mkdir()
    assert list(checkpoints(tmp_path)) == [2, 9, 10]


@pytest.mark.parametrize("name, left", [
    (".checkpoint-3.part", True), (".checkpoint-3.old", True), ("..checkpoint-3.part.part", True), (".best.part", True), (".run.json.part", True),
    (".log.jsonl.part", True), ("..best.part.old", True), ("checkpoint-3", False), (".checkpoint-3", False), (".notes.part", False), ("best", False),
    ("checkpoint-3.part", False), (".gitignore", False)])
def test_what_a_kill_leaves_is_known_by_its_name(tmp_path, name, left):
    assert bool(LEFTOVER.fullmatch(name)) == left
    open_run(tmp_path / "run", DESCRIPTION)
    (tmp_path / "run" / name).mkdir()
    open_run(tmp_path / "run", DESCRIPTION, resume=True)
    assert (tmp_path / "run" / name).exists() != left


def test_overwriting_takes_the_run_and_leaves_what_is_not_its_own(tmp_path):
    run = tmp_path / "run"
    open_run(run, DESCRIPTION)
    complete(run, 4)
    (run / "best").mkdir()
    for name in ("results.json", "log.jsonl"):
        (run / name).write_text("{}\n")
    assert open_run(run, DESCRIPTION, resume=True).name == "checkpoint-4"
    assert open_run(run, DESCRIPTION | {"settings": {"seed": 1}}, overwrite=True) is None
    assert sorted(p.name for p in run.iterdir()) == ["results.json", "run.json"]
    assert check_output(run, resume=True)[1]["settings"] == {"seed": 1}


@pytest.mark.parametrize("error", [
    OSError(errno.ENOSPC, "No space left on device"), OSError(errno.EDQUOT, "Disk quota exceeded"),
    SafetensorError("Error while serializing: I/O error: No space left on device (os error 28)"),
    RuntimeError("[enforce fail at inline_container.cc:858] . PytorchStreamWriter failed writing file data/0: file write failed"),
    RuntimeError("[enforce fail at inline_container.cc:672] . unexpected pos 17728 vs 17616")])
def test_a_full_disk_is_said_with_the_last_good_checkpoint(tmp_path, error):
    complete(tmp_path, 4)
    with pytest.raises(OSError, match="full .*make room.*checkpoint-4.*resume=True") as caught:
        with told(tmp_path):
            raise error
    assert caught.value.errno == errno.ENOSPC and caught.value.__cause__ is error


def test_other_errors_stay_what_they_are(tmp_path):
    for error in (RuntimeError("out of memory"), PermissionError(errno.EACCES, "Permission denied"), ValueError("row 3")):
        with pytest.raises(type(error)) as caught:
            with told(tmp_path):
                raise error
        assert caught.value is error and error.__notes__ == ["no checkpoint was saved yet"]


def test_ctrl_c_says_where_to_go_on(tmp_path, caplog):
    complete(tmp_path, 8)
    with caplog.at_level(logging.WARNING), pytest.raises(KeyboardInterrupt):
        with told(tmp_path):
            raise KeyboardInterrupt
    assert "checkpoint-8" in caplog.text and "resume=True" in caplog.text


def test_plots_of_every_kind_of_log(tmp_path):
    step = {"loss": 1.0, "learning_rate": 1e-5, "positive": 20.0, "hardest_negative": None}
    for name, lines in {"one": [step | {"step": 1}], "upstream": [step | {"step": i, "hardest_negative": 3.0} for i in range(1, 5)],
                        "all": [{"step": 0, "MRR@10": 0.1}, step | {"step": 1, "grad_norm": 2.0, "epoch": 1.0}, {"step": 1, "MRR@10": 0.2}]}.items():
        (tmp_path / name).mkdir()
        (tmp_path / name / "log.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
        figure = plot_log(tmp_path / name)
        assert figure.axes[2].get_visible() == (name == "all")
        figure.canvas.draw()
        for axis in figure.axes[:3]:
            if axis.get_visible():
                assert axis.get_legend().get_window_extent().y0 >= axis.get_window_extent().y1 - 1
    with pytest.raises(ValueError, match="logged a step"):
        plot_log(tmp_path / "nowhere")
