"""Which loss helps where: the heat map of the page on choosing a loss, from a record of `furniture.py`.

python benchmarks/loss_map.py docs/images/losses.png
"""

import argparse
from pathlib import Path

import torch
from furniture import RESULTS, TABLES
from furniture_table import MAP, by_seed
from matplotlib import pyplot
from record import finished

#: What a student without a teacher has; without labels it stays as it was born.
BASELINES = {"no labels": None, "1 of 8 images labelled": "1 of 8, strong augmentation", "all": "all"}
UNTRAINED = 0.013


def gains(rows: list[dict[str, str]]) -> tuple[list[str], torch.Tensor, torch.Tensor]:
    """Return the losses, and the mean gain in MAP@R of each in each regime with its standard error."""
    methods, means, errors = [name for name in TABLES["losses"][1] if name != "labels alone"], [], []
    for method in methods:
        found = []
        for regime, baseline in BASELINES.items():
            own = by_seed(rows, MAP, regime=regime, method=method)
            alone = by_seed(rows, MAP, regime=baseline, method="labels alone") if baseline else {}
            found.append(torch.tensor([value - alone.get(seed, UNTRAINED) for seed, value in own.items()]))
        means.append(torch.stack([values.mean() for values in found]))
        errors.append(torch.stack([values.std() / len(values) ** 0.5 for values in found]))
    return methods, torch.stack(means), torch.stack(errors)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("picture", type=Path)
    parser.add_argument("--record", type=Path, default=RESULTS / "furniture_test.csv")
    given = parser.parse_args()
    methods, means, errors = gains(finished(given.record))
    names = ["CosineTeacherLoss 3" if name == "default" else name for name in methods]
    figure, axes = pyplot.subplots(figsize=(6.5, 4.5), layout="constrained")
    image = axes.imshow(means, cmap="RdBu", vmin=-0.1, vmax=0.1, aspect="auto")
    axes.set_xticks(range(3), ["no labels", "1 of 8 labelled", "all labelled"])
    axes.set_yticks(range(len(names)), names)
    for row, column in torch.cartesian_prod(torch.arange(len(names)), torch.arange(3)).tolist():
        mean, error = means[row, column].item(), errors[row, column].item()
        text = f"0 ({mean:+.3f})" if abs(mean) <= 2 * error else f"{mean:+.3f}"
        axes.text(column, row, text, ha="center", va="center", color="white" if mean > 0.07 else "black")
    figure.colorbar(image, label="MAP@R gained over the student without a teacher")
    figure.savefig(given.picture, dpi=120)


if __name__ == "__main__":
    main()
