"""Which images a run finds, how it divides them, and what it says of those that it cannot use."""

import csv
import shutil

import pytest
import torch
from conftest import write_photos
from PIL import Image

from pml_distill.datasets import Digits
from pml_distill.recipe.images import find_images


def labels_by_split(found):
    return {split: set(found[split].labels.tolist()) for split in ("train", "val", "test")}


def write_csv(path, rows, header=("path", "label", "split")):
    with open(path, "w", newline="") as file:
        csv.writer(file).writerows([header, *rows])
    return path


def test_classes_are_divided_and_none_is_in_two_parts(photos):
    found = find_images(photos)
    labels = labels_by_split(found)
    assert [len(labels[split]) for split in labels] == [14, 5, 5] and len(set().union(*labels.values())) == 24
    assert found.classes[3] == "kind 03" and "14/5/5 classes" in str(found)
    image, label = found["test"][0]
    assert image.size == (48, 40) and found["test"].names[0].startswith(found.classes[label])
    assert find_images(photos).digest == found.digest


def test_a_flat_folder_has_no_labels_and_its_images_are_divided(photos, tmp_path):
    for number, path in enumerate(sorted(photos.glob("kind 0*/*.png"))):
        shutil.copy(path, tmp_path / f"{number:03}.PNG")
    (tmp_path / "notes.txt").write_text("no image")
    found = find_images(tmp_path)
    assert [len(found[split]) for split in ("train", "val", "test")] == [48, 16, 16]
    assert not found.all.labeled and "without labels" in str(found)


def test_given_splits_stay_as_they_are(photos, tmp_path):
    for place, kind in enumerate(sorted(photos.iterdir())):
        shutil.copytree(kind, tmp_path / ("test" if place < 8 else "train") / kind.name)
    found = find_images(tmp_path)
    assert labels_by_split(found)["test"] == set(range(8))
    assert [len(found.rows[split]) for split in ("train", "val", "test")] == [96, 32, 64]
    (tmp_path / "test").rename(tmp_path / "val")
    assert find_images(tmp_path)["test"].names == [name.replace("test", "val") for name in found["test"].names]


def test_a_csv_gives_labels_and_splits(photos, tmp_path):
    files = sorted(photos.rglob("*.png"))
    split = {0: "train", 1: "val", 2: "test"}
    rows = [(path, f"label {n // 8}" if n % 5 else "", split[n // 8 % 3]) for n, path in enumerate(files)]
    found = find_images(write_csv(tmp_path / "list.csv", rows))
    assert len(found.classes) == 24 and len(found["train"]) == 64
    assert (found["train"].labels == -1).sum() == sum(not label for _, label, s in rows if s == "train")


def test_what_has_no_label_trains_where_others_have_one(photos, tmp_path):
    files = sorted(photos.rglob("*.png"))
    rows = [(path, path.parent.name if n % 8 < 2 else "") for n, path in enumerate(files)]
    found = find_images(write_csv(tmp_path / "list.csv", rows, ("path", "label")))
    assert (found["test"].labels >= 0).all() and (found["val"].labels >= 0).all()
    assert (found["train"].labels == -1).sum() == 24 * 6


def test_a_dataset_is_divided_as_a_folder_is():
    found = find_images([(torch.zeros(3, 8, 8), place // 2) for place in range(24)])
    assert found.classes == [str(label) for label in range(12)]
    assert [len(found[split]) for split in ("train", "val", "test")] == [14, 4, 6]
    with pytest.raises(ValueError, match="the Digits has too few classes"):
        find_images(Digits("train"))


def test_datasets_by_split_share_their_classes():
    pixels = torch.zeros(4, 3, 8, 8)
    part = [(image, label) for image, label in zip(pixels, "aabb")]
    found = find_images({"train": part, "val": part, "test": part})
    assert found.classes == ["a", "b"] and found["test"].labels.tolist() == [0, 0, 1, 1]
    assert found["test"][3][0].shape == (3, 8, 8)


def test_broken_images_are_named_before_anything_else(photos, tmp_path):
    copy = shutil.copytree(photos, tmp_path / "photos")
    (copy / "kind 00" / "0.png").write_bytes((copy / "kind 00" / "0.png").read_bytes()[:200])
    (copy / "kind 01" / "9.jpg").write_text("not an image")
    with pytest.raises(
        ValueError, match=r"2 of 193 images cannot be read: kind 00/0.png, kind 01/9.jpg.*--skip-broken"
    ):
        find_images(copy)
    found = find_images(copy, skip_broken=True)
    assert len(found.all) == 191 and "2 (kind 00/0.png" in str(found)


def test_a_class_with_one_image_left_is_left_out_with_the_broken_ones(photos, tmp_path):
    copy = shutil.copytree(photos, tmp_path / "photos")
    for number in range(1, 8):
        (copy / "kind 05" / f"{number}.png").write_text("")
    found = find_images(copy, skip_broken=True)
    assert len(found.all) == 23 * 8 and "single image is left: kind 05" in str(found)


def test_photographs_are_upright(tmp_path):
    write_photos(tmp_path, 6, 2)
    exif = Image.Exif()
    exif[0x0112] = 6
    Image.new("RGB", (30, 20)).save(tmp_path / "kind 00" / "0.jpg", exif=exif)
    found = find_images(tmp_path)
    assert found.all[found.all.names.index("kind 00/0.jpg")][0].size == (20, 30)


@pytest.mark.parametrize(
    ("prepare", "message"),
    [
        (lambda folder: None, "There are no images in"),
        (lambda folder: write_photos(folder, 5), "too few classes.*at least 6 classes"),
        (
            lambda folder: (
                write_photos(folder).joinpath("kind 00").rename(folder / "x")
                and [path.unlink() for path in sorted((folder / "x").glob("*"))[1:]]
            ),
            "1 classes to .* have a single image.*: x. Add images",
        ),
        (lambda folder: shutil.copy(next(write_photos(folder).rglob("*.png")), folder / "a.png"), "beside the folders"),
    ],
)
def test_folders_that_cannot_serve(tmp_path, prepare, message):
    prepare(tmp_path)
    with pytest.raises(ValueError, match=message):
        find_images(tmp_path)


def test_a_csv_with_missing_files_or_columns(tmp_path):
    path = write_csv(tmp_path / "list.csv", [("a.png", "a", "train")])
    with pytest.raises(ValueError, match="names 1 files that are not there, such as a.png"):
        find_images(path)
    Image.new("RGB", (9, 9)).save(tmp_path / "a.png")
    write_csv(path, [("a.png", "a", "dev")])
    with pytest.raises(ValueError, match=r"has the splits \['dev'\]"):
        find_images(path)
    write_csv(path, [("a.png",)], ("file",))
    with pytest.raises(ValueError, match=r"must begin with the line path,label\[,split\]"):
        find_images(path)
    with pytest.raises(ValueError, match="There is no folder"):
        find_images(tmp_path / "nowhere")
