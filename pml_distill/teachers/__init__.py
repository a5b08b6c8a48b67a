"""Where the teacher's embeddings come from."""

from .ensemble_teacher import EnsembleTeacher
from .frozen_teacher import FrozenTeacher

__all__ = ["EnsembleTeacher", "FrozenTeacher"]
