from collections.abc import Callable, Iterator

import numpy as np
import torch

from ..distances.packed_codes import check_outputs, check_packed, is_packed, pack_codes, unpack_codes
from ..utils.labels import check_labels, flat, share_a_label

# Pairs that are counted at once, items that are unpacked at once, pairs that are sorted at once.
PAIRS, BLOCK, SORTED = 1 << 20, 1 << 17, 1 << 22
Codes = torch.Tensor | np.ndarray


class Ranking:
    """A database of codes ranked by their Hamming distance to each query.

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
        check_outputs(query, "query")
        packed = query.ndim == 2 and is_packed(reference, query.shape[1])
        if not packed:
            check_outputs(torch.as_tensor(reference), "reference")
        shapes = f"query {tuple(query.shape)} and reference {tuple(reference.shape)}"
        if query.ndim != 2 or not (packed or reference.shape[1:] == query.shape[1:]):
            raise ValueError(f"{shapes} must be (Q, bits) and (N, bits) with the same number of bits.")
        check_labels(
            (len(query), len(reference)),
            label_comparison_fn is not None,
            query_labels=query_labels,
            reference_labels=reference_labels,
        )
        self.bits, self.size, self.leave_out = query.shape[1], len(reference) - ref_includes_query, ref_includes_query
        if len(query) == 0 or self.size < 1:
            raise ValueError(f"{shapes} must not be empty{' without the query itself' * ref_includes_query}.")
        first = reference_labels[: len(query)]
        if ref_includes_query and not (len(first) == len(query) and (query_labels == first).all()):
            raise ValueError(
                f"ref_includes_query says that query i is item i, but of {shapes} the query has more rows, or their "
                "labels differ."
            )
        self.compare = label_comparison_fn or share_a_label
        self.reference = reference if packed else pack_codes(torch.as_tensor(reference))
        self.query = torch.where(query > 0, 1.0, -1.0)
        self.query_labels, self.reference_labels = query_labels, reference_labels

    def blocks(self) -> Iterator[tuple[slice, torch.Tensor]]:
        """Yield slices of the database with their codes."""
        for items in slices(len(self.reference), BLOCK):
            block = self.reference[items]
            check_packed(block, self.bits)
            # A copy of what is mapped to memory, which PyTorch could not protect.
            part = torch.tensor(block) if isinstance(block, np.ndarray) else block
            yield items, unpack_codes(part.to(self.query.device), self.bits)

    def compared(self, rows: slice, items: slice, codes: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Return (rows, items) distances and relevance; the query itself, if it is left out, is farther than all."""
        distances = ((self.bits - self.query[rows] @ codes.T) / 2).to(torch.int16)
        if self.leave_out:
            distances.diagonal(rows.start - items.start).fill_(self.bits + 1)
        labels, others = self.query_labels[rows], self.reference_labels[items]
        if self.compare is not share_a_label:
            # Shapes as in PML's calculator, (Q, 1, ...) and (Q, N, ...).
            labels, others = labels[:, None], others.expand(len(labels), *others.shape)
        return distances, self.compare(labels, others).bool()

    def groups(self, stable: bool = False) -> Iterator[tuple[torch.Tensor, torch.Tensor, torch.Tensor]]:
        """Yield, for some queries at a time, the numbers of relevant and of all tied items, and their distance.

        Each is (rows, groups), nearest first. ``stable``: each item is a group of its own, ties by place.
        """
        if not stable:
            relevant, total = self.counts()
            yield relevant, total, torch.arange(self.bits + 1, device=total.device).expand_as(total)
            return
        for rows in slices(len(self.query), SORTED // len(self.reference)):
            parts = zip(*(self.compared(rows, *block) for block in self.blocks()))
            distances, relevant = (torch.cat(part, dim=1) for part in parts)
            # NumPy's radix sort is several times as fast as torch's.
            order = torch.from_numpy(distances.cpu().numpy().argsort(axis=1, kind="stable")).to(distances.device)
            distances = distances.gather(1, order)
            yield relevant.gather(1, order) & (distances <= self.bits), distances <= self.bits, distances

    def counts(self) -> tuple[torch.Tensor, torch.Tensor]:
        """Return the (Q, bits + 1) numbers of relevant and of all items at each distance."""
        width = self.bits + 2
        counts = torch.zeros(len(self.query), 2, width, dtype=torch.long, device=self.query.device)
        for items, codes in self.blocks():
            for rows in slices(len(self.query), PAIRS // len(codes)):
                distances, relevant = self.compared(rows, items, codes)
                # One histogram for all of these queries, and for both kinds of items.
                starts = 2 * width * torch.arange(len(distances), dtype=torch.int32, device=distances.device)
                places = (starts[:, None] + distances).add_(relevant, alpha=width).flatten()
                counts[rows] += places.bincount(minlength=2 * width * len(distances)).view(-1, 2, width)
        other, relevant = counts[..., :-1].unbind(dim=1)
        return relevant, other + relevant


def slices(size: int, step: int) -> Iterator[slice]:
    """Yield slices of at least one that make up ``size``."""
    step = max(1, step)
    for start in range(0, size, step):
        yield slice(start, min(start + step, size))
