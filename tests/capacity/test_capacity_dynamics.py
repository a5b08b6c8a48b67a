import copy
import functools
import gc
import os
import signal
import subprocess
import sys
import textwrap
import types
import weakref

import pytest
import timm
import torch

# Before there is a process group: imported by DDP, its functions would hold the group, and its threads outlive it.
import torch.distributed.nn
import torchvision
from matplotlib.figure import Figure
from pytorch_metric_learning.losses import MultiSimilarityLoss
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import FlopCounterMode
from torchvision.models.resnet import Bottleneck, ResNet

from pml_distill.capacity import CapacityDynamics, RetrievalReset, SizeBudget, insert_compactors
from pml_distill.evaluation import model_cost
from pml_distill.losses import AbsoluteTeacherLoss, PooledFeatureLoss
from pml_distill.models import SmallResNet
from pml_distill.teachers import EnsembleTeacher, FrozenTeacher
from pml_distill.trainers import DistillationTrainer

SHAPE = (1, 16, 16)


def network(seed=0, compactors=True):
    torch.manual_seed(seed)
    model = SmallResNet(4)
    if compactors:
        insert_compactors(model)
    return model


def images(count=8, seed=0):
    return torch.randn(count, *SHAPE, generator=torch.Generator().manual_seed(seed))


def attach(student, teacher, optimizer, shape=SHAPE, **kwargs):
    """Dynamics, with the settings of the budget, of the resetting and their own side by side."""
    budget = {key: kwargs.pop(key) for key in ("parameters", "flops", "steps") if key in kwargs}
    own = {key: kwargs.pop(key) for key in ("lasso_weight", "threshold", "proximal") if key in kwargs}
    reset = None if teacher is None else RetrievalReset(teacher, **kwargs)
    budget = SizeBudget(multiple_of=1, **budget) if any(budget.values()) else None
    return CapacityDynamics(student, optimizer, shape, reset=reset, budget=budget, **own)


def setting(teacher=True, rate=0.1, optimizer=torch.optim.SGD, **kwargs):
    student, teacher = network(), network(1, compactors=False) if teacher else None
    optimizer = optimizer(student.parameters(), lr=rate)
    kwargs = {"warmup_epochs": 0, "queue_size": 64, "ratio": 0.8, **kwargs}
    return student, teacher, optimizer, attach(student, teacher, optimizer, **kwargs)


def adjust(dynamics):
    """Do what happens to the gradients at the beginning of the optimizer's step."""
    dynamics.before_step(None)


def trainer_with(student, optimizer, dynamics, size=32, **parts):
    """A trainer on ``size`` images, 8 a step; keyword arguments replace its parts."""
    usual = {
        "models": {"trunk": student},
        "optimizers": {"trunk_optimizer": optimizer},
        "batch_size": 8,
        "loss_funcs": {"metric_loss": MultiSimilarityLoss()},
        "dataset": torch.utils.data.TensorDataset(images(size), torch.arange(size) % 4),
        "end_of_epoch_hook": dynamics.end_of_epoch_hook(),
        "data_device": torch.device("cpu"),
        "dataloader_num_workers": 0,
    }
    return DistillationTrainer(**usual | parts)


def backward(student, batch):
    student(batch).square().sum().backward()


def gradients(dynamics):
    return [weight.grad.clone() for weight in dynamics.weights]


def test_marked_rows_lose_their_gradient_and_others_keep_it():
    student, _, _, dynamics = setting()
    backward(student, images())
    before = gradients(dynamics)
    adjust(dynamics)
    assert any(not reset.mask.all() for reset in dynamics.resetting.resets)
    for gradient, reset, weight in zip(before, dynamics.resetting.resets, dynamics.weights):
        expected = gradient * reset.mask.view(-1, 1, 1, 1)
        assert torch.equal(weight.grad, expected)


def test_nothing_is_reset_before_its_epoch_or_without_a_teacher():
    for kwargs in ({"warmup_epochs": 1}, {"teacher": False}):
        student, _, _, dynamics = setting(**kwargs)
        backward(student, images())
        before = gradients(dynamics)
        adjust(dynamics)
        assert all(torch.equal(a, b) for a, b in zip(before, gradients(dynamics)))
    student, _, _, dynamics = setting(warmup_epochs=1)
    dynamics.end_epoch()
    backward(student, images())
    adjust(dynamics)
    assert all(reset.count == 8 for reset in dynamics.resetting.resets)


def test_the_teacher_runs_once_in_eval_mode_and_stays_as_it_is():
    passes = []
    for given in (True, False):
        student, teacher, _, dynamics = setting()
        state, calls = copy.deepcopy(teacher.state_dict()), []
        teacher.register_forward_hook(lambda *_, calls=calls: calls.append(1))
        batch = images()
        backward(student, batch)
        if given:
            FrozenTeacher(teacher)(batch)
        teacher.train(not given)
        adjust(dynamics)
        assert calls == [1] and teacher.training == (not given)
        assert all(torch.equal(value, teacher.state_dict()[key]) for key, value in state.items())
        passes.append([reset.queue.clone() for reset in dynamics.resetting.resets])
    assert all(torch.allclose(a, b, atol=1e-6) for a, b in zip(*passes))


def test_a_teacher_run_on_other_images_does_not_count():
    student, teacher, _, dynamics = setting()
    backward(student, images())
    with torch.no_grad():
        teacher.eval()(images(seed=5))
    adjust(dynamics)
    expected = setting()
    backward(expected[0], images())
    adjust(expected[3])
    assert all(
        torch.allclose(a.queue, b.queue, atol=1e-6)
        for a, b in zip(dynamics.resetting.resets, expected[3].resetting.resets)
    )


def test_nothing_is_kept_of_a_gallery_that_the_teacher_embeds_while_the_student_is_tested():
    student, teacher, _, dynamics = setting()
    backward(student, images())
    adjust(dynamics)
    student.eval()
    with torch.no_grad():
        teacher.eval()(images(seed=5))
    assert not dynamics.resetting.teacher_tap.passes


def test_nothing_is_kept_of_a_gallery_that_the_teacher_embeds_while_the_student_is_in_training_mode():
    student, teacher, _, dynamics = setting()
    with torch.no_grad():
        for seed in range(5):
            teacher(images(seed=seed))
    assert len(dynamics.resetting.teacher_tap.passes) == 1


def test_the_teacher_runs_once_on_each_accumulated_batch_whichever_network_is_first():
    for order in (("student", "teacher"), ("teacher", "student")):
        student, teacher, _, dynamics = setting()
        calls = []
        teacher.register_forward_hook(lambda *_, calls=calls: calls.append(1))
        for seed in range(3):
            batch = images(seed=seed)
            for network in order:
                backward(student, batch) if network == "student" else teacher(batch)
        adjust(dynamics)
        assert len(calls) == 3 and dynamics.resetting.resets[0].count == 24


def test_a_student_has_one_dynamics_at_a_time():
    student, teacher, optimizer, dynamics = setting()
    arguments = {"optimizer": torch.optim.SGD(student.parameters(), lr=0.1)}
    with pytest.raises(ValueError, match=r"no other CapacityDynamics, but has one: call close\(\) on that first"):
        attach(student, None, **arguments)
    dynamics.close()
    second = attach(student, teacher, **arguments)
    dynamics.close()
    with pytest.raises(ValueError, match="no other CapacityDynamics"):
        attach(student, teacher, **arguments)
    second.close()
    del second
    attach(student, None, **arguments)
    # Nothing holds the last one but its optimizer.
    del arguments
    attach(student, None, optimizer)


def test_networks_and_dynamics_can_go_without_being_closed():
    parts = setting()
    gone = weakref.ref(parts[0])
    del parts
    gc.collect()
    assert gone() is None


def test_the_exported_network_has_no_hooks_and_the_training_goes_on(tmp_path):
    student, _, optimizer, dynamics = setting()
    steps(student, dynamics, optimizer, 1)
    small = dynamics.export()
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in small.modules())
    torch.save(small, tmp_path / "small.pth")
    backward(student, images())
    small.train()(images(seed=1))
    adjust(dynamics)
    assert all(reset.count == 16 for reset in dynamics.resetting.resets)


def test_only_whole_passes_of_the_student_itself_count():
    student, _, _, dynamics = setting()
    average = torch.optim.swa_utils.AveragedModel(student)
    backward(student, images())
    average.train()(images(seed=1))
    student.layer1(torch.randn(8, 4, 8, 8))
    with torch.no_grad():
        student(images(seed=2))
    adjust(dynamics)
    expected = setting()
    backward(expected[0], images())
    adjust(expected[3])
    for reset, other in zip(dynamics.resetting.resets, expected[3].resetting.resets):
        assert reset.count == 8 and torch.equal(reset.mask, other.mask)


def test_a_student_called_by_keyword_counts():
    student, _, _, dynamics = setting()
    student(images=images()).square().sum().backward()
    adjust(dynamics)
    assert all(reset.count == 8 for reset in dynamics.resetting.resets)


def test_a_frozen_student_keeps_no_passes():
    student, _, _, dynamics = setting()
    student.requires_grad_(False)
    student(images())
    assert not dynamics.resetting.student_tap.passes


@pytest.mark.parametrize("run", ["by a method", "in eval mode", "twice called"])
def test_gradients_of_a_pass_that_was_not_heard_are_refused(run):
    student, _, _, dynamics = setting()
    if run == "by a method":
        student.forward(images()).square().sum().backward()
    elif run == "in eval mode":
        backward(student.eval(), images())
    else:
        backward(student, images())
        adjust(dynamics)
    with pytest.raises(RuntimeError, match=r"no pass of the student was heard .* call it as student\(images\)"):
        adjust(dynamics)


def test_steps_without_gradients_of_the_compactors_need_no_pass():
    student, _, optimizer, dynamics = setting()
    adjust(dynamics)
    backward(student, images())
    optimizer.step()
    optimizer.zero_grad(set_to_none=False)
    optimizer.step()
    assert dynamics.steps == 2


@pytest.mark.parametrize("proximal", [True, False])
def test_closed_it_does_nothing_more(proximal):
    student, _, optimizer, dynamics = setting(lasso_weight=1.0, proximal=proximal)
    dynamics.close()
    backward(student, images())
    before = gradients(dynamics)
    optimizer.step()
    assert all(torch.equal(a, b) for a, b in zip(before, gradients(dynamics))) and dynamics.steps == 0


@pytest.mark.parametrize("reentrant", [True, False])
def test_activation_checkpointing_changes_no_mask(reentrant):
    student, _, _, dynamics = setting()
    first = student.layer2[0]
    first.forward = functools.partial(torch.utils.checkpoint.checkpoint, first.forward, use_reentrant=reentrant)
    expected = setting()
    for model, hook in ((student, dynamics), (expected[0], expected[3])):
        backward(model, images())
        adjust(hook)
    assert all(torch.equal(a.mask, b.mask) for a, b in zip(dynamics.resetting.resets, expected[3].resetting.resets))


@pytest.mark.parametrize("dtype", [None, torch.bfloat16])
def test_a_frozen_teacher_of_any_precision_runs_once(dtype):
    student = network()
    teacher = FrozenTeacher(network(1, False), dtype=dtype)
    optimizer = torch.optim.SGD(student.parameters(), lr=0.1)
    dynamics = attach(student, teacher, optimizer, warmup_epochs=0, queue_size=8)
    calls = []
    teacher.trunk.register_forward_hook(lambda *_: calls.append(1))
    batch = images()
    for given in (True, False):
        calls.clear()
        backward(student, batch)
        if given:
            teacher(batch)
        adjust(dynamics)
        assert calls == [1] and dynamics.resetting.resets[0].count == 8


def test_the_teacher_is_put_into_eval_mode_and_a_pass_in_training_mode_does_not_count():
    student, teacher, _, dynamics = setting()
    assert not teacher.training
    modes = []
    teacher.register_forward_hook(lambda *_: modes.append(teacher.training))
    batch = images()
    backward(student, batch)
    teacher.train()(batch)
    adjust(dynamics)
    assert modes == [True, False] and all(reset.count == 8 for reset in dynamics.resetting.resets)


class Pair(torch.nn.Module):
    """Two blocks that run in the opposite order, or one that runs twice."""

    def __init__(self, twice=False):
        super().__init__()
        self.second, self.first = (SmallResNet(4).layer2 for _ in range(2))
        self.second[0].conv1 = torch.nn.Conv2d(8, 8, 3, 2, 1)
        self.second[0].downsample[0] = torch.nn.Conv2d(8, 8, 1, 2)
        self.stages = [self.first, self.second] + [self.second[1]] * twice

    def forward(self, x):
        for stage in self.stages:
            x = stage(x)
        return x


def pair(twice=False):
    torch.manual_seed(0)
    student, teacher = Pair(twice), Pair(twice)
    insert_compactors(student)
    optimizer = torch.optim.SGD(student.parameters(), lr=0.1)
    dynamics = attach(student, teacher, optimizer, (4, 16, 16), warmup_epochs=0, queue_size=8)
    return student, teacher, dynamics


def test_features_belong_to_the_block_they_come_from_in_whatever_order_blocks_run():
    student, teacher, dynamics = pair()
    seen = {}
    for name in dynamics.compactors:
        hook = functools.partial(lambda name, _m, _i, output: seen.__setitem__(name, output.mean(dim=(2, 3))), name)
        teacher.get_submodule(name).register_forward_hook(hook)
    batch = torch.randn(8, 4, 16, 16)
    backward(student, batch)
    with torch.no_grad():
        teacher(batch)
    adjust(dynamics)
    assert next(iter(dynamics.compactors)) == "second.0.bn1" and next(iter(seen)) == "first.0.bn1"
    for name, reset in zip(dynamics.compactors, dynamics.resetting.resets):
        assert torch.allclose(reset.queue, torch.nn.functional.normalize(seen[name]), atol=1e-6)


def test_a_block_that_runs_twice_is_refused():
    student, _, _ = pair(twice=True)
    with pytest.raises(ValueError, match="second.1.bn1 runs more than once in a pass"):
        student(torch.randn(8, 4, 16, 16))


def test_accumulated_batches_enter_together():
    whole, parts = setting(), setting()
    for model in (whole[0], parts[0]):
        model.eval()  # batch norm alike
        for module in model.modules():
            if not isinstance(module, torch.nn.BatchNorm2d):
                module.training = True
    backward(whole[0], images(8))
    backward(parts[0], images(8)[:4])
    backward(parts[0], images(8)[4:])
    for _, _, _, dynamics in (whole, parts):
        adjust(dynamics)
    for a, b in zip(whole[3].resetting.resets, parts[3].resetting.resets):
        assert torch.equal(a.mask, b.mask) and torch.allclose(a.queue, b.queue, atol=1e-6)


def steps(student, dynamics, optimizer, count, seed=0):
    for step in range(count):
        optimizer.zero_grad()
        (student(images(seed=seed + step)).square().mean()).backward()
        optimizer.step()


def test_the_proximal_form_shortens_rows_by_rate_times_weight():
    _, _, optimizer, dynamics = setting(False, rate=0.1, lasso_weight=0.5)
    optimizer.step()
    assert all(torch.allclose(w.flatten(1).norm(dim=1), torch.tensor(1 - 0.1 * 0.5)) for w in dynamics.weights)


def test_the_gradient_form_adds_the_weight_times_each_rows_direction():
    *_, dynamics = setting(False, lasso_weight=0.5, proximal=False)
    with torch.no_grad():
        for weight in dynamics.weights:
            weight *= 3
    adjust(dynamics)
    assert all(torch.allclose(w.grad, 0.5 * w / 3) for w in dynamics.weights)


@pytest.mark.parametrize(("optimizer", "rate"), [(torch.optim.SGD, 0.02), (torch.optim.AdamW, 0.001)])
def test_the_proximal_form_makes_rows_exactly_zero_and_the_gradient_form_does_not(optimizer, rate):
    for proximal in (True, False):
        student, _, optim, dynamics = setting(False, rate, optimizer, lasso_weight=0.6 / 30 / rate, proximal=proximal)
        with torch.no_grad():
            for weight in dynamics.weights:
                weight[::2] *= 0.3
        steps(student, dynamics, optim, 30)
        zero = sum(int((weight.flatten(1) == 0).all(dim=1).sum()) for weight in dynamics.weights)
        assert (zero > 0) == proximal
        if proximal:
            cost = model_cost(dynamics.export(), SHAPE, ())
            assert (cost.parameters, cost.flops) == (dynamics.measure().parameters, dynamics.measure().flops)
            assert cost.parameters < dynamics.meter.measure(0.0).parameters


@pytest.mark.parametrize("fused", [False, True])
def test_a_step_that_the_scaler_skips_shrinks_nothing(fused):
    optimizer = functools.partial(torch.optim.SGD, fused=fused)
    student, _, optimizer, dynamics = setting(False, lasso_weight=1.0, optimizer=optimizer)
    scaler = torch.amp.GradScaler("cpu")
    before = [weight.clone() for weight in dynamics.weights]
    scaler.scale(student(images()).square().sum() * torch.inf).backward()
    scaler.unscale_(optimizer)
    adjust(dynamics)
    scaler.step(optimizer)
    scaler.update()
    assert all(torch.equal(a, b) for a, b in zip(before, dynamics.weights)) and dynamics.steps == 0


@pytest.mark.parametrize("fused", [False, True])
@pytest.mark.parametrize("proximal", [False, True])
def test_scaled_and_clipped_steps_are_those_of_plain_ones(fused, proximal):
    states = []
    for scale in (None, 2.0**10):
        optimizer = functools.partial(torch.optim.SGD, fused=fused)
        student, _, optimizer, dynamics = setting(optimizer=optimizer, lasso_weight=0.3, proximal=proximal)
        scaler = torch.amp.GradScaler("cpu", init_scale=scale or 1.0, enabled=scale is not None)
        for step in range(4):
            optimizer.zero_grad()
            loss = student(images(seed=step)).square().mean()
            # An overflow that the scaler skips changes nothing but what the queues hold.
            scaler.scale(loss).backward()
            if step > 1:
                scaler.unscale_(optimizer)
                torch.nn.utils.clip_grad_norm_(student.parameters(), 0.01)
            scaler.step(optimizer)
            scaler.update()
        assert dynamics.steps == 4
        states.append(student.state_dict())
    assert all(torch.allclose(states[0][key], states[1][key], atol=1e-6) for key in states[0])


@pytest.mark.parametrize("fused", [False, True])
def test_the_training_goes_on_after_a_step_that_the_scaler_skips(fused):
    student, _, optimizer, dynamics = setting(optimizer=functools.partial(torch.optim.SGD, fused=fused))
    scaler = torch.amp.GradScaler("cpu")
    scaler.scale(student(images()).square().sum() * torch.inf).backward()
    scaler.step(optimizer)
    scaler.update()
    assert dynamics.steps == 0
    optimizer.zero_grad()
    backward(student, images())
    optimizer.step()
    assert dynamics.steps == 1 and all(weight.isfinite().all() for weight in dynamics.weights)


def test_gradients_are_clipped_before_the_lasso_is_added():
    student, _, optimizer, dynamics = setting(False, rate=1.0, lasso_weight=0.5, proximal=False)
    backward(student, images())
    torch.nn.utils.clip_grad_norm_(student.parameters(), 1e-9)
    optimizer.step()
    assert all(torch.allclose(w.flatten(1).norm(dim=1), torch.tensor(0.5)) for w in dynamics.weights)


def test_the_optimizers_state_carries_the_progress():
    parts = [setting(rate=0.02, parameters=0.5, steps=12) for _ in range(2)]
    (student, _, optimizer, dynamics), (other, _, anew, resumed) = parts
    steps(student, dynamics, optimizer, 6)
    dynamics.end_epoch()
    other.load_state_dict(student.state_dict())
    anew.load_state_dict(optimizer.state_dict())
    assert (resumed.epoch, resumed.steps, resumed.history) == (2, 6, dynamics.history)
    for part in parts:
        steps(part[0], part[3], part[2], 8, seed=6)
    assert all(torch.equal(a, b) for a, b in zip(student.state_dict().values(), other.state_dict().values()))
    dynamics.close()
    assert set(optimizer.state_dict()) == {"state", "param_groups"}
    with pytest.raises(ValueError, match="the state has a budget, but the dynamics has none"):
        setting()[2].load_state_dict(anew.state_dict())
    torch.optim.SGD(student.parameters(), lr=0.1).load_state_dict(anew.state_dict())


@pytest.mark.parametrize(
    ("kwargs", "expected"), [({}, torch.float64), ({"queue_dtype": torch.bfloat16}, torch.bfloat16)]
)
def test_the_queue_has_the_precision_of_the_student_or_the_given_one(kwargs, expected):
    student, teacher = network().double(), network(1, False).double()
    optimizer = torch.optim.SGD(student.parameters(), lr=0.1)
    dynamics = attach(student, teacher, optimizer, warmup_epochs=0, queue_size=8, ratio=0.8, **kwargs)
    backward(student, images().double())
    adjust(dynamics)
    assert all(reset.queue.dtype == expected and reset.count == 8 for reset in dynamics.resetting.resets)
    assert any(not reset.mask.all() for reset in dynamics.resetting.resets)


def test_a_loss_of_nan_is_found_and_not_taken_for_small_rows():
    student, _, optimizer, dynamics = setting(False, lasso_weight=1.0)
    (student(images()).square().sum() * torch.nan).backward()
    optimizer.step()
    with pytest.raises(ValueError, match="not finite"):
        dynamics.end_epoch()


@pytest.mark.parametrize("budget", [{"parameters": 0.5}, {"flops": 0.6}])
def test_the_budget_is_met_within_some_channels_and_kept(budget):
    student, _, optimizer, dynamics = setting(rate=0.02, steps=60, **budget)
    whole = dynamics.meter.measure(0.0)
    steps(student, dynamics, optimizer, 60)
    ((name, share),) = budget.items()
    key = "parameters" if name == "parameters" else "flops"
    assert getattr(dynamics.measure(), key) <= share * getattr(whole, key)
    # One channel of this little network is 1.6 % of its parameters and 1.1 % of its FLOPs.
    assert getattr(dynamics.measure(), key) == pytest.approx(share * getattr(whole, key), rel=0.04)
    settled, first = dynamics.measure(), student.conv1.weight.detach().clone()
    steps(student, dynamics, optimizer, 5, seed=100)
    assert dynamics.measure() == settled and not torch.equal(first, student.conv1.weight)


@torch.no_grad()
def test_a_budget_is_filled_up_with_rows_that_still_fit():
    _, _, _, dynamics = setting(steps=10, parameters=0.5)
    # The short rows, of narrow layers, go first, so that the last one to go is of a wide layer.
    for place, weight in enumerate(dynamics.weights):
        weight.mul_(torch.linspace(0.5, 0.6, len(weight)).view(-1, 1, 1, 1) + place)
    going, _ = dynamics.budget.rows_to_go()
    kept = [int((~part).sum()) for part in going.split([len(weight) for weight in dynamics.weights])]
    before = dynamics.meter.cost({name: max(1, width) for name, width in zip(dynamics.compactors, kept)}).parameters
    dynamics.budget.settle()
    assert before < dynamics.measure().parameters <= dynamics.budget.target


@pytest.mark.parametrize("share", [0.3, 0.5, 0.7, 0.9])
def test_a_budget_is_not_exceeded_where_rows_are_alike(share):
    student, _, optimizer, dynamics = setting(False, rate=0.0, flops=share, steps=1)
    steps(student, dynamics, optimizer, 1)
    assert dynamics.budget.met and dynamics.measure().flops <= share * dynamics.meter.measure(0.0).flops


class Readings(TorchDispatchMode):
    """Counts what waits for the device."""

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        waits = (torch.ops.aten._local_scalar_dense.default, torch.ops.aten.nonzero.default)
        self.count = getattr(self, "count", 0) + (func in waits)
        return func(*args, **(kwargs or {}))


def test_a_step_does_not_wait_for_the_device_at_each_compactor():
    student, _, optimizer, dynamics = setting(parameters=0.5, steps=1000)
    backward(student, images())
    with Readings() as readings:
        adjust(dynamics)
        dynamics.after_step(optimizer)
    assert dynamics.steps == 1 and readings.count <= 1


@pytest.mark.parametrize(
    ("make", "positions", "budget"),
    [
        (torchvision.models.resnet18, "inner", {"parameters": 0.3287}),
        (torchvision.models.resnet18, "inner", {"flops": 0.3433}),
        (torchvision.models.resnet18, "all", {"parameters": 0.2}),
        (torchvision.models.resnet18, "all", {"flops": 0.2}),
        # In the basic blocks above "all" places are the inner ones.
        (functools.partial(ResNet, Bottleneck, [1, 1, 1, 1]), "all", {"parameters": 0.5}),
        (functools.partial(ResNet, Bottleneck, [1, 1, 1, 1]), "all", {"flops": 0.5}),
    ],
)
def test_a_resnet_meets_the_budget_within_two_percent(make, positions, budget):
    torch.manual_seed(0)
    student = make(num_classes=8)
    insert_compactors(student, positions)
    optimizer = torch.optim.SGD(student.parameters(), lr=0.02)
    dynamics = attach(student, None, optimizer, (3, 32, 32), steps=20, **budget)
    for step in range(20):
        optimizer.zero_grad()
        batch = torch.randn(4, 3, 32, 32, generator=torch.Generator().manual_seed(step))
        student(batch).square().mean().backward()
        optimizer.step()
    ((name, share),) = budget.items()
    plain = make(num_classes=8)
    exported, whole = (model_cost(model, (3, 32, 32), ()) for model in (dynamics.export(), plain))
    key = "parameters" if name == "parameters" else "flops"
    assert 0.98 * share <= getattr(exported, key) / getattr(whole, key) <= share


def test_history_table_and_plot(tmp_path, monkeypatch):
    student, _, optimizer, dynamics = setting(False, lasso_weight=2.0)
    for _ in range(3):
        steps(student, dynamics, optimizer, 4)
        dynamics.end_epoch()
    assert [row["epoch"] for row in dynamics.history] == [1, 2, 3] and dynamics.epoch == 4
    sizes = [row["parameters"] for row in dynamics.history]
    assert sizes == sorted(sizes, reverse=True)
    assert "| 3 " in dynamics.table() and f"{sizes[-1]:,}" in dynamics.table()
    drawn, save = [], Figure.savefig
    monkeypatch.setattr(Figure, "savefig", lambda figure, path, **kw: drawn.append(figure) or save(figure, path, **kw))
    dynamics.plot(tmp_path / "plot.png")
    assert (tmp_path / "plot.png").stat().st_size > 1000
    curves = {line.get_label(): line.get_ydata() for line in drawn[0].axes[0].lines}
    assert curves["parameters"] == pytest.approx(
        [100 * size / dynamics.meter.measure(0.0).parameters for size in sizes]
    )
    assert curves["flops"][0] > curves["flops"][-1]


def test_history_holds_what_torch_counts_in_the_blocks_of_the_exported_network(caplog):
    student, _, optimizer, dynamics = setting(False, lasso_weight=1.0)
    with torch.no_grad():
        for weight in dynamics.weights:
            weight[::3] *= 0.3
    steps(student, dynamics, optimizer, 4)
    with caplog.at_level("INFO", logger="PML"):
        dynamics.end_of_epoch_hook()(None)
    small = dynamics.export()
    with torch.no_grad(), FlopCounterMode(display=False) as counter:
        small(images(1))
    counted, blocks = counter.get_flop_counts(), dynamics.history[-1]["blocks"]
    assert list(blocks) == [f"layer{stage}.{number}" for stage in (1, 2, 3) for number in (0, 1)]
    for name, block in blocks.items():
        module = small.get_submodule(name)
        assert block["parameters"] == sum(p.numel() for p in module.parameters())
        assert block["flops"] == sum(counted[f"{type(small).__name__}.{name}"].values())
        assert block["widths"] == {f"{name}.bn1": module.conv1.out_channels}
        assert f"| {name} " in caplog.text and f"{block['parameters']:,}" in caplog.text
    whole = dynamics.meter.measure(0.0).blocks
    assert all(blocks[name]["flops"] < whole[name].flops for name in blocks)


def test_how_to_reset_is_handed_on():
    *_, dynamics = setting(ratio=0.7, queue_size=20, neighbors=3, metric="euclidean", accumulate=False)
    for reset in dynamics.resetting.resets:
        assert reset.lowest == int(0.7 * len(reset.mask)) and len(reset.queue) == 20
        assert (reset.neighbors, reset.metric, reset.accumulate) == (3, "euclidean", False)
    *_, dynamics = setting(refresh_interval=5)
    assert all(reset.refresh_interval == 5 for reset in dynamics.resetting.resets)


def test_rows_below_the_threshold_count_as_gone():
    *_, dynamics = setting(False, threshold=0.3)
    with torch.no_grad():
        dynamics.weights[0][0] *= 0.2
    assert dynamics.measure().parameters < dynamics.meter.measure(0.0).parameters
    assert dynamics.export().layer1[0].conv1.out_channels == len(dynamics.weights[0]) - 1


def test_closed_it_leaves_no_hooks():
    student, teacher, optimizer, dynamics = setting()
    dynamics.close()
    hooks = [len(m._forward_hooks) + len(m._forward_pre_hooks) for net in (student, teacher) for m in net.modules()]
    assert not any(hooks) and not optimizer._optimizer_step_post_hooks


def test_a_state_resumes_the_run():
    torch.manual_seed(0)
    student, _, optimizer, dynamics = setting(rate=0.02, parameters=0.5, steps=12)
    steps(student, dynamics, optimizer, 6)
    saved = copy.deepcopy([x.state_dict() for x in (student, optimizer, dynamics)])
    steps(student, dynamics, optimizer, 10, seed=6)
    other = setting(rate=0.02, parameters=0.5, steps=12)
    for part, state in zip((other[0], other[2], other[3]), saved):
        part.load_state_dict(state)
    steps(other[0], other[3], other[2], 10, seed=6)
    assert all(torch.equal(a, b) for a, b in zip(student.state_dict().values(), other[0].state_dict().values()))
    assert dynamics.budget.met and other[3].budget.met and dynamics.lasso_weight == other[3].lasso_weight


def test_a_state_stays_as_it_was_while_the_training_goes_on():
    *_, dynamics = setting(False)
    dynamics.end_epoch()
    state = dynamics.state_dict()
    dynamics.end_epoch()
    assert [row["epoch"] for row in state["history"]] == [1]


def frozen_but_for_compactors(student):
    for name, parameter in student.named_parameters():
        parameter.requires_grad_(name.endswith("bn1.1.weight"))
    return student


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda s, t, o: attach(network(compactors=False), t, o), "has no compactors"),
        (
            lambda s, t, o: attach(s, t, torch.optim.SGD([s.conv1.weight], lr=0.1)),
            r"does not train the compactors behind \['layer1.0.bn1'",
        ),
        (
            lambda s, t, o: attach(s, torch.nn.Linear(2, 2), o),
            r"student has layer1.0 \(pml_distill.models.small_resnet.BasicBlock\), the teacher, a Linear, has nothing",
        ),
        (
            lambda s, t, o: attach(frozen_but_for_compactors(s), t, o),
            r"student learns nothing but its compactors.* requires_grad_\(True\)",
        ),
        (lambda s, t, o: SizeBudget(steps=5), "give one, not both"),
        (lambda s, t, o: attach(s, s, o), "teacher is the student"),
        (lambda s, t, o: attach(s, FrozenTeacher(s), o), "teacher is the student"),
        (lambda s, t, o: attach("x", t, o), "student must be a network, but is a str"),
        (
            lambda s, t, o: attach(s, EnsembleTeacher([FrozenTeacher(t)]), o),
            "must be a network of its own or None, but is a EnsembleTeacher",
        ),
        (lambda s, t, o: attach(s, lambda x: x, o), "must be a network.* but is a function"),
        (
            lambda s, t, o: attach(torch.compile(s, backend="eager"), t, o),
            "or in DistributedDataParallel, but is a OptimizedModule",
        ),
        (lambda s, t, o: attach(torch.nn.DataParallel(s), t, o), "but is a DataParallel"),
        (
            lambda s, t, o: attach(s, SmallResNet(8), o),
            "teacher has 8 channels behind layer1.0.bn1, the student 4",
        ),
        (
            lambda s, t, o: attach(s, t, o, parameters=0.5, flops=0.5),
            "not both",
        ),
        (lambda s, t, o: attach(s, t, o, parameters=2), "between 0 and 1, but is 2"),
        (lambda s, t, o: attach(s, t, o, flops=0.5), "steps must be a positive whole number, but is None"),
        (
            lambda s, t, o: attach(s, t, o, flops=0.5, steps=2.5),
            "steps must be a positive whole number, but is 2.5",
        ),
        *[
            (
                lambda s, t, o, epoch=epoch: attach(s, t, o).end_of_epoch_hook(export_after=epoch),
                f"export_after must be None or a whole number, at least 1, but is {epoch!r}",
            )
            for epoch in (0, -1, "x", 1.5)
        ],
        (
            lambda s, t, o: attach(s, t, o, flops=0.5, steps=3, proximal=False),
            "needs proximal=True",
        ),
        (
            lambda s, t, o: attach(s, t, o, flops=0.5, steps=3, lasso_weight=0),
            "needs proximal=True and lasso_weight > 0, not True and 0",
        ),
        (
            lambda s, t, o: attach(s, t, o, lasso_weight=-1),
            "lasso_weight must be finite and at least 0, but is -1",
        ),
        (lambda s, t, o: attach(s, t, o, threshold=1), "threshold must be above 0 .* but is 1"),
        (lambda s, t, o: attach(s, t, o, threshold=float("nan")), "threshold must be .* but is nan"),
        (
            lambda s, t, o: attach(s, t, o, warmup_epochs=-1),
            "warmup_epochs must be at least 0, but is -1",
        ),
        (lambda s, t, o: attach(s, t, o, queue_size=1), "neighbors must be at most queue_size, 1"),
        (lambda s, t, o: attach(s, t, o).table(), "no epoch has ended yet"),
        (lambda s, t, o: attach(s, t, o).block_table(), "no epoch has ended yet"),
        (lambda s, t, o: attach(s, t, o).plot("none.png"), "no epoch has ended yet"),
    ],
)
def test_wrong_arguments_are_refused(make, message):
    student = network()
    with pytest.raises(ValueError, match=message):
        make(student, network(1, False), torch.optim.SGD(student.parameters(), lr=0.1))


def test_a_refused_teacher_is_left_as_it_is_and_no_hook_stays():
    student, teacher = network(), SmallResNet(8)
    optimizer = torch.optim.SGD(student.parameters(), lr=0.1)
    with pytest.raises(ValueError, match="the student 4"):
        attach(student, teacher, optimizer, warmup_epochs=0, queue_size=8)
    assert teacher.training and not optimizer._optimizer_step_post_hooks and not student._forward_pre_hooks


@pytest.mark.parametrize("kwargs", [{"queue_size": 32}, {"teacher": False}])
def test_a_state_of_other_settings_is_refused(kwargs):
    *_, dynamics = setting()
    *_, other = setting(**kwargs)
    for source, target in ((dynamics, other), (other, dynamics)):
        with pytest.raises(ValueError, match="the state was taken with another queue_size"):
            target.load_state_dict(source.state_dict())


def test_a_state_of_other_compactors_is_refused():
    states = []
    for positions in ("inner", "all"):
        student = torchvision.models.resnet50(num_classes=8)
        insert_compactors(student, positions)
        dynamics = attach(student, None, torch.optim.SGD(student.parameters(), lr=0.1), (3, 32, 32))
        states.append(dynamics.state_dict())
    with pytest.raises(ValueError, match=r"with the widths \{'layer1.0.bn2': 64.*the student has \{'layer1.0.bn1': 64"):
        dynamics.load_state_dict(states[0])


def test_of_a_refused_state_nothing_is_loaded():
    kwargs = {"parameters": 0.5, "steps": 1}
    student, _, optimizer, dynamics = setting(queue_size=32, **kwargs)
    steps(student, dynamics, optimizer, 1)
    *_, other = setting(**kwargs)
    with pytest.raises(ValueError, match="another queue_size"):
        other.load_state_dict(dynamics.state_dict())
    assert dynamics.budget.met and not other.budget.met
    with pytest.raises(ValueError, match=r"the state must be what state_dict returned, but lacks \['widths', 'resets'"):
        other.load_state_dict({})


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"parameters": 0.6}, r"state is of the budget \{'measured': 'parameters', 'target': .* but this one is"),
        ({"parameters": None, "flops": 0.5}, "'measured': 'parameters'.* but this one is .*'flops'"),
        ({"steps": 13}, "'steps': 12.*'steps': 13"),
        ({"parameters": None, "steps": None}, "the state has a budget, but the dynamics has none"),
    ],
)
def test_a_state_of_another_budget_is_refused(changes, message):
    kwargs = {"parameters": 0.5, "steps": 12}
    state = setting(**kwargs)[3].state_dict() | {"epoch": 7}
    other = setting(**{**kwargs, **changes})[3]
    with pytest.raises(ValueError, match=message):
        other.load_state_dict(state)
    assert other.epoch == 1


@pytest.mark.parametrize(
    ("student", "teacher", "message"),
    [
        (
            "resnet18",
            "resnet50",
            r"has layer1.0 \(torchvision.*BasicBlock\), the teacher.* layer1.0 \(torch.*Bottlen",
        ),
        ("resnet18", "resnet34", r"has layer2.0 \(.*BasicBlock\), the teacher, a ResNet, has layer1.2 \(.*BasicBlock"),
        ("resnet34", "resnet18", r"has layer1.2 \(.*BasicBlock\), the teacher, a ResNet, has layer2.0 \(.*BasicBlock"),
        ("resnet50", "wide_resnet50_2", "teacher has 128 channels behind layer1.0.bn2, the student 64"),
        ("resnet50", "timm", r"\(torchvision.models.resnet.Bottleneck\), .* layer1.0 \(timm.models.resnet.Bottleneck"),
    ],
)
def test_a_teacher_with_other_blocks_is_refused(student, teacher, message):
    student = torchvision.models.get_model(student, num_classes=4)
    insert_compactors(student)
    optimizer = torch.optim.SGD(student.parameters(), lr=0.1)
    teacher = timm.create_model("resnet50") if teacher == "timm" else torchvision.models.get_model(teacher)
    with pytest.raises(ValueError, match=message):
        attach(student, teacher, optimizer, (3, 32, 32), queue_size=8)


def test_a_compactor_with_nan_is_named():
    *_, dynamics = setting()
    dynamics.weights[0].data[0] = torch.nan
    with pytest.raises(ValueError, match=r"compactors behind \['layer1.0.bn1'\] have values that are not finite"):
        dynamics.end_epoch()


def worker(rank, folder):
    torch.distributed.init_process_group("gloo", init_method=f"file://{folder}/store", rank=rank, world_size=2)
    student = network()
    for module in student.modules():
        if isinstance(module, torch.nn.BatchNorm2d):
            module.eval()
    student = torch.nn.parallel.DistributedDataParallel(student)
    optimizer = torch.optim.SGD(student.parameters(), lr=0.01)
    dynamics = attach(
        student, network(1, False), optimizer, warmup_epochs=0, queue_size=64, ratio=0.8, lasso_weight=0.5
    )
    gather, calls = torch.distributed.all_gather, []
    torch.distributed.all_gather = lambda *args: (calls.append(1), gather(*args))
    for step in range(3):
        optimizer.zero_grad()
        student(images(8, seed=step)[4 * rank : 4 * rank + 4]).square().sum().backward()
        optimizer.step()
    assert len(calls) == 3
    torch.save([[r.mask for r in dynamics.resetting.resets], dynamics.weights], f"{folder}/{rank}.pth")
    # No process leaves while another still talks to it.
    torch.distributed.barrier()
    torch.distributed.destroy_process_group()


def test_two_processes_mark_the_rows_that_one_marks(tmp_path):
    torch.multiprocessing.spawn(worker, args=(str(tmp_path),), nprocs=2)
    student = network()
    for module in student.modules():
        if isinstance(module, torch.nn.BatchNorm2d):
            module.eval()
    optimizer = torch.optim.SGD(student.parameters(), lr=0.01)
    dynamics = attach(
        student, network(1, False), optimizer, warmup_epochs=0, queue_size=64, ratio=0.8, lasso_weight=0.5
    )
    for step in range(3):
        optimizer.zero_grad()
        (student(images(8, seed=step)).square().sum() / 2).backward()
        optimizer.step()
    for rank in range(2):
        masks, weights = torch.load(tmp_path / f"{rank}.pth")
        assert all(torch.equal(mask, reset.mask) for mask, reset in zip(masks, dynamics.resetting.resets))
        assert all(torch.allclose(a, b, atol=1e-5) for a, b in zip(weights, dynamics.weights))
    assert any(not reset.mask.all() for reset in dynamics.resetting.resets)


RUN = textwrap.dedent(
    """
    import os, signal, sys
    import torch
    from pytorch_metric_learning.losses import MultiSimilarityLoss
    from pytorch_metric_learning.samplers import MPerClassSampler
    from pytorch_metric_learning.testers import GlobalEmbeddingSpaceTester
    from pytorch_metric_learning.utils import common_functions as c_f, logging_presets
    from pytorch_metric_learning.utils.accuracy_calculator import AccuracyCalculator
    from pml_distill.capacity import CapacityDynamics, RetrievalReset, SizeBudget, insert_compactors
    from pml_distill.datasets import Digits
    from pml_distill.losses import AbsoluteTeacherLoss
    from pml_distill.models import SmallResNet
    from pml_distill.teachers import FrozenTeacher
    from pml_distill.trainers import DistillationTrainer

    folder, kill_at = sys.argv[1], int(sys.argv[2])
    checkpoint = os.path.join(folder, "checkpoint.pth")
    torch.manual_seed(0)
    c_f.NUMPY_RANDOM.seed(0)
    train, test = Digits("train"), Digits("test")
    student, teacher = SmallResNet(4), SmallResNet(4)
    insert_compactors(student)
    optimizer = torch.optim.SGD(student.parameters(), lr=0.05, momentum=0.9)
    reset, budget = RetrievalReset(teacher, warmup_epochs=1, queue_size=100), SizeBudget(0.6, steps=15, multiple_of=1)
    dynamics = CapacityDynamics(student, optimizer, (1, 32, 32), reset=reset, budget=budget)
    record_keeper, _, _ = logging_presets.get_record_keeper(folder + "/logs", folder + "/tensorboard")
    hooks = logging_presets.HookContainer(record_keeper, primary_metric="precision_at_1")
    tester = GlobalEmbeddingSpaceTester(
        end_of_testing_hook=hooks.end_of_testing_hook,
        accuracy_calculator=AccuracyCalculator(include=("precision_at_1",), k=1),
        dataloader_num_workers=0,
        data_device=torch.device("cpu"),
    )
    after = hooks.end_of_epoch_hook(tester, {"val": test}, folder + "/models")

    def then(trainer):
        after(trainer)
        if trainer.epoch == 2:
            trainer.save_checkpoint(checkpoint)

    def end_of_iteration(trainer):
        hooks.end_of_iteration_hook(trainer)
        if (trainer.epoch, trainer.iteration) == (kill_at, 1):
            os.kill(os.getpid(), signal.SIGKILL)

    trainer = DistillationTrainer(
        models={"trunk": student},
        optimizers={"trunk_optimizer": optimizer},
        batch_size=32,
        loss_funcs={"metric_loss": MultiSimilarityLoss(), "distillation_loss": AbsoluteTeacherLoss()},
        dataset=train,
        teacher=FrozenTeacher(teacher),
        sampler=MPerClassSampler(train.labels, 8, 32, 160),
        data_device=torch.device("cpu"),
        dataloader_num_workers=0,
        end_of_iteration_hook=end_of_iteration,
        end_of_epoch_hook=dynamics.end_of_epoch_hook(then),
    )
    start = trainer.load_checkpoint(checkpoint) if os.path.exists(checkpoint) else 1
    trainer.train(start, 4)
    torch.save([student.state_dict(), dynamics.history], folder + "/final")
    """
)


def test_a_killed_run_through_pmls_trainer_ends_like_an_undisturbed_one(tmp_path):
    def run(name, kill_at):
        (tmp_path / name).mkdir(exist_ok=True)
        command = [sys.executable, "-c", RUN, str(tmp_path / name), str(kill_at)]
        return subprocess.run(command, capture_output=True, text=True)

    whole = run("whole", 0)
    assert whole.returncode == 0, whole.stderr
    assert run("broken", 3).returncode == -signal.SIGKILL and not (tmp_path / "broken" / "final").exists()
    assert run("broken", 0).returncode == 0
    (whole, history), (broken, other) = (torch.load(tmp_path / name / "final") for name in ("whole", "broken"))
    assert all(torch.equal(whole[k], broken[k]) for k in whole) and history == other
    assert [row["epoch"] for row in history] == [1, 2, 3, 4]
    assert history[-1]["parameters"] < 0.65 * history[0]["parameters"]
    assert os.listdir(tmp_path / "whole" / "logs")


@pytest.mark.parametrize("amp_dtype", [None, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("accumulation_steps", [1, 2])
def test_in_a_trainer_with_mixed_precision_and_accumulation(amp_dtype, accumulation_steps):
    student, teacher, optimizer, dynamics = setting(rate=0.01, lasso_weight=1.0, queue_size=100)
    trainer_with(
        student,
        optimizer,
        dynamics,
        loss_funcs={"metric_loss": MultiSimilarityLoss(), "distillation_loss": AbsoluteTeacherLoss()},
        teacher=FrozenTeacher(teacher),
        amp_dtype=amp_dtype,
        accumulation_steps=accumulation_steps,
    ).train(1, 2)
    assert dynamics.resetting.resets[0].count == 64 and len(dynamics.history) == 2
    assert all(weight.isfinite().all() for weight in dynamics.weights)


def test_the_exported_network_takes_the_students_place_in_the_trainer(capsys):
    student, teacher = network(), network(1, compactors=False)
    embedder = torch.nn.Linear(16, 8)
    compactors = [p for name, p in student.named_parameters() if name.endswith("bn1.1.weight")]
    others = [p for p in student.parameters() if not any(p is c for c in compactors)]
    groups = [{"params": others + list(embedder.parameters())}, {"params": compactors, "weight_decay": 0.0}]
    optimizer = torch.optim.SGD(groups, lr=0.01, momentum=0.9, weight_decay=1e-3)
    dynamics = attach(student, teacher, optimizer, queue_size=64, parameters=0.6, steps=6)
    outputs = []

    def then(trainer):
        if trainer.epoch == 2:
            trunk = trainer.models["trunk"].eval()
            outputs.extend([student.eval()(images()), trunk(images())])
            trunk.train()

    trainer = trainer_with(
        student,
        optimizer,
        dynamics,
        models={"trunk": student, "embedder": embedder},
        lr_schedulers={"trunk_scheduler_by_epoch": torch.optim.lr_scheduler.StepLR(optimizer, 1, 0.5)},
        end_of_epoch_hook=dynamics.end_of_epoch_hook(then, export_after=2),
    )
    trainer.train(1, 4)
    small = trainer.models["trunk"]
    assert small is not student and torch.allclose(*outputs, atol=1e-5)
    assert sum(p.numel() for p in small.parameters()) == dynamics.history[-1]["parameters"]
    trained = {id(p) for group in optimizer.param_groups for p in group["params"]}
    assert trained == {id(p) for model in (small, embedder) for p in model.parameters()}
    assert optimizer.param_groups[0]["lr"] == pytest.approx(0.01 / 16)
    assert not torch.equal(outputs[1], small.eval()(images())) and len(dynamics.history) == 2
    assert "parameters have become" in capsys.readouterr().out


@pytest.mark.parametrize("name", ["layer1.0.conv1", "layer1.0.bn1", "layer1.0.bn1.0"])
def test_an_export_that_takes_away_what_the_trainer_taps_is_refused_after_the_first_epoch(name):
    student, teacher, optimizer, dynamics = setting()

    def train(tapped):
        trainer_with(
            student,
            optimizer,
            dynamics,
            16,
            loss_funcs={"feature_distillation_loss": PooledFeatureLoss()},
            teacher=FrozenTeacher(teacher),
            student_features=[tapped],
            teacher_features=["layer1.0"],
            end_of_epoch_hook=dynamics.end_of_epoch_hook(export_after=2),
        ).train(1, 3)

    before = list(optimizer.param_groups[0]["params"])
    with pytest.raises(ValueError, match=rf"student_features names \['{name}'\], which the export merges"):
        train(name)
    assert all(a is b for a, b in zip(before, optimizer.param_groups[0]["params"])) and not dynamics.history
    train("layer1.0")
    assert len(dynamics.history) == 2


def test_a_student_that_is_compiled_is_exported_in_a_trainer_only_where_it_is_compiled_in_place():
    student, _, optimizer, dynamics = setting(False)
    models = {"embedder": torch.nn.Linear(16, 8), "trunk": torch.compile(student, backend="eager")}
    trainer = types.SimpleNamespace(models=models, optimizers={"trunk_optimizer": optimizer})
    with pytest.raises(ValueError, match=r'models\["trunk"\] is what torch.compile.* in place by student.compile\(\)'):
        dynamics.end_of_epoch_hook(export_after=2)(trainer)
    assert not dynamics.history
    student.compile(backend="eager")
    models["trunk"] = student
    small = dynamics.replace_student(trainer)
    assert models["trunk"] is small and small(images()).shape == (8, 16)


def test_the_first_line_of_a_resumed_run_comes_with_the_whole_table_and_other_processes_are_silent(capsys, monkeypatch):
    *_, dynamics = setting(False)
    hook = dynamics.end_of_epoch_hook()
    hook(None), hook(None)
    assert capsys.readouterr().out.count("lasso weight") == 1
    *_, other = setting(False)
    other.load_state_dict(dynamics.state_dict())
    other.end_of_epoch_hook()(None)
    lines = capsys.readouterr().out.splitlines()
    assert "lasso weight" in lines[0] and [line.split()[1] for line in lines[2:]] == ["1", "2", "3"]
    monkeypatch.setattr(torch.distributed, "is_initialized", lambda: True)
    monkeypatch.setattr(torch.distributed, "get_rank", lambda: 1)
    other.end_of_epoch_hook()(None)
    assert capsys.readouterr().out == ""


def replaced(student, groups):
    """The optimizer and the small network after an export in a trainer."""
    optimizer = torch.optim.SGD(groups, lr=0.01, momentum=0.9)
    dynamics = attach(student, None, optimizer, (3, 32, 32))
    trainer = types.SimpleNamespace(models={"trunk": student}, optimizers={"trunk_optimizer": optimizer})
    return optimizer, dynamics.replace_student(trainer)


def test_after_the_export_each_parameter_is_in_the_group_that_it_was_in():
    student = torchvision.models.resnet18(num_classes=8)
    insert_compactors(student)
    decayed = [p for p in student.parameters() if p.ndim > 1 and p is not student.conv1.weight]
    others = [p for p in student.parameters() if p.ndim <= 1]
    optimizer, small = replaced(
        student, [{"params": decayed, "weight_decay": 1e-3}, {"params": others, "weight_decay": 0.0}]
    )
    expected = [[p for p in small.parameters() if p.ndim > 1 and p is not small.conv1.weight]]
    expected += [[p for p in small.parameters() if p.ndim <= 1]]
    assert [[id(p) for p in g["params"]] for g in optimizer.param_groups] == [[id(p) for p in g] for g in expected]
    assert any(p is small.layer1[0].conv1.bias for p in optimizer.param_groups[1]["params"])


@pytest.mark.parametrize("order", [list, lambda params: sorted(params, key=lambda p: p.ndim)])
def test_a_checkpoint_after_the_export_fits_an_optimizer_of_the_small_network_in_the_same_order(order):
    def in_order(model):
        return order([*embedder.parameters(), *model.parameters(), *head.parameters()])

    student, embedder, head = torchvision.models.resnet50(num_classes=8), torch.nn.Linear(8, 8), torch.nn.Linear(8, 8)
    insert_compactors(student)
    optimizer, small = replaced(student, in_order(student))
    loss = head(embedder(small(torch.randn(2, 3, 32, 32)))).square().mean()
    loss.backward()
    optimizer.step()
    anew = torch.optim.SGD(in_order(small), lr=0.01, momentum=0.9)
    anew.load_state_dict(optimizer.state_dict())
    assert len(anew.state) == len(in_order(small))
    assert all(torch.equal(anew.state[p]["momentum_buffer"], p.grad) for p in in_order(small))


def test_the_bias_of_a_merged_convolution_goes_with_its_weight_where_the_normalisation_has_none():
    student = torchvision.models.resnet18(num_classes=8, norm_layer=torchvision.ops.misc.FrozenBatchNorm2d)
    insert_compactors(student)
    body = [p for name, p in student.named_parameters() if not name.startswith("fc")]
    optimizer, small = replaced(student, [{"params": list(student.fc.parameters())}, {"params": body}])
    names = {id(p): name for name, p in small.named_parameters()}
    assert sorted(names[id(p)] for p in optimizer.param_groups[0]["params"]) == ["fc.bias", "fc.weight"]
    assert "layer1.0.conv1.bias" in [names[id(p)] for p in optimizer.param_groups[1]["params"]]
    assert sum(len(group["params"]) for group in optimizer.param_groups) == len(names)


def test_a_renewed_distributed_wrapper_keeps_its_settings(tmp_path, capsys):
    torch.distributed.init_process_group("gloo", init_method=f"file://{tmp_path}/store", rank=0, world_size=1)
    try:
        group = torch.distributed.new_group([0])
        wrapper = torch.nn.parallel.DistributedDataParallel(
            network(),
            process_group=group,
            find_unused_parameters=True,
            gradient_as_bucket_view=True,
        )
        wrapper.broadcast_buffers = False
        optimizer = torch.optim.SGD(wrapper.parameters(), lr=0.01)
        dynamics = attach(wrapper, None, optimizer)
        trainer = types.SimpleNamespace(models={"trunk": wrapper}, optimizers={"trunk_optimizer": optimizer})
        small, renewed = dynamics.replace_student(trainer), trainer.models["trunk"]
        assert renewed.module is small and renewed.process_group is group and not renewed.broadcast_buffers
        assert renewed.find_unused_parameters and renewed.gradient_as_bucket_view
        backward(renewed, images())
        optimizer.step()
        assert "So is its DistributedDataParallel" in capsys.readouterr().out
    finally:
        torch.distributed.destroy_process_group()
