"""Compact students, and the trunks they are compared with."""

from .compact_alexnet_student import CompactAlexNetStudent
from .compact_resnet import CompactResNet
from .hash_head import HashHead
from .small_resnet import SmallResNet

__all__ = ["CompactAlexNetStudent", "CompactResNet", "HashHead", "SmallResNet"]
