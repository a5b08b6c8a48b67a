import pytest
import torch
from networks import NETWORKS, network, pruned
from torch.utils.flop_counter import FlopCounterMode

from pml_distill.capacity import ExportMeter, export, find_compactors, insert_compactors
from pml_distill.evaluation import model_cost


@pytest.mark.parametrize("positions", ["inner", "all"])
@pytest.mark.parametrize("name", NETWORKS)
def test_counts_are_those_of_the_exported_network(name, positions):
    model = pruned(name, positions)
    cost = ExportMeter(model, (3, 64, 64)).measure()
    small = export(model)
    measured = model_cost(small, (3, 64, 64), ())
    assert cost.parameters == measured.parameters and cost.flops == measured.flops
    with torch.no_grad(), FlopCounterMode(display=False) as counter:
        small(torch.zeros(1, 3, 64, 64))
    widths = {}
    for name, block in cost.blocks.items():
        assert block.flops == sum(counter.get_flop_counts()[f"{type(small).__name__}.{name}"].values())
        assert block.parameters == sum(p.numel() for p in small.get_submodule(name).parameters())
        widths |= block.widths
    assert widths == {key: int((c.row_norms() > 0).sum()) for key, c in find_compactors(model).items()}


def test_counts_by_hand():
    model = network("SmallResNet")
    compactors = insert_compactors(model)
    meter = ExportMeter(model, (3, 32, 32))
    compactors["layer2.0.bn1"].weight.data[5:] = 0
    block = meter.measure().blocks["layer2.0"]
    # conv1 with bias, conv2, its normalisation, shortcut with normalisation; maps of 8 x 8.
    assert block.parameters == (8 * 5 * 9 + 5) + 5 * 16 * 9 + 32 + (8 * 16 + 32)
    assert block.flops == 2 * 64 * (8 * 5 * 9 + 5 * 16 * 9 + 8 * 16)
    assert block.widths == {"layer2.0.bn1": 5}


def test_one_row_is_counted_where_none_is_left():
    model = network("SmallResNet")
    compactors = insert_compactors(model)
    meter = ExportMeter(model, (3, 32, 32))
    for compactor in compactors.values():
        compactor.weight.data *= 1e-3
    assert meter.measure(threshold=1e-5).blocks["layer1.0"].widths == {"layer1.0.bn1": 8}
    for compactor in compactors.values():
        compactor.weight.data *= torch.linspace(1, 2, len(compactor.weight)).view(-1, 1, 1, 1)
    assert meter.measure(threshold=1).blocks["layer1.0"].widths == {"layer1.0.bn1": 1}


def test_modes_are_restored():
    model = network("SmallResNet").train()
    insert_compactors(model)
    model.layer1.eval()
    before = {name: buffer.clone() for name, buffer in model.named_buffers()}
    ExportMeter(model, (3, 32, 32))
    assert model.training and model.layer2.training and not model.layer1[0].conv1.training
    assert all(torch.equal(before[name], buffer) for name, buffer in model.named_buffers())


@pytest.mark.parametrize("shape", [(32, 32), (3, 32, 0), (3, 32.0, 32), 32, None])
def test_needs_a_shape_of_images(shape):
    model = network("SmallResNet")
    insert_compactors(model)
    with pytest.raises(ValueError, match=r"image_shape must be \(C, H, W\), three positive whole numbers, but is"):
        ExportMeter(model, shape)


def test_a_shape_that_the_network_does_not_take_is_named():
    model = network("SmallResNet")
    insert_compactors(model)
    with pytest.raises(ValueError, match=r"must be a shape that SmallResNet takes, but is \(1, 32, 32\): Given groups"):
        ExportMeter(model.train(), (1, 32, 32))
    assert model.training


def test_needs_compactors():
    with pytest.raises(ValueError, match="SmallResNet has no compactors"):
        ExportMeter(network("SmallResNet"), (3, 32, 32))
