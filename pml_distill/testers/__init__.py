"""pytorch-metric-learning testers with a teacher, and for multi-hot labels."""

from .asymmetric_tester import AsymmetricTester
from .multi_label_tester import MultiLabelTester

__all__ = ["AsymmetricTester", "MultiLabelTester"]
