import os
from collections.abc import Callable
from functools import partialmethod
from typing import Any

import numpy as np
import torch
from pytorch_metric_learning.utils.accuracy_calculator import AccuracyCalculator

from ..distances.packed_codes import is_packed
from ..utils.labels import flat
from .hamming_knn import HammingKNN
from .hamming_ranking import Ranking
from .tied_ranking import average_precision, precision_of_order, relevant_within

TIES = ("expected", "stable", "best", "worst", "relevant_first", "relevant_last")
DEFAULT = ("mean_average_precision", "precision_within_radius", "precision_at_k", "recall_at_k")
METRICS = (*DEFAULT, "mean_average_precision_within_radius")
Values = torch.Tensor | np.ndarray


class HashAccuracyCalculator(AccuracyCalculator):
    r"""Retrieval by Hamming distance: PML's ``AccuracyCalculator`` for binary codes.

    The signs of the embeddings are the codes (0 counts as -1). Items of the same class, or that share a label of
    multi-hot labels, are relevant. Metrics, means over the queries:

    - ``mean_average_precision`` of the first k items, :math:`\sum_{j \le k} \mathrm{rel}_j \frac{R_j}{j} / R_k` with
      R_j relevant items among the first j. **The divisor is R_k, the number of relevant items found within the
      first k**, as in the hashing literature (PML's own divides by all relevant items); 0 where there are none.
    - ``precision_within_radius``: the share of relevant items among all within Hamming distance ``radius``; 0 where
      there are none. ``mean_average_precision_within_radius``: the average precision of these, the figure of DCH.
    - ``precision_at_k``, ``recall_at_k``: the share of relevant items among the first k; the share of all relevant
      items that is among the first k, 0 where there are none.

    PML's metrics are there too, by ``include``, with ``HammingKNN``. They need class labels, or multi-hot ones with a
    ``label_comparison_fn``, which then decides relevance for all metrics.

    Rankings by Hamming distance are full of ties. The default is the expectation over all orders of tied items,
    exact, from the counts of relevant and of all items at each distance alone: given h of the m places of a tie
    within the first k relevant, each place is so with probability h / m, and h is hypergeometric. (McSherry & Najork,
    "Computing Information Retrieval Performance Measures Efficiently in the Presence of Tied Scores", ECIR 2008.)

    Args:
        k: length of the ranking; None: the whole database. ``"max_bin_count"`` is for PML's metrics alone; those
            above, if there are any, then have the whole database.
        ties: ``"expected"``; ``"stable"``: by place in the database, as published code with a stable sort;
            ``"best"`` and ``"worst"``: the bounds over all orders; ``"relevant_first"`` and ``"relevant_last"``: one
            order, which bounds the average precision only if k does not cut a tie.
        radius: of the metrics within it.
        include: names of metrics; default: all of the above but ``mean_average_precision_within_radius``.
        ignore_label: items of this class are neither queries nor in the database. Default: -1, unlabelled; None: no
            class is left out.
        **kwargs: as in ``AccuracyCalculator``; ``return_per_class`` and ``avg_of_avgs`` are for PML's metrics alone.

    Shapes:
        query: (Q, bits). query_labels: (Q,) integers, never rounded, or multi-hot (Q, C), which ``MultiLabelTester``
        gives; PML's own tester takes each column for class labels. reference: (N, bits), or packed by ``pack_codes``,
        (N, ceil(bits / 8)) uint8, also a ``numpy.memmap``: it is read in blocks, and nothing else grows with N but
        the labels. reference_labels: likewise.

    Raises:
        ValueError: shapes do not fit one another, values are not finite, multi-hot labels are not 0 and 1, the database
            is empty; ``ties``, ``k`` or ``radius`` is unknown; an option of PML's metrics comes with one of ours.

    Example:
        >>> codes = torch.tensor([[1.0, 1, 1, 1], [1, 1, 1, -1], [-1, -1, -1, -1]])
        >>> labels = torch.tensor([0, 0, 1])
        >>> calculator = HashAccuracyCalculator(include=("mean_average_precision",))
        >>> calculator.get_accuracy(codes[:1], labels[:1], codes[1:], labels[1:])
        {'mean_average_precision': 1.0}
    """

    knn_func: Callable

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
        kept = set(include) - set(kwargs.get("exclude", ()))
        of_pml = k == "max_bin_count" and not kept <= set(METRICS)
        if not (k is None or of_pml or (isinstance(k, (int, np.integer)) and k >= 1)):
            raise ValueError(
                f"k must be None, for the whole ranking, or a number of at least 1, but is {k!r}; 'max_bin_count' is "
                "for metrics of PML."
            )
        if not (isinstance(radius, (int, np.integer)) and radius >= 0):
            raise ValueError(f"radius must be a whole number, not negative, but is {radius}.")
        ignored = [name for name in ("return_per_class", "avg_of_avgs") if kwargs.get(name)]
        if ignored and kept & set(METRICS):
            raise ValueError(f"{ignored[0]} is for PML's metrics alone, but include has {', '.join(include)}.")
        self.ties, self.radius, self.ignore_label = ties, radius, ignore_label
        kwargs.setdefault("knn_func", HammingKNN())
        # Clustering is not for codes, and PML builds it with faiss.
        kwargs.setdefault("kmeans_func", no_clusters)
        super().__init__(k=int(k) if isinstance(k, np.integer) else k, include=include, **kwargs)

    def requires_knn(self) -> list[str]:
        """Return the metrics that need neighbours; ours only need the counts."""
        return [name for name in (*super().requires_knn(), "mean_reciprocal_rank") if name not in METRICS]

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
        if others and query_labels.ndim > 1 and query_labels.shape[1] > 1 and self.compared() is None:
            raise ValueError(
                f"{', '.join(others)} need one class label for each code, but query_labels has shape "
                f"{tuple(query_labels.shape)}; with multi-hot labels include can have {', '.join(METRICS)}."
            )
        if len(others) < len(names):
            self.ranking = Ranking(*arguments, self.compared())
        if not others:
            return {name: function() for name, function in names.items()}

        # PML wants real numbers, and a database that begins with the queries; the search gets what is there.
        own_knn, shown, asking = self.knn_func, reference, reference[: len(query)] if own else query
        if is_packed(reference, query.shape[1]):
            shown, asking = torch.zeros(len(reference), 1), torch.zeros(len(query), 1)
        if query_labels.ndim == 1 and self.compared() is None:
            # Numbered anew, because PML turns them into float32.
            numbers = torch.cat([query_labels, reference_labels]).unique(return_inverse=True)[1]
            query_labels, reference_labels = numbers.split([len(query_labels), len(reference_labels)])
        self.knn_func = lambda _, k, __, own_row: own_knn(query, k, reference, own_row)
        try:
            return super().get_accuracy(asking, query_labels, shown, reference_labels, own, include, exclude)
        finally:
            self.knn_func = own_knn

    def by_query(self, *arguments: Any) -> dict[str, torch.Tensor]:
        """Return the (Q,) values of each metric of this class, for ``bootstrap_interval``.

        Args:
            *arguments: as in ``get_accuracy``; queries that are ignored have no value.
        """
        self.ranking = Ranking(*self.prepared(*arguments), self.compared())
        return {name: self.values(name) for name in self.get_function_dict() if name in METRICS}

    def prepared(
        self, query: Any, query_labels: Any, reference: Any = None, reference_labels: Any = None, own: bool = False
    ) -> tuple[torch.Tensor, torch.Tensor, Any, torch.Tensor, bool]:
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
        if str(getattr(reference, "dtype", "")) not in ("uint8", "torch.uint8"):
            reference = torch.as_tensor(reference).to(self.device)
        if self.ignore_label is not None and query_labels.ndim == reference_labels.ndim == 1:
            kept, kept_items = query_labels != self.ignore_label, reference_labels != self.ignore_label
            if not kept.all() and len(kept) == len(query):
                query, query_labels = query[kept], query_labels[kept]
            if not kept_items.all() and len(kept_items) == len(reference):
                places = kept_items.nonzero()[:, 0]
                reference = reference[places.cpu().numpy() if isinstance(reference, np.ndarray) else places]
                reference_labels = reference_labels[places]
        return query, query_labels, reference, reference_labels, own

    def compared(self) -> Callable | None:
        """Return the user's comparison of labels, if there is one."""
        return None if self.label_comparison_fn is torch.eq else self.label_comparison_fn

    def length(self) -> int:
        """Return how many places of the ranking count."""
        return min(self.k, self.ranking.size) if isinstance(self.k, int) else self.ranking.size

    def values(self, name: str) -> torch.Tensor:
        """Return one of our metrics for each query, (Q,) float64."""
        (relevant, total), k = self.ranking.counts, self.length()
        if name.endswith("within_radius"):
            relevant, total, k = relevant[:, : self.radius + 1], total[:, : self.radius + 1], self.ranking.size
        if name == "precision_within_radius":
            return relevant.sum(dim=1).double() / total.sum(dim=1).clamp(min=1)
        if name.startswith("mean_average_precision"):
            if self.ties != "stable":
                return average_precision(relevant, total, k, self.ties)
            # What lies within the radius comes first.
            most = total.sum(dim=1, keepdim=True)
            places = torch.arange(k, device=total.device)
            return self.in_order(lambda rows, part: precision_of_order(part & (places < most[rows])), k)
        if self.ties == "stable":
            hits = self.in_order(lambda rows, part: part.sum(dim=1), k)
        else:
            hits = relevant_within(relevant, total, k, self.ties)
        return hits.double() / (k if name == "precision_at_k" else relevant.sum(dim=1).clamp(min=1))

    def in_order(self, figure: Callable, k: int) -> torch.Tensor:
        """Return a figure of each query's stable order, a few queries at a time."""
        return torch.cat([figure(rows, part) for rows, part in self.ranking.stable_relevance(k)])

    def mean(self, name: str, **kwargs: Any) -> float:
        """Return the mean over the queries."""
        return self.values(name).mean().item()

    # PML finds its metrics by these names.
    calculate_mean_average_precision = partialmethod(mean, "mean_average_precision")
    calculate_mean_average_precision_within_radius = partialmethod(mean, "mean_average_precision_within_radius")
    calculate_precision_within_radius = partialmethod(mean, "precision_within_radius")
    calculate_precision_at_k = partialmethod(mean, "precision_at_k")
    calculate_recall_at_k = partialmethod(mean, "recall_at_k")

    def precision_recall_curve(self, *arguments: Any) -> tuple[torch.Tensor, torch.Tensor]:
        """Return precision and recall of what lies within each Hamming radius, from 0 to bits; there are no ties.

        Means over the queries that find anything (precision) and that have relevant items (recall); a radius at
        which no query finds anything has NaN as its precision.

        Args:
            *arguments: as in ``get_accuracy``.
        """
        ranking = Ranking(*self.prepared(*arguments), self.compared())
        relevant, total = (c.cumsum(dim=1).double() for c in ranking.counts)
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


def no_clusters(*args):
    """Refuse to cluster codes."""
    raise NotImplementedError("HashAccuracyCalculator does not cluster: NMI and AMI are not for binary codes.")
