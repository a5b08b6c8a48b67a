import csv
import json
import threading
from pathlib import Path

import pytest
import torch
from PIL import Image
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from pml_distill import cli
from pml_distill.demo import LOSSES, Demo, DemoConfig

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
        assert int(row["flops"]) > 0 and float(row["latency_ms_batch_64"]) > 0
    assert float(rows[0]["neighbor_agreement"]) == 1 and float(rows[0]["gap_recovered"]) == 1
    assert int(rows[0]["parameters"]) > 10 * int(rows[2]["parameters"])
    table = (finished / "table.md").read_text()
    assert "relative_teacher" in table and "±" in table and "MAP@R" in table
    aligned = [line.split("|")[5].strip() for line in table.splitlines()]
    assert aligned[0] == "aligned" and aligned[2:] == ["", "", "no"]
    for name in ("map_at_r.png", "neighbors.png"):
        assert min(Image.open(finished / name).size) > 100
    logs = finished / "seed0" / "relative_teacher" / "logs"
    assert (logs / "loss_histories.csv").exists() and any("TEST_vs_self" in p.name for p in logs.iterdir())
    events = EventAccumulator(str(finished / "seed0" / "relative_teacher" / "tensorboard")).Reload()
    logged = {tag.split("/")[-1]: events.Scalars(tag)[-1].value for tag in events.Tags()["scalars"]}
    assert logged["mean_average_precision_at_r_level0"] == pytest.approx(float(rows[4]["mean_average_precision_at_r"]))


def test_what_aligns_the_spaces_is_known_of_every_loss():
    aligned = {name for name, loss in LOSSES.items() if loss.aligned}
    assert {"absolute_teacher", "cosine_teacher", "mutual_distance", "compress"} <= aligned
    # Logits may agree where embeddings do not, and a second queue holds the student's own space.
    assert not aligned & {"relative_teacher", "soft_dark_rank", "logit_distillation", "compress_two_queues"}


def test_the_distillation_comes_in_between_a_fifth_and_a_half_of_the_training(finished, tmp_path):
    demo = Demo(DemoConfig("digits", 1), finished, torch.device("cpu"))
    loss = LOSSES["relative_teacher"]
    trainer, _ = demo.trainer_and_tester(tmp_path / "student", demo.networks(8, 0), 0, 0.02, loss)
    trainer.epoch = 1
    trainer.iterations_per_epoch = trainer.total_steps = 100
    for trainer.iteration, share in ((10, 0), (20, 0), (35, 1 / 2), (50, 1), (90, 1)):
        trainer.update_loss_weights()
        assert trainer.loss_weights == pytest.approx({"metric_loss": 1, "distillation_loss": share * loss.weight})


def test_run_again_it_trains_nothing(finished, capsys, monkeypatch):
    monkeypatch.setattr(Demo, "trainer_and_tester", lambda *args: pytest.fail("trained again"))
    assert cli.main([*QUICK, "--seeds", "2", "--out", str(finished)]) == 0
    assert "relative_teacher" in capsys.readouterr().out


def test_another_configuration_is_refused(finished, capsys):
    before = {p: p.read_text() for p in finished.rglob("result.json")}
    with pytest.raises(SystemExit) as stop:
        cli.main([*QUICK, "--epochs", "2", "--out", str(finished)])
    assert stop.value.code == 2 and "choose another folder" in capsys.readouterr().err
    assert before and {p: p.read_text() for p in finished.rglob("result.json")} == before


def test_a_folder_with_runs_on_other_classes_is_refused(tmp_path, monkeypatch):
    Demo(DemoConfig("digits"), tmp_path, torch.device("cpu"))
    load = Demo.load

    def without_one(self, split, training):
        data = load(self, split, training)
        kept = data.labels != data.labels[0]
        data.labels, data.pixels = data.labels[kept], data.pixels[kept]
        return data

    monkeypatch.setattr(Demo, "load", without_one)
    with pytest.raises(ValueError, match="out folder .* holds a demo with .*'labels'.*; choose another folder"):
        Demo(DemoConfig("digits"), tmp_path, torch.device("cpu"))


def test_a_folder_with_other_files_is_refused(tmp_path, capsys):
    (tmp_path / "thesis.tex").write_text("")
    with pytest.raises(SystemExit):
        cli.main([*QUICK, "--out", str(tmp_path)])
    assert "is not empty and holds no demo" in capsys.readouterr().err
    assert [p.name for p in tmp_path.iterdir()] == ["thesis.tex"]


def test_interrupted_it_says_how_to_go_on(tmp_path, capsys, monkeypatch):
    def interrupted(*args):
        raise KeyboardInterrupt

    monkeypatch.setattr(Demo, "run", interrupted)
    assert cli.main([*QUICK, "--out", str(tmp_path / "out")]) == 130
    assert "goes on from here" in capsys.readouterr().err


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
    with pytest.raises(SystemExit) as stop:
        cli.main([*QUICK, "--out", str(tmp_path / "out"), *arguments])
    error = capsys.readouterr().err
    assert stop.value.code == 2
    import re

    assert re.search(message, error)
    assert not (tmp_path / "out").exists()


def test_every_run_starts_from_the_same_weights_and_batches(tmp_path):
    import torch

    demo = Demo(DemoConfig("digits", 1), tmp_path / "out", torch.device("cpu"))
    demo.run("teacher", 0)
    first, second = demo.networks(8, 0), demo.networks(8, 0)
    assert all(torch.equal(a, b) for key in first for a, b in zip(first[key].parameters(), second[key].parameters()))
    orders = []
    for name in ("student", "relative_teacher"):
        trainer, _ = demo.trainer_and_tester(tmp_path / name, demo.networks(8, 0), 0, 0.01, LOSSES.get(name))
        trainer.initialize_dataloader()
        trainer.epoch = 1
        orders.append(trainer.get_batch()[1])
    assert torch.equal(*orders)


def test_an_interrupted_run_goes_on_from_its_last_epoch(tmp_path):
    import torch

    def demo(name):
        return Demo(DemoConfig("digits", 2), tmp_path / name, torch.device("cpu"))

    whole = demo("whole").run("teacher", 0)
    broken = demo("broken")
    original = Demo.trainer_and_tester

    def stops_after_one_epoch(self, *args):
        trainer, tester = original(self, *args)
        save = trainer.end_of_epoch_hook

        def stop(trainer):
            save(trainer)
            raise KeyboardInterrupt

        trainer.end_of_epoch_hook = stop
        return trainer, tester

    broken.trainer_and_tester = stops_after_one_epoch.__get__(broken)
    with pytest.raises(KeyboardInterrupt):
        broken.run("teacher", 0)
    assert broken.results() == []
    assert demo("broken").run("teacher", 0) == whole
    assert json.loads((tmp_path / "broken" / "config.json").read_text())["epochs"] == 2


def test_two_processes_may_claim_a_folder_at_once(tmp_path, monkeypatch):
    """The other one claims it just after this one has looked into it."""
    iterdir = Path.iterdir

    def claimed_meanwhile(folder):
        found = list(iterdir(folder))
        if not found and folder == tmp_path:
            monkeypatch.setattr(Path, "iterdir", iterdir)
            Demo(DemoConfig("digits"), tmp_path, torch.device("cpu"))
            (tmp_path / "seed0").mkdir()
        return found

    monkeypatch.setattr(Path, "iterdir", claimed_meanwhile)
    Demo(DemoConfig("digits"), tmp_path, torch.device("cpu"))
    assert {path.name for path in tmp_path.iterdir()} == {"config.json", "seed0"}
