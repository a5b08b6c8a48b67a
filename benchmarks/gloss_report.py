"""The rows, the table and the picture of `glosses.py`."""

import csv

import numpy as np

from pml_distill.utils.report import format_table, shown

P1, MAP = "precision_at_1", "mean_average_precision_at_r"
COLUMNS = ("student", "method", "setting", "seed", P1, MAP, "neighbor_agreement", "gain", "gain_low", "gain_high",
           "parameters", "sentences_per_second", "seconds")  # fmt: skip


def table(rows):
    """Mean and standard error over seeds of a record; of gains also how many are beyond chance by their interval."""
    groups = {}
    for row in rows:
        groups.setdefault((row["student"], row["method"]), []).append(row)
    lines = []
    for (name, method), members in groups.items():
        gain = ""
        if members[0]["gain"]:
            sure = sum(float(row["gain_low"]) * float(row["gain_high"]) > 0 for row in members)
            gain = f"{shown([float(row['gain']) for row in members], '+.3f')} ({sure} of {len(members)})"
        line = {"student": name, "method": method}
        for title, key in (("precision@1", P1), ("MAP@R", MAP), ("agreement", "neighbor_agreement")):
            line[title] = shown([float(row[key]) for row in members])
        line |= {"gain in MAP@R over labels alone": gain, "parameters": f"{int(members[0]['parameters']):,}"}
        lines.append(line | {"texts/s": f"{int(members[0]['sentences_per_second']):,}"})
    return format_table(lines)


def picture(rows, path):
    """MAP@R against speed."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(9, 4), layout="constrained")
    axes = figure.subplots()
    points = {}
    for row in rows:
        points.setdefault((row["student"], row["method"], float(row["sentences_per_second"])), []).append(
            float(row[MAP])
        )
    colors = {"teacher": "black", "TF-IDF": "gray", "static": "tab:orange", "cut": "tab:blue"}
    for ((name, method, speed), values), marker in zip(points.items(), "*DPosv^<X>osv^"):
        label = f"{name}, {method}"
        axes.plot(speed, np.mean(values), marker, color=colors[name], label=label, alpha=0.7, linestyle="none")
    figure.legend(loc="outside right upper", fontsize=8)
    axes.set(xscale="log", xlabel="texts per second on one core", ylabel="MAP@R on unseen classes")
    figure.savefig(path, dpi=120)


def write(path, rows):
    """Append rows as they come, and return all as they are read."""
    with open(path, "a", newline="") as file:
        writer = csv.DictWriter(file, COLUMNS, lineterminator="\n")
        if not file.tell():
            writer.writeheader()
        for row in rows:
            print(
                row["student"], row["method"], row["setting"], row["seed"], f"{row[P1]:.3f} {row[MAP]:.3f}", flush=True
            )
            writer.writerow({key: f"{value:.4g}" if isinstance(value, float) else value for key, value in row.items()})
            file.flush()
    return read(path)


def read(path):
    return list(csv.DictReader(path.read_text().splitlines())) if path.exists() else []
