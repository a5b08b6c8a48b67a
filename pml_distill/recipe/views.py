"""One random augmentation for both networks, then what each of them was trained to see."""

from collections.abc import Callable
from typing import Any

import torch
from torch.utils.data import Dataset

from ..datasets import Views
from ..models import Preprocessing
from .images import ImageSet

#: The least share of an image's area that a view shows.
LEAST_AREA = 0.4


class Augmentation:
    """A square part of an image, perhaps mirrored, its colours jittered a little. Images keep their resolution."""

    def __init__(self) -> None:
        from torchvision.transforms import v2

        self.rest = v2.Compose([v2.RandomHorizontalFlip(), v2.ColorJitter(0.3, 0.3, 0.2)])

    def __repr__(self) -> str:
        return f"Augmentation({LEAST_AREA}, {self.rest!r})"

    def __call__(self, image: Any) -> Any:
        """Return a view of a Pillow image or a tensor (C, H, W)."""
        tensor = isinstance(image, torch.Tensor)
        height, width = image.shape[1:] if tensor else (image.height, image.width)
        area, x, y = torch.rand(3).tolist()
        side = max(1, round(min(height, width) * (LEAST_AREA + (1 - LEAST_AREA) * area) ** 0.5))
        left, top = round(x * (width - side)), round(y * (height - side))
        if tensor:
            return self.rest(image[:, top : top + side, left : left + side])
        return self.rest(image.crop((left, top, left + side, top + side)))


class SharedViews(Dataset):
    """Images augmented once, then prepared for one network or, as ``Views``, for both.

    Args:
        images: an ``ImageSet``.
        transform: the random augmentation, from an image to one; None for none.
        student: the student's preprocessing; None where only the teacher is asked.
        teacher: the teacher's; None where its outputs are stored.
    """

    def __init__(
        self,
        images: ImageSet,
        transform: Callable[[Any], Any] | None,
        student: Preprocessing | None,
        teacher: Preprocessing | None,
    ):
        self.dataset, self.transform = images, transform
        self.student, self.teacher = student, teacher

    @property
    def labels(self) -> torch.Tensor:
        """Those of the images."""
        return self.dataset.labels

    def __len__(self) -> int:
        return len(self.dataset)

    def __getitem__(self, index: int) -> tuple[Any, int]:
        image, label = self.dataset[index]
        image = image if self.transform is None else self.transform(image)
        sides = [side(image) for side in (self.student, self.teacher) if side is not None]
        return (Views(*sides) if len(sides) == 2 else sides[0]), label


def loader_of(dataset: Dataset, batch_size: int, workers: int, progress: str = "") -> Any:
    """Return a loader that goes through a dataset in order, with a progress bar where it has a name."""
    from torch.utils.data import DataLoader
    from tqdm import tqdm

    # A generator of its own leaves the global one as it is.
    loader: Any = DataLoader(dataset, batch_size, num_workers=workers, generator=torch.Generator())
    return tqdm(loader, desc=progress, unit="batch", disable=not progress)
