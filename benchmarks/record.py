"""Results of runs in a folder: claimed by their settings, kept row by row, never computed twice."""

import csv
import io
import json
import multiprocessing
import os
from collections import defaultdict
from collections.abc import Callable, Sequence
from pathlib import Path

from pml_distill.utils.report import format_table, shown


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
    path: Path, jobs: list[dict], metrics: Sequence[str], work: Callable[[dict], dict], processes: int
) -> list[dict[str, str]]:
    """Run the jobs that have no row in the file yet, several at a time; return the rows of all."""
    columns = (*jobs[0], *metrics)
    if not path.exists():
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(",".join(columns) + "\n")
    done = {tuple(row[key] for key in jobs[0]) for row in finished(path)}
    missing = [job for job in jobs if tuple(map(str, job.values())) not in done]
    with multiprocessing.get_context("spawn").Pool(processes) as pool:
        for row in pool.imap_unordered(work, missing):
            append(path, row, columns)
            print(row, flush=True)
    return finished(path)


def shown_by(rows: list[dict[str, str]], keys: Sequence[str], metrics: Sequence[str]) -> str:
    """A table of means and standard errors over the seeds, a line for each setting."""
    groups = defaultdict(list)
    for row in rows:
        groups[tuple(row[key] for key in keys)].append(row)
    return format_table([
        dict(zip(keys, group)) | {m: shown([float(row[m]) for row in own]) for m in metrics}
        for group, own in groups.items()
    ])  # fmt: skip
