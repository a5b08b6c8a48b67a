from typing import Any

from pytorch_metric_learning.testers import GlobalEmbeddingSpaceTester


class MultiLabelTester(GlobalEmbeddingSpaceTester):
    """PML's ``GlobalEmbeddingSpaceTester`` for multi-hot labels, which it would take for so many hierarchy levels.

    The accuracy calculator gets all columns at once: ``HashAccuracyCalculator`` counts as relevant what shares a label.
    The figures are named as at level 0, such as ``mean_average_precision_level0``, so that ``HookContainer`` finds
    them. In a trainer ``label_hierarchy_level="all"`` hands multi-hot labels to the loss.

    Args:
        *args: those of PML's tester.
        **kwargs: those of PML's tester.

    Example:
        >>> import torch
        >>> from pml_distill.evaluation import HashAccuracyCalculator
        >>> images, labels = torch.randn(20, 8), torch.eye(4).repeat(5, 1)
        >>> calculator = HashAccuracyCalculator(include=("mean_average_precision",), device=torch.device("cpu"))
        >>> tester = MultiLabelTester(accuracy_calculator=calculator, dataloader_num_workers=0)
        >>> data = {"val": torch.utils.data.TensorDataset(images, labels)}
        >>> list(tester.test(data, 1, torch.nn.Linear(8, 16))["val"])
        ['epoch', 'mean_average_precision_level0']
    """

    def do_knn_and_accuracies(
        self,
        accuracies: dict[str, Any],
        embeddings_and_labels: dict[str, Any],
        query_split_name: str,
        reference_split_names: list[str],
    ) -> None:
        """Measure one split."""
        query, query_labels, reference, reference_labels = self.set_reference_and_query(
            embeddings_and_labels, query_split_name, reference_split_names
        )
        self.label_levels = [0]
        found = self.accuracy_calculator.get_accuracy(
            query,
            query_labels,
            reference,
            reference_labels,
            self.ref_includes_query(query_split_name, reference_split_names),
        )
        accuracies.update({self.accuracies_keyname(name): value for name, value in found.items()})
