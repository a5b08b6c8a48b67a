import torch


def row_lengths(weight: torch.Tensor) -> torch.Tensor:
    """Return the length of each row; where it is zero, so is its gradient."""
    return weight.flatten(1).norm(dim=1)


def group_lasso(weights: list[torch.Tensor]) -> torch.Tensor:
    r"""Return the sum of the lengths of all rows, :math:`\sum_W \sum_j \|W_j\|_2`; a zero row has gradient zero.

    Source: the compression loss of Xie et al., "Towards a Smaller Student" (CVPR 2023).
    """
    return torch.stack([torch.linalg.vector_norm(weight.flatten(1), dim=1).sum() for weight in weights]).sum()


@torch.no_grad()
def add_lasso_gradient(weight: torch.Tensor, strength: float) -> None:
    r"""Add ``strength`` :math:`\cdot W_j / \|W_j\|` to the gradient of each row, nothing to that of a zero row."""
    rows = weight.flatten(1)
    norms = torch.linalg.vector_norm(rows, dim=1, keepdim=True)
    pull = torch.where(norms == 0, 0, strength * rows / norms).view_as(weight)
    weight.grad = pull if weight.grad is None else weight.grad.add_(pull)


@torch.no_grad()
def shrink_rows(weight: torch.Tensor, amount: float) -> None:
    """Make each row shorter by ``amount``; those not longer than that become exactly zero (the proximal step)."""
    rows = weight.flatten(1)
    norms = torch.linalg.vector_norm(rows, dim=1, keepdim=True)
    # In this order, so that a row of NaN stays one and is found.
    weight.copy_(torch.where(norms <= amount, 0, rows * (1 - amount / norms)).view_as(weight))
