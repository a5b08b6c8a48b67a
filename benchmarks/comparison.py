"""What the scripts that compare accuracy share: folders, jobs in processes, rows, table, picture."""

import argparse
import csv
import io
import json
import multiprocessing
import os
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from textwrap import fill
from typing import Any

import torch
from glyph_runs import Demo, DemoConfig

from pml_distill.utils.report import format_table, mean_and_error, shown

METRICS = ("precision_at_1", "mean_average_precision_at_r", "asymmetric_map_at_r", "neighbor_agreement")


def options(description: str | None, out: str) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", default=out, type=Path)
    parser.add_argument("--seeds", default=5, type=int)
    parser.add_argument("--processes", default=2, type=int, help="of one thread each")
    parser.add_argument("--search", action="store_true", help="try hyperparameters on the validation classes instead")
    given = parser.parse_args()
    given.split, given.path = ("val", given.out / "search.csv") if given.search else ("test", given.out / "results.csv")
    given.seeds = 1 if given.search else given.seeds
    return given


class GlyphsDemo(Demo):
    """The demo on Glyphs, trained and tested on the classes of a job's split."""

    def __init__(self, out: Path, job: dict):
        splits = ("train", "val") if job["split"] == "val" else ("train+val", "test")
        super().__init__(DemoConfig("glyphs", 10, *splits), out / job["split"], torch.device("cpu"))


def claim(folder: Path, settings: dict) -> None:
    """Write down what the runs in a folder have in common, or stop if it holds other runs or files."""
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / "settings.json"
    if not any(folder.iterdir()):
        path.write_text(json.dumps(settings, indent=2))
    if not path.exists():
        raise SystemExit(f"--out {folder} is not empty and has no settings.json; choose another folder.")
    theirs = json.loads(path.read_text())
    if theirs != settings:
        other = {key: theirs.get(key) for key in settings | theirs if theirs.get(key) != settings.get(key)}
        raise SystemExit(f"--out {folder} holds runs with {other}; choose another folder.")


def finished(path: Path) -> list[dict[str, str]]:
    if not path.exists():
        return []
    whole, _, _ = path.read_text().rpartition("\n")
    return list(csv.DictReader(whole.splitlines()))


def without_row(path: Path, jobs: Sequence[dict]) -> list[dict]:
    """Return the jobs that have no row in the file yet."""
    done = {tuple(row[key] for key in jobs[0]) for row in finished(path)} if jobs else set()
    return [job for job in jobs if tuple(map(str, job.values())) not in done]


def append(path: Path, row: dict, columns: Sequence[str]) -> None:
    """Write a row behind the others in one go; what a crash has left of another one goes."""
    text = io.StringIO()
    csv.DictWriter(text, columns, extrasaction="ignore", lineterminator="\n").writerow(row)
    with open(path, "rb+") as file:
        content = file.read()
        file.seek(content.rfind(b"\n") + 1)
        file.truncate()
        file.write(text.getvalue().encode())
        file.flush()
        os.fsync(file.fileno())


def complete(
    path: Path,
    jobs: Sequence[dict],
    run: Callable[[dict], dict],
    processes: int,
    metrics: Sequence[str] = METRICS,
    tell: Callable[[dict], Any] | None = None,
) -> list[dict[str, str]]:
    """Run the jobs that have no row in the file yet, tell of each, and return the rows of all."""
    path.parent.mkdir(parents=True, exist_ok=True)
    missing = without_row(path, jobs)
    if missing:
        columns = (*missing[0], *metrics)
        if not path.exists():
            path.write_text(",".join(columns) + "\n")
        with multiprocessing.get_context("spawn").Pool(min(processes, len(missing))) as pool:
            for row in pool.imap_unordered(run, missing):
                append(path, row, columns)
                (tell or show)(row)
    return finished(path)


def show(row: dict) -> None:
    print("\n", {k: round(v, 4) if isinstance(v, float) else v for k, v in row.items()}, flush=True)


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
            for metric, name in zip(METRICS, ("precision@1", "MAP@R", "student to teacher", "agreement")):
                line[name] = shown(list(own[metric].values()))
            line["gain in MAP@R"] = ""
            if method == taught:
                other = by_seed(rows, METRICS[1], method=alone, **{column: condition})
                mean, error = mean_and_error([own[METRICS[1]][seed] - other[seed] for seed in other])
                line["gain in MAP@R"] = f"{mean:+.3f} ± {error:.3f} ({mean / error:.0f} errors)"
            lines.append(line)
    return format_table(lines)


def report(
    out: Path,
    rows: list[dict[str, str]],
    column: str,
    conditions: Sequence[str],
    methods: Sequence[str],
    teacher: str,
) -> None:
    """Write table and picture of the methods under each condition, the one that is taught last; print the table.

    ``teacher`` is what the picture calls the teacher's level.
    """
    *others, alone, taught = methods
    text = table(rows, column, conditions, alone, taught, *others)
    (out / "table.md").write_text(text + "\n", encoding="utf-8")
    levels = {teacher: mean_and_error(list(by_seed(rows, METRICS[1], method="teacher").values()))[0]}
    plot(out / "map_at_r.png", rows, column, conditions, methods, levels)
    print(text)


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
    axes.set_xticks(
        range(len(conditions)), [fill(c, 70 // len(conditions), break_long_words=False) for c in conditions]
    )
    axes.set_ylabel("MAP@R")
    axes.spines[["top", "right"]].set_visible(False)
    figure.legend(loc="outside upper center", ncols=2, frameon=False)
    figure.savefig(path, dpi=130)
