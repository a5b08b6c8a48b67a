import copy
from pathlib import Path

import numpy as np
import pytest
import torch
import torchvision
from networks import NETWORKS, images, network, pruned
from torch import nn
from torchvision.models.resnet import Bottleneck

from pml_distill.capacity import ExportMeter, export, find_compactors, insert_compactors
from pml_distill.capacity.export import merge
from pml_distill.evaluation import model_cost

GOLDEN = Path(__file__).parents[1] / "golden"


def arrays(file, case):
    with np.load(GOLDEN / file) as archive:
        return {key[4:]: torch.tensor(value) for key, value in archive.items() if key.startswith(case)}


@pytest.mark.parametrize("case", ["c00", "c02", "c04"])
def test_merging_is_that_of_the_authors(case):
    given = arrays("transVII_reduction.npz", case)
    weight = given["k1"]
    conv = nn.Conv2d(weight.shape[1], weight.shape[0], weight.shape[2:], dtype=torch.float64)
    conv.load_state_dict({"weight": weight, "bias": given["b1"]})
    neutral = nn.BatchNorm2d(weight.shape[0], eps=0, affine=False, dtype=torch.float64)
    merged = merge(conv, neutral, given["k2"])
    torch.testing.assert_close(merged.weight, given["merge_k"], rtol=1e-8, atol=1e-10)
    # For one row the authors' bias has lost its dimension.
    torch.testing.assert_close(merged.bias, given["merge_b"].reshape(-1), rtol=1e-8, atol=1e-10)


def golden_block(given):
    channels, features = given["p_conv1.conv.weight"].shape[:2]
    block = Bottleneck(features, channels, norm_layer=nn.BatchNorm2d).double()
    block.load_state_dict(
        {f"{layer}.weight": given[f"p_{layer}.conv.weight"] for layer in ("conv1", "conv2", "conv3")}
        | {
            f"bn{i}.{key}": given[f"p_conv{i}.bn.{key}"]
            for i in (1, 2, 3)
            for key in ("weight", "bias", "running_mean", "running_var")
        },
        strict=False,
    )
    block.eval()
    insert_compactors(block)["bn2"].weight.data = given["p_compactor.weight"]
    return block


@pytest.mark.parametrize("case", ["c00", "c02", "c04", "c06"])
def test_a_pruned_bottleneck_is_that_of_the_authors(case):
    given = arrays("prune_reparam.npz", case)
    block = golden_block(given)
    exact = {"rtol": 1e-8, "atol": 1e-8}
    with torch.no_grad():
        torch.testing.assert_close(block(given["x"]), given["y_full"], **exact)
        small = export(block, given["hp_thresh"].item())
        torch.testing.assert_close(small(given["x"]), given["y_pruned"], **exact)
        if "y_deploy" in given:
            torch.testing.assert_close(small(given["x"]), given["y_deploy"], **exact)
    assert small.conv2.out_channels == small.conv3.in_channels == given["n_kept"]
    torch.testing.assert_close(small.conv2.weight.data, given["reparam_weight"], **exact)
    torch.testing.assert_close(small.conv2.bias.data, given["reparam_bias"].reshape(-1), **exact)
    torch.testing.assert_close(small.conv3.weight.data, given["conv3_pruned"], **exact)


def test_a_single_block_under_the_threshold_keeps_its_longest_row_as_the_authors_do():
    given = arrays("prune_reparam.npz", "c06")
    block = golden_block(given)
    compactor = find_compactors(block)["bn2"]
    longest = compactor.weight.data[3].clone()
    compactor.weight.data[3] *= 5e-6
    small = export(block, 1e-5)
    assert small.conv2.out_channels == 1
    expected = 5e-6 * torch.einsum("i,ijkl->jkl", longest.flatten(), merge(block.conv2, block.bn2[0]).weight)
    torch.testing.assert_close(small.conv2.weight.data[0], expected, rtol=1e-8, atol=1e-16)


@pytest.mark.parametrize("fold_norms", [False, True])
@pytest.mark.parametrize("positions", ["inner", "all"])
@pytest.mark.parametrize("name", NETWORKS)
def test_outputs_are_those_of_the_network_with_compactors(name, positions, fold_norms):
    model = pruned(name, positions)
    state = copy.deepcopy(model.state_dict())
    small = export(model, fold_norms=fold_norms)
    with torch.no_grad():
        expected = model(images())
        assert expected.std() > 1e-3
        torch.testing.assert_close(small(images()), expected, rtol=1e-5, atol=1e-5 * expected.abs().max().item())
    assert type(small) is type(model) and not any("capacity" in type(m).__module__ for m in small.modules())
    assert not any(module.training for module in small.modules())
    kept = {key: int((compactor.row_norms() > 0).sum()) for key, compactor in find_compactors(model).items()}
    for key, rows in kept.items():
        parent, _, norm = key.rpartition(".")
        assert small.get_submodule(f"{parent}.conv{norm[-1]}").out_channels == rows
        assert small.get_submodule(f"{parent}.conv{int(norm[-1]) + 1}").in_channels == rows
        assert isinstance(small.get_submodule(key), nn.Identity)
    assert any(isinstance(m, nn.BatchNorm2d) for m in small.modules()) != fold_norms
    assert len(find_compactors(model)) == len(kept)
    assert all(torch.equal(state[key], value) for key, value in model.state_dict().items())


def test_resnet101_exports():
    model = torchvision.models.resnet101().eval()
    compactors = insert_compactors(model)
    with torch.no_grad():
        before = model(images())
        for compactor in compactors.values():
            compactor.weight[torch.arange(len(compactor.weight)) % 3 > 0] = 0
        expected = model(images())
        small = export(model)
        torch.testing.assert_close(small(images()), expected, rtol=1e-5, atol=1e-5 * expected.abs().max().item())
    assert not torch.allclose(before, expected)
    assert small.layer3[5].conv2.out_channels == 86


def test_every_block_down_to_one_channel_saves_what_the_structure_allows():
    model = torchvision.models.resnet101()
    model.fc = nn.Linear(2048, 512)
    whole = model_cost(model, (3, 256, 256), ())
    for compactor in insert_compactors(model.eval()).values():
        compactor.weight.data[1:] = 0
    small = model_cost(export(model), (3, 256, 256), ())
    assert 1 - small.parameters / whole.parameters == pytest.approx(0.7058, abs=2e-3)
    assert 1 - small.flops / whole.flops == pytest.approx(0.7038, abs=2e-3)


def test_the_longest_row_of_each_compactor_stays():
    model = network("SmallResNet")
    compactors = insert_compactors(model)
    first, *_ = compactors.values()
    first.weight.data *= 1e-7
    first.weight.data[2] *= 2
    small = export(model)
    assert small.layer1[0].conv1.out_channels == 1 and small.layer1[1].conv1.out_channels == 8
    torch.testing.assert_close(small.layer1[0].conv2.weight, model.layer1[0].conv2.weight[:, 2:3])


def test_where_all_rows_are_zero_the_first_stays():
    model = network("SmallResNet")
    for compactor in insert_compactors(model).values():
        compactor.weight.data.zero_()
    small, expected = export(model), ExportMeter(model, (3, 64, 64)).measure().parameters
    assert small.layer1[0].conv1.out_channels == 1 and sum(p.numel() for p in small.parameters()) == expected
    with torch.no_grad():
        torch.testing.assert_close(small(images()), model(images()), rtol=1e-5, atol=1e-5)


def test_rows_at_the_threshold_stay():
    model = network("SmallResNet")
    first, *_ = insert_compactors(model).values()
    first.weight.data *= 0.5
    first.weight.data[3:] *= 0.5
    assert export(model, threshold=0.5).layer1[0].conv1.out_channels == 3
    assert export(model, threshold=0).layer1[0].conv1.out_channels == 8


def test_hooks_on_compactors_are_not_copied():
    class Holder:
        def __deepcopy__(self, memo):
            raise AssertionError("copied")

        def __call__(self, *_): ...

    model = network("SmallResNet")
    for compactor in insert_compactors(model).values():
        compactor.register_forward_hook(Holder())
    export(model)


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
def test_the_type_stays(dtype):
    small = export(pruned("SmallResNet").to(dtype))
    assert {parameter.dtype for parameter in small.parameters()} == {dtype}


def test_frozen_weights_stay_frozen_and_channels_last_stays():
    model = network("torchvision resnet18").to(memory_format=torch.channels_last)
    model.layer1.requires_grad_(False)
    for compactor in insert_compactors(model).values():
        compactor.weight.requires_grad_(True)
    small = export(model, fold_norms=True)
    assert not any(p.requires_grad for p in small.layer1.parameters())
    assert all(p.requires_grad for p in small.layer2.parameters())
    for module in small.modules():
        if isinstance(module, nn.Conv2d):
            assert module.weight.is_contiguous(memory_format=torch.channels_last)
            # A 1x1 kernel is both, and which one its strides say decides the layout of the output.
            assert module.weight.is_contiguous() == (module.kernel_size == (1, 1))
    assert network("torchvision resnet18").conv1.weight.is_contiguous()


def test_errors_say_what_to_do():
    model = network("SmallResNet")
    with pytest.raises(ValueError, match="SmallResNet has no compactors: call insert_compactors"):
        export(model)
    compactors = insert_compactors(model)
    with pytest.raises(ValueError, match="in training mode.*call eval"):
        export(model.train())
    model.eval()
    with pytest.raises(ValueError, match="threshold=2 would empty every block.*layer1.0.bn1 1,.*layer3.1.bn1 1"):
        export(model, threshold=2)
    with pytest.raises(ValueError, match="threshold must be at least 0, but is nan"):
        export(model, threshold=float("nan"))
    compactors["layer2.1.bn1"].weight.data[0, 0] = float("nan")
    with pytest.raises(ValueError, match="the compactor behind layer2.1.bn1 has values that are not finite"):
        export(model)


def test_an_activation_that_has_learned_a_shift_is_refused():
    class Shifted(nn.Module):
        def __init__(self):
            super().__init__()
            self.shift = nn.Parameter(torch.zeros(()))

        def forward(self, x):
            return x.relu() + self.shift

    model = network("torchvision resnet18")
    model.layer2[1].relu = Shifted().eval()
    insert_compactors(model)["layer2.1.bn1"].weight.data[5:] = 0
    small = export(model)
    with torch.no_grad():
        torch.testing.assert_close(small(images()), model(images()), rtol=1e-5, atol=1e-5)
    model.layer2[1].relu.shift.data += 0.1
    with pytest.raises(ValueError, match=r"behind layer2.1.bn1: Shifted stands .* does not keep zeros zero"):
        export(model)


def test_folding_says_when_it_cannot_trace():
    class Branching(nn.Module):
        def __init__(self):
            super().__init__()
            self.trunk = network("SmallResNet")

        def forward(self, x):
            return self.trunk(x) if x.sum() > 0 else self.trunk(-x)

    model = Branching().eval()
    insert_compactors(model)
    with pytest.raises(ValueError, match="fold_norms=True needs a network that torch.fx can trace, Branching is not"):
        export(model, fold_norms=True)
    export(model)


def test_it_draws_no_random_numbers():
    model = pruned("torchvision resnet18", "all")
    state = torch.get_rng_state()
    export(model, fold_norms=True)
    assert torch.equal(torch.get_rng_state(), state)


@pytest.mark.parametrize("name", ["torchvision resnet18", "timm resnet50"])
def test_exported_programs_and_onnx_give_the_same(name, tmp_path):
    import onnxruntime

    path = str(tmp_path / "small.onnx")  # torch 2.4 takes no other
    model = pruned(name, "all")
    small = export(model)
    with torch.no_grad():
        expected = small(images())
        program = torch.export.export(small, (images(),))
        torch.testing.assert_close(program.module()(images()), expected, rtol=1e-5, atol=1e-5)
    torch.onnx.export(small, (images(),), path, dynamo=True)
    session = onnxruntime.InferenceSession(path)
    (output,) = session.run(None, {session.get_inputs()[0].name: images().numpy()})
    torch.testing.assert_close(torch.from_numpy(output), expected, rtol=1e-4, atol=1e-4)
