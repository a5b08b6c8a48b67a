import numpy as np
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


def test_a_teacher_without_parameters_reads_arrays_of_numpy():
    class Tensor(torch.nn.Module):
        def forward(self, data):
            return torch.from_numpy(data)

    assert torch.equal(FrozenTeacher(Tensor())(np.ones((2, 3))), torch.ones(2, 3, dtype=torch.float64))


def test_what_is_no_network_is_refused():
    with pytest.raises(ValueError, match="'resnet50' is no network: write timm/NAME"):
        FrozenTeacher("resnet50")
    with pytest.raises(ValueError, match="embedder must be a torch.nn.Module, but is a function"):
        FrozenTeacher(network(), lambda x: x)


def test_data_other_than_a_tensor_reach_the_network_as_they_are():
    class Words(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.bag = torch.nn.EmbeddingBag(10, 3)

        def forward(self, batch):
            return self.bag(batch["ids"])

    words, batch = Words(), {"ids": torch.tensor([[1, 2], [3, 4]])}
    assert torch.equal(FrozenTeacher(words)(batch), words(batch))


def test_the_precision_is_that_of_the_floating_point_parameters():
    codes, linear, data = torch.nn.Identity(), torch.nn.Linear(4, 2), torch.rand(5, 4)
    codes.weight = torch.nn.Parameter(torch.zeros(3, dtype=torch.uint8), requires_grad=False)
    assert torch.equal(FrozenTeacher(torch.nn.Sequential(codes, linear))(data), linear(data))


def test_a_network_of_several_outputs_is_named():
    class Two(torch.nn.Module):
        def forward(self, data):
            return data, data

    with pytest.raises(ValueError, match="must return one tensor of embeddings, but returned a tuple"):
        FrozenTeacher(Two())(torch.zeros(2, 4))


def test_a_network_by_name_brings_its_preprocessing():
    pytest.importorskip("timm")
    teacher = FrozenTeacher("timm/test_resnet", pretrained=False)
    side = teacher.preprocessing.size
    assert teacher(torch.zeros(2, 3, *side)).ndim == 2
    assert not teacher.training and not any(p.requires_grad for p in teacher.parameters())
    with pytest.raises(ValueError, match="timm/no_such_network"):
        FrozenTeacher("timm/no_such_network", pretrained=False)
