"""Results as text, as a table and as pictures."""

import math
import os
import statistics
from collections.abc import Sequence

import torch
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


def neighbor_sheet(
    path: str | os.PathLike,
    images: torch.Tensor,
    labels: torch.Tensor,
    spaces: dict[str, torch.Tensor],
    queries: Sequence[int],
    k: int = 5,
) -> None:
    """Draw queries, one per row, beside what each embedding space returns; right in green, wrong in red.

    Args:
        path: of the picture.
        images: (N, C, H, W) of the searched samples.
        labels: (N,).
        spaces: normalised embeddings (N, D) by name.
        queries: which samples to search with.
        k: how many neighbours to show for each.
    """
    from matplotlib.figure import Figure

    columns = 1 + len(spaces) * (k + 1)
    figure = Figure(figsize=(0.62 * columns, 0.62 * len(queries) + 0.4))
    axes = figure.subplots(len(queries), columns, squeeze=False)
    figure.subplots_adjust(
        left=0.01, right=0.99, bottom=0.01, top=1 - 0.4 / figure.get_figheight(), wspace=0.1, hspace=0.1
    )
    for ax in axes.flat:
        ax.set_axis_off()
    axes[0, 0].set_title("query", fontsize=9)
    for row, query in enumerate(queries):
        draw(axes[row, 0], images[query], "#333333")
        for block, (name, embeddings) in enumerate(spaces.items()):
            similarity = embeddings @ embeddings[query]
            similarity[query] = -torch.inf
            left = 2 + block * (k + 1)
            if row == 0:
                axes[0, left].set_title(name, fontsize=9, loc="left")
            for place, found in enumerate(similarity.topk(k).indices.tolist()):
                right = bool(labels[found] == labels[query])
                draw(axes[row, left + place], images[found], "#2ca02c" if right else "#d62728")
    figure.savefig(path, dpi=130)


def draw(ax, image: torch.Tensor, color: str) -> None:
    """Show an image of any range with a coloured frame."""
    image = image.float().cpu()
    image = (image - image.min()) / (image.max() - image.min()).clamp(min=1e-6)
    ax.set_axis_on()
    ax.set_xticks([])
    ax.set_yticks([])
    ax.imshow(image.permute(1, 2, 0).squeeze(-1).numpy(), cmap="gray_r")
    for spine in ax.spines.values():
        spine.set(color=color, linewidth=2.5)
