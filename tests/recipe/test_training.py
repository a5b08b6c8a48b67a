"""What the batches of a training hold."""

from types import SimpleNamespace

import pytest
import torch

from pml_distill.datasets.items import UNLABELED
from pml_distill.losses import CosineTeacherLoss
from pml_distill.recipe.training import Training


@pytest.mark.parametrize("taught", [False, True])
def test_with_few_labels_only_a_student_with_a_teacher_sees_images_without(taught, tmp_path):
    labels = torch.arange(20).repeat_interleave(8)
    labels[torch.arange(160) % 8 >= 2] = UNLABELED
    views, machine = SimpleNamespace(labels=labels), SimpleNamespace(batch_size=32)
    training = Training(
        tmp_path,
        torch.nn.Identity(),
        views,
        machine,
        epochs=1,
        rate=1e-3,
        seed=0,
        metric_loss=torch.nn.Identity(),
        distillation=CosineTeacherLoss() if taught else None,
    )
    sampler, batch_size, steps = training.batches()
    assert batch_size == 32 and steps == 5
    batch = labels[list(sampler)[:32]]
    assert int((batch == UNLABELED).sum()) == (16 if taught else 0)
