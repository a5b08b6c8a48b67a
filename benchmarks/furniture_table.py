"""The tables that `furniture.py` prints of its record."""

import torch
from furniture_data import embed, resized, teacher_network, teacher_on, test_images
from torch.nn import functional as F

from pml_distill.evaluation import retrieval_accuracy
from pml_distill.utils.report import format_table, shown

MAP = "mean_average_precision_at_r"
METRICS = ("precision_at_1", MAP, "in_teacher_gallery", "agreement", "validation", "teacher")


def frame(part: str, by: str) -> list[dict[str, str]]:
    """What to compare with: the teacher as it came, a random network, pixels."""
    tested, labels = test_images(part, by)
    torch.manual_seed(0)
    pixels = F.avg_pool2d(tested.float(), 6).flatten(1)
    rows = {
        "EfficientNet-Lite0 as it came": teacher_on(part, "lite0", by),
        "the same, random weights": embed(teacher_network("lite0", False), tested),
        **{
            f"pretrained student of {size} pixels as it came": embed(
                teacher_network("mobilenet"), resized(tested, size)
            )
            for size in (64, 32)
        },
        "16 x 16 pixels": pixels - pixels.mean(1, keepdim=True),
    }
    found = {name: retrieval_accuracy(row, labels, metrics=("precision_at_1", MAP)) for name, row in rows.items()}
    return [{"network": name, **{key: f"{value:.3f}" for key, value in row.items()}} for name, row in found.items()]


def table(rows: list[dict[str, str]], methods: list[str]) -> str:
    """MAP@R by regime and method, and the paired gain of each method over labels alone."""
    lines = []
    for regime in dict.fromkeys(row["regime"] for row in rows):
        for method in methods:
            own = by_seed(rows, MAP, regime=regime, method=method)
            alone = by_seed(rows, MAP, regime=regime, method="labels alone")
            if not own:
                continue
            line = {"learned from": regime, "method": method, "seeds": str(len(own))}
            for metric, name in zip(
                METRICS, ("precision@1", "MAP@R", "in teacher's gallery", "agreement", "", "teacher")
            ):
                if name:
                    line[name] = shown(list(by_seed(rows, metric, regime=regime, method=method).values()))
            gains = [own[seed] - alone[seed] for seed in own if seed in alone]
            line["gain in MAP@R"] = shown(gains, "+.3f") if gains and method != "labels alone" else ""
            lines.append(line)
    return format_table(lines)


def by_seed(rows: list[dict[str, str]], metric: str, **wanted: str) -> dict[str, float]:
    return {row["seed"]: float(row[metric]) for row in rows if all(row[key] == value for key, value in wanted.items())}
