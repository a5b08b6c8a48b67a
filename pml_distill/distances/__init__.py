"""Distances beside PML's own."""

from .euclidean_distance import EuclideanDistance
from .hamming_distance import HammingDistance

__all__ = ["EuclideanDistance", "HammingDistance"]
