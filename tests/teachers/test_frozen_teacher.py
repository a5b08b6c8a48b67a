import pytest
import torch

from pml_distill.teachers import FrozenTeacher


def network():
    return torch.nn.Sequential(torch.nn.Linear(4, 8), torch.nn.BatchNorm1d(8), torch.nn.Dropout(0.5))


def test_it_never_learns_drifts_or_drops_out():
    trunk = network()
    teacher = FrozenTeacher(trunk, torch.nn.Linear(8, 3))
    before = {k: v.clone() for k, v in teacher.state_dict().items()}
    teacher.train()
    data = torch.randn(16, 4)
    first = teacher(data)
    assert first.shape == (16, 3) and not first.requires_grad
    assert torch.equal(first, teacher(data))
    assert all(torch.equal(before[k], v) for k, v in teacher.state_dict().items())
    assert not any(p.requires_grad for p in teacher.parameters())
    assert not any(m.training for m in torch.nn.Sequential(teacher).train().modules() if m is trunk)


def test_a_precision_of_its_own_leaves_the_given_network_alone():
    trunk = network()
    teacher = FrozenTeacher(trunk, dtype=torch.bfloat16)
    assert trunk[0].weight.dtype == torch.float32 and trunk[0].weight.requires_grad
    assert teacher(torch.randn(5, 4)).dtype == torch.bfloat16


def test_the_callers_autocast_does_not_apply():
    teacher, data = FrozenTeacher(network()), torch.randn(5, 4)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert teacher(data).dtype == torch.float32


def test_a_teacher_without_parameters():
    assert torch.equal(FrozenTeacher(torch.nn.Flatten())(torch.ones(2, 2, 2)), torch.ones(2, 4))


def test_what_is_no_network_is_refused():
    with pytest.raises(ValueError, match="trunk must be a torch.nn.Module, but is a str"):
        FrozenTeacher("resnet50")
    with pytest.raises(ValueError, match="embedder must be a torch.nn.Module, but is a function"):
        FrozenTeacher(network(), lambda x: x)
