"""What a run has reached: a table, its CSV, pictures, and one page that holds them all."""

import base64
import csv
import html
import io
import json
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch.nn import functional as F

from ..datasets.items import UNLABELED
from ..evaluation import model_cost, neighbor_agreement, retrieval_accuracy
from ..models import Preprocessing
from ..utils.files import whole_file
from ..utils.report import format_table
from .images import ImageSet

COLUMNS = {
    "precision_at_1": "precision@1",
    "recall_at_10": "recall@10",
    "mean_average_precision_at_r": "MAP@R",
    "in_teacher_gallery": "MAP@R in teacher's gallery",
    "agreement": "agreement",
    "parameters": "M parameters",
    "flops": "MFLOPs",
    "latency_ms_batch_1": "ms (batch 1)",
    "latency_ms_batch_32": "ms an image (batch 32)",
}
GREEN, RED, GREY = (44, 160, 44), (214, 39, 40), (120, 120, 120)
THUMBNAIL, QUERIES, NEIGHBORS = 72, 8, 5


def accuracy(embeddings: torch.Tensor, labels: torch.Tensor) -> dict[str, float]:
    """Return precision@1, recall@10 and MAP@R, nothing without labels."""
    return retrieval_accuracy(embeddings, labels) if (labels != UNLABELED).any() else {}


def beside_teacher(embeddings: torch.Tensor, teacher: torch.Tensor, labels: torch.Tensor) -> dict[str, float]:
    """Return the agreement with the teacher, and MAP@R of these queries in its gallery."""
    figures = {"agreement": neighbor_agreement(embeddings, teacher, min(10, len(teacher) - 1))}
    if (labels != UNLABELED).any() and embeddings.shape == teacher.shape:
        metric = "mean_average_precision_at_r"
        figures["in_teacher_gallery"] = retrieval_accuracy(embeddings, labels, teacher, metrics=(metric,))[metric]
    return figures


def cost(network: torch.nn.Module, shape: tuple[int, ...]) -> dict[str, float]:
    """Return parameters, FLOPs and latency of a network."""
    measured = model_cost(network, shape, (1, 32), repeats=5)
    latency = {f"latency_ms_batch_{size}": time for size, time in measured.latency.items()}
    return {"parameters": measured.parameters, "flops": measured.flops, **latency}


def shown_table(rows: Sequence[dict[str, Any]]) -> list[dict[str, str]]:
    """Return the figures as text, without columns that are empty."""
    present = [key for key in COLUMNS if any(row.get(key) is not None for row in rows)]
    return [{"network": row["network"]} | {COLUMNS[key]: shown(key, row.get(key)) for key in present} for row in rows]


def text_table(rows: Sequence[dict[str, Any]]) -> str:
    """Return the table for a terminal."""
    return format_table(shown_table(rows))


def shown(key: str, value: Any) -> str:
    """Return a figure as text."""
    if value is None:
        return ""
    if key == "parameters":
        return f"{value / 1e6:.2f}"
    return f"{value / 1e6:.1f}" if key == "flops" else f"{value:.2f}" if key.startswith("latency") else f"{value:.3f}"


def write_csv(path: Path, rows: Sequence[dict[str, Any]]) -> None:
    """Write the figures."""
    keys = ["network", *(key for key in COLUMNS if any(key in row for row in rows))]
    with whole_file(path) as unfinished, open(unfinished, "w", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, keys, extrasaction="ignore")
        writer.writeheader()
        writer.writerows(rows)


def draw(
    out: Path, curves: dict[str, list[dict[str, float]]], images: ImageSet, spaces: dict[str, torch.Tensor]
) -> dict[str, Path]:
    """Draw learning curves and nearest neighbours; return the pictures by their captions."""
    label = "MAP@R" if images.labeled else "agreement with the teacher"
    pictures = {}
    if draw_curves(out / "curves_validation.png", curves, "validation", label):
        pictures[f"{label} on validation images"] = out / "curves_validation.png"
    if draw_curves(out / "curves_loss.png", curves, "total_loss", "loss"):
        pictures["Training loss, with a distillation that fades out where all images have labels"] = (
            out / "curves_loss.png"
        )
    for name, embeddings in spaces.items():
        path = out / f"neighbors_{name.replace(' ', '_')}.png"
        draw_neighbors(path, images, embeddings)
        pictures[f"Nearest to each test image on the left: {name}"] = path
    return pictures


def draw_curves(path: Path, curves: dict[str, list[dict[str, float]]], key: str, label: str) -> bool:
    """Draw a figure of each epoch for each training; return whether there is any."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(5, 3.3), layout="constrained")
    axes = figure.subplots()
    for name, curve in curves.items():
        points = [(point["epoch"], point[key]) for point in curve if key in point]
        if points:
            axes.plot(*zip(*points), label=name, marker="o" if len(points) < 15 else None, markersize=3.5)
    axes.set_xlabel("epoch")
    axes.set_ylabel(label)
    axes.grid(alpha=0.3)
    axes.spines[["top", "right"]].set_visible(False)
    if not axes.lines:
        return False
    axes.legend(frameon=False)
    with whole_file(path) as unfinished:
        figure.savefig(unfinished, dpi=150, format="png")
    return True


def draw_neighbors(path: str | os.PathLike, images: Any, embeddings: torch.Tensor) -> None:
    """Draw images of a dataset with ``labels``, and to the right of each what is nearest to it.

    The frame is green for the image's own class, red for another, grey without labels.
    """
    from PIL import Image

    count = min(QUERIES, len(images))
    queries = torch.randperm(len(images), generator=torch.Generator().manual_seed(0))[:count].tolist()
    side = THUMBNAIL + 4
    sheet = Image.new("RGB", (side * (NEIGHBORS + 1) + 8, side * count), "white")
    unit = F.normalize(embeddings.float())
    for line, query in enumerate(queries):
        similarity = unit @ unit[query]
        similarity[query] = -torch.inf
        found = similarity.topk(min(NEIGHBORS, len(images) - 1)).indices.tolist()
        for place, row in enumerate([query, *found]):
            labels = images.labels[[query, row]].tolist()
            color = GREY if UNLABELED in labels or place == 0 else GREEN if labels[0] == labels[1] else RED
            left = side * place + 8 * (place > 0)
            sheet.paste(color, (left + 1, side * line + 1, left + side - 1, side * (line + 1) - 1))
            sheet.paste(thumbnail(images[row][0]), (left + 4, side * line + 4))
    with whole_file(path) as unfinished:
        sheet.save(unfinished, "png")


def thumbnail(image: Any) -> Any:
    """Return a small Pillow image of an image or a tensor of any range."""
    from PIL import Image

    size = THUMBNAIL - 4
    if isinstance(image, torch.Tensor):
        image = image.float()
        image = (image - image.min()) / (image.max() - image.min()).clamp(min=1e-6)
        pixels = Preprocessing((size, size), "nearest", (0.0,) * 3, (1.0,) * 3)(image)
    else:
        pixels = Preprocessing((size, size), "bilinear", (0.0,) * 3, (1.0,) * 3)(image)
    return Image.fromarray((255 * pixels.permute(1, 2, 0)).round().byte().numpy())


STYLE = """
body { font: 16px/1.5 system-ui, sans-serif; color: #1c1f23; background: #fff; margin: 0 auto; max-width: 68rem;
  padding: 1rem; }
h1 { font-size: 1.4rem; margin: .5rem 0; overflow-wrap: anywhere; } h2 { font-size: 1.15rem; margin: 2rem 0 .5rem; }
.scroll { overflow-x: auto; } table { border-collapse: collapse; font-variant-numeric: tabular-nums; }
th, td { padding: .35rem .5rem; text-align: right; border-bottom: 1px solid #dfe3e8; }
th { vertical-align: bottom; font-weight: 600; font-size: .85rem; } tbody th { text-align: left; font-weight: 400; }
.pictures { display: flex; flex-wrap: wrap; gap: 1.5rem; } figure { margin: 0; flex: 0 1 29rem; min-width: 0; }
figure img { max-width: 100%; height: auto; } figcaption { font-size: .9rem; color: #50575e; margin-bottom: .3rem; }
pre { background: #f5f6f8; padding: .8rem; overflow-x: auto; font-size: .85rem; border-radius: .3rem; }
ul { padding-left: 1.2rem; } li { margin: .2rem 0; overflow-wrap: anywhere; }
"""


def write_page(
    path: Path,
    title: str,
    notes: Sequence[str],
    rows: Sequence[dict[str, Any]],
    pictures: dict[str, Path],
    settings: dict[str, Any],
) -> None:
    """Write the page: everything is in the file, it refers to no other.

    Args:
        path: of the page.
        title: of the page.
        notes: a sentence each.
        rows: of the table.
        pictures: by caption.
        settings: shown at the end.
    """
    table = shown_table(rows)
    head = "".join(f"<th>{html.escape(row['network'])}</th>" for row in table)
    names = [name for name in table[0] if name != "network"]
    # Networks side by side: three columns fit a phone.
    body = "".join(
        f"<tr><th>{html.escape(name)}</th>" + "".join(f"<td>{html.escape(row[name])}</td>" for row in table) + "</tr>"
        for name in names
    )
    figures = "".join(
        f'<figure><figcaption>{html.escape(caption)}</figcaption><img alt="{html.escape(caption)}" '
        f'src="data:image/png;base64,{base64.b64encode(picture.read_bytes()).decode()}"></figure>'
        for caption, picture in pictures.items()
    )
    listed = "".join(f"<li>{html.escape(note)}</li>" for note in notes)
    text = io.StringIO()
    text.write('<!doctype html>\n<html lang="en">\n<head>\n<meta charset="utf-8">\n')
    text.write('<meta name="viewport" content="width=device-width, initial-scale=1">\n')
    text.write(f"<title>{html.escape(title)}</title>\n<style>{STYLE}</style>\n</head>\n<body>\n")
    text.write(f"<h1>{html.escape(title)}</h1>\n<ul>{listed}</ul>\n<h2>Result on test images</h2>\n")
    text.write(
        f'<div class="scroll"><table><thead><tr><th></th>{head}</tr></thead><tbody>{body}</tbody></table></div>\n'
    )
    text.write(f'<h2>Pictures</h2>\n<div class="pictures">{figures}</div>\n<h2>Settings</h2>\n')
    text.write(f"<pre>{html.escape(json.dumps(settings, indent=2))}</pre>\n</body>\n</html>\n")
    with whole_file(path) as unfinished:
        unfinished.write_text(text.getvalue(), encoding="utf-8")
