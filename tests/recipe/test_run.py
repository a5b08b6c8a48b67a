"""The whole job on rendered images: what a run leaves behind, how it continues, and what it refuses."""

import csv
import json
import logging
import multiprocessing
import os
import re
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file
from torch import nn

from pml_distill import cli
from pml_distill.models import Preprocessing
from pml_distill.recipe import Run, deploy, distill, load_student, training
from pml_distill.teachers import TeacherCache
from pml_distill.trainers import DistillationTrainer

TEACHER, STUDENT = "torchvision/resnet18", "timm/mobilenetv3_small_050"
SMALL = {"pretrained": False, "image_size": 32, "views": 2, "workers": 0, "batch_size": 32, "device": "cpu"}
FLAGS = "--no-pretrained --image-size 32 --workers 0 --batch-size 32 --device cpu".split()


def train_flags(photos, out, *more):
    named = ["--teacher", TEACHER, "--student", STUDENT, "--out", str(out), "--views", "2", "--epochs", "2"]
    return ["train", str(photos), *named, "--tune-teacher", "2", *FLAGS, *more]


@pytest.fixture(scope="module")
def finished(photos, tmp_path_factory):
    out = tmp_path_factory.mktemp("runs") / "run"
    assert cli.main(train_flags(photos, out, "--baseline", "--int8")) == 0
    return out


def short(images, out, **options):
    """Return a run of one epoch without tuning."""
    named = {"teacher": TEACHER, "student": STUDENT, "epochs": 1, "tune_teacher": 0, "losses": ["cosine_teacher:1"]}
    return distill(images, out=out, **(named | SMALL | options))


class Tiny(nn.Module):
    preprocessing = Preprocessing((24, 24))

    def __init__(self):
        super().__init__()
        self.conv = nn.Conv2d(3, 16, 3, 2)

    def forward(self, images):
        return self.conv(images).relu()


def tiny():
    """Return options for networks that take no time."""
    return {"teacher": Tiny(), "student": Tiny(), "image_size": None}


def test_a_run_leaves_a_table_pictures_logs_and_a_report(finished):
    rows = list(csv.DictReader(open(finished / "results.csv")))
    names = [row["network"] for row in rows]
    assert names[:2] == ["teacher", "student without teacher"] and names[2:] in ([], ["distilled student"])
    for row in rows:
        assert 0 < float(row["mean_average_precision_at_r"]) <= float(row["recall_at_10"]) <= 1
        assert int(row["flops"]) > 1e6 and float(row["latency_ms_batch_32"]) > 0
    assert float(rows[0]["agreement"]) == 1 and int(rows[0]["parameters"]) > 10 * int(rows[1]["parameters"])
    for picture in finished.glob("*.png"):
        assert min(Image.open(picture).size) > 300
    page = (finished / "report.html").read_text()
    assert not re.search(r"https?:|//|<link|<script|url\(", re.sub(r"base64,[\w+/=]+", "", page))
    assert page.count("data:image/png;base64,") == len(list(finished.glob("*.png"))) == 2 + len(rows)
    assert f"<td>{float(rows[1]['precision_at_1']):.3f}</td>" in page and "width=device-width" in page
    for name in ("teacher", "baseline", "choice/0"):
        assert (finished / name / "logs" / "loss_histories.csv").exists()
        assert list((finished / name / "tensorboard").iterdir())
    assert not list(finished.rglob("*.tmp")) and not list(finished.rglob("checkpoint*"))


def test_the_report_says_what_was_decided(finished):
    notes = " ".join(json.loads((finished / "config.json").read_text())["notes"])
    assert re.search(r"The teacher was tuned on labels: MAP@R on validation images 0\.\d+ before, 0\.\d+ after", notes)
    assert re.search(r"The weight .* chosen on validation images: .* short runs with 0 times 0\.\d+, 1 times", notes)
    assert re.search(r"The student to deploy is the (distilled student|student without teacher)\.", notes)
    for name in ("student.safetensors", "student.onnx", "student.int8.onnx"):
        assert f"{name} was run on 40 test images" in notes


def test_onnxruntime_alone_embeds_as_the_student_does(finished, photos, tmp_path, monkeypatch):
    """By the lines that the README shows."""
    blocks = re.findall(r"```python\n(.*?)```", (Path(__file__).parents[2] / "README.md").read_text(), re.DOTALL)
    (lines,) = [block for block in blocks if "onnxruntime.InferenceSession" in block]
    monkeypatch.chdir(tmp_path)
    path, names = sorted(photos.rglob("*.png"))[0], {}
    (tmp_path / "run").symlink_to(finished)
    Image.open(path).save("photo.jpg", quality=95)
    exec(lines, names)
    embedding = names["embedding"]

    student = load_student(finished)
    with torch.no_grad():
        wanted = student(student.preprocessing(Image.open("photo.jpg"))[None])[0]
    assert student.preprocessing.interpolation == "bicubic" and wanted.norm().item() == pytest.approx(1)
    assert np.abs(embedding - wanted.numpy()).max() < 1e-5
    assert (finished / "student.int8.onnx").stat().st_size < 0.5 * (finished / "student.onnx").stat().st_size


def test_the_loggers_of_the_caller_are_as_before(tmp_path):
    loggers = [logging.getLogger(name) for name in ("", "PML", "torch.onnx", "onnxscript", "onnx_ir")]
    levels = [logger.level for logger in loggers]
    student = torch.nn.Sequential(torch.nn.Conv2d(3, 4, 3), torch.nn.Flatten(), torch.nn.Linear(4 * 36, 8)).eval()
    deploy.write_onnx(tmp_path, student, (3, 8, 8))
    deploy.write_int8(tmp_path, [(image, 0) for image in torch.rand(4, 3, 8, 8)])
    assert (tmp_path / "student.int8.onnx").exists()
    assert [logger.level for logger in loggers] == levels


def test_finished_it_trains_nothing_again(finished, photos, capsys, monkeypatch):
    monkeypatch.setattr(training.Training, "train", lambda self: pytest.fail("trained again"))
    before = {path: path.stat().st_mtime_ns for path in finished.rglob("*") if path.is_file()}
    assert cli.main(train_flags(photos, finished, "--baseline", "--int8")) == 0
    assert "student without teacher" in capsys.readouterr().out
    assert {path: path.stat().st_mtime_ns for path in finished.rglob("*") if path.is_file()} == before


def killed_at(point, arguments):
    """Run the command in another process, which dies without a word at a method's second call."""

    def child():
        owner, name = point
        method, calls = getattr(owner, name), []

        def dies(*args, **kwargs):
            calls.append(1)
            if len(calls) == 2:
                os._exit(9)
            return method(*args, **kwargs)

        setattr(owner, name, dies)
        cli.main(arguments)
        os._exit(0)

    process = multiprocessing.get_context("fork").Process(target=child)
    process.start()
    process.join()
    assert process.exitcode == 9


def test_killed_at_three_points_it_continues_to_the_same_student(finished, photos, tmp_path):
    arguments = train_flags(photos, tmp_path / "run", "--baseline", "--int8")
    killed_at((DistillationTrainer, "save_checkpoint"), arguments)
    assert (tmp_path / "run" / "teacher" / "checkpoint.pth").exists()
    killed_at((TeacherCache, "compute"), arguments)
    assert (tmp_path / "run" / "teacher" / "weights.safetensors").exists()
    killed_at((deploy, "run_onnx"), arguments)
    assert not (tmp_path / "run" / "config.json").exists()
    assert cli.main(arguments) == 0
    for name in ("student.safetensors", "teacher/weights.safetensors", "teacher/standardization.safetensors"):
        whole, continued = load_file(finished / name), load_file(tmp_path / "run" / name)
        assert whole.keys() == continued.keys() and all(torch.equal(whole[key], continued[key]) for key in whole)
    assert (tmp_path / "run" / "choice.json").read_text() == (finished / "choice.json").read_text()


def test_networks_are_compared_on_the_images_that_did_not_train(finished, photos, capsys):
    assert cli.main(["test", str(photos), "--networks", str(finished), TEACHER, *FLAGS]) == 0
    table = capsys.readouterr().out
    rows = list(csv.DictReader(open(finished / "results.csv")))
    assert any(f" {float(row['mean_average_precision_at_r']):.3f} " in table for row in rows[1:]) and TEACHER in table


def test_embeddings_in_place_of_a_teacher(finished, photos, tmp_path):
    """Without labels: what ``embed`` writes teaches, in whatever order, and the table has agreement alone."""
    flat = tmp_path / "flat"
    flat.mkdir()
    for number, path in enumerate(sorted(photos.rglob("*.png"))[:60]):
        Image.open(path).save(flat / f"{number:02}.png")
    vectors = tmp_path / "vectors"
    assert cli.main(["embed", str(flat), "--network", TEACHER, "--out", str(vectors), *FLAGS]) == 0
    paths = [line["path"] for line in csv.DictReader(open(vectors / "paths.csv"))]
    array = np.load(vectors / "vectors.npy")
    assert paths == [f"{n:02}.png" for n in range(60)] and array.shape == (60, 512)
    shuffled = np.random.default_rng(0).permutation(60)
    np.savez(tmp_path / "shuffled.npz", embeddings=array[shuffled], ids=np.array(paths)[shuffled])
    options = tiny() | {"teacher": None, "losses": (), "tune_teacher": None}
    runs = [
        short(flat, tmp_path / str(number), teacher_embeddings=given, **options)
        for number, given in enumerate((vectors / "vectors.npy", tmp_path / "shuffled.npz"))
    ]
    weights = [load_file(run.out / "student.safetensors") for run in runs]
    assert all(torch.equal(weights[0][key], weights[1][key]) for key in weights[0])
    assert runs[0].table[1].keys() >= {"agreement", "parameters"} and "precision_at_1" not in runs[0].table[1]
    with pytest.raises(ValueError, match="must have 192 rows, one for each image.*Embed the same images again"):
        (vectors / "paths.csv").unlink()
        short(photos, tmp_path / "other", teacher_embeddings=vectors / "vectors.npy", **options)


def test_a_binary_code(photos, tmp_path):
    run = short(photos, tmp_path / "run", bits=32, losses=(), baseline=True, **tiny())
    assert [row["network"] for row in run.table] == ["teacher", "student without teacher", "distilled student"]
    assert run.student(torch.zeros(2, 3, 24, 24)).shape == (2, 32)
    assert 0 < run.table[2]["mean_average_precision_at_r"] <= 1 and run.table[2].get("in_teacher_gallery") is None


def test_a_student_that_shrinks(photos, tmp_path):
    run = short(photos, tmp_path / "run", student="torchvision/resnet18", keep_flops=0.5, epochs=3)
    assert run.table[1]["flops"] < 0.52 * run.table[0]["flops"]
    assert run.student(torch.zeros(2, 3, 32, 32)).shape[0] == 2


def test_few_labels(photos, tmp_path):
    rows = [
        (path, path.parent.name, "test" if int(path.parent.name[-2:]) % 4 == 0 else "train")
        for path in sorted(photos.rglob("*.png"))
    ]
    known = [(path, label if split == "test" or path.stem == "0" else "", split) for path, label, split in rows]
    with open(tmp_path / "list.csv", "w", newline="") as file:
        csv.writer(file).writerows([("path", "label", "split"), *known])
    run = short(tmp_path / "list.csv", tmp_path / "run", losses=(), baseline=True, **tiny())
    assert len(run.table) == 3 and "was chosen" not in " ".join(run.notes)


def test_networks_of_your_own(photos, tmp_path):
    teacher, student = Tiny(), Tiny()
    before = {key: value.clone() for key, value in teacher.state_dict().items()}
    images = [(Image.open(path), path.parent.name) for path in sorted(photos.rglob("*.png"))]
    run = short(images, tmp_path / "run", teacher=teacher, student=student, image_size=None, losses=["rkd_angle:1"])
    assert isinstance(run, Run) and run.student(torch.zeros(2, 3, 24, 24)).shape == (2, 16)
    assert all(torch.equal(value, before[key]) for key, value in teacher.state_dict().items())
    assert all(parameter.requires_grad for parameter in teacher.parameters())
    with pytest.raises(ValueError, match=r"was given as a network; call load_student\(folder, network\)"):
        load_student(run.out)


def test_several_processes(photos, tmp_path):
    command = [
        sys.executable,
        "-m",
        "torch.distributed.run",
        "--standalone",
        "--nproc-per-node",
        "2",
        "-m",
        "pml_distill",
    ]
    arguments = train_flags(photos, tmp_path / "run", "--losses", "cosine_teacher:1")
    done = subprocess.run(
        [*command, *arguments], capture_output=True, text=True, env=os.environ | {"OMP_NUM_THREADS": "1"}
    )
    assert done.returncode == 0, done.stderr[-3000:]
    assert done.stdout.count("| distilled student") == 1 and (tmp_path / "run" / "config.json").exists()


@pytest.mark.parametrize(
    ("more", "message"),
    [
        (["--teacher", "timm/resnet51"], "timm/resnet51 is unknown; near are .*timm/resnet50"),
        (["--width", "600"], "--width 600 is more than the 512 numbers of the teacher.*Give at most 512"),
        (["--losses", "cosine"], "--losses has unknown names .'cosine'.; known are .*cosine_teacher"),
        (["--losses", "cosine_teacher:x"], "weight must be a number"),
        (["--losses", "cosine_teacher:1", "rkd_angle"], "must give a weight to all or to none"),
        (["--metric-loss", "triplet"], "--metric-loss must be one of multi_similarity, none"),
        (["--views", "0"], "--views must be at least 1, but is 0"),
        (["--device", "abacus"], "--device abacus cannot be used"),
        (["--teacher-weights", "none.pth"], "There is no weights file none.pth"),
        (["--teacher-embeddings", "none.npy"], "either a teacher or its embeddings"),
        (["--keep-flops", "2"], "--keep-flops must lie between 0 and 1, but is 2"),
    ],
)
def test_wrong_arguments_are_named_and_nothing_is_written(photos, tmp_path, capsys, more, message):
    assert cli.main(train_flags(photos, tmp_path / "out", *more)) == 2
    assert re.search(message, capsys.readouterr().err)
    assert not (tmp_path / "out").exists()


def test_folders_and_files_that_cannot_serve(finished, photos, tmp_path, capsys):
    def says(arguments, message):
        assert cli.main(arguments) == 2
        assert re.search(message, capsys.readouterr().err)

    (tmp_path / "thesis.tex").write_text("")
    says(train_flags(photos, tmp_path), "is not empty and holds no run")
    says(train_flags(photos, tmp_path / "thesis.tex"), "is a file")
    says(train_flags(tmp_path / "none", tmp_path / "out"), "There is no folder")
    says(train_flags(photos, finished, "--views", "8", "--baseline", "--int8"), "holds a run with views 2, not 8")
    says(["test", str(photos), "--networks", str(tmp_path)], "holds no finished run")
    says(["embed", str(photos), "--network", TEACHER, "--out", str(tmp_path), *FLAGS], "holds other things")
    assert [path.name for path in tmp_path.iterdir()] == ["thesis.tex"]


@pytest.mark.parametrize(
    ("error", "message"),
    [
        (OSError(28, "No space left on device"), "is full. Free some space"),
        (PermissionError(13, "no"), "may not be written"),
    ],
)
def test_a_disk_that_takes_nothing(photos, tmp_path, capsys, monkeypatch, error, message):
    def fails(*args):
        raise error

    monkeypatch.setattr("pml_distill.utils.files.os.replace", fails)
    assert cli.main(train_flags(photos, tmp_path / "out")) == 2
    assert re.search(message, capsys.readouterr().err)
    assert not (tmp_path / "out").exists()


def test_a_file_that_disagrees_is_an_error(photos, tmp_path, monkeypatch):
    run_onnx = deploy.run_onnx
    monkeypatch.setattr(deploy, "run_onnx", lambda *args: run_onnx(*args) + 0.01)
    with pytest.raises(ValueError, match=r"student.onnx disagrees with the student \(largest difference 0.01"):
        short(photos, tmp_path / "run", **tiny())
    assert not (tmp_path / "run" / "student.onnx").exists() and not (tmp_path / "run" / "config.json").exists()
