"""Where the teacher's embeddings come from."""

from .cached_teacher import CachedTeacher
from .ensemble_teacher import EnsembleTeacher
from .frozen_teacher import FrozenTeacher
from .standardized_teacher import StandardizedTeacher
from .teacher_cache import TeacherCache

__all__ = ["CachedTeacher", "EnsembleTeacher", "FrozenTeacher", "StandardizedTeacher", "TeacherCache"]
