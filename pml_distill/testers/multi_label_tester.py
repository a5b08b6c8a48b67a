from typing import Any

import torch
from pytorch_metric_learning.testers import GlobalEmbeddingSpaceTester
from pytorch_metric_learning.utils.accuracy_calculator import AccuracyCalculator

from ..datasets.items import data_and_label
from ..evaluation.hash_accuracy_calculator import HashAccuracyCalculator

RETRIEVAL = ("precision_at_1", "r_precision", "mean_average_precision_at_r")


class MultiLabelTester(GlobalEmbeddingSpaceTester):
    """PML's ``GlobalEmbeddingSpaceTester`` for multi-hot labels, which it would take for so many hierarchy levels.

    What shares a label is relevant, to ``HashAccuracyCalculator`` and to the default, PML's calculator with its metrics
    of retrieval. The figures are named as at level 0, such as ``mean_average_precision_level0``. In a trainer
    ``label_hierarchy_level="all"`` hands multi-hot labels to the loss.

    Args:
        *args: those of PML's tester.
        **kwargs: those of PML's tester.

    Raises:
        ValueError: PML's own calculator has no ``label_comparison_fn``, and would compare all columns.

    Example:
        >>> from pml_distill.evaluation import HashAccuracyCalculator
        >>> images, labels = torch.randn(20, 8), torch.eye(4).repeat(5, 1)
        >>> calculator = HashAccuracyCalculator(include=("mean_average_precision",), device=torch.device("cpu"))
        >>> tester = MultiLabelTester(accuracy_calculator=calculator, dataloader_num_workers=0)
        >>> data = {"val": torch.utils.data.TensorDataset(images, labels)}
        >>> list(tester.test(data, 1, torch.nn.Linear(8, 16))["val"])
        ['epoch', 'mean_average_precision_level0']
    """

    accuracy_calculator: Any

    def __init__(self, *args: Any, **kwargs: Any):
        super().__init__(*args, **{"data_and_label_getter": data_and_label} | kwargs)

    def initialize_accuracy_calculator(self) -> None:
        """Take the default calculator, or check the given one."""
        if self.accuracy_calculator is None:
            self.accuracy_calculator = AccuracyCalculator(
                include=RETRIEVAL, k="max_bin_count", label_comparison_fn=lambda x, y: (x * y).any(-1)
            )
        compares = getattr(self.accuracy_calculator, "label_comparison_fn", None)
        if compares is torch.eq and not isinstance(self.accuracy_calculator, HashAccuracyCalculator):
            raise ValueError(
                "accuracy_calculator compares labels by equality, column by column. Give it label_comparison_fn=lambda "
                "x, y: (x * y).any(-1), or pass a HashAccuracyCalculator."
            )

    def do_knn_and_accuracies(self, accuracies: dict, embeddings_and_labels: dict, *splits: Any) -> None:
        """Measure one split."""
        arguments = self.set_reference_and_query(embeddings_and_labels, *splits)
        self.label_levels = [0]
        found = self.accuracy_calculator.get_accuracy(*arguments, self.ref_includes_query(*splits))
        accuracies.update({self.accuracies_keyname(name): value for name, value in found.items()})
