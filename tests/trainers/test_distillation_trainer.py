import copy
import os
import random
import signal
import subprocess
import sys
import textwrap

import numpy as np
import pytest
import torch
from conftest import Blobs, network, weights
from pytorch_metric_learning.losses import (
    BaseMetricLossFunction,
    ContrastiveLoss,
    CrossBatchMemory,
    MultipleLosses,
    SelfSupervisedLoss,
    TripletMarginLoss,
)
from pytorch_metric_learning.miners import BatchHardMiner, MultiSimilarityMiner
from pytorch_metric_learning.samplers import MPerClassSampler
from pytorch_metric_learning.utils.distributed import DistributedLossWrapper

from pml_distill.losses import (
    AbsoluteTeacherLoss,
    AttentionTransferLoss,
    CentralSimilarityLoss,
    DarkRankLoss,
    DeepCauchyHashingLoss,
    RelativeTeacherLoss,
)
from pml_distill.teachers import FrozenTeacher
from pml_distill.trainers import DistillationTrainer, DistillationWithClassifier


class CountingTeacher(FrozenTeacher):
    calls, needs_index = 0, True

    def forward(self, data, index=None):
        self.calls += 1
        self.index = index
        return super().forward(data, index)


def test_distillation_lowers_the_distillation_loss(make_trainer):
    trainer = make_trainer(loss_funcs={"distillation_loss": RelativeTeacherLoss()}, iterations_per_epoch=30)
    trainer.train(1, 1)
    first = trainer.epoch_losses["distillation_loss"]
    trainer.train(2, 4)
    assert trainer.epoch_losses["distillation_loss"] < 0.7 * first


def test_teacher_runs_once_per_batch_and_stays_frozen(make_trainer):
    teacher = CountingTeacher(network(out=7, seed=1))
    before = copy.deepcopy(teacher.state_dict())
    trainer = make_trainer(teacher=teacher, iterations_per_epoch=5)
    trainer.train(1, 1)
    assert teacher.calls == 5
    assert not any(m.training for m in teacher.modules())
    assert all(torch.equal(before[k], v) for k, v in teacher.state_dict().items())


def test_teacher_gets_the_index_of_a_dataset_that_yields_one(make_trainer, blobs):
    class Indexed(Blobs):
        def __getitem__(self, i):
            return (*super().__getitem__(i), i)

    teacher = CountingTeacher(network(out=7, seed=1))
    trainer = make_trainer(teacher=teacher, dataset=Indexed(), iterations_per_epoch=1)
    trainer.train(1, 1)
    assert teacher.index.shape == (16,) and teacher.index.unique().numel() == 16


def test_labels_of_several_levels_may_come_as_a_tuple(make_trainer):
    class TwoLevels(Blobs):
        def __getitem__(self, i):
            image, label = super().__getitem__(i)
            return image, (label, label // 2)

    seen = []

    class Watching(ContrastiveLoss):
        def forward(self, embeddings, labels, *args):
            seen.append(labels)
            return super().forward(embeddings, labels, *args)

    loss_funcs = {"metric_loss": Watching(), "distillation_loss": RelativeTeacherLoss()}
    for level in (0, 1):
        make_trainer(dataset=TwoLevels(), loss_funcs=loss_funcs, label_hierarchy_level=level).train()
        assert torch.cat(seen).unique().tolist() == [[0, 1, 2, 3], [0, 1]][level]
        seen.clear()


def test_an_override_of_pmls_metric_loss_is_called(make_trainer):
    class Halved(DistillationTrainer):
        def maybe_get_metric_loss(self, *args):
            return super().maybe_get_metric_loss(*args) / 2

    losses = []
    for cls in (DistillationTrainer, Halved):
        torch.manual_seed(0)
        trainer = make_trainer(cls, iterations_per_epoch=1)
        trainer.train()
        losses.append(trainer.epoch_losses["metric_loss"].item())
    assert losses[1] == pytest.approx(losses[0] / 2)


def test_hooks_find_dataset_and_sampler_of_the_loader(make_trainer, blobs):
    trainer = make_trainer(end_of_iteration_hook=lambda t: seen.append((t.dataloader.dataset, t.dataloader.sampler)))
    seen = []
    trainer.train()
    assert seen[0] == (blobs, trainer.dataloader.dataloader.sampler)


def test_runs_without_labels(make_trainer):
    class Unlabelled(Blobs):
        def __getitem__(self, i):
            return super().__getitem__(i)[0]

    trainer = make_trainer(dataset=Unlabelled(), loss_funcs={"distillation_loss": DarkRankLoss()})
    before = weights(trainer)
    trainer.train(1, 1)
    assert trainer.epoch_losses["distillation_loss"] > 0
    assert not torch.equal(before["0.weight"], weights(trainer)["0.weight"])


def test_metric_loss_alone_needs_no_teacher(make_trainer):
    trainer = make_trainer(teacher=None, loss_funcs={"metric_loss": ContrastiveLoss()})
    trainer.train(1, 1)
    assert trainer.epoch_losses["metric_loss"] > 0


def test_a_zero_weight_spares_the_teacher(make_trainer):
    teacher = CountingTeacher(network(out=7, seed=1))
    trainer = make_trainer(teacher=teacher, loss_weights={"metric_loss": 1, "distillation_loss": 0})
    trainer.train(1, 1)
    assert teacher.calls == 0


def test_training_step_in_a_plain_loop(make_trainer, blobs):
    trainer = make_trainer()
    images = torch.stack([blobs[i][0] for i in range(16)])
    losses = [trainer.training_step((images, blobs.labels[:16])) for _ in range(40)]
    assert losses[-1]["total_loss"] < losses[0]["total_loss"]
    total = losses[0]["metric_loss"] + losses[0]["distillation_loss"]
    assert torch.allclose(losses[0]["total_loss"], total)


def test_loss_weights_are_applied_out_of_place(make_trainer, blobs):
    class RootLoss(BaseMetricLossFunction):
        def compute_loss(self, embeddings, labels, indices_tuple, ref_emb, ref_labels):
            loss = embeddings.square().sum().sqrt()
            return {"loss": {"losses": loss, "indices": None, "reduction_type": "already_reduced"}}

    trainer = make_trainer(
        loss_funcs={"metric_loss": RootLoss(), "distillation_loss": RelativeTeacherLoss("frobenius")},
        loss_weights={"metric_loss": 0.5, "distillation_loss": 2.0},
    )
    data = torch.stack([blobs[i][0] for i in range(16)])
    embeddings = trainer.compute_embeddings(data)
    losses = trainer.training_step((data, blobs.labels[:16]))
    assert torch.allclose(losses["metric_loss"], 0.5 * embeddings.norm())


def test_losses_and_gradients_of_accumulated_batches_sum(make_trainer, blobs):
    def step(trainer, *batches):
        trainer.gradient_clippers = {
            "trunk_grad_clipper": lambda: grads.extend(p.grad.clone() for p in trainer.models["trunk"].parameters())
        }
        grads = []
        losses = trainer.training_step(*batches)
        return [*losses.values(), *grads]

    parts = {"loss_funcs": {"distillation_loss": AbsoluteTeacherLoss()}, "teacher": FrozenTeacher(network(seed=1))}
    data = [torch.stack([blobs[i][0] for i in range(8)]) for _ in range(3)]
    together = step(make_trainer(**parts), *data)
    apart = [step(make_trainer(**parts), batch) for batch in data]
    for whole, *pieces in zip(together, *apart):
        assert torch.allclose(whole, sum(pieces), atol=1e-6)


def test_an_epoch_of_accumulated_steps_goes_through_the_data_once(make_trainer):
    teacher = CountingTeacher(network(out=7, seed=1))
    trainer = make_trainer(teacher=teacher, accumulation_steps=2)
    trainer.train(1, 1)
    assert trainer.iterations_per_epoch == 2 and teacher.calls == 4


@pytest.mark.parametrize("amp_dtype", [torch.float16, torch.bfloat16])
def test_mixed_precision_learns_like_float32(make_trainer, amp_dtype):
    results = []
    for dtype in (None, amp_dtype):
        trainer, seen = make_trainer(amp_dtype=dtype, iterations_per_epoch=40), set()
        trainer.models["trunk"].register_forward_hook(lambda _m, _i, out, seen=seen: seen.add(out.dtype))
        torch.manual_seed(0)
        trainer.train(1, 2)
        assert seen == {dtype or torch.float32}
        results.append(trainer.epoch_losses["total_loss"].item())
    assert results[1] == pytest.approx(results[0], rel=0.1)


def test_float16_overflow_skips_the_step_and_lowers_the_scale(make_trainer, blobs):
    trainer = make_trainer(amp_dtype=torch.float16)
    before, scale = weights(trainer), trainer.scaler.get_scale()
    data = torch.stack([blobs[i][0] for i in range(16)])
    handle = trainer.models["trunk"][0].weight.register_hook(lambda grad: grad * torch.inf)
    trainer.training_step((data, blobs.labels[:16]))
    assert trainer.scaler.get_scale() == scale / 2
    assert torch.equal(before["0.weight"], weights(trainer)["0.weight"])
    handle.remove()
    trainer.training_step((data, blobs.labels[:16]))
    assert not torch.equal(before["0.weight"], weights(trainer)["0.weight"])


def test_gradient_clipper_sees_unscaled_gradients(make_trainer, blobs):
    norms = []
    for dtype in (None, torch.float16):
        trainer = make_trainer(amp_dtype=dtype)
        parameters = list(trainer.models["trunk"].parameters())
        trainer.gradient_clippers = {
            "trunk_grad_clipper": lambda p=parameters: norms.append(float(torch.nn.utils.clip_grad_norm_(p, 1e9)))
        }
        torch.manual_seed(0)
        data = torch.stack([blobs[i][0] for i in range(16)])
        trainer.training_step((data, blobs.labels[:16]))
    assert norms[1] == pytest.approx(norms[0], rel=0.05)


def test_projection_bridges_widths_and_learns(make_trainer):
    trunk, projection = network(), torch.nn.Linear(5, 7)
    before = projection.weight.clone()
    trainer = make_trainer(
        models={"trunk": trunk, "projection": projection},
        optimizers={
            "trunk_optimizer": torch.optim.Adam(trunk.parameters()),
            "projection_optimizer": torch.optim.Adam(projection.parameters()),
        },
        loss_funcs={"metric_loss": ContrastiveLoss(), "distillation_loss": AbsoluteTeacherLoss()},
    )
    trainer.train(1, 1)
    assert not torch.equal(before, projection.weight)


def test_without_projection_the_error_offers_one(make_trainer):
    trainer = make_trainer(loss_funcs={"distillation_loss": AbsoluteTeacherLoss()})
    with pytest.raises(ValueError, match=r"\(16, 5\).*\(16, 7\).*torch.nn.Linear\(5, 7\)"):
        trainer.train(1, 1)


def test_miners_samplers_schedulers_and_freezing(make_trainer, blobs):
    trunk, embedder = network(), torch.nn.Linear(5, 5)
    optimizer = torch.optim.SGD(embedder.parameters(), lr=0.1)
    frozen = copy.deepcopy(trunk.state_dict())
    trainer = make_trainer(
        models={"trunk": trunk, "embedder": embedder},
        optimizers={"embedder_optimizer": optimizer},
        lr_schedulers={"embedder_scheduler_by_epoch": torch.optim.lr_scheduler.StepLR(optimizer, 1, 0.5)},
        loss_funcs={"metric_loss": TripletMarginLoss(), "distillation_loss": RelativeTeacherLoss()},
        mining_funcs={"tuple_miner": MultiSimilarityMiner()},
        sampler=MPerClassSampler(blobs.labels, m=4, batch_size=16, length_before_new_iter=64),
        freeze_these=["trunk"],
    )
    trainer.train(1, 2)
    assert optimizer.param_groups[0]["lr"] == 0.025
    assert all(torch.equal(frozen[k], v) for k, v in trunk.state_dict().items())


@pytest.mark.parametrize("places", [torch.arange, np.arange, lambda count: list(range(count))])
def test_subset_batch_miner(make_trainer, places):
    class FirstHalf(torch.nn.Module):
        def forward(self, embeddings, labels):
            assert not embeddings.requires_grad
            return places(len(labels) // 2)

    teacher = CountingTeacher(network(out=7, seed=1))
    trainer = make_trainer(teacher=teacher, mining_funcs={"subset_batch_miner": FirstHalf()})
    trainer.initialize_dataloader()
    data, labels, index = trainer.get_batch()
    assert len(data) == len(labels) == 8 and index is None


def test_networks_are_in_training_mode_after_a_miner_has_failed(make_trainer):
    class Failing(torch.nn.Module):
        def forward(self, embeddings, labels):
            raise KeyError("no such pair")

    trainer = make_trainer(mining_funcs={"subset_batch_miner": Failing()})
    trainer.initialize_dataloader()
    trainer.set_to_train()
    with pytest.raises(KeyError):
        trainer.get_batch()
    assert trainer.models["trunk"].training


def test_tuple_miner_without_labels_is_an_error(make_trainer):
    class Unlabelled(Blobs):
        def __getitem__(self, i):
            return super().__getitem__(i)[0]

    trainer = make_trainer(
        dataset=Unlabelled(),
        loss_funcs={"distillation_loss": RelativeTeacherLoss()},
        mining_funcs={"tuple_miner": BatchHardMiner()},
    )
    with pytest.raises(ValueError, match="tuple_miner.*needs labels"):
        trainer.train(1, 1)


def test_end_of_epoch_hook_sees_the_mean_losses_of_the_epoch(make_trainer):
    steps, epochs = [], []
    trainer = make_trainer(
        end_of_iteration_hook=lambda t: steps.append(float(t.losses["distillation_loss"])),
        end_of_epoch_hook=lambda t: epochs.append(float(t.epoch_losses["distillation_loss"])),
    )
    trainer.train(1, 2)
    assert len(steps) == 8 and epochs == pytest.approx([sum(steps[:4]) / 4, sum(steps[4:]) / 4])


def shared_teacher(make_trainer):
    trunk = network()
    return make_trainer(models={"trunk": trunk}, teacher=FrozenTeacher(trunk))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"teacher": None}, r"distillation_loss.*teacher is None.*FrozenTeacher"),
        ({"teacher": network()}, r"teacher, a Sequential, has parameters that require gradients"),
        ({"teacher": network().requires_grad_(False)}, "teacher, a Sequential, is in train mode"),
        ({"teacher": "resnet50"}, "a str cannot be; pass FrozenTeacher"),
        ({"loss_funcs": {}}, "loss_funcs is empty"),
        ({"loss_funcs": {"metric_loss": ContrastiveLoss()}}, "teacher is given, but loss_funcs has only"),
        ({"models": {"trunk": network(), "teacher": network()}}, r"models has the key \"teacher\""),
        ({"models": {"trunk": network(), "trunk_teacher": network()}}, "models has the unknown keys"),
        ({"amp_dtype": torch.float64}, "amp_dtype must be .* torch.float64"),
        ({"loss_funcs": {"distillation_loss": MultipleLosses([RelativeTeacherLoss()])}}, "is a MultipleLosses"),
        ({"loss_funcs": {"distillation_loss": CrossBatchMemory(ContrastiveLoss(), 5)}}, "is a CrossBatchMemory"),
        ({"loss_funcs": {"distillation_loss": SelfSupervisedLoss(ContrastiveLoss())}}, "is a SelfSupervisedLoss"),
        ({"loss_funcs": {"distillation_loss": AttentionTransferLoss()}}, "must be a loss on embeddings"),
        (
            {"models": {"trunk": network(), "projection": torch.nn.Linear(5, 7)}},
            r"projection.*no optimizer trains, \['weight', 'bias'\].*projection_optimizer",
        ),
        ({"accumulation_steps": 0}, "accumulation_steps must be at least 1, but is 0"),
        (
            {"loss_funcs": {"distillation_loss": DistributedLossWrapper(RelativeTeacherLoss(), efficient=True)}},
            "efficient=True",
        ),
    ],
)
def test_errors_name_what_is_wrong(make_trainer, changes, message):
    with pytest.raises(ValueError, match=message):
        make_trainer(**changes)


def test_student_sharing_parameters_with_its_teacher_is_refused(make_trainer):
    with pytest.raises(ValueError, match="share parameters"):
        shared_teacher(make_trainer)


def test_a_trunk_alone_is_no_cause_for_a_warning(make_trainer, caplog):
    caplog.set_level("WARNING", logger="PML")
    make_trainer(models={"trunk": network()})
    assert "embedder" not in caplog.text


def test_unknown_loss_key_is_refused(make_trainer):
    with pytest.raises(
        ValueError, match=r"loss_funcs has the unknown keys \['kd_loss'\]; known are .*'distillation_loss'"
    ):
        make_trainer(loss_funcs={"distillation_loss": RelativeTeacherLoss(), "kd_loss": RelativeTeacherLoss()})


RUN = textwrap.dedent(
    """
    import os, signal, sys
    sys.path.insert(0, {folder!r})
    import numpy as np
    import torch
    from conftest import Blobs, network
    from pytorch_metric_learning.losses import ContrastiveLoss
    from pytorch_metric_learning.samplers import MPerClassSampler
    from pml_distill.losses import DarkRankLoss
    from pml_distill.teachers import FrozenTeacher
    from pml_distill.trainers import DistillationTrainer

    checkpoint, kill_at, amp, sampled, iterations, workers = sys.argv[1], *map(int, sys.argv[2:])
    torch.manual_seed(0)
    np.random.seed(0)
    blobs = Blobs()
    trunk = torch.nn.Sequential(network(), torch.nn.Dropout(0.2))
    optimizer = torch.optim.Adam(trunk.parameters(), lr=0.01)

    def end_of_epoch(trainer):
        torch.rand(3)  # an evaluation may draw random numbers, too
        if trainer.epoch == 2:
            trainer.save_checkpoint(checkpoint)

    def end_of_iteration(trainer):
        if (trainer.epoch, trainer.iteration) == (kill_at, 1):
            os.kill(os.getpid(), signal.SIGKILL)

    trainer = DistillationTrainer(
        models={{"trunk": trunk}},
        optimizers={{"trunk_optimizer": optimizer}},
        batch_size=16,
        loss_funcs={{"metric_loss": ContrastiveLoss(), "distillation_loss": DarkRankLoss()}},
        dataset=blobs,
        teacher=FrozenTeacher(network(out=7, seed=1)),
        sampler=MPerClassSampler(blobs.labels, 4, 16, 80) if sampled else None,
        lr_schedulers={{"trunk_scheduler_by_iteration": torch.optim.lr_scheduler.StepLR(optimizer, 2, 0.9)}},
        iterations_per_epoch=iterations or None,
        dataloader_num_workers=workers,
        data_device=torch.device("cpu"),
        amp_dtype=torch.float16 if amp else None,
        end_of_iteration_hook=end_of_iteration,
        end_of_epoch_hook=end_of_epoch,
    )
    start = trainer.load_checkpoint(checkpoint) if os.path.exists(checkpoint) else 1
    trainer.train(start, 4)
    torch.save(trunk.state_dict(), checkpoint + ".final")
    """
)


@pytest.mark.parametrize(("amp", "sampled", "iterations", "workers"), [(0, 0, 0, 0), (1, 1, 3, 0), (0, 0, 3, 1)])
def test_a_killed_and_resumed_run_ends_like_an_undisturbed_one(tmp_path, amp, sampled, iterations, workers):
    code = RUN.format(folder=os.path.dirname(__file__))

    def run(name, kill_at):
        arguments = [str(tmp_path / name), *map(str, (kill_at, amp, sampled, iterations, workers))]
        return subprocess.run([sys.executable, "-c", code, *arguments], capture_output=True, text=True)

    assert run("whole", 0).returncode == 0
    assert run("broken", 3).returncode == -signal.SIGKILL
    assert not (tmp_path / "broken.final").exists()
    assert run("broken", 0).returncode == 0
    whole, broken = torch.load(tmp_path / "whole.final"), torch.load(tmp_path / "broken.final")
    assert all(torch.equal(whole[k], broken[k]) for k in whole)


def test_checkpoint_restores_every_random_state(make_trainer, tmp_path):
    trainer = make_trainer(end_of_epoch_hook=lambda t: t.save_checkpoint(tmp_path / "state.pth"))
    trainer.train(1, 1)
    drawn = random.random(), np.random.rand(), torch.rand(())
    assert make_trainer().load_checkpoint(tmp_path / "state.pth") == 2
    assert drawn == (random.random(), np.random.rand(), torch.rand(()))


class Halving:
    """A schedule whose state holds a number of NumPy."""

    def __init__(self):
        self.factor = np.float32(0.5)

    def __call__(self, step):
        return float(self.factor) ** step


@pytest.mark.parametrize(
    ("rate", "schedule"),
    [
        (
            np.logspace(-4, -2, 3)[1],
            lambda optimizer: torch.optim.lr_scheduler.MultiStepLR(optimizer, np.array([1, 2])),
        ),
        (0.01, lambda optimizer: torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, np.int64(10))),
        (0.01, lambda optimizer: torch.optim.lr_scheduler.LambdaLR(optimizer, Halving())),
    ],
)
def test_a_checkpoint_may_hold_numbers_of_numpy(make_trainer, tmp_path, rate, schedule):
    def make():
        trunk = network()
        optimizer = torch.optim.AdamW(trunk.parameters(), lr=rate, weight_decay=np.float32(0.01))
        return make_trainer(
            models={"trunk": trunk},
            optimizers={"trunk_optimizer": optimizer},
            lr_schedulers={"trunk_scheduler_by_epoch": schedule(optimizer)},
        )

    whole, broken, resumed = make(), make(), make()
    for trainer in (whole, broken):
        torch.manual_seed(0)
        trainer.train(1, 1)
    broken.save_checkpoint(tmp_path / "state.pth")
    whole.train(2, 3)
    resumed.train(resumed.load_checkpoint(tmp_path / "state.pth"), 3)
    ours, theirs = weights(whole), weights(resumed)
    assert all(torch.equal(ours[k], theirs[k]) for k in ours)


def test_checkpoint_knows_the_place_in_a_cross_batch_memory(make_trainer, tmp_path):
    def make():
        memory = CrossBatchMemory(ContrastiveLoss(), 5, memory_size=48)
        return make_trainer(loss_funcs={"metric_loss": memory, "distillation_loss": RelativeTeacherLoss()})

    trainer = make()
    trainer.train(1, 1)
    trainer.save_checkpoint(tmp_path / "state.pth")
    other = make()
    other.load_checkpoint(tmp_path / "state.pth")
    ours, theirs = trainer.loss_funcs["metric_loss"], other.loss_funcs["metric_loss"]
    assert ours.has_been_filled and (ours.queue_idx, True) == (theirs.queue_idx, theirs.has_been_filled)


def test_checkpoint_knows_it_inside_of_a_distributed_wrapper_too(make_trainer, tmp_path):
    ours, theirs = (CrossBatchMemory(ContrastiveLoss(), 5, memory_size=48) for _ in range(2))
    ours.queue_idx, ours.has_been_filled = 16, True
    saving, loading = (
        make_trainer(loss_funcs={"metric_loss": DistributedLossWrapper(m), "distillation_loss": RelativeTeacherLoss()})
        for m in (ours, theirs)
    )
    saving.save_checkpoint(tmp_path / "state.pth")
    loading.load_checkpoint(tmp_path / "state.pth")
    assert (theirs.queue_idx, theirs.has_been_filled) == (16, True)


def test_checkpoint_knows_it_inside_of_several_losses_too(make_trainer, tmp_path):
    ours, theirs = (CrossBatchMemory(ContrastiveLoss(), 5, memory_size=48) for _ in range(2))
    ours.queue_idx, ours.has_been_filled = 16, True
    saving, loading = (
        make_trainer(
            loss_funcs={
                "metric_loss": MultipleLosses([m, ContrastiveLoss()]),
                "distillation_loss": RelativeTeacherLoss(),
            }
        )
        for m in (ours, theirs)
    )
    saving.save_checkpoint(tmp_path / "state.pth")
    loading.load_checkpoint(tmp_path / "state.pth")
    assert (theirs.queue_idx, theirs.has_been_filled) == (16, True)


def test_float16_takes_a_step_in_which_nothing_goes_backward(make_trainer):
    trainer = make_trainer(amp_dtype=torch.float16, loss_weights={"metric_loss": 0, "distillation_loss": 0})
    parameters = list(trainer.models["trunk"].parameters())
    before = [p.detach().clone() for p in parameters]
    trainer.training_step((torch.randn(8, 6), torch.arange(8) % 4))
    assert all(map(torch.equal, before, parameters))


def test_a_sampler_shorter_than_a_batch_is_named(make_trainer, blobs):
    trainer = make_trainer(batch_size=32, sampler=MPerClassSampler(blobs.labels, 4, 16, 16))
    with pytest.raises(ValueError, match="sampler has 16 samples, fewer than batch_size, 32"):
        trainer.train(1, 1)


def test_plain_loop_saves_and_may_rest(make_trainer, blobs, tmp_path):
    trainer = make_trainer(loss_weights={"metric_loss": 0, "distillation_loss": 0})
    before = weights(trainer)
    trainer.training_step((torch.stack([blobs[i][0] for i in range(16)]), blobs.labels[:16]))
    trainer.save_checkpoint(tmp_path / "state.pth")
    assert torch.equal(before["0.weight"], weights(trainer)["0.weight"])
    assert make_trainer().load_checkpoint(tmp_path / "state.pth") == 1


def test_a_dataset_smaller_than_a_batch_is_named(make_trainer):
    with pytest.raises(ValueError, match="dataset has 64 samples, fewer than batch_size, 65"):
        make_trainer(batch_size=65).train(1, 1)


def test_checkpoint_of_another_process_is_refused(make_trainer, tmp_path, monkeypatch):
    make_trainer().save_checkpoint(tmp_path / "state.pth")
    monkeypatch.setattr("pml_distill.trainers.checkpoint.process_rank", lambda: 1)
    with pytest.raises(ValueError, match="state.pth was written by process 0, but this is process 1"):
        make_trainer().load_checkpoint(tmp_path / "state.pth")


def test_checkpoint_of_another_trainer_is_refused(make_trainer, tmp_path):
    trainer = make_trainer(end_of_epoch_hook=lambda t: t.save_checkpoint(tmp_path / "state.pth"))
    trainer.train(1, 1)
    other = make_trainer(loss_funcs={"distillation_loss": RelativeTeacherLoss()})
    with pytest.raises(ValueError, match=r"holds loss_funcs \['distillation_loss', 'metric_loss'\].*has"):
        other.load_checkpoint(tmp_path / "state.pth")


def test_what_a_refused_checkpoint_would_have_replaced_stays(make_trainer, tmp_path):
    trainer = make_trainer(end_of_epoch_hook=lambda t: t.save_checkpoint(tmp_path / "state.pth"))
    trainer.train(1, 1)
    loss_funcs = {"metric_loss": ContrastiveLoss(), "distillation_loss": RelativeTeacherLoss()}
    other = make_trainer(loss_funcs=loss_funcs, mining_funcs={"tuple_miner": MultiSimilarityMiner()})
    before = weights(other)
    with pytest.raises(ValueError, match="holds mining_funcs"):
        other.load_checkpoint(tmp_path / "state.pth")
    assert all(torch.equal(value, before[key]) for key, value in weights(other).items())
    wider = network(out=9)
    with pytest.raises(ValueError, match=r'(?s)holds other models\["trunk"\] than this trainer: .*size mismatch'):
        make_trainer(models={"trunk": wider}).load_checkpoint(tmp_path / "state.pth")
    trunk = network()
    optimizer = torch.optim.Adam([{"params": [p]} for p in trunk.parameters()])
    grouped = make_trainer(models={"trunk": trunk}, optimizers={"trunk_optimizer": optimizer})
    with pytest.raises(ValueError, match=r'holds other optimizers\["trunk_optimizer"\] than this trainer'):
        grouped.load_checkpoint(tmp_path / "state.pth")
    torch.save(before, tmp_path / "weights.pth")
    with pytest.raises(ValueError, match="weights.pth must be a file of save_checkpoint, but holds"):
        other.load_checkpoint(tmp_path / "weights.pth")


def test_a_teacher_that_is_a_plain_function_gets_no_gradients(make_trainer):
    taught = network(out=5, seed=1)
    trainer = make_trainer(loss_funcs={"distillation_loss": ContrastiveLoss()}, teacher=lambda data: taught(data))
    trainer.train(1, 1)
    assert all(p.grad is None for p in taught.parameters())


def test_data_other_than_tensors_go_where_pml_sends_them(make_trainer, blobs):
    """A user's own ``get_trunk_output`` reads them, as in PML's trainers."""

    class Named(torch.utils.data.Dataset):
        def __len__(self):
            return len(blobs)

        def __getitem__(self, i):
            data, label = blobs[i]
            return {"left": data[:3], "right": data[3:]}, label

    class Joining(DistillationTrainer):
        def get_trunk_output(self, data):
            return super().get_trunk_output(torch.cat([data["left"], data["right"]], dim=1))

    class JoiningTeacher(FrozenTeacher):
        def forward(self, data, index=None):
            return super().forward(torch.cat([data["left"], data["right"]], dim=1))

    results = []
    for parts in ({}, {"cls": Joining, "dataset": Named(), "teacher": JoiningTeacher(network(out=7, seed=1))}):
        torch.manual_seed(0)
        trainer = make_trainer(**parts)
        torch.manual_seed(1)
        trainer.train(1, 1)
        results.append(weights(trainer))
    assert all(torch.equal(results[0][k], results[1][k]) for k in results[0])


class Two(torch.nn.Module):
    def forward(self, data, index=None):
        return data, data


@pytest.mark.parametrize(
    ("name", "given"),
    [
        (r'models\["trunk"\] and \["embedder"\]', {"models": {"trunk": Two()}}),
        (r'models\["projection"\]', {"models": {"trunk": torch.nn.Identity(), "projection": Two()}}),
        ("teacher", {"models": {"trunk": torch.nn.Identity()}, "teacher": Two().eval()}),
    ],
)
def test_what_returns_several_outputs_is_named(make_trainer, name, given):
    with pytest.raises(ValueError, match=f"^{name} must return one tensor of embeddings, but returned a tuple"):
        make_trainer(optimizers={}, **given).train(1, 1)


def test_multi_hot_labels_go_to_the_metric_loss_alone(make_trainer):
    labels = torch.eye(4)[torch.arange(32) % 4]
    data = torch.utils.data.TensorDataset(torch.randn(32, 6), labels)
    trainer = make_trainer(
        dataset=data,
        label_hierarchy_level="all",
        loss_funcs={"metric_loss": DeepCauchyHashingLoss(), "distillation_loss": RelativeTeacherLoss()},
    )
    trainer.train(1, 1)
    assert all(trainer.epoch_losses[key] > 0 for key in ("metric_loss", "distillation_loss"))


def test_a_column_of_multi_hot_labels_is_not_taken_for_classes(make_trainer):
    data = torch.utils.data.TensorDataset(torch.randn(32, 6), torch.eye(4)[torch.arange(32) % 4])
    for loss in (DeepCauchyHashingLoss(), DistributedLossWrapper(CentralSimilarityLoss(4, 5))):
        trainer = make_trainer(dataset=data, loss_funcs={"metric_loss": loss}, teacher=None)
        with pytest.raises(ValueError, match=r'takes one column of .* \(16, 4\); give label_hierarchy_level="all"'):
            trainer.train(1, 1)


def test_two_levels_of_classes_serve_a_hashing_loss(make_trainer):
    classes = torch.stack([torch.arange(32) % 4, torch.arange(32) % 2], dim=1)
    data = torch.utils.data.TensorDataset(torch.randn(32, 6), classes)
    trainer = make_trainer(dataset=data, loss_funcs={"metric_loss": CentralSimilarityLoss(4, 5)}, teacher=None)
    trainer.train(1, 1)
    assert trainer.epoch_losses["metric_loss"] > 0


def test_a_copy_of_the_frozen_teacher_is_no_student_until_it_can_learn(make_trainer):
    teacher = FrozenTeacher(network())
    student = copy.deepcopy(teacher.trunk)
    parts = {"models": {"trunk": student}, "teacher": teacher}
    optimizers = {"trunk_optimizer": torch.optim.SGD(student.parameters(), lr=0.1)}
    with pytest.raises(ValueError, match=r'models\["trunk"\] is in an optimizer, but none .* requires_grad_\(True\)'):
        make_trainer(**parts, optimizers=optimizers)
    make_trainer(**parts, optimizers=optimizers, freeze_these=["trunk"])
    student.requires_grad_(True)
    make_trainer(**parts, optimizers=optimizers)


def test_a_checkpoint_within_an_epoch_says_what_is_left_out(make_trainer, tmp_path, caplog):
    def save(trainer):
        trainer.save_checkpoint(tmp_path / "state.pth")

    caplog.set_level("WARNING", logger="PML")
    make_trainer(end_of_epoch_hook=save).train(1, 1)
    assert not caplog.records
    make_trainer(end_of_iteration_hook=save).train(1, 1)
    assert [record.message.split("leaves out ")[1] for record in caplog.records] == ["3 steps.", "2 steps.", "1 steps."]


def test_a_classifier_in_bfloat16_is_given_embeddings_of_its_own_type(make_trainer):
    trunk, classifier = network().bfloat16(), torch.nn.Linear(5, 4).bfloat16()
    trainer = make_trainer(
        DistillationWithClassifier,
        models={"trunk": trunk, "classifier": classifier},
        optimizers={"trunk_optimizer": torch.optim.SGD([*trunk.parameters(), *classifier.parameters()], 0.01)},
        loss_funcs={"classifier_loss": torch.nn.CrossEntropyLoss(), "distillation_loss": RelativeTeacherLoss()},
        dtype=torch.bfloat16,
    )
    trainer.train(1, 1)
    assert trainer.epoch_losses["classifier_loss"] > 0 and classifier.weight.grad.dtype == torch.bfloat16


def test_a_failed_save_leaves_the_old_checkpoint_whole(make_trainer, tmp_path, monkeypatch):
    path = tmp_path / "state.pth"
    trainer = make_trainer(end_of_epoch_hook=lambda t: t.save_checkpoint(path))
    trainer.train(1, 1)
    good = path.read_bytes()

    def broken_save(state, target):
        target.write_bytes(b"half")
        raise OSError("No space left on device")

    monkeypatch.setattr(torch, "save", broken_save)
    with pytest.raises(OSError, match="No space"):
        trainer.save_checkpoint(path)
    assert path.read_bytes() == good


def test_a_classifier_of_the_teacher_that_serves_no_loss_is_refused(make_trainer):
    with pytest.raises(ValueError, match=r"teacher_classifier serves .*logit_distillation_loss.* has only \["):
        make_trainer(DistillationWithClassifier, teacher_classifier=torch.nn.Linear(7, 4))


def test_a_classifier_loss_without_labels_is_refused(make_trainer):
    trunk, classifier = network(), torch.nn.Linear(5, 4)
    trainer = make_trainer(
        DistillationWithClassifier,
        models={"trunk": trunk, "classifier": classifier},
        optimizers={"trunk_optimizer": torch.optim.Adam([*trunk.parameters(), *classifier.parameters()])},
        loss_funcs={"classifier_loss": torch.nn.CrossEntropyLoss(), "distillation_loss": RelativeTeacherLoss()},
    )
    with pytest.raises(ValueError, match="classifier_loss.* needs labels, but the dataset yields none"):
        trainer.training_step(torch.randn(8, 6))
