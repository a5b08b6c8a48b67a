"""Networks by name: pooled features of any architecture, its own preprocessing, weights only with a word on it."""

import pytest
import torch
from torch import nn

from pml_distill.models import Preprocessing, SmallResNet, by_name, network_by_name


@pytest.fixture
def offline(monkeypatch):
    def refuse(*args, **kwargs):
        raise OSError("no network in tests")

    timm = pytest.importorskip("timm")
    monkeypatch.setattr(timm, "create_model", refuse)
    monkeypatch.setattr(torch.hub, "load_state_dict_from_url", refuse)


def named(name, **options):
    return network_by_name(name, pretrained=False, **options)


@pytest.mark.parametrize(
    ("name", "width", "size"),
    [
        ("timm/mobilenetv3_small_050", 1024, 224),
        ("timm/vit_tiny_patch16_224", 192, 224),
        ("timm/convnext_atto", 320, 224),
        ("torchvision/resnet18", 512, 224),
        ("torchvision/squeezenet1_1", 512, 224),
        ("torchvision/googlenet", 1024, 224),
        ("torchvision/convnext_tiny", 768, 224),
        ("torchvision/swin_t", 768, 224),
        ("torchvision/vit_b_32", 768, 224),
    ],
)
@pytest.mark.filterwarnings("ignore:The parameter 'init_weights'")
def test_features_of_any_architecture(name, width, size):
    found = named(name)
    assert (found.width, found.preprocessing.size) == (width, (size, size))
    assert found.network.training
    assert found.network(torch.zeros(2, 3, size, size)).shape == (2, width)


def test_each_has_the_preprocessing_it_was_trained_with():
    timm = named("timm/vit_tiny_patch16_224").preprocessing
    assert timm == Preprocessing((224, 224), "bicubic", (0.5,) * 3, (0.5,) * 3)
    assert named("torchvision/efficientnet_b1").preprocessing.size == (240, 240)
    assert named("torchvision/resnet18").preprocessing == Preprocessing()


def test_images_of_another_size():
    for name in ("timm/vit_tiny_patch16_224", "torchvision/resnet18"):
        found = named(name, image_size=64)
        assert found.network(torch.zeros(2, *found.preprocessing.image_shape)).shape == (2, found.width)
    with pytest.raises(ValueError, match=r"torchvision/vit_b_32 does not take images of \(3, 64, 64\)"):
        named("torchvision/vit_b_32", image_size=64)


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("timm/resnet51", "timm/resnet51 is unknown; near are .*timm/resnet50"),
        ("timm/resnet50.a9_in1k", r"is unknown; near are .*timm/resnet50\..*_in1k"),
        ("torchvision/resnet_18", "is unknown; near are torchvision/resnet18"),
        ("resnet50", "'resnet50' is no network.*Near are .*timm/resnet50.*torchvision/resnet50"),
        ("os:nothing", "os:nothing is no function"),
        ("no_such_module:f", "no_such_module:f is no function"),
    ],
)
def test_unknown_names(name, message):
    with pytest.raises(ValueError, match=message):
        named(name)


@pytest.mark.parametrize("name", ["timm/mobilenetv3_small_050", "torchvision/resnet18"])
def test_weights_that_cannot_be_had(name, offline, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(torch.hub, "get_dir", lambda: str(tmp_path))
    monkeypatch.setattr(by_name, "in_hub_cache", lambda repository: False)
    monkeypatch.setattr("torchvision.models._api.load_state_dict_from_url", torch.hub.load_state_dict_from_url)
    with pytest.raises(ValueError, match=f"weights of {name} cannot be had .*Give a file of them .*--weights"):
        network_by_name(name)
    assert f"The weights of {name} are not on this machine yet" in capsys.readouterr().err


def test_a_file_of_weights_stands_in(tmp_path):
    import timm
    import torchvision

    models = {
        "timm/mobilenetv3_small_050": timm.create_model("mobilenetv3_small_050"),
        "torchvision/mobilenet_v3_small": torchvision.models.mobilenet_v3_small(),
    }
    for name, model in models.items():
        with torch.no_grad():
            next(model.parameters()).fill_(0.25)
        torch.save({"state_dict": {f"module.{k}": v for k, v in model.state_dict().items()}}, tmp_path / "weights.pth")
        assert (next(network_by_name(name, weights=tmp_path / "weights.pth").network.parameters()) == 0.25).all()
        for other in ("torchvision/resnet18", "timm/resnet18"):
            with pytest.raises(ValueError, match=r"The weights .*weights.pth do not fit"):
                network_by_name(other, weights=tmp_path / "weights.pth")
    state = {k: v for k, v in model.state_dict().items() if not k.startswith("classifier.3")}
    torch.save({k: v for k, v in state.items() if "num_batches" not in k}, tmp_path / "features.pth")
    network_by_name("torchvision/mobilenet_v3_small", weights=tmp_path / "features.pth")
    (tmp_path / "text.pth").write_text("not weights")
    with pytest.raises(ValueError, match=r"The weights .*text.pth cannot be read"):
        network_by_name("torchvision/resnet18", weights=tmp_path / "text.pth")
    with pytest.raises(ValueError, match="There is no weights file"):
        network_by_name("timm/resnet18", weights=tmp_path / "none.pth")


def your_network():
    network = nn.Sequential(SmallResNet(4, in_channels=3).conv1, nn.ReLU())
    network.preprocessing = Preprocessing((16, 16))
    return network


def test_a_function_of_yours_and_a_network_of_yours():
    found = named(f"{__name__}:your_network")
    assert found.width == 4 and found.preprocessing.size == (16, 16)
    assert found.network(torch.zeros(2, 3, 16, 16)).shape == (2, 4)
    assert named(SmallResNet(4, in_channels=3)).width == 16
    with pytest.raises(ValueError, match=r"must return features \(B, D\), but returned \(1, 3, 16\)"):
        named(Tokens())


class Tokens(nn.Module):
    preprocessing = Preprocessing((4, 4))

    def forward(self, images):
        return images.flatten(2)
