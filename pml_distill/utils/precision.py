import torch


def in_float32(tensor: torch.Tensor) -> torch.Tensor:
    """Raise half precision to float32; float64 stays."""
    return tensor.to(torch.promote_types(tensor.dtype, torch.float32))
