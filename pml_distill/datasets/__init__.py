"""Datasets: ``Glyphs`` and ``Digits`` need no download; CUB, Cars196 and SOP are PML's own classes."""

from typing import Any

from .cross_quality import CrossQuality
from .digits import Digits
from .glyphs import Glyphs
from .hashing_protocols import HashingSplit, MultiLabelList, cifar10_hashing, glyph_hashing, hashing_splits
from .items import Views
from .labeled_and_unlabeled import LabeledAndUnlabeled
from .partially_labeled import PartiallyLabeled
from .seeded_views import SeededViews

FROM_PML = ("CUB", "Cars196", "StanfordOnlineProducts")

__all__ = [
    "CUB",
    "Cars196",
    "CrossQuality",
    "Digits",
    "Glyphs",
    "HashingSplit",
    "LabeledAndUnlabeled",
    "MultiLabelList",
    "PartiallyLabeled",
    "SeededViews",
    "StanfordOnlineProducts",
    "Views",
    "cifar10_hashing",
    "glyph_hashing",
    "hashing_splits",
]


def __getattr__(name: str) -> Any:
    # PML's datasets import torchvision, which costs more than all of this package.
    if name in FROM_PML:
        from pytorch_metric_learning import datasets

        return getattr(datasets, name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
