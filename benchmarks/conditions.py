"""Which loss under which condition: batches of 32 and 512, a student of narrower embeddings, no labels.

The demo's student, teacher, data and epochs, and under each condition the student alone and with each of seven losses,
in the demo's weights. What a condition asks of the learning rate is tried with the student alone on validation
classes, and holds for all. Narrow embeddings have 32 numbers where the teacher's have 128: losses that need equal
widths then compare a projection that is dropped after the training. Without labels the loss acts at full weight from
the first step, since there is no metric loss to begin with, and there is no student alone.

    python benchmarks/conditions.py --search   # on the validation classes
    python benchmarks/conditions.py

write search.csv, and results.csv and table.md, into the folder. A finished run has a row and is not computed again; an
interrupted one goes on from its last epoch. The rates below are the best of the search.
"""

from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from comparison import METRICS, GlyphsDemo, by_seed, complete, options
from glyph_runs import EMBEDDING_SIZE, LOSSES
from torch import nn

from pml_distill.evaluation import neighbor_agreement
from pml_distill.losses import catalogue
from pml_distill.utils.report import format_table, shown

ALONE = "alone"
METHODS = (
    *(ALONE, "absolute_teacher", "mutual_distance", "rkd_angle", "probabilistic_transfer", "soft_dark_rank"),
    *("similarity_regression", "relative_teacher"),
)


@dataclass(frozen=True)
class Condition:
    """Under what a student learns; ``rate`` is the learning rate that --search has found."""

    rate: float
    batch_size: int = 128
    embedding_size: int = EMBEDDING_SIZE
    labels: bool = True


CONDITIONS = {
    "batch 32": Condition(0.0025, batch_size=32),
    "batch 128": Condition(0.02),
    "batch 512": Condition(0.02, batch_size=512),
    "32 numbers": Condition(0.02, embedding_size=32),
    "no labels": Condition(0.02, labels=False),
}
RATES = (0.00125, 0.0025, 0.005, 0.01, 0.02, 0.04)


class Conditioned(GlyphsDemo):
    """The demo under another condition."""

    def __init__(self, out: Path, job: dict):
        super().__init__(out, job)
        self.condition = CONDITIONS["batch 128" if job["method"] == "teacher" else job["condition"]]
        self.batch_size, self.method = self.condition.batch_size, job["method"]

    def networks(self, width: Any, seed: int) -> dict[str, nn.Module]:
        models, size = super().networks(width, seed), self.condition.embedding_size
        if width != self.teacher_width and size != EMBEDDING_SIZE:
            models["embedder"] = nn.Linear(models["trunk"].output_size, size)
            models["classifier"] = nn.Linear(size, self.num_classes)
            if needs_equal_widths(self.method):
                models["projection"] = nn.Linear(size, EMBEDDING_SIZE)
        return models

    def beside_teacher(self, embeddings: torch.Tensor, gallery: torch.Tensor) -> dict[str, float]:
        if embeddings.shape[1] == gallery.shape[1]:
            return super().beside_teacher(embeddings, gallery)
        return {"asymmetric_map_at_r": float("nan"), "neighbor_agreement": neighbor_agreement(embeddings, gallery)}

    def trainer_and_tester(self, folder: Path, *others: Any) -> tuple:
        trainer, tester = super().trainer_and_tester(folder, *others)
        if not self.condition.labels:
            del trainer.loss_funcs["metric_loss"], trainer.loss_weights["metric_loss"]
            trainer.loss_weight_ramps = {}
        return trainer, tester


def needs_equal_widths(method: str) -> bool:
    if method == ALONE:
        return False
    name = type(LOSSES[method].make()).__name__
    return any(entry.name == name and "equal widths" in entry.needs for entry in catalogue())


def run(out: Path, job: dict) -> dict:
    torch.set_num_threads(1)
    demo, method, seed = Conditioned(out, job), job["method"], job["seed"]
    if method == "teacher":
        return job | demo.run(method, seed)
    name = f"{job['condition']}, {method}, {job['learning_rate']:g}".replace(" ", "")
    return job | demo.run(name, seed, None if method == ALONE else LOSSES[method], job["learning_rate"])


def job(split: str, condition: str, method: str, seed: int, rate: float) -> dict:
    return {"split": split, "condition": condition, "method": method, "seed": seed, "learning_rate": rate}


def table(rows: list[dict[str, str]]) -> str:
    """Lay out MAP@R by method and condition, and the paired gain over the student alone."""
    lines = []
    for method in METHODS:
        line = {"loss": method}
        for condition in CONDITIONS:
            own = by_seed(rows, METRICS[1], condition=condition, method=method)
            alone = by_seed(rows, METRICS[1], condition=condition, method=ALONE)
            line[condition] = shown(list(own.values())) if own else ""
            gains = [own[seed] - alone[seed] for seed in own if seed in alone]
            if gains and method != ALONE:
                line[condition] += f" ({shown(gains, '+.3f')})"
        lines.append(line)
    return format_table(lines)


def main() -> None:
    given = options(__doc__, "conditions")
    split, seeds, path = given.split, given.seeds, given.path
    work, processes = partial(run, given.out), given.processes
    complete(path, [job(split, "-", "teacher", seed, 0.0) for seed in range(seeds)], work, processes)
    labelled = [name for name, condition in CONDITIONS.items() if condition.labels]
    if given.search:
        complete(path, [job(split, name, ALONE, 0, rate) for name in labelled for rate in RATES], work, processes)
        return
    jobs = [
        job(split, name, method, seed, condition.rate)
        for seed in range(seeds)
        for name, condition in CONDITIONS.items()
        for method in METHODS
        if condition.labels or method != ALONE
    ]
    text = table(complete(path, jobs, work, processes))
    (given.out / "table.md").write_text(text + "\n", encoding="utf-8")
    print(text)


if __name__ == "__main__":
    main()
