from pytorch_metric_learning.trainers import MetricLossOnly

from .base_distillation_trainer import BaseDistillationTrainer


class DistillationTrainer(BaseDistillationTrainer, MetricLossOnly):
    """PML's ``MetricLossOnly`` with a teacher: ``metric_loss``, ``distillation_loss``, or features, or all.

    Without ``metric_loss`` no labels are needed. Arguments and methods are those of ``BaseDistillationTrainer``.

    Keys:
        models: ``trunk``, ``embedder``, ``projection``. loss_funcs: ``metric_loss``, ``distillation_loss``,
        ``feature_distillation_loss``.
    """
