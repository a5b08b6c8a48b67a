"""Figures of rankings with ties, from the numbers of relevant and of all items at each distance."""

import torch


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
    sums = tied_sums(relevant.double(), total, before, hits_before, harmonic)
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
    partial = tied_sums(h, m.long(), start.long(), hits[:, None], harmonic)
    cut_values = (probability * (sums[:, None] + partial) / (hits[:, None] + h).clamp(min=1)).sum(dim=1)
    return torch.where(is_cut[:, 0], cut_values, sums / hits.clamp(min=1))


def tied_sums(relevant, total, before, hits_before, harmonic) -> torch.Tensor:
    """Return the expected sum of the precisions at the relevant ones of ``total`` places in random order."""
    reciprocals = harmonic[before + total] - harmonic[before]
    # At place j the relevant ones before it within the tie are (j - 1)(r - 1) / (n - 1) on average.
    others = (relevant - 1) / (total - 1).clamp(min=1)
    sums = (hits_before + 1) * reciprocals + others * (total - (before + 1) * reciprocals)
    return relevant / total.clamp(min=1) * sums


def log_choose(n: torch.Tensor, k: torch.Tensor) -> torch.Tensor:
    """Return the logarithm of the binomial coefficient, of anything where there is none."""
    k = torch.minimum(k.clamp(min=0), n)
    return torch.lgamma(n + 1) - torch.lgamma(k + 1) - torch.lgamma(n - k + 1)
