"""What a teacher costs: a step of the student alone, with the teacher's network beside it, and with a cache.

    python benchmarks/teacher_cache.py --out teacher_cache

writes teacher_cache.csv, teacher_cache.md and teacher_cache.png into the folder. The teacher has 1, 4 and 16 times the
FLOPs of the student. A step is that of `DistillationTrainer` on a batch of Glyphs in memory: the metric loss, and with
a teacher the absolute teacher beside it. Steps of all kinds take turns in one process, and medians are compared; memory
is the most that a step allocates beyond what was there. "Written" is the time to write the cache, for a view of a
sample. Two more lines tell what writing takes against a pass of the teacher alone over the same data, and what it takes
to read 256 random rows of 10,000,000 x 512 in float16 (a sparse file).
"""

import argparse
import csv
import tempfile
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path

import numpy as np
import torch
from pytorch_metric_learning.losses import MultiSimilarityLoss
from pytorch_metric_learning.samplers import MPerClassSampler
from timing import medians, peak_memory

from pml_distill.datasets import Glyphs, SeededViews
from pml_distill.evaluation import model_cost
from pml_distill.losses import AbsoluteTeacherLoss
from pml_distill.models import SmallResNet
from pml_distill.teachers import CachedTeacher, FrozenTeacher, TeacherCache
from pml_distill.teachers.array_folder import ArrayFolder, checksums, new_manifest
from pml_distill.trainers import DistillationTrainer
from pml_distill.utils.report import format_table

WIDTH, EMBEDDING_SIZE, PER_CLASS = 16, 128, 4
#: Channels are in both factors of a convolution's cost.
TEACHERS = {1: WIDTH, 4: 2 * WIDTH, 16: 4 * WIDTH}
ALONE, ON_THE_FLY, CACHED = "student alone", "teacher on the fly", "cached teacher"


def network(width: int) -> torch.nn.Module:
    trunk = SmallResNet(width)
    return torch.nn.Sequential(trunk, torch.nn.Linear(trunk.output_size, EMBEDDING_SIZE))


def trainer(dataset: SeededViews, batch: int, device: torch.device, teacher=None) -> DistillationTrainer:
    torch.manual_seed(0)
    student = network(WIDTH).to(device, memory_format=torch.channels_last)
    loss_funcs: dict[str, torch.nn.Module] = {"metric_loss": MultiSimilarityLoss()}
    if teacher is not None:
        loss_funcs["distillation_loss"] = AbsoluteTeacherLoss()
    return DistillationTrainer(
        models={"trunk": student},
        optimizers={"trunk_optimizer": torch.optim.AdamW(student.parameters(), lr=1e-5)},
        batch_size=batch,
        loss_funcs=loss_funcs,
        dataset=dataset,
        teacher=teacher,
        data_device=device,
    )


def measure(views: int, batch: int, repeats: int, device: torch.device) -> list[dict]:
    dataset = SeededViews(Glyphs("train"), views=views)
    sampler = MPerClassSampler(dataset.labels, PER_CLASS, batch, 16 * batch)
    batches = list(torch.utils.data.DataLoader(dataset, batch, sampler=sampler))
    steps: dict[str, Callable[[], object]] = {ALONE: partial(walk, trainer(dataset, batch, device), batches)}
    costs = {ALONE: (0, 0.0, 0.0)}
    with tempfile.TemporaryDirectory() as folder:
        for times, width in TEACHERS.items():
            teacher = FrozenTeacher(network(width).to(device, memory_format=torch.channels_last))
            start = time.perf_counter()
            TeacherCache(f"{folder}/{times}", teacher, dataset, batch_size=batch).write()
            written = (time.perf_counter() - start) / dataset.num_rows
            for name, source in ((ON_THE_FLY, teacher), (CACHED, CachedTeacher(f"{folder}/{times}", dataset))):
                key = f"{name}, {times} x"
                steps[key] = partial(walk, trainer(dataset, batch, device, source), batches)
                mflops = model_cost(network(width), (1, 32, 32)).flops / 1e6
                costs[key] = times, mflops, written if name == CACHED else 0.0
        seconds = medians(steps, repeats)
        return [
            {
                "step": name,
                "teacher_times": costs[name][0],
                "teacher_mflops": costs[name][1],
                "ms": 1000 * seconds[name],
                "to_student_alone": seconds[name] / seconds[ALONE],
                "images_per_second": batch / seconds[name],
                "peak_mib": peak_memory(step, device) / 2**20,
                "written_ms_per_view": 1000 * costs[name][2],
            }
            for name, step in steps.items()
        ]


def write_to_bare_pass(repeats: int, batch: int, device: torch.device) -> float:
    """Return the time to write a cache over that of a pass of the teacher alone over the same views."""
    dataset = SeededViews(Glyphs("val"), views=2)
    teacher = FrozenTeacher(network(TEACHERS[16]).to(device))

    def bare() -> None:
        for start in range(0, dataset.num_rows, batch):
            items = dataset.read(range(start, min(start + batch, dataset.num_rows)))
            teacher(torch.stack([image for image, _, _ in items])).cpu()

    def write() -> None:
        with tempfile.TemporaryDirectory() as folder:
            TeacherCache(folder, teacher, dataset, batch_size=batch).write()

    seconds = medians({"bare": bare, "write": write}, repeats)
    return seconds["write"] / seconds["bare"]


def reads(repeats: int) -> dict[str, float]:
    """Return the seconds to read 256 random rows for the first time and again, and to copy them with NumPy."""
    draw, width, rows = np.random.default_rng(0), 512, 10_000_000
    with tempfile.TemporaryDirectory() as folder:
        manifest = new_manifest(1, {"embeddings": width}, torch.float16, 64)
        ArrayFolder.create(Path(folder), range(rows), manifest)
        finished = np.load(f"{folder}/finished.npy", mmap_mode="r+")
        finished[:] = checksums(np.zeros((1, width), np.float16))
        file, array = ArrayFolder(Path(folder)), np.load(f"{folder}/embeddings.npy", mmap_mode="r")[0]
        pool = draw.integers(0, rows, 4096)
        file.read("embeddings", pool)
        kinds: dict[str, Callable[[], object]] = {
            "first read": lambda: file.read("embeddings", draw.integers(0, rows, 256)),
            "read again": lambda: file.read("embeddings", draw.choice(pool, 256)),
            "numpy": lambda: array[draw.choice(pool, 256)],
        }
        return medians(kinds, 5 * repeats)


def walk(trainer: DistillationTrainer, batches: list) -> None:
    """Make a step from the next batch."""
    batches.append(batches.pop(0))
    trainer.training_step(batches[-1])


def draw(rows: list[dict], path: Path) -> None:
    from matplotlib.figure import Figure

    figure = Figure(figsize=(6, 3.4), layout="constrained")
    axes = figure.subplots()
    for name, color in ((ON_THE_FLY, "#e45756"), (CACHED, "#4c78a8")):
        own = [row for row in rows if row["step"].startswith(name)]
        axes.plot(
            [r["teacher_times"] for r in own], [r["images_per_second"] for r in own], "o-", label=name, color=color
        )
    axes.axhline(rows[0]["images_per_second"], color="#bab0ac", linestyle="--", label=ALONE)
    axes.set_xscale("log", base=2)
    axes.set_xticks(list(TEACHERS), [f"{times} x" for times in TEACHERS])
    axes.set_xlabel("teacher's FLOPs over the student's")
    axes.set_ylabel("images per second")
    axes.set_ylim(bottom=0)
    axes.spines[["top", "right"]].set_visible(False)
    axes.legend(frameon=False)
    figure.savefig(path, dpi=130)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--batch", type=int, default=128)
    parser.add_argument("--views", type=int, default=1)
    parser.add_argument("--repeats", type=int, default=31)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--out", type=Path, default=Path("teacher_cache"))
    options = parser.parse_args()
    options.out.mkdir(parents=True, exist_ok=True)
    rows = measure(options.views, options.batch, options.repeats, torch.device(options.device))
    with open(options.out / "teacher_cache.csv", "w", newline="") as file:
        writer = csv.DictWriter(file, list(rows[0]))
        writer.writeheader()
        writer.writerows(rows)
    columns = ("ms", "to_student_alone", "images_per_second", "peak_mib", "written_ms_per_view")
    device = torch.device(options.device)
    written = write_to_bare_pass(max(3, options.repeats // 4), options.batch, device)
    times = ", ".join(f"{name} {1000 * value:.2f} ms" for name, value in reads(options.repeats).items())
    table = format_table([{"step": r["step"]} | {c: f"{r[c]:.2f}" for c in columns} for r in rows])
    table += f"\n\nWriting takes {written:.3f} of a bare pass of the teacher. 256 of 10,000,000 rows: {times}."
    print(table)
    (options.out / "teacher_cache.md").write_text(table + "\n", encoding="utf-8")
    draw(rows, options.out / "teacher_cache.png")


if __name__ == "__main__":
    main()
