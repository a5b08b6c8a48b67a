"""The papers' data sets, in small folders of their layouts."""

import csv
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

sys.path.insert(0, str(Path(__file__).parents[2] / "benchmarks"))

import real_data

from pml_distill.cli import main
from pml_distill.evaluation import reid_accuracy

FOLDER = Path(real_data.__file__).parent
COLORS = np.random.default_rng(0).integers(0, 255, (200, 3))


def draw(path: Path, color: int) -> str:
    path.parent.mkdir(parents=True, exist_ok=True)
    noise = np.random.default_rng(sum(map(ord, path.name))).integers(0, 60, (24, 24, 3))
    Image.fromarray(np.clip(COLORS[color] + noise, 0, 255).astype("u1")).save(path)
    return path.name


def cub(root: Path) -> None:
    names = [f"{number:03}.Bird/Bird_{i}.jpg" for number in (1, 2, 3, 4, 5, 6, 101, 102) for i in range(4)]
    for name in names:
        draw(root / "images" / name, int(name[:3]))
    (root / "images.txt").write_text("".join(f"{i} {name}\n" for i, name in enumerate(names, 1)))


def cars(root: Path) -> None:
    from scipy.io import savemat

    kinds = [("relative_im_path", object), ("class", int)]
    rows = [(f"car_ims/{i:06}.jpg", label) for i, label in enumerate([1, 2, 3, 4, 5, 6, 99, 100] * 4)]
    for path, label in rows:
        draw(root / path, label)
    savemat(root / "cars_annos.mat", {"annotations": np.array(rows, dtype=kinds)})


def sop(root: Path) -> None:
    for split, labels in (("train", range(1, 7)), ("test", (7, 8))):
        lines = [f"{i} {label} 1 bicycle_final/{label}_{i}.JPG" for label in labels for i in range(4)]
        for line in lines:
            draw(root / line.split()[3], int(line.split()[1]))
        (root / f"Ebay_{split}.txt").write_text("\n".join(["image_id class_id super_class_id path", *lines]))


def inshop(root: Path) -> None:
    rows = [(label, i, "train") for label in range(1, 7) for i in range(4)]
    rows += [(label, i, role) for label in (7, 8) for i, role in enumerate(("query", "gallery", "gallery"))]
    lines = [f"img/WOMEN/Tees/id_{label:08}/0{i}_front.jpg id_{label:08} {role}" for label, i, role in rows]
    for line in lines:
        draw(root / line.split()[0], int(line.split()[1][3:]))
    (root / "Eval").mkdir()
    text = [str(len(lines)), "image_name item_id evaluation_status", *lines]
    (root / "Eval/list_eval_partition.txt").write_text("\n".join(text))


def people(root: Path, folders: tuple[str, str, str], name: str) -> None:
    train, query, gallery = folders
    for label in range(2, 8):
        for camera in range(1, 5):
            draw(root / train / name.format(label, camera), label)
    for label in (9, 10):
        draw(root / query / name.format(label, 1), label)
        for camera in (1, 2, 3):
            draw(root / gallery / name.format(label, camera), label)
    draw(root / gallery / name.format(0, 2), 0)
    draw(root / gallery / f"-1_c1s1_000000_00{Path(name).suffix}", 11)


def market(root: Path) -> None:
    people(root, ("bounding_box_train", "query", "bounding_box_test"), "{:04}_c{}s1_000451_03.jpg")


def veri(root: Path) -> None:
    people(root, ("image_train", "image_query", "image_test"), "{:04}_c{:03}_00016450_0.jpg")


FIXTURES = {made.__name__: made for made in (cub, cars, sop, inshop, market, veri)}


def rows_of(path: Path) -> list[dict[str, str]]:
    with open(path, newline="") as file:
        return list(csv.DictReader(file))


@pytest.mark.parametrize("name", FIXTURES)
def test_a_published_layout_gives_images_labels_and_split(name, tmp_path):
    FIXTURES[name](tmp_path)
    rows = rows_of(real_data.write(name, tmp_path))
    assert all((tmp_path / row["path"]).is_file() for row in rows)
    labels = {split: {row["label"] for row in rows if row["split"] == split} for split in ("train", "test")}
    assert len(labels["train"]) == 6 and len(labels["test"] - {""}) == 2 and not labels["train"] & labels["test"]
    assert [row["path"] for row in rows if "-1_" in row["path"]] == []


@pytest.mark.parametrize("name", ["cub", "market"])
def test_train_embed_and_score(name, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(FOLDER)
    FIXTURES[name](tmp_path / "data")
    path, run, vectors = real_data.write(name, tmp_path / "data"), tmp_path / "run", tmp_path / "vectors"
    small = "--no-pretrained --image-size 32 --epochs 1 --tune-teacher 0 --views 1 --batch-size 16 --workers 0".split()
    command = real_data.COMMANDS[name].replace("torchvision/resnet50", "torchvision/resnet18")
    command = command.replace("torchvision/googlenet", "torchvision/resnet18")
    assert main(["train", str(path), *command.split(), *small, "--out", str(run)]) == 0, capsys.readouterr().err
    assert main(["embed", str(path), "--network", str(run), "--out", str(vectors), "--workers", "0"]) == 0
    found = real_data.score(tmp_path / "data", vectors)
    assert all(0 <= value <= 1 for value in found.values())
    assert "cmc_1" in found if name == "market" else "recall_at_1" in found


def test_the_score_of_re_identification_is_that_of_its_protocol(tmp_path):
    market(tmp_path)
    rows = rows_of(real_data.write("market", tmp_path))
    vectors = torch.randn(len(rows), 8, generator=torch.Generator().manual_seed(0))
    with open(tmp_path / "paths.csv", "w") as file:
        file.writelines(f"{row['path']}\n" for row in [{"path": "path"}, *rows])
    np.save(tmp_path / "vectors.npy", vectors.numpy())
    parts = {}
    for role in ("query", "gallery"):
        at = [i for i, row in enumerate(rows) if row["role"] == role]
        labels = torch.tensor([int(rows[i]["label"] or 0) for i in at])
        parts[role] = vectors[at], labels, torch.tensor([int(rows[i]["camera"]) for i in at])
    assert real_data.score(tmp_path, tmp_path) == reid_accuracy(*parts["query"], *parts["gallery"])


def test_every_data_set_has_a_command_and_a_published_figure():
    assert set(real_data.LAYOUTS) == set(real_data.COMMANDS) == set(real_data.PUBLISHED)
    for network in (real_data.mobilenet_025(), real_data.nin_bn()):
        assert network.eval()(torch.zeros(2, 3, 96, 96)).ndim == 2
