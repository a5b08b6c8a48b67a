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
from torch.utils.data import ConcatDataset, Dataset
from tqdm import tqdm

from ..datasets.items import UNLABELED

SUFFIXES = {".bmp", ".gif", ".jpeg", ".jpg", ".pgm", ".png", ".ppm", ".tif", ".tiff", ".webp"}
SPLITS = ("train", "val", "test")
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
    """Some images of a dataset, with class numbers, -1 where there is none, and names; items are (image, label)."""

    def __init__(self, dataset: Any, indices: Sequence[int], labels: Any, names: Sequence[str]):
        self.dataset, self.indices, self.names = dataset, list(indices), list(names)
        self.labels = torch.as_tensor(labels, dtype=torch.int64)

    def __len__(self) -> int:
        return len(self.indices)

    def __getitem__(self, index: int) -> tuple[Any, int]:
        item = self.dataset[self.indices[index]]
        return item[0] if type(item) in (tuple, list) else item, int(self.labels[index])

    def at(self, rows: Iterable[int]) -> "ImageSet":
        """Return these of the images."""
        rows = list(rows)
        indices, names = [self.indices[row] for row in rows], [self.names[row] for row in rows]
        return ImageSet(self.dataset, indices, self.labels[rows], names)

    @property
    def labeled(self) -> bool:
        """Whether any image has a label."""
        return bool((self.labels != UNLABELED).any())


@dataclass
class Images:
    """All images in order, the rows of each split among them, the classes by label, and notes for the user."""

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
        found = [self[split].labels for split in SPLITS]
        classes = "/".join(str(len(labels[labels != UNLABELED].unique())) for labels in found)
        kinds = f"of {classes} classes" if self.all.labeled else "without labels"
        train, val, test = map(len, found)
        text = f"{len(self.all):,} images {kinds}: {train:,} to train, {val:,} to validate, {test:,} to test."
        return " ".join([text, *self.notes])


def find_images(source: Any, skip_broken: bool = False, divide: bool = True) -> Images:
    """Find images, read each once, and divide them.

    Without given splits, classes are divided (60 % train, 20 % validate, 20 % test), or images where there are no
    labels; always the same way. Images without a label train, where others have one.

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
        found = from_datasets(source if isinstance(source, dict) else {"": source})
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
    given = [split for split in SPLITS if (root / split).is_dir()]
    given = given if "train" in given and len(given) > 1 else [""]
    paths, labels, splits = [], [], []  # type: tuple[list[str], list[str], list[str]]
    for split in given:
        images: list[str] = []
        for place, folders, files in os.walk(root / split, followlinks=True):
            folders[:] = sorted(name for name in folders if not name.startswith("."))
            names = (name for name in sorted(files) if Path(name).suffix.lower() in SUFFIXES and name[0] != ".")
            images += [(Path(place) / name).relative_to(root / split).as_posix() for name in names]
        classes = [name.partition("/")[0] if "/" in name else "" for name in images]
        if "" in classes and len(set(classes)) > 1:
            raise ValueError(
                f"{root / split} holds images beside the folders of classes, such as {images[classes.index('')]}. "
                "Give a folder per class, or a flat folder without labels."
            )
        paths += [f"{split}/{name}" if split else name for name in images]
        labels, splits = labels + classes, splits + [split] * len(images)
    return numbered(ImageFiles(root, paths), paths, labels, splits)


def from_csv(path: Path) -> Images:
    """List the images of a CSV file; paths are relative to its folder."""
    if not path.is_file():
        raise ValueError(f"There is no file {path}.")
    with open(path, newline="", encoding="utf-8-sig") as file:
        table = csv.DictReader(file)
        lines = list(table)
    if "path" not in (table.fieldnames or ()):
        raise ValueError(f"{path} must begin with the line path,label[,split], but begins with {table.fieldnames}.")
    paths, splits = [line["path"] for line in lines], [line.get("split") or "" for line in lines]
    missing = [name for name in paths if not (path.parent / name).is_file()]
    if missing:
        raise ValueError(f"{path} names {len(missing)} files that are not there, such as {', '.join(missing[:3])}.")
    if any(splits) and not set(splits) <= set(SPLITS):
        raise ValueError(f"{path} has the splits {sorted(set(splits))}; those known are train, val and test.")
    return numbered(ImageFiles(path.parent, paths), paths, [line.get("label") or "" for line in lines], splits)


def from_datasets(datasets: dict[str, Any]) -> Images:
    """Take the images and labels of datasets by split; labels are ``labels`` or ``targets``, or in the items."""
    labels, splits = [], []  # type: tuple[list[str], list[str]]
    for split, dataset in datasets.items():
        known = getattr(dataset, "labels", getattr(dataset, "targets", None))
        if known is None:
            items = (dataset[i] for i in tqdm(range(len(dataset)), desc="labels", unit="image"))
            known = [item[1] if type(item) in (tuple, list) and len(item) > 1 else UNLABELED for item in items]
        known = known.tolist() if hasattr(known, "tolist") else known
        labels += ["" if label in (UNLABELED, None) else str(label) for label in known]
        splits += [split] * len(known)
    joined: Any = ConcatDataset(list(datasets.values()))
    return numbered(joined, [str(row) for row in range(len(labels))], labels, splits)


def numbered(dataset: Any, names: Sequence[str], labels: Sequence[str], splits: Sequence[str]) -> Images:
    """Give each class a number, in the order of the names, of numbers in their own; "" is no label and no split."""
    classes = sorted({label for label in labels if label}, key=lambda name: name.zfill(12) if name.isdigit() else name)
    number = {name: place for place, name in enumerate(classes)} | {"": UNLABELED}
    rows = {split: [row for row, own in enumerate(splits) if own == split] for split in SPLITS if split in splits}
    return Images(ImageSet(dataset, range(len(names)), [number[label] for label in labels], names), rows, classes, [])


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
    names = some([files.names[row] for row in sorted(bad)])
    if not skip:
        advice = "Remove them, or leave them out with --skip-broken."
        raise ValueError(f"{len(bad)} of {len(files)} images cannot be read: {names}. {advice}")
    notes = [f"Left out, as they cannot be read: {len(bad)} ({names})."]
    labels = files.labels.tolist()
    before, after = Counter(labels), Counter(label for row, label in enumerate(labels) if row not in bad)
    lonely = [label for label in sorted(after) if after[label] == 1 < before[label] and label != UNLABELED]
    if lonely:
        notes.append(f"Left out, as a single image is left: {some([found.classes[label] for label in lonely])}.")
    kept = [row for row, label in enumerate(labels) if row not in bad and label not in lonely]
    place = {row: number for number, row in enumerate(kept)}
    rows = {split: [place[row] for row in those if row in place] for split, those in found.rows.items()}
    return Images(files.at(kept), rows, found.classes, notes)


def complete_splits(found: Images, source: Any) -> None:
    """Divide what is not divided yet."""
    rows, labels = found.rows, found.all.labels
    if not rows:
        rest, rows["train"] = divided(range(len(labels)), labels, 0.6, source, left=4)
        rows["test"], rows["val"] = divided(rest, labels, 0.5, source)
        if found.all.labeled:
            for split in ("val", "test"):
                rows["train"] += [row for row in rows[split] if labels[row] == UNLABELED]
                rows[split] = [row for row in rows[split] if labels[row] != UNLABELED]
            rows["train"].sort()
    if rows.get("train") and not rows.get("test") and rows.get("val"):
        rows["test"] = rows.pop("val")
        found.notes.append("The images given as val are those to test on, as there are no others.")
    if rows.get("train") and not rows.get("val"):
        rows["train"], rows["val"] = divided(rows["train"], labels, 0.25, source)
    if not all(rows.get(split) for split in SPLITS):
        raise ValueError(f"{source} has too few images to train, validate and test.")


def divided(
    rows: Sequence[int], labels: torch.Tensor, share: float, source: Any, left: int = 2
) -> tuple[list[int], list[int]]:
    """Return the rows that are left and a share of them: whole classes, if there are any, of which so many are left."""
    generator = torch.Generator().manual_seed(0)
    known, others = ([row for row in rows if (labels[row] == UNLABELED) == none] for none in (False, True))
    classes, counts = labels[known].unique(return_counts=True)
    classes = classes[counts > 1]
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
        classes, counts = labels.unique(return_counts=True)
        lonely = [found.classes[c] for c, n in zip(classes.tolist(), counts.tolist()) if n == 1 and c != UNLABELED]
        if lonely and not (split == "train" and (labels == UNLABELED).any()):
            raise ValueError(
                f"{len(lonely)} classes to {split} have a single image, so that it has nothing to be found by: "
                f"{some(lonely)}. Add images to them, or remove them."
            )


def some(names: Sequence[str]) -> str:
    """Return up to five names."""
    return ", ".join(names[:5]) + (" and others" if len(names) > 5 else "")
