import os

import numpy as np
import torch
from pytorch_metric_learning.utils.accuracy_calculator import AccuracyCalculator

from .hamming_knn import HammingKNN
from .hamming_ranking import Ranking
from .tied_ranking import average_precision, precision_of_order, relevant_within

TIES = ("expected", "stable", "best", "worst")
METRICS = ("mean_average_precision", "precision_within_radius", "precision_at_k", "recall_at_k")


class HashAccuracyCalculator(AccuracyCalculator):
    r"""Retrieval by Hamming distance: PML's ``AccuracyCalculator`` for binary codes.

    The signs of the embeddings are the codes (0 counts as -1). Items of the same class, or that share a label of
    multi-hot labels, are relevant. Metrics, means over the queries:

    - ``mean_average_precision`` of the first k items, :math:`\sum_{j \le k} \mathrm{rel}_j \frac{R_j}{j} / R_k` with
      R_j relevant items among the first j. **The divisor is R_k, the number of relevant items found within the
      first k**, as in the hashing literature (PML's own divides by all relevant items); 0 where there are none.
    - ``precision_within_radius``: the share of relevant items among all within Hamming distance ``radius``; 0 where
      there are none.
    - ``precision_at_k``, ``recall_at_k``: the share of relevant items among the first k; the share of all relevant
      items that is among the first k, 0 where there are none.

    PML's metrics are there too, by ``include``, with ``HammingKNN``; those need class labels.

    Rankings by Hamming distance are full of ties. The default is the expectation over all orders of tied items,
    exact, from the counts of relevant and of all items at each distance alone: given h of the m places of a tie
    within the first k relevant, each place is so with probability h / m, and h is hypergeometric. (McSherry & Najork,
    "Computing Information Retrieval Performance Measures Efficiently in the Presence of Tied Scores", ECIR 2008.)

    Args:
        k: length of the ranking; None: the whole database.
        ties: ``"expected"``; ``"stable"``: by place in the database, as published code with a stable sort; or
            ``"best"`` and ``"worst"``: relevant items first or last.
        radius: of ``precision_within_radius``.
        include: names of metrics; default: the four above.
        **kwargs: as in ``AccuracyCalculator``; ``label_comparison_fn``, ``return_per_class`` and ``avg_of_avgs`` are
            for PML's metrics alone.

    Shapes:
        query: (Q, bits). query_labels: (Q,) integers, never rounded, or multi-hot (Q, C), which ``MultiLabelTester``
        gives; PML's own tester takes each column for class labels. reference: (N, bits);
        reference_labels likewise.

    Raises:
        ValueError: codes and labels of different length, codes of different length, values that are not finite,
            multi-hot labels other than 0 and 1, an empty database; ``ties``, ``k`` or ``radius`` unknown;
            an option of PML's metrics with one of ours.

    Example:
        >>> codes = torch.tensor([[1.0, 1, 1, 1], [1, 1, 1, -1], [-1, -1, -1, -1]])
        >>> labels = torch.tensor([0, 0, 1])
        >>> calculator = HashAccuracyCalculator(include=("mean_average_precision",))
        >>> calculator.get_accuracy(codes[:1], labels[:1], codes[1:], labels[1:])
        {'mean_average_precision': 1.0}
    """

    def __init__(
        self,
        k: int | None = None,
        ties: str = "expected",
        radius: int = 2,
        include: tuple[str, ...] = METRICS,
        **kwargs,
    ):
        if ties not in TIES:
            raise ValueError(f"ties must be one of {', '.join(TIES)}, but is {ties!r}.")
        if k is not None and not (isinstance(k, (int, np.integer)) and k >= 1):
            raise ValueError(f"k must be None, for the whole ranking, or a number of at least 1, but is {k!r}.")
        if not (isinstance(radius, (int, np.integer)) and radius >= 0):
            raise ValueError(f"radius must be a whole number, not negative, but is {radius}.")
        ignored = [name for name in ("label_comparison_fn", "return_per_class", "avg_of_avgs") if kwargs.get(name)]
        if ignored and set(include) & set(METRICS):
            raise ValueError(f"{ignored[0]} is for PML's metrics alone, but include has {', '.join(include)}.")
        self.ties, self.radius = ties, radius
        kwargs.setdefault("knn_func", HammingKNN())
        # Clustering is not for codes, and PML builds it with faiss.
        kwargs.setdefault("kmeans_func", no_clusters)
        super().__init__(k=k, include=include, **kwargs)

    def requires_knn(self) -> list[str]:
        """Return the metrics that need neighbours; ours only need the counts."""
        return [name for name in super().requires_knn() if name not in METRICS]

    def get_accuracy(
        self,
        query: torch.Tensor | np.ndarray,
        query_labels: torch.Tensor | np.ndarray,
        reference: torch.Tensor | np.ndarray | None = None,
        reference_labels: torch.Tensor | np.ndarray | None = None,
        ref_includes_query: bool = False,
        include: tuple[str, ...] = (),
        exclude: tuple[str, ...] = (),
    ) -> dict[str, float]:
        """Return the value of each metric by name.

        Args:
            query: outputs or codes.
            query_labels: their labels.
            reference: the database; None: the queries themselves, each without itself.
            reference_labels: its labels.
            ref_includes_query: whether row i of the database is query i, which is then left out.
            include: fewer metrics than those of the calculator.
            exclude: metrics to leave out.
        """
        if reference is None:
            reference, reference_labels, ref_includes_query = query, query_labels, True
        elif reference_labels is None:
            raise ValueError("reference is given, but reference_labels is None.")
        names = self.get_function_dict(include, exclude)
        others = [name for name in names if name not in METRICS]
        if others and np.ndim(query_labels) > 1 and query_labels.shape[1] > 1:
            raise ValueError(
                f"{', '.join(others)} need one class label for each code, but query_labels has shape "
                f"{tuple(query_labels.shape)}; with multi-hot labels include can have {', '.join(METRICS)}."
            )
        if any(name in METRICS for name in names):
            self.ranking = self.rank(query, query_labels, reference, reference_labels, ref_includes_query)
        return super().get_accuracy(
            query, query_labels, reference, reference_labels, ref_includes_query, include, exclude
        )

    def rank(
        self,
        query: torch.Tensor | np.ndarray,
        query_labels: torch.Tensor | np.ndarray,
        reference: torch.Tensor | np.ndarray,
        reference_labels: torch.Tensor | np.ndarray | None,
        ref_includes_query: bool = False,
    ) -> Ranking:
        """Rank the database for each query, on the calculator's device."""
        query, query_labels, reference, reference_labels = (
            torch.as_tensor(values).to(self.device) for values in (query, query_labels, reference, reference_labels)
        )
        return Ranking(query, query_labels, reference, reference_labels, ref_includes_query)

    def length(self) -> int:
        """Return how many places of the ranking count."""
        return self.ranking.size if self.k is None else min(int(self.k), self.ranking.size)

    def calculate_mean_average_precision(self, **kwargs) -> float:
        """Return the mean over the queries."""
        if self.ties == "stable":
            parts = self.ranking.stable_relevance(self.length())
            return torch.cat([precision_of_order(part) for part in parts]).mean().item()
        return average_precision(*self.ranking.counts, self.length(), self.ties).mean().item()

    def calculate_precision_within_radius(self, **kwargs) -> float:
        """Return the mean over the queries."""
        relevant, total = (counts[:, : self.radius + 1].sum(dim=1) for counts in self.ranking.counts)
        return (relevant / total.clamp(min=1)).double().mean().item()

    def calculate_precision_at_k(self, **kwargs) -> float:
        """Return the mean over the queries."""
        return (self.found() / self.length()).mean().item()

    def calculate_recall_at_k(self, **kwargs) -> float:
        """Return the mean over the queries."""
        return (self.found() / self.ranking.counts[0].sum(dim=1).clamp(min=1)).mean().item()

    def found(self) -> torch.Tensor:
        """Return the number of relevant items within the first k of each query, under the tie rule."""
        if self.ties == "stable":
            return torch.cat([part.sum(dim=1) for part in self.ranking.stable_relevance(self.length())])
        return relevant_within(*self.ranking.counts, self.length(), self.ties)

    def precision_recall_curve(
        self,
        query: torch.Tensor,
        query_labels: torch.Tensor,
        reference: torch.Tensor,
        reference_labels: torch.Tensor,
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Return precision and recall of what lies within each Hamming radius, from 0 to bits; there are no ties.

        Means over the queries that find anything (precision) and that have relevant items (recall); a radius at
        which no query finds anything has NaN as its precision.
        """
        ranking = self.rank(query, query_labels, reference, reference_labels)
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
