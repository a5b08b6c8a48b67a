"""Small tools that several rooms share."""

from .feature_tap import FeatureTap

__all__ = ["FeatureTap"]
