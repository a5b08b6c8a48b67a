"""``feature_distillation_loss`` through the real trainer, on small Glyphs."""

import copy

import pytest
import torch
from pytorch_metric_learning.losses import MultiSimilarityLoss

from pml_distill.datasets import Glyphs
from pml_distill.losses import (
    AttentionTransferLoss,
    HintLoss,
    LogitDistillationLoss,
    RelativeTeacherLoss,
    VariationalInformationLoss,
)
from pml_distill.models import SmallResNet
from pml_distill.teachers import FrozenTeacher
from pml_distill.trainers import DistillationTrainer, DistillationWithClassifier

KEY = "feature_distillation_loss"
NAMES = ["layer1", "layer3"]
STUDENT, TEACHER = [4, 16], [8, 32]
LOSSES = {
    "hint": lambda: HintLoss(STUDENT, TEACHER),
    "attention": AttentionTransferLoss,
    "variational": lambda: VariationalInformationLoss(STUDENT, TEACHER),
}


class CountingTeacher(FrozenTeacher):
    calls = 0

    def forward(self, data, index=None):
        self.calls += 1
        return super().forward(data, index)


@pytest.fixture(scope="module")
def glyphs():
    dataset = Glyphs("val", size=16, augment=False)
    return [dataset[i] for i in range(96)]


@pytest.fixture
def make(glyphs):
    def build(loss="hint", cls=DistillationTrainer, **changes):
        torch.manual_seed(0)
        trunk, teacher = SmallResNet(4), CountingTeacher(SmallResNet(8))
        loss_func = LOSSES[loss]() if isinstance(loss, str) else loss
        optimizers = {"trunk_optimizer": torch.optim.Adam(trunk.parameters(), lr=0.01)}
        if list(loss_func.parameters()):
            optimizers[f"{KEY}_optimizer"] = torch.optim.Adam(loss_func.parameters(), lr=0.1)
        parts = {
            "models": {"trunk": trunk},
            "optimizers": optimizers,
            "batch_size": 16,
            "loss_funcs": {KEY: loss_func},
            "dataset": glyphs,
            "teacher": teacher,
            "student_features": NAMES,
            "teacher_features": NAMES,
            "data_device": torch.device("cpu"),
            "dataloader_num_workers": 0,
        }
        return cls(**{**parts, **changes})

    return build


def batch(glyphs, size=16):
    images, labels = zip(*glyphs[:size])
    return torch.stack(images), torch.tensor(labels)


@pytest.mark.parametrize("loss", LOSSES)
def test_the_student_learns_the_teachers_features(make, loss):
    trainer = make(loss)
    parameters = [p.detach().clone() for p in trainer.loss_funcs[KEY].parameters()]
    trainer.train(1, 1)
    first = trainer.epoch_losses[KEY]
    trainer.train(2, 6)
    assert trainer.epoch_losses[KEY] < first - 0.15 * abs(first)
    assert all(not torch.equal(*pair) for pair in zip(parameters, trainer.loss_funcs[KEY].parameters()))
    assert trainer.teacher.calls == 6 * 6
    assert not any(m._forward_hooks for net in (trainer.models["trunk"], trainer.teacher) for m in net.modules())


def test_it_stands_beside_the_losses_on_embeddings_and_the_teacher_runs_once(make, glyphs):
    hint = LOSSES["hint"]()
    trainer = make(
        hint,
        loss_funcs={"metric_loss": MultiSimilarityLoss(), "distillation_loss": RelativeTeacherLoss(), KEY: hint},
        loss_weights={"metric_loss": 1, "distillation_loss": 2, KEY: 0.5},
    )
    trunk = copy.deepcopy(trainer.models["trunk"])
    images, labels = batch(glyphs)

    def stages(network):
        first = network.layer1(network.bn1(network.conv1(images)).relu())
        return [first, network.layer3(network.layer2(first))]

    expected = 0.5 * hint(stages(trunk), stages(trainer.teacher.trunk))
    losses = trainer.training_step((images, labels))
    assert losses[KEY].item() == pytest.approx(expected.item(), rel=1e-5)
    assert losses["total_loss"] == losses["metric_loss"] + losses["distillation_loss"] + losses[KEY]
    assert trainer.teacher.calls == 1


def test_a_zero_weight_spares_teacher_and_features(make):
    hint = LOSSES["hint"]()
    trainer = make(
        hint,
        loss_funcs={"metric_loss": MultiSimilarityLoss(), KEY: hint},
        loss_weights={"metric_loss": 1, KEY: 0},
        iterations_per_epoch=1,
    )
    trainer.train(1, 1)
    assert trainer.teacher.calls == 0 and trainer.epoch_losses[KEY] == 0


@pytest.mark.parametrize("amp_dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("loss", LOSSES)
def test_mixed_precision_is_near_float32(make, glyphs, loss, amp_dtype):
    values, seen = [], []
    for dtype in (None, amp_dtype):
        trainer = make(loss, amp_dtype=dtype)
        trainer.models["trunk"].register_forward_hook(lambda _m, _i, out: seen.append(out.dtype))
        values.append(trainer.training_step(batch(glyphs))[KEY])
    assert seen == [torch.float32, amp_dtype]
    assert values[0].dtype == values[1].dtype == torch.float32
    assert values[1].item() == pytest.approx(values[0].item(), rel=0.03)


def test_gradients_of_accumulated_batches_sum(make, glyphs):
    def gradients(*batches):
        trainer, found = make(freeze_trunk_batchnorm=True), []
        trainer.set_to_train()
        clipped = [*trainer.models["trunk"].parameters(), *trainer.loss_funcs[KEY].parameters()]
        trainer.gradient_clippers = {"trunk_grad_clipper": lambda: found.extend(p.grad.clone() for p in clipped)}
        trainer.training_step(*batches)
        return found

    parts = [batch(glyphs[i : i + 8], 8) for i in (0, 8)]
    for whole, *pieces in zip(gradients(*parts), *(gradients(part) for part in parts)):
        assert torch.allclose(whole, sum(pieces), atol=1e-5)


def test_a_frozen_loss_keeps_its_regressors_and_needs_no_optimizer(make):
    trunk = SmallResNet(4)
    trainer = make(
        models={"trunk": trunk},
        optimizers={"trunk_optimizer": torch.optim.Adam(trunk.parameters())},
        freeze_these=(KEY,),
        iterations_per_epoch=1,
    )
    before = copy.deepcopy(trainer.loss_funcs[KEY].state_dict())
    weight = trunk.conv1.weight.detach().clone()
    trainer.train(1, 1)
    assert all(torch.equal(before[k], v) for k, v in trainer.loss_funcs[KEY].state_dict().items())
    assert not torch.equal(weight, trunk.conv1.weight)


@pytest.mark.parametrize("loss", ["hint", "variational"])
def test_a_resumed_run_ends_like_an_undisturbed_one(make, tmp_path, loss):
    path = tmp_path / "state.pth"
    whole = make(loss, end_of_epoch_hook=lambda t: t.epoch == 1 and t.save_checkpoint(path) or True)
    whole.train(1, 2)
    resumed = make(loss)
    resumed.train(resumed.load_checkpoint(path), 2)
    for side in (lambda t: t.models["trunk"], lambda t: t.loss_funcs[KEY]):
        ours, theirs = side(whole).state_dict(), side(resumed).state_dict()
        assert all(torch.equal(ours[k], theirs[k]) for k in ours)
    saved = torch.load(path)
    assert any("regressors" in k for k in saved["loss_funcs"][KEY])
    assert saved["models"]["trunk"].keys() == SmallResNet(4).state_dict().keys()


def test_hook_container_logs_and_saves_it(make, tmp_path):
    from pytorch_metric_learning.testers import GlobalEmbeddingSpaceTester
    from pytorch_metric_learning.utils import logging_presets
    from pytorch_metric_learning.utils.accuracy_calculator import AccuracyCalculator

    record_keeper, _, _ = logging_presets.get_record_keeper(str(tmp_path / "logs"), str(tmp_path / "tensorboard"))
    hooks = logging_presets.HookContainer(record_keeper, primary_metric="precision_at_1", log_freq=1)
    tester = GlobalEmbeddingSpaceTester(
        end_of_testing_hook=hooks.end_of_testing_hook,
        accuracy_calculator=AccuracyCalculator(include=("precision_at_1",), k=1),
        dataloader_num_workers=0,
        data_device=torch.device("cpu"),
    )
    trainer = make("variational")
    val = {"val": trainer.dataset}
    trainer.end_of_iteration_hook = hooks.end_of_iteration_hook
    trainer.end_of_epoch_hook = hooks.end_of_epoch_hook(tester, val, str(tmp_path / "models"))
    trainer.train(1, 1)
    assert len(hooks.get_loss_history([KEY])[KEY]) == 6
    again = make("variational")
    assert hooks.load_latest_saved_models(again, str(tmp_path / "models"), torch.device("cpu")) == 2
    ours, theirs = (t.loss_funcs[KEY].state_dict() for t in (trainer, again))
    assert all(torch.equal(ours[k], theirs[k]) for k in ours)


def test_beside_a_classifier(make):
    hint, classifier = LOSSES["hint"](), torch.nn.Linear(16, 10)
    trainer = make(
        hint,
        cls=DistillationWithClassifier,
        models={"trunk": SmallResNet(4), "classifier": classifier},
        loss_funcs={"logit_distillation_loss": LogitDistillationLoss(), KEY: hint},
        teacher_classifier=torch.nn.Linear(32, 10),
        iterations_per_epoch=1,
    )
    trainer.train(1, 1)
    assert trainer.epoch_losses[KEY] > 0 and trainer.epoch_losses["logit_distillation_loss"] > 0
    assert trainer.teacher.calls == 1


def test_a_compiled_student(make, glyphs):
    trainers = [make(), make()]
    trunk = trainers[1].models["trunk"]
    trainers[1].models["trunk"] = torch.compile(trunk, backend="aot_eager")
    for _ in range(3):
        values = [trainer.training_step(batch(glyphs))[KEY].item() for trainer in trainers]
        assert values[0] == pytest.approx(values[1], rel=1e-4)


class Unknown(torch.nn.Module):
    def forward(self, data, index=None):
        return data.flatten(1)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"student_features": ()}, r"needs student_features and teacher_features.*\(\) and \['layer1', 'layer3'\]"),
        ({"teacher_features": ["layer1"]}, r"go pair by pair.*\['layer1', 'layer3'\] and \['layer1'\]"),
        ({"student_features": "layer1", "teacher_features": "layer1"}, "two lists of names.*'layer1' and 'layer1'"),
        ({"student_features": ["layer1", "layer9"]}, r"no modules of these names: 'layer9' \(near: layer"),
        ({"teacher": Unknown().eval()}, "must be a FrozenTeacher or a CachedTeacher, but is a Unknown"),
        ({"teacher": None}, r"feature_distillation_loss.*teacher is None"),
        (
            {"loss_funcs": {"distillation_loss": RelativeTeacherLoss()}},
            f'serve loss_funcs."{KEY}"., which is not there',
        ),
        ({"loss_funcs": {KEY: RelativeTeacherLoss()}}, "is a RelativeTeacherLoss, but must be a loss on feature maps"),
        ({"optimizers": {}}, rf"no optimizer trains, \['regressors.map_0.weight.*\"{KEY}_optimizer\""),
    ],
)
def test_errors_name_what_is_wrong(make, changes, message):
    with pytest.raises(ValueError, match=message):
        make(**changes)


def test_labels_reach_a_reducer_that_weighs_classes(make, glyphs):
    from pytorch_metric_learning.reducers import ClassWeightedReducer

    images, labels = batch(glyphs)
    weights = torch.zeros(int(labels.max()) + 1)
    trainer = make(AttentionTransferLoss(reducer=ClassWeightedReducer(weights)))
    assert trainer.training_step((images, labels))[KEY] == 0
