"""Glyphs with few labels: does a student that is distilled on all images beat one that only learns from the labels?

The teacher is trained with all labels, as in the demo. Of the students' training images a share keeps its label,
drawn anew for each seed: "10 %" is 2 of the 16 images of each class (12.5 %, the least that makes a pair), "25 %" is
4, "100 %" all. One student learns from these with the metric loss alone; the other from batches of labelled and
unlabelled images, the metric loss on the labelled rows and the absolute teacher on all. Both are tested on the demo's
test classes.

    python benchmarks/semi_supervised.py --search   # on the validation classes
    python benchmarks/semi_supervised.py

write search.csv, and results.csv, table.md and map_at_r.png, into the folder. A finished run has a row and is not
computed again; an interrupted one goes on from its last epoch. The settings below are the best of the search.
"""

from functools import partial
from pathlib import Path
from typing import Any

import torch
from comparison import GlyphsDemo, complete, options, report
from glyph_runs import BATCH_SIZE, Distillation

from pml_distill.datasets import PartiallyLabeled
from pml_distill.losses import AbsoluteTeacherLoss
from pml_distill.samplers import MixedSampler

ALONE, DISTILLED = "metric loss on the labelled", "distilled on all"
FRACTIONS = {
    "10 %": 0.1,
    "10 %, three times as long": 0.1,
    "25 %": 0.25,
    "25 %, three times as long": 0.25,
    "100 %": 1.0,
}
#: (weight of the distillation, learning rate, share of labelled rows in a batch, m, length of the training in demos)
SETTINGS = {
    ("10 %", ALONE): (0.0, 0.03, 1.0, 4, 1.0),
    ("10 %", DISTILLED): (10.0, 0.02, 0.5, 2, 1.0),
    ("10 %, three times as long", ALONE): (0.0, 0.02, 1.0, 4, 3.0),
    ("10 %, three times as long", DISTILLED): (10.0, 0.02, 0.5, 2, 3.0),
    ("25 %", ALONE): (0.0, 0.01, 1.0, 4, 1.0),
    ("25 %", DISTILLED): (10.0, 0.02, 0.5, 4, 1.0),
    ("25 %, three times as long", ALONE): (0.0, 0.01, 1.0, 4, 3.0),
    ("25 %, three times as long", DISTILLED): (3.0, 0.01, 0.5, 4, 3.0),
    ("100 %", ALONE): (0.0, 0.02, 1.0, 4, 1.0),
    ("100 %", DISTILLED): (3.0, 0.02, 1.0, 4, 1.0),
}
#: The settings for 100 % are the demo's.
SEARCH = {
    ("10 %", ALONE): [
        *((0.0, rate, 1.0, 2, length) for length in (0.3, 1.0, 3.0) for rate in (0.01, 0.02, 0.03)),
        *((0.0, rate, 1.0, 4, 1.0) for rate in (0.02, 0.03, 0.05)),
        (0.0, 0.03, 1.0, 8, 1.0),
        *((0.0, rate, 1.0, 4, 3.0) for rate in (0.02, 0.03)),
    ],
    ("10 %", DISTILLED): [
        *((weight, 0.02, 0.25, 2, 1.0) for weight in (3.0, 10.0, 30.0)),
        (10.0, 0.01, 0.25, 2, 1.0),
        *((weight, 0.02, 0.5, m, 1.0) for weight, m in ((10.0, 2), (30.0, 2), (10.0, 4))),
        *((10.0, 0.02, 0.5, m, 3.0) for m in (2, 4)),
    ],
    ("25 %", ALONE): [
        *((0.0, rate, 1.0, 4, length) for length in (0.3, 1.0, 3.0) for rate in (0.01, 0.02, 0.03)),
        (0.0, 0.005, 1.0, 4, 1.0),
        (0.0, 0.01, 1.0, 8, 1.0),
    ],
    ("25 %", DISTILLED): [
        *((weight, 0.02, 0.25, 4, 1.0) for weight in (3.0, 10.0)),
        *((weight, 0.02, 0.5, 4, 1.0) for weight in (3.0, 10.0)),
        *((weight, 0.02, 0.5, 4, 3.0) for weight in (1.0, 3.0, 10.0)),
        (3.0, 0.01, 0.5, 4, 3.0),
    ],
}


class FewLabels(GlyphsDemo):
    """The demo, its student's training images labelled in part."""

    def __init__(self, out: Path, job: dict):
        super().__init__(out, job)
        self.fraction = FRACTIONS[job["labels"]]
        self.share, self.m, self.length = job["share"], job["m"], job["length"]

    def training_data(self, name: str, seed: int) -> tuple[Any, Any]:
        dataset, sampler = super().training_data(name, seed)
        if name == "teacher" or self.fraction == 1:
            return dataset, sampler
        dataset = PartiallyLabeled(dataset, self.fraction, seed=seed)
        return dataset, MixedSampler(dataset.labels, self.m, BATCH_SIZE, self.share, round(self.length * len(sampler)))


def run(out: Path, job: dict) -> dict:
    torch.set_num_threads(1)
    demo = FewLabels(out, job)
    weight, rate, seed = job["weight"], job["learning_rate"], job["seed"]
    if job["method"] == "teacher":
        return job | demo.run("teacher", seed)
    name = f"{demo.fraction}, {job['method']}, {weight:g}, {rate:g}, {demo.share:g}, {demo.m}, {demo.length:g}"
    distillation = Distillation(AbsoluteTeacherLoss, weight) if weight else None
    return job | demo.run(name.replace(" ", ""), seed, distillation, rate)


def job(split: str, labels: str, method: str, seed: int, setting: tuple[float, ...]) -> dict:
    names = ("weight", "learning_rate", "share", "m", "length")
    return {"split": split, "labels": labels, "method": method, "seed": seed, **dict(zip(names, setting))}


def main() -> None:
    given = options(__doc__, "semi_supervised")
    split, seeds, path = given.split, given.seeds, given.path
    work, processes = partial(run, given.out), given.processes
    teachers = [job(split, "100 %", "teacher", seed, (0.0, 0.0, 1.0, 4, 1.0)) for seed in range(seeds)]
    complete(path, teachers, work, processes)
    if given.search:
        jobs = [job(split, *key, 0, setting) for key, settings in SEARCH.items() for setting in settings]
        complete(path, jobs, work, processes)
        return
    jobs = [job(split, *key, seed, setting) for key, setting in SETTINGS.items() for seed in range(seeds)]
    rows = complete(path, jobs, work, processes)
    report(given.out, rows, "labels", tuple(FRACTIONS), (ALONE, DISTILLED), "teacher, all labels")


if __name__ == "__main__":
    main()
