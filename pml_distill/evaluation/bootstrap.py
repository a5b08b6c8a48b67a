import torch


def bootstrap_interval(
    values: torch.Tensor,
    groups: torch.Tensor | None = None,
    level: float = 0.95,
    resamples: int = 1000,
    seed: int = 0,
) -> tuple[float, float]:
    """Return a bootstrap confidence interval for the mean of any figure over queries, by its percentiles.

    Args:
        values: (Q,), one for each query, such as those of ``retrieval_values``; NaN: the query does not count.
        groups: (Q,), such as the classes of the queries. Whole groups are drawn then, which is wider and right for
            new classes, since queries of one class find much the same.
        level: share of the resamples within the interval.
        resamples: how many times as many queries (or groups) are drawn, with replacement.
        seed: of the draws.

    Example:
        >>> low, high = bootstrap_interval(torch.tensor([0.0, 1.0]).repeat(50))
        >>> round(low, 1), round(high, 1)
        (0.4, 0.6)
    """
    if not 0 < level < 1:
        raise ValueError(f"level must be between 0 and 1, but is {level}.")
    if groups is not None and len(groups) != len(values):
        raise ValueError(f"groups must have one entry for each of {len(values)} values, but has {len(groups)}.")
    values = values.detach().cpu().double()
    counted = ~values.isnan()
    if not counted.any():
        raise ValueError("values has no query that counts: all are NaN, or there are none.")
    values = values[counted]
    sums, sizes = values, torch.ones_like(values)
    if groups is not None:
        places = groups.cpu()[counted].unique(return_inverse=True)[1]
        sums, sizes = (torch.zeros(int(places.max()) + 1).double().index_add_(0, places, x) for x in (sums, sizes))
    generator = torch.Generator().manual_seed(seed)
    means = torch.empty(resamples, dtype=torch.float64)
    for i in range(resamples):
        drawn = torch.randint(len(sums), (len(sums),), generator=generator)
        means[i] = sums[drawn].sum() / sizes[drawn].sum()
    low, high = means.quantile(torch.tensor([(1 - level) / 2, (1 + level) / 2]).double()).tolist()
    return low, high
