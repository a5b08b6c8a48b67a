import os
from typing import Any

import numpy as np
import torch

from ..distances.packed_codes import pack_codes
from ..utils.files import whole_file
from ..utils.tensors import check_finite
from .hamming_knn import without_own

SAMPLE, GATHERED = 100_000, 1 << 24
Stored = torch.Tensor | np.ndarray


class QuantizedKNN:
    """Nearest neighbours by int8 or binary copies of embeddings: a ``knn_func`` for PML's calculator and testers.

    faiss finds ``rescore * k`` candidates among the copies; those are then compared anew with the query's real
    numbers. Distances are squared Euclidean ones, as PML's ``FaissKNN`` has them; normalise for cosine similarity, as
    PML's testers do.

    | bits | first pass | memory of D values | against float32 |
    |---|---|---|---|
    | 8 | ``IndexScalarQuantizer``, range per dimension | D bytes | 1/4 |
    | 1 | Hamming distance; a bit says whether a value is above its dimension's mean | D / 8 bytes | 1/32 |

    Args:
        bits: 8 or 1.
        rescore: how many candidates for each neighbour.
        rescore_with: what candidates are compared with. ``"float"``: the embeddings themselves, ``reference`` of the
            call or the attribute ``originals``, such as ``np.load(path, mmap_mode="r")``. ``"int8"``: int8 copies,
            which with bits=1 take another D bytes, but may stay on disk (``load``). ``"bits"``: the bits alone.
            Default: float where they are at hand, otherwise int8.

    Example:
        >>> embeddings = torch.nn.functional.normalize(torch.randn(500, 32, generator=torch.Generator().manual_seed(0)))
        >>> knn = QuantizedKNN(bits=1, rescore=8)
        >>> knn.train(embeddings)
        >>> knn(embeddings[:3], 1)[1].flatten().tolist()
        [0, 1, 2]
    """

    def __init__(self, bits: int = 8, rescore: int = 4, rescore_with: str | None = None):
        if bits not in (1, 8) or rescore < 1:
            raise ValueError(f"bits must be 8 or 1 and rescore at least 1, but are {bits} and {rescore}.")
        if rescore_with not in (None, "float", "int8") and not (rescore_with == "bits" and bits == 1):
            raise ValueError(
                f"rescore_with must be 'float', 'int8', with bits=1 'bits', or None, but is {rescore_with!r}."
            )
        self.bits, self.rescore, self.rescore_with = bits, rescore, rescore_with
        self.originals: Stored | None = None
        self.parts: list[tuple[np.ndarray, ...]] = []
        self.levels = torch.empty(0)
        self.index: Any = None

    def calibrate(self, sample: torch.Tensor) -> None:
        """Fit ranges and means of the dimensions to a sample (N, D), and forget the database."""
        import faiss

        check_finite(sample=sample)
        chosen = torch.randperm(len(sample), generator=torch.Generator().manual_seed(0))[:SAMPLE]
        sample = sample[chosen].cpu().float()
        self.index = faiss.IndexScalarQuantizer(sample.shape[1], faiss.ScalarQuantizer.QT_8bit)
        self.index.train(sample.numpy())
        means = sample.mean(dim=0)
        above = sample > means
        # What the two values of a bit stand for: the means of the two halves.
        high = (sample * above).sum(dim=0) / above.sum(dim=0).clamp(min=1)
        low = (sample * ~above).sum(dim=0) / (~above).sum(dim=0).clamp(min=1)
        self.levels, self.parts = torch.stack([means, low, high]), []

    def train(self, reference: torch.Tensor) -> None:
        """Calibrate on a database (N, D), and keep copies of it."""
        self.calibrate(reference)
        self.add(reference)

    def add(self, reference: torch.Tensor) -> None:
        """Append to the database; without ``calibrate`` the first rows are the sample."""
        if self.index is None:
            self.calibrate(reference)
        reference = self.checked(reference, "reference")
        if self.bits == 8:
            return self.index.add(reference.numpy())
        wanted = self.rescore_with in (None, "int8")
        int8 = self.index.sa_encode(reference.numpy()) if wanted else np.empty((len(reference), 0), np.uint8)
        self.parts.append((pack_codes(reference - self.levels[0]).numpy(), int8))

    def checked(self, embeddings: torch.Tensor, name: str) -> torch.Tensor:
        """Return embeddings on the CPU, if they fit the database."""
        check_finite(**{name: embeddings})
        if embeddings.ndim != 2 or embeddings.shape[1] != self.index.d:
            raise ValueError(f"{name} has shape {tuple(embeddings.shape)}, but the database is {self.index.d} wide.")
        return embeddings.detach().cpu().float().contiguous()

    def copies(self) -> tuple[np.ndarray, ...]:
        """Return the bits and the int8 copies of bits=1, each as one array."""
        if len(self.parts) > 1:
            self.parts = [tuple(np.concatenate(kind) for kind in zip(*self.parts))]
        return self.parts[0]

    def __len__(self) -> int:
        if self.index is None:
            return 0
        return self.index.ntotal if self.bits == 8 else sum(len(part[0]) for part in self.parts)

    @property
    def memory(self) -> int:
        """Bytes of all copies that are kept."""
        return len(self) * self.index.d if self.bits == 8 else sum(x.nbytes for part in self.parts for x in part)

    def save(self, path: str | os.PathLike) -> None:
        """Write the copies and what they were calibrated with, without ``originals``."""
        import faiss

        if not len(self):
            raise ValueError("no database is kept that could be saved: call train first.")
        index = torch.from_numpy(faiss.serialize_index(self.index))
        copies = [torch.from_numpy(copy) for copy in self.copies()] if self.bits == 1 else []
        state = {"bits": self.bits, "levels": self.levels, "index": index, "copies": copies}
        with whole_file(path) as unfinished:
            torch.save(state, unfinished)

    def load(self, path: str | os.PathLike) -> None:
        """Read what ``save`` wrote. With bits=1 the copies stay in the file, and are read where they are needed."""
        import faiss

        state = torch.load(path, map_location="cpu", weights_only=True, mmap=True)
        if not isinstance(state, dict) or "levels" not in state:
            raise ValueError(f"path {path} must be a file of QuantizedKNN.save, but holds something else.")
        if state["bits"] != self.bits:
            raise ValueError(f"path {path} was saved with bits={state['bits']}, but this search has bits={self.bits}.")
        self.levels, self.index = state["levels"], faiss.deserialize_index(state["index"].numpy())
        self.parts = [tuple(copy.numpy() for copy in state["copies"])] if self.bits == 1 else []

    def __call__(
        self, query: torch.Tensor, k: int, reference: torch.Tensor | None = None, ref_includes_query: bool = False
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Return squared distances (Q, k), ascending, and indices (Q, k) of the k nearest of each query (Q, D).

        Args:
            query: on whatever device.
            k: how many.
            reference: (N, D); None: the database that is kept.
            ref_includes_query: whether row i of the reference is query i, which is then left out.
        """
        if reference is not None:
            search = QuantizedKNN(self.bits, self.rescore, self.rescore_with)
            search.train(reference)
            search.originals = reference
            return search(query, k, None, ref_includes_query)
        wanted = k + ref_includes_query
        if not 0 < wanted <= len(self):
            raise ValueError(f"k = {wanted} neighbours are wanted of a database of {len(self)} rows; call train first.")
        asked, source = self.checked(query, "query"), self.source()
        # faiss compares int8 copies with real queries already.
        final = self.bits == 8 and source == "int8"
        candidates = min(len(self), wanted if final else self.rescore * wanted)
        if self.bits == 8:
            found, indices = (torch.from_numpy(x) for x in self.index.search(asked.numpy(), candidates))
        else:
            import faiss

            codes = pack_codes(asked - self.levels[0]).numpy()
            indices = torch.from_numpy(faiss.knn_hamming(codes, self.copies()[0], candidates)[1]).long()
        if not final:
            step = max(1, GATHERED // (candidates * asked.shape[1]))
            found = torch.cat([self.distances(*part, source) for part in zip(asked.split(step), indices.split(step))])
            found, order = found.topk(wanted, largest=False)
            indices = indices.gather(1, order)
        if ref_includes_query:
            found, indices = without_own(found, indices)
        return found.to(query.device), indices.to(query.device)

    def source(self) -> str:
        """Return what candidates are compared with."""
        source = self.rescore_with or ("int8" if self.originals is None else "float")
        if source == "float" and (self.originals is None or len(self.originals) != len(self)):
            held = "None" if self.originals is None else f"{len(self.originals)} rows"
            raise ValueError(f"rescore_with is 'float', but originals is {held} for a database of {len(self)} rows.")
        if self.bits == 1 and source == "int8" and not self.copies()[1].size:
            raise ValueError("rescore_with is 'int8', but the database has bits alone; build it with 'int8'.")
        return source

    def distances(self, query: torch.Tensor, places: torch.Tensor, source: str) -> torch.Tensor:
        """Return the (Q, candidates) squared distances to some places, as exact as the source has them."""
        flat = places.flatten()
        if source == "bits":
            ones = np.unpackbits(self.copies()[0][flat.numpy()], axis=1, count=self.index.d, bitorder="little")
            low, high = (query - self.levels[1]).square(), (query - self.levels[2]).square()
            # Each bit that is set adds the difference.
            chosen = torch.from_numpy(ones).float().view(*places.shape, -1) @ (high - low)[:, :, None]
            return low.sum(dim=1, keepdim=True) + chosen[..., 0]
        if source == "float" and self.originals is not None:
            rows = self.originals[flat.to(self.originals.device) if torch.is_tensor(self.originals) else flat.numpy()]
            values = torch.as_tensor(rows).cpu().float()
        else:
            values = torch.from_numpy(self.index.sa_decode(np.ascontiguousarray(self.copies()[1][flat.numpy()])))
        mode = "donot_use_mm_for_euclid_dist"
        return torch.cdist(values.view(*places.shape, -1), query[:, None], compute_mode=mode)[..., 0].square()
