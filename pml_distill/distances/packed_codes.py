import numpy as np
import torch

from ..utils.tensors import check_finite


def pack_codes(codes: torch.Tensor) -> torch.Tensor:
    """Pack the signs of (N, bits) outputs eight to a byte, (N, ceil(bits / 8)) uint8; 0 counts as -1.

    The first code is the lowest bit, as in faiss and ``numpy.packbits(bitorder="little")``; the last byte ends in 0.
    """
    # In parts, since what lies between is as large as the packed codes are small.
    parts = [np.packbits((x > 0).cpu().numpy(), axis=1, bitorder="little") for x in codes.detach().split(1 << 13)]
    return torch.from_numpy(np.concatenate(parts)).to(codes.device)


def check_outputs(codes: torch.Tensor, name: str) -> None:
    """Raise ``ValueError`` for packed codes, whose bytes would be taken for outputs, and for what is not finite."""
    if codes.dtype == torch.uint8:
        raise ValueError(f"{name} must be outputs or codes of -1 and 1, but is uint8; unpack_codes gives them back.")
    check_finite(**{name: codes})


def is_packed(reference: torch.Tensor | np.ndarray, bits: int) -> bool:
    """Tell whether a database holds packed codes of this many bits, as bytes."""
    return str(reference.dtype).endswith("uint8") and tuple(reference.shape[1:]) == (-(-bits // 8),)


def check_packed(packed: torch.Tensor | np.ndarray, bits: int) -> None:
    """Raise ``ValueError`` for packed codes whose last bytes have more bits, as those packed in another order have."""
    if bits % 8 and len(packed) and packed[:, -1].max() >= 1 << bits % 8:
        raise ValueError(
            f"reference {tuple(packed.shape)} must be packed codes of {bits} bits, lowest bit first, but has others "
            'set; pack with pack_codes, faiss, or numpy.packbits(bitorder="little").'
        )


def unpack_codes(packed: torch.Tensor, bits: int) -> torch.Tensor:
    """Return the (N, bits) float32 codes of -1 and 1 that ``pack_codes`` has packed."""
    places = torch.arange(8, dtype=torch.uint8, device=packed.device)
    ones = (packed[:, :, None] >> places) & 1
    return 2 * ones.flatten(1)[:, :bits].float() - 1
