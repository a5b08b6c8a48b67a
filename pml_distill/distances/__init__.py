"""Distances beside PML's own."""

from .euclidean_distance import EuclideanDistance
from .hamming_distance import HammingDistance
from .packed_codes import pack_codes, unpack_codes

__all__ = ["EuclideanDistance", "HammingDistance", "pack_codes", "unpack_codes"]
