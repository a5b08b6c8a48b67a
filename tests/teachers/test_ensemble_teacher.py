import pytest
import torch
from pytorch_metric_learning.losses import ContrastiveLoss

from pml_distill.losses import RelativeTeacherLoss
from pml_distill.teachers import EnsembleTeacher, FrozenTeacher
from pml_distill.trainers import DistillationTrainer


def teachers():
    torch.manual_seed(0)
    return [FrozenTeacher(torch.nn.Sequential(torch.nn.Linear(6, w), torch.nn.BatchNorm1d(w))) for w in (4, 9)]


@pytest.mark.parametrize(("weights", "shares"), [(None, (0.5, 0.5)), ([3, 1], (0.75, 0.25))])
def test_similarities_and_squared_distances_are_weighted_means(weights, shares):
    parts, data = teachers(), torch.randn(10, 6)
    joint = EnsembleTeacher(parts, weights)(data)
    assert joint.shape == (10, 13) and torch.allclose(joint.norm(dim=1), torch.ones(10))
    units = [torch.nn.functional.normalize(teacher(data)) for teacher in parts]
    expected = sum(share * unit @ unit.t() for share, unit in zip(shares, units))
    assert torch.allclose(joint @ joint.t(), expected, atol=1e-6)
    squares = sum(share * torch.cdist(unit, unit).square() for share, unit in zip(shares, units))
    assert torch.allclose(torch.cdist(joint, joint).square(), squares, atol=1e-5)
    mean = sum(share * torch.cdist(unit, unit) for share, unit in zip(shares, units))
    assert (torch.cdist(joint, joint) > mean - 1e-6).all()


class Table:
    needs_index = True

    def __init__(self):
        self.rows = torch.randn(20, 3)

    def __call__(self, data, index):
        return self.rows[index]


def test_any_callable_serves_and_gets_the_index_if_it_needs_that():
    by_row = Table()
    table = by_row.rows
    joint = EnsembleTeacher([teachers()[0], by_row])
    assert joint.needs_index and not EnsembleTeacher(teachers()).needs_index
    index = torch.tensor([3, 17])
    result = joint(torch.randn(2, 6), index)
    assert torch.allclose(result[:, 4:], 0.5**0.5 * torch.nn.functional.normalize(table[index]))


def test_teachers_that_answer_on_other_devices_are_joined_on_that_of_the_first():
    parts = [lambda data: torch.ones(2, 3, device="meta"), lambda data: torch.ones(2, 4)]
    joint = EnsembleTeacher(parts)(torch.zeros(2, 1))
    assert joint.shape == (2, 7) and joint.device.type == "meta"


def test_in_a_trainer_it_stays_frozen_and_in_eval_mode():
    parts, trunk = teachers(), torch.nn.Linear(6, 5)
    joint = EnsembleTeacher(parts)
    before = {key: value.clone() for key, value in joint.state_dict().items()}
    trainer = DistillationTrainer(
        models={"trunk": trunk},
        optimizers={"trunk_optimizer": torch.optim.SGD(trunk.parameters(), lr=0.1)},
        batch_size=8,
        loss_funcs={"metric_loss": ContrastiveLoss(), "distillation_loss": RelativeTeacherLoss()},
        dataset=torch.utils.data.TensorDataset(torch.randn(32, 6), torch.arange(32) % 4),
        teacher=joint,
        data_device=torch.device("cpu"),
        dataloader_num_workers=0,
    )
    trainer.train(1, 1)
    assert trainer.epoch_losses["distillation_loss"] > 0 and not joint.train().training
    assert all(torch.equal(value, before[key]) for key, value in joint.state_dict().items())
    assert not any(module.training for teacher in parts for module in teacher.modules())


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: EnsembleTeacher([]), "teachers is empty"),
        (lambda: EnsembleTeacher(teachers(), [1]), r"weights must be 2 positive numbers.*\[1\]"),
        (lambda: EnsembleTeacher(teachers()[0]), "teachers must be a list of teachers, but is a single FrozenTeacher"),
        (lambda: EnsembleTeacher(teachers(), [1, float("inf")]), r"2 positive numbers.*\[1, inf\]"),
        (lambda: EnsembleTeacher(teachers(), [1, 0]), r"\[1, 0\]"),
        (lambda: EnsembleTeacher([torch.nn.Linear(2, 2)]), r"teachers\[0\], a Linear, has parameters that require"),
    ],
)
def test_wrong_arguments_are_refused(make, message):
    with pytest.raises(ValueError, match=message):
        make()


def test_a_teacher_of_several_outputs_is_named():
    joint = EnsembleTeacher([*teachers(), lambda data: (data, data)])
    message = r"^teachers\[2\] must return one tensor of embeddings, but returned a tuple\.$"
    with pytest.raises(ValueError, match=message):
        joint(torch.zeros(2, 6))
