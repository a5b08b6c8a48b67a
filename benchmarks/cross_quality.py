"""Glyphs of low quality: does a student that is taught on good images see bad ones better than one trained on them?

The teacher is trained on clean images, as in the demo. Both students see degraded images, in training and in the
test, on classes never seen: one learns from them with the metric loss alone; for the other the teacher looks at the
clean image of the same sample, and the absolute teacher is added.

    python benchmarks/cross_quality.py --search   # on the validation classes
    python benchmarks/cross_quality.py

write search.csv, and results.csv, table.md and map_at_r.png, into the folder. A finished run has a row and is not
computed again; an interrupted one goes on from its last epoch. "student to teacher" is retrieval of the teacher's
embeddings of clean images by degraded queries. The settings below are the best of the search, on images of low
resolution.
"""

from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import torch
from comparison import GlyphsDemo, complete, options, report
from glyph_runs import Distillation

from pml_distill.datasets import CrossQuality
from pml_distill.evaluation import asymmetric_accuracy, neighbor_agreement
from pml_distill.losses import AbsoluteTeacherLoss

CLEAN, LOOKING, ALONE, TAUGHT = "teacher", "teacher on degraded images", "trained on degraded images", "cross-quality"
DEGRADATIONS = ("low resolution", "blur", "compression")
#: (weight of the distillation, learning rate)
SETTINGS = {ALONE: (0.0, 0.01), TAUGHT: (10.0, 0.02)}
SEARCH = {
    ALONE: [(0.0, rate) for rate in (0.005, 0.01, 0.02, 0.03)],
    TAUGHT: [*((weight, 0.02) for weight in (3.0, 10.0, 30.0)), (10.0, 0.01)],
}


def degradation(name: str) -> Callable[[torch.Tensor], torch.Tensor]:
    """12 of 32 pixels, a Gaussian of 2 pixels, or JPEG of quality 3: enough to hurt the teacher."""
    from torchvision.transforms import v2

    if name == "low resolution":
        return v2.Compose([v2.Resize(12), v2.Resize(32)])
    if name == "blur":
        return v2.GaussianBlur(9, 2.0)
    compress = v2.Compose([v2.ToDtype(torch.uint8, scale=True), v2.JPEG(3), v2.ToDtype(torch.float32, scale=True)])
    # The images go from -1 to 1, and beyond by their noise.
    return lambda image: 2 * compress(((image + 1) / 2).clamp(0, 1)) - 1


class StudentViews(CrossQuality):
    """Only the degraded images, to test on."""

    def views(self, item: tuple) -> tuple:
        views, label = super().views(item)
        return views.student, label


class CrossQualityDemo(GlyphsDemo):
    """The demo, its students' images degraded."""

    def __init__(self, out: Path, job: dict):
        super().__init__(out, job)
        if job["method"] != CLEAN:
            degrade = degradation(job["quality"])
            self.degraded = CrossQuality(self.train_set, degrade)
            self.test_set = StudentViews(self.test_set, degrade)

    def training_data(self, name: str, seed: int) -> tuple[Any, Any]:
        dataset, sampler = super().training_data(name, seed)
        return (dataset if name == CLEAN else self.degraded), sampler

    def look(self, seed: int) -> dict[str, float]:
        """Test the teacher as it is on the degraded images."""
        images = torch.stack([image for image, _ in self.test_set.__getitems__(range(len(self.test_set)))])
        teacher, clean, labels = self.teacher(seed)[0], self.embeddings(CLEAN, seed), self.test_set.labels
        embeddings = torch.cat([teacher(part) for part in images.split(512)])
        return {
            **asymmetric_accuracy(embeddings, embeddings, labels),
            "asymmetric_map_at_r": asymmetric_accuracy(embeddings, clean, labels)["mean_average_precision_at_r"],
            "neighbor_agreement": neighbor_agreement(embeddings, clean),
        }


def run(out: Path, job: dict) -> dict:
    torch.set_num_threads(1)
    demo, weight, rate = CrossQualityDemo(out, job), job["weight"], job["learning_rate"]
    if job["method"] == CLEAN:
        return job | demo.run(CLEAN, job["seed"])
    if job["method"] == LOOKING:
        return job | demo.look(job["seed"])
    name = f"{job['quality']}, {job['method']}, {weight:g}, {rate:g}".replace(" ", "")
    distillation = Distillation(AbsoluteTeacherLoss, weight) if weight else None
    return job | demo.run(name, job["seed"], distillation, rate)


def job(split: str, quality: str, method: str, seed: int, weight: float = 0.0, rate: float = 0.0) -> dict:
    key = {"split": split, "quality": quality, "method": method, "seed": seed}
    return key | {"weight": weight, "learning_rate": rate}


def main() -> None:
    given = options(__doc__, "cross_quality")
    split, seeds, path = given.split, given.seeds, given.path
    work, processes = partial(run, given.out), given.processes
    complete(path, [job(split, "clean", CLEAN, seed) for seed in range(seeds)], work, processes)
    if given.search:
        jobs = [job(split, DEGRADATIONS[0], m, 0, *setting) for m in SEARCH for setting in SEARCH[m]]
        complete(path, jobs, work, processes)
        return
    jobs = []
    for quality in DEGRADATIONS:
        for seed in range(seeds):
            jobs += [job(split, quality, method, seed, *setting) for method, setting in SETTINGS.items()]
            jobs.append(job(split, quality, LOOKING, seed))
    rows = complete(path, jobs, work, processes)
    report(given.out, rows, "quality", DEGRADATIONS, (LOOKING, ALONE, TAUGHT), "teacher on clean images")


if __name__ == "__main__":
    main()
