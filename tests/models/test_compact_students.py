from pathlib import Path

import numpy as np
import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from pml_distill.models import CompactAlexNetStudent, CompactResNet, HashHead

GOLDEN = np.load(Path(__file__).parents[1] / "golden" / "student_nets.npz")


def set_by_rule(model):
    """The rule under which the authors' networks gave the stored outputs."""
    state = {name: tensor for name, tensor in model.state_dict().items() if "num_batches_tracked" not in name}
    for i, (name, tensor) in enumerate(state.items()):
        noise = torch.from_numpy(np.random.RandomState(1000 + i).standard_normal(tensor.numel())).view(tensor.shape)
        if name.endswith("running_var"):
            noise = 1 + 0.3 * noise**2
        elif name.endswith("running_mean") or name.endswith("bias"):
            noise = 0.05 * noise
        elif tensor.ndim == 1:
            noise = 1 + 0.1 * noise
        else:
            noise = (2 / tensor[0].numel()) ** 0.5 * noise
        tensor.copy_(noise)
    return state


@pytest.mark.parametrize(
    ("case", "trunk"), [("c00", CompactResNet), ("c02", CompactAlexNetStudent), ("c04", CompactResNet)]
)
def test_equals_the_authors_network(case, trunk):
    bits = int(GOLDEN[f"{case}_hp_bit"])
    model = trunk()
    model = torch.nn.Sequential(model, HashHead(model.output_size, bits)) if bits else model
    model = model.double().eval()
    shapes = [tuple(int(n) for n in row if n) for row in GOLDEN[f"{case}_tensor_shapes"]]
    assert [tuple(tensor.shape) for tensor in set_by_rule(model).values()] == shapes
    assert sum(p.numel() for p in model.parameters()) == GOLDEN[f"{case}_n_params"]
    images = torch.from_numpy(np.random.RandomState(0).standard_normal((1, 3, 224, 224)))
    with torch.no_grad():
        output = model(images)
    official = torch.from_numpy(GOLDEN[f"{case}_y"])
    assert (output - official).norm() <= 1e-9 * official.norm()


@pytest.mark.parametrize(
    ("trunk", "parameters", "multiply_adds"),
    [(CompactResNet, 3.306e6, 1.087e9), (CompactAlexNetStudent, 4.798e6, 1.111e9)],
)
def test_cost_at_224_pixels(trunk, parameters, multiply_adds):
    model = trunk().eval()
    with torch.no_grad(), FlopCounterMode(display=False) as counter:
        model(torch.zeros(1, 3, 224, 224))
    assert sum(p.numel() for p in model.parameters()) == pytest.approx(parameters, abs=500)
    assert counter.get_total_flops() / 2 == pytest.approx(multiply_adds, abs=5e5)


@pytest.mark.parametrize("trunk", [CompactResNet, CompactAlexNetStudent])
@pytest.mark.parametrize("size", [32, 64, 100])
def test_output_size_follows_the_image(trunk, size):
    model = trunk(size, in_channels=1).eval()
    with torch.no_grad():
        assert model(torch.zeros(2, 1, size, size)).shape == (2, model.output_size)


def test_a_head_has_bits():
    with pytest.raises(ValueError, match="bits must be at least 1, but is 0"):
        HashHead(16, 0)


@pytest.mark.parametrize("trunk", [CompactResNet, CompactAlexNetStudent])
def test_scripts(trunk):
    model, images = trunk().eval(), torch.randn(1, 3, 224, 224)
    torch.testing.assert_close(torch.jit.script(model)(images), model(images))
