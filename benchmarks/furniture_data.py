"""What `furniture.py` trains and tests on: images of objects, augmented views, a teacher's stored outputs.

Splits are by object, in a seeded order (60 % train, 20 % validation, 20 % test), or by author. Nothing here is random
between runs: views come from one seeded generator, so that stored outputs of a teacher fit them.
"""

import csv
import math
from collections.abc import Sequence
from functools import cache

import numpy as np
import torch
from furniture_render import CACHE
from torch import nn
from torch.nn import functional as F

SIZE = 96
TRAINED, IMAGES, VIEWS = 200, 8, 8  # objects to train on, images of each, augmented views of each image
AUTHORS = ("Scopia", "KatorLegaz", "Reallusion")  # train in the split by author
WEIGHTS = {
    "lite0": CACHE.parent / "tf_efficientnet_lite0.safetensors",
    "mobilenet": CACHE.parent / "mobilenet_v2.safetensors",
}


@cache
def images() -> tuple[torch.Tensor, list[dict[str, str]]]:
    """All images, (objects, 12, 3, 96, 96), and a dictionary of each object."""
    with open(CACHE / "objects.csv", newline="", encoding="utf-8") as file:
        objects = sorted(csv.DictReader(file), key=lambda row: row["object"])
    path = CACHE / f"images-{SIZE}.npy"
    if not path.exists():
        from PIL import Image

        def read(name: str) -> np.ndarray:
            return np.stack([
                np.asarray(Image.open(file).convert("RGB").resize((SIZE, SIZE), Image.Resampling.BILINEAR))
                for file in sorted((CACHE / "images" / name).glob("*.png"))
            ])  # fmt: skip

        np.save(path, np.stack([read(row["object"]) for row in objects]).transpose(0, 1, 4, 2, 3))
    return torch.from_numpy(np.load(path)), objects


def split(name: str, by: str = "object") -> list[int]:
    """The objects to train, validate or test on."""
    _, objects = images()
    order = np.random.default_rng(0).permutation(len(objects)).tolist()
    if by == "author":
        theirs = [i for i in order if objects[i]["author"] in AUTHORS]
        others = [i for i in order if objects[i]["author"] not in AUTHORS]
        return {"train": theirs[: int(0.8 * len(theirs))], "val": theirs[int(0.8 * len(theirs)) :], "test": others}[
            name
        ]
    first, second = int(0.6 * len(order)), int(0.8 * len(order))
    return {"train": order[:first], "val": order[first:second], "test": order[second:]}[name]


def train_images(by: str = "object") -> torch.Tensor:
    chosen = split("train", by)
    return images()[0][chosen if by == "all objects" else chosen[:TRAINED], :IMAGES].flatten(0, 1)


def test_images(part: str, by: str = "object") -> tuple[torch.Tensor, torch.Tensor]:
    """Images and labels of the objects to validate or test on."""
    found = images()[0][split(part, by)]
    return found.flatten(0, 1), torch.arange(len(found)).repeat_interleave(found.shape[1])


def augment(batch: torch.Tensor, strength: str, generator: torch.Generator) -> torch.Tensor:
    """Augment uint8 images: "weak" is mirrored and shifted; "strong" is cropped, rotated and coloured too."""
    x, size = batch.float() / 255, len(batch)

    def uniform(low: float, high: float, *shape: int) -> torch.Tensor:
        return torch.rand(size, *shape, generator=generator) * (high - low) + low

    flip = (torch.rand(size, generator=generator) < 0.5).float() * 2 - 1
    if strength == "weak":
        width = height = torch.ones(size)
        angle, dx, dy = torch.zeros(size), uniform(-0.15, 0.15), uniform(-0.15, 0.15)
    else:
        area, ratio = uniform(0.3, 1.0), torch.exp(uniform(math.log(3 / 4), math.log(4 / 3)))
        width, height = (area * ratio).sqrt().clamp(max=1), (area / ratio).sqrt().clamp(max=1)
        angle, dx, dy = uniform(-0.35, 0.35), uniform(-1, 1) * (1 - width), uniform(-1, 1) * (1 - height)
    cos, sin = angle.cos(), angle.sin()
    rows = [flip * width * cos, -height * sin, dx], [flip * width * sin, height * cos, dy]
    grid = F.affine_grid(torch.stack([torch.stack(row, 1) for row in rows], 1), list(x.shape), align_corners=False)
    y = F.grid_sample(x, grid, padding_mode="reflection", align_corners=False)
    if strength == "strong":
        y = y * uniform(0.6, 1.4, 1, 1, 1)
        mean = y.mean((1, 2, 3), keepdim=True)
        y = (y - mean) * uniform(0.6, 1.4, 1, 1, 1) + mean
        grey = y.mean(1, keepdim=True)
        y = ((y - grey) * uniform(0.5, 1.5, 1, 1, 1) + grey) * uniform(0.85, 1.15, 3, 1, 1)
        without_color = (torch.rand(size, generator=generator) < 0.1)[:, None, None, None]
        y = torch.where(without_color, y.mean(1, keepdim=True).expand_as(y), y)
    return (y.clamp(0, 1) * 255).round().byte()


def views(strength: str, by: str = "object") -> torch.Tensor:
    """Augmented views of the training images, (VIEWS, N, 3, 96, 96), made once."""
    path = CACHE / f"views-{by}-{strength}.npy"
    if not path.exists():
        own, generator = train_images(by), torch.Generator().manual_seed(1)
        parts = [augment(part, strength, generator) for _ in range(VIEWS) for part in own.split(200)]
        np.save(path, torch.cat(parts).reshape(VIEWS, *own.shape).numpy())
    return torch.from_numpy(np.load(path, mmap_mode="r+"))


def resized(batch: torch.Tensor, size: int) -> torch.Tensor:
    if size == SIZE:
        return batch
    small = [F.interpolate(part.float(), size=size, mode="bilinear", antialias=True) for part in batch.split(400)]
    return (torch.cat(small) + 0.5).clamp(0, 255).byte()


def small_views(strength: str, size: int, by: str = "object") -> torch.Tensor:
    """The views as a student of smaller images sees them, made once."""
    path = CACHE / f"views-{by}-{strength}-{size}.npy"
    if not path.exists():
        np.save(path, np.stack([resized(view, size).numpy() for view in views(strength, by)]))
    return torch.from_numpy(np.load(path))


def normalized(batch: torch.Tensor) -> torch.Tensor:
    """From uint8 to what the networks take, about -1 to 1."""
    return (batch.float() / 127.5 - 1).contiguous(memory_format=torch.channels_last)


class PlainStudent(nn.Module):
    """Four convolutions of stride 2 with batch norm, averaged: 0.39 M parameters at width 32."""

    def __init__(self, width: int = 32):
        super().__init__()
        self.width = 8 * width
        layers: list[nn.Module] = []
        for before, after in ((3, width), (width, 2 * width), (2 * width, 4 * width), (4 * width, 8 * width)):
            layers += [nn.Conv2d(before, after, 3, 2, 1, bias=False), nn.BatchNorm2d(after), nn.ReLU(inplace=True)]
        self.layers = nn.Sequential(*layers)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.layers(x).mean((2, 3))


def teacher_network(name: str = "lite0", pretrained: bool = True) -> nn.Module:
    """EfficientNet-Lite0 or MobileNetV2 with the weights of `furniture_weights.py`, pooled features, in eval mode."""
    import timm
    import torchvision
    from safetensors.torch import load_file

    network = timm.create_model("tf_efficientnet_lite0") if name == "lite0" else torchvision.models.mobilenet_v2()
    if pretrained:
        network.load_state_dict(load_file(WEIGHTS[name]))
    network.classifier = nn.Identity()
    return network.eval().requires_grad_(False).to(memory_format=torch.channels_last)


@torch.no_grad()
def embed(network: nn.Module, batch: torch.Tensor) -> torch.Tensor:
    network.eval()
    return torch.cat([network(normalized(part)) for part in batch.split(128)])


def teacher_outputs(name: str, strength: str, by: str = "object") -> torch.Tensor:
    """A teacher's outputs for all views, (VIEWS, N, 1280), computed once."""
    path = CACHE / f"outputs-{by}-{name}-{strength}.npy"
    if not path.exists():
        network = teacher_network(name)
        np.save(path, np.stack([embed(network, view).numpy() for view in views(strength, by)]))
    return torch.from_numpy(np.load(path))


def teacher_on(part: str, name: str, by: str = "object") -> torch.Tensor:
    """A teacher's outputs for the images to validate or test on, computed once."""
    path = CACHE / f"outputs-{by}-{name}-{part}.npy"
    if not path.exists():
        np.save(path, embed(teacher_network(name), test_images(part, by)[0]).numpy())
    return torch.from_numpy(np.load(path))


class StoredViews(torch.utils.data.Dataset):
    """(image, label, row) of stored views; reading a sample returns one of them, as `SeededViews` does."""

    def __init__(self, stored: torch.Tensor, labels: Sequence[int] | torch.Tensor):
        self.stored, self.labels = stored, torch.as_tensor(labels)

    def __len__(self) -> int:
        return len(self.labels)

    def __getitem__(self, index: int) -> tuple:
        return self.__getitems__([index])[0]

    def __getitems__(self, indices: Sequence[int]) -> list[tuple]:
        drawn = torch.randint(len(self.stored), (len(indices),)).tolist()
        return [
            (normalized(self.stored[view, i][None])[0], int(self.labels[i]), view * len(self) + i)
            for view, i in zip(drawn, indices)
        ]


def known_labels(count: int, labeled: int, seed: int) -> torch.Tensor:
    """The labels of the training images, -1 where unknown: so many images of each object keep theirs."""
    generator = torch.Generator().manual_seed(seed)
    labels = torch.full((count, IMAGES), -1)
    for number in range(count):
        labels[number, torch.randperm(IMAGES, generator=generator)[:labeled]] = number
    return labels.flatten()
