from typing import Any

import torch
from pytorch_metric_learning.testers import GlobalEmbeddingSpaceTester

from ..datasets import Views
from ..datasets.items import data_and_label
from ..evaluation.hash_accuracy_calculator import HashAccuracyCalculator
from ..utils.tensors import check_finite

Embeddings = dict[str, tuple[torch.Tensor, torch.Tensor]]


class AsymmetricTester(GlobalEmbeddingSpaceTester):
    """PML's ``GlobalEmbeddingSpaceTester``, and beside it retrieval with the teacher.

    Large networks index a gallery once; small ones embed the queries. For each split ``all_accuracies`` has, for each
    metric of the accuracy calculator, three figures:

    - ``precision_at_1_level0``: the student's queries in the student's gallery, as in PML's tester;
    - ``teacher_precision_at_1_level0``: the teacher's in the teacher's;
    - ``asymmetric_precision_at_1_level0``: the student's queries in the teacher's gallery, each query's own row left
      out; there is none for metrics of clusters, and one of your own must read neighbours, not embeddings.

    Losses on relations alone do not bring the two spaces together, and the last figure is near zero;
    ``losses.catalogue()`` tells which do. The trainers' ``models["projection"]`` maps the student to the teacher's
    width: append it to the embedder that is tested. A dataset of ``Views`` shows each network its own.

    Args:
        *args: those of PML's tester.
        teacher: ``FrozenTeacher``, or another module from data to embeddings of the student's width. A
            ``CachedTeacher`` does not know the images of a test.
        **kwargs: those of PML's tester; batches may be tuples, with or without an index, or dictionaries.

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
        super().__init__(*args, **{"data_and_label_getter": data_and_label} | kwargs)
        if not isinstance(teacher, torch.nn.Module):
            text = "teacher must be a module that embeds data, such as FrozenTeacher"
            raise ValueError(f"{text}, but is a {type(teacher).__name__}.")
        if self.pca:
            raise ValueError(f"pca must be None, but is {self.pca}: each network would be rotated by its own.")
        self.teacher = teacher
        self.shown: torch.nn.Module | None = None
        self.queries: torch.Tensor | None = None

    def get_all_embeddings_for_all_splits(
        self, dataset_dict: dict, trunk_model: Any, embedder_model: Any, splits: list[str], collate_fn: Any
    ) -> Embeddings:
        """Embed the splits with both networks, and return what the student makes of them."""
        embed = super().get_all_embeddings_for_all_splits
        student = embed(dataset_dict, trunk_model, embedder_model, splits, collate_fn)
        # By this module a batch is told to be the teacher's.
        self.shown = torch.nn.Sequential(self.teacher)
        self.teacher_embeddings_and_labels = embed(dataset_dict, self.shown, None, splits, collate_fn)
        for split in splits:
            own, teachers = student[split][0], self.teacher_embeddings_and_labels[split][0]
            # PML would give embeddings of a diverged network the figures of chance.
            check_finite(**{f"student's embeddings of {split}": own, f"teacher's embeddings of {split}": teachers})
            if own.shape != teachers.shape:
                text = f"The student's embeddings are {own.shape[1]} wide and the teacher's {teachers.shape[1]}"
                raise ValueError(f"{text}; append a projection to the student's embedder.")
        return student

    def get_embeddings_for_eval(self, trunk_model: Any, embedder_model: Any, input_imgs: Any) -> torch.Tensor:
        """Embed a batch, or the view of it that is meant for this network."""
        student, teacher = Views.of(input_imgs)
        seen = teacher if trunk_model is self.shown else student
        return super().get_embeddings_for_eval(trunk_model, embedder_model, seen)

    def do_knn_and_accuracies(self, accuracies: dict, embeddings_and_labels: Embeddings, *splits: Any) -> None:
        """Add the figures of the student, the teacher, and the student in the teacher's gallery."""
        measure, calculator = super().do_knn_and_accuracies, self.accuracy_calculator
        queries, own_knn = embeddings_and_labels[splits[0]][0], calculator.knn_func
        across: dict[str, float] = {}
        teachers: dict[str, float] = {}
        measure(accuracies, embeddings_and_labels, *splits)
        measure(teachers, self.teacher_embeddings_and_labels, *splits)
        # PML's calculator wants a gallery that begins with the queries; the search gets the student's.
        calculator.knn_func = lambda _, k, gallery, own: own_knn(queries.to(gallery), k, gallery, own)
        self.queries = queries
        try:
            measure(across, self.teacher_embeddings_and_labels, *splits)
        finally:
            self.queries, calculator.knn_func = None, own_knn
        accuracies.update({f"teacher_{name}": value for name, value in teachers.items()})
        clusters = calculator.requires_clustering()
        accuracies.update({f"asymmetric_{n}": v for n, v in across.items() if not any(c in n for c in clusters)})

    def set_reference_and_query(self, *args: Any) -> tuple[torch.Tensor, ...]:
        """Return queries, their labels, the gallery and its labels."""
        query, *others = super().set_reference_and_query(*args)
        asked = self.queries is not None and isinstance(self.accuracy_calculator, HashAccuracyCalculator)
        return self.queries if asked else query, *others
