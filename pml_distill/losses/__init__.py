"""Distillation losses: ``loss(embeddings, labels, ref_emb=teacher_embeddings)``, one class per file."""

from .absolute_teacher_loss import AbsoluteTeacherLoss
from .base_distillation_loss import BaseDistillationLoss
from .base_hashing_loss import BaseHashingLoss
from .central_similarity_loss import CentralSimilarityLoss
from .dark_rank_loss import DarkRankLoss
from .deep_cauchy_hashing_loss import DeepCauchyHashingLoss
from .hash_centers import center_distances, hash_centers
from .logit_distillation_loss import LogitDistillationLoss
from .relative_teacher_loss import RelativeTeacherLoss
from .similarity_regression_loss import SimilarityRegressionLoss

__all__ = [
    "AbsoluteTeacherLoss",
    "BaseDistillationLoss",
    "BaseHashingLoss",
    "CentralSimilarityLoss",
    "DarkRankLoss",
    "DeepCauchyHashingLoss",
    "LogitDistillationLoss",
    "RelativeTeacherLoss",
    "SimilarityRegressionLoss",
    "center_distances",
    "hash_centers",
]
