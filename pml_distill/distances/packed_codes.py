import torch

PART = 1 << 13


def pack_codes(codes: torch.Tensor) -> torch.Tensor:
    """Pack the signs of (N, bits) outputs eight to a byte, (N, ceil(bits / 8)) uint8; 0 counts as -1.

    The first code is the highest bit, as in ``numpy.packbits``; what is left of the last byte is 0.

    Example:
        >>> pack_codes(torch.tensor([[1.0, -1, -1, -1, -1, -1, -1, 1, 1]])).tolist()
        [[129, 128]]
    """
    size, bits = codes.shape
    packed = torch.zeros(size, -(-bits // 8), dtype=torch.uint8, device=codes.device)
    positive = codes > 0
    for place in range(8):
        column = positive[:, place::8].to(torch.uint8)
        packed[:, : column.shape[1]] |= column << (7 - place)
    return packed


def check_outputs(codes: torch.Tensor, name: str) -> None:
    """Raise ``ValueError`` for packed codes, whose bytes would be taken for outputs, and for what is not finite."""
    if codes.dtype == torch.uint8:
        raise ValueError(f"{name} must be outputs or codes of -1 and 1, but is uint8; unpack_codes gives them back.")
    # In parts, since what the check allocates is as large as the outputs.
    if not all(part.isfinite().all() for part in codes.split(PART)):
        raise ValueError(f"{name} {tuple(codes.shape)} must be finite, but has values that are not.")


def unpack_codes(packed: torch.Tensor, bits: int) -> torch.Tensor:
    """Return the (N, bits) float32 codes of -1 and 1 that ``pack_codes`` has packed.

    Example:
        >>> unpack_codes(torch.tensor([[129]], dtype=torch.uint8), 8).tolist()
        [[1.0, -1.0, -1.0, -1.0, -1.0, -1.0, -1.0, 1.0]]
    """
    places = torch.arange(7, -1, -1, dtype=torch.uint8, device=packed.device)
    ones = (packed[:, :, None] >> places) & 1
    return 2 * ones.flatten(1)[:, :bits].float() - 1
