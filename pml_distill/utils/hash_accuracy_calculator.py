import os
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import torch
from pytorch_metric_learning.utils.accuracy_calculator import AccuracyCalculator

from ..distances.packed_codes import check_outputs, pack_codes
from ..losses.base_hashing_loss import share_a_label
from .hamming_knn import HammingKNN

TIES = ("expected", "stable", "best", "worst")
METRICS = ("mean_average_precision", "precision_within_radius", "precision_at_k", "recall_at_k")
CHUNK = 1 << 19


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
        if any(name in METRICS for name in names):
            self.ranking = Ranking(
                self.on_device(query),
                self.on_device(query_labels),
                self.on_device(reference),
                self.on_device(reference_labels),
                ref_includes_query,
            )
        return super().get_accuracy(
            query, query_labels, reference, reference_labels, ref_includes_query, include, exclude
        )

    def on_device(self, values: torch.Tensor | np.ndarray | None) -> torch.Tensor:
        """Return a tensor on the calculator's device."""
        return torch.as_tensor(values).to(self.device)

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
        ranking = Ranking(
            self.on_device(query),
            self.on_device(query_labels),
            self.on_device(reference),
            self.on_device(reference_labels),
        )
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


class Ranking:
    """A database ranked for each query: ``counts``, the (Q, bits + 1) numbers of relevant and of all items by distance.

    Args:
        query, query_labels, reference, reference_labels: as in ``HashAccuracyCalculator``.
        ref_includes_query: whether query i itself is item i, to be left out.
    """

    def __init__(
        self,
        query: torch.Tensor,
        query_labels: torch.Tensor,
        reference: torch.Tensor,
        reference_labels: torch.Tensor,
        ref_includes_query: bool = False,
    ):
        query_labels, reference_labels = flat(query_labels), flat(reference_labels)
        check(query, query_labels, reference, reference_labels)
        self.bits, self.leave_out = query.shape[1], ref_includes_query
        self.size = len(reference) - ref_includes_query
        if self.size < 1:
            raise ValueError(f"reference has shape {tuple(reference.shape)}: the database is empty.")
        if ref_includes_query and len(query) > len(reference):
            raise ValueError(
                f"ref_includes_query says that query i is item i, but query has shape {tuple(query.shape)} and "
                f"reference {tuple(reference.shape)}."
            )
        self.query, self.reference = prepared(query), prepared(reference)
        self.query_labels, self.reference_labels = query_labels, reference_labels
        self.counts = self.count()

    def chunks(self) -> Iterator[slice]:
        """Yield slices of queries whose distances fit into the cache."""
        step = min(4096, max(1, CHUNK // len(self.reference)))
        for start in range(0, len(self.query), step):
            yield slice(start, min(start + step, len(self.query)))

    def distances(self, rows: slice) -> torch.Tensor:
        """Return (rows, N) int32 distances."""
        query, reference = self.query[rows], self.reference
        if isinstance(query, torch.Tensor):
            return ((self.bits - query @ reference.T) / 2).int()
        differing = sum(
            np.bitwise_count(query[:, None, word] ^ reference[None, :, word]).astype(np.int32)
            for word in range(query.shape[1])
        )
        return torch.from_numpy(differing)

    def count(self) -> tuple[torch.Tensor, torch.Tensor]:
        """Count the relevant and all items at each distance."""
        size = len(self.query), 2, self.bits + 1
        # The threads below are not in the caller's inference mode, whose tensors they could not fill.
        with torch.inference_mode(False):
            counts = torch.empty(size, dtype=torch.long, device=self.query_labels.device)

        def fill(rows: slice) -> None:
            # Small results that outlive the large ones beside them would keep the memory of these from being reused.
            counts[rows] = self.count_rows(rows)

        # Histograms are counted on one thread each.
        with ThreadPoolExecutor(torch.get_num_threads()) as pool:
            list(pool.map(fill, self.chunks()))
        other, relevant = counts.unbind(dim=1)
        return relevant, other + relevant

    def count_rows(self, rows: slice) -> torch.Tensor:
        """Return the (rows, 2, bits + 1) numbers of other and of relevant items at each distance."""
        width, size = self.bits + 1, rows.stop - rows.start
        own = torch.arange(size, device=self.query_labels.device)
        relevant = share_a_label(self.query_labels[rows], self.reference_labels)
        # One histogram for all queries of the chunk and both kinds of items.
        places = self.distances(rows).add_(relevant, alpha=width)
        places += 2 * width * own[:, None]
        found = torch.bincount(places.flatten(), minlength=2 * width * size).view(-1, 2, width)
        if self.leave_out:
            found[own, relevant[own, own + rows.start].long(), 0] -= 1
        return found

    def stable_relevance(self, k: int) -> Iterator[torch.Tensor]:
        """Yield the (rows, k) relevance of the first k items, ties by place in the database, in chunks of queries."""
        for rows in self.chunks():
            distances = self.distances(rows)
            if self.leave_out:
                own = torch.arange(rows.start, rows.stop, device=distances.device)
                distances[torch.arange(len(own)), own] = self.bits + 1
            order = stable_order(distances.to(torch.int16))[:, :k]
            relevant = share_a_label(self.query_labels[rows], self.reference_labels)
            yield relevant.gather(1, order)


def stable_order(distances: torch.Tensor) -> torch.Tensor:
    """Sort each row of small integers, equal ones by place; NumPy's radix sort is several times as fast as torch's."""
    if distances.is_cuda:
        return distances.argsort(dim=1, stable=True)
    return torch.from_numpy(distances.numpy().argsort(axis=1, kind="stable"))


def prepared(codes: torch.Tensor) -> torch.Tensor | np.ndarray:
    """Return codes ready to be compared: 64 bits to a word on the CPU, products of -1 and 1 elsewhere."""
    if codes.is_cuda or not hasattr(np, "bitwise_count"):  # from NumPy 2 on
        return torch.where(codes > 0, 1.0, -1.0)
    packed = pack_codes(codes)
    return torch.nn.functional.pad(packed, (0, -packed.shape[1] % 8)).numpy().view(np.uint64)


def flat(labels: torch.Tensor) -> torch.Tensor:
    """Return labels of one column, as PML's testers give them, as a vector."""
    return labels[:, 0] if labels.ndim == 2 and labels.shape[1] == 1 else labels


def check(
    query: torch.Tensor, query_labels: torch.Tensor, reference: torch.Tensor, reference_labels: torch.Tensor
) -> None:
    """Raise if codes and labels do not fit one another."""
    for name, codes, labels in (("query", query, query_labels), ("reference", reference, reference_labels)):
        if labels.ndim == 2 and not ((labels == 0) | (labels == 1)).all():
            raise ValueError(
                f"{name}_labels must be 0 or 1 if multi-hot, but go from {labels.min()} to {labels.max()}."
            )
        if codes.ndim != 2 or len(codes) != len(labels):
            raise ValueError(
                f"{name} must be (N, bits) with a label for each row, but {name} has shape {tuple(codes.shape)} and "
                f"{name}_labels {tuple(labels.shape)}."
            )
        check_outputs(codes, name)
    if query.shape[1] != reference.shape[1]:
        raise ValueError(
            f"query {tuple(query.shape)} and reference {tuple(reference.shape)} must have the same number of bits."
        )
    if query_labels.shape[1:] != reference_labels.shape[1:]:
        raise ValueError(
            f"query_labels {tuple(query_labels.shape)} and reference_labels {tuple(reference_labels.shape)} must both "
            f"be class labels, or multi-hot with the same number of columns."
        )
    if len(query) == 0 or len(reference) == 0:
        raise ValueError(f"query {tuple(query.shape)} and reference {tuple(reference.shape)} must not be empty.")


def within(total: torch.Tensor, k: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Return how many items come before each distance, and how many of its places are among the first k."""
    before = total.cumsum(dim=1) - total
    return before, torch.minimum(total, (k - before).clamp(min=0))


def cut(relevant: torch.Tensor, total: torch.Tensor, places: torch.Tensor, ties: str) -> torch.Tensor:
    """Return the (expected, largest or smallest) number of relevant items in the given places of each distance."""
    if ties == "best":
        return torch.minimum(relevant, places).double()
    if ties == "worst":
        return (places - (total - relevant)).clamp(min=0).double()
    return relevant * places.double() / total.clamp(min=1)


def relevant_within(relevant: torch.Tensor, total: torch.Tensor, k: int, ties: str) -> torch.Tensor:
    """Return the number of relevant items among the first k of each query."""
    return cut(relevant, total, within(total, k)[1], ties).sum(dim=1)


def precision_of_order(relevant: torch.Tensor) -> torch.Tensor:
    """Return the (Q,) average precisions of rankings, (Q, k) booleans."""
    places = torch.arange(1, relevant.shape[1] + 1, dtype=torch.float64, device=relevant.device)
    hits = relevant.cumsum(dim=1)
    return (relevant * hits / places).sum(dim=1) / hits[:, -1].clamp(min=1)


def average_precision(relevant: torch.Tensor, total: torch.Tensor, k: int, ties: str = "expected") -> torch.Tensor:
    """Return the (Q,) average precisions of the first k items, from the counts (Q, distances) of items."""
    before, places = within(total, k)
    size = int(total.sum(dim=1).max())
    harmonic = torch.zeros(size + 1, dtype=torch.float64, device=total.device)
    harmonic[1:] = (1 / torch.arange(1, size + 1, dtype=torch.float64, device=total.device)).cumsum(dim=0)
    hits_before = (relevant.cumsum(dim=1) - relevant).double()

    if ties != "expected":
        # The h relevant places follow one another: the sum of (hits_before + i) / (first + i), i = 1..h.
        hits = cut(relevant, total, places, ties)
        first = before if ties == "best" else before + total - relevant
        first = torch.minimum(first, before + places)
        reciprocals = harmonic[(first + hits.long()).clamp(max=size)] - harmonic[first]
        sums = hits + (hits_before - first) * reciprocals
        return sums.sum(dim=1) / hits.sum(dim=1).clamp(min=1)

    whole = places == total
    sums = tied_sums(relevant.double(), total.double(), before, total, hits_before, harmonic)
    sums = (sums * whole).sum(dim=1)
    hits = (relevant * whole).sum(dim=1).double()
    if k >= size:
        return sums / hits.clamp(min=1)

    # The first distance that is not whole is cut by the k-th place; h relevant items of it come in.
    column = (~whole).long().argmax(dim=1, keepdim=True)
    n, r, m, start = (x.gather(1, column).double() for x in (total, relevant, places, before))
    is_cut = ~whole.gather(1, column)
    h = torch.arange(int(torch.minimum(r, m).max()) + 1, dtype=torch.float64, device=total.device)
    possible = (h <= r) & (h <= m) & (m - h <= n - r)
    probability = (log_choose(r, h) + log_choose(n - r, m - h) - log_choose(n, m)).exp() * possible
    partial = tied_sums(h, m, start.long(), m.long(), hits[:, None], harmonic)
    cut_values = (probability * (sums[:, None] + partial) / (hits[:, None] + h).clamp(min=1)).sum(dim=1)
    return torch.where(is_cut[:, 0], cut_values, sums / hits.clamp(min=1))


def tied_sums(relevant, total, before, places, hits_before, harmonic) -> torch.Tensor:
    """Return the expected sum of the precisions at the relevant ones of ``total`` places in random order."""
    reciprocals = harmonic[before + places] - harmonic[before]
    # At place j the relevant ones before it within the tie are (j - 1)(r - 1) / (n - 1) on average.
    others = (relevant - 1) / (total - 1).clamp(min=1)
    sums = (hits_before + 1) * reciprocals + others * (places - (before + 1) * reciprocals)
    return relevant / total.clamp(min=1) * sums


def log_choose(n: torch.Tensor, k: torch.Tensor) -> torch.Tensor:
    """Return the logarithm of the binomial coefficient, of anything where there is none."""
    k = torch.minimum(k.clamp(min=0), n)
    return torch.lgamma(n + 1) - torch.lgamma(k + 1) - torch.lgamma(n - k + 1)


def no_clusters(*args):
    """Refuse to cluster codes."""
    raise NotImplementedError("HashAccuracyCalculator does not cluster: NMI and AMI are not for binary codes.")
