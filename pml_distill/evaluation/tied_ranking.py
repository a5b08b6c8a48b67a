"""Figures of rankings with ties, from the numbers of relevant and of all items at each distance."""

import torch

FIRST, LAST = ("best", "relevant_first"), ("worst", "relevant_last")


def within(total: torch.Tensor, k: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Return how many items come before each distance, and how many of its places are among the first k."""
    before = total.cumsum(dim=1) - total
    return before, torch.minimum(total, (k - before).clamp(min=0))


def relevant_within(relevant: torch.Tensor, total: torch.Tensor, k: int, ties: str) -> torch.Tensor:
    """Return the (expected, largest or smallest) number of relevant items among the first k of each query."""
    places = within(total, k)[1]
    if ties in FIRST:
        found = torch.minimum(relevant, places).double()
    elif ties in LAST:
        found = (places - (total - relevant)).clamp(min=0).double()
    else:
        found = relevant * places.double() / total.clamp(min=1)
    return found.sum(dim=1)


def precision_of_order(relevant: torch.Tensor) -> torch.Tensor:
    """Return the (Q,) average precisions of rankings, (Q, k) booleans."""
    places = torch.arange(1, relevant.shape[1] + 1, dtype=torch.float64, device=relevant.device)
    hits = relevant.cumsum(dim=1)
    return (relevant * hits / places).sum(dim=1) / hits[:, -1].clamp(min=1)


def average_precision(relevant: torch.Tensor, total: torch.Tensor, k: int, ties: str = "expected") -> torch.Tensor:
    """Return the (Q,) average precisions of the first k items, from the counts (Q, distances) of items.

    The expected value over all orders of tied items, the largest ("best"), the smallest ("worst"), or one order's.
    """
    before, places = within(total, k)
    size = int(total.sum(dim=1).max())
    harmonic = torch.zeros(size + 1, dtype=torch.float64, device=total.device)
    harmonic[1:] = (1 / torch.arange(1, size + 1, dtype=torch.float64, device=total.device)).cumsum(dim=0)
    hits_before = (relevant.cumsum(dim=1) - relevant).double()

    whole = places == total
    sums = tied_sums(relevant.double(), total, before, hits_before, harmonic, ties)
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
    partial = tied_sums(h, m.long(), start.long(), hits[:, None], harmonic, ties)
    values = (sums[:, None] + partial) / (hits[:, None] + h).clamp(min=1)
    # One more relevant item can lower the average precision, so that each number of them is tried.
    if ties == "best":
        cut = values.where(possible, -torch.inf).amax(dim=1)
    elif ties == "worst":
        cut = values.where(possible, torch.inf).amin(dim=1)
    elif ties in ("relevant_first", "relevant_last"):
        number = torch.minimum(r, m) if ties in FIRST else (m - (n - r)).clamp(min=0)
        cut = values.gather(1, number.long())[:, 0]
    else:
        probability = (log_choose(r, h) + log_choose(n - r, m - h) - log_choose(n, m)).exp() * possible
        cut = (probability * values).sum(dim=1)
    return torch.where(is_cut[:, 0], cut, sums / hits.clamp(min=1))


def tied_sums(relevant, total, before, hits_before, harmonic, ties) -> torch.Tensor:
    """Return the sum of the precisions at the relevant ones of ``total`` tied places, expected, largest or smallest."""
    if ties != "expected":
        # The relevant items come first or last, one after the other: the sum of (hits_before + i) / (first + i).
        first = before + torch.zeros_like(relevant).long() if ties in FIRST else before + total - relevant.long()
        last = (first + relevant.long()).clamp(max=len(harmonic) - 1)
        return relevant + (hits_before - first) * (harmonic[last] - harmonic[first.clamp(min=0)])
    reciprocals = harmonic[before + total] - harmonic[before]
    # At place j the relevant ones before it within the tie are (j - 1)(r - 1) / (n - 1) on average.
    others = (relevant - 1) / (total - 1).clamp(min=1)
    sums = (hits_before + 1) * reciprocals + others * (total - (before + 1) * reciprocals)
    return relevant / total.clamp(min=1) * sums


def log_choose(n: torch.Tensor, k: torch.Tensor) -> torch.Tensor:
    """Return the logarithm of the binomial coefficient, of anything where there is none."""
    k = torch.minimum(k.clamp(min=0), n)
    return torch.lgamma(n + 1) - torch.lgamma(k + 1) - torch.lgamma(n - k + 1)
