import copy

import pytest
import torch
from pytorch_metric_learning.losses import ContrastiveLoss

from pml_distill.losses import RelativeTeacherLoss
from pml_distill.teachers import FrozenTeacher
from pml_distill.trainers import DistillationTrainer


class Blobs(torch.utils.data.Dataset):
    """Four noisy clusters; the noise is drawn anew at each read, like an augmentation."""

    def __init__(self, size=64, width=6):
        self.labels = torch.arange(size) % 4
        self.centers = torch.randn(4, width, generator=torch.Generator().manual_seed(0))

    def __len__(self):
        return len(self.labels)

    def __getitem__(self, i):
        return self.centers[self.labels[i]] + 0.3 * torch.randn(self.centers.shape[1]), self.labels[i]


def network(width=6, out=5, seed=0):
    torch.manual_seed(seed)
    return torch.nn.Sequential(
        torch.nn.Linear(width, 16), torch.nn.BatchNorm1d(16), torch.nn.ReLU(), torch.nn.Linear(16, out)
    )


@pytest.fixture
def blobs():
    return Blobs()


@pytest.fixture
def teacher():
    return FrozenTeacher(network(out=7, seed=1))


@pytest.fixture
def make_trainer(blobs, teacher):
    """Build a small trainer; keyword arguments replace its parts, None removes a part."""

    def make(cls=DistillationTrainer, **changes):
        trunk = network()
        parts = {
            "models": {"trunk": trunk},
            "optimizers": {"trunk_optimizer": torch.optim.Adam(trunk.parameters(), lr=0.01)},
            "batch_size": 16,
            "loss_funcs": {"metric_loss": ContrastiveLoss(), "distillation_loss": RelativeTeacherLoss()},
            "dataset": blobs,
            "teacher": teacher,
            "data_device": torch.device("cpu"),
            "dataloader_num_workers": 0,
        }
        parts.update(changes)
        return cls(**parts)

    return make


def weights(trainer):
    return copy.deepcopy(trainer.models["trunk"].state_dict())
