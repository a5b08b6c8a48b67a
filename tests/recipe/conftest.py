"""Images that look like photographs to the recipe: 24 kinds of shapes, each in several places, sizes and lights."""

import random

import pytest
from PIL import Image, ImageDraw

CLASSES, EACH = 24, 8


def draw(kind, rng, size=40):
    """Return an image of one of the kinds."""
    image = Image.new("RGB", (size + 8, size), tuple(rng.randrange(200, 256) for _ in range(3)))
    pen = ImageDraw.Draw(image)
    hue, corners, holes = kind % 4, 3 + kind // 4 % 3, kind // 12
    color = [30, 30, 30]
    color[hue % 3] = 220 if hue < 3 else 30
    radius, x, y = rng.uniform(0.25, 0.4) * size, rng.uniform(0.4, 0.6) * size, rng.uniform(0.4, 0.6) * size
    shade = tuple(min(255, max(0, value + rng.randrange(-20, 21))) for value in color)
    pen.regular_polygon((x, y, radius), corners, rng.uniform(-20, 20), fill=shade)
    if holes:
        pen.ellipse((x - radius / 3, y - radius / 3, x + radius / 3, y + radius / 3), fill="white")
    return image


def write_photos(folder, classes=CLASSES, each=EACH):
    """Write a folder per class and return it."""
    rng = random.Random(0)
    for kind in range(classes):
        (folder / f"kind {kind:02}").mkdir(parents=True)
        for number in range(each):
            draw(kind, rng).save(folder / f"kind {kind:02}" / f"{number}.png")
    return folder


@pytest.fixture(scope="session")
def photos(tmp_path_factory):
    return write_photos(tmp_path_factory.mktemp("data") / "photos")
