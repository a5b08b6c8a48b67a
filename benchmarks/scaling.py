"""Time and memory of every loss and miner against the batch size, beside PML's own and beside what no loss can avoid.

    python benchmarks/scaling.py --out scaling

writes scaling.csv, scaling.md and scaling.png into the folder. A loss is measured forward and backward, a miner
forward. All of them take turns in one process for each size, and medians are compared, so that ratios hold on a busy
machine. The columns beside time and peak memory (what a call allocates beyond its inputs):

- to_roofline: against the Gram product of the batch, forward and backward, and one pass that reads and writes the
  B x B matrix; pointwise losses need neither;
- to_multi_similarity: against PML's `MultiSimilarityLoss`;
- share_of_step: of a training step on 32 x 32 images: the small network of `teacher_cache.py`, its backward, AdamW,
  and this loss, the teacher's embeddings being there. The network's part is measured on 128 images and grows with
  the batch;
- compiled_to_eager: time after `torch.compile` against before, for the sizes of --compiled-batches and the first
  width, where a call is quick.

Where the sizes before foretell more than --seconds or --gibibytes for a call, it is not made, and "skipped" says why.
"""

import argparse
import csv
import math
import time
from collections.abc import Callable, Iterator, Sequence
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

PER_CLASS, PLACES = 4, 4
ROOFLINE, PML, HASHING, MINERS = "roofline", "PML", "hashing", "miners"
GRAM, PASS, REFERENCE = "Gram product", "pass over B x B", "MultiSimilarityLoss"
ANGLES = "angles, all triplets at once"
PML_LOSSES = (REFERENCE, "ContrastiveLoss", "TripletMarginLoss", "NTXentLoss", "CircleLoss", "FastAPLoss")
PML_MINERS = ("MultiSimilarityMiner", "BatchHardMiner", "TripletMarginMiner")
#: Calls that take longer are repeated less.
SLOW_SECONDS, SLOW_REPEATS = 0.2, 3
FIGURES = ("ms", "peak_mib", "to_roofline", "to_multi_similarity", "share_of_step", "compiled_to_eager")


class GramProduct(torch.nn.Module):
    def forward(self, embeddings: torch.Tensor) -> torch.Tensor:
        return (embeddings @ embeddings.t()).sum()


class AnglesOfAllTriplets(torch.nn.Module):
    """The angle loss as its formula reads: all B x B x D arms, all B x B x B cosines."""

    def forward(self, embeddings: torch.Tensor, labels: torch.Tensor, ref_emb: torch.Tensor) -> torch.Tensor:
        cosines = []
        for points in (embeddings, ref_emb):
            arms = torch.nn.functional.normalize(points[None] - points[:, None], dim=2)
            cosines.append(arms @ arms.transpose(1, 2))
        return torch.nn.functional.smooth_l1_loss(*cosines)


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
    if name in ("HintLoss", "VariationalInformationLoss"):
        return getattr(losses, name)([width], [width])
    return getattr(losses, name)()


def subjects(size: int, width: int, device: torch.device) -> dict[str, Subject]:
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
    distillation[ANGLES] = "relational", AnglesOfAllTriplets()
    for name, (family, loss) in distillation.items():
        if family == "feature maps":
            found[name] = differentiated(family, loss, ([maps], [maps.detach() + 1]), {}, maps)
        else:
            found[name] = differentiated(family, loss, (student, labels), ref, student)
    for loss in (losses.DeepCauchyHashingLoss(), losses.CentralSimilarityLoss(-(-size // PER_CLASS), width)):
        found[type(loss).__name__] = differentiated(HASHING, loss, (student, labels), {}, student)
    points = student.detach()
    for name in PML_MINERS:
        miner = getattr(pml_miners, name)()
        found[name] = Subject(MINERS, miner, (points, labels))
        found[f"TeacherMiner({name})"] = Subject(MINERS, TeacherMiner(miner), (points, labels), ref)
    for miner in (TeacherNeighborMiner(), TeacherRankMiner()):
        found[type(miner).__name__] = Subject(MINERS, miner, (points, labels), ref)
    return found


def network_seconds(device: torch.device, images: int = 128) -> float:
    """Return the seconds that a step of the small network takes for one image."""
    student = network(WIDTH).to(device, memory_format=torch.channels_last)
    optimizer, batch = torch.optim.AdamW(student.parameters()), torch.rand(images, 1, 32, 32, device=device)

    def step() -> None:
        optimizer.zero_grad()
        student(batch).square().mean().backward()
        optimizer.step()

    return medians({"step": step}, 11)["step"] / images


def foretold(history: Sequence[tuple[int, float]], size: int) -> float:
    """Return what a figure will be for a larger batch: it grows as it did last, and at least with the square."""
    if not history:
        return 0.0
    last, value = history[-1]
    power = 2.0
    if len(history) > 1:
        before, earlier = history[-2]
        power = max(power, math.log(max(value, 1e-9) / max(earlier, 1e-9)) / math.log(last / before))
    return value * (size / last) ** power


def compiled_to_eager(subject: Subject, repeats: int) -> float:
    torch._dynamo.reset()
    compiled = torch.compile(subject.function)
    seconds = medians({"eager": subject.call, "compiled": partial(subject.call, compiled)}, repeats)
    return seconds["compiled"] / seconds["eager"]


def measure(
    width: int, options: argparse.Namespace, compiled: Sequence[int], image_seconds: float
) -> Iterator[list[dict]]:
    """Yield the rows of each batch size, the smallest first."""
    device = torch.device(options.device)
    seconds_of: dict[str, list[tuple[int, float]]] = {}
    bytes_of: dict[str, list[tuple[int, float]]] = {}
    for size in sorted(options.batches):
        found, skipped, first = subjects(size, width, device), {}, {}
        for name, subject in found.items():
            seconds = foretold(seconds_of.setdefault(name, []), size)
            memory = foretold(bytes_of.setdefault(name, []), size)
            if seconds > options.seconds:
                skipped[name] = f"about {seconds:.0f} s a call"
            elif memory > options.gibibytes * 2**30:
                skipped[name] = f"about {memory / 2**30:.0f} GiB"
            else:
                # The first call, which also tells how often the others can be made.
                start = time.perf_counter()
                bytes_of[name].append((size, peak_memory(subject.call, device)))
                first[name] = time.perf_counter() - start
                if first[name] > 2 * options.seconds:
                    skipped[name] = f"{first[name]:.0f} s a call"
                    seconds_of[name].append((size, first.pop(name)))
        quick = {name: found[name].call for name in first if first[name] <= SLOW_SECONDS}
        slow = {name: found[name].call for name in first if first[name] > SLOW_SECONDS}
        median = medians(quick, options.repeats) | medians(slow, min(options.repeats, SLOW_REPEATS))
        for name in first:
            seconds_of[name].append((size, median[name]))
        roofline, step = median[GRAM] + median[PASS], size * image_seconds
        rows = []
        for name, subject in found.items():
            row = {"family": subject.family, "name": name, "batch": size, "width": width}
            row |= dict.fromkeys(FIGURES, "") | {"skipped": skipped.get(name, "")}
            if name not in skipped:
                row["ms"] = 1000 * median[name]
                row["peak_mib"] = bytes_of[name][-1][1] / 2**20
                row["to_roofline"] = median[name] / roofline
                if REFERENCE in median:
                    row["to_multi_similarity"] = median[name] / median[REFERENCE]
                row["share_of_step"] = median[name] / (median[name] + step)
                if size in compiled and subject.leaves and name in quick:
                    row["compiled_to_eager"] = compiled_to_eager(subject, options.repeats)
            rows.append({key: round(value, 4) if isinstance(value, float) else value for key, value in row.items()})
        yield rows


def draw(rows: list[dict], path: Path, width: int) -> None:
    from matplotlib.figure import Figure

    rows = [row for row in rows if row["width"] == width and row["ms"] != ""]
    families = [f for f in dict.fromkeys(row["family"] for row in rows) if f not in (ROOFLINE, "logits", HASHING)]
    panels = {family: (family,) for family in families} | {"pointwise": ("pointwise", "logits"), PML: (PML, HASHING)}
    figure = Figure(figsize=(12, 2.7 * -(-len(panels) // 2)), layout="constrained")
    grid = figure.subplots(-(-len(panels) // 2), 2, sharex=True, sharey=True, squeeze=False)
    batches = sorted({row["batch"] for row in rows})

    def curve(axes: Any, name: str, *style: str, **named: Any) -> None:
        points = [(row["batch"], row["ms"]) for row in rows if row["name"] == name]
        axes.loglog(*zip(*points), *style, **{"label": name} | named)

    for axes in grid.flat[len(panels) :]:
        axes.set_visible(False)
    for place, (axes, (title, members)) in enumerate(zip(grid.flat, panels.items())):
        for number, name in enumerate(dict.fromkeys(row["name"] for row in rows if row["family"] in members)):
            curve(axes, name, ("o-", "^--")[number // 10], markersize=3, linewidth=1.3)
        # Everywhere, but named once.
        named = "_" if place else ""
        curve(axes, GRAM, color="#888888", linewidth=4, alpha=0.4, label=named + GRAM)
        curve(axes, PASS, color="#888888", linewidth=4, alpha=0.4, linestyle=":", label=named + PASS)
        if title != PML:
            curve(axes, REFERENCE, color="black", linewidth=1, linestyle="--")
        axes.set_title({PML: "PML's losses, hashing"}.get(title, title), fontsize=10)
        axes.set_xticks(batches, [str(batch) for batch in batches])
        axes.minorticks_off()
        axes.yaxis.set_major_formatter("{x:g}")
        axes.grid(True, alpha=0.2)
        axes.legend(fontsize=7, frameon=False, loc="center left", bbox_to_anchor=(1, 0.5))
    for axes in grid[-1]:
        axes.set_xlabel(f"batch size (width {width})")
    for axes in grid[:, 0]:
        axes.set_ylabel("ms")
    figure.savefig(path, dpi=110)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--batches", type=int, nargs="+", default=[32, 128, 512, 2048, 4096])
    parser.add_argument("--widths", type=int, nargs="+", default=[128, 512])
    parser.add_argument("--compiled-batches", type=int, nargs="*", default=[512])
    parser.add_argument("--repeats", type=int, default=15)
    parser.add_argument("--seconds", type=float, default=2.0)
    parser.add_argument("--gibibytes", type=float, default=2.0)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--out", type=Path, default=Path("scaling"))
    options = parser.parse_args()
    if (options.out / "scaling.csv").exists():
        parser.error(f"--out {options.out} holds a scaling.csv already; choose another folder.")
    options.out.mkdir(parents=True, exist_ok=True)
    image_seconds, rows = network_seconds(torch.device(options.device)), []
    with (
        open(options.out / "scaling.csv", "w", newline="") as file,
        tqdm(total=len(options.widths) * len(options.batches), unit="size") as bar,
    ):
        writer = csv.DictWriter(file, ("family", "name", "batch", "width", *FIGURES, "skipped"))
        writer.writeheader()
        for width in options.widths:
            compiled = options.compiled_batches if width == options.widths[0] else ()
            for found in measure(width, options, compiled, image_seconds):
                writer.writerows(found)
                file.flush()
                rows += found
                bar.update()
    shown = [{key: f"{v:.3g}" if isinstance(v, float) else str(v) for key, v in row.items()} for row in rows]
    table = format_table([{"name": row["name"]} | row for row in shown])
    print(table)
    (options.out / "scaling.md").write_text(table + "\n", encoding="utf-8")
    draw(rows, options.out / "scaling.png", options.widths[-1])


if __name__ == "__main__":
    main()
