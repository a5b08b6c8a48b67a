from torch import nn


class HashHead(nn.Linear):
    """An embedder that ends in ``bits`` real outputs; their signs are the binary code.

    The linear layer alone: ``CentralSimilarityLoss`` applies its own tanh, ``DeepCauchyHashingLoss`` needs none.
    The input width is that of the trunk, its ``output_size``.

    Args:
        in_features: width of the trunk's features.
        bits: length of the code.

    Shapes:
        features: (B, in_features). Returns (B, bits).

    Raises:
        ValueError: ``bits`` is not positive.

    Example:
        >>> import torch
        >>> HashHead(128, 48)(torch.zeros(2, 128)).shape
        torch.Size([2, 48])
    """

    def __init__(self, in_features: int, bits: int):
        if bits < 1:
            raise ValueError(f"bits must be at least 1, but is {bits}.")
        super().__init__(in_features, bits)
