"""PML's own datasets, found here too, on small folders in the layout of the originals."""

import pytest
import torch
from PIL import Image
from torchvision.transforms import ToTensor

from pml_distill import datasets


def picture(path):
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.new("RGB", (8, 8)).save(path)


def make_cub(root):
    folder = root / "CUB_200_2011"
    names = {1: "001.Albatross/a.jpg", 2: "150.Thrasher/b.jpg"}
    for name in names.values():
        picture(folder / "images" / name)
    (folder / "images.txt").write_text("".join(f"{i} {name}\n" for i, name in names.items()))
    (folder / "image_class_labels.txt").write_text("1 1\n2 150\n")


def make_cars(root):
    (root / "names.csv").write_text("".join(f"car {i}\n" for i in range(1, 197)))
    for split, label in (("train", 1), ("test", 150)):
        picture(root / "car_data" / "car_data" / split / f"car {label}" / "a.jpg")
        (root / f"anno_{split}.csv").write_text(f"a.jpg,1,2,3,4,{label}\n")


def make_sop(root):
    folder = root / "Stanford_Online_Products"
    for split, name, label in (("train", "bicycle_final/a.JPG", 1), ("test", "chair_final/b.JPG", 11319)):
        picture(folder / name)
        (folder / f"Ebay_{split}.txt").write_text(f"image_id class_id super_class_id path\n1 {label} 1 {name}\n")


@pytest.mark.parametrize(
    ("name", "make"), [("CUB", make_cub), ("Cars196", make_cars), ("StanfordOnlineProducts", make_sop)]
)
@pytest.mark.parametrize("split", ["train", "test"])
def test_reads_the_original_layout(tmp_path, name, make, split):
    make(tmp_path)
    data = getattr(datasets, name)(root=str(tmp_path), split=split, transform=ToTensor())
    image, label = data[0]
    assert len(data) == 1 and image.shape == (3, 8, 8) and int(label) == int(torch.as_tensor(data.labels[0]))


def test_unknown_names_are_attribute_errors():
    with pytest.raises(AttributeError, match="no attribute 'ImageNet'"):
        datasets.ImageNet  # noqa: B018
