"""Data as people have them, through a trainer."""

from collections import namedtuple

import pytest
import torch
from conftest import Blobs, network, weights
from pytorch_metric_learning.losses import ContrastiveLoss
from torch import nn
from torch.utils.data import Subset

from pml_distill.losses import MultipleDistillationLosses, RelativeTeacherLoss, RKDAngleLoss
from pml_distill.teachers import EMATeacher, FrozenTeacher
from pml_distill.trainers import DistillationWithClassifier, LossWeightRamp

NAMES = ["dog", "cat", "eel", "ant"]
Photo = namedtuple("Photo", "image label")


class Watching(ContrastiveLoss):
    def __init__(self):
        super().__init__()
        self.seen = []

    def forward(self, embeddings, labels, *args):
        self.seen.append(labels)
        return super().forward(embeddings, labels, *args)


class Shaped(Blobs):
    """Blobs whose items are made by a function of (data, label, row)."""

    def __init__(self, shape, **attributes):
        super().__init__()
        self.classes, self.shape = self.labels, shape
        del self.labels
        vars(self).update(attributes)

    def __len__(self):
        return len(self.classes)

    def __getitem__(self, i):
        data = self.centers[self.classes[i]] + 0.3 * torch.randn(6, generator=torch.Generator().manual_seed(int(i)))
        return self.shape(data, int(self.classes[i]), i)


@pytest.mark.parametrize(
    "shape",
    [
        lambda data, label, i: {"pixel_values": data, "label": label},
        lambda data, label, i: {"x": data, "target": label, "idx": i},
        lambda data, label, i: Photo(data, label),
        lambda data, label, i: (data, label, {"path": "photo.jpg"}),
    ],
)
def test_dictionaries_and_named_tuples_train_as_pairs_do(make_trainer, shape):
    results = []
    for kind in (lambda data, label, i: (data, label), shape):
        torch.manual_seed(0)
        trainer = make_trainer(dataset=Shaped(kind))
        torch.manual_seed(1)
        trainer.train()
        results.append(weights(trainer))
    assert all(torch.equal(value, results[1][key]) for key, value in results[0].items())


def text(data, label, i):
    return data, NAMES[label]


@pytest.mark.parametrize(
    ("changes", "expected"),
    [
        ({"dataset": Shaped(text), "dataset_labels": [NAMES[i % 4] for i in range(64)]}, [2, 1, 3, 0]),
        ({"dataset": Shaped(text, targets=[NAMES[i % 4] for i in range(64)])}, [2, 1, 3, 0]),
        ({"dataset": Subset(Shaped(text, targets=[NAMES[i % 4] for i in range(64)]), range(48))}, [2, 1, 3, 0]),
        ({"dataset": Shaped(text)}, [2, 1, 3, 0]),
    ],
    ids=["dataset_labels", "labels of the dataset", "subset", "as they come"],
)
def test_text_labels_have_one_number_in_all_batches(make_trainer, changes, expected):
    loss = Watching()
    trainer = make_trainer(
        loss_funcs={"metric_loss": loss, "distillation_loss": RelativeTeacherLoss()},
        sampler=list(range(48)),
        set_min_label_to_zero="dataset_labels" in changes,
        **changes,
    )
    trainer.train(1, 2)
    assert torch.equal(torch.cat(loss.seen), torch.tensor(expected).repeat(24))


def test_numbers_of_text_labels_are_resumed(make_trainer, tmp_path):
    dataset = Shaped(text)
    first = make_trainer(dataset=dataset, sampler=[0] * 16 + [3] * 16)
    first.train()
    first.save_checkpoint(tmp_path / "state.pth")
    loss = Watching()
    losses = {"metric_loss": loss, "distillation_loss": RelativeTeacherLoss()}
    resumed = make_trainer(dataset=dataset, loss_funcs=losses)
    resumed.load_checkpoint(tmp_path / "state.pth")
    resumed.training_step((torch.randn(3, 6), ["ant", "dog", "cat"]))
    assert loss.seen[0].tolist() == [1, 0, 2]


def test_a_text_label_that_is_not_among_those_given_is_an_error(make_trainer):
    trainer = make_trainer(dataset=Shaped(text), dataset_labels=["dog", "cat", "eel"])
    with pytest.raises(ValueError, match=r"the classes \['ant'\], .* dataset_labels"):
        trainer.train()


def test_a_loss_without_labels_takes_text_labels(make_trainer):
    trainer = make_trainer(dataset=Shaped(text), loss_funcs={"distillation_loss": RelativeTeacherLoss()})
    trainer.train()
    assert trainer.epoch_losses["distillation_loss"] > 0


class MeanOfTokens(nn.Module):
    def __init__(self, width):
        super().__init__()
        self.embedding = nn.Embedding(8, width)

    def forward(self, data):
        mask = data["attention_mask"][..., None]
        return (self.embedding(data["input_ids"]) * mask).sum(1) / mask.sum(1)


def pad(items):
    padded = {
        key: nn.utils.rnn.pad_sequence([item[key] for item in items], batch_first=True)
        for key in ("input_ids", "attention_mask")
    }
    return padded | {"labels": [item["label"] for item in items]}


def tokens(data, label, i):
    ids = torch.full((2 + i % 5,), label)
    return {"input_ids": ids, "attention_mask": torch.ones_like(ids), "label": NAMES[label]}


@pytest.mark.parametrize("workers", [0, 1])
def test_tokenised_text_of_unequal_lengths(make_trainer, workers):
    trunk = MeanOfTokens(5)
    trainer = make_trainer(
        models={"trunk": trunk},
        optimizers={"trunk_optimizer": torch.optim.Adam(trunk.parameters(), 0.1)},
        dataset=Shaped(tokens),
        teacher=FrozenTeacher(MeanOfTokens(7)),
        collate_fn=pad,
        dataloader_num_workers=workers,
        loader_settings={"persistent_workers": True, "prefetch_factor": 4} if workers else None,
    )
    trainer.train()
    first = trainer.epoch_losses["metric_loss"]
    assert trainer.dataloader.persistent_workers == bool(workers)
    trainer.train(2, 4)
    assert trainer.epoch_losses["metric_loss"] < first


def test_a_metric_loss_that_sees_no_label_is_an_error_after_the_first_epoch(make_trainer):
    unlabeled = Shaped(lambda data, label, i: (data, -1))
    with pytest.raises(ValueError, match="metric_loss.* all labels of the first epoch are -1"):
        make_trainer(dataset=unlabeled).train(1, 5)
    make_trainer(dataset=unlabeled, loss_funcs={"distillation_loss": RelativeTeacherLoss()}).train()
    make_trainer(dataset=Shaped(lambda data, label, i: (data, label if i == 5 else -1))).train()


def test_two_images_without_a_label_are_not_taken_for_one(make_trainer):
    pairs = Shaped(lambda data, label, i: (torch.ones(1, 2, 2), torch.zeros(1, 2, 2)))
    with pytest.raises(ValueError, match=r"labels of a batch must be .* \(16, 1, 2, 2\).*\(data,\)"):
        make_trainer(dataset=pairs).train()


@pytest.mark.parametrize(
    "row", [lambda i: f"{i}.jpg", lambda i: {"path": f"{i}.jpg", "box": torch.tensor([i, 0])}, lambda i: [i, i]]
)
def test_a_subset_miner_takes_rows_that_are_no_tensors(make_trainer, row):
    class EverySecond(nn.Module):
        def forward(self, embeddings, labels):
            return torch.arange(0, len(labels), 2)

    trainer = make_trainer(
        dataset=Shaped(lambda data, label, i: (data, label, row(i))),
        sampler=list(range(64)),
        mining_funcs={"subset_batch_miner": EverySecond()},
    )
    trainer.train()
    trainer.initialize_dataloader()
    data, labels, index = trainer.get_batch()
    assert len(data) == len(labels) == 8
    first = torch.utils.data.default_collate([row(i) for i in range(0, 16, 2)])
    parts = [(index[key], first[key]) for key in first] if isinstance(first, dict) else [(index, first)]
    assert all(torch.equal(a, b) if isinstance(a, torch.Tensor) else str(a) == str(b) for a, b in parts)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"optimizers": {"cat_optimizer": None}}, r'optimizers\["cat_optimizer"\] must be an optimizer, but is a None'),
        ({"optimizers": {"cat_optimizer": torch.optim.SGD(network().parameters())}}, "optimizers has the unknown keys"),
        ({"optimizers": None}, "optimizers must be a dictionary, but is NoneType"),
        ({"lr_schedulers": {"trunk_scheduler_by_epoch": None}}, r"lr_schedulers\[.* must be a scheduler"),
        ({"gradient_clippers": {"trunk_grad_clipper": None}}, r"gradient_clippers\[.* must be a function"),
        ({"mining_funcs": {"tuple_miner": None}}, r'mining_funcs\["tuple_miner"\] must be a miner'),
        ({"loss_funcs": {"metric_loss": None}}, r'loss_funcs\["metric_loss"\] must be a loss'),
        ({"models": {"trunk": None}}, r'models\["trunk"\] must be a torch.nn.Module'),
        ({"loss_weight_ramps": {"metric": lambda progress: 1}}, r"loss_weight_ramps has \['metric'\]"),
    ],
)
def test_parts_that_are_none_or_unknown_are_named(make_trainer, changes, message):
    with pytest.raises(ValueError, match=message):
        make_trainer(**changes)


def test_a_teacher_that_follows_the_student_is_updated_and_resumed(make_trainer, tmp_path):
    def make(hook=None):
        trunk = network(seed=3)
        return make_trainer(
            models={"trunk": trunk},
            optimizers={"trunk_optimizer": torch.optim.Adam(trunk.parameters(), 0.01)},
            teacher=EMATeacher(trunk, decay=0.8),
            end_of_epoch_hook=hook,
        )

    whole, broken, resumed = make(), make(lambda t: t.save_checkpoint(tmp_path / "state.pth")), make()
    for trainer, last in ((whole, 2), (broken, 1)):
        torch.manual_seed(4)
        trainer.train(1, last)
    resumed.train(resumed.load_checkpoint(tmp_path / "state.pth"), 2)
    for part in (lambda trainer: trainer.teacher.state_dict(), weights):
        assert all(torch.equal(value, part(resumed)[key]) for key, value in part(whole).items())
    before, student = broken.teacher.state_dict()["average.0.weight"], weights(broken)["0.weight"]
    assert not torch.equal(before, student) and not torch.equal(before, weights(make())["0.weight"])


def test_a_teacher_with_other_parts_that_have_an_update_is_left_alone(make_trainer):
    class Named(nn.Module):
        def __init__(self):
            super().__init__()
            self.parts = nn.ModuleDict({"all": network(out=7)})

        def forward(self, data):
            return self.parts["all"](data)

    make_trainer(teacher=FrozenTeacher(Named())).train()


def test_a_ramp_brings_a_loss_in_and_leaves_the_caller_its_weights(make_trainer):
    given, seen = {"metric_loss": 1, "distillation_loss": 4}, []
    trainer = make_trainer(
        loss_weights=given,
        loss_weight_ramps={"distillation_loss": LossWeightRamp(0.25, 0.75)},
        end_of_iteration_hook=lambda t: seen.append(t.loss_weights["distillation_loss"]),
    )
    trainer.train(1, 2)
    assert seen == [0, 0, 0, 1, 2, 3, 4, 4] and given == {"metric_loss": 1, "distillation_loss": 4}
    with pytest.raises(ValueError, match="loss_weight_ramps are for train"):
        make_trainer(loss_weight_ramps=trainer.loss_weight_ramps).training_step(torch.randn(4, 6))
    with pytest.raises(ValueError, match="start must be at least 0 and below end, but they are 0.5 and 0.5"):
        LossWeightRamp(0.5, 0.5)


def test_a_ramp_lets_a_loss_fade_out(make_trainer):
    seen = []
    trainer = make_trainer(
        loss_weights={"metric_loss": 1, "distillation_loss": 4},
        loss_weight_ramps={"distillation_loss": LossWeightRamp(0.25, 0.75, first=1, last=0)},
        end_of_iteration_hook=lambda t: seen.append((t.loss_weights["distillation_loss"], t.teacher.asked)),
    )
    forward, trainer.teacher.asked = trainer.teacher.forward, 0

    def counted(*args):
        trainer.teacher.asked += 1
        return forward(*args)

    trainer.teacher.forward = counted
    trainer.train(1, 2)
    # A loss without a weight does not ask the teacher.
    assert seen == [(4, 1), (4, 2), (4, 3), (3, 4), (2, 5), (1, 6), (0, 6), (0, 6)]


def test_parts_of_several_losses_are_logged_by_name(make_trainer):
    parts = {"pairs": RelativeTeacherLoss(), "angles": RKDAngleLoss()}
    trainer = make_trainer(
        loss_funcs={"distillation_loss": MultipleDistillationLosses(parts, {"pairs": 1, "angles": 2})},
        loss_weights={"distillation_loss": 0.5},
        accumulation_steps=2,
    )
    trainer.train()
    mean = trainer.epoch_losses
    total = 0.5 * (mean["distillation_loss_pairs"] + 2 * mean["distillation_loss_angles"])
    assert torch.allclose(mean["total_loss"], total) and torch.allclose(mean["distillation_loss"], total)


def test_teachers_that_are_plain_networks_or_functions(make_trainer):
    plain = network(out=7, seed=1).requires_grad_(False).eval()
    results = []
    for teacher in (plain, lambda data: plain(data), FrozenTeacher(plain)):
        trainer = make_trainer(teacher=teacher, dataset=Shaped(lambda data, label, i: (data, label)))
        torch.manual_seed(0)
        trainer.train()
        results.append(weights(trainer))
    assert all(torch.equal(results[0][key], other[key]) for other in results[1:] for key in other)


def test_a_classifier_takes_text_labels(make_trainer):
    trunk, classifier = network(), nn.Linear(5, 4)
    trainer = make_trainer(
        DistillationWithClassifier,
        dataset=Shaped(text),
        models={"trunk": trunk, "classifier": classifier},
        optimizers={"trunk_optimizer": torch.optim.Adam([*trunk.parameters(), *classifier.parameters()], 0.01)},
        loss_funcs={"classifier_loss": nn.CrossEntropyLoss(), "distillation_loss": RelativeTeacherLoss()},
        iterations_per_epoch=20,
    )
    trainer.train()
    first = trainer.epoch_losses["classifier_loss"]
    trainer.train(2, 3)
    assert trainer.epoch_losses["classifier_loss"] < first
