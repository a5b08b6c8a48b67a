"""Results as text, as a table and as pictures."""

import math
import os
import statistics
from collections.abc import Sequence

from tqdm import tqdm

from .distributed import process_rank


def write(text: str) -> None:
    """Print beside a progress bar, in the first process only."""
    if process_rank() == 0:
        tqdm.write(text)


def mean_and_error(values: Sequence[float]) -> tuple[float, float]:
    """Return the mean and its standard error; the error of a single value is NaN."""
    mean = statistics.fmean(values)
    if len(values) < 2:
        return mean, float("nan")
    return mean, statistics.stdev(values) / len(values) ** 0.5


def shown(values: Sequence[float], form: str = ".3f") -> str:
    """Return the mean ± its standard error, or a single value alone; ``form`` is that of the mean."""
    mean, error = mean_and_error(values)
    return f"{mean:{form}}" + ("" if math.isnan(error) else f" ± {error:{form.lstrip('+')}}")


def format_table(rows: Sequence[dict[str, str]]) -> str:
    """Lay out rows with the same keys as a Markdown table, the first column to the left and others to the right."""
    columns = list(rows[0])
    widths = {c: max(len(c), *(len(row[c]) for row in rows)) for c in columns}

    def line(cells: dict[str, str]) -> str:
        first, *others = columns
        return (
            "| " + " | ".join([cells[first].ljust(widths[first])] + [cells[c].rjust(widths[c]) for c in others]) + " |"
        )

    rule = "|" + "|".join("-" * (widths[c] + 1) + (":" if i else "-") for i, c in enumerate(columns)) + "|"
    return "\n".join([line({c: c for c in columns}), rule, *map(line, rows)])


def bar_chart(
    path: str | os.PathLike,
    bars: dict[str, tuple[float, float]],
    levels: dict[str, float],
    label: str,
) -> None:
    """Draw one horizontal bar per name, (value, standard error), and a dashed line for each level."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(8, 0.6 + 0.42 * len(bars)), layout="constrained")
    axes = figure.subplots()
    names = list(bars)
    values = [value for value, _ in bars.values()]
    errors = [0 if math.isnan(error) else error for _, error in bars.values()]
    axes.barh(names, values, xerr=errors, color="#4c78a8", ecolor="#222222", capsize=3, height=0.65)
    for (name, level), color in zip(levels.items(), ("#e45756", "#54a24b")):
        axes.axvline(level, color=color, linestyle="--", linewidth=1.5, label=f"{name} {level:.3f}")
    axes.invert_yaxis()
    axes.set_xlim(left=0)
    axes.set_xlabel(label)
    axes.spines[["top", "right"]].set_visible(False)
    figure.legend(loc="outside upper center", ncols=len(levels), frameon=False)
    figure.savefig(path, dpi=130)
