import functools
import inspect
import json
import sys
import textwrap

import pytest
import safetensors.torch
import timm
import torch
import torchvision
from networks import images, network, pruned

from pml_distill.capacity import export, insert_compactors, load_compact, save_compact
from pml_distill.models import SmallResNet


@pytest.fixture(scope="module")
def small():
    return export(pruned("torchvision resnet18"))


@pytest.mark.parametrize("fold_norms", [False, True])
@pytest.mark.parametrize(
    "name", ["torchvision resnet18", "torchvision resnet50", "timm resnetaa50", "timm seresnet50t"]
)
def test_comes_back_as_it_was(name, fold_norms, tmp_path):
    small = export(pruned(name, "all"), fold_norms=fold_norms)
    save_compact(small, tmp_path / "small.safetensors")
    loaded = load_compact(tmp_path / "small.safetensors", network(name))
    with torch.no_grad():
        assert torch.equal(loaded(images()), small(images()))
    assert not loaded.training and type(loaded) is type(small)


def test_wide_networks_come_back_as_the_narrow_one_widened(tmp_path):
    model = torchvision.models.wide_resnet50_2().eval()
    insert_compactors(model)
    small = export(model)
    save_compact(small, tmp_path / "wide")
    loaded = load_compact(tmp_path / "wide", torchvision.models.resnet50())
    with torch.no_grad():
        assert torch.equal(loaded(images()), small(images()))


def test_headless_networks_and_other_types_come_back(tmp_path):
    model = export(pruned("torchvision resnet18"))
    model.fc = torch.nn.Linear(512, 16)
    model.double()
    save_compact(model, tmp_path / "head")
    given = network("torchvision resnet18")
    torch.testing.assert_close(load_compact(tmp_path / "head", given)(images().double()), model(images().double()))
    model.fc = torch.nn.Identity()
    save_compact(model, tmp_path / "head")
    assert load_compact(tmp_path / "head", given)(images().double()).shape == (2, 512)


def test_other_networks_come_back_with_their_architecture_given(tmp_path):
    small = export(pruned("SmallResNet"))
    save_compact(small, tmp_path / "small")
    given = SmallResNet(width=8, in_channels=3)
    loaded = load_compact(tmp_path / "small", given)
    with torch.no_grad():
        assert torch.equal(loaded(images()), small(images()))
    assert given.layer1[0].conv1.out_channels == 8


def without(stage):
    model = torchvision.models.resnet18()
    setattr(model, stage, torch.nn.Identity())
    return model


@pytest.mark.parametrize(
    "make",
    [
        lambda: without("layer4"),
        lambda: without("layer1"),
        lambda: timm.models.resnet.ResNet(timm.models.resnet.BasicBlock, [1, 1, 1, 1]),
        lambda: torchvision.models.resnet.BasicBlock(3, 3),
    ],
)
def test_networks_that_no_function_of_a_library_makes_come_back(make, tmp_path):
    model = make()
    model.fc = torch.nn.Identity()
    insert_compactors(model)
    small = export(model.eval())
    save_compact(small, tmp_path / "small")
    given = make()
    given.fc = torch.nn.Identity()
    with torch.no_grad():
        assert torch.equal(load_compact(tmp_path / "small", given)(images()), small(images()))


def test_can_be_read_without_this_package(tmp_path):
    small = export(pruned("torchvision resnet50"))
    path = tmp_path / "small.safetensors"
    save_compact(small, path)
    lines = inspect.getdoc(save_compact).split("alone::\n\n")[1].split("\n\nThe file is written")[0]
    names = {"path": path, "safetensors": safetensors, "json": json, "torchvision": torchvision, "torch": torch}
    exec(textwrap.dedent(lines), names)
    with torch.no_grad():
        assert torch.equal(names["model"](images()), small(images()))


def test_a_failed_save_leaves_the_old_file_whole(small, tmp_path, monkeypatch):
    path = tmp_path / "small.safetensors"
    save_compact(small, path)
    before = path.read_bytes()

    def full(self, content):
        with open(self, "wb") as file:
            file.write(content[:100])
        raise OSError("disk full")

    monkeypatch.setattr("pathlib.Path.write_bytes", full)
    with pytest.raises(OSError, match="disk full"):
        save_compact(small, path)
    assert path.read_bytes() == before and list(tmp_path.iterdir()) == [path]


def test_files_of_other_architectures_are_refused(small, tmp_path):
    path = tmp_path / "small.safetensors"
    save_compact(small, path)
    with pytest.raises(ValueError, match="does not fit ResNet: layer1.2.conv1 is in the network only"):
        load_compact(path, torchvision.models.resnet34())
    with pytest.raises(ValueError, match="does not fit SmallResNet: layer1.0.downsample is in the network only"):
        load_compact(path, SmallResNet())


def test_another_pooling_is_not_taken_for_the_architectures_own(tmp_path):
    def changed():
        model = torchvision.models.resnet18()
        model.maxpool = torch.nn.MaxPool2d(2, 2)
        return model

    model = changed()
    insert_compactors(model)
    small = export(model.eval())
    save_compact(small, tmp_path / "small")
    with pytest.raises(
        ValueError,
        match=r"maxpool is .*'kernel_size': 3.* in the network, .*'kernel_size': 2.* in the file",
    ):
        load_compact(tmp_path / "small", torchvision.models.resnet18())
    with torch.no_grad():
        assert torch.equal(load_compact(tmp_path / "small", changed())(images()), small(images()))


def test_a_frozen_normalisation_of_another_eps_is_refused(tmp_path):
    def frozen(eps):
        norm = functools.partial(torchvision.ops.FrozenBatchNorm2d, eps=eps)
        return torchvision.models.resnet18(norm_layer=norm)

    model = frozen(0.1)
    insert_compactors(model)
    small = export(model.eval())
    save_compact(small, tmp_path / "small")
    with pytest.raises(ValueError, match=r"bn1 is .*'eps': 1e-05.* in the net.*'eps': 0.1.* in the file"):
        load_compact(tmp_path / "small", frozen(1e-5))
    with torch.no_grad():
        assert torch.equal(load_compact(tmp_path / "small", frozen(0.1))(images()), small(images()))


def test_a_model_that_is_no_network_is_refused(small, tmp_path):
    save_compact(small, tmp_path / "small")
    with pytest.raises(ValueError, match="network as it was before insert_compactors, but is 'resnet18'"):
        load_compact(tmp_path / "small", "resnet18")


def test_other_files_are_refused(tmp_path):
    safetensors.torch.save_file({"weight": torch.zeros(1)}, tmp_path / "plain")
    with pytest.raises(ValueError, match="plain is not from save_compact: its format must be"):
        load_compact(tmp_path / "plain", SmallResNet())
    (tmp_path / "text").write_text("no tensors in here")
    with pytest.raises(ValueError, match="text is not a safetensors file"):
        load_compact(tmp_path / "text", SmallResNet())
    with pytest.raises(FileNotFoundError):
        load_compact(tmp_path / "nothing", SmallResNet())


def test_networks_with_compactors_are_refused(tmp_path):
    with pytest.raises(ValueError, match="SmallResNet has compactors: save what export returns"):
        save_compact(pruned("SmallResNet"), tmp_path / "small")


def test_says_how_to_get_safetensors(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "safetensors.torch", None)
    with pytest.raises(ImportError, match=r"pip install 'pml-distill\[capacity\]'"):
        save_compact(network("SmallResNet"), tmp_path / "small")
