import csv
import re
import threading
from pathlib import Path

import pytest
import torch
from PIL import Image
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from pml_distill import cli
from pml_distill.datasets import Digits
from pml_distill.recipe.demo import DATASETS, Demo
from pml_distill.recipe.settings import WEIGHTS, aligned
from pml_distill.recipe.training import Training

QUICK = ["demo", "--dataset", "digits", "--epochs", "1", "--device", "cpu", "--losses", "relative_teacher"]


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    out = tmp_path_factory.mktemp("demo") / "out"
    before = set(threading.enumerate())
    assert cli.main([*QUICK, "--seeds", "2", "--out", str(out)]) == 0
    # A writer that is not closed keeps its thread and its file open.
    assert not [t for t in threading.enumerate() if t not in before and "Writer" in type(t).__name__]
    return out


def test_demo_writes_table_csv_pictures_and_logs(finished):
    rows = list(csv.DictReader(open(finished / "results.csv")))
    assert [(row["name"], row["seed"]) for row in rows] == [
        (name, seed) for name in ("teacher", "student", "relative_teacher") for seed in "01"
    ]
    for row in rows:
        assert 0 <= float(row["mean_average_precision_at_r"]) <= float(row["precision_at_1"]) <= 1
        assert int(row["flops"]) > 0 and float(row["latency_ms_batch_32"]) > 0
    assert float(rows[0]["agreement"]) == 1 and float(rows[0]["gap_recovered"]) == 1
    assert int(rows[0]["parameters"]) > 10 * int(rows[2]["parameters"])
    table = (finished / "table.md").read_text()
    assert "relative_teacher" in table and "±" in table and "MAP@R" in table
    cells = [line.split("|")[5].strip() for line in table.splitlines()]
    assert cells[0] == "aligned" and cells[2:] == ["", "", "no"]
    for name in ("map_at_r.png", "neighbors_student.png", "neighbors_relative_teacher.png"):
        assert min(Image.open(finished / name).size) > 100
    folder = finished / "seed0" / "relative_teacher"
    assert (folder / "logs" / "loss_histories.csv").exists()
    events = EventAccumulator(str(folder / "tensorboard")).Reload()
    assert events.Scalars("validation")[-1].value > 0


def test_what_aligns_the_spaces_is_known_of_every_loss():
    names = {name for name in WEIGHTS if aligned(name)}
    assert {"absolute_teacher", "cosine_teacher", "mutual_distance", "compress"} <= names
    # A second queue holds the student's own space.
    assert not names & {"relative_teacher", "soft_dark_rank", "compress_two_queues"}


def test_run_again_it_trains_nothing(finished, capsys, monkeypatch):
    monkeypatch.setattr(Training, "train", lambda self: pytest.fail("trained again"))
    assert cli.main([*QUICK, "--seeds", "2", "--out", str(finished)]) == 0
    assert "relative_teacher" in capsys.readouterr().out


def test_another_configuration_is_refused(finished, capsys):
    before = {p: p.read_text() for p in finished.rglob("figures.json")}
    assert cli.main([*QUICK, "--epochs", "2", "--out", str(finished)]) == 2
    assert "holds a run with epochs 1, not 2. Give --out another name" in capsys.readouterr().err
    assert before and {p: p.read_text() for p in finished.rglob("figures.json")} == before


def test_a_folder_with_runs_on_other_classes_is_refused(tmp_path, monkeypatch):
    Demo(tmp_path, "digits", 1)
    monkeypatch.setitem(DATASETS, "digits", lambda split: Digits(split, seed=1))
    with pytest.raises(ValueError, match="holds a run with images .*Give --out another name"):
        Demo(tmp_path, "digits", 1)


def test_a_folder_with_other_files_is_refused(tmp_path, capsys):
    (tmp_path / "thesis.tex").write_text("")
    assert cli.main([*QUICK, "--out", str(tmp_path)]) == 2
    assert "is not empty and holds no run" in capsys.readouterr().err
    assert [p.name for p in tmp_path.iterdir()] == ["thesis.tex"]


def test_interrupted_it_says_how_to_go_on(tmp_path, capsys, monkeypatch):
    def interrupted(*args):
        raise KeyboardInterrupt

    monkeypatch.setattr(Demo, "run", interrupted)
    assert cli.main([*QUICK, "--out", str(tmp_path / "out")]) == 130
    assert "The same command continues from here" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--losses", "dark_rank"], r"unknown names \['dark_rank'\]; known are .*soft_dark_rank"),
        (["--device", "abacus"], "--device abacus cannot be used"),
        (["--seeds", "0"], "--seeds must be at least 1, but is 0"),
        (["--epochs", "-3"], "--epochs must be at least 1, but is -3"),
    ],
)
def test_wrong_arguments_are_named_and_nothing_is_written(tmp_path, capsys, arguments, message):
    assert cli.main([*QUICK, "--out", str(tmp_path / "out"), *arguments]) == 2
    assert re.search(message, capsys.readouterr().err)
    assert not (tmp_path / "out").exists()


def test_every_run_starts_from_the_same_weights_and_batches(finished):
    job = Demo(finished, "digits", 1).job(0)
    trainings = [job.training("x", weights) for weights in ({}, {"relative_teacher": 1.0})]
    first, second = (training.network.state_dict() for training in trainings)
    assert all(torch.equal(first[key], second[key]) for key in first)
    orders = []
    for training in trainings:
        trainer = training.trainer(training.network)
        trainer.initialize_dataloader()
        trainer.epoch = 1
        orders.append(trainer.get_batch()[1])
    assert torch.equal(*orders)


def test_two_processes_may_claim_a_folder_at_once(tmp_path, monkeypatch):
    """The other one claims it just after this one has looked into it."""
    iterdir = Path.iterdir

    def claimed_meanwhile(folder):
        found = list(iterdir(folder))
        if not found and folder == tmp_path:
            monkeypatch.setattr(Path, "iterdir", iterdir)
            Demo(tmp_path, "digits", 1)
            (tmp_path / "seed0").mkdir()
        return found

    monkeypatch.setattr(Path, "iterdir", claimed_meanwhile)
    Demo(tmp_path, "digits", 1)
    assert {path.name for path in tmp_path.iterdir()} == {"settings.json", "seed0"}


def test_an_error_of_the_program_itself_keeps_its_trace(monkeypatch, tmp_path):
    monkeypatch.setattr(Demo, "run", lambda *args: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        cli.main([*QUICK, "--out", str(tmp_path / "out")])
