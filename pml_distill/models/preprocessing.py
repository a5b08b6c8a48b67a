from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
import torch
from torch.nn import functional as F


@dataclass(frozen=True)
class Preprocessing:
    """What a network was trained to see: resized to cover ``size``, cropped at the centre, normalised.

    Args:
        size: (height, width) of the result.
        interpolation: ``"bilinear"``, ``"bicubic"``, ``"nearest"``, ``"lanczos"`` or another name of Pillow's.
        mean: of each channel, for values from 0 to 1; one number for grey images, three for colour.
        std: of each channel.

    Shapes:
        image: a Pillow image, or a tensor (C, H, W): uint8, or floats that are only resized and normalised. Returns
        float32 (len(mean), height, width).
    """

    size: tuple[int, int] = (224, 224)
    interpolation: str = "bilinear"
    mean: tuple[float, ...] = (0.485, 0.456, 0.406)
    std: tuple[float, ...] = (0.229, 0.224, 0.225)

    @property
    def image_shape(self) -> tuple[int, int, int]:
        """(C, H, W) of the result."""
        return (len(self.mean), *self.size)

    def __call__(self, image: Any) -> torch.Tensor:
        """Return the image as the network takes it."""
        pixels = self.resized(image) if isinstance(image, torch.Tensor) else self.fitted(image)
        mean, std = torch.tensor([self.mean, self.std])[:, :, None, None]
        return (pixels - mean) / std

    def fitted(self, image: Any) -> torch.Tensor:
        """Return a Pillow image of this size, from 0 to 1."""
        from PIL import Image, ImageOps

        image = image.convert("L" if len(self.mean) == 1 else "RGB")
        height, width = self.size
        if image.size != (width, height):
            image = ImageOps.fit(image, (width, height), Image.Resampling[self.interpolation.upper()])
        pixels = torch.from_numpy(np.array(image, dtype=np.float32)) / 255
        return pixels[None] if pixels.ndim == 2 else pixels.permute(2, 0, 1).contiguous()

    def resized(self, image: torch.Tensor) -> torch.Tensor:
        """Return a tensor of this size."""
        pixels = image.float() / 255 if image.dtype == torch.uint8 else image.float()
        height, width = self.size
        if pixels.shape[1:] != (height, width):
            scale = max(height / pixels.shape[1], width / pixels.shape[2])
            covering = [max(side, round(scale * old)) for side, old in zip(self.size, pixels.shape[1:])]
            mode = "nearest" if self.interpolation == "nearest" else "bicubic"
            mode = "bilinear" if self.interpolation == "bilinear" else mode
            pixels = F.interpolate(pixels[None], covering, mode=mode, antialias=mode != "nearest")[0]
            top, left = (covering[0] - height) // 2, (covering[1] - width) // 2
            pixels = pixels[:, top : top + height, left : left + width]
        return pixels.expand(len(self.mean), -1, -1)

    def to_dict(self) -> dict[str, Any]:
        """Return what ``Preprocessing(**values)`` takes, as JSON has it."""
        return {key: list(value) if isinstance(value, tuple) else value for key, value in asdict(self).items()}

    @classmethod
    def of(cls, values: dict[str, Any]) -> "Preprocessing":
        """Return the preprocessing that ``to_dict`` has written."""
        own: Any = {key: tuple(value) if isinstance(value, list) else value for key, value in values.items()}
        return cls(**own)
