"""A moving average of the student: what it follows, that it is saved, and that it stays a teacher."""

import copy

import pytest
import torch
from torch import nn

from pml_distill.losses import RelativeTeacherLoss
from pml_distill.teachers import EMATeacher, EnsembleTeacher, StandardizedTeacher
from pml_distill.trainers import DistillationTrainer


def network():
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(4, 6), nn.BatchNorm1d(6), nn.Linear(6, 3))


def step(student):
    student.train()
    loss = student(torch.randn(8, 4)).square().mean()
    loss.backward()
    with torch.no_grad():
        for parameter in student.parameters():
            parameter -= 0.1 * parameter.grad
            parameter.grad = None


def test_weights_and_batch_norms_follow_the_student():
    student = network()
    teacher, values = EMATeacher(student, decay=0.9), copy.deepcopy(student.state_dict())
    for _ in range(5):
        step(student)
        teacher.update()
        for name, theirs in student.state_dict().items():
            values[name] = 0.9 * values[name] + 0.1 * theirs if theirs.is_floating_point() else theirs.clone()
    found = teacher.average.state_dict()
    assert all(torch.allclose(found[name], value, atol=1e-6) for name, value in values.items())
    assert found["1.num_batches_tracked"] == 5 and not torch.equal(found["1.running_mean"], torch.zeros(6))


def test_a_shared_weight_is_averaged_once():
    student = nn.Sequential(nn.Linear(3, 3), nn.Linear(3, 3))
    student[1].weight = student[0].weight
    teacher, before = EMATeacher(student, decay=0.5), student[0].weight.detach().clone()
    student[0].weight.data += 1
    teacher.update()
    assert torch.allclose(teacher.average[1].weight, before + 0.5)


def test_it_stays_frozen_in_eval_mode_and_apart_from_the_student():
    student = network()
    teacher = EMATeacher(student).train()
    assert not any(module.training for module in teacher.modules())
    assert not any(parameter.requires_grad for parameter in teacher.parameters())
    assert all(parameter.requires_grad for parameter in student.parameters())
    assert set(teacher.state_dict()) == {f"average.{name}" for name in student.state_dict()}
    assert not teacher(torch.randn(2, 4)).requires_grad


def make_trainer(wrap=lambda teacher: teacher):
    student = network()
    teacher = EMATeacher(student, decay=0.8)
    trainer = DistillationTrainer(
        models={"trunk": student},
        optimizers={"trunk_optimizer": torch.optim.Adam(student.parameters(), lr=0.01)},
        batch_size=8,
        loss_funcs={"distillation_loss": RelativeTeacherLoss()},
        dataset=[(torch.full((4,), i / 40) ** torch.arange(1, 5), i % 4) for i in range(40)],
        teacher=wrap(teacher),
        data_device=torch.device("cpu"),
        dataloader_num_workers=0,
        iterations_per_epoch=5,
    )
    return trainer, teacher


@pytest.mark.parametrize("wrap", [lambda t: t, lambda t: EnsembleTeacher([t, nn.Identity()])])
def test_a_trainer_updates_it_and_a_resumed_run_equals_an_undisturbed_one(tmp_path, wrap):
    torch.manual_seed(0)
    whole, average = make_trainer(wrap)
    torch.manual_seed(1)
    whole.end_of_epoch_hook = lambda trainer: trainer.save_checkpoint(tmp_path / f"{trainer.epoch}.pt")
    whole.train(1, 3)
    resumed, other = make_trainer(wrap)
    before = other.average[0].weight.clone()
    resumed.train(start_epoch=resumed.load_checkpoint(tmp_path / "1.pt"), num_epochs=3)
    assert not torch.equal(before, other.average[0].weight)
    for name, value in average.state_dict().items():
        assert torch.equal(value, other.state_dict()[name]), name


def test_it_can_be_standardised_and_compiled_students_are_followed():
    student = network()
    teacher = StandardizedTeacher(EMATeacher(student), width=2).fit([torch.randn(50, 4)])
    assert teacher(torch.randn(3, 4)).shape == (3, 2)
    compiled = torch.compile(student, backend="eager")
    teacher = EMATeacher(compiled, decay=0.5)
    student[2].bias.data += 1
    teacher.update()
    assert torch.allclose(
        next(v for k, v in teacher.state_dict().items() if k.endswith("2.bias")) + 0.5, student[2].bias
    )


@pytest.mark.parametrize("decay", [-0.1, 1, 1.5])
def test_other_decays_are_refused(decay):
    with pytest.raises(ValueError, match=f"decay must be from 0 to below 1, but is {decay}"):
        EMATeacher(network(), decay)
