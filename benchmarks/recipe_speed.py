"""What the recipe costs beside bare loops: its training loop, and the writing of the teacher's outputs.

    python benchmarks/recipe_speed.py

Both sides take the same loader, networks and losses, turn by turn in one process; the figures are ratios of images per
second, the recipe's to the bare loop's, medians over the rounds. The images are drawn on the spot.
"""

import argparse
import statistics
import tempfile
import time
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from pytorch_metric_learning.losses import MultiSimilarityLoss
from pytorch_metric_learning.utils.logging_presets import HookContainer, get_record_keeper
from torch.utils.data import DataLoader

from pml_distill.datasets import SeededViews
from pml_distill.losses import CosineTeacherLoss, MultipleDistillationLosses
from pml_distill.models import network_by_name
from pml_distill.recipe.images import find_images
from pml_distill.recipe.networks import build_student
from pml_distill.recipe.run import new_machine
from pml_distill.recipe.training import Training, placed
from pml_distill.recipe.views import Augmentation, SharedViews
from pml_distill.teachers import CachedTeacher, FrozenTeacher, StandardizedTeacher, TeacherCache
from pml_distill.utils.report import format_table

WIDTH = 64


def drawn_images(classes: int, each: int) -> list:
    """Return images of noise around a colour for each class."""
    random = np.random.default_rng(0)
    colors = random.integers(60, 200, (classes, 1, 1, 3))
    pixels = [np.clip(colors[i % classes] + random.normal(0, 30, (96, 96, 3)), 0, 255) for i in range(classes * each)]
    return [(Image.fromarray(image.astype(np.uint8)), i % classes) for i, image in enumerate(pixels)]


def seconds(function) -> float:
    """Return how long a function takes."""
    start = time.perf_counter()
    function()
    return time.perf_counter() - start


class AllRows(torch.utils.data.Dataset):
    """The data of all views, by row."""

    def __init__(self, views: SeededViews):
        self.views = views

    def __len__(self) -> int:
        return self.views.num_rows

    def __getitems__(self, rows: list[int]) -> list:
        return [item[0] for item in self.views.read(rows)]


def bare_pass(frozen: FrozenTeacher, views: SeededViews, batch_size: int) -> None:
    """Ask the teacher for all views, and keep nothing."""
    for data in DataLoader(AllRows(views), batch_size):
        frozen(data)


def bare_training(training: Training, epochs: int) -> float:
    """Train by a loop that anyone would write; return its seconds."""
    trainer = training.trainer(training.network)
    trunk, embedder = trainer.models["trunk"], trainer.models["embedder"]
    projection, losses = trainer.models["projection"], trainer.loss_funcs
    loader = DataLoader(trainer.dataset, trainer.batch_size, sampler=trainer.sampler, drop_last=True)

    def loop() -> None:
        for _ in range(epochs):
            for data, labels, rows in loader:
                embeddings = embedder(trunk(data))
                taught = training.teacher(data, rows)
                loss = losses["metric_loss"](embeddings, labels)
                loss = loss + losses["distillation_loss"](projection(embeddings), labels, ref_emb=taught)
                for optimizer in trainer.optimizers.values():
                    optimizer.zero_grad()
                loss.backward()
                for optimizer in trainer.optimizers.values():
                    optimizer.step()
                for scheduler in trainer.lr_schedulers.values():
                    scheduler.step()

    return seconds(loop)


def recipe_training(training: Training, epochs: int, folder: Path) -> float:
    """Train by the recipe's trainer with its logs; return its seconds."""
    trainer = training.trainer(training.network)
    keeper, _, _ = get_record_keeper(str(folder / "logs"), str(folder / "tensorboard"))
    trainer.end_of_iteration_hook = HookContainer(keeper, log_freq=50).end_of_iteration_hook
    taken = seconds(lambda: trainer.train(1, epochs))
    keeper.tensorboard_writer.close()
    return taken


def main() -> None:
    """Measure, and print the table."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--teacher", default="torchvision/resnet18")
    parser.add_argument("--student", default="timm/mobilenetv3_small_050")
    parser.add_argument("--image-size", type=int, default=96)
    parser.add_argument("--views", type=int, default=4)
    parser.add_argument("--epochs", type=int, default=12, help="of three steps each")
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--device", default="cpu")
    options = parser.parse_args()
    machine = new_machine(options.device, 0, 64)
    images = find_images(drawn_images(20, 16))["train"]
    networks = {
        role: network_by_name(name, pretrained=False, image_size=options.image_size)
        for role, name in (("teacher", options.teacher), ("student", options.student))
    }
    shown = {
        role: SeededViews(
            SharedViews(images, Augmentation(), **{"student": None, "teacher": None, role: n.preprocessing}),
            views=options.views,
        )
        for role, n in networks.items()
    }
    frozen = FrozenTeacher(placed(networks["teacher"].network, machine.device))
    rows = shown["teacher"].num_rows
    ratios: dict[str, list[float]] = {"stored outputs": [], "training loop": []}
    with tempfile.TemporaryDirectory() as name:
        for turn in range(options.rounds + 1):
            folder = Path(name) / str(turn)
            cache = TeacherCache(folder / "outputs", frozen, shown["teacher"], torch.float16, 64)
            written, bare = seconds(cache.write), seconds(lambda: bare_pass(frozen, shown["teacher"], 64))
            teacher = StandardizedTeacher(CachedTeacher(cache.folder), WIDTH)
            teacher.fit([[torch.empty(rows), None, torch.arange(rows)]])
            training = Training(
                folder, build_student(networks["student"], WIDTH), shown["student"], machine, options.epochs, 1e-3, 0,
                MultiSimilarityLoss(), MultipleDistillationLosses({"cosine_teacher": CosineTeacherLoss()}, [3.0]),
                teacher=teacher, projection=torch.nn.Linear(WIDTH, WIDTH),
            )  # fmt: skip
            # Whoever comes second finds warm caches: the two take turns at that.
            first = bare_training(training, options.epochs) if turn % 2 else 0.0
            trained = recipe_training(training, options.epochs, folder)
            plain = first or bare_training(training, options.epochs)
            if turn:  # the first is for warming up
                ratios["stored outputs"].append(bare / written)
                ratios["training loop"].append(plain / trained)
    print(
        format_table(
            [
                {
                    "recipe / bare loop": name,
                    "median": f"{statistics.median(values):.3f}",
                    "least": f"{min(values):.3f}",
                }
                for name, values in ratios.items()
            ]
        )
    )


if __name__ == "__main__":
    main()
