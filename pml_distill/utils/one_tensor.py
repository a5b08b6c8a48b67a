from typing import Any

import torch


def one_tensor(output: Any, name: str, advice: str = "") -> torch.Tensor:
    """Return the embeddings that a network has returned; raise ``ValueError`` if it returned something else."""
    if not isinstance(output, torch.Tensor):
        kind = type(output).__name__
        raise ValueError(f"{name} must return one tensor of embeddings, but returned a {kind}{advice}.")
    return output
