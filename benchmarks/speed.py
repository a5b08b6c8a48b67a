"""Time and memory of every loss and miner on one batch, eager and compiled, beside PML's own.

    python benchmarks/speed.py --out speed

writes speed.csv, speed.md and speed.png into the folder. A loss is measured forward and backward, a miner forward. All
of them take turns in one process, and medians are compared, so that ratios hold on a busy machine. The columns beside
time and peak memory (what a call allocates beyond its inputs):

- to_roofline: against what no loss on pairs can avoid, the Gram product of the batch, forward and backward, and one
  pass that reads and writes the B x B matrix; pointwise losses need neither;
- to_multi_similarity: against PML's `MultiSimilarityLoss`;
- share_of_step: of a training step on 32 x 32 images: the small network of `teacher_cache.py`, its backward, AdamW,
  and this loss, the teacher's embeddings being there;
- compiled_to_eager: time after `torch.compile` against before.

What takes longer than --seconds in its first call is not called again, and "skipped" says so. `scaling.py` measures the
same against batch size and width.
"""

import argparse
import csv
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import torch
from pytorch_metric_learning import losses as pml_losses
from pytorch_metric_learning import miners as pml_miners
from teacher_cache import WIDTH, network
from timing import medians, peak_memory
from tqdm import tqdm

from pml_distill import losses
from pml_distill.miners import TeacherMiner, TeacherNeighborMiner, TeacherRankMiner
from pml_distill.utils.report import format_table

PER_CLASS, PLACES, CLASSES = 4, 4, 10
ROOFLINE, PML, HASHING, MINERS, OTHERS = "roofline", "PML", "hashing", "miners", "of other losses"
GRAM, PASS, REFERENCE = "Gram product", "pass over B x B", "MultiSimilarityLoss"
PML_LOSSES = (REFERENCE, "ContrastiveLoss", "TripletMarginLoss", "NTXentLoss", "CircleLoss", "FastAPLoss")
PML_MINERS = ("MultiSimilarityMiner", "BatchHardMiner", "TripletMarginMiner")
#: Calls that take longer are repeated less.
SLOW_SECONDS, SLOW_REPEATS = 0.2, 3
FIGURES = ("ms", "peak_mib", "to_roofline", "to_multi_similarity", "share_of_step")
COLUMNS = ("family", "name", "batch", "width", *FIGURES, "compiled_to_eager", "skipped")


class GramProduct(torch.nn.Module):
    def forward(self, embeddings: torch.Tensor) -> torch.Tensor:
        return (embeddings @ embeddings.t()).sum()


class Subject(NamedTuple):
    """What is measured: a function with its arguments, and the tensors that a gradient is wanted for."""

    family: str
    function: Callable[..., Any]
    arguments: tuple
    named: dict[str, Any] = {}
    leaves: tuple[torch.Tensor, ...] = ()

    def call(self, function: Callable[..., Any] | None = None) -> None:
        function = self.function if function is None else function
        output = function(*self.arguments, **self.named)
        if self.leaves:
            torch.autograd.grad(output, self.leaves)


def loss_of(name: str, size: int, width: int) -> torch.nn.Module:
    """Return a loss of the catalogue with its defaults; a queue is as long as the batch, so that times compare."""
    if name == "SimilarityDistributionLoss":
        return losses.SimilarityDistributionLoss(size, width)
    if name in ("HintLoss", "VariationalInformationLoss", "TokenLoss"):
        return getattr(losses, name)([width], [width])
    if name == "UnambiguousGranularityLoss":
        head, classifier = torch.nn.Linear(width, width).eval(), torch.nn.Linear(width, CLASSES).eval()
        return losses.UnambiguousGranularityLoss(width, head, classifier, width, grids=(PLACES, PLACES // 2))
    return getattr(losses, name)()


def wrappers(size: int, width: int) -> dict[str, tuple[str, torch.nn.Module]]:
    """Return losses made of others; the memory is as long as the batch."""
    widths, relative = (width // 4, width // 2, width), losses.RelativeTeacherLoss()
    pair = losses.MultipleDistillationLosses([relative, losses.DarkRankLoss()])
    return {
        "MatryoshkaLoss(RelativeTeacherLoss)": (OTHERS, losses.MatryoshkaLoss(relative, widths)),
        "MatryoshkaLoss(AbsoluteTeacherLoss)": (OTHERS, losses.MatryoshkaLoss(losses.AbsoluteTeacherLoss(), widths)),
        "RelativeTeacherLoss + DarkRankLoss": (OTHERS, pair),
        "DistillationMemory(RelativeTeacherLoss)": (OTHERS, losses.DistillationMemory(relative, width, size)),
    }


def subjects(size: int, width: int, device: torch.device) -> dict[str, Subject]:
    """Return what is measured by name: the roofline, losses and miners of PML, and all of this library."""
    torch.manual_seed(0)
    student = torch.randn(size, width, device=device, requires_grad=True)
    teacher, labels = torch.randn(size, width, device=device), torch.arange(size, device=device) // PER_CLASS
    maps = torch.randn(size, width, PLACES, PLACES, device=device, requires_grad=True)
    matrix = torch.rand(size, size, device=device)
    ref = {"ref_emb": teacher}

    def differentiated(family: str, function: torch.nn.Module, arguments: tuple, named: dict, leaf: Any) -> Subject:
        return Subject(family, function, arguments, named, (leaf, *function.to(device).parameters()))

    found = {
        GRAM: differentiated(ROOFLINE, GramProduct(), (student,), {}, student),
        PASS: Subject(ROOFLINE, torch.add, (matrix, 1), {"out": torch.empty_like(matrix)}),
    }
    for name in PML_LOSSES:
        found[name] = differentiated(PML, getattr(pml_losses, name)(), (student, labels), {}, student)
    distillation: dict[str, tuple[str, torch.nn.Module]] = {
        entry.name: (entry.family, loss_of(entry.name, size, width)) for entry in losses.catalogue()
    }
    for transfer, length in (("soft", 4), ("hard", 8), ("hard", None)):
        name = f"DarkRankLoss, {transfer}, {length or 'all'}"
        distillation[name] = "listwise", losses.DarkRankLoss(transfer, list_length=length)
    distillation["DarkRankLoss, soft, 8"] = distillation.pop("DarkRankLoss")
    distillation |= wrappers(size, width)
    for name, (family, loss) in distillation.items():
        if family == "feature maps":
            given = [maps], [maps.detach() + 1], labels % CLASSES
            found[name] = differentiated(family, loss, given, {}, maps)
        else:
            found[name] = differentiated(family, loss, (student, labels), ref, student)
    classes = -(-size // PER_CLASS)
    hashing = (
        losses.DeepCauchyHashingLoss(),
        losses.CentralSimilarityLoss(classes, width),
        losses.HashNetLoss(),
        losses.DPSHLoss(),
        losses.GreedyHashLoss(classes, width),
        losses.OrthoHashLoss(classes, width),
    )
    for loss in hashing:
        found[type(loss).__name__] = differentiated(HASHING, loss, (student, labels), {}, student)
    points = student.detach()
    for name in PML_MINERS:
        miner = getattr(pml_miners, name)()
        found[name] = Subject(MINERS, miner, (points, labels))
        found[f"TeacherMiner({name})"] = Subject(MINERS, TeacherMiner(miner), (points, labels), ref)
    for miner in (TeacherNeighborMiner(), TeacherRankMiner()):
        found[type(miner).__name__] = Subject(MINERS, miner, (points, labels), ref)
    return found


def network_seconds(device: torch.device, images: int) -> float:
    """Return the seconds of a training step of the small network, without any loss."""
    student = network(WIDTH).to(device, memory_format=torch.channels_last)
    optimizer, batch = torch.optim.AdamW(student.parameters()), torch.rand(images, 1, 32, 32, device=device)

    def step() -> None:
        optimizer.zero_grad()
        student(batch).square().mean().backward()
        optimizer.step()

    return medians({"step": step}, SLOW_REPEATS)["step"]


def first_call(subject: Subject, device: torch.device) -> tuple[float, int]:
    """Return the seconds and the peak of the memory of a call, which tell whether more can be made."""
    start = time.perf_counter()
    peak = peak_memory(subject.call, device)
    return time.perf_counter() - start, peak


def seconds_in_turns(found: dict[str, Subject], first: dict[str, float], repeats: int) -> dict[str, float]:
    """Return the median seconds of the subjects that have a first call; slow ones have turns of their own."""
    quick = {name: found[name].call for name, seconds in first.items() if seconds <= SLOW_SECONDS}
    slow = {name: found[name].call for name, seconds in first.items() if seconds > SLOW_SECONDS}
    return medians(quick, repeats) | medians(slow, min(repeats, SLOW_REPEATS))


def figures(name: str, seconds: dict[str, float], peak: int, step: float) -> dict[str, float | str]:
    """Return the figures of a subject beside the others' seconds and those of a step without any loss."""
    own = seconds[name]
    return {
        "ms": 1000 * own,
        "peak_mib": peak / 2**20,
        "to_roofline": own / (seconds[GRAM] + seconds[PASS]),
        "to_multi_similarity": own / seconds[REFERENCE] if REFERENCE in seconds else "",
        "share_of_step": own / (own + step),
    }


def compiled_to_eager(subject: Subject, repeats: int) -> float:
    torch._dynamo.reset()
    compiled = torch.compile(subject.function)
    seconds = medians({"eager": subject.call, "compiled": partial(subject.call, compiled)}, repeats)
    return seconds["compiled"] / seconds["eager"]


def rounded(row: dict[str, Any]) -> dict[str, Any]:
    return {key: round(value, 4) if isinstance(value, float) else value for key, value in row.items()}


def parsed(parser: argparse.ArgumentParser, name: str) -> argparse.Namespace:
    """Return the options, with those on device and folder; the folder is there, without a table of that name."""
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--out", type=Path, default=Path(name))
    options = parser.parse_args()
    if (options.out / f"{name}.csv").exists():
        parser.error(f"--out {options.out} holds a {name}.csv already; choose another folder.")
    options.out.mkdir(parents=True, exist_ok=True)
    return options


def recorded(rows: Iterable[dict[str, Any]], columns: Sequence[str], path: Path) -> list[dict[str, Any]]:
    """Write rows as they come into a CSV, all of them as a table beside it, which is printed, and return them."""
    found = []
    with open(path.with_suffix(".csv"), "w", newline="") as file:
        writer = csv.DictWriter(file, columns)
        writer.writeheader()
        for row in rows:
            writer.writerow(row)
            file.flush()
            found.append(row)
    shown = [{key: f"{v:.3g}" if isinstance(v, float) else str(v) for key, v in row.items()} for row in found]
    table = format_table([{"name": row["name"]} | row for row in shown])
    print(table)
    path.with_suffix(".md").write_text(table + "\n", encoding="utf-8")
    return found


def measure(options: argparse.Namespace) -> Iterator[dict[str, Any]]:
    """Yield the rows as their compiled function is measured; all of them have taken turns before."""
    device = torch.device(options.device)
    found = subjects(options.batch, options.width, device)
    peaks, first, skipped = {}, {}, {}
    for name, subject in tqdm(found.items(), desc="memory"):
        first[name], peaks[name] = first_call(subject, device)
        if first[name] > options.seconds:
            skipped[name] = f"{first.pop(name):.0f} s a call"
    seconds = seconds_in_turns(found, first, options.repeats)
    step = network_seconds(device, options.batch)
    for name, subject in tqdm(found.items(), desc="compiled"):
        row = dict.fromkeys(COLUMNS, "") | {"skipped": skipped.get(name, "")}
        row |= {"family": subject.family, "name": name, "batch": options.batch, "width": options.width}
        if name in first:
            row |= figures(name, seconds, peaks[name], step)
            if subject.leaves:
                repeats = options.repeats if first[name] <= SLOW_SECONDS else SLOW_REPEATS
                row["compiled_to_eager"] = compiled_to_eager(subject, repeats)
        yield rounded(row)


def draw(rows: list[dict[str, Any]], path: Path) -> None:
    from matplotlib.figure import Figure

    rows = [row for row in rows if row["ms"] != ""]
    figure = Figure(figsize=(8, 0.2 * len(rows) + 1), layout="constrained")
    axes = figure.subplots()
    for number, family in enumerate(dict.fromkeys(row["family"] for row in rows)):
        color = "black" if family == ROOFLINE else f"C{number - 1}"
        places = [place for place, row in enumerate(rows) if row["family"] == family]
        axes.barh(places, [rows[place]["ms"] for place in places], color=color, alpha=0.6, label=family)
    compiled = [place for place, row in enumerate(rows) if row["compiled_to_eager"] != ""]
    times = [rows[place]["ms"] * rows[place]["compiled_to_eager"] for place in compiled]
    axes.plot(times, compiled, "k|", markersize=9, label="compiled")
    axes.set_xscale("log")
    axes.xaxis.set_major_formatter("{x:g}")
    axes.set_xlabel(f"ms, batch of {rows[0]['batch']}, width {rows[0]['width']}")
    axes.set_yticks(range(len(rows)), [row["name"] for row in rows], fontsize=8)
    axes.set_ylim(len(rows) - 0.4, -0.6)
    axes.grid(True, axis="x", alpha=0.2)
    axes.legend(fontsize=8, frameon=False, loc="center left", bbox_to_anchor=(1, 0.5))
    figure.savefig(path, dpi=110)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--batch", type=int, default=512)
    parser.add_argument("--width", type=int, default=128)
    parser.add_argument("--repeats", type=int, default=15)
    parser.add_argument("--seconds", type=float, default=5.0)
    options = parsed(parser, "speed")
    rows = recorded(measure(options), COLUMNS, options.out / "speed")
    draw(rows, options.out / "speed.png")


if __name__ == "__main__":
    main()
