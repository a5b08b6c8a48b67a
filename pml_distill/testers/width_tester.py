from typing import Any

import torch
from pytorch_metric_learning.testers import GlobalEmbeddingSpaceTester

from ..datasets.items import data_and_label
from ..evaluation.accuracy_by_width import check_widths


class WidthTester(GlobalEmbeddingSpaceTester):
    """PML's ``GlobalEmbeddingSpaceTester``, and beside it the figures of nested (Matryoshka) embeddings cut short.

    ``precision_at_1_level0`` is that of whole embeddings, ``width_32_precision_at_1_level0`` that of their first 32
    coordinates, normalised anew if ``normalize_embeddings``.

    Args:
        *args: those of PML's tester.
        widths: how many of the leading coordinates are kept.
        **kwargs: those of PML's tester.

    Example:
        >>> data = {"val": torch.utils.data.TensorDataset(torch.randn(20, 8), torch.arange(20) // 2)}
        >>> tester = WidthTester(widths=(4,), dataloader_num_workers=0)
        >>> "width_4_precision_at_1_level0" in tester.test(data, 1, torch.nn.Linear(8, 16))["val"]
        True
    """

    def __init__(self, *args: Any, widths: tuple[int, ...], **kwargs: Any):
        super().__init__(*args, **{"data_and_label_getter": data_and_label} | kwargs)
        self.widths = widths

    def do_knn_and_accuracies(self, accuracies: dict, embeddings_and_labels: dict, *splits: Any) -> None:
        """Add the figures of whole and of shorter embeddings."""
        super().do_knn_and_accuracies(accuracies, embeddings_and_labels, *splits)
        check_widths(self.widths, embeddings_and_labels[splits[0]][0].shape[1])
        for width in self.widths:
            found: dict[str, float] = {}
            cut = {split: (rows[:, :width].contiguous(), y) for split, (rows, y) in embeddings_and_labels.items()}
            if self.normalize_embeddings:
                cut = {split: (torch.nn.functional.normalize(rows), y) for split, (rows, y) in cut.items()}
            super().do_knn_and_accuracies(found, cut, *splits)
            accuracies.update({f"width_{width}_{name}": value for name, value in found.items()})
