"""What a teacher, a student alone and a distilled student find: the picture of the README.

    python benchmarks/furniture_picture.py docs/images/retrieval.png      # images and weights as for furniture.py

Trained on the models of three authors, one of eight images labelled; shown are models of BlendSwap (CC0). The queries
are drawn by a seed from those whose nearest neighbour is right for the teacher. A green frame is the same object.
"""

import argparse
from pathlib import Path

import torch
from furniture import DEFAULT, METHODS, Regime, train
from furniture_data import embed, resized, small_views, teacher_on, teacher_outputs, test_images
from matplotlib import pyplot
from torch.nn import functional as F

REGIME, QUERIES, FOUND = Regime(1, by="author"), 2, 5


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("picture", type=Path)
    parser.add_argument("--seed", type=int, default=0)
    given = parser.parse_args()
    torch.set_num_threads(1)
    small_views(REGIME.strength, REGIME.size, REGIME.by)
    teacher_outputs("lite0", REGIME.strength, REGIME.by)
    images, labels = test_images("test", REGIME.by)
    distilled, prepared = train(REGIME, DEFAULT, given.seed)
    alone, _ = train(REGIME, METHODS["labels alone"], given.seed)
    small = resized(images, REGIME.size)
    spaces = {
        "teacher": prepared(teacher_on("test", "lite0", REGIME.by)),
        "distilled student": embed(distilled, small),
        "student alone": embed(alone, small),
    }
    similar = F.normalize(spaces["teacher"])
    first = (similar @ similar.T).fill_diagonal_(-1).argmax(dim=1)
    known = (labels[first] == labels).nonzero().flatten()
    order = torch.randperm(len(known), generator=torch.Generator().manual_seed(given.seed))
    chosen = known[order[:QUERIES]].tolist()
    rows = [(query, name) for query in chosen for name in spaces]
    figure, axes = pyplot.subplots(len(rows), FOUND + 1, figsize=(7, 0.95 * len(rows)), layout="constrained")
    for row, (query, name) in zip(axes, rows):
        unit = F.normalize(spaces[name])
        order = (unit @ unit[query]).argsort(descending=True)
        neighbors = [place for place in order.tolist() if place != query][:FOUND]
        for axis, place in zip(row, [query, *neighbors]):
            axis.imshow(images[place].permute(1, 2, 0))
            axis.set(xticks=[], yticks=[])
            right = labels[place] == labels[query]
            color = "black" if place == query else "tab:green" if right else "tab:red"
            for side in axis.spines.values():
                side.set(color=color, linewidth=3)
        row[0].set_ylabel(name.replace(" ", "\n", 1), rotation=0, ha="right", va="center", fontsize=9)
    axes[0, 0].set_title("query", fontsize=9)
    axes[0, 3].set_title("nearest neighbours", fontsize=9)
    figure.savefig(given.picture, dpi=90)


if __name__ == "__main__":
    main()
