"""Tables and pictures of the CSV that accuracy.py writes; a CSV that is not finished will do.

    python benchmarks/accuracy_report.py benchmarks/results/accuracy.csv --pictures docs/images

The tables of the site come from the same functions when it is built.
"""

import argparse
import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import fmean

import numpy as np
from comparison import finished
from glyph_runs import LOSSES

from pml_distill.utils.report import format_table, mean_and_error, shown

NONE, TEACHER, MAP = "none", "teacher", "mean_average_precision_at_r"
FIGURES = {"precision_at_1": "precision@1", "r_precision": "R-precision", MAP: "MAP@R", "NMI": "NMI"}
SETUP = ("dataset", "epochs", "batch_size", "precision")
LEVEL = 0.05
Rows = Sequence[dict[str, str]]


@dataclass(frozen=True)
class Comparison:
    """A distillation loss beside a metric loss against that metric loss alone, seed by seed."""

    metric_loss: str
    distillation: str
    gains: list[float]
    p: float


def where(rows: Rows, **wanted: str) -> Rows:
    return [row for row in rows if all(row[key] == value for key, value in wanted.items())]


def values(rows: Rows, figure: str = MAP) -> dict[str, float]:
    """Return a figure by seed."""
    return {row["seed"]: float(row[figure]) for row in rows}


def unique(rows: Rows, column: str) -> list[str]:
    return list(dict.fromkeys(row[column] for row in rows))


def paired(
    own: dict[str, float], other: dict[str, float], beside: Sequence[dict[str, float]] = ()
) -> tuple[list[float], float]:
    """Return the differences in the seeds that both have, and the p-value of the paired t-test, two-sided.

    With the figures of other methods ``beside`` them the variance is pooled over all: that of a randomised block design
    whose blocks are the seeds. So few seeds tell little of the variance of a single difference.
    """
    from scipy.stats import t

    differences = [own[seed] - other[seed] for seed in own if seed in other]
    variance, freedom = residual_variance([own, other, *beside])
    if not differences or not freedom or not variance:
        return differences, float("nan")
    error = math.sqrt(2 * variance / len(differences))
    return differences, float(2 * t.sf(abs(fmean(differences)) / error, freedom))


def residual_variance(methods: Sequence[dict[str, float]]) -> tuple[float, int]:
    """Return the variance that a sum of a method's and a seed's effect leaves, and its degrees of freedom."""
    seeds = sorted(set().union(*methods))
    cells = [(place, len(methods) + seeds.index(seed)) for place, own in enumerate(methods) for seed in own]
    design = np.zeros((len(cells), len(methods) + len(seeds)))
    for row, cell in enumerate(cells):
        design[row, cell] = 1
    figures = np.array([figure for own in methods for figure in own.values()])
    effects, _, rank, _ = np.linalg.lstsq(design, figures)
    freedom = len(cells) - int(rank)
    return float(np.square(figures - design @ effects).sum()) / max(1, freedom), freedom


def holm(p: Sequence[float]) -> list[float]:
    """Return p-values corrected for their number, by Holm's method; NaNs are none of them."""
    corrected, least = [float("nan")] * len(p), 0.0
    known = sorted((value, place) for place, value in enumerate(p) if value == value)
    for rank, (value, place) in enumerate(known):
        least = corrected[place] = max(least, min(1.0, value * (len(known) - rank)))
    return corrected


def comparisons(rows: Rows) -> list[Comparison]:
    """Compare the test rows of one setup and one size; the p-values are corrected for the number of comparisons."""
    found = []
    for metric_loss in unique(rows, "metric_loss"):
        own = where(rows, metric_loss=metric_loss)
        taught = {name: values(where(own, distillation=name)) for name in unique(own, "distillation")}
        alone = taught.pop(NONE, {})
        for distillation, figures in taught.items():
            gains, p = paired(figures, alone, [f for name, f in taught.items() if name != distillation])
            if gains:
                found.append((metric_loss, distillation, gains, p))
    return [Comparison(*c[:3], p) for c, p in zip(found, holm([c[3] for c in found]))]


def table(rows: Rows) -> str:
    """Lay out the test rows of one setup and one size; only losses that are aligned serve asymmetric retrieval."""
    compared = {(c.metric_loss, c.distillation): c for c in comparisons(rows)}
    lines = []
    for metric_loss in unique(rows, "metric_loss"):
        for distillation in sorted(unique(rows, "distillation"), key=lambda name: name != NONE):
            own = where(rows, metric_loss=metric_loss, distillation=distillation)
            if not own:
                continue
            weight = "" if distillation == NONE else f", weight {float(own[0]['weight']):g}"
            line = {
                "metric loss": metric_loss,
                "distillation": distillation,
                "aligned": "" if distillation == NONE else "yes" if LOSSES[distillation].aligned else "no",
                "chosen": f"{own[0]['setting']}, rate {float(own[0]['learning_rate']):g}{weight}",
                "seeds": str(len(own)),
            }
            line |= {name: shown(list(values(own, figure).values())) for figure, name in FIGURES.items()}
            c = compared.get((metric_loss, distillation))
            line["gain in MAP@R"] = shown(c.gains, "+.3f") if c else ""
            line["p"] = f"{c.p:.2g}" if c and c.p == c.p else ""
            lines.append(line)
    return format_table(lines)


def gains_table(rows: Rows) -> str:
    """Lay out the gains in MAP@R by distillation and metric loss, of the test rows of one setup and one size.

    The distillation loss that gains most comes first. A star stands behind a gain, or a loss, with p < ``LEVEL``.
    """
    metric_losses = unique(rows, "metric_loss")
    alone = {name: list(values(where(rows, metric_loss=name, distillation=NONE)).values()) for name in metric_losses}
    by_distillation: dict[str, dict[str, Comparison]] = {}
    for c in comparisons(rows):
        by_distillation.setdefault(c.distillation, {})[c.metric_loss] = c
    lines = [
        {"gain with": distillation} | {name: starred(compared.get(name)) for name in metric_losses}
        for distillation, compared in sorted(
            by_distillation.items(), key=lambda item: -fmean(fmean(c.gains) for c in item[1].values())
        )
    ]
    first = {"gain with": "(MAP@R alone)"} | {name: shown(own) if own else "" for name, own in alone.items()}
    return format_table([first, *lines])


def starred(comparison: Comparison | None) -> str:
    if comparison is None:
        return ""
    return shown(comparison.gains, "+.3f") + (" *" if comparison.p < LEVEL else "")


def negatives(rows: Rows, best: dict[str, str]) -> list[str]:
    """Say where nothing was gained, of the test rows of one setup and one size.

    Against the best loss alone stands each other one with its ``best`` distillation loss.
    """
    lost: dict[str, list[str]] = {}
    for c in comparisons(rows):
        if nothing_gained(c.gains, c.p):
            lost.setdefault(c.metric_loss, []).append(f"{c.distillation} ({shown(c.gains, '+.3f')}, p = {c.p:.2g})")
    said = [f"{name} alone is not beaten by itself with {', '.join(others)}." for name, others in lost.items()]
    alone = {name: values(where(rows, metric_loss=name, distillation=NONE)) for name in unique(rows, "metric_loss")}
    alone = {name: own for name, own in alone.items() if own}
    if not alone:
        return said
    winner = max(alone, key=lambda name: mean_and_error(list(alone[name].values()))[0])
    others = {name: distillation for name, distillation in best.items() if name != winner}
    tests = [paired(values(where(rows, metric_loss=n, distillation=d)), alone[winner]) for n, d in others.items()]
    behind = [
        f"{name} with {distillation} ({shown(gains, '+.3f')}, p = {p:.2g})"
        for (name, distillation), (gains, _), p in zip(others.items(), tests, holm([p for _, p in tests]))
        if nothing_gained(gains, p)
    ]
    if behind:
        said.append(
            f"{winner}, the best loss alone, is not beaten by others with the distillation loss best beside them "
            f"on the validation classes: {', '.join(behind)}."
        )
    return said


def nothing_gained(gains: Sequence[float], p: float) -> bool:
    """Whether there was a test, and it shows no gain."""
    return p >= LEVEL or (p == p and sum(gains) < 0)


def setups(rows: Rows) -> list[tuple[str, ...]]:
    return list(dict.fromkeys(tuple(row[key] for key in SETUP) for row in rows if row["split"] == "test"))


def sizes(rows: Rows) -> list[tuple[str, Rows]]:
    """Return the students' test rows of one setup by size, in the order of their parameters."""
    students = [row for row in where(rows, split="test") if row["student"] != TEACHER]
    names = sorted(unique(students, "student"), key=lambda name: int(where(students, student=name)[0]["parameters"]))
    return [(name, where(students, student=name)) for name in names]


def coverage(rows: Rows, setup: tuple[str, ...]) -> str:
    """Say how much is there of the smallest preset that a setup may be of."""
    from accuracy import PRESETS, epochs, number_of_jobs

    done = len(where(rows, **dict(zip(SETUP, setup))))
    for name, preset in sorted(PRESETS.items(), key=lambda item: number_of_jobs(item[1])):
        total = number_of_jobs(preset)
        if (str(epochs(preset, setup[0])), str(preset.batch_size), preset.precision) == setup[1:] and done <= total:
            return f"{done:,} of the {total:,} runs of the preset `{name}`."
    return f"{done:,} runs."


def markdown(rows: Rows) -> str:
    """Return for each setup the gains, where no gain is shown, and all figures."""
    parts = []
    for setup in setups(rows):
        own = where(rows, **dict(zip(SETUP, setup)))
        dataset, epochs, batch_size, precision = setup
        parts.append(f"## {dataset}, {epochs} epochs, batches of {batch_size}, {precision}")
        parts.append(f"{coverage(rows, setup)} {len(where(own, split='val'))} of them are on validation classes.")
        taught = values(where(own, split="test", student=TEACHER))
        if taught:
            parts.append(f"The teacher's MAP@R: {shown(list(taught.values()))} ({len(taught)} seeds).")
        for size, tested in sizes(own):
            parts.append(f"### Student {size}, {int(tested[0]['parameters']):,} parameters")
            parts.append(gains_table(tested))
            said = negatives(tested, best_distillations(own, tested))
            if said:
                parts.append("Where no gain is shown:\n\n" + "\n".join(f"- {sentence}" for sentence in said))
        for size, tested in sizes(own):
            parts.append(f"### All figures of student {size}")
            parts.append(table(tested))
    return "\n\n".join(parts) + "\n"


def best_distillations(rows: Rows, tested: Rows) -> dict[str, str]:
    """Return for each metric loss the distillation loss with the best trial among those ``tested``."""
    best = {}
    for metric_loss in unique(where(rows, split="val"), "metric_loss"):
        names = unique(where(tested, metric_loss=metric_loss), "distillation")
        tried = [row for row in where(rows, split="val", metric_loss=metric_loss) if row["distillation"] in names]
        tried = [row for row in tried if row["distillation"] != NONE]
        if tried:
            best[metric_loss] = max(tried, key=lambda row: float(row[MAP]))["distillation"]
    return best


def pictures(rows: Rows, folder: Path) -> list[Path]:
    """Draw, for each setup, MAP@R of each metric loss, and against the size where there are several."""
    folder.mkdir(parents=True, exist_ok=True)
    drawn = []
    for setup in setups(rows):
        own = where(rows, **dict(zip(SETUP, setup)))
        by_size, name = sizes(own), "_".join(("accuracy", *setup[:3]))
        best = best_distillations(own, where(own, split="test"))
        if not best or not by_size:
            continue
        tuned = where(own, split="val", distillation=next(iter(best.values())))[0]["student"]
        drawn.append(draw_bars(folder / f"{name}.png", dict(by_size)[tuned], best, where(own, student=TEACHER)))
        everywhere = min((tested for _, tested in by_size), key=lambda tested: len(unique(tested, "distillation")))
        best = best_distillations(own, everywhere)
        if best and len(by_size) > 1:
            drawn.append(draw_sizes(folder / f"{name}_sizes.png", by_size, best))
    return drawn


def draw_bars(path: Path, tested: Rows, best: dict[str, str], teacher: Rows) -> Path:
    from matplotlib.figure import Figure

    figure = Figure(figsize=(8, 3.8), layout="constrained")
    axes = figure.subplots()
    for shift, color, label in ((-0.2, "#bab0ac", "alone"), (0.2, "#4c78a8", "with distillation")):
        for place, (metric_loss, distillation) in enumerate(best.items()):
            name = NONE if label == "alone" else distillation
            own = list(values(where(tested, metric_loss=metric_loss, distillation=name)).values())
            if own:
                mean, error = mean_and_error(own)
                key = {"label": label} if place == 0 else {}
                axes.bar(place + shift, mean, 0.38, yerr=error if error == error else 0, capsize=3, color=color, **key)
    level = values(where(teacher, split="test"))
    if level:
        axes.axhline(mean_and_error(list(level.values()))[0], color="#e45756", linestyle="--", label="teacher")
    # A line for each word, so that neighbours stay apart.
    names = [f"{loss}\n+ {distillation}".replace("_", "\n") for loss, distillation in best.items()]
    axes.set_xticks(range(len(best)), names, fontsize=7)
    finish(figure, axes, path, loc="outside upper center", ncols=3)
    return path


def draw_sizes(path: Path, by_size: list[tuple[str, Rows]], best: dict[str, str]) -> Path:
    """Draw a color for each metric loss, dashed where it is alone."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(8, 3.8), layout="constrained")
    axes = figure.subplots()
    for number, (metric_loss, distillation) in enumerate(best.items()):
        for name, style in ((distillation, "-"), (NONE, "--")):
            points = []
            for _, rows in by_size:
                own = where(rows, metric_loss=metric_loss, distillation=name)
                if own:
                    points.append((int(own[0]["parameters"]), *mean_and_error(list(values(own).values()))))
            x, means, errors = zip(*points)
            label = None if name == NONE else f"{metric_loss}\n+ {name}"
            axes.errorbar(x, means, errors, linestyle=style, marker=".", color=f"C{number}", capsize=3, label=label)
    axes.plot([], [], "--", color="gray", label="alone")
    axes.set_xscale("log")
    parameters = [int(rows[0]["parameters"]) for _, rows in by_size]
    axes.set_xticks(parameters, [f"{count:,}" for count in parameters])
    axes.minorticks_off()
    axes.set_xlabel("parameters of the student")
    finish(figure, axes, path, loc="outside right upper")
    return path


def finish(figure, axes, path: Path, **legend: str | int) -> None:
    axes.set_ylabel("MAP@R on unseen classes")
    axes.spines[["top", "right"]].set_visible(False)
    figure.legend(frameon=False, fontsize=8, **legend)
    figure.savefig(path, dpi=130)


def report(rows: Rows, out: Path) -> str:
    """Write table.md and the pictures into a folder; return the tables."""
    text = markdown(rows)
    (out / "table.md").write_text(text, encoding="utf-8")
    pictures(rows, out)
    return text


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("csv", type=Path)
    parser.add_argument("--pictures", type=Path, default=Path("."), help="the folder to draw into")
    given = parser.parse_args()
    rows = finished(given.csv)
    print(markdown(rows))
    print(*pictures(rows, given.pictures), sep="\n")


if __name__ == "__main__":
    main()
