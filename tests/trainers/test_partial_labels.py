import pytest
import torch
from conftest import Blobs, network, weights
from pytorch_metric_learning.losses import ContrastiveLoss, TripletMarginLoss
from pytorch_metric_learning.miners import MultiSimilarityMiner
from pytorch_metric_learning.samplers import MPerClassSampler

from pml_distill.datasets import CrossQuality, Glyphs, LabeledAndUnlabeled, PartiallyLabeled, Views
from pml_distill.losses import (
    AbsoluteTeacherLoss,
    DarkRankLoss,
    HintLoss,
    LogitDistillationLoss,
    RelativeTeacherLoss,
)
from pml_distill.miners import TeacherMiner, TeacherNeighborMiner, TeacherRankMiner
from pml_distill.models import SmallResNet
from pml_distill.samplers import MixedSampler
from pml_distill.teachers import FrozenTeacher
from pml_distill.trainers import DistillationTrainer, DistillationWithClassifier

LABELS = torch.tensor([0, -1, 1, 1, -1, 0, 2, 2])


class Recorder(torch.nn.Module):
    """Passes on to a loss or miner and remembers what it was given."""

    def __init__(self, inner):
        super().__init__()
        self.inner, self.calls = inner, []

    def forward(self, *args, **kwargs):
        self.calls.append((args, kwargs))
        return self.inner(*args, **kwargs)


def batch_of(labels, width=6):
    torch.manual_seed(2)
    return torch.randn(len(labels), width), labels


def test_the_metric_loss_and_its_miner_see_the_labelled_rows_and_the_distillation_loss_all(make_trainer):
    metric, distillation, miner = map(Recorder, (TripletMarginLoss(), DarkRankLoss(), MultiSimilarityMiner()))
    trainer = make_trainer(
        loss_funcs={"metric_loss": metric, "distillation_loss": distillation}, mining_funcs={"tuple_miner": miner}
    )
    data, labels = batch_of(LABELS)
    losses = trainer.training_step((data, labels))
    ((embeddings, known, mined), _), ((all_rows, *given), reference) = metric.calls[0], distillation.calls[0]
    kept = torch.tensor([0, 2, 3, 5, 6, 7])
    assert torch.equal(known, labels[kept]) and torch.equal(embeddings, all_rows[kept])
    assert torch.equal(miner.calls[0][0][0], embeddings) and all(i.max() < 6 for i in mined)
    assert given == [None, None] and len(all_rows) == len(reference["ref_emb"]) == 8
    assert losses["metric_loss"] > 0 and losses["distillation_loss"] > 0


@pytest.mark.parametrize("miner", [TeacherNeighborMiner(2), TeacherRankMiner(2)])
def test_a_miner_that_needs_no_labels_mines_all_rows_for_the_distillation_loss(make_trainer, miner):
    metric, distillation = Recorder(TripletMarginLoss()), Recorder(DarkRankLoss())
    trainer = make_trainer(
        loss_funcs={"metric_loss": metric, "distillation_loss": distillation}, mining_funcs={"tuple_miner": miner}
    )
    trainer.training_step(batch_of(LABELS))
    ((embeddings, _, own), _), ((all_rows, labels, mined), given) = metric.calls[0], distillation.calls[0]
    assert labels is None and len(all_rows) == 8 and len(embeddings) == 6
    for found, expected in zip(mined, miner(all_rows, None, ref_emb=given["ref_emb"])):
        assert torch.equal(found, expected)
    assert {1, 4} & set(torch.cat(mined).tolist()) and all(i.max() < 6 for i in own if len(i))


def test_a_miner_that_needs_labels_leaves_the_distillation_loss_alone(make_trainer):
    distillation = Recorder(DarkRankLoss())
    trainer = make_trainer(
        loss_funcs={"metric_loss": TripletMarginLoss(), "distillation_loss": distillation},
        mining_funcs={"tuple_miner": TeacherMiner(MultiSimilarityMiner())},
    )
    trainer.training_step(batch_of(LABELS))
    assert distillation.calls[0][0][1:] == (None, None)


class RecordingContrastiveLoss(ContrastiveLoss):
    def forward(self, embeddings, labels, indices_tuple, ref_emb):
        self.given = embeddings, labels, indices_tuple, ref_emb
        return super().forward(embeddings, labels, indices_tuple, ref_emb)


@pytest.mark.parametrize("miner", [{}, {"distillation_miner": TeacherNeighborMiner(2)}], ids=["plain", "mined"])
def test_a_loss_of_pml_against_the_teacher_sees_the_labelled_rows(make_trainer, miner):
    loss = RecordingContrastiveLoss()
    trainer = make_trainer(
        loss_funcs={"distillation_loss": loss}, mining_funcs=miner, teacher=FrozenTeacher(network(seed=1))
    )
    data, labels = batch_of(LABELS)
    kept = labels >= 0
    expected = trainer.models["trunk"](data)[kept]
    losses = trainer.training_step((data, labels))
    embeddings, known, mined, teacher = loss.given
    assert torch.allclose(embeddings, expected) and torch.equal(known, labels[kept])
    assert torch.equal(teacher, trainer.teacher(data)[kept]) and losses["distillation_loss"] > 0
    pairs = miner["distillation_miner"](embeddings, known, ref_emb=teacher) if miner else ()
    assert all(map(torch.equal, mined or (), pairs)) and len(mined or ()) == len(pairs)
    assert trainer.training_step(batch_of(torch.full((8,), -1)))["distillation_loss"] == 0


@pytest.mark.parametrize("labels", [LABELS, LABELS.abs()], ids=["partly", "all"])
def test_a_distillation_miner_mines_for_the_distillation_loss_alone(make_trainer, labels):
    metric, distillation, miner = Recorder(TripletMarginLoss()), Recorder(DarkRankLoss()), TeacherNeighborMiner(2)
    trainer = make_trainer(
        loss_funcs={"metric_loss": metric, "distillation_loss": distillation},
        mining_funcs={"distillation_miner": miner, "tuple_miner": MultiSimilarityMiner()},
    )
    trainer.training_step(batch_of(labels))
    ((embeddings, known, own), _), ((all_rows, given_labels, mined), given) = metric.calls[0], distillation.calls[0]
    assert (given_labels is None) == bool((labels < 0).any())
    for found, expected in zip(mined, miner(all_rows, given_labels, ref_emb=given["ref_emb"])):
        assert torch.equal(found, expected)
    for found, expected in zip(own, MultiSimilarityMiner()(embeddings, known)):
        assert torch.equal(found, expected)


def test_a_distillation_miner_that_needs_labels_leaves_partly_labelled_batches_whole(make_trainer):
    distillation = Recorder(DarkRankLoss())
    trainer = make_trainer(
        loss_funcs={"distillation_loss": distillation},
        mining_funcs={"distillation_miner": TeacherMiner(MultiSimilarityMiner())},
    )
    trainer.training_step(batch_of(LABELS))
    trainer.training_step(batch_of(LABELS.abs()))
    assert distillation.calls[0][0][2] is None and distillation.calls[1][0][2] is not None


@pytest.mark.parametrize(
    ("miner", "loss", "message"),
    [
        (MultiSimilarityMiner(), "distillation_loss", "must be a miner of pml_distill.miners.*MultiSimilarityMiner"),
        (TeacherNeighborMiner(2), "metric_loss", 'serves loss_funcs\\["distillation_loss"\\], which is not there'),
        (
            TeacherNeighborMiner(2),
            "pointwise",
            "but AbsoluteTeacherLoss, .*distillation_loss.*, takes none",
        ),
    ],
)
def test_a_distillation_miner_asks_the_teacher_for_a_loss_that_takes_its_pairs(make_trainer, miner, loss, message):
    losses = {
        "metric_loss": {"metric_loss": ContrastiveLoss()},
        "distillation_loss": {"distillation_loss": RelativeTeacherLoss()},
        "pointwise": {"distillation_loss": AbsoluteTeacherLoss()},
    }
    with pytest.raises(ValueError, match=message):
        make_trainer(loss_funcs=losses[loss], mining_funcs={"distillation_miner": miner})


def test_the_gradient_is_that_of_the_two_losses_on_their_rows(make_trainer):
    data, labels = batch_of(LABELS)
    trainer, by_hand = make_trainer(), make_trainer()
    gradients = []
    trainer.gradient_clippers = {
        "trunk_grad_clipper": lambda: gradients.extend(p.grad.clone() for p in trainer.models["trunk"].parameters())
    }
    trainer.training_step((data, labels))
    embeddings, kept = by_hand.models["trunk"](data), labels >= 0
    loss = ContrastiveLoss()(embeddings[kept], labels[kept])
    loss = loss + RelativeTeacherLoss()(embeddings, ref_emb=by_hand.teacher(data, None))
    loss.backward()
    for gradient, parameter in zip(gradients, by_hand.models["trunk"].parameters()):
        assert torch.allclose(gradient, parameter.grad, atol=1e-6)


def test_nothing_changes_where_all_rows_are_labelled(make_trainer):
    metric, distillation = Recorder(TripletMarginLoss()), Recorder(DarkRankLoss())
    trainer = make_trainer(
        loss_funcs={"metric_loss": metric, "distillation_loss": distillation},
        mining_funcs={"tuple_miner": MultiSimilarityMiner()},
    )
    data, labels = batch_of(LABELS.abs())
    trainer.training_step((data, labels))
    ((embeddings, known, mined), _), ((all_rows, *given), _) = metric.calls[0], distillation.calls[0]
    assert embeddings is all_rows and known is labels and given[0] is labels and given[1] is mined


def test_a_batch_without_any_label_has_no_metric_loss(make_trainer):
    miner = Recorder(MultiSimilarityMiner())
    trainer = make_trainer(mining_funcs={"tuple_miner": miner})
    losses = trainer.training_step(batch_of(torch.full((8,), -1)))
    assert losses["metric_loss"] == 0 and losses["distillation_loss"] > 0 and not miner.calls
    alone = make_trainer(teacher=None, loss_funcs={"metric_loss": ContrastiveLoss()})
    before = weights(alone)
    alone.training_step(batch_of(torch.full((8,), -1)))
    assert all(torch.equal(before[k], v) for k, v in weights(alone).items() if "running" not in k and "num" not in k)


def test_multi_hot_labels_are_missing_where_the_whole_row_is_minus_one(make_trainer):
    from pml_distill.losses import DeepCauchyHashingLoss

    labels = torch.tensor([[1, 0], [-1, -1], [0, 1], [1, 1]])
    loss = Recorder(DeepCauchyHashingLoss())
    trainer = make_trainer(loss_funcs={"metric_loss": loss, "distillation_loss": RelativeTeacherLoss()})
    trainer.training_step(batch_of(labels))
    assert torch.equal(loss.calls[0][0][1], labels[[0, 2, 3]])


def test_the_classifier_learns_from_the_labelled_rows_and_its_teacher_from_all(make_trainer):
    trunk, classifier = network(), torch.nn.Linear(5, 3)
    classifier_loss, logit_loss = Recorder(torch.nn.CrossEntropyLoss()), Recorder(LogitDistillationLoss(4))
    trainer = make_trainer(
        DistillationWithClassifier,
        models={"trunk": trunk, "classifier": classifier},
        optimizers={"trunk_optimizer": torch.optim.Adam([*trunk.parameters(), *classifier.parameters()])},
        loss_funcs={"classifier_loss": classifier_loss, "logit_distillation_loss": logit_loss},
        teacher_classifier=torch.nn.Linear(7, 3),
    )
    losses = trainer.training_step(batch_of(LABELS))
    assert torch.equal(classifier_loss.calls[0][0][1], LABELS[LABELS >= 0])
    assert len(logit_loss.calls[0][0][0]) == 8 and logit_loss.calls[0][0][1] is None
    assert losses["classifier_loss"] > 0 and losses["logit_distillation_loss"] > 0
    assert trainer.training_step(batch_of(torch.full((4,), -1)))["classifier_loss"] == 0


def test_minus_one_survives_the_mapping_of_labels(make_trainer):
    dataset = PartiallyLabeled(Blobs(), 0.5)
    dataset.labels[dataset.labels >= 0] += 10
    metric = Recorder(ContrastiveLoss())
    trainer = make_trainer(
        dataset=dataset,
        loss_funcs={"metric_loss": metric, "distillation_loss": RelativeTeacherLoss()},
        dataset_labels=dataset.labels.numpy(),
        set_min_label_to_zero=True,
    )
    trainer.train(1, 2)
    assert torch.cat([args[1] for args, _ in metric.calls]).unique().tolist() == [0, 1, 2, 3]


@pytest.mark.parametrize("labels", [LABELS, LABELS.abs(), torch.full((8,), -1)])
def test_a_subset_miner_chooses_among_the_labelled_rows_and_the_others_stay(make_trainer, labels):
    class FirstHalf(torch.nn.Module):
        def forward(self, embeddings, labels):
            assert (labels >= 0).all() and len(labels) == len(embeddings)
            return torch.arange(len(labels) // 2)

    trainer = make_trainer(mining_funcs={"subset_batch_miner": FirstHalf()})
    data, _ = batch_of(labels)
    kept = trainer.mine_subset(Views(data, data), labels)
    chosen = (labels >= 0).nonzero().flatten()
    expected = torch.cat([chosen[: len(chosen) // 2], (labels < 0).nonzero().flatten()]).sort().values
    assert torch.equal(kept.sort().values, expected)


def test_a_run_on_partial_labels_resumes_as_if_never_interrupted(make_trainer, tmp_path):
    def trainer(hook=None):
        torch.manual_seed(0)
        dataset = LabeledAndUnlabeled(PartiallyLabeled(Blobs(), 0.5), Blobs(32))
        return make_trainer(
            dataset=dataset,
            sampler=MixedSampler(dataset.labels, 2, 16, 0.4),
            iterations_per_epoch=4,
            end_of_epoch_hook=hook,
        )

    straight = trainer()
    torch.manual_seed(5)
    straight.train(1, 3)
    interrupted = trainer(lambda t: t.save_checkpoint(tmp_path / "checkpoint.pth"))
    torch.manual_seed(5)
    interrupted.train(1, 2)
    resumed = trainer()
    resumed.train(resumed.load_checkpoint(tmp_path / "checkpoint.pth"), 3)
    assert all(torch.equal(v, weights(resumed)[k]) for k, v in weights(straight).items())


def glyph_trainer(cls=DistillationTrainer, **changes):
    torch.manual_seed(0)
    trunk = SmallResNet(4)
    parts = {
        "models": {"trunk": trunk},
        "optimizers": {"trunk_optimizer": torch.optim.Adam(trunk.parameters(), lr=0.01)},
        "batch_size": 16,
        "loss_funcs": {"metric_loss": ContrastiveLoss(), "distillation_loss": RelativeTeacherLoss()},
        "teacher": FrozenTeacher(SmallResNet(8)),
        "data_device": torch.device("cpu"),
        "dataloader_num_workers": 0,
        "iterations_per_epoch": 3,
    }
    return cls(**parts | changes)


def test_student_and_teacher_see_their_own_views_of_glyphs():
    dataset = CrossQuality(PartiallyLabeled(Glyphs("val"), 0.25), lambda image: image[:, ::2, ::2])

    class Teacher(FrozenTeacher):
        def forward(self, data, index=None):
            shapes.append(data.shape)
            return super().forward(data, index)

    shapes = []
    trainer = glyph_trainer(
        dataset=dataset, sampler=MixedSampler(dataset.labels, 2, 16), teacher=Teacher(SmallResNet(8))
    )
    trainer.models["trunk"].register_forward_pre_hook(lambda module, args: shapes.append(args[0].shape))
    trainer.train(1, 1)
    assert shapes[:2] == [(16, 1, 16, 16), (16, 1, 32, 32)]
    assert trainer.epoch_losses["metric_loss"] > 0 and trainer.epoch_losses["distillation_loss"] > 0


def test_views_without_labels_are_no_labels():
    images = [image for image, _ in Glyphs("val").__getitems__(range(32))]
    trainer = glyph_trainer(
        dataset=CrossQuality(images, lambda image: -image), loss_funcs={"distillation_loss": RelativeTeacherLoss()}
    )
    trainer.train(1, 1)
    assert trainer.epoch_losses["distillation_loss"] > 0


def test_without_a_teacher_the_student_learns_from_its_view():
    dataset = CrossQuality(Glyphs("val"), lambda image: image[:, ::2, ::2])
    seen = []
    trainer = glyph_trainer(
        dataset=dataset,
        loss_funcs={"metric_loss": ContrastiveLoss()},
        teacher=None,
        sampler=MPerClassSampler(dataset.labels, 4, 16),
    )
    trainer.models["trunk"].register_forward_pre_hook(lambda module, args: seen.append(args[0].shape[-1]))
    trainer.train(1, 1)
    assert set(seen) == {16}


def test_feature_losses_take_all_rows_and_no_labels():
    loss = Recorder(HintLoss([16], [32]))
    dataset, trunk = PartiallyLabeled(Glyphs("val"), 0.25), SmallResNet(4)
    glyph_trainer(
        models={"trunk": trunk},
        optimizers={
            "trunk_optimizer": torch.optim.Adam(trunk.parameters()),
            "feature_distillation_loss_optimizer": torch.optim.Adam(loss.parameters()),
        },
        dataset=dataset,
        sampler=MixedSampler(dataset.labels, 2, 16),
        loss_funcs={"metric_loss": ContrastiveLoss(), "feature_distillation_loss": loss},
        student_features=["layer3"],
        teacher_features=["layer3"],
    ).train(1, 1)
    student, teacher, labels = loss.calls[0][0]
    assert labels is None and len(student[0]) == len(teacher[0]) == 16


def test_distillation_of_all_rows_lowers_the_loss_on_partial_labels(make_trainer):
    dataset = PartiallyLabeled(Blobs(), 0.2)
    trainer = make_trainer(
        dataset=dataset,
        teacher=FrozenTeacher(network(seed=1)),
        loss_funcs={"metric_loss": ContrastiveLoss(), "distillation_loss": AbsoluteTeacherLoss()},
        iterations_per_epoch=20,
        sampler=MixedSampler(dataset.labels, 2, 16, 0.25),
    )
    trainer.train(1, 1)
    first = trainer.epoch_losses["distillation_loss"]
    trainer.train(2, 4)
    assert trainer.epoch_losses["distillation_loss"] < first
