"""What goes wrong around a student that shrinks: wrappers, compilers, averages, foreign weights, other inputs."""

import copy

import pytest
import torch
import torchvision
from safetensors import safe_open
from torch import nn

from pml_distill.capacity import (
    CapacityDynamics,
    RetrievalReset,
    SizeBudget,
    export,
    find_compactors,
    insert_compactors,
    save_compact,
)
from pml_distill.models import SmallResNet

SHAPE = (1, 16, 16)


def network(compactors=True):
    torch.manual_seed(0)
    model = SmallResNet(4)
    if compactors:
        insert_compactors(model)
    return model


def attached(student, **reset):
    optimizer = torch.optim.SGD(student.parameters(), lr=0.01)
    settings = RetrievalReset(**{"teacher": network(False), "warmup_epochs": 0, "queue_size": 64, **reset})
    return optimizer, CapacityDynamics(student, optimizer, SHAPE, reset=settings)


def step(student, optimizer):
    optimizer.zero_grad()
    student(torch.randn(4, *SHAPE)).square().mean().backward()
    optimizer.step()


@pytest.fixture
def process_group(tmp_path):
    torch.distributed.init_process_group("gloo", init_method=f"file://{tmp_path}/store", rank=0, world_size=1)
    yield
    torch.distributed.destroy_process_group()


@pytest.mark.parametrize("inside", [lambda s: s, lambda s: nn.Sequential(s, nn.Linear(16, 4)), lambda s: s.layer2])
def test_what_a_distributed_wrapper_holds_gets_no_compactors_that_it_would_not_average(process_group, inside):
    student = network(False)
    wrapper = nn.parallel.DistributedDataParallel(inside(student))
    with pytest.raises(ValueError, match="in a DistributedDataParallel, which would not average the gradients"):
        insert_compactors(student)
    with pytest.raises(ValueError, match="in a DistributedDataParallel: insert compactors before wrapping"):
        insert_compactors(wrapper)
    del wrapper
    assert len(insert_compactors(network(False))) == 6


def test_a_sharded_student_is_refused_with_the_reason(process_group):
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard

    mesh = init_device_mesh("cpu", (1,))
    student = fully_shard(network(), mesh=mesh)
    with pytest.raises(ValueError, match="sharded by fully_shard, so that no process holds whole rows"):
        CapacityDynamics(student, torch.optim.SGD(student.parameters(), lr=0.1), SHAPE)
    with pytest.raises(ValueError, match="sharded by fully_shard: insert compactors before"):
        insert_compactors(fully_shard(network(False), mesh=mesh))


@pytest.mark.parametrize("case", ["compiled before", "a second one", "teacher compiled before"])
def test_compiled_students_are_heard_whenever_they_were_compiled(case):
    torch.compiler.reset()
    student, teacher = network(), network(False)
    first = teacher if case == "teacher compiled before" else network() if case == "a second one" else student
    first.compile(backend="eager")
    first(torch.randn(4, *SHAPE)).sum().backward()
    if case == "a second one":
        student.compile(backend="eager")
    optimizer, dynamics = attached(student, teacher=teacher)
    for _ in range(2):
        step(student, optimizer)
    assert all(reset.count == 8 for reset in dynamics.resetting.resets)


def test_a_network_that_was_wrapped_is_exported_and_saved_under_its_own_names(tmp_path):
    student = network().eval()
    average = torch.optim.swa_utils.AveragedModel(student)
    for wrapper in (nn.DataParallel(student), average.eval()):
        small = export(wrapper)
        assert type(small) is SmallResNet
        save_compact(nn.DataParallel(small), tmp_path / "small.safetensors")
        with safe_open(tmp_path / "small.safetensors", "pt") as file:
            assert set(file.keys()) == set(small.state_dict())


@pytest.mark.parametrize("strict", [True, False])
def test_plain_weights_are_loaded_into_a_network_with_compactors(strict):
    trained, model = torchvision.models.resnet18(), torchvision.models.resnet18()
    nn.init.normal_(trained.layer1[0].bn1.bias)
    for compactor in insert_compactors(model).values():
        nn.init.zeros_(compactor.weight)
    report = model.load_state_dict(trained.state_dict(), strict=strict)
    assert not report.missing_keys and not report.unexpected_keys
    images = torch.randn(2, 3, 64, 64)
    torch.testing.assert_close(model.eval()(images), trained.eval()(images))
    head = {"fc.weight": torch.zeros(1000, 512), "fc.bias": torch.zeros(1000)}
    nn.init.zeros_(model.layer1[0].bn1[1].weight)
    model.load_state_dict(head, strict=False)
    assert not model.layer1[0].bn1[1].weight.any()


def test_an_average_is_cut_to_the_students_rows():
    student = network()
    average = copy.deepcopy(student)
    optimizer, dynamics = attached(student)
    for compactor in find_compactors(student).values():
        nn.init.zeros_(compactor.weight[1:])
    for compactor in find_compactors(average).values():
        compactor.weight.data[1:] *= 1e-3
    small = dynamics.export(average=average)
    assert small.layer1[0].conv1.out_channels == 1
    assert export(average.eval()).layer1[0].conv1.out_channels == 4
    with pytest.raises(ValueError, match="rows_of must have the same compactors as model"):
        export(average, rows_of=SmallResNet(4))


def test_a_layer_that_was_replaced_after_the_insertion_is_named():
    model = network().eval()
    model.layer1[0].conv2 = nn.Conv2d(4, 4, 3, padding=1).eval()
    with pytest.raises(ValueError, match="around the compactor behind layer1.0.bn1 was replaced after insert_compact"):
        export(model)


def test_without_a_teacher_given_the_student_as_it_was_is_the_teacher_and_goes_into_the_state():
    student = network()
    optimizer, dynamics = attached(student, teacher=None)
    whole = {key: value.clone() for key, value in dynamics.resetting.teacher.state_dict().items()}
    step(student, optimizer)
    teacher = dynamics.resetting.teacher.state_dict()
    assert all(torch.equal(whole[key], teacher[key]) for key in whole)
    assert all(reset.count == 4 for reset in dynamics.resetting.resets)
    later = network()
    nn.init.normal_(later.conv1.weight)
    anew, resumed = attached(later, teacher=None)
    anew.load_state_dict(optimizer.state_dict())
    assert torch.equal(resumed.resetting.teacher.conv1.weight, whole["conv1.weight"])
    with pytest.raises(ValueError, match="another queue_size or kind of teacher"):
        attached(network())[0].load_state_dict(optimizer.state_dict())


class TwoInputs(nn.Module):
    def __init__(self):
        super().__init__()
        self.body = SmallResNet(4)
        self.hidden, self.out = nn.Linear(5, 8), nn.Linear(8, 16)

    def forward(self, image, meta):
        return self.body(image) + self.out(self.hidden(meta).relu())


def test_networks_of_other_inputs_shrink():
    student = TwoInputs()
    insert_compactors(student)
    optimizer = torch.optim.SGD(student.parameters(), lr=0.01)
    inputs = {"image": torch.randn(1, *SHAPE), "meta": torch.randn(1, 5)}
    budget = SizeBudget(parameters=0.5, steps=1, multiple_of=1)
    dynamics = CapacityDynamics(student, optimizer, example_inputs=inputs, budget=budget)
    student(**inputs).sum().backward()
    optimizer.step()
    small = dynamics.export()
    torch.testing.assert_close(small(**inputs), student.eval()(**inputs))
    assert sum(p.numel() for p in small.parameters()) == dynamics.measure().parameters
    with pytest.raises(ValueError, match="example_inputs must be what TwoInputs takes"):
        dynamics.close()
        CapacityDynamics(student, optimizer, example_inputs=(torch.randn(1, 3, 3), torch.randn(1, 4)))


def test_widths_are_multiples_in_the_export():
    model = torchvision.models.resnet18().eval()
    for compactor in insert_compactors(model).values():
        compactor.weight.data[3:] = 0
    small = export(model, multiple_of=8)
    assert small.layer1[0].conv1.out_channels == 8
    images = torch.randn(2, 3, 64, 64)
    with torch.no_grad():
        torch.testing.assert_close(small(images), model(images), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("way", ["a slice", "a softmax", "its weight", "a tied weight", "a shuffle"])
def test_what_cannot_be_told_is_left_alone(way):
    class Odd(nn.Module):
        def __init__(self):
            super().__init__()
            self.a, self.b, self.c = nn.Linear(8, 16), nn.Linear(16, 8), nn.Linear(16, 8)
            if way == "a tied weight":
                self.c.weight = self.b.weight

        def forward(self, x):
            hidden = self.a(x).relu()
            if way == "a slice":
                return self.b(torch.cat([hidden[..., :8], hidden[..., 8:]], -1))
            if way == "a softmax":
                return self.b(hidden * nn.functional.softmax(self.a(x), -1))
            if way == "its weight":
                return self.b(hidden) + self.a.weight.sum()
            if way == "a shuffle":
                return self.b(hidden.flip(-1))
            return self.b(hidden) + self.c(x.repeat(1, 2))

    with pytest.raises(ValueError, match="Odd has no block to put compactors in"):
        insert_compactors(Odd())
