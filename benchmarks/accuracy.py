"""PML's own losses without a teacher against each of them with this library's distillation losses.

Every loss, alone and with each distillation loss, has the same number of trials on the validation classes: one seed,
the student of the first size, half of the trials on the loss's own setting, the others on the learning rate (alone) or
on the weight of the distillation. The best by MAP@R is trained with every seed and size on all training classes and
tested on the test classes. All students of a dataset have the same epochs, batches and schedule.

    python benchmarks/accuracy.py --preset quick   # ten minutes on two cores
    python benchmarks/accuracy.py --preset full    # a day on two cores, or half of one
    python benchmarks/accuracy.py --preset gpu --dataset CUB --data-folder cub_data

write accuracy.csv, table.md and two pictures into the folder. A finished run has a row in the CSV and is never computed
again, an interrupted one goes on from its last epoch, and the next trials and tests follow from the rows: the same
command goes on from wherever it was stopped. Presets and datasets may share a folder. CUB, Cars196 and
StanfordOnlineProducts are those of PML, in the layout that it expects below --data-folder; their networks start from
torchvision's ImageNet weights.
"""

import argparse
import hashlib
import os
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from comparison import complete, finished, without_row
from glyph_runs import DATASETS, EMBEDDING_SIZE, LOSSES, Demo, DemoConfig, Distillation, Supervision
from pytorch_metric_learning.losses import (
    ArcFaceLoss,
    ContrastiveLoss,
    MultiSimilarityLoss,
    NTXentLoss,
    ProxyAnchorLoss,
    SupConLoss,
    TripletMarginLoss,
)
from pytorch_metric_learning.miners import TripletMarginMiner
from torch import nn

from pml_distill.datasets import FROM_PML, Digits
from pml_distill.utils.files import whole_file

NONE, TEACHER = "none", "teacher"
FIGURES = ("precision_at_1", "r_precision", "mean_average_precision_at_r", "NMI")
COLUMNS = (*FIGURES, "asymmetric_map_at_r", "neighbor_agreement", "parameters")
CHOSEN_BY = "mean_average_precision_at_r"
SPLITS = {"val": ("train", "val"), "test": ("train+val", "test")}


@dataclass(frozen=True)
class MetricLoss:
    """A loss of PML, in its usual setting and another one.

    ``scale`` is the norm of its gradient in the embeddings against that of MultiSimilarityLoss, measured with a trained
    student of the demo: the weights of the distillation grow with it.
    """

    settings: dict[str, Callable[[int], nn.Module]]
    scale: float
    miner: Callable[[], nn.Module] | None = None


def with_proxies(loss: Callable[..., nn.Module], **setting: float) -> Callable[[int], nn.Module]:
    return lambda num_classes: loss(num_classes, EMBEDDING_SIZE, **setting)


METRIC_LOSSES = {
    "multi_similarity": MetricLoss(
        {"base 0.5": lambda n: MultiSimilarityLoss(), "base 0.7": lambda n: MultiSimilarityLoss(base=0.7)}, 1
    ),
    "triplet_margin": MetricLoss(
        {"margin 0.05": lambda n: TripletMarginLoss(0.05), "margin 0.1": lambda n: TripletMarginLoss(0.1)},
        2.5,
        TripletMarginMiner,
    ),
    "proxy_anchor": MetricLoss(
        {"alpha 32": with_proxies(ProxyAnchorLoss), "alpha 16": with_proxies(ProxyAnchorLoss, alpha=16)}, 25
    ),
    "nt_xent": MetricLoss({"T 0.07": lambda n: NTXentLoss(0.07), "T 0.2": lambda n: NTXentLoss(0.2)}, 7),
    "sup_con": MetricLoss({"T 0.1": lambda n: SupConLoss(0.1), "T 0.2": lambda n: SupConLoss(0.2)}, 4),
    "contrastive": MetricLoss(
        {"margin 1": lambda n: ContrastiveLoss(), "margin 0.5": lambda n: ContrastiveLoss(neg_margin=0.5)}, 1.5
    ),
    "arc_face": MetricLoss(
        {"scale 64": with_proxies(ArcFaceLoss), "scale 16": with_proxies(ArcFaceLoss, scale=16)}, 30
    ),
}
#: The most telling first: a run that is stopped early has compared these.
DISTILLATIONS = tuple(dict.fromkeys(("mutual_distance", "rkd_angle", "soft_dark_rank", *LOSSES)))


@dataclass(frozen=True)
class Preset:
    """What is compared. The first of ``students`` is the one that the trials are made with."""

    epochs: int
    students: tuple[str, ...]
    distillations: tuple[str, ...] = DISTILLATIONS
    metric_losses: tuple[str, ...] = tuple(METRIC_LOSSES)
    seeds: int = 5
    trials: int = 4
    batch_size: int = 128
    precision: str = "float32"


PRESETS = {
    "quick": Preset(10, ("8",), DISTILLATIONS[:1], tuple(METRIC_LOSSES)[:3], seeds=3),
    "full": Preset(10, ("8", "4", "16")),
    "gpu": Preset(40, ("8", "4", "16"), batch_size=512, precision="bfloat16"),
}
#: Times the epochs of a preset: six epochs of digits have the steps of one of Glyphs.
LONGER = {"digits": 6}
PHOTO_STUDENTS = ("resnet18", "mobilenet_v3_small", "mobilenet_v3_large")


class Accuracy(Demo):
    """The demo, its students taught with any loss of PML."""

    metrics = FIGURES

    def __init__(self, job: dict, out: Path, device: torch.device, data_folder: str):
        self.batch_size, self.data_folder = job["batch_size"], data_folder
        self.amp_dtype = torch.bfloat16 if job["precision"] == "bfloat16" else None
        config = DemoConfig(job["dataset"], job["epochs"], *SPLITS[job["split"]])
        place = f"{config.dataset}-{config.epochs}-{self.batch_size}-{job['precision']}-{job['split']}"
        super().__init__(config, out / "runs" / place, device)

    def load(self, split: str, training: bool) -> Any:
        if self.config.dataset != "digits" or split not in ("train", "val"):
            return super().load(split, training)
        # Two of the five digits that train: in the library's validation split, one digit, there is nothing to confuse.
        data = Digits("train+val", augment=training)
        held_out = torch.isin(data.labels, data.labels.unique()[:2])
        kept = held_out if split == "val" else ~held_out
        data.labels, data.pixels = data.labels[kept], data.pixels[kept]
        return data

    def teacher(self, seed: int) -> tuple[Any, nn.Module]:
        teacher, classifier = super().teacher(seed)
        if self.device.type == "cpu" and self.config.dataset in DATASETS:
            teacher = self.memory = Remembering(teacher, self.out / f"seed{seed}" / TEACHER / "answers.pth")
        return teacher, classifier

    def student(self, job: dict) -> dict:
        """Train and test a student; keep no more than its figures and logs."""
        loss, name = METRIC_LOSSES[job["metric_loss"]], run_name(job)
        distillation = None
        if job["distillation"] != NONE:
            distillation = Distillation(LOSSES[job["distillation"]].make, job["weight"])
        self.memory = None
        row = self.run(
            name,
            job["seed"],
            distillation,
            job["learning_rate"],
            student_width(job),
            Supervision(loss.settings[job["setting"]], loss.miner),
        )
        if self.memory is not None:
            self.memory.save()
        for kept in ("checkpoint.pth", "models.pth", "embeddings.pth"):
            (self.out / f"seed{job['seed']}" / name / kept).unlink(missing_ok=True)
        return row


class Photos(Accuracy):
    """The same with the datasets of PML and the networks of torchvision."""

    teacher_width, teacher_rate = "resnet50", 3e-4
    workers = min(8, os.cpu_count() or 1)
    pretrained = True

    def load(self, split: str, training: bool) -> "Photographs":
        return Photographs(self.config.dataset, self.data_folder, split, training)

    def networks(self, width: str, seed: int) -> dict[str, nn.Module]:
        from torchvision import models

        torch.manual_seed(seed)
        trunk = models.get_model(width, weights="DEFAULT" if self.pretrained else None)
        setattr(trunk, "fc" if hasattr(trunk, "fc") else "classifier", nn.Identity())
        with torch.no_grad():
            features = trunk.eval()(torch.zeros(1, 3, 64, 64)).shape[1]
        found = {"trunk": trunk, "embedder": nn.Linear(features, EMBEDDING_SIZE)}
        found["classifier"] = nn.Linear(EMBEDDING_SIZE, self.num_classes)
        return {key: model.to(self.device, memory_format=torch.channels_last) for key, model in found.items()}


class Photographs(torch.utils.data.Dataset):
    """A dataset of PML at 224 pixels; a fifth of its training classes are the validation split."""

    def __init__(self, name: str, folder: str, split: str, training: bool):
        from pytorch_metric_learning import datasets
        from torchvision.transforms import v2

        crop = [v2.RandomResizedCrop(224, scale=(0.16, 1)), v2.RandomHorizontalFlip()]
        if not training:
            crop = [v2.Resize(256), v2.CenterCrop(224)]
        scale = [v2.ToImage(), v2.ToDtype(torch.float32, scale=True)]
        normalize = v2.Normalize([0.485, 0.456, 0.406], [0.229, 0.224, 0.225])
        transform = v2.Compose([in_color, *crop, *scale, normalize])
        self.data = getattr(datasets, name)(folder, "test" if split == "test" else "train", transform)
        labels = torch.as_tensor(self.data.labels)
        classes = labels.unique()
        order = torch.randperm(len(classes), generator=torch.Generator().manual_seed(0))
        held_out = torch.isin(labels, classes[order[: len(classes) // 5]])
        kept = {"train": ~held_out, "val": held_out}.get(split, torch.ones_like(held_out))
        self.places, self.labels = kept.nonzero().flatten(), labels[kept]

    def __len__(self) -> int:
        return len(self.labels)

    def __getitem__(self, index: int) -> tuple[torch.Tensor, int]:
        return self.data[int(self.places[index])]


def in_color(image: Any) -> Any:
    return image.convert("RGB")


class Remembering:
    """A teacher that does not look twice at a batch: all runs with one seed see the same jittered images."""

    def __init__(self, teacher: nn.Module, path: Path):
        self.teacher, self.path = teacher, path
        self.answers: dict[str, torch.Tensor] = torch.load(path) if path.exists() else {}
        self.known = len(self.answers)

    def __call__(self, data: torch.Tensor, index: torch.Tensor | None = None) -> torch.Tensor:
        key = hashlib.blake2b(data.contiguous().numpy().tobytes()).hexdigest()
        if key not in self.answers:
            self.answers[key] = self.teacher(data)
        return self.answers[key]

    def save(self) -> None:
        """Keep the new answers for later runs."""
        if len(self.answers) > self.known:
            with whole_file(self.path) as unfinished:
                torch.save(self.answers, unfinished)


def experiment(job: dict, out: Path, device: str, data_folder: str) -> Accuracy:
    kind = Photos if job["dataset"] in FROM_PML else Accuracy
    return kind(job, out, torch.device(device), data_folder)


def run(out: Path, device: str, data_folder: str, job: dict) -> dict:
    torch.set_num_threads(1)
    demo = experiment(job, out, device, data_folder)
    row = demo.run(TEACHER, job["seed"]) if job["student"] == TEACHER else demo.student(job)
    models = demo.networks(demo.teacher_width if job["student"] == TEACHER else student_width(job), 0)
    deployed = nn.Sequential(models["trunk"], models["embedder"])
    return job | row | {"parameters": sum(p.numel() for p in deployed.parameters())}


def with_teachers(out: Path, device: str, data_folder: str, jobs: Sequence[dict]) -> None:
    """Claim the folders, and train the teachers that are missing in them, before several processes use both."""
    for job in {(job["split"], job["seed"]): job for job in jobs}.values():
        demo = experiment(job, out, device, data_folder)
        if job["distillation"] != NONE:
            demo.run(TEACHER, job["seed"])


def student_width(job: dict) -> int | str:
    return int(job["student"]) if job["student"].isdigit() else job["student"]


def run_name(job: dict) -> str:
    parts = ("metric_loss", "distillation", "student", "setting", "learning_rate", "weight")
    return "-".join(str(job[part]) for part in parts).replace(" ", "_")


def new_job(
    preset: Preset,
    dataset: str,
    split: str,
    metric_loss: str,
    distillation: str,
    student: str,
    setting: tuple[str, float, float],
    seed: int,
) -> dict:
    return {
        "dataset": dataset,
        "epochs": epochs(preset, dataset),
        "batch_size": preset.batch_size,
        "precision": preset.precision,
        "split": split,
        "metric_loss": metric_loss,
        "distillation": distillation,
        "student": student,
        **dict(zip(("setting", "learning_rate", "weight"), setting)),
        "seed": seed,
    }


def trials(metric_loss: str, distillation: str, rate: float) -> list[tuple[str, float, float]]:
    """Return the settings to choose from, the likeliest first: (of the loss, learning rate, weight)."""
    usual, other = METRIC_LOSSES[metric_loss].settings
    if distillation == NONE:
        return [(usual, rate, 0.0), (other, rate, 0.0), (usual, rate / 2, 0.0), (usual, 2 * rate, 0.0)]
    weight = LOSSES[distillation].weight * METRIC_LOSSES[metric_loss].scale
    light, middle, heavy = (float(f"{factor * weight:.3g}") for factor in (1 / 3, 1, 3))
    return [(usual, rate, middle), (other, rate, middle), (usual, rate, light), (usual, rate, heavy)]


def learning_rate(dataset: str) -> float:
    return 3e-4 if dataset in FROM_PML else 0.02


def epochs(preset: Preset, dataset: str) -> int:
    return preset.epochs * LONGER.get(dataset, 1)


def students(preset: Preset, dataset: str) -> tuple[str, ...]:
    return PHOTO_STUDENTS[: len(preset.students)] if dataset in FROM_PML else preset.students


def teacher_jobs(preset: Preset, dataset: str) -> list[dict]:
    places = [("val", 0), *(("test", seed) for seed in range(preset.seeds))]
    own = ("multi_similarity", NONE, TEACHER, ("base 0.5", 0.0, 0.0))
    return [new_job(preset, dataset, split, *own, seed) for split, seed in places]


def groups(preset: Preset) -> list[tuple[str, ...]]:
    """Return what is distilled with in the order of the work: first the losses alone and with one distillation."""
    first, *others = preset.distillations
    return [(NONE, first), *((name,) for name in others)]


def trial_jobs(preset: Preset, dataset: str, distillations: Sequence[str]) -> list[dict]:
    return [
        new_job(preset, dataset, "val", metric_loss, distillation, students(preset, dataset)[0], setting, 0)
        for metric_loss in preset.metric_losses
        for distillation in distillations
        for setting in trials(metric_loss, distillation, learning_rate(dataset))[: preset.trials]
    ]


def chosen(jobs: Sequence[dict], rows: Sequence[dict[str, str]]) -> dict[tuple[str, str], tuple[str, float, float]]:
    """Return the best trial for each (metric loss, distillation loss); the earlier one of two equals."""
    best: dict[tuple[str, str], tuple[float, tuple[str, float, float]]] = {}
    figures = {tuple(row[key] for key in jobs[0]): float(row[CHOSEN_BY]) for row in rows}
    for job in jobs:
        key, figure = (job["metric_loss"], job["distillation"]), figures[tuple(map(str, job.values()))]
        if key not in best or figure > best[key][0]:
            best[key] = figure, (job["setting"], job["learning_rate"], job["weight"])
    return {key: setting for key, (_, setting) in best.items()}


def test_jobs(
    preset: Preset,
    dataset: str,
    sizes: Sequence[str],
    distillations: Sequence[str],
    settings: dict[tuple[str, str], tuple[str, float, float]],
) -> Iterator[dict]:
    """Yield seed by seed, so that every comparison of an unfinished CSV has as many seeds, or one less."""
    for seed in range(preset.seeds):
        for metric_loss in preset.metric_losses:
            for distillation in distillations:
                for size in sizes:
                    setting = settings[metric_loss, distillation]
                    yield new_job(preset, dataset, "test", metric_loss, distillation, size, setting, seed)


def work(preset: Preset, dataset: str, do: Callable[[Sequence[dict]], list[dict[str, str]]]) -> None:
    """Do all jobs of a preset in their order."""
    do(teacher_jobs(preset, dataset))
    first, *others = students(preset, dataset)
    settings: dict[tuple[str, str], tuple[str, float, float]] = {}
    with_one, *rest = groups(preset)
    for distillations in (with_one, *rest):
        searched = trial_jobs(preset, dataset, distillations)
        settings |= chosen(searched, do(searched))
        do(list(test_jobs(preset, dataset, [first], distillations, settings)))
        if distillations is with_one:
            do(list(test_jobs(preset, dataset, others, distillations, settings)))
    for size in others:
        for distillations in rest:
            do(list(test_jobs(preset, dataset, [size], distillations, settings)))


def number_of_jobs(preset: Preset) -> int:
    methods = len(preset.metric_losses) * (1 + len(preset.distillations))
    return 1 + preset.seeds + methods * (preset.trials + preset.seeds * len(preset.students))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--preset", choices=PRESETS, default="quick")
    parser.add_argument("--dataset", choices=(*DATASETS, *FROM_PML), default="glyphs")
    parser.add_argument("--data-folder", default="", help="root of CUB, Cars196 or StanfordOnlineProducts")
    parser.add_argument("--out", default="accuracy", type=Path)
    parser.add_argument("--processes", type=int, help="of one thread each; two, or one on a GPU")
    given = parser.parse_args()
    if given.dataset in FROM_PML and not Path(given.data_folder).is_dir():
        parser.error(f"--dataset {given.dataset} needs --data-folder, but {given.data_folder!r} is no folder.")
    preset, path = PRESETS[given.preset], given.out / "accuracy.csv"
    device = "cuda" if given.preset == "gpu" else "cpu"
    if device == "cuda" and not torch.cuda.is_available():
        parser.error("--preset gpu needs a GPU, but torch finds none.")
    from accuracy_report import report
    from tqdm import tqdm

    # The bars of the single runs, in the other processes, would hide the one over all.
    os.environ["TQDM_DISABLE"] = "1"
    if device == "cpu":
        os.environ["OMP_NUM_THREADS"] = "1"  # faiss counts its own threads
    processes = given.processes or (1 if device == "cuda" else 2)
    with tqdm(total=number_of_jobs(preset), unit="run", smoothing=0.05) as bar:

        def do(jobs: Sequence[dict]) -> list[dict[str, str]]:
            missing = without_row(path, jobs)
            bar.update(len(jobs) - len(missing))
            if missing:
                with_teachers(given.out, device, given.data_folder, jobs)
            task = partial(run, given.out, device, given.data_folder)
            return complete(path, jobs, task, processes, COLUMNS, lambda row: bar.update())

        work(preset, given.dataset, do)
    print(report(finished(path), given.out))


if __name__ == "__main__":
    main()
