import os
from collections.abc import Callable

import numpy as np
import torch

from ..distances.packed_codes import check_outputs, check_packed, is_packed, pack_codes, unpack_codes
from ..utils.files import whole_file

Codes = torch.Tensor | np.ndarray


class HammingKNN:
    """Nearest neighbours of binary codes: a ``knn_func`` for PML's ``AccuracyCalculator``, its testers and others.

    Real outputs become codes by their signs (0 counts as -1), packed eight to a byte. On the CPU faiss compares the
    packed codes; on a GPU torch does, by products of the codes in chunks. The search is exact; between equal
    distances the order is arbitrary.

    Example:
        >>> codes = torch.tensor([[1.0, 1, 1, 1], [1, 1, -1, -1], [1, 1, 1, -1]])
        >>> knn = HammingKNN()
        >>> distances, indices = knn(codes[:1], 2, codes[1:])
        >>> distances.tolist(), indices.tolist()
        ([[1.0, 2.0]], [[1, 0]])
    """

    def __init__(self) -> None:
        self.parts: list[torch.Tensor] = []
        self.bits = 0

    @property
    def database(self) -> torch.Tensor | None:
        """The packed codes that are kept, (N, bytes)."""
        if len(self.parts) > 1:
            # Joined once for a search, not at each addition.
            self.parts = [torch.cat(self.parts)]
        return self.parts[0] if self.parts else None

    def train(self, reference: torch.Tensor) -> None:
        """Keep the packed codes of a database (N, bits), to be searched without giving ``reference`` again."""
        self.parts, self.bits = [packed(reference, "reference")], reference.shape[1]

    def add(self, reference: torch.Tensor) -> None:
        """Append to the database, for one that does not fit into memory as real outputs."""
        if not self.parts:
            return self.train(reference)
        check_bits(reference, self.bits, "reference")
        self.parts.append(packed(reference, "reference").to(self.parts[0].device))

    def save(self, path: str | os.PathLike) -> None:
        """Write the database that is kept; ``InferenceModel.save_knn_func`` calls this."""
        if self.database is None:
            raise ValueError("no database is kept that could be saved: call train first.")
        with whole_file(path) as unfinished:
            torch.save({"database": self.database, "bits": self.bits, "lowest_first": True}, unfinished)

    def load(self, path: str | os.PathLike) -> None:
        """Read a database that ``save`` wrote, in place of the one that is kept."""
        state = torch.load(path, map_location="cpu", weights_only=True)
        if not isinstance(state, dict) or not {"database", "bits"} <= state.keys():
            raise ValueError(f"path {path} must be a file of HammingKNN.save, but holds something else.")
        database, self.bits = state["database"], state["bits"]
        if "lowest_first" not in state:
            # Earlier versions packed the first bit highest.
            database = torch.from_numpy(np.packbits(np.unpackbits(database.numpy(), axis=1), axis=1, bitorder="little"))
        self.parts = [database]

    def __call__(
        self, query: torch.Tensor, k: int, reference: Codes | None = None, ref_includes_query: bool = False
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Search the k nearest of each query (Q, bits).

        Args:
            query: outputs or codes.
            k: how many.
            reference: (N, bits), or packed by ``pack_codes``, (N, ceil(bits / 8)) uint8, also a ``numpy.memmap``;
                None: the database kept by ``train``.
            ref_includes_query: whether row i of the reference is query i, which is then left out.

        Returns:
            Distances (Q, k), float32, ascending, and indices (Q, k).

        Raises:
            ValueError: there are fewer than k codes, of another number of bits, or values are not finite.
        """
        if reference is None:
            if self.database is None:
                raise ValueError("reference is None and no database is kept: pass reference, or call train first.")
            self.parts = [self.database.to(query.device)]
            database: Codes = self.parts[0]
            bits = self.bits
        elif query.ndim == 2 and is_packed(reference, query.shape[1]):
            check_packed(reference, query.shape[1])
            bits = query.shape[1]
            # A file that is mapped to memory stays one on the CPU.
            database = torch.as_tensor(reference).to(query.device) if query.is_cuda else reference
        else:
            database, bits = packed(torch.as_tensor(reference), "reference").to(query.device), reference.shape[1]
        check_bits(query, bits, "query")
        wanted = k + ref_includes_query
        if not 0 < wanted <= len(database):
            beside = " beside the query itself" if ref_includes_query else ""
            raise ValueError(f"k = {k} neighbours{beside} are wanted of a database of {len(database)} codes.")
        search: Callable = search_on_gpu if query.is_cuda else search_on_cpu
        distances, indices = search(packed(query, "query"), database, bits, wanted)
        return without_own(distances, indices) if ref_includes_query else (distances, indices)


def packed(codes: torch.Tensor, name: str) -> torch.Tensor:
    """Return the codes packed, if they are codes."""
    if codes.ndim != 2 or codes.numel() == 0:
        raise ValueError(f"{name} must be (N, bits) and not empty, but has shape {tuple(codes.shape)}.")
    check_outputs(codes, name)
    return pack_codes(codes)


def without_own(distances: torch.Tensor, indices: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Leave out of (Q, k + 1) neighbours the query itself, which is row i of the database."""
    is_self = indices == torch.arange(len(indices), device=indices.device)[:, None]
    # Where duplicates have pushed the query out of its own list, the last of them makes room.
    is_self[:, -1] |= ~is_self.any(dim=1)
    return distances[~is_self].view(len(indices), -1), indices[~is_self].view(len(indices), -1)


def check_bits(codes: torch.Tensor, bits: int, name: str) -> None:
    """Raise ``ValueError`` for codes that are not as long as the database's."""
    if codes.ndim != 2 or codes.shape[1] != bits:
        raise ValueError(f"{name} has shape {tuple(codes.shape)}, but the database was built with {bits} bits.")


def search_on_cpu(query: torch.Tensor, database: Codes, bits: int, k: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Search packed codes with faiss, in place: an index would copy the database."""
    import faiss

    distances, indices = faiss.knn_hamming(query.numpy(), np.ascontiguousarray(database), k)
    return torch.from_numpy(distances).float(), torch.from_numpy(indices).long()


def search_on_gpu(query: torch.Tensor, database: torch.Tensor, bits: int, k: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Search packed codes with torch, a chunk of queries and of the database at a time."""
    found = []
    for part in unpack_codes(query, bits).split(1024):
        near = []
        for start, codes in enumerate(database.split(1 << 17)):
            distances = (bits - part @ unpack_codes(codes, bits).T) / 2
            values, places = distances.topk(min(k, len(codes)), largest=False)
            near.append((values, places + (start << 17)))
        distances, places = (torch.cat(each, dim=1) for each in zip(*near))
        distances, nearest = distances.topk(k, largest=False)
        found.append((distances, places.gather(1, nearest)))
    distances, indices = (torch.cat(parts) for parts in zip(*found))
    return distances, indices
