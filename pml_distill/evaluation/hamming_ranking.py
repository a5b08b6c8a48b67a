from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import torch

from ..distances.packed_codes import check_outputs, pack_codes
from ..utils.labels import check_multi_hot, share_a_label

CHUNK = 1 << 19


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
        check_multi_hot(labels, f"{name}_labels")
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
