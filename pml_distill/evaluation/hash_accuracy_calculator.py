import os
from collections.abc import Callable, Iterable
from typing import Any

import numpy as np
import torch
from pytorch_metric_learning.utils.accuracy_calculator import AccuracyCalculator

from ..distances.packed_codes import is_packed
from ..utils.labels import flat
from .hamming_knn import HammingKNN
from .hamming_ranking import Ranking
from .tied_ranking import average_precision, relevant_within

TIES = ("expected", "stable", "best", "worst")
DEFAULT = ("mean_average_precision", "precision_within_radius", "precision_at_k", "recall_at_k")
METRICS = (*DEFAULT, "mean_average_precision_within_radius")
Values = torch.Tensor | np.ndarray
Prepared = tuple[torch.Tensor, torch.Tensor, Any, torch.Tensor, bool]


class HashAccuracyCalculator(AccuracyCalculator):
    r"""Retrieval by Hamming distance: PML's ``AccuracyCalculator`` for binary codes.

    The signs of the embeddings are the codes (0 counts as -1). Items of the same class, or that share a label of
    multi-hot labels, are relevant. Metrics, means over the queries:

    - ``mean_average_precision`` of the first k items, :math:`\sum_{j \le k} \mathrm{rel}_j \frac{R_j}{j} / R_k` with
      R_j relevant items among the first j. **The divisor is R_k, the relevant items found within the first k**, as in
      the hashing literature (PML's own divides by all relevant items); 0 where there are none.
    - ``precision_within_radius``: the share of relevant items among all within Hamming distance ``radius``; 0 where
      there are none. ``mean_average_precision_within_radius``: the average precision of these, the figure of DCH.
    - ``precision_at_k``: the share of relevant items among the first k. ``recall_at_k``: the share of all relevant
      items that is among them, 0 where there are none.

    PML's metrics are there too, by ``include``, with ``HammingKNN``. They need class labels, or multi-hot ones with a
    ``label_comparison_fn``, which then decides relevance for all metrics.

    The default is the exact expectation over all orders of items at equal distances (McSherry & Najork, "Computing
    Information Retrieval Performance Measures Efficiently in the Presence of Tied Scores", ECIR 2008).

    Args:
        k: length of the ranking; None: the whole database. ``"max_bin_count"`` is PML's, for its metrics; those above
            then have the whole database.
        ties: ``"expected"``; ``"stable"``: by place in the database, as published code with a stable sort;
            ``"best"`` and ``"worst"``: the bounds over all orders.
        radius: of the metrics within it.
        include: names of metrics; default: all of the above but ``mean_average_precision_within_radius``.
        ignore_label: items of this class are neither queries nor in the database; None: no class is left out.
        **kwargs: as in ``AccuracyCalculator``; ``return_per_class`` and ``avg_of_avgs`` are for PML's metrics alone.

    Shapes:
        query: (Q, bits). query_labels: (Q,) integers, never rounded, or multi-hot (Q, C), which ``MultiLabelTester``
        gives. reference: (N, bits), or packed by ``pack_codes``, (N, ceil(bits / 8)) uint8, also a ``numpy.memmap``,
        which is read in blocks. reference_labels: likewise.

    Raises:
        ValueError: shapes do not fit, values are not finite, multi-hot labels are not 0 and 1, the database is empty; a
            setting is unknown; an option of PML's metrics comes with one of ours.

    Example:
        >>> codes = torch.tensor([[1.0, 1, 1, 1], [1, 1, 1, -1], [-1, -1, -1, -1]])
        >>> labels = torch.tensor([0, 0, 1])
        >>> calculator = HashAccuracyCalculator(include=("mean_average_precision",))
        >>> calculator.get_accuracy(codes[:1], labels[:1], codes[1:], labels[1:])
        {'mean_average_precision': 1.0}
    """

    knn_func: Callable
    # PML finds the names of its metrics in these; get_accuracy computes ours itself.
    calculate_mean_average_precision = calculate_mean_average_precision_within_radius = None
    calculate_precision_within_radius = calculate_precision_at_k = calculate_recall_at_k = None

    def __init__(
        self,
        k: int | str | None = None,
        ties: str = "expected",
        radius: int = 2,
        include: tuple[str, ...] = DEFAULT,
        ignore_label: int | None = -1,
        **kwargs,
    ):
        if ties not in TIES:
            raise ValueError(f"ties must be one of {', '.join(TIES)}, but is {ties!r}.")
        if not (isinstance(radius, (int, np.integer)) and radius >= 0):
            raise ValueError(f"radius must be a whole number, not negative, but is {radius}.")
        ignored = [name for name in ("return_per_class", "avg_of_avgs") if kwargs.get(name)]
        if ignored and not (set(include) - set(kwargs.get("exclude", ()))).isdisjoint(METRICS):
            raise ValueError(f"{ignored[0]} is for PML's metrics alone, but include has {', '.join(include)}.")
        self.ties, self.radius, self.ignore_label = ties, radius, ignore_label
        kwargs.setdefault("knn_func", HammingKNN())
        super().__init__(k=int(k) if isinstance(k, np.integer) else k, include=include, **kwargs)
        self.compare = None if self.label_comparison_fn is torch.eq else self.label_comparison_fn

    def requires_knn(self) -> list[str]:
        """Return the metrics that need neighbours; PML forgets one."""
        return [*super().requires_knn(), "mean_reciprocal_rank"]

    def determine_k(self, bin_counts: torch.Tensor, num_reference_embeddings: int, ref_includes_query: bool) -> int:
        """Return how many neighbours PML's metrics get, no more than there are."""
        most = num_reference_embeddings - ref_includes_query
        return max(1, min(super().determine_k(bin_counts, num_reference_embeddings, ref_includes_query), most))

    def get_accuracy(
        self,
        query: Values,
        query_labels: Values,
        reference: Values | None = None,
        reference_labels: Values | None = None,
        ref_includes_query: bool = False,
        include: tuple[str, ...] = (),
        exclude: tuple[str, ...] = (),
    ) -> dict[str, float]:
        """Return the value of each metric by name.

        Without ``reference`` the queries search each other. ``ref_includes_query`` says that row i of the database is
        query i, perhaps as another network sees it; it is then left out. ``include`` and ``exclude`` choose among the
        calculator's metrics.
        """
        arguments = self.prepared(query, query_labels, reference, reference_labels, ref_includes_query)
        query, query_labels, reference, reference_labels, own = arguments
        names = self.get_function_dict(include, exclude)
        others = [name for name in names if name not in METRICS]
        found = {name: values.mean().item() for name, values in self.values(names, arguments).items()}
        if others and query_labels.ndim > 1 and self.compare is None:
            raise ValueError(
                f"{', '.join(others)} need one class label for each code, but query_labels has shape "
                f"{tuple(query_labels.shape)}; with multi-hot labels include can have {', '.join(METRICS)}."
            )
        if others:
            # PML wants real numbers, and a database that begins with the queries; the search gets what is there.
            own_knn, shown, asking = self.knn_func, reference, reference[: len(query)] if own else query
            if is_packed(reference, query.shape[1]):
                shown, asking = torch.zeros(len(reference), 1), torch.zeros(len(query), 1)
            if self.compare is None:
                # Numbered anew, because PML turns them into float32.
                numbers = torch.cat([query_labels, reference_labels]).unique(return_inverse=True)[1]
                query_labels, reference_labels = numbers.split([len(query_labels), len(reference_labels)])
            self.knn_func = lambda _, k, __, own_row: own_knn(query, k, reference, own_row)
            try:
                found |= super().get_accuracy(asking, query_labels, shown, reference_labels, own, tuple(others))
            finally:
                self.knn_func = own_knn
        self.curr_function_dict = names
        return {name: found[name] for name in names}

    def by_query(self, *arguments: Any) -> dict[str, torch.Tensor]:
        """Return the (Q,) values of each metric of this class, for ``bootstrap_interval``.

        Args:
            *arguments: as in ``get_accuracy``; queries that are ignored have no value.
        """
        return self.values(self.get_function_dict(), self.prepared(*arguments))

    def prepared(
        self, query: Any, query_labels: Any, reference: Any = None, reference_labels: Any = None, own: bool = False
    ) -> Prepared:
        """Return the arguments on the calculator's device, without items that are ignored."""
        if reference is None:
            reference, reference_labels, own = query, query_labels, True
        elif reference_labels is None:
            raise ValueError("reference is given, but reference_labels is None.")
        query, query_labels, reference_labels = (
            torch.as_tensor(values).to(self.device) for values in (query, query_labels, reference_labels)
        )
        query_labels, reference_labels = flat(query_labels), flat(reference_labels)
        # A database of bytes may be a file; it moves to the device in blocks.
        if not str(reference.dtype).endswith("uint8"):
            reference = torch.as_tensor(reference).to(self.device)
        if self.ignore_label is not None and query_labels.ndim == reference_labels.ndim == 1:
            query, query_labels = self.kept(query, query_labels)
            reference, reference_labels = self.kept(reference, reference_labels)
        return query, query_labels, reference, reference_labels, own

    def kept(self, rows: Values, labels: torch.Tensor) -> tuple[Values, torch.Tensor]:
        """Return rows and labels without those that are ignored."""
        places = torch.as_tensor(labels != self.ignore_label).nonzero()[:, 0]
        # What does not fit is refused later.
        if len(places) == len(labels) or len(rows) != len(labels):
            return rows, labels
        return rows[places.cpu().numpy() if isinstance(rows, np.ndarray) else places], labels[places]

    def values(self, names: Iterable[str], arguments: Prepared) -> dict[str, torch.Tensor]:
        """Return those of our metrics that are among the names, for each query."""
        found: dict[str, list[torch.Tensor]] = {name: [] for name in names if name in METRICS}
        if not found:
            return {}
        ranking = Ranking(*arguments, self.compare)
        for relevant, total, distances in ranking.groups(self.ties == "stable"):
            relevant, total = relevant.double(), total.double()
            near, k = distances <= self.radius, self.k if isinstance(self.k, int) else ranking.size
            for name, values in found.items():
                if name.endswith("within_radius"):
                    values.append(self.figure(name, relevant * near, total * near, ranking.size))
                else:
                    values.append(self.figure(name, relevant, total, min(k, ranking.size)))
        return {name: torch.cat(values) for name, values in found.items()}

    def figure(self, name: str, relevant: torch.Tensor, total: torch.Tensor, k: int) -> torch.Tensor:
        """Return one of our metrics of some queries, from the items in each group of tied ones."""
        if name.startswith("mean_average_precision"):
            return average_precision(relevant, total, k, self.ties)
        hits = relevant_within(relevant, total, k, self.ties)
        if name == "precision_within_radius":
            return hits / total.sum(dim=1).clamp(min=1)
        return hits / (k if name == "precision_at_k" else relevant.sum(dim=1).clamp(min=1))

    def precision_recall_curve(self, *arguments: Any) -> tuple[torch.Tensor, torch.Tensor]:
        """Return precision and recall of what lies within each Hamming radius, from 0 to bits; there are no ties.

        Means over the queries that find anything (precision) and that have relevant items (recall); a radius at
        which no query finds anything has NaN as its precision.

        Args:
            *arguments: as in ``get_accuracy``.
        """
        ranking = Ranking(*self.prepared(*arguments), self.compare)
        relevant, total = (counts.cumsum(dim=1).double() for counts in ranking.counts())
        precision = (relevant / total).nanmean(dim=0)
        recall = (relevant / relevant[:, -1:]).nanmean(dim=0)
        return precision.cpu(), recall.cpu()

    @staticmethod
    def plot_precision_recall(path: str | os.PathLike, curves: dict[str, tuple[torch.Tensor, torch.Tensor]]) -> None:
        """Draw the curves of ``precision_recall_curve``, by name."""
        from matplotlib.figure import Figure

        figure = Figure(figsize=(6, 4.5), layout="constrained")
        axes = figure.subplots()
        for name, (precision, recall) in curves.items():
            axes.plot(recall.numpy(), precision.numpy(), marker=".", label=name)
        axes.set(xlabel="recall", ylabel="precision", xlim=(0, 1), ylim=(0, 1.02))
        axes.spines[["top", "right"]].set_visible(False)
        axes.legend(frameon=False, fontsize=8)
        figure.savefig(path, dpi=130)
