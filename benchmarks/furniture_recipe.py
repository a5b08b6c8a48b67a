"""The regimes of `furniture.py` through the recipe itself: `pml_distill.recipe.distill`, its defaults, same objects.

    python benchmarks/furniture_recipe.py --seeds 1

Given by hand are only the learning rate of a student from scratch, the epochs, 8 views, and the weak augmentation
(mirrored, shifted); the recipe stores the teacher's outputs, standardises and tunes them, tries the weight and chooses.
Each image is augmented and resized anew when it is read, which takes most of the time on a CPU.
"""

import argparse
from pathlib import Path

import torch
from furniture import BATCH, MAP, REGIMES, RESULTS
from furniture_data import IMAGES, SIZE, VIEWS, PlainStudent, known_labels, teacher_network, test_images, train_images
from record import append, finished
from torch.nn import functional as F

from pml_distill.models import Preprocessing
from pml_distill.recipe import distill

COLUMNS = ("regime", "seed", "network", "precision_at_1", MAP, "in_teacher_gallery", "agreement")
RUN = ("no labels", "1 of 8 images labelled", "4 of 8", "all")


class Labeled(torch.utils.data.Dataset):
    """(image, label), the image a uint8 tensor."""

    def __init__(self, stored: torch.Tensor, labels: torch.Tensor):
        self.stored, self.labels = stored, labels

    def __len__(self) -> int:
        return len(self.labels)

    def __getitem__(self, index: int) -> tuple[torch.Tensor, int]:
        return self.stored[index], int(self.labels[index])


class Shift:
    """Mirror an image perhaps, and shift it by up to 15 % of its half side."""

    def __repr__(self) -> str:
        return "Shift()"

    def __call__(self, image: torch.Tensor) -> torch.Tensor:
        reach = round(0.075 * image.shape[-1])
        mirrored, x, y = torch.rand(3).tolist()
        image = image.flip(-1) if mirrored < 0.5 else image
        padded = F.pad(image.float()[None], [reach] * 4, mode="reflect")[0].byte()
        left, top = int(x * (2 * reach + 1)), int(y * (2 * reach + 1))
        return padded[:, top : top + image.shape[1], left : left + image.shape[2]]


def run(name: str, seed: int, folder: Path) -> list[dict]:
    regime, stored = REGIMES[name], train_images()
    data = {"train": Labeled(stored, known_labels(len(stored) // IMAGES, regime.labeled, seed))}
    data |= {part: Labeled(*test_images(part)) for part in ("val", "test")}
    teacher, student = teacher_network(), PlainStudent()
    half = (0.5, 0.5, 0.5)
    teacher.preprocessing = Preprocessing((SIZE, SIZE), "bilinear", half, half)
    student.preprocessing = Preprocessing((regime.size, regime.size), "bilinear", half, half)
    options = {"epochs": regime.epochs, "lr": regime.rate, "views": VIEWS, "batch_size": BATCH, "seed": seed}
    options |= {"baseline": regime.labeled > 0, "workers": 0, "augmentation": Shift()}
    found = distill(data, teacher, student, folder / f"{name}, {seed}".replace(" ", "-"), **options)
    print(*found.notes, sep="\n", flush=True)
    return [{"regime": name, "seed": seed} | row for row in found.table]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--regime", choices=RUN, action="append", help="only these")
    parser.add_argument("--seeds", type=int, default=1)
    parser.add_argument("--runs", type=Path, default=Path("furniture_runs"), help="folder of the runs")
    parser.add_argument("--out", type=Path, default=RESULTS / "furniture_recipe.csv")
    given = parser.parse_args()
    torch.set_num_threads(1)
    path = given.out
    if not path.exists():
        path.write_text(",".join(COLUMNS) + "\n")
    done = {(row["regime"], row["seed"]) for row in finished(path)}
    for seed in range(given.seeds):
        for name in given.regime or RUN:
            if (name, str(seed)) not in done:
                for row in run(name, seed, given.runs):
                    append(path, row, COLUMNS)
                    print(row, flush=True)


if __name__ == "__main__":
    main()
