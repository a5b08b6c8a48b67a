"""Distillation losses: ``loss(embeddings, labels, ref_emb=teacher_embeddings)``, one class per file."""

from .absolute_teacher_loss import AbsoluteTeacherLoss
from .base_distillation_loss import BaseDistillationLoss
from .dark_rank_loss import DarkRankLoss
from .logit_distillation_loss import LogitDistillationLoss
from .relative_teacher_loss import RelativeTeacherLoss
from .similarity_regression_loss import SimilarityRegressionLoss

__all__ = [
    "AbsoluteTeacherLoss",
    "BaseDistillationLoss",
    "DarkRankLoss",
    "LogitDistillationLoss",
    "RelativeTeacherLoss",
    "SimilarityRegressionLoss",
]
