import os
import warnings
import zipfile
import zlib
from pathlib import Path

import numpy as np

from ..utils.files import whole_file
from .class_disjoint_images import ClassDisjointImages

VERSION = 1
FAMILIES = ("DejaVuSans", "DejaVuSerif", "STIXGeneral")
RESOLUTION = 64


class Glyphs(ClassDisjointImages):
    """Printed characters: a class per character, an image per face. The offline default dataset.

    The characters that the 16 text faces of matplotlib have in common: about 680 classes of 16 images. Characters that
    look alike (the Latin, Greek and Cyrillic A) are one class: those whose squared difference, averaged over the
    faces, is below 6 % of the fainter one's squared ink. They are rendered at the first use and cached in
    ``$XDG_CACHE_HOME/pml_distill`` (by default under ``~/.cache``), for each version of matplotlib.

    Args:
        split: ``"train"``, ``"val"`` (a fifth of the training classes), ``"train+val"`` or ``"test"`` (half of
            all classes); the classes are disjoint.
        size: side of the images, 8 to 64 pixels, by default 32. channels: 1, or 3 equal ones.
        augment: whether each read is jittered anew (affine map and noise); None: for the training splits. Without, a
            fixed jittered copy.
        return_index: whether items are (image, label, index) instead of (image, label): float32 (channels, size, size),
            about -1 to 1, and an int.
        seed: decides which classes belong to which split, and the fixed jitter.

    Attributes:
        labels: (len,) int64 tensor. characters: the character of each class, by label.
    """

    default_size = 32

    def load(self) -> tuple[np.ndarray, np.ndarray]:
        """Return the images and their labels."""
        images, labels, self.characters = cached_glyphs()
        return images, labels


def cached_glyphs() -> tuple[np.ndarray, np.ndarray, str]:
    """Return images (N, 64, 64), labels (N,) and the characters, from the cache if it is whole."""
    path: Path | None = None
    try:
        path = cache_path()
        if path.exists():
            with np.load(path) as archive:
                return archive["images"], archive["labels"], str(archive["characters"])
    except (OSError, RuntimeError, ValueError, KeyError, EOFError, zipfile.BadZipFile, zlib.error) as error:
        text = "Glyphs are not cached, there is no place for them" if path is None else f"The cache {path} is damaged"
        warnings.warn(f"{text} ({error}).", stacklevel=3)
    images, labels, characters = render_glyphs()
    if path is not None:
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            with whole_file(path) as unfinished, open(unfinished, "wb") as file:
                np.savez_compressed(file, images=images, labels=labels, characters=np.array(characters))
        except OSError as error:
            warnings.warn(f"Glyphs are not cached, {path} cannot be written ({error}).", stacklevel=3)
    return images, labels, characters


def cache_path() -> Path:
    """Return where the images are cached that this matplotlib renders."""
    try:
        import matplotlib
        from matplotlib import ft2font
    except ModuleNotFoundError as error:
        raise ModuleNotFoundError(f'{error}. Glyphs need matplotlib: pip install "pml-distill[train]"') from error

    folder = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "pml_distill"
    versions = f"matplotlib-{matplotlib.__version__}-freetype-{ft2font.__freetype_version__}"
    return folder / f"glyphs-v{VERSION}-{versions}.npz"


def render_glyphs() -> tuple[np.ndarray, np.ndarray, str]:
    """Render all classes: images (16 C, 64, 64), labels (16 C,) and the C characters."""
    import matplotlib
    from matplotlib.ft2font import FT2Font
    from scipy.sparse.csgraph import connected_components

    files = sorted((Path(matplotlib.get_data_path()) / "fonts" / "ttf").glob("*.ttf"))
    faces = [FT2Font(str(f)) for f in files if f.stem.startswith(FAMILIES) and not f.stem.endswith("Display")]
    characters = [chr(code) for code in sorted(set.intersection(*(set(face.get_charmap()) for face in faces)))]
    images = np.stack([[render(face, character) for face in faces] for character in characters])
    inked = np.any(images, axis=(2, 3)).all(axis=1)
    images, characters = images[inked], [c for c, ink in zip(characters, inked) if ink]

    ink = images[:, :, ::2, ::2].reshape(*images.shape[:2], -1).astype(np.float32)
    squares = np.square(ink).sum(axis=2)
    difference = np.zeros((len(characters), len(characters)), dtype=np.float32)
    for face in range(len(faces)):
        norms = squares[:, face]
        squared = norms[:, None] + norms - 2 * ink[:, face] @ ink[:, face].T
        difference += squared / np.minimum(norms[:, None], norms) / len(faces)
    _, groups = connected_components(difference < 0.06)
    first = np.sort(np.unique(groups, return_index=True)[1])
    labels = np.repeat(np.arange(len(first)), len(faces))
    return images[first].reshape(-1, RESOLUTION, RESOLUTION), labels, "".join(characters[i] for i in first)


def render(face, character: str) -> np.ndarray:
    """Return a character as a (64, 64) uint8 image, centred by its ink."""
    face.set_size(0.72 * RESOLUTION, 72)
    face.set_text(character, 0.0)
    face.draw_glyphs_to_bitmap(antialiased=True)
    bitmap = np.asarray(face.get_image())
    canvas = np.zeros((RESOLUTION, RESOLUTION), dtype=np.uint8)
    rows, columns = np.nonzero(bitmap.any(axis=1))[0], np.nonzero(bitmap.any(axis=0))[0]
    if len(rows) == 0:
        return canvas
    bitmap = bitmap[rows[0] : rows[-1] + 1, columns[0] : columns[-1] + 1]
    for axis in (0, 1):
        excess = max(0, bitmap.shape[axis] - RESOLUTION)
        bitmap = bitmap.take(range(excess // 2, bitmap.shape[axis] - (excess - excess // 2)), axis)
    height, width = bitmap.shape
    top, left = (RESOLUTION - height) // 2, (RESOLUTION - width) // 2
    canvas[top : top + height, left : left + width] = bitmap
    return canvas
