"""Where the teacher's embeddings come from."""

from .cached_teacher import CachedTeacher
from .ema_teacher import EMATeacher
from .ensemble_teacher import EnsembleTeacher
from .frozen_teacher import FrozenTeacher
from .standardized_teacher import StandardizedTeacher
from .teacher_cache import TeacherCache
from .tensor_teacher import TensorTeacher

__all__ = [
    "CachedTeacher",
    "EMATeacher",
    "EnsembleTeacher",
    "FrozenTeacher",
    "StandardizedTeacher",
    "TeacherCache",
    "TensorTeacher",
]
