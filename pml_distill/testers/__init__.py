"""pytorch-metric-learning testers with a teacher."""

from .asymmetric_tester import AsymmetricTester

__all__ = ["AsymmetricTester"]
