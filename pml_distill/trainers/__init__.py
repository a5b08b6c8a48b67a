"""pytorch-metric-learning trainers with a teacher."""

from .base_distillation_trainer import BaseDistillationTrainer
from .distillation_trainer import DistillationTrainer
from .distillation_with_classifier import DistillationWithClassifier
from .loss_weights import LossWeightRamp

__all__ = ["BaseDistillationTrainer", "DistillationTrainer", "DistillationWithClassifier", "LossWeightRamp"]
