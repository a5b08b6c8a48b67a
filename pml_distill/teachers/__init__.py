"""Where the teacher's embeddings come from."""

from .frozen_teacher import FrozenTeacher

__all__ = ["FrozenTeacher"]
