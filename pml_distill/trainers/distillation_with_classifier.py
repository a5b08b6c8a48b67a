from typing import Any

import torch
from pytorch_metric_learning.trainers import TrainWithClassifier
from pytorch_metric_learning.utils import common_functions as c_f

from ..teachers import CachedTeacher, FrozenTeacher
from ..utils.tensors import in_float32
from .base_distillation_trainer import BaseDistillationTrainer
from .batch import Batch
from .checks import check_teacher, refuse


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
        ValueError: as for ``BaseDistillationTrainer``; a loss without its classifier, or the other way round; in a
            step: ``classifier_loss`` without labels.
    """

    loss_keys_with_teacher = (*BaseDistillationTrainer.loss_keys_with_teacher, "logit_distillation_loss")

    teacher_classifier: Any

    def __init__(self, *args: Any, teacher_classifier: torch.nn.Module | None = None, **kwargs: Any):
        self.teacher_classifier = None if teacher_classifier is None else FrozenTeacher(teacher_classifier)
        super().__init__(*args, **kwargs)

    def custom_setup(self) -> None:
        """Check that both sides of the logit distillation are there."""
        super().custom_setup()
        losses, loss = self.loss_funcs, 'loss_funcs["logit_distillation_loss"]'
        has_logits = isinstance(self.teacher, CachedTeacher) and "logits" in self.teacher.file.widths
        lacking = "logit_distillation_loss" in losses and self.teacher_classifier is None and not has_logits
        text = "teacher_classifier, from embeddings to logits, or a CachedTeacher that was written with a classifier"
        refuse(lacking, f"{loss} needs {text}, but teacher is a {type(self.teacher).__name__} without.")
        if self.teacher_classifier is not None:
            check_teacher(self.teacher_classifier, self.models)
            unused = "logit_distillation_loss" not in losses
            refuse(unused, f"teacher_classifier serves {loss}, but loss_funcs has only {sorted(losses)}.")
        for key in ("classifier_loss", "logit_distillation_loss"):
            text = f'loss_funcs["{key}"] needs models["classifier"], but models has only {sorted(self.models)}.'
            refuse(key in losses and "classifier" not in self.models, text)

    def calculate_loss(self, curr_batch: Batch) -> Batch:
        """Add the losses of the classifier to those of the embeddings."""
        batch = super().calculate_loss(curr_batch)
        if not (self.wants("classifier_loss") or self.wants("logit_distillation_loss")):
            return batch
        unlabeled = batch.labels is None and self.wants("classifier_loss")
        refuse(unlabeled, 'loss_funcs["classifier_loss"] needs labels, but the dataset yields none.')
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
            own, loss = self.teacher_classifier, self.loss_funcs["logit_distillation_loss"]
            teacher_logits = self.teacher.logits(batch.index) if own is None else own(batch.data.teacher)
            self.losses["logit_distillation_loss"] = loss(logits, batch.all_or_none(), ref_emb=teacher_logits)
        return batch
