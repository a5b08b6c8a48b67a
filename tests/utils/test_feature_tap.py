import pytest
import torch

# Before there is a process group: imported by DDP, its functions would hold the group.
import torch.distributed.nn
from torch import nn
from torch.nn.parallel import DistributedDataParallel as parallel
from torch.utils.checkpoint import checkpoint

from pml_distill.models import SmallResNet
from pml_distill.utils import FeatureTap

IMAGES = torch.rand(2, 1, 16, 16)


def hooks(network):
    return sum(len(m._forward_hooks) for m in network.modules())


def test_outputs_come_in_the_order_of_the_names_and_carry_gradients():
    network = SmallResNet(4)
    with FeatureTap(network, ["layer3", "layer1", "layer2.0.conv1"]) as tap:
        network(IMAGES)
    assert [tuple(m.shape) for m in tap.features] == [(2, 16, 2, 2), (2, 4, 8, 8), (2, 8, 4, 4)]
    assert torch.equal(tap.features[0].mean(dim=(2, 3)), network.train()(IMAGES))
    tap.features[1].sum().backward()
    assert network.conv1.weight.grad is not None


def test_a_name_may_come_twice():
    network = SmallResNet(4)
    with FeatureTap(network, ["layer1", "layer3", "layer1"]) as tap:
        network(IMAGES)
    assert len(tap.features) == 3 and torch.equal(tap.features[0], tap.features[2]) and hooks(network) == 0


def test_each_pass_refreshes_the_features():
    network = SmallResNet(4).eval()
    with FeatureTap(network, ["layer1"]) as tap:
        network(IMAGES)
        first = tap.features[0]
        network(2 * IMAGES)
        assert not torch.equal(first, tap.features[0])


def test_a_later_module_in_place_does_not_change_them():
    network = nn.Sequential(nn.Conv2d(1, 2, 3), nn.BatchNorm2d(2), nn.ReLU(inplace=True))
    with FeatureTap(network, ["1"]) as tap:
        outputs = network(IMAGES)
    assert (tap.features[0] < 0).any() and (outputs >= 0).all()


def test_the_hooks_go_on_exit_also_after_an_error():
    network = SmallResNet(4)
    with FeatureTap(network, ["layer1", "layer2"]) as tap:
        assert hooks(network) == 2
    assert hooks(network) == 0
    with pytest.raises(RuntimeError), FeatureTap(network, ["layer1"]):
        network(torch.rand(2, 5, 16, 16))
    assert hooks(network) == 0
    with tap:
        network(IMAGES)
    assert len(tap.features) == 2 and hooks(network) == 0


def test_unknown_names_are_answered_with_near_ones():
    with pytest.raises(ValueError, match=r"SmallResNet has no modules.*'layer4' \(near: layer\d, layer\d"):
        FeatureTap(SmallResNet(4), ["layer1", "layer4"])
    with pytest.raises(ValueError, match=r"'zzz' \(near: conv1, bn1, layer1, layer2, layer3\)"):
        FeatureTap(SmallResNet(4), ["zzz"])


def test_reading_too_early_or_what_is_no_tensor_is_an_error():
    network = nn.Sequential(nn.LSTM(3, 3))
    tap = FeatureTap(network, ["0"])
    with pytest.raises(ValueError, match=r"modules \['0'\] have not run"):
        tap.features  # noqa: B018
    with tap:
        network(torch.rand(2, 4, 3))
    with pytest.raises(ValueError, match="output of '0' is a tuple"):
        tap.features  # noqa: B018


def test_a_compiled_network_is_tapped_from_its_first_pass_on():
    torch._dynamo.reset()
    network = SmallResNet(4).eval()
    compiled = torch.compile(network, backend="eager")
    for factor in (1, 2):
        with FeatureTap(compiled, ["layer1"]) as tap:
            compiled(factor * IMAGES)
        stem = network.bn1(network.conv1(factor * IMAGES)).relu()
        assert torch.allclose(tap.features[0], network.layer1(stem), atol=1e-6)
    torch._dynamo.reset()
    compiled = torch.compile(SmallResNet(4), backend="eager")
    compiled(IMAGES)
    with FeatureTap(compiled, ["layer1"]) as tap:
        compiled(IMAGES)
    with pytest.raises(ValueError, match="under torch.compile from its first pass on"):
        tap.features  # noqa: B018


def test_wrappers_may_be_in_any_order(tmp_path):
    torch.distributed.init_process_group("gloo", init_method=f"file://{tmp_path}/store", rank=0, world_size=1)
    try:
        for wrap in (lambda n: torch.compile(parallel(n), backend="eager"), lambda n: parallel(torch.compile(n))):
            assert list(FeatureTap(wrap(SmallResNet(4)), ["layer1"]).modules) == ["layer1"]
    finally:
        torch.distributed.destroy_process_group()


def test_data_parallel_is_refused():
    with pytest.raises(ValueError, match="network is a DataParallel"):
        FeatureTap(nn.DataParallel(SmallResNet(4)), ["layer1"])


class Checkpointed(torch.nn.Module):
    def __init__(self, **options):
        super().__init__()
        self.first, self.options = torch.nn.Conv2d(1, 2, 3), options
        self.second = torch.nn.Sequential(torch.nn.Conv2d(2, 2, 3), torch.nn.ReLU())

    def forward(self, x):
        hidden = self.first(x)
        return checkpoint(self.second, hidden, **self.options) if self.options else self.second(hidden)


@pytest.mark.parametrize("name", ["second", "second.0", "second.1"])
def test_reentrant_checkpointing_around_a_tapped_module_is_refused(name):
    images = torch.rand(2, 1, 8, 8)
    with (
        pytest.raises(ValueError, match=f"'{name}' runs without gradients.*use_reentrant=False"),
        FeatureTap(network := Checkpointed(use_reentrant=True), [name]),
    ):
        network(images)
    with pytest.raises(ValueError, match="runs without gradients"), FeatureTap(network := Checkpointed(), [name]):
        checkpoint(network, images.requires_grad_(), use_reentrant=True)


@pytest.mark.parametrize("options", [{}, {"use_reentrant": False}, {"use_reentrant": True}])
def test_checkpointing_is_taken_where_nothing_is_lost(options):
    images, network = torch.rand(2, 1, 8, 8), Checkpointed(**options)
    with FeatureTap(network, ["first"]) as tap:
        network(images)
    assert tap.features[0].requires_grad
    if not options.get("use_reentrant"):
        with FeatureTap(network, ["second.1"]) as tap:
            network(images)
        tap.features[0].sum().backward()
        assert network.first.weight.grad is not None
    with torch.no_grad(), FeatureTap(network, ["second.1"]) as tap:
        network(images)
    network.requires_grad_(False)
    with FeatureTap(network, ["second.1"]) as tap:
        network(images)
    assert not tap.features[0].requires_grad


def test_tokens_are_taken_as_they_are():
    network = torch.nn.TransformerEncoder(torch.nn.TransformerEncoderLayer(8, 2, 16, batch_first=True), 2)
    with FeatureTap(network, ["layers.0"]) as tap:
        network(torch.rand(3, 5, 8))
    assert tap.features[0].shape == (3, 5, 8)
