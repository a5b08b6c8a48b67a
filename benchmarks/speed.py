"""Time and memory of each loss, forward and backward, beside PML's own losses and the bare B x B Gram product.

Runs of all losses are interleaved in one process, and medians are compared, so that the ratios hold on a busy
machine. The peak memory is what one forward and backward allocates beyond its inputs. Usage:

    python benchmarks/speed.py --out speed

writes speed.csv, speed.md and speed.png into the folder.
"""

import argparse
import csv
from functools import partial
from pathlib import Path

import torch
from pytorch_metric_learning.losses import MultiSimilarityLoss, TripletMarginLoss
from timing import medians, peak_memory

from pml_distill.losses import (
    AbsoluteTeacherLoss,
    AsymmetricRegressionLoss,
    CollaborativeRankLoss,
    CorrelationCongruenceLoss,
    CosineTeacherLoss,
    DarkRankLoss,
    DecoupledDifferentialLoss,
    LogitDistillationLoss,
    MutualDistanceLoss,
    ProbabilisticTransferLoss,
    RankPreservationLoss,
    RegressionTeacherLoss,
    RelativeTeacherLoss,
    RelaxedContrastiveLoss,
    RKDAngleLoss,
    RKDDistanceLoss,
    SimilarityDistributionLoss,
    SimilarityPreservingLoss,
    SimilarityRegressionLoss,
)
from pml_distill.utils.report import format_table

PER_CLASS = 4


class GramProduct(torch.nn.Module):
    def forward(self, embeddings: torch.Tensor) -> torch.Tensor:
        return (embeddings @ embeddings.t()).sum()


class AnglesOfAllTriplets(torch.nn.Module):
    """The angle loss as its formula reads: all B x B x D arms, all B x B x B cosines."""

    def forward(self, embeddings: torch.Tensor, teacher: torch.Tensor) -> torch.Tensor:
        cosines = []
        for points in (embeddings, teacher):
            arms = torch.nn.functional.normalize(points[None] - points[:, None], dim=2)
            cosines.append(arms @ arms.transpose(1, 2))
        return torch.nn.functional.smooth_l1_loss(*cosines)


PML = {"MultiSimilarityLoss": MultiSimilarityLoss(), "TripletMarginLoss": TripletMarginLoss()}
OURS = {
    "soft DarkRank, 4": DarkRankLoss("soft", list_length=4),
    "soft DarkRank, 10": DarkRankLoss("soft", list_length=10),
    "hard DarkRank, 10": DarkRankLoss("hard", list_length=10),
    "hard DarkRank, all": DarkRankLoss("hard", list_length=None),
    "relative teacher": RelativeTeacherLoss(),
    "absolute teacher": AbsoluteTeacherLoss(),
    "similarity regression": SimilarityRegressionLoss(),
    "logit distillation": LogitDistillationLoss(),
    "cosine teacher": CosineTeacherLoss(),
    "regression teacher": RegressionTeacherLoss(),
    "asymmetric regression": AsymmetricRegressionLoss(),
    "RKD distance": RKDDistanceLoss(),
    "RKD angle": RKDAngleLoss(),
    "similarity preserving": SimilarityPreservingLoss(),
    "probabilistic transfer": ProbabilisticTransferLoss(),
    "correlation congruence": CorrelationCongruenceLoss(),
    "relaxed contrastive": RelaxedContrastiveLoss(),
    "mutual distance": MutualDistanceLoss(),
    "rank preservation, 32": RankPreservationLoss(),
    "decoupled differential, 10": DecoupledDifferentialLoss(),
    "collaborative rank, 10": CollaborativeRankLoss(),
}
ANGLES = "angles of all triplets"
SLOW = (ANGLES, "RKD angle")
#: A queue as long as the batch, so that times compare with those of the batch's own matrix.
QUEUED = "similarity distribution"


def step(name: str, embeddings: torch.Tensor, labels: torch.Tensor, teacher: torch.Tensor) -> None:
    embeddings.grad = None
    if name == "Gram product":
        loss = GramProduct()(embeddings)
    elif name == ANGLES:
        loss = AnglesOfAllTriplets()(embeddings, teacher)
    elif name in PML:
        loss = PML[name](embeddings, labels)
    else:
        loss = OURS[name](embeddings, labels, ref_emb=teacher)
    loss.backward()


def measure(size: int, width: int, repeats: int, device: torch.device) -> list[dict]:
    torch.manual_seed(0)
    embeddings = torch.randn(size, width, device=device, requires_grad=True)
    arguments = embeddings, torch.arange(size, device=device) // PER_CLASS, torch.randn(size, width, device=device)
    OURS[QUEUED] = SimilarityDistributionLoss(size, width).to(device)
    names = ["Gram product", *PML, *OURS, ANGLES]
    if size >= 1024:
        # They do not fit into memory.
        names = [name for name in names if name not in ("TripletMarginLoss", ANGLES)]
    steps = {name: partial(step, name, *arguments) for name in names}
    slow = {name: steps.pop(name) for name in SLOW if name in steps}
    seconds = medians(steps, repeats) | medians(slow, min(repeats, 4))
    return [
        {
            "loss": name,
            "batch": size,
            "width": width,
            "ms": 1000 * seconds[name],
            "to_multi_similarity": seconds[name] / seconds["MultiSimilarityLoss"],
            "peak_mib": peak_memory(partial(step, name, *arguments), device) / 2**20,
        }
        for name in names
    ]


def draw(rows: list[dict], path: Path, width: int) -> None:
    from matplotlib.figure import Figure

    figure = Figure(figsize=(12, 5.5), layout="constrained")
    for axes, key, label in zip(figure.subplots(1, 2), ("ms", "peak_mib"), ("ms, forward + backward", "peak MiB")):
        for number, name in enumerate(dict.fromkeys(row["loss"] for row in rows)):
            points = [(row["batch"], row[key]) for row in rows if row["loss"] == name and row["width"] == width]
            style = ("o-", "^-", "v:")[number // 10] if name in OURS else "s--"
            axes.loglog(*zip(*points), style, label=name, markersize=4, linewidth=1.4)
        axes.set_xlabel(f"batch size (width {width})")
        axes.set_ylabel(label)
        axes.grid(True, which="both", alpha=0.2)
    figure.legend(*axes.get_legend_handles_labels(), loc="outside right center", frameon=False)
    figure.savefig(path, dpi=130)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--batches", type=int, nargs="+", default=[64, 256, 512])
    parser.add_argument("--widths", type=int, nargs="+", default=[128, 512])
    parser.add_argument("--repeats", type=int, default=21)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--out", type=Path, default=Path("speed"))
    options = parser.parse_args()
    options.out.mkdir(parents=True, exist_ok=True)
    rows = []
    for width in options.widths:
        for size in options.batches:
            rows += measure(size, width, options.repeats, torch.device(options.device))
    with open(options.out / "speed.csv", "w", newline="") as file:
        writer = csv.DictWriter(file, list(rows[0]))
        writer.writeheader()
        writer.writerows(rows)
    table = format_table(
        [
            {
                "loss": row["loss"],
                "B": str(row["batch"]),
                "D": str(row["width"]),
                "ms": f"{row['ms']:.2f}",
                "x MultiSimilarity": f"{row['to_multi_similarity']:.2f}",
                "peak MiB": f"{row['peak_mib']:.1f}",
            }
            for row in rows
        ]
    )
    print(table)
    (options.out / "speed.md").write_text(table + "\n")
    draw(rows, options.out / "speed.png", options.widths[-1])


if __name__ == "__main__":
    main()
