"""The images of a run: where they are, what they are called, which train, validate and test."""

import csv
import hashlib
import os
from collections import Counter
from collections.abc import Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch.utils.data import Dataset
from tqdm import tqdm

from ..datasets.items import UNLABELED

SUFFIXES = {".bmp", ".gif", ".jpeg", ".jpg", ".pgm", ".png", ".ppm", ".tif", ".tiff", ".webp"}
SPLITS = ("train", "val", "test")
SHARES = (0.6, 0.2)
#: A JPEG is decoded at a fraction of its size that still covers this many pixels each way.
ENOUGH = 768


class ImageFiles(Dataset):
    """Images by path, as Pillow has them, upright."""

    def __init__(self, root: Path, paths: Sequence[str]):
        self.root, self.paths = root, list(paths)

    def __len__(self) -> int:
        return len(self.paths)

    def __getitem__(self, index: int) -> Any:
        from PIL import Image, ImageOps

        with Image.open(self.root / self.paths[index]) as image:
            image.draft("RGB", (ENOUGH, ENOUGH))
            return ImageOps.exif_transpose(image).convert("RGB")


class ImageSet(Dataset):
    """Some images of a dataset.

    Args:
        dataset: of images, or of tuples that begin with one.
        indices: which of them.
        labels: (N,) class numbers, -1 where there is none.
        names: of the images.

    Items:
        (image, label).
    """

    def __init__(
        self, dataset: Any, indices: Sequence[int], labels: Sequence[int] | torch.Tensor, names: Sequence[str]
    ):
        self.dataset, self.indices = dataset, [int(i) for i in indices]
        self.labels, self.names = torch.as_tensor(labels, dtype=torch.int64), list(names)

    def __len__(self) -> int:
        return len(self.indices)

    def __getitem__(self, index: int) -> tuple[Any, int]:
        item = self.dataset[self.indices[index]]
        return item[0] if type(item) in (tuple, list) else item, int(self.labels[index])

    def at(self, rows: Iterable[int]) -> "ImageSet":
        """Return these of the images."""
        rows = [int(row) for row in rows]
        indices, names = [self.indices[row] for row in rows], [self.names[row] for row in rows]
        return ImageSet(self.dataset, indices, self.labels[rows], names)

    @property
    def labeled(self) -> bool:
        """Whether any image has a label."""
        return bool((self.labels != UNLABELED).any())


@dataclass
class Images:
    """All images, and the sets ``train``, ``val`` and ``test`` among them.

    Args:
        all: every image, in order.
        rows: of ``all``, by split.
        classes: the names of the classes, by label.
        notes: what was decided on the way, for the user.
    """

    all: ImageSet
    rows: dict[str, list[int]]
    classes: list[str]
    notes: list[str]

    def __getitem__(self, split: str) -> ImageSet:
        return self.all.at(self.rows[split])

    @property
    def digest(self) -> str:
        """A hash of names, labels and splits."""
        text = repr((self.all.names, self.all.labels.tolist(), self.rows))
        return hashlib.sha256(text.encode()).hexdigest()[:16]

    def __str__(self) -> str:
        sizes = [f"{len(self[split]):,} to {verb}" for split, verb in zip(SPLITS, ("train", "validate", "test"))]
        found = [self[split].labels for split in SPLITS]
        classes = [str(len(labels[labels != UNLABELED].unique())) for labels in found]
        kinds = f"of {'/'.join(classes)} classes" if self.all.labeled else "without labels"
        return " ".join([f"{len(self.all):,} images {kinds}: {', '.join(sizes)}.", *self.notes])


def find_images(source: Any, skip_broken: bool = False, divide: bool = True) -> Images:
    """Find images, read each once, and divide them.

    Without given splits, classes are divided (60 % train, 20 % validate, 20 % test), or images where there are no
    labels; always the same way.

    Args:
        source: a folder with a folder per class; a flat folder; a folder with ``train``, ``test`` and perhaps ``val``,
            each of them such a folder; a CSV file with the columns ``path`` and perhaps ``label`` and ``split``, an
            empty label for none; or a dataset of images, or a dictionary of them by split.
        skip_broken: leave out images that cannot be read.
        divide: whether they are to be divided; otherwise all that is not given as another split is ``test``.

    Raises:
        ValueError: there are no images, or too few to be divided; files are missing or broken; a class has one image.
    """
    if isinstance(source, (str, os.PathLike)):
        found = from_csv(Path(source)) if Path(source).suffix.lower() == ".csv" else from_folder(Path(source))
    else:
        found = from_datasets(source)
        source = f"the {type(source).__name__}"
    if not len(found.all):
        raise ValueError(f"There are no images in {source} (looked for {', '.join(sorted(SUFFIXES))}).")
    if isinstance(found.all.dataset, ImageFiles):
        found = without_broken(found, skip_broken)
    if divide:
        complete_splits(found, source)
        check_classes(found)
    elif not found.rows.get("test"):
        found.rows = {"train": [], "val": [], "test": list(range(len(found.all)))}
    return found


def from_folder(root: Path) -> Images:
    """List the images of a folder."""
    if not root.is_dir():
        raise ValueError(f"There is no folder {root}.")
    folders = sorted(path.name for path in root.iterdir() if path.is_dir() and not path.name.startswith("."))
    given = [split for split in SPLITS if split in folders]
    if "train" not in given or len(given) < 2:
        paths, labels = list_classes(root, Path())
        return numbered(ImageFiles(root, paths), paths, labels, {})
    paths, labels, rows = [], [], {}
    for split in given:
        more, their_labels = list_classes(root, Path(split))
        rows[split] = list(range(len(paths), len(paths) + len(more)))
        paths, labels = paths + more, labels + their_labels
    return numbered(ImageFiles(root, paths), paths, labels, rows)


def list_classes(root: Path, folder: Path) -> tuple[list[str], list[str]]:
    """Return the paths under a folder and the names of their classes: the folders in it, "" without any."""
    paths: list[str] = []
    for place, folders, files in os.walk(root / folder, followlinks=True):
        folders[:] = sorted(name for name in folders if not name.startswith("."))
        images = (name for name in sorted(files) if Path(name).suffix.lower() in SUFFIXES and name[0] != ".")
        paths += [(Path(place) / name).relative_to(root).as_posix() for name in images]
    depth = len(folder.parts)
    labels = [Path(path).parts[depth] if len(Path(path).parts) > depth + 1 else "" for path in paths]
    if "" in labels and len(set(labels)) > 1:
        beside = next(path for path, label in zip(paths, labels) if label == "")
        raise ValueError(
            f"{root / folder} holds images beside the folders of classes, such as {beside}. "
            "Give a folder per class, or a flat folder without labels."
        )
    return paths, labels


def from_csv(path: Path) -> Images:
    """List the images of a CSV file; paths are relative to its folder."""
    if not path.is_file():
        raise ValueError(f"There is no file {path}.")
    with open(path, newline="", encoding="utf-8-sig") as file:
        table = csv.DictReader(file)
        lines = list(table)
    if "path" not in (table.fieldnames or ()):
        raise ValueError(f"{path} must begin with the line path,label[,split], but begins with {table.fieldnames}.")
    paths = [line["path"] for line in lines]
    missing = [name for name in paths if not (path.parent / name).is_file()]
    if missing:
        raise ValueError(f"{path} names {len(missing)} files that are not there, such as {', '.join(missing[:3])}.")
    rows: dict[str, list[int]] = {}
    if "split" in (table.fieldnames or ()):
        for row, line in enumerate(lines):
            rows.setdefault(line["split"] or "", []).append(row)
        others = sorted(set(rows) - set(SPLITS))
        if others:
            raise ValueError(f"{path} has the splits {others}; those known are train, val and test.")
    return numbered(ImageFiles(path.parent, paths), paths, [line.get("label") or "" for line in lines], rows)


def from_datasets(source: Any) -> Images:
    """Take a dataset, or a dictionary of them by split."""
    if not isinstance(source, dict):
        labels = known_labels(source)
        return numbered(source, [str(row) for row in range(len(labels))], labels, {})
    rows, labels = {}, []
    for split, dataset in source.items():
        more = known_labels(dataset)
        rows[split] = list(range(len(labels), len(labels) + len(more)))
        labels += more
    joined: Any = torch.utils.data.ConcatDataset(list(source.values()))
    return numbered(joined, [str(row) for row in range(len(labels))], labels, rows)


def known_labels(dataset: Any) -> list[str]:
    """Return the names of a dataset's labels: from ``labels`` or ``targets``, else from one pass over it."""
    for name in ("labels", "targets"):
        if hasattr(dataset, name):
            labels = getattr(dataset, name)
            break
    else:
        items = (dataset[i] for i in tqdm(range(len(dataset)), desc="labels", unit="image"))
        labels = [item[1] if type(item) in (tuple, list) and len(item) > 1 else UNLABELED for item in items]
    labels = labels.tolist() if hasattr(labels, "tolist") else labels
    return ["" if label in (UNLABELED, None) else str(label) for label in labels]


def numbered(dataset: Any, names: Sequence[str], labels: Sequence[str], rows: dict[str, list[int]]) -> Images:
    """Give each class a number, by its name."""
    # Numbers in their own order: "10" comes after "9".
    classes = sorted({label for label in labels if label}, key=lambda name: name.zfill(12) if name.isdigit() else name)
    number = {name: place for place, name in enumerate(classes)} | {"": UNLABELED}
    images = ImageSet(dataset, range(len(names)), [number[label] for label in labels], names)
    return Images(images, rows, classes, [])


def without_broken(found: Images, skip: bool) -> Images:
    """Read every file once, and name or leave out those that cannot be read."""
    files = found.all

    def broken(row: int) -> bool:
        try:
            files[row]
        except Exception:  # Pillow's readers raise what they like
            return True
        return False

    with ThreadPoolExecutor(min(8, os.cpu_count() or 1)) as pool:
        checked = tqdm(pool.map(broken, range(len(files))), total=len(files), desc="reading images", unit="image")
        bad = {row for row, is_broken in enumerate(checked) if is_broken}
    if not bad:
        return found
    names = ", ".join(files.names[row] for row in sorted(bad)[:5]) + (" and others" if len(bad) > 5 else "")
    if not skip:
        raise ValueError(
            f"{len(bad)} of {len(files)} images cannot be read: {names}. Remove them, or leave them out with "
            "--skip-broken."
        )
    notes = [f"Left out, as they cannot be read: {len(bad)} ({names})."]
    labels = files.labels.tolist()
    before = Counter(labels)
    after = Counter(label for row, label in enumerate(labels) if row not in bad)
    lonely = {label for label, count in after.items() if count == 1 and before[label] > 1} - {UNLABELED}
    if lonely:
        notes.append(
            f"Left out, as a single image is left: {', '.join(found.classes[label] for label in sorted(lonely))}."
        )
    kept = [row for row, label in enumerate(labels) if row not in bad and label not in lonely]
    place = {row: number for number, row in enumerate(kept)}
    rows = {split: [place[row] for row in those if row in place] for split, those in found.rows.items()}
    return Images(files.at(kept), rows, found.classes, found.notes + notes)


def complete_splits(found: Images, source: Any) -> None:
    """Divide what is not divided yet, by classes where there are labels."""
    rows, labels = found.rows, found.all.labels
    if rows and not rows.get("train"):
        raise ValueError(f"{source} has no images to train on.")
    if rows.get("train") and not rows.get("test") and rows.get("val"):
        rows["test"] = rows.pop("val")
        found.notes.append("The images given as val are those to test on, as there are no others.")
    if not rows:
        everything = list(range(len(labels)))
        rest, rows["train"] = divided(everything, labels, SHARES[0], source, left=4)
        share = SHARES[1] / (1 - SHARES[0])
        rows["test"], rows["val"] = divided(rest, labels, share, source)
        # What has no label cannot be tested where others have one.
        if found.all.labeled:
            for split in ("val", "test"):
                rows["train"] += [row for row in rows[split] if labels[row] == UNLABELED]
                rows[split] = [row for row in rows[split] if labels[row] != UNLABELED]
            rows["train"].sort()
    elif not rows.get("val"):
        rows["train"], rows["val"] = divided(rows["train"], labels, SHARES[1] / sum(SHARES), source)
    if any(not rows[split] for split in SPLITS):
        raise ValueError(f"{source} has too few images to train, validate and test; there are {len(labels)}.")


def divided(
    rows: list[int], labels: torch.Tensor, share: float, source: Any, left: int = 2
) -> tuple[list[int], list[int]]:
    """Return the rows that are left and a share of them: whole classes, if there are any, of which so many are left."""
    generator = torch.Generator().manual_seed(0)
    known = [row for row in rows if labels[row] != UNLABELED]
    classes, counts = labels[known].unique(return_counts=True)
    classes, others = classes[counts > 1], [row for row in rows if labels[row] == UNLABELED]
    if len(classes) >= left + 2:
        count = min(max(2, round(share * len(classes))), len(classes) - left)
        chosen = set(classes[torch.randperm(len(classes), generator=generator)[:count]].tolist())
        taken = {row for row in known if int(labels[row]) in chosen}
    elif others:
        order = torch.randperm(len(others), generator=generator).tolist()
        taken = {others[place] for place in order[: round(share * len(others))]}
    else:
        raise ValueError(
            f"{source} has too few classes to be divided into some to train, validate and test. "
            "Give at least 6 classes, or folders train, val and test."
        )
    return [row for row in rows if row not in taken], [row for row in rows if row in taken]


def check_classes(found: Images) -> None:
    """Raise ``ValueError`` for a class with one image, but for a single label among training images without."""
    for split in SPLITS:
        labels = found[split].labels
        if split == "train" and (labels == UNLABELED).any():
            continue
        classes, counts = labels.unique(return_counts=True)
        lonely = [found.classes[c] for c, n in zip(classes.tolist(), counts.tolist()) if n == 1 and c != UNLABELED]
        if lonely:
            some = ", ".join(lonely[:5]) + (" and others" if len(lonely) > 5 else "")
            raise ValueError(
                f"{len(lonely)} classes to {split} have a single image, so that it has nothing to be found by: {some}. "
                "Add images to them, or remove them."
            )
