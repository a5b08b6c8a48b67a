"""Compact students, and the trunks they are compared with."""

from .small_resnet import SmallResNet

__all__ = ["SmallResNet"]
