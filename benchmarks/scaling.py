"""Time and memory of every loss and miner against batch size and width.

    python benchmarks/scaling.py --out scaling

writes scaling.csv, scaling.md and scaling.png into the folder: what `speed.py` measures, with the same columns but that
of the compiled losses, for every size. At each size all take turns in one process.

Where the sizes before foretell more than --seconds or --gibibytes for a call, it is not made, and "skipped" says why.
"""

import argparse
import math
from collections.abc import Iterator, Sequence
from itertools import chain
from pathlib import Path
from typing import Any

import torch
from speed import (
    FIGURES,
    GRAM,
    HASHING,
    PASS,
    PML,
    REFERENCE,
    ROOFLINE,
    figures,
    first_call,
    network_seconds,
    parsed,
    recorded,
    rounded,
    seconds_in_turns,
    subjects,
)
from tqdm import tqdm

ANGLES = "angles, all triplets at once"
COLUMNS = ("family", "name", "batch", "width", *FIGURES, "skipped")


class AnglesOfAllTriplets(torch.nn.Module):
    """The angle loss as its formula reads: all B x B x D arms, all B x B x B cosines."""

    def forward(self, embeddings: torch.Tensor, labels: torch.Tensor, ref_emb: torch.Tensor) -> torch.Tensor:
        cosines = []
        for points in (embeddings, ref_emb):
            arms = torch.nn.functional.normalize(points[None] - points[:, None], dim=2)
            cosines.append(arms @ arms.transpose(1, 2))
        return torch.nn.functional.smooth_l1_loss(*cosines)


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


def measure(width: int, options: argparse.Namespace) -> Iterator[dict[str, Any]]:
    """Yield the rows of each batch size, the smallest first."""
    device = torch.device(options.device)
    seconds_of: dict[str, list[tuple[int, float]]] = {}
    bytes_of: dict[str, list[tuple[int, float]]] = {}
    for size in tqdm(sorted(options.batches), desc=f"width {width}"):
        found, skipped, first = subjects(size, width, device), {}, {}
        found[ANGLES] = found["RKDAngleLoss"]._replace(function=AnglesOfAllTriplets())
        for name, subject in found.items():
            seconds = foretold(seconds_of.setdefault(name, []), size)
            memory = foretold(bytes_of.setdefault(name, []), size)
            if seconds > options.seconds:
                skipped[name] = f"about {seconds:.0f} s a call"
            elif memory > options.gibibytes * 2**30:
                skipped[name] = f"about {memory / 2**30:.0f} GiB"
            else:
                first[name], peak = first_call(subject, device)
                bytes_of[name].append((size, peak))
                if first[name] > 2 * options.seconds:
                    skipped[name] = f"{first[name]:.0f} s a call"
                    seconds_of[name].append((size, first.pop(name)))
        median = seconds_in_turns(found, first, options.repeats)
        step = network_seconds(device, size)
        for name, subject in found.items():
            row = {"family": subject.family, "name": name, "batch": size, "width": width}
            row |= dict.fromkeys(FIGURES, "") | {"skipped": skipped.get(name, "")}
            if name in first:
                seconds_of[name].append((size, median[name]))
                row |= figures(name, median, bytes_of[name][-1][1], step)
            yield rounded(row)


def draw(rows: list[dict[str, Any]], path: Path, width: int) -> None:
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
    parser.add_argument("--repeats", type=int, default=15)
    parser.add_argument("--seconds", type=float, default=2.0)
    parser.add_argument("--gibibytes", type=float, default=2.0)
    options = parsed(parser, "scaling")
    measured = chain.from_iterable(measure(width, options) for width in options.widths)
    rows = recorded(measured, COLUMNS, options.out / "scaling")
    draw(rows, options.out / "scaling.png", options.widths[-1])


if __name__ == "__main__":
    main()
