"""What semi_supervised.py and cross_quality.py share: jobs in several processes, a row for each, table and picture."""

import argparse
import csv
import multiprocessing
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path

from pml_distill.utils.report import format_table, mean_and_error

METRICS = ("precision_at_1", "mean_average_precision_at_r", "asymmetric_map_at_r", "neighbor_agreement")


def options(description: str | None, out: str) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", default=out, type=Path)
    parser.add_argument("--seeds", default=5, type=int)
    parser.add_argument("--processes", default=2, type=int, help="of one thread each")
    parser.add_argument("--search", action="store_true", help="try hyperparameters on the validation classes instead")
    return parser.parse_args()


def finished(path: Path) -> list[dict[str, str]]:
    if not path.exists():
        return []
    with open(path) as file:
        return list(csv.DictReader(file))


def complete(path: Path, jobs: Sequence[dict], run: Callable[[dict], dict], processes: int) -> list[dict[str, str]]:
    """Run the jobs that have no row in the file yet, and return the rows of all."""
    path.parent.mkdir(parents=True, exist_ok=True)
    keys = list(jobs[0])
    done = {tuple(row[key] for key in keys) for row in finished(path)}
    missing = [job for job in jobs if tuple(map(str, job.values())) not in done]
    if not path.exists():
        path.write_text(",".join((*keys, *METRICS)) + "\n")
    with multiprocessing.get_context("spawn").Pool(processes) as pool:
        for row in pool.imap_unordered(run, missing):
            with open(path, "a", newline="") as file:
                csv.DictWriter(file, (*keys, *METRICS), extrasaction="ignore").writerow(row)
            print("\n", {k: round(v, 4) if isinstance(v, float) else v for k, v in row.items()}, flush=True)
    return finished(path)


def by_seed(rows: Iterable[dict[str, str]], metric: str, **wanted: str) -> dict[str, float]:
    return {row["seed"]: float(row[metric]) for row in rows if all(row[k] == v for k, v in wanted.items())}


def table(
    rows: list[dict[str, str]], column: str, conditions: Sequence[str], alone: str, taught: str, *others: str
) -> str:
    """Lay out the methods under each condition, and the paired gain of the one that is taught."""
    lines = []
    for condition in conditions:
        for method in (*others, alone, taught):
            own = {metric: by_seed(rows, metric, method=method, **{column: condition}) for metric in METRICS}
            line = {column: condition, "method": method, "seeds": str(len(own[METRICS[0]]))}
            for metric, name in zip(METRICS, ("precision@1", "MAP@R", "student → teacher", "agreement")):
                line[name] = "{:.3f} ± {:.3f}".format(*mean_and_error(list(own[metric].values())))
            line["gain in MAP@R"] = ""
            if method == taught:
                other = by_seed(rows, METRICS[1], method=alone, **{column: condition})
                mean, error = mean_and_error([own[METRICS[1]][seed] - other[seed] for seed in other])
                line["gain in MAP@R"] = f"{mean:+.3f} ± {error:.3f} ({mean / error:.0f} errors)"
            lines.append(line)
    return format_table(lines)


def plot(
    path: Path,
    rows: list[dict[str, str]],
    column: str,
    conditions: Sequence[str],
    methods: Sequence[str],
    levels: dict[str, float],
) -> None:
    """Draw a group of bars for each condition, MAP@R with its standard error, and dashed levels."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(7, 3.6), layout="constrained")
    axes = figure.subplots()
    width = 0.8 / len(methods)
    for i, (method, color) in enumerate(zip(methods, ("#bab0ac", "#4c78a8", "#f58518"))):
        values = [list(by_seed(rows, METRICS[1], method=method, **{column: c}).values()) for c in conditions]
        means, errors = zip(*map(mean_and_error, values))
        places = [j + (i - (len(methods) - 1) / 2) * width for j in range(len(conditions))]
        axes.bar(places, means, width, yerr=errors, capsize=3, label=method, color=color)
    for (name, level), color in zip(levels.items(), ("#e45756", "#54a24b")):
        axes.axhline(level, color=color, linestyle="--", linewidth=1.5, label=f"{name} {level:.3f}")
    axes.set_xticks(range(len(conditions)), conditions)
    axes.set_ylabel("MAP@R")
    axes.spines[["top", "right"]].set_visible(False)
    figure.legend(loc="outside upper center", ncols=2, frameon=False)
    figure.savefig(path, dpi=130)
