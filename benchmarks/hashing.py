"""Hashing of furniture: does a student that first learns a pretrained teacher's features, without labels, hash better?

    python benchmarks/hashing.py             # images and weights as for furniture.py; about 45 minutes of two cores

The setting of Reddy et al.: the teacher, EfficientNet-Lite0, learned ImageNet and never saw such data. 200 objects are
the classes: 8 images of each train and are the database, 2 others validate, 2 are queries. Bits come from a hash head,
trained with six losses, for the same number of steps in each row:

- on the teacher's own outputs (a linear layer);
- behind four convolutions from scratch;
- behind the same after regression of the teacher's outputs without labels, as many steps again;
- from scratch for as many steps as both stages of the latter together.

Learning rates were chosen with `--rates` on the validating images, from scratch, 32 bits, one seed.
"""

import argparse
import copy
from functools import cache
from pathlib import Path

import torch
from furniture_data import (
    IMAGES,
    TRAINED,
    PlainStudent,
    StoredViews,
    embed,
    images,
    resized,
    small_views,
    split,
    teacher_network,
    teacher_outputs,
)
from furniture_teacher import Stored, prepared_teacher
from pytorch_metric_learning.samplers import MPerClassSampler
from record import complete, shown_by
from torch import nn

from pml_distill import losses
from pml_distill.evaluation import HashAccuracyCalculator
from pml_distill.models import HashHead
from pml_distill.trainers import DistillationTrainer

BITS, SIZE, BATCH, STEPS = (32, 64), 32, 64, 400
#: Each loss by the number of classes and bits, and its learning rate.
LOSSES = {
    "DCH": (lambda classes, bits: losses.DeepCauchyHashingLoss(), 1e-2),
    "CSQ": (losses.CentralSimilarityLoss, 1e-2),
    "HashNet": (lambda classes, bits: losses.HashNetLoss(), 3e-3),
    "DPSH": (lambda classes, bits: losses.DPSHLoss(), 3e-3),
    "GreedyHash": (losses.GreedyHashLoss, 1e-2),
    "OrthoHash": (losses.OrthoHashLoss, 1e-2),
}
METHODS = ("teacher, linear", "scratch", "distilled first", "scratch, as many steps")
METRICS = ("map", "precision_at_radius_2", "validation")
RESULTS = Path(__file__).parent / "results"


def fit(models: dict, parts: dict, data: StoredViews, steps: int, rate: float, teacher: object = None) -> None:
    """Train for a number of steps; in batches of 16 objects by 4 images where there is a loss on labels."""
    trained = nn.ModuleList([*models.values(), *parts.values()])
    optimizer = torch.optim.AdamW(trained.parameters(), rate, weight_decay=0.05)
    sampler = MPerClassSampler(data.labels, 4, BATCH, BATCH * steps) if "metric_loss" in parts else None
    DistillationTrainer(
        models=models,
        optimizers={"trunk_optimizer": optimizer},
        batch_size=BATCH,
        loss_funcs=parts,
        dataset=data,
        sampler=sampler,
        iterations_per_epoch=steps,
        lr_schedulers={
            "trunk_scheduler_by_iteration": torch.optim.lr_scheduler.OneCycleLR(optimizer, rate, total_steps=steps)
        },
        teacher=teacher,
        data_device=torch.device("cpu"),
        dataloader_num_workers=0,
    ).train(num_epochs=1)


class StoredOutputs(StoredViews):
    """(output of the teacher, label, row) in place of images."""

    def __getitems__(self, indices):
        drawn = torch.randint(len(self.stored), (len(indices),)).tolist()
        return [(self.stored[view, i], int(self.labels[i]), view * len(self) + i) for view, i in zip(drawn, indices)]


@cache
def teacher_outputs_of(first: int, last: int) -> torch.Tensor:
    return embed(teacher_network(), images()[0][split("train")[:TRAINED], first:last].flatten(0, 1))


@cache
def distilled(seed: int) -> nn.Module:
    """The student after regression of the teacher's outputs, cut to its width by PCA."""
    torch.manual_seed(seed)
    student, outputs = new_student(), teacher_outputs("lite0", "weak")
    prepared = prepared_teacher(outputs, "pca", None, seed, student.width)
    targets = Stored(torch.cat([prepared(view) for view in outputs]))
    parts = {"distillation_loss": losses.RegressionTeacherLoss()}
    fit({"trunk": student}, parts, StoredViews(small_views("weak", SIZE), labels()), STEPS, 5e-3, targets)
    return student


def new_student() -> nn.Module:
    return PlainStudent().to(memory_format=torch.channels_last)


def labels() -> torch.Tensor:
    return torch.arange(TRAINED).repeat_interleave(IMAGES)


def run(job: dict, rate: float | None = None) -> dict:
    torch.set_num_threads(1)
    seed, bits, method = job["seed"], job["bits"], job["method"]
    of_teacher = method == METHODS[0]
    start = copy.deepcopy(distilled(seed)) if method == "distilled first" else None
    torch.manual_seed(seed)
    trunk = nn.Identity() if of_teacher else start or new_student()
    head = HashHead(1280 if of_teacher else trunk.width, bits)
    stored = teacher_outputs("lite0", "weak") if of_teacher else small_views("weak", SIZE)
    new_loss, own_rate = LOSSES[job["loss"]]
    steps = 2 * STEPS if method == METHODS[3] else STEPS
    data = (StoredOutputs if of_teacher else StoredViews)(stored, labels())
    fit({"trunk": trunk, "embedder": head}, {"metric_loss": new_loss(TRAINED, bits)}, data, steps, rate or own_rate)

    def codes(part: slice) -> torch.Tensor:
        if of_teacher:
            return head.eval()(teacher_outputs_of(part.start, part.stop)).detach()
        shown = images()[0][split("train")[:TRAINED], part].flatten(0, 1)
        return embed(nn.Sequential(trunk, head), resized(shown, SIZE))

    database, calculator = codes(slice(0, IMAGES)), HashAccuracyCalculator(device=torch.device("cpu"))
    found = {}
    for name, part in (("validation", slice(IMAGES, IMAGES + 2)), ("test", slice(IMAGES + 2, IMAGES + 4))):
        wanted = torch.arange(TRAINED).repeat_interleave(2)
        found[name] = calculator.get_accuracy(codes(part), wanted, database, labels())
    return job | {
        "map": found["test"]["mean_average_precision"],
        "precision_at_radius_2": found["test"]["precision_within_radius"],
        "validation": found["validation"]["mean_average_precision"],
    }


def choose_rates() -> None:
    for loss in LOSSES:
        for rate in (1e-3, 3e-3, 1e-2):
            row = run({"seed": 0, "loss": loss, "bits": 32, "method": "scratch"}, rate)
            print(f"{loss:<12} {rate:g}  mAP of validating images {row['validation']:.3f}", flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rates", action="store_true", help="try learning rates on the validating images, no record")
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--processes", type=int, default=2, help="of one thread each")
    parser.add_argument("--out", type=Path, default=RESULTS / "hashing.csv")
    given = parser.parse_args()
    if given.rates:
        return choose_rates()
    jobs = [
        {"loss": loss, "bits": bits, "method": method, "seed": seed}
        for seed in range(given.seeds)
        for loss in LOSSES
        for bits in BITS
        for method in METHODS
    ]
    rows = complete(given.out, jobs, METRICS, run, given.processes)
    print(shown_by(rows, ("loss", "bits", "method"), METRICS[:2]))


if __name__ == "__main__":
    main()
