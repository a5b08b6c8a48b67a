from typing import Any

import torch
from pytorch_metric_learning.testers import GlobalEmbeddingSpaceTester

from ..datasets import Views
from ..evaluation.asymmetric_accuracy import asked_by
from ..evaluation.hash_accuracy_calculator import HashAccuracyCalculator
from ..utils.tensors import check_finite

Embeddings = dict[str, tuple[torch.Tensor, torch.Tensor]]


class AsymmetricTester(GlobalEmbeddingSpaceTester):
    """PML's ``GlobalEmbeddingSpaceTester``, and beside it retrieval with the teacher.

    Large networks index a gallery once; small ones embed the queries. For each split ``all_accuracies`` has, for each
    metric of the accuracy calculator, three figures:

    - ``precision_at_1_level0``: the student's queries in the student's gallery, as in PML's tester;
    - ``teacher_precision_at_1_level0``: the teacher's in the teacher's;
    - ``asymmetric_precision_at_1_level0``: the student's queries in the teacher's gallery; metrics of clusters have no
      such figure, and one of your own must read neighbours, not embeddings: those are the teacher's. A query's own
      row of the gallery is left out by its place.

    Losses on relations alone do not bring the two spaces together, and the last figure is near zero;
    ``losses.catalogue()`` tells which do. ``HookContainer`` logs all three. The trainers' ``models["projection"]`` maps
    the student to the teacher's width: append it to the embedder that is tested.

    A dataset of ``Views`` shows each network its own. For one that yields an index too, such as ``SeededViews``, give
    ``data_and_label_getter=lambda batch: batch[:2]``, as for PML's tester.

    Args:
        *args: those of PML's tester.
        teacher: ``FrozenTeacher``, or another module from data to embeddings of the student's width. A
            ``CachedTeacher`` does not know the images of a test.
        **kwargs: those of PML's tester.

    Raises:
        ValueError: ``teacher`` is no module; ``pca`` is given, which PML would fit to each network for itself; student
            and teacher have embeddings of different widths, or not finite.

    Example:
        >>> from pml_distill.datasets import Digits
        >>> from pml_distill.models import SmallResNet
        >>> from pml_distill.teachers import FrozenTeacher
        >>> tester = AsymmetricTester(teacher=FrozenTeacher(SmallResNet(4)), dataloader_num_workers=0)
        >>> split = torch.utils.data.Subset(Digits("test"), range(40))
        >>> accuracies = tester.test({"test": split}, epoch=1, trunk_model=SmallResNet(4))["test"]
        >>> sorted(name for name in accuracies if "mean_average_precision_at_r" in name)[:2]
        ['asymmetric_mean_average_precision_at_r_level0', 'mean_average_precision_at_r_level0']
    """

    def __init__(self, *args: Any, teacher: Any, **kwargs: Any):
        super().__init__(*args, **kwargs)
        if not isinstance(teacher, torch.nn.Module):
            raise ValueError(
                f"teacher must be a module that embeds data, such as FrozenTeacher, but is a {type(teacher).__name__}."
            )
        if self.pca:
            raise ValueError(
                f"pca must be None, but is {self.pca}: it is fitted to each network for itself, and neither could "
                "search the other's gallery."
            )
        self.teacher, self.teacher_looks = teacher, False
        self.queries: torch.Tensor | None = None

    def get_all_embeddings_for_all_splits(
        self, dataset_dict: dict, trunk_model: Any, embedder_model: Any, splits: list[str], collate_fn: Any
    ) -> Embeddings:
        """Embed the splits with both networks, and return what the student makes of them."""
        student = super().get_all_embeddings_for_all_splits(
            dataset_dict, trunk_model, embedder_model, splits, collate_fn
        )
        self.teacher_looks = True
        try:
            self.teacher_embeddings_and_labels = super().get_all_embeddings_for_all_splits(
                dataset_dict, self.teacher, None, splits, collate_fn
            )
        finally:
            self.teacher_looks = False
        for split in splits:
            both = {"student's": student[split][0], "teacher's": self.teacher_embeddings_and_labels[split][0]}
            # PML would give embeddings of a diverged network the figures of chance.
            check_finite(**{f"{name} embeddings of {split}": rows for name, rows in both.items()})
            widths = student[split][0].shape[1], self.teacher_embeddings_and_labels[split][0].shape[1]
            if widths[0] != widths[1]:
                raise ValueError(
                    f"The student's embeddings are {widths[0]} wide and the teacher's {widths[1]}, so that neither can "
                    "search the other's gallery; append a projection to the student's embedder."
                )
        return student

    def get_embeddings_for_eval(self, trunk_model: Any, embedder_model: Any, input_imgs: Any) -> torch.Tensor:
        """Embed a batch, or the view of it that is meant for this network."""
        student, teacher = Views.of(input_imgs)
        return super().get_embeddings_for_eval(trunk_model, embedder_model, teacher if self.teacher_looks else student)

    def do_knn_and_accuracies(
        self, accuracies: dict, embeddings_and_labels: Embeddings, query_split_name: str, references: list[str]
    ) -> None:
        """Add the figures of the student, the teacher, and the student in the teacher's gallery."""
        splits = query_split_name, references
        super().do_knn_and_accuracies(accuracies, embeddings_and_labels, *splits)
        calculator, queries = self.accuracy_calculator, embeddings_and_labels[query_split_name][0]
        own_knn = calculator.knn_func

        for name in ("teacher", "asymmetric"):
            found: dict[str, float] = {}
            if name == "asymmetric" and isinstance(calculator, HashAccuracyCalculator):
                self.queries = queries
            elif name == "asymmetric":
                # PML's calculator wants a gallery that begins with the queries.
                calculator.knn_func = asked_by(queries, own_knn)
            try:
                super().do_knn_and_accuracies(found, self.teacher_embeddings_and_labels, *splits)
            finally:
                self.queries, calculator.knn_func = None, own_knn
            clusters = calculator.requires_clustering() if name == "asymmetric" else ()
            accuracies.update(
                {f"{name}_{key}": value for key, value in found.items() if not any(c in key for c in clusters)}
            )

    def set_reference_and_query(self, *args: Any) -> tuple[torch.Tensor, ...]:
        """Return queries, their labels, the gallery and its labels."""
        query, *others = super().set_reference_and_query(*args)
        return query if self.queries is None else self.queries, *others
