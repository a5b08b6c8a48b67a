"""Results of runs in a folder: claimed by their settings, kept row by row, never computed twice."""

import csv
import io
import json
import os
from collections.abc import Sequence
from pathlib import Path


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
