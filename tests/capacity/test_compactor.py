import copy
import functools

import pytest
import timm
import torch
import torchvision
from networks import NETWORKS, images, network
from torch import nn

from pml_distill.capacity import Compactor, export, find_compactors, insert_compactors, register_block, save_compact


@pytest.mark.parametrize("positions", ["inner", "all"])
@pytest.mark.parametrize("name", NETWORKS)
def test_outputs_stay_what_they_were(name, positions):
    model = network(name)
    with torch.no_grad():
        before = model(images())
        compactors = insert_compactors(model, positions)
        torch.testing.assert_close(model(images()), before, rtol=0, atol=1e-6)
    assert not model.training and not any(compactor.training for compactor in compactors.values())
    found = find_compactors(model)
    assert list(found) == list(compactors) and all(found[key] is compactors[key] for key in found)


@pytest.mark.parametrize("name, inner, everywhere", [("resnet18", 8, 8), ("resnet50", 16, 32), ("resnet101", 33, 66)])
def test_number_of_compactors(name, inner, everywhere):
    for positions, expected in (("inner", inner), ("all", everywhere)):
        with torch.device("meta"):
            model = torchvision.models.get_model(name)
        chains = {"inner": "bn1" if name == "resnet18" else "bn2"}
        compactors = insert_on_cpu(model, positions)
        assert len(compactors) == expected
        assert f"layer2.0.{chains['inner']}" in compactors


def insert_on_cpu(model, positions):
    return insert_compactors(model.to_empty(device="cpu"), positions)


def test_names_are_those_of_the_teachers_normalisations_in_forward_order():
    teacher = torchvision.models.resnet50()
    student = copy.deepcopy(teacher)
    order = []
    for name, compactor in insert_compactors(student, "all").items():
        assert isinstance(teacher.get_submodule(name), nn.BatchNorm2d)
        assert student.get_submodule(name)[-1] is compactor
        compactor.register_forward_hook(lambda *_, name=name: order.append(name))
    student.eval()(images(32))
    assert order == list(find_compactors(student))


def test_inner_positions_are_those_of_the_paper():
    assert all(name.endswith("bn2") for name in insert_compactors(torchvision.models.resnet50()))
    assert all(name.endswith("bn1") for name in insert_compactors(torchvision.models.resnet18()))


def test_takes_device_type_and_gradient_of_the_network():
    model = torchvision.models.resnet18().double()
    compactors = insert_compactors(model)
    model(torch.randn(2, 3, 32, 32, dtype=torch.float64)).sum().backward()
    for compactor in compactors.values():
        assert compactor.training and compactor.weight.dtype == torch.float64 and compactor.weight.grad is not None


def test_row_norms_have_finite_gradients_for_zero_rows():
    compactor = Compactor(4)
    compactor.weight.data[1] = 0
    compactor.row_norms().sum().backward()
    assert compactor.row_norms().tolist() == [1, 0, 1, 1] and compactor.weight.grad.isfinite().all()


def test_works_inside_of_a_larger_model():
    model = nn.Sequential(torchvision.models.resnet18(), nn.Linear(1000, 8))
    assert next(iter(insert_compactors(model))) == "0.layer1.0.bn1"


class Block(nn.Module):
    def __init__(self, act):
        super().__init__()
        self.reduce, self.norm, self.act = nn.Conv2d(4, 6, 3, padding=1), nn.BatchNorm2d(6), act
        self.expand = nn.Conv2d(6, 4, 1)

    def forward(self, x):
        return x + self.expand(self.act(self.norm(self.reduce(x))))


def test_blocks_can_be_registered():
    class Mine(Block):
        def forward(self, x):
            # What no tracer follows.
            return super().forward(x) if float(x.sum()) > 0 else x + self.expand(self.act(self.norm(self.reduce(x))))

    model = nn.Sequential(Mine(nn.GELU()), Mine(nn.LeakyReLU()))
    with pytest.raises(ValueError, match="no block to put compactors in"):
        insert_compactors(model)
    register_block(Mine, inner=[("reduce", "norm", "act", "expand")])
    assert list(insert_compactors(model)) == ["0.norm", "1.norm"]


def test_blocks_of_a_registered_class_may_lack_a_chain():
    class Mine(Block): ...

    register_block(Mine, inner=[("reduce", "norm", "act", "expand")])
    model = nn.Sequential(Mine(nn.GELU()), Mine(nn.GELU()))
    model[0].norm = nn.Identity()
    del model[1].reduce
    model[1].forward = lambda x: x
    assert list(insert_compactors(model)) == ["0.reduce"]


def test_names_of_registered_blocks_may_be_dotted():
    class Deep(nn.Module):
        def __init__(self):
            super().__init__()
            act = nn.ReLU()
            self.body = nn.Sequential(nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), act, nn.Conv2d(8, 8, 1), act)

        def forward(self, x):
            return self.body(x)

    register_block(Deep, inner=[("body.0", "body.1", "body.2", "body.3")])
    model = nn.Sequential(Deep()).eval()
    compactors = insert_compactors(model)
    assert list(compactors) == ["0.body.1"] and list(find_compactors(model)) == ["0.body.1"]
    compactors["0.body.1"].weight.data[2:] = 0
    small = export(model)
    with torch.no_grad():
        torch.testing.assert_close(small(images()), model(images()), rtol=1e-5, atol=1e-5)
    assert small[0].body[0].out_channels == 2 and small[0].body[3].in_channels == 2


@pytest.mark.parametrize("act", [nn.Softmax(dim=1), nn.ChannelShuffle(2), nn.GroupNorm(2, 6)])
def test_modules_that_need_all_channels_are_refused(act):
    class Mine(Block): ...

    register_block(Mine, inner=[("reduce", "norm", "act", "expand")])
    model = nn.Sequential(Mine(act))
    with pytest.raises(
        ValueError, match=f"cannot put a compactor behind 0.norm: 0.act .{type(act).__name__}. does not treat"
    ):
        insert_compactors(model)
    assert not find_compactors(model)


@pytest.mark.parametrize(
    "model, reason",
    [
        (
            lambda: timm.create_model("resnet26", norm_layer="groupnorm"),
            r"ResNet has no block .*layer1.0.conv1: layer1.0.bn1 \(GroupNorm\) does not treat each channel alone",
        ),
        (lambda: nn.Sequential(nn.Linear(3, 8), nn.Softmax(-1), nn.Linear(8, 1)), r"\(0: 1 \(Softmax\) does not treat"),
        (lambda: nn.Sequential(nn.Conv2d(3, 8, 3)), "output of the network are these channels"),
        (
            lambda: nn.DataParallel(torchvision.models.resnet18()),
            "in a DataParallel: insert compactors before wrapping",
        ),
        (lambda: torch.compile(nn.ReLU(), backend="eager"), "in a OptimizedModule: insert compactors before wrapping"),
    ],
)
def test_what_cannot_be_merged_is_refused_with_the_reason(model, reason):
    model = model()
    with pytest.raises(ValueError, match=reason):
        insert_compactors(model)
    assert not any(isinstance(module, Compactor) for module in model.modules())


@pytest.mark.parametrize(
    "function", [insert_compactors, find_compactors, export, functools.partial(save_compact, path="x")]
)
def test_what_is_no_network_is_refused(function):
    with pytest.raises(ValueError, match="model must be a network, but is a str"):
        function("resnet18")


def test_errors_name_the_argument():
    model = torchvision.models.resnet18()
    with pytest.raises(ValueError, match='positions must be "inner" or "all", but is \'outer\''):
        insert_compactors(model, "outer")
    insert_compactors(model)
    with pytest.raises(ValueError, match="behind layer1.0.bn1: there is one already"):
        insert_compactors(model)
    with pytest.raises(ValueError, match="a chain names a layer"):
        register_block(Block, inner=[("reduce",)])
    with pytest.raises(ValueError, match="all_positions must contain the inner chains"):
        register_block(Block, inner=[("reduce", "norm", "expand")], all_positions=[])
    with pytest.raises(ValueError, match="inner must name at least one chain"):
        register_block(Block, inner=[])
    with pytest.raises(ValueError, match="a chain is a sequence of names, .* but is 'reduce' itself"):
        register_block(Block, inner=("reduce", "norm", "expand"))
    with pytest.raises(ValueError, match=r"block_type must be a class of modules, but is ReLU\(\)"):
        register_block(nn.ReLU(), inner=[("reduce", "norm", "expand")])
    register_block(Block, inner=[("reduce", "bn", "expand")])
    with pytest.raises(ValueError, match="Block has no attribute 'bn'"):
        insert_compactors(nn.Sequential(Block(nn.ReLU())))
