from typing import Any

import torch
from pytorch_metric_learning.trainers import TrainWithClassifier
from pytorch_metric_learning.utils import common_functions as c_f

from ..teachers import CachedTeacher, FrozenTeacher
from ..utils.tensors import in_float32
from .base_distillation_trainer import BaseDistillationTrainer
from .batch import Batch
from .checks import check_teacher


class DistillationWithClassifier(BaseDistillationTrainer, TrainWithClassifier):
    """PML's ``TrainWithClassifier`` with a teacher that may also have a classifier.

    Args:
        teacher_classifier: turns the teacher's embeddings into logits (B, C) for ``logit_distillation_loss``; it
            is frozen like the teacher. None: the logits of a ``CachedTeacher`` whose cache has some.
        **kwargs: as for ``BaseDistillationTrainer``.

    Keys:
        models: ``trunk``, ``embedder``, ``projection``, ``classifier``. loss_funcs: ``metric_loss``,
        ``classifier_loss``, ``distillation_loss``, ``feature_distillation_loss``, ``logit_distillation_loss``.

    Raises:
        ValueError: as for ``BaseDistillationTrainer``; ``logit_distillation_loss`` without ``teacher_classifier``
            and cached logits, or without a ``classifier`` among the models; ``teacher_classifier`` without that loss;
            in a step: ``classifier_loss`` without labels.
    """

    loss_keys_with_teacher = (*BaseDistillationTrainer.loss_keys_with_teacher, "logit_distillation_loss")

    teacher_classifier: Any

    def __init__(self, *args: Any, teacher_classifier: torch.nn.Module | None = None, **kwargs: Any):
        self.teacher_classifier = None if teacher_classifier is None else FrozenTeacher(teacher_classifier)
        super().__init__(*args, **kwargs)

    def custom_setup(self) -> None:
        """Check that both sides of the logit distillation are there."""
        super().custom_setup()
        has_logits = isinstance(self.teacher, CachedTeacher) and "logits" in self.teacher.file.widths
        if "logit_distillation_loss" in self.loss_funcs and self.teacher_classifier is None and not has_logits:
            raise ValueError(
                'loss_funcs has "logit_distillation_loss", which needs teacher_classifier, a module from the '
                "teacher's embeddings to its logits, or a CachedTeacher whose cache was written with a classifier, but "
                f"teacher_classifier is None and teacher a {type(self.teacher).__name__} without logits."
            )
        if self.teacher_classifier is not None:
            check_teacher(self.teacher_classifier, self.models)
            if "logit_distillation_loss" not in self.loss_funcs:
                raise ValueError(
                    'teacher_classifier serves loss_funcs["logit_distillation_loss"], but loss_funcs has only '
                    f"{sorted(self.loss_funcs)}."
                )
        for key in ("classifier_loss", "logit_distillation_loss"):
            if key in self.loss_funcs and "classifier" not in self.models:
                raise ValueError(
                    f'loss_funcs has "{key}", which needs models["classifier"], but models has only '
                    f"{sorted(self.models)}."
                )

    def calculate_loss(self, curr_batch: Batch) -> Batch:
        """Add the losses of the classifier to those of the embeddings."""
        batch = super().calculate_loss(curr_batch)
        if not (self.wants("classifier_loss") or self.wants("logit_distillation_loss")):
            return batch
        if batch.labels is None and self.wants("classifier_loss"):
            raise ValueError('loss_funcs["classifier_loss"] needs labels, but the dataset yields none.')
        with self.autocast():
            weight = next(self.models["classifier"].parameters(), batch.data.student)
            logits = in_float32(self.models["classifier"](batch.data.student.to(weight.dtype)))
        self.outputs.append(logits)
        if self.wants("classifier_loss"):
            known = batch._replace(data=logits).labeled()
            if len(known.data):
                labels = c_f.to_device(known.labels, logits)
                self.losses["classifier_loss"] = self.loss_funcs["classifier_loss"](known.data, labels)
        if self.wants("logit_distillation_loss"):
            if self.teacher_classifier is None:
                teacher_logits = self.teacher.logits(batch.index)
            else:
                teacher_logits = self.teacher_classifier(batch.data.teacher)
            self.losses["logit_distillation_loss"] = self.loss_funcs["logit_distillation_loss"](
                logits, batch.all_or_none(), ref_emb=teacher_logits
            )
        return batch
