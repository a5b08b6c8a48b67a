"""PML's tester, HookContainer and record-keeper around the distillation trainers, on real images."""

import csv

import pytest
import torch
from pytorch_metric_learning.losses import MultiSimilarityLoss
from pytorch_metric_learning.samplers import MPerClassSampler
from pytorch_metric_learning.testers import GlobalEmbeddingSpaceTester
from pytorch_metric_learning.utils import logging_presets
from pytorch_metric_learning.utils.accuracy_calculator import AccuracyCalculator

from pml_distill.datasets import Digits
from pml_distill.losses import DarkRankLoss, LogitDistillationLoss, RelativeTeacherLoss
from pml_distill.models import SmallResNet
from pml_distill.teachers import FrozenTeacher
from pml_distill.trainers import DistillationTrainer, DistillationWithClassifier


def build(folder, cls=DistillationTrainer, **extra):
    torch.manual_seed(0)
    train, val = Digits("train"), Digits("val", augment=False)
    trunk = SmallResNet(4)
    models = {"trunk": trunk, "embedder": torch.nn.Linear(16, 8), **extra.pop("models", {})}
    loss_funcs = {
        "metric_loss": MultiSimilarityLoss(),
        "distillation_loss": DarkRankLoss(),
        **extra.pop("loss_funcs", {}),
    }
    parameters = [p for model in models.values() for p in model.parameters()]
    record_keeper, _, _ = logging_presets.get_record_keeper(str(folder / "logs"), str(folder / "tensorboard"))
    hooks = logging_presets.HookContainer(record_keeper, primary_metric="precision_at_1", log_freq=1)
    tester = GlobalEmbeddingSpaceTester(
        end_of_testing_hook=hooks.end_of_testing_hook,
        accuracy_calculator=AccuracyCalculator(include=("precision_at_1",), k=1),
        dataloader_num_workers=0,
        data_device=torch.device("cpu"),
        batch_size=256,
    )
    trainer = cls(
        models=models,
        optimizers={"trunk_optimizer": torch.optim.Adam(parameters, lr=0.01)},
        batch_size=32,
        loss_funcs=loss_funcs,
        dataset=train,
        teacher=FrozenTeacher(SmallResNet(8)),
        sampler=MPerClassSampler(train.labels, 8, 32, 192),
        data_device=torch.device("cpu"),
        dataloader_num_workers=0,
        end_of_iteration_hook=hooks.end_of_iteration_hook,
        end_of_epoch_hook=hooks.end_of_epoch_hook(tester, {"val": val}, str(folder / "models")),
        **extra,
    )
    return trainer, tester, hooks


def test_logs_saves_and_resumes(tmp_path):
    trainer, tester, hooks = build(tmp_path)
    trainer.train(1, 2)

    history = hooks.get_loss_history(["distillation_loss", "metric_loss", "total_loss"])
    assert len(history["total_loss"]) == 12
    assert all(value > 0 for value in history["distillation_loss"])
    accuracies = hooks.get_accuracy_history(tester, "val")
    assert accuracies["epoch"] == [1, 2]
    with open(next((tmp_path / "logs").glob("loss_histories.csv"))) as file:
        assert {"distillation_loss", "metric_loss", "total_loss"} <= set(next(csv.reader(file)))

    saved = {path.name for path in (tmp_path / "models").iterdir()}
    assert {"trunk_2.pth", "embedder_2.pth", "trunk_optimizer_2.pth", "distillation_loss_2.pth"} <= saved
    assert not any("teacher" in name for name in saved)

    again, _, hooks = build(tmp_path)
    with torch.no_grad():
        again.models["trunk"].conv1.weight.zero_()
    assert hooks.load_latest_saved_models(again, str(tmp_path / "models"), torch.device("cpu")) == 3
    assert torch.equal(again.models["trunk"].conv1.weight, trainer.models["trunk"].conv1.weight)


def test_projection_is_saved_beside_the_student(tmp_path):
    trainer, _, _ = build(tmp_path, models={"projection": torch.nn.Linear(8, 32)})
    trainer.train(1, 1)
    assert (tmp_path / "models" / "projection_1.pth").exists()
    student = torch.load(tmp_path / "models" / "trunk_1.pth") | torch.load(tmp_path / "models" / "embedder_1.pth")
    assert not any("projection" in key for key in student)


def test_classifier_and_logit_distillation(tmp_path):
    trainer, _, hooks = build(
        tmp_path,
        DistillationWithClassifier,
        models={"classifier": torch.nn.Linear(8, 10)},
        loss_funcs={
            "distillation_loss": RelativeTeacherLoss(),
            "classifier_loss": torch.nn.CrossEntropyLoss(),
            "logit_distillation_loss": LogitDistillationLoss(),
        },
        teacher_classifier=torch.nn.Linear(32, 10),
        amp_dtype=torch.bfloat16,
    )
    before = trainer.teacher_classifier.trunk.weight.clone()
    trainer.train(1, 1)
    history = hooks.get_loss_history(["classifier_loss", "logit_distillation_loss"])
    assert all(value > 0 for values in history.values() for value in values)
    assert torch.equal(before, trainer.teacher_classifier.trunk.weight)


@pytest.mark.parametrize(
    ("extra", "message"),
    [
        ({"models": {"classifier": torch.nn.Linear(8, 10)}}, "needs teacher_classifier"),
        ({"teacher_classifier": torch.nn.Linear(32, 10)}, r'needs models\["classifier"\]'),
    ],
)
def test_logit_distillation_names_what_it_lacks(tmp_path, extra, message):
    with pytest.raises(ValueError, match=message):
        build(
            tmp_path,
            DistillationWithClassifier,
            loss_funcs={"logit_distillation_loss": LogitDistillationLoss()},
            **extra,
        )


def test_early_stopping(tmp_path):
    trainer, tester, hooks = build(tmp_path)
    trainer.end_of_epoch_hook = lambda trainer: trainer.epoch < 2
    trainer.train(1, 5)
    assert trainer.epoch == 2
