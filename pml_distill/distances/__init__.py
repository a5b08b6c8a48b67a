"""Distances beside PML's own."""

from .euclidean_distance import EuclideanDistance

__all__ = ["EuclideanDistance"]
