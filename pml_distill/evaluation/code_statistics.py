from dataclasses import dataclass

import torch

from ..distances.packed_codes import check_outputs


@dataclass(frozen=True)
class CodeStatistics:
    """How well codes use their bits: two figures, and what they are the means of.

    ``imbalance`` is the mean of abs(``means``), 0 where each bit is 1 for half of the codes, and 1 where all bits are
    constant. ``dependence`` is the mean absolute correlation of two bits, 0 where they are independent; a constant bit
    has none with the others.
    """

    imbalance: float
    dependence: float
    means: torch.Tensor
    correlations: torch.Tensor


def code_statistics(codes: torch.Tensor) -> CodeStatistics:
    """Measure balance and independence of the bits, which hashing losses want and spectral hashing asks for.

    Source: Weiss et al., "Spectral Hashing", NIPS 2008.

    Args:
        codes: (N, bits) outputs, whose signs count, or codes; N from 2. ``unpack_codes`` gives packed ones back.

    Example:
        >>> found = code_statistics(torch.tensor([[1.0, 1, 1], [1, -1, 1], [-1, 1, 1], [-1, -1, 1]]))
        >>> round(found.imbalance, 3), found.dependence
        (0.333, 0.0)
    """
    check_outputs(codes, "codes")
    if codes.ndim != 2 or len(codes) < 2:
        raise ValueError(f"codes must be (N, bits) with at least two rows, but has shape {tuple(codes.shape)}.")
    signs = torch.where(codes > 0, 1.0, -1.0)
    means = signs.mean(dim=0)
    deviations = (1 - means.square()).sqrt()
    covariances = signs.T @ signs / len(signs) - means[:, None] * means
    products = deviations[:, None] * deviations
    # Rounding leaves a constant bit a deviation of 1e-4 or less.
    correlations = torch.where(products > 1e-6, covariances / products.clamp(min=1e-6), 0.0)
    bits = len(means)
    others = correlations.abs().sum() - correlations.diagonal().abs().sum()
    return CodeStatistics(means.abs().mean().item(), (others / max(bits * (bits - 1), 1)).item(), means, correlations)
