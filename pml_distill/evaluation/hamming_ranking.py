from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import torch

from ..distances.packed_codes import check_outputs, check_packed, is_packed, pack_codes, unpack_codes
from ..utils.labels import check_multi_hot, flat, share_a_label

# Distances at once, of a thread; items of the database at once; distances of whole rankings at once.
CHUNK, BLOCK, SORTED = 1 << 19, 1 << 19, 1 << 24
Codes = torch.Tensor | np.ndarray


class Ranking:
    """A database ranked for each query: ``counts``, the (Q, bits + 1) numbers of relevant and of all items by distance.

    Args:
        query, query_labels, reference, reference_labels: as in ``HashAccuracyCalculator``. A database may be packed
            codes, in memory or mapped to it; it is read in blocks.
        ref_includes_query: whether query i itself is item i, to be left out.
        label_comparison_fn: PML's, in place of equal classes or a common label.
    """

    def __init__(
        self,
        query: torch.Tensor,
        query_labels: torch.Tensor,
        reference: Codes,
        reference_labels: torch.Tensor,
        ref_includes_query: bool = False,
        label_comparison_fn: Callable | None = None,
    ):
        query_labels, reference_labels = flat(query_labels), flat(reference_labels)
        check(query, query_labels, reference, reference_labels, label_comparison_fn is not None)
        self.bits, self.leave_out = query.shape[1], ref_includes_query
        self.size = len(reference) - ref_includes_query
        if self.size < 1:
            raise ValueError(f"reference has shape {tuple(reference.shape)}: the database is empty.")
        if ref_includes_query and len(query) > len(reference):
            raise ValueError(
                f"ref_includes_query says that query i is item i, but query has shape {tuple(query.shape)} and "
                f"reference {tuple(reference.shape)}."
            )
        if ref_includes_query and not (query_labels == reference_labels[: len(query)]).all():
            raise ValueError("ref_includes_query says that query i is item i, but their labels differ.")
        self.device, self.compare = query.device, label_comparison_fn
        self.reference = reference if is_packed(reference, self.bits) else pack_codes(torch.as_tensor(reference))
        self.query = self.prepared(pack_codes(query))
        self.query_labels, self.reference_labels = query_labels, reference_labels
        self.counts = self.count()

    def prepared(self, packed: Codes) -> Codes:
        """Return packed codes ready to be compared: 64 bits to a word on the CPU, products of -1 and 1 elsewhere."""
        if self.device.type != "cpu" or not hasattr(np, "bitwise_count"):  # from NumPy 2 on
            return unpack_codes(torch.as_tensor(packed).to(self.device), self.bits)
        words = np.zeros((len(packed), 8 * -(-self.bits // 64)), dtype=np.uint8)
        words[:, : packed.shape[1]] = packed
        return words.view(np.uint64)

    def blocks(self) -> Iterator[tuple[slice, Codes]]:
        """Yield slices of the database with their codes."""
        for start in range(0, len(self.reference), BLOCK):
            items = slice(start, min(start + BLOCK, len(self.reference)))
            check_packed(self.reference[items], self.bits)
            yield items, self.prepared(self.reference[items])

    def rows(self, step: int) -> Iterator[slice]:
        """Yield slices of queries."""
        for start in range(0, len(self.query), step):
            yield slice(start, min(start + step, len(self.query)))

    def distances(self, rows: slice, codes: Codes) -> torch.Tensor:
        """Return (rows, items) int32 distances."""
        query = self.query[rows]
        if isinstance(query, torch.Tensor):
            return ((self.bits - query @ codes.T) / 2).int()
        differing = sum(
            np.bitwise_count(query[:, None, word] ^ codes[None, :, word]).astype(np.int32)
            for word in range(query.shape[1])
        )
        return torch.from_numpy(differing)

    def relevant(self, rows: slice, items: slice) -> torch.Tensor:
        """Return the (rows, items) boolean matrix of relevance."""
        labels, others = self.query_labels[rows], self.reference_labels[items]
        if self.compare is None:
            return share_a_label(labels, others)
        # Shapes as in PML's calculator, (Q, 1, ...) and (Q, N, ...).
        return self.compare(labels[:, None], others.expand(len(labels), *others.shape)).bool()

    def own(self, rows: slice, items: slice) -> torch.Tensor:
        """Return which of these queries stand among these items, if they are left out."""
        own = torch.arange(rows.start, rows.stop if self.leave_out else rows.start, device=self.device)
        return own[(own >= items.start) & (own < items.stop)]

    def count(self) -> tuple[torch.Tensor, torch.Tensor]:
        """Count the relevant and all items at each distance."""
        size = len(self.query), 2, self.bits + 1
        # The threads below are not in the caller's inference mode, whose tensors they could not fill.
        with torch.inference_mode(False):
            counts = torch.zeros(size, dtype=torch.long, device=self.device)
        # Histograms are counted on one thread each.
        with ThreadPoolExecutor(torch.get_num_threads()) as pool:
            for items, codes in self.blocks():

                def fill(rows: slice, items: slice = items, codes: Codes = codes) -> None:
                    # Small results that outlive the large ones beside them would keep the memory of these.
                    counts[rows] += self.count_rows(rows, items, codes)

                list(pool.map(fill, self.rows(min(4096, max(1, CHUNK // len(codes))))))
        other, relevant = counts.unbind(dim=1)
        return relevant, other + relevant

    def count_rows(self, rows: slice, items: slice, codes: Codes) -> torch.Tensor:
        """Return the (rows, 2, bits + 1) numbers of other and of relevant items at each distance."""
        width, size = self.bits + 1, rows.stop - rows.start
        # One histogram for all queries of the chunk and both kinds of items; what is left out goes to its end.
        places = self.distances(rows, codes).add_(self.relevant(rows, items), alpha=width)
        places += 2 * width * torch.arange(size, device=self.device)[:, None]
        own = self.own(rows, items)
        places[own - rows.start, own - items.start] = 2 * width * size
        found = torch.bincount(places.flatten(), minlength=2 * width * size + 1)
        return found[:-1].view(-1, 2, width)

    def stable_relevance(self, k: int) -> Iterator[tuple[slice, torch.Tensor]]:
        """Yield some queries and the (rows, k) relevance of their first k items, ties by place in the database."""
        for rows in self.rows(max(1, SORTED // len(self.reference))):
            distances, relevant = [], []
            for items, codes in self.blocks():
                part, own = self.distances(rows, codes).to(torch.int16), self.own(rows, items)
                part[own - rows.start, own - items.start] = self.bits + 1
                distances.append(part)
                relevant.append(self.relevant(rows, items))
            yield rows, torch.cat(relevant, 1).gather(1, stable_order(torch.cat(distances, 1))[:, :k])


def stable_order(distances: torch.Tensor) -> torch.Tensor:
    """Sort each row of small integers, equal ones by place; NumPy's radix sort is several times as fast as torch's."""
    if distances.is_cuda:
        return distances.argsort(dim=1, stable=True)
    return torch.from_numpy(distances.numpy().argsort(axis=1, kind="stable"))


def check(query, query_labels, reference, reference_labels, any_labels: bool) -> None:
    """Raise if codes and labels do not fit one another."""
    check_outputs(query, "query")
    packed = query.ndim == 2 and is_packed(reference, query.shape[1])
    for name, codes, labels in (("query", query, query_labels), ("reference", reference, reference_labels)):
        if not any_labels:
            check_multi_hot(labels, f"{name}_labels")
        if codes.ndim != 2 or len(codes) != len(labels):
            raise ValueError(
                f"{name} must be (N, bits) with a label for each row, but {name} has shape {tuple(codes.shape)} and "
                f"{name}_labels {tuple(labels.shape)}."
            )
    if not packed:
        check_outputs(torch.as_tensor(reference), "reference")
    if not packed and query.shape[1] != reference.shape[1]:
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
