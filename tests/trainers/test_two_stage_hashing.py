"""Label-free distillation, then hashing, through PML's trainer, tester and record-keeper."""

import pytest
import torch
from pytorch_metric_learning.testers import GlobalEmbeddingSpaceTester
from pytorch_metric_learning.utils import logging_presets

from pml_distill.datasets import glyph_hashing
from pml_distill.evaluation import HashAccuracyCalculator
from pml_distill.losses import CentralSimilarityLoss, DeepCauchyHashingLoss, RegressionTeacherLoss
from pml_distill.models import CompactResNet, HashHead, SmallResNet
from pml_distill.teachers import FrozenTeacher
from pml_distill.trainers import DistillationTrainer

CPU = torch.device("cpu")


class WithoutLabels(torch.utils.data.Dataset):
    def __init__(self, dataset):
        self.dataset = dataset

    def __len__(self):
        return len(self.dataset)

    def __getitem__(self, i):
        return self.dataset[i][0]


@pytest.mark.parametrize("loss", ["dch", "csq"])
def test_both_stages(tmp_path, loss):
    torch.manual_seed(0)
    parts = glyph_hashing(8)
    trunk, teacher = CompactResNet(32, in_channels=1), SmallResNet(32)
    common = {"batch_size": 16, "data_device": CPU, "dataloader_num_workers": 0}

    seen = []
    DistillationTrainer(
        models={"trunk": trunk},
        optimizers={"trunk_optimizer": torch.optim.Adam(trunk.parameters(), lr=1e-3)},
        loss_funcs={"distillation_loss": RegressionTeacherLoss()},
        teacher=FrozenTeacher(teacher),
        dataset=WithoutLabels(parts["train"]),
        end_of_epoch_hook=lambda trainer: seen.append(trainer.epoch_losses["distillation_loss"]),
        **common,
    ).train(1, 3)
    assert seen[-1] < seen[0]
    torch.save(trunk.state_dict(), tmp_path / "distilled.pth")

    trunk = CompactResNet(32, in_channels=1)
    trunk.load_state_dict(torch.load(tmp_path / "distilled.pth"))
    head = HashHead(trunk.output_size, 16)
    record_keeper, _, _ = logging_presets.get_record_keeper(str(tmp_path / "logs"), str(tmp_path / "tensorboard"))
    hooks = logging_presets.HookContainer(
        record_keeper, primary_metric="mean_average_precision", validation_split_name="query", log_freq=1
    )
    tester = GlobalEmbeddingSpaceTester(
        end_of_testing_hook=hooks.end_of_testing_hook,
        accuracy_calculator=HashAccuracyCalculator(device=CPU),
        dataloader_num_workers=0,
        data_device=CPU,
    )
    trainer = DistillationTrainer(
        models={"trunk": trunk, "embedder": head},
        optimizers={"trunk_optimizer": torch.optim.Adam([*trunk.parameters(), *head.parameters()], lr=1e-3)},
        loss_funcs={"metric_loss": DeepCauchyHashingLoss(8) if loss == "dch" else CentralSimilarityLoss(8, 16)},
        dataset=parts["train"],
        end_of_iteration_hook=hooks.end_of_iteration_hook,
        end_of_epoch_hook=hooks.end_of_epoch_hook(
            tester,
            {name: parts[name] for name in ("query", "database")},
            str(tmp_path / "models"),
            splits_to_eval=[("query", ["database"])],
        ),
        **common,
    )
    trainer.train(1, 12)
    history = hooks.get_accuracy_history(tester, "query", metrics=["mean_average_precision", "precision_within_radius"])
    # By chance an eighth of the database is relevant.
    assert max(history["mean_average_precision_level0"]) > 0.25
    assert len(hooks.get_loss_history(["metric_loss"])["metric_loss"]) == 48
    assert (tmp_path / "models" / "embedder_12.pth").exists()
