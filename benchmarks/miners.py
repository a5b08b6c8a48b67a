"""Glyphs with miners: do pairs and triplets chosen by the teacher teach more than those chosen by labels, or all?

    python benchmarks/miners.py --search   # on the validation classes
    python benchmarks/miners.py

write search.csv, and results.csv, table.md and map_at_r.png, into the folder. The setting is the demo's. Each line of
the table compares two ways to choose pairs for the same losses: the relative teacher beside the demo's metric loss on
all pairs or on those near each other in the teacher's space; beside the same metric loss the student's anchors in
triplets with the teacher's rows, mined by labels or by the teacher's order; and a metric loss alone, with a miner of
PML or with the teacher's twin of it. A finished run has a row and is not computed again; an interrupted one goes on
from its last epoch. The settings below are the best of the search.
"""

from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import torch
from comparison import GlyphsDemo, complete, options, report
from glyph_runs import Distillation
from pytorch_metric_learning.losses import ContrastiveLoss, MultiSimilarityLoss, TripletMarginLoss
from pytorch_metric_learning.miners import BaseMiner, MultiSimilarityMiner, TripletMarginMiner
from torch import nn

from pml_distill.losses import RelativeTeacherLoss
from pml_distill.miners import BaseTeacherMiner, TeacherMiner, TeacherNeighborMiner, TeacherRankMiner

WITHOUT, WITH = "labels or all pairs", "the teacher's choice"
MINERS: dict[str, Callable[[], BaseMiner] | None] = {
    "all": None,
    "multi-similarity": MultiSimilarityMiner,
    "teacher's multi-similarity": lambda: TeacherMiner(MultiSimilarityMiner()),
    "triplet margin": TripletMarginMiner,
    "teacher's triplet margin": lambda: TeacherMiner(TripletMarginMiner()),
    "teacher's order": lambda: TeacherRankMiner(8),
    "teacher's 8 nearest": lambda: TeacherNeighborMiner(8),
    "teacher's 32 nearest": lambda: TeacherNeighborMiner(32),
}


class Comparison(NamedTuple):
    """A metric loss and the names of two miners: for it, or where there is one for the distillation loss beside it."""

    metric_loss: Callable[[], nn.Module]
    without: str
    with_teacher: str
    distillation: Callable[[], nn.Module] | None = None


COMPARISONS = {
    **{
        f"relative teacher, {n} nearest": Comparison(
            MultiSimilarityLoss, "all", f"teacher's {n} nearest", RelativeTeacherLoss
        )
        for n in (8, 32)
    },
    "triplets in the teacher's space": Comparison(
        MultiSimilarityLoss, "triplet margin", "teacher's order", TripletMarginLoss
    ),
    "multi-similarity": Comparison(MultiSimilarityLoss, "multi-similarity", "teacher's multi-similarity"),
    "triplet, margin": Comparison(TripletMarginLoss, "triplet margin", "teacher's triplet margin"),
    "triplet, order": Comparison(TripletMarginLoss, "triplet margin", "teacher's order"),
    "contrastive": Comparison(ContrastiveLoss, "all", "teacher's 32 nearest"),
}
#: (weight of the distillation loss, learning rate), found by --search on the validation classes
SETTINGS = {
    ("relative teacher, 8 nearest", WITHOUT): (1.0, 0.02),
    ("relative teacher, 8 nearest", WITH): (0.3, 0.02),
    ("relative teacher, 32 nearest", WITHOUT): (1.0, 0.02),
    ("relative teacher, 32 nearest", WITH): (1.0, 0.02),
    ("triplets in the teacher's space", WITHOUT): (0.3, 0.02),
    ("triplets in the teacher's space", WITH): (1.0, 0.02),
    ("multi-similarity", WITHOUT): (0.0, 0.01),
    ("multi-similarity", WITH): (0.0, 0.02),
    ("triplet, margin", WITHOUT): (0.0, 0.02),
    ("triplet, margin", WITH): (0.0, 0.02),
    ("triplet, order", WITHOUT): (0.0, 0.02),
    ("triplet, order", WITH): (0.0, 0.02),
    ("contrastive", WITHOUT): (0.0, 0.005),
    ("contrastive", WITH): (0.0, 0.01),
}
SEARCH = {
    key: [(weight, 0.02) for weight in (0.1, 0.3, 1.0, 3.0, 10.0)]
    if weight
    else [(0.0, rate) for rate in (0.005, 0.01, 0.02)]
    for key, (weight, _) in SETTINGS.items()
}


class MiningDemo(GlyphsDemo):
    """The demo, with another metric loss and a miner for the students."""

    def __init__(self, out: Path, job: dict):
        super().__init__(out, job)
        if job["method"] != "teacher":
            self.comparison = COMPARISONS[job["comparison"]]
            self.miner = self.comparison.with_teacher if job["method"] == WITH else self.comparison.without

    def trainer_and_tester(self, folder: Path, models: dict, seed: int, *others: Any) -> tuple:
        trainer, tester = super().trainer_and_tester(folder, models, seed, *others)
        if folder.name != "teacher":
            trainer.loss_funcs["metric_loss"] = self.comparison.metric_loss()
            make_miner = MINERS[self.miner]
            if make_miner is not None:
                # Beside a distillation loss the metric loss has all pairs on both sides of the comparison.
                key = "distillation_miner" if "distillation_loss" in trainer.loss_funcs else "tuple_miner"
                trainer.mining_funcs[key] = miner = make_miner()
                if isinstance(miner, BaseTeacherMiner):
                    trainer.teacher = self.teacher(seed)[0]
        return trainer, tester


def run(out: Path, job: dict) -> dict:
    torch.set_num_threads(1)
    demo, weight, rate = MiningDemo(out, job), job["weight"], job["learning_rate"]
    if job["method"] == "teacher":
        return job | demo.run("teacher", job["seed"])
    # Two comparisons may share a side.
    losses = (demo.comparison.metric_loss, demo.comparison.distillation)
    names = [loss.__name__ for loss in losses if loss is not None]
    name = f"{'+'.join(names)}, {demo.miner}, {weight:g}, {rate:g}".replace(" ", "")
    distillation = Distillation(demo.comparison.distillation, weight) if demo.comparison.distillation else None
    return job | demo.run(name, job["seed"], distillation, rate)


def job(split: str, comparison: str, method: str, seed: int, weight: float = 0.0, rate: float = 0.0) -> dict:
    key = {"split": split, "comparison": comparison, "method": method, "seed": seed}
    return key | {"weight": weight, "learning_rate": rate}


def main() -> None:
    given = options(__doc__, "miners")
    split, seeds, path = given.split, given.seeds, given.path
    work, processes = partial(run, given.out), given.processes
    complete(path, [job(split, "-", "teacher", seed) for seed in range(seeds)], work, processes)
    if given.search:
        complete(path, [job(split, *key, 0, *setting) for key in SEARCH for setting in SEARCH[key]], work, processes)
        return
    jobs = [job(split, *key, seed, *setting) for key, setting in SETTINGS.items() for seed in range(seeds)]
    rows = complete(path, jobs, work, processes)
    report(given.out, rows, "comparison", tuple(COMPARISONS), (WITHOUT, WITH), "teacher")


if __name__ == "__main__":
    main()
