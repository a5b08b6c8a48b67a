"""Distillation from a network trained on ImageNet to a small one, on renders of furniture: does it help, and when?

    pip install ".[train]" vtk
    python benchmarks/furniture_render.py      # images, about 10 minutes, needs apt-get
    python benchmarks/furniture_weights.py     # weights, see there for the packages
    python benchmarks/furniture.py             # all tables of the page; a finished run is not computed again

Classes are objects. 200 objects with 8 images each train, 156 others validate and 157 others test; these have 12
images, and each is a query against all others of its split. Teacher: EfficientNet-Lite0, which never saw such data.
Student: four convolutions on images of 32 pixels, from scratch. Renders of artists' models are not photographs.

Chosen on validation objects with one seed: the learning rate (labels alone: 0.003 and 0.005 alike, 0.01 worse),
the weight 3 of the distillation (10 no better), its fall to 0, the projection. Only one training length was tried.
Losses other than the cosine have the weights of the recipe, not chosen here. The script trains with
`DistillationTrainer` on views made once, in the recipe's way: reading files anew would take most of the time.
"""

import argparse
import csv
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from furniture_data import (
    IMAGES,
    PlainStudent,
    StoredViews,
    embed,
    known_labels,
    resized,
    small_views,
    teacher_network,
    teacher_on,
    teacher_outputs,
    test_images,
)
from furniture_table import MAP, METRICS, frame, table
from furniture_teacher import WIDTH, Stored, prepared_teacher
from pytorch_metric_learning.losses import MultiSimilarityLoss
from record import complete
from torch import nn
from torch.nn import functional as F

from pml_distill import losses
from pml_distill.evaluation import neighbor_agreement, retrieval_accuracy
from pml_distill.losses import MultipleDistillationLosses
from pml_distill.samplers import DistributedMPerClassSampler, MixedSampler
from pml_distill.trainers import DistillationTrainer, LossWeightRamp
from pml_distill.utils.report import format_table

BATCH, PER_CLASS = 64, 4
RESULTS = Path(__file__).parent / "results"
Attach = Callable[[nn.Module, torch.optim.Optimizer, int], None]


@dataclass(frozen=True)
class Method:
    """How a student learns; losses by class name with their weights, none for labels alone."""

    losses: tuple[tuple[str, float], ...] = (("CosineTeacherLoss", 3.0),)
    kind: str = "whiten"
    tune: bool = True  # a linear head on the teacher, by the labels, where objects have two or more of them
    until: float = 0.6  # by which share of the training the weight has fallen to 0, under the same condition
    projection: bool = True  # between student and teacher, dropped after the training, under the same condition


@dataclass(frozen=True)
class Regime:
    """What there is to learn from; the rate and the epochs are the best of the student without a teacher."""

    labeled: int = IMAGES  # of the 8 images of each object
    strength: str = "weak"
    student: str = "plain"
    size: int = 32
    epochs: int = 32
    rate: float = 5e-3
    by: str = "object"


REGIMES = {
    "no labels": Regime(0),
    "1 of 8 images labelled": Regime(1),
    "4 of 8": Regime(4),
    "all": Regime(),
    "1 of 8, strong augmentation": Regime(1, strength="strong", rate=3e-3),
    "all, strong augmentation": Regime(strength="strong"),
    "all, split by author": Regime(by="author"),
    **{
        f"{name}, {kind}": Regime(labeled, student="mobilenet", size=size, epochs=16, rate=5e-4)
        for kind, size in (("pretrained student", 64), ("pretrained student of 32 pixels", 32))
        for name, labeled in (("no labels", 0), ("1 of 8", 1), ("all", IMAGES))
    },
    "no labels, 64 pixels": Regime(0, size=64),
    "all, 64 pixels": Regime(size=64),
    "no labels, 64 pixels, three times as long": Regime(0, size=64, epochs=96),
    "all, 64 pixels, three times as long": Regime(size=64, epochs=96),
    "all, 64 pixels, 468 objects": Regime(size=64, by="all objects"),
}

#: The recipe's default; what is added in the tables on losses and on the teacher's outputs changes one thing of it.
DEFAULT = Method()
KINDS = ("raw", "center", "pca")
OTHERS = {
    "AbsoluteTeacherLoss": 3.0,
    "RKDDistanceLoss": 10.0,
    "RKDAngleLoss": 10.0,
    "ProbabilisticTransferLoss": 15.0,
    "RelaxedContrastiveLoss": 8.0,
    "RelativeTeacherLoss": 1.0,
    "DarkRankLoss": 0.01,
}
METHODS = {"labels alone": Method(losses=()), "default": DEFAULT}
EXTRA = {
    "constant weight": replace(DEFAULT, until=0.0),
    "no projection": replace(DEFAULT, projection=False),
    "teacher as it came": replace(DEFAULT, tune=False),
    **{f"teacher as it came, {kind}": replace(DEFAULT, tune=False, kind=kind) for kind in KINDS},
    **{f"{name} {weight:g}": replace(DEFAULT, losses=((name, weight),)) for name, weight in OTHERS.items()},
    **{
        f"{name}, teacher as it came, {kind}": replace(DEFAULT, losses=((name, OTHERS[name]),), tune=False, kind=kind)
        for name in ("RKDAngleLoss", "DarkRankLoss")
        for kind in (*KINDS, "whiten")
    },
}
TABLES = {
    "regimes": (tuple(REGIMES)[:4], tuple(METHODS)),
    "harder": (tuple(REGIMES)[4:7], tuple(METHODS)),
    "pretrained": (tuple(REGIMES)[7:10], tuple(METHODS)),
    "tenth": (tuple(REGIMES)[10:13], tuple(METHODS)),
    "causes": (tuple(REGIMES)[13:], tuple(METHODS)),  # with --split val --seeds 1
    "teacher": (("no labels", "all"), ("labels alone", "default", *(name for name in EXTRA if "teacher" in name))),
    "losses": (
        ("no labels", "1 of 8 images labelled", "all"),
        ("labels alone", "default", *(name for name in EXTRA if "Loss" in name and "as it" not in name)),
    ),
    "parts": (("4 of 8", "all"), ("labels alone", "default", "constant weight", "no projection", "teacher as it came")),
}


def teach(regime: Regime, method: Method, labels: torch.Tensor, seed: int) -> nn.Module:
    outputs = teacher_outputs("lite0", regime.strength, regime.by)
    return prepared_teacher(outputs, method.kind, labels if method.tune and regime.labeled > 1 else None, seed)


def new_student(regime: Regime, seed: int) -> tuple[nn.Module, int]:
    torch.manual_seed(seed)
    if regime.student == "plain":
        trunk: nn.Module = PlainStudent()
        return trunk.to(memory_format=torch.channels_last), 256
    return teacher_network("mobilenet").requires_grad_(True), 1280


def train(
    regime: Regime,
    method: Method,
    seed: int,
    student: tuple[nn.Module, int] | None = None,
    attach: Attach | None = None,
) -> tuple[nn.Module, nn.Module | None]:
    """Train a student; return it and what standardises the teacher's outputs.

    Args:
        student: a trunk and the width of its outputs; None: a new one.
        attach: called with the trunk, its optimizer and the number of steps before the training.
    """
    stored = small_views(regime.strength, regime.size, regime.by)
    count = stored.shape[1]
    labels = known_labels(count // IMAGES, regime.labeled, seed)
    prepared = teach(regime, method, labels, seed) if method.losses else None
    targets = None
    if prepared is not None:
        outputs = teacher_outputs("lite0", regime.strength, regime.by)
        targets = Stored(torch.cat([prepared(view) for view in outputs]))
    trunk, width = student or new_student(regime, seed)
    models = {"trunk": trunk, "embedder": nn.Linear(width, WIDTH)}
    several = regime.labeled > 1
    if targets is not None and (method.projection and several or targets.embeddings.shape[1] != WIDTH):
        models["projection"] = nn.Linear(WIDTH, targets.embeddings.shape[1])
    steps = regime.epochs * count // BATCH
    optimizers, schedules = {}, {}
    for name, model in models.items():
        decay = 0.0 if attach is not None and name == "trunk" else 0.05  # it would shorten the rows of compactors
        optimizers[f"{name}_optimizer"] = own = torch.optim.AdamW(model.parameters(), regime.rate, weight_decay=decay)
        schedules[f"{name}_scheduler_by_iteration"] = torch.optim.lr_scheduler.OneCycleLR(
            own, regime.rate, total_steps=steps
        )
    if attach is not None:
        attach(trunk, optimizers["trunk_optimizer"], steps)
    parts: dict[str, Any] = {"metric_loss": MultiSimilarityLoss()} if regime.labeled else {}
    if method.losses:
        made = {name: getattr(losses, name)() for name, _ in method.losses}
        parts["distillation_loss"] = MultipleDistillationLosses(made, dict(method.losses))
    ramp = LossWeightRamp(0, method.until, first=1, last=0) if method.losses and method.until and several else None
    torch.manual_seed(seed)
    DistillationTrainer(
        models=models,
        optimizers=optimizers,
        batch_size=BATCH,
        loss_funcs=parts,
        loss_weights=dict.fromkeys(parts, 1.0),
        loss_weight_ramps={"distillation_loss": ramp} if ramp else None,
        dataset=StoredViews(stored, labels),
        sampler=new_sampler(labels, regime, bool(method.losses)),
        iterations_per_epoch=steps,
        lr_schedulers=schedules,
        teacher=targets,
        data_device=torch.device("cpu"),
        dataloader_num_workers=0,
    ).train(num_epochs=1)
    return nn.Sequential(models["trunk"], models["embedder"]).eval(), prepared


def new_sampler(labels: torch.Tensor, regime: Regime, taught: bool) -> Any:
    """Labelled images in classes; with a teacher and few labels, half of each batch is unlabelled."""
    if not regime.labeled:
        return None
    if regime.labeled == IMAGES or not taught:
        return DistributedMPerClassSampler(labels, PER_CLASS, BATCH, regime.epochs * len(labels))
    return MixedSampler(labels, max(2, min(PER_CLASS, regime.labeled)), BATCH, 0.5, regime.epochs * len(labels))


def run(part: str, job: dict[str, Any]) -> dict[str, Any]:
    """Train and test a student; MAP@R on the validation objects comes along, for choices."""
    torch.set_num_threads(1)
    regime, method = REGIMES[job["regime"]], {**METHODS, **EXTRA}[job["method"]]
    student, prepared = train(regime, method, job["seed"])
    if prepared is None:  # beside the teacher that the default has
        count = small_views(regime.strength, regime.size, regime.by).shape[1]
        prepared = teach(regime, DEFAULT, known_labels(count // IMAGES, regime.labeled, job["seed"]), job["seed"])
    row = measure(student, prepared, regime, part)
    return {**job, **row, "validation": measure(student, prepared, regime, "val")[MAP]}


def measure(student: nn.Module, prepared: nn.Module, regime: Regime, part: str) -> dict[str, float]:
    tested, labels = test_images(part, regime.by)
    found = F.normalize(embed(student, resized(tested, regime.size)))
    gallery = F.normalize(prepared(teacher_on(part, "lite0", regime.by)))
    row = retrieval_accuracy(found, labels, metrics=("precision_at_1", MAP))
    aligned = found.shape == gallery.shape
    row["in_teacher_gallery"] = retrieval_accuracy(found, labels, gallery, metrics=(MAP,))[MAP] if aligned else 0.0
    row["agreement"] = neighbor_agreement(found, gallery, 10)
    row["teacher"] = retrieval_accuracy(gallery, labels, metrics=(MAP,))[MAP]
    return row


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--table", choices=TABLES, action="append", help="only these")
    parser.add_argument("--split", choices=("val", "test"), default="test")
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--processes", type=int, default=2, help="of one thread each")
    parser.add_argument("--out", type=Path, default=RESULTS)
    given = parser.parse_args()
    path, tables = given.out / f"furniture_{given.split}.csv", given.table or list(TABLES)
    jobs = {
        (regime, method, seed): {"regime": regime, "method": method, "seed": seed}
        for seed in range(given.seeds)
        for name in tables
        for regime in TABLES[name][0]
        for method in TABLES[name][1]
        if not (regime.startswith("no labels") and method == "labels alone")
    }
    prepare({REGIMES[regime] for regime, _, _ in jobs}, given.split)
    rows = complete(path, list(jobs.values()), METRICS, partial(run, given.split), given.processes)
    for name in tables:
        print(f"\n{name}\n" + table([row for row in rows if row["regime"] in TABLES[name][0]], list(TABLES[name][1])))
    found = frame(given.split, "object")
    with open(given.out / "furniture_frame.csv", "w", newline="") as file:
        table_of = csv.DictWriter(file, list(found[0]), lineterminator="\n")
        table_of.writeheader()
        table_of.writerows(found)
    print("\nframe\n" + format_table(found))


def prepare(regimes: set[Regime], part: str) -> None:
    """Write the stored views and outputs once, before several processes ask for them."""
    for regime in sorted(regimes, key=str):
        small_views(regime.strength, regime.size, regime.by)
        teacher_outputs("lite0", regime.strength, regime.by)
        for own in ("val", part):
            teacher_on(own, "lite0", regime.by)


if __name__ == "__main__":
    main()
