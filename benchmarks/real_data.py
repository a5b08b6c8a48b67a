"""Train on the data of the papers: CUB-200-2011, Cars196, Stanford Online Products, In-Shop, Market-1501, VeRi-776.

    python benchmarks/real_data.py cub CUB_200_2011            # writes CUB_200_2011/pml_distill.csv, prints the command
    cd benchmarks && pml-distill train ../CUB_200_2011/pml_distill.csv --teacher ...
    pml-distill embed CUB_200_2011/pml_distill.csv --network run --out vectors
    python benchmarks/real_data.py cub CUB_200_2011 --score vectors      # by the protocol of the data set

Each folder is as its authors distribute it; the file has the published split. The data sets are not downloaded, and no
figure of ours on them is claimed: `PUBLISHED` says what to compare with. The commands run from the folder of this
script, since some networks of the papers are in it. Training classes are divided into those that train and a fifth
that validates (`pml-distill train` does so).
"""

import argparse
import csv
import re
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import torch
from torch import nn

from pml_distill.evaluation import reid_accuracy, retrieval_accuracy

NAME = "pml_distill.csv"
COLUMNS = ("path", "label", "split", "role", "camera")
LEARN_METRICS = "--teacher torchvision/resnet50 --student real_data:mobilenet_025 --width 512"
#: The networks and the loss of a paper, by data set.
COMMANDS = {
    "cub": f"{LEARN_METRICS} --losses absolute_teacher relative_teacher",
    "cars": f"{LEARN_METRICS} --losses absolute_teacher relative_teacher",
    "sop": "--teacher torchvision/resnet50 --student torchvision/resnet18 --width 512 --losses rkd_distance rkd_angle",
    "inshop": "--teacher torchvision/resnet101 --student torchvision/resnet18 --losses decoupled_differential",
    "market": "--teacher torchvision/googlenet --student real_data:nin_bn --losses hard_dark_rank",
    "veri": "--teacher torchvision/resnet101 --student torchvision/resnet101 --keep-flops 0.34",
}
#: Figures to compare with, none of them ours.
PUBLISHED = {
    "cub": "recall@1, ResNet-50 of 512 numbers to ResNet-18 of 128: teacher 0.699, RKD 0.658, relaxed contrastive "
    "0.666 (Kim et al., CVPR 2021)",
    "cars": "recall@1, the same networks: teacher 0.877, RKD 0.842, relaxed contrastive 0.860 (Kim et al., CVPR 2021)",
    "sop": "recall@1, the same networks: teacher 0.805, RKD 0.757, relaxed contrastive 0.784 (Kim et al., CVPR 2021)",
    "inshop": "mAP, queries of ResNet-18 in a gallery of ResNet-101: D3still 0.6856, UGD 0.6920 (D3still's repository)",
    "market": "mAP / rank 1: student 0.581 / 0.803, hard DarkRank 0.635 / 0.830, teacher 0.743 / 0.898 "
    "(Chen et al., AAAI 2018)",
    "veri": "67.13 % of the parameters and 65.67 % of the FLOPs of ResNet-101 go (Xie et al., CVPR 2023)",
}


def cub(root: Path) -> Iterator[tuple]:
    """images/CLASS/IMAGE.jpg, with images.txt; the first 100 classes train."""
    for line in (root / "images.txt").read_text().splitlines():
        path = line.split()[1]
        label = path.partition("/")[0]
        yield f"images/{path}", label, "train" if int(label[:3]) <= 100 else "test"


def cars(root: Path) -> Iterator[tuple]:
    """car_ims/000001.jpg and cars_annos.mat; the first 98 classes train."""
    from scipy.io import loadmat

    for row in loadmat(root / "cars_annos.mat", squeeze_me=True)["annotations"]:
        yield str(row["relative_im_path"]), str(int(row["class"])), "train" if int(row["class"]) <= 98 else "test"


def sop(root: Path) -> Iterator[tuple]:
    """Ebay_train.txt and Ebay_test.txt, which name the images."""
    for split in ("train", "test"):
        for line in (root / f"Ebay_{split}.txt").read_text().splitlines()[1:]:
            _, label, _, path = line.split()
            yield path, label, split


def inshop(root: Path) -> Iterator[tuple]:
    """Eval/list_eval_partition.txt, which names the images, and img/."""
    for line in (root / "Eval/list_eval_partition.txt").read_text().splitlines()[2:]:
        path, label, role = line.split()
        yield path, label, "train" if role == "train" else "test", role


def people(root: Path, train: str, query: str, gallery: str) -> Iterator[tuple]:
    for folder, split, role in ((train, "train", "train"), (query, "test", "query"), (gallery, "test", "gallery")):
        for path in sorted((root / folder).glob("*.jpg")):
            label, camera = re.match(r"(-?\d+)_c(\d+)", path.name).groups()
            if int(label) >= 0:  # -1 are boxes that hold too little of a person: "junk", which does not count
                yield f"{folder}/{path.name}", label if int(label) else "", split, role, camera


def market(root: Path) -> Iterator[tuple]:
    """bounding_box_train/, query/ and bounding_box_test/ with files such as 0002_c1s1_000451_03.jpg."""
    return people(root, "bounding_box_train", "query", "bounding_box_test")


def veri(root: Path) -> Iterator[tuple]:
    """image_train/, image_query/ and image_test/ with files such as 0001_c001_00016450_0.jpg."""
    return people(root, "image_train", "image_query", "image_test")


LAYOUTS = {layout.__name__: layout for layout in (cub, cars, sop, inshop, market, veri)}


def mobilenet_025() -> nn.Module:
    """MobileNet with a quarter of the channels (Howard et al., 2017), without pretrained weights."""
    layers: list[nn.Module] = [nn.Conv2d(3, 8, 3, 2, 1, bias=False), nn.BatchNorm2d(8), nn.ReLU()]
    before = 8
    for width, stride in ((16, 1), (32, 2), (32, 1), (64, 2), (64, 1), (128, 2), *[(128, 1)] * 5, (256, 2), (256, 1)):
        layers += [
            nn.Conv2d(before, before, 3, stride, 1, groups=before, bias=False),
            nn.BatchNorm2d(before),
            nn.ReLU(),
        ]
        layers += [nn.Conv2d(before, width, 1, bias=False), nn.BatchNorm2d(width), nn.ReLU()]
        before = width
    return nn.Sequential(*layers, nn.AdaptiveAvgPool2d(1), nn.Flatten())


def nin_bn() -> nn.Module:
    """Network in network with batch norm (Lin et al., 2014): the student of DarkRank, without pretrained weights."""
    layers: list[nn.Module] = []
    before = 3
    for width, kernel, stride in ((96, 11, 4), (256, 5, 1), (384, 3, 1), (1024, 3, 1)):
        for size in (kernel, 1, 1):
            step, pad = (stride, size // 2) if size > 1 else (1, 0)
            layers += [nn.Conv2d(before, width, size, step, pad, bias=False), nn.BatchNorm2d(width), nn.ReLU()]
            before = width
        if width < 1024:
            layers.append(nn.MaxPool2d(3, 2, ceil_mode=True))
    return nn.Sequential(*layers, nn.AdaptiveAvgPool2d(1), nn.Flatten())


def write(name: str, root: Path) -> Path:
    """Write the images, labels and published split of a data set into its folder."""
    with open(root / NAME, "w", newline="", encoding="utf-8") as file:
        table = csv.writer(file)
        table.writerow(COLUMNS)
        table.writerows((*row, *[""] * (len(COLUMNS) - len(row))) for row in LAYOUTS[name](root))
    return root / NAME


def score(root: Path, embedded: Path) -> dict[str, float]:
    """Measure the embeddings that `pml-distill embed` has written: each image against all others of the test split, or
    queries against a gallery; with cameras by the protocol of Market-1501."""
    with open(root / NAME, newline="", encoding="utf-8") as file:
        rows = {row["path"]: row for row in csv.DictReader(file)}
    with open(embedded / "paths.csv", newline="", encoding="utf-8") as file:
        listed = [rows[line["path"]] for line in csv.DictReader(file)]
    vectors = torch.from_numpy(np.load(embedded / "vectors.npy"))
    numbers = {label: number for number, label in enumerate(sorted({row["label"] for row in listed} | {""}))}

    def part(role: str) -> tuple[torch.Tensor, ...]:
        at = [i for i, row in enumerate(listed) if row["split"] == "test" and row["role"] == role]
        columns = [[numbers[listed[i]["label"]] for i in at], [int(listed[i]["camera"] or 0) for i in at]]
        return vectors[at], *map(torch.tensor, columns)

    if not any(row["role"] for row in listed):
        return retrieval_accuracy(*part("")[:2], metrics=tuple(f"recall_at_{k}" for k in (1, 2, 4, 8, 10, 100)))
    query, gallery = part("query"), part("gallery")
    if any(row["camera"] for row in listed):
        return reid_accuracy(*query, *gallery)
    metrics = (*(f"recall_at_{k}" for k in (1, 10, 20, 30)), "mean_average_precision")
    return retrieval_accuracy(*query[:2], *gallery[:2], metrics)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("name", choices=LAYOUTS)
    parser.add_argument("root", type=Path, help="its folder, as the authors distribute it")
    parser.add_argument("--score", type=Path, metavar="VECTORS", help="measure what pml-distill embed wrote there")
    given = parser.parse_args()
    if given.score:
        for metric, value in score(given.root, given.score).items():
            print(f"{metric:<24} {value:.4f}")
        return
    path = write(given.name, given.root)
    print(f"{path} is written. To train as in the paper, in the folder of this script:\n")
    print(f"pml-distill train {path.resolve()} {COMMANDS[given.name]} --baseline --out run-{given.name}\n")
    print(f"To compare with: {PUBLISHED[given.name]}.")


if __name__ == "__main__":
    main()
