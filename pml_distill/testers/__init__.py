"""pytorch-metric-learning testers with a teacher, for multi-hot labels, and for embeddings cut short."""

from .asymmetric_tester import AsymmetricTester
from .multi_label_tester import MultiLabelTester
from .width_tester import WidthTester

__all__ = ["AsymmetricTester", "MultiLabelTester", "WidthTester"]
