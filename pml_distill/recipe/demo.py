"""The recipe on images that need no download: a teacher, a student alone, and one with each distillation loss."""

import csv
import json
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from ..datasets import Digits, Glyphs, SeededViews
from ..models import Preprocessing, SmallResNet
from ..trainers import LossWeightRamp
from ..utils.files import whole_file, write_json
from ..utils.report import bar_chart, format_table, mean_and_error, shown, write
from .images import ImageSet, find_images
from .job import Job
from .report import accuracy, beside_teacher, cost, draw_neighbors
from .run import claim, new_machine
from .settings import METRIC, WEIGHTS, Settings, aligned
from .training import Training
from .views import SharedViews

DATASETS = {"glyphs": Glyphs, "digits": Digits}
#: What is compared unless others are asked for.
CORE = tuple(WEIGHTS)[:6]
#: The student's learning rate, the best on validation classes.
RATE = 2e-2


def network(width: int, size: int) -> Any:
    """Return a small ResNet for grey images."""
    made: Any = SmallResNet(width)
    made.preprocessing = Preprocessing((size, size), mean=(0.0,), std=(1.0,))
    return made


def unchanged(image: torch.Tensor) -> torch.Tensor:
    """Return an image as it is: these datasets jitter their images themselves."""
    return image


class RememberedViews(SeededViews):
    """Views that are drawn once and kept in memory, since all networks of the demo see the same."""

    def __init__(self, *args: Any, seen: dict[int, tuple]):
        super().__init__(*args)
        self.seen = seen

    def read_one(self, row: int) -> tuple:
        """Return the item of a row."""
        if row not in self.seen:
            self.seen[row] = super().read_one(row)
        return self.seen[row]


class DemoJob(Job):
    """The recipe for one seed: all networks have the same preprocessing and training images.

    The usual weights were chosen for a teacher whose outputs are centred and no more.
    """

    standardization, tunes = "pca", False

    def views(self, images: ImageSet | None = None, **sides: Any) -> SeededViews:
        """Return the augmented views of the training images."""
        views = super().views(images, **sides)
        self.seen: dict[int, tuple] = getattr(self, "seen", {})
        return RememberedViews(views.dataset, views.seed, views.views, seen=self.seen)

    def training(self, folder: str, weights: dict[str, float], epochs: int | None = None) -> Training:
        """Return the training of a new student, as the usual weights were chosen for: straight from the teacher."""
        training = super().training(folder, weights, epochs)
        return replace(training, projection=None, ramp=LossWeightRamp(0.2, 0.5) if weights else None)


class Demo:
    """All runs on one dataset, for a number of epochs, in one folder.

    Args:
        out: the folder.
        dataset: ``"glyphs"`` or ``"digits"``.
        epochs: of each network.
        device: where to train; None: the GPU, if there is one.

    Raises:
        ValueError: the folder holds other runs, or the device is not there.
    """

    def __init__(self, out: Path, dataset: str, epochs: int, device: str | None = None):
        self.machine, self.out, self.epochs = new_machine(device, 0, 128), out, epochs
        self.images = find_images({split: DATASETS[dataset](split) for split in ("train", "val", "test")})
        claim(out, {"dataset": dataset, "epochs": epochs, "images": self.images.digest})

    def job(self, seed: int) -> Job:
        """Return the recipe for a seed, with the teacher trained and asked."""
        epochs, size = self.epochs, self.images.all[0][0].shape[-1]
        settings = Settings(
            "teacher", "student", epochs=epochs, tune_teacher=epochs, lr=RATE, seed=seed, pretrained=False
        )
        torch.manual_seed(seed)
        networks = network(32, size), network(8, size)
        job = DemoJob(self.out / f"seed{seed}", settings, self.machine, self.images, *networks, unchanged)
        job.teach()
        return job

    def run(self, seed: int, names: Sequence[str]) -> list[dict[str, Any]]:
        """Train and test each of the networks unless that has been done; return a row of figures each."""
        folder, job, test = self.out / f"seed{seed}", None, self.images["test"]
        for place, name in enumerate(names, 1):
            path = folder / name / "figures.json"
            if path.exists():
                continue
            write(f"[{place}/{len(names)}] {name}, seed {seed}")
            job = job or self.job(seed)
            sees, gallery = job.student.preprocessing, job.teaching.embeddings(test)
            if name == "teacher":
                found, taught = job.teaching.outputs(test), gallery
                model: Any = job.teaching.source.network  # type: ignore[union-attr]
            else:
                model = job.training(name, {name: WEIGHTS[name]} if name in WEIGHTS else {}).finish()
                found = taught = self.machine.embed(model, SharedViews(test, None, sees, None))
            torch.save(found, folder / name / "embeddings.pth")
            figures = accuracy(found, test.labels) | beside_teacher(taught, gallery, test.labels)
            write_json(path, {"name": name, "seed": seed} | figures | cost(model, sees.image_shape))
        return [json.loads((folder / name / "figures.json").read_text(encoding="utf-8")) for name in names]


def run_demo(
    out: Path, dataset: str, epochs: int, seeds: int, losses: Sequence[str], device: str | None = None
) -> None:
    """Run what is missing, print the table, and write it with the figures and pictures."""
    losses = {"core": CORE, "all": tuple(WEIGHTS)}.get(" ".join(losses), tuple(losses))
    unknown = sorted(set(losses) - set(WEIGHTS))
    if unknown:
        raise ValueError(f"--losses has unknown names {unknown}; known are {sorted(WEIGHTS)}.")
    for name, value in (("seeds", seeds), ("epochs", epochs)):
        if value < 1:
            raise ValueError(f"--{name} must be at least 1, but is {value}.")
    demo, names = Demo(out, dataset, epochs, device), ("teacher", "student", *losses)
    of = {(row["name"], row["seed"]): row for seed in range(seeds) for row in demo.run(seed, names)}
    for row in of.values():
        alone, best = (of[name, row["seed"]][METRIC] for name in ("student", "teacher"))
        row["gap_recovered"] = (row[METRIC] - alone) / (best - alone)

    def values(name: str, key: str) -> list[float]:
        return [of[name, seed][key] for seed in range(seeds)]

    table = [
        {
            "network": "student alone" if name == "student" else name,
            "precision@1": shown(values(name, "precision_at_1")),
            "MAP@R": shown(values(name, METRIC)),
            "student to teacher": shown(values(name, "in_teacher_gallery")),
            "aligned": ("yes" if aligned(name) else "no") if name in WEIGHTS else "",
            "gap recovered": shown([100 * value for value in values(name, "gap_recovered")], ".0f") + " %",
            "agreement": shown(values(name, "agreement")),
            "parameters": f"{of[name, 0]['parameters']:,}",
            "MFLOPs": f"{of[name, 0]['flops'] / 1e6:.1f}",
            "ms (batch 1)": f"{of[name, 0]['latency_ms_batch_1']:.2f}",
            "ms (batch 32)": f"{of[name, 0]['latency_ms_batch_32']:.3f}",
        }
        for name in names
    ]
    print(format_table(table))
    (out / "table.md").write_text(format_table(table) + "\n", encoding="utf-8")
    with whole_file(out / "results.csv") as unfinished, open(unfinished, "w", newline="") as file:
        writer = csv.DictWriter(file, list(of["teacher", 0]))
        writer.writeheader()
        writer.writerows(of[name, seed] for name in names for seed in range(seeds))
    bars = {name: mean_and_error(values(name, METRIC)) for name in names}
    levels = {"student alone": bars["student"][0], "teacher": bars["teacher"][0]}
    bar_chart(out / "map_at_r.png", {name: bars[name] for name in losses}, levels, "MAP@R on unseen classes")
    for name in ("student", max(losses, key=lambda name: bars[name][0])):
        found = torch.load(out / "seed0" / name / "embeddings.pth")
        draw_neighbors(out / f"neighbors_{name}.png", demo.images["test"], found)
    print("\nstudent to teacher: MAP@R of the student's queries in the teacher's gallery. Losses that do not align")
    print("the two spaces (aligned: no), such as those on relations alone, have no reason to raise it.")
    print(f"Averaged over {seeds} seed{'s' * (seeds > 1)}. In {out}: table.md, results.csv, map_at_r.png,")
    print("neighbors_*.png, and the record-keeper and tensorboard logs of every run in its folder.")
