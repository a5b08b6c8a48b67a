from typing import Any

import numpy as np
import torch

from ..utils.tensors import check_finite

LAYOUTS = {"faiss": (1, 8), "usearch": (1, 8), "pgvector": (1,), "qdrant": (8,)}


def quantize(
    embeddings: torch.Tensor, bits: int = 8, layout: str = "faiss", calibration: torch.Tensor | None = None
) -> Any:
    """Return embeddings as bytes or bits, laid out for a vector store of yours.

    - ``"faiss"``: (N, D) uint8 for ``add_sa_codes`` of an ``IndexScalarQuantizer`` (``QT_8bit``) that was trained on
      the calibration rows; (N, ceil(D / 8)) uint8 for ``IndexBinaryFlat``, the lowest bit first.
    - ``"usearch"``: (N, D) int8, one scale for all, for ``dtype="i8"``; (N, ceil(D / 8)) uint8 for ``"b1"``, the
      highest bit first.
    - ``"qdrant"``: (N, D) uint8, one scale for all, for ``Datatype.UINT8`` and the Euclidean distance; no bits.
    - ``"pgvector"``: N strings of 0 and 1 for the type ``bit(D)``; no bytes.

    A bit says whether a value is above the mean of its dimension. Give the same ``calibration`` rows for the database
    and for its queries.

    Args:
        embeddings: (N, D).
        bits: 8 or 1.
        layout: of which store.
        calibration: (M, D) rows for ranges and means; None: the embeddings themselves. Values beyond are cut off.

    Example:
        >>> rows = torch.tensor([[1.0, -2.0, 0.5], [0.0, 2.0, -0.5]])
        >>> quantize(rows, bits=1, layout="pgvector")
        ['101', '010']
        >>> quantize(rows, layout="usearch").tolist()
        [[64, -127, 32], [0, 127, -32]]
    """
    if bits not in LAYOUTS.get(layout, ()):
        known = ", ".join(f"{name} (bits {', '.join(map(str, each))})" for name, each in LAYOUTS.items())
        raise ValueError(f"layout {layout!r} with bits={bits} is none of those known: {known}.")
    sample = (embeddings if calibration is None else calibration).detach().cpu().float()
    rows = embeddings.detach().cpu().float()
    check_finite(embeddings=rows, calibration=sample)
    if bits == 1:
        above = (rows > sample.mean(dim=0)).numpy()
        if layout == "pgvector":
            return ["".join(row) for row in np.where(above, "1", "0")]
        return np.packbits(above, axis=1, bitorder="little" if layout == "faiss" else "big")
    if layout == "faiss":
        import faiss

        index = faiss.IndexScalarQuantizer(rows.shape[1], faiss.ScalarQuantizer.QT_8bit)
        index.train(sample.numpy())
        return index.sa_encode(rows.numpy())
    # One scale for all dimensions, since these stores compare the integers themselves.
    scaled = (rows * (127 / sample.abs().max().clamp(min=1e-12))).round().clamp(-127, 127)
    return scaled.to(torch.int8).numpy() if layout == "usearch" else (scaled + 128).to(torch.uint8).numpy()
