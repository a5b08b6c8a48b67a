"""Figures of rankings with ties, from the numbers of relevant and of all items in each group of tied ones.

Both are (Q, groups) float64, nearest first. ``ties`` is "best" or "worst" for a bound over all orders of tied items,
and anything else for the expectation over them; where each group is one item, all of these are the same.
"""

import torch


def places_within(total: torch.Tensor, k: int) -> torch.Tensor:
    """Return how many places of each group are among the first k."""
    return torch.minimum(total, (k - total.cumsum(dim=1) + total).clamp(min=0))


def relevant_within(relevant: torch.Tensor, total: torch.Tensor, k: int, ties: str) -> torch.Tensor:
    """Return the (Q,) numbers of relevant items among the first k."""
    places = places_within(total, k)
    if ties == "best":
        return torch.minimum(relevant, places).sum(dim=1)
    if ties == "worst":
        return (places - total + relevant).clamp(min=0).sum(dim=1)
    return (relevant * places / total.clamp(min=1)).sum(dim=1)


def average_precision(relevant: torch.Tensor, total: torch.Tensor, k: int, ties: str) -> torch.Tensor:
    """Return the (Q,) average precisions of the first k items, divided by the number of relevant ones among them."""
    places = places_within(total, k)
    before, hits_before = total.cumsum(dim=1) - total, relevant.cumsum(dim=1) - relevant
    size, whole = int(total.sum(dim=1).max()), places == total
    sums = (precision_sums(relevant, total, before, hits_before, size, ties) * whole).sum(dim=1, keepdim=True)
    hits = (relevant * whole).sum(dim=1, keepdim=True)

    # The first group that is not whole, if there is one, is cut by the k-th place; h relevant items of it come in.
    column = (~whole).long().argmax(dim=1, keepdim=True)
    n, r, m, start = ((x * ~whole).gather(1, column) for x in (total, relevant, places, before))
    h = torch.arange(int(torch.minimum(r, m).max()) + 1, dtype=torch.float64, device=total.device)
    possible = (h <= r) & (h <= m) & (m - h <= n - r)
    values = (sums + precision_sums(h, m, start, hits, size, ties)) / (hits + h).clamp(min=1)
    # One more relevant item can lower the average precision, so that the bounds try each number of them.
    if ties == "best":
        return values.where(possible, -torch.inf).amax(dim=1)
    if ties == "worst":
        return values.where(possible, torch.inf).amin(dim=1)
    chances = (log_choose(r, h) + log_choose(n - r, m - h) - log_choose(n, m)).exp()
    return (chances * values).where(possible, 0).sum(dim=1)


def precision_sums(relevant, total, before, hits_before, size: int, ties: str) -> torch.Tensor:
    """Return the sum of the precisions at the relevant ones of ``total`` tied places, of ``size`` in all."""
    if ties in ("best", "worst"):
        # They come first or last, one after the other: a group of relevant items alone.
        before = before + (total - relevant if ties == "worst" else 0)
        total = relevant
    harmonic = 1 / torch.arange(size + 1, dtype=torch.float64, device=before.device)
    harmonic[0] = 0
    harmonic = harmonic.cumsum(dim=0)
    reciprocals = harmonic[(before + total).long().clamp(0, size)] - harmonic[before.long().clamp(0, size)]
    # At place j the relevant ones before it within the tie are (j - 1)(r - 1) / (n - 1) on average.
    others = (relevant - 1) / (total - 1).clamp(min=1)
    sums = (hits_before + 1) * reciprocals + others * (total - (before + 1) * reciprocals)
    return relevant / total.clamp(min=1) * sums


def log_choose(n: torch.Tensor, k: torch.Tensor) -> torch.Tensor:
    """Return the logarithm of the binomial coefficient."""
    return torch.lgamma(n + 1) - torch.lgamma(k + 1) - torch.lgamma(n - k + 1)
