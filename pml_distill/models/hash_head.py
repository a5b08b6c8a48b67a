from torch import nn


class HashHead(nn.Linear):
    """An embedder that ends in ``bits`` real outputs; their signs are the binary code.

    The linear layer alone: ``CentralSimilarityLoss`` applies its own tanh, ``DeepCauchyHashingLoss`` needs none.
    The input width is that of the trunk, its ``output_size``.

    Args:
        bits: length of the code.
        in_features: width of the trunk's features.

    Shapes:
        features: (B, in_features). Returns (B, bits).

    Raises:
        ValueError: ``bits`` is not positive.

    Example:
        >>> import torch
        >>> HashHead(48, in_features=128)(torch.zeros(2, 128)).shape
        torch.Size([2, 48])
    """

    def __init__(self, bits: int, in_features: int = 2048):
        if bits < 1:
            raise ValueError(f"bits must be at least 1, but is {bits}.")
        super().__init__(in_features, bits)
