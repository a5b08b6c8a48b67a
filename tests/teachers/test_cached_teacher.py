"""A cache in training: the same losses as with the network, in trainers and ensembles; wrong data are refused."""

import pytest
import torch
from pytorch_metric_learning.losses import MultiSimilarityLoss
from pytorch_metric_learning.samplers import MPerClassSampler
from pytorch_metric_learning.utils import common_functions as c_f
from torch import nn

from pml_distill.datasets import CrossQuality, Glyphs, LabeledAndUnlabeled, PartiallyLabeled, SeededViews
from pml_distill.losses import (
    AttentionTransferLoss,
    DarkRankLoss,
    LogitDistillationLoss,
    PooledFeatureLoss,
    RelativeTeacherLoss,
)
from pml_distill.models import SmallResNet
from pml_distill.samplers import MixedSampler
from pml_distill.teachers import CachedTeacher, EnsembleTeacher, FrozenTeacher, TeacherCache
from pml_distill.trainers import DistillationWithClassifier

VIEWS = 2


def network(width, seed):
    torch.manual_seed(seed)
    return SmallResNet(width)


@pytest.fixture(scope="module")
def dataset():
    return SeededViews(Glyphs("val", size=16, augment=True), seed=3, views=VIEWS)


@pytest.fixture(scope="module")
def live():
    return FrozenTeacher(network(8, seed=1))


@pytest.fixture(scope="module")
def classifier():
    torch.manual_seed(2)
    return nn.Linear(32, 100)


@pytest.fixture(scope="module")
def cached(tmp_path_factory, dataset, live):
    folder = tmp_path_factory.mktemp("cache")
    TeacherCache(folder, live, dataset, batch_size=256, features=["layer2"]).write()
    return CachedTeacher(folder, dataset, live)


def train(dataset, teacher, classifier=None, num_workers=0, sampler=None, **changes):
    """Return the losses of 20 steps."""
    models = {"trunk": network(8, seed=0), "classifier": nn.Linear(32, 100)}
    losses = []
    torch.manual_seed(5)
    c_f.NUMPY_RANDOM.seed(5)
    parts = {
        "loss_funcs": {
            "metric_loss": MultiSimilarityLoss(),
            "distillation_loss": DarkRankLoss(list_length=4),
            "logit_distillation_loss": LogitDistillationLoss(temperature=4),
            "feature_distillation_loss": PooledFeatureLoss(),
        },
        "student_features": ["layer2"],
        "teacher_features": ["layer2"],
        "teacher_classifier": classifier,
    }
    trainer = DistillationWithClassifier(
        models=models,
        optimizers={"trunk_optimizer": torch.optim.Adam(models["trunk"].parameters(), lr=0.003)},
        batch_size=32,
        dataset=dataset,
        teacher=teacher,
        sampler=sampler or MPerClassSampler(dataset.labels, 4, 32, 640),
        iterations_per_epoch=20,
        data_device=torch.device("cpu"),
        dataloader_num_workers=num_workers,
        end_of_iteration_hook=lambda t: losses.append({k: float(v) for k, v in t.losses.items()}),
        **parts | changes,
    )
    trainer.train(1, 1)
    return losses


def only(**losses):
    """Return what ``train`` needs for these losses, none of which takes features."""
    return {"loss_funcs": losses, "student_features": [], "teacher_features": []}


@pytest.mark.parametrize("num_workers", [0, 2])
def test_the_losses_are_those_with_the_network(dataset, live, cached, classifier, num_workers):
    runs = [train(dataset, teacher, classifier, num_workers) for teacher in (live, cached)]
    assert len(runs[0]) == 20 and len(runs[0][0]) == 5
    for ours, theirs in zip(*runs):
        assert ours == pytest.approx(theirs, rel=1e-6)
    assert runs[0][-1]["total_loss"] < runs[0][0]["total_loss"]


def test_partly_labelled_data_of_two_qualities(dataset, live, cached):
    few = PartiallyLabeled(CrossQuality(dataset, lambda image: image / 2), 0.5, labels=dataset.labels)
    changes = only(metric_loss=MultiSimilarityLoss(), distillation_loss=DarkRankLoss())
    sampler = MixedSampler(few.labels, 2, 32, 0.5, 640)
    runs = [train(few, teacher, sampler=sampler, **changes) for teacher in (live, cached)]
    for ours, theirs in zip(*runs):
        assert ours == pytest.approx(theirs, rel=1e-6)


def test_data_with_and_without_labels_in_one_cache(tmp_path, live):
    labeled = Glyphs("val", size=16, augment=True)
    images = [image for image, _ in Glyphs("train", size=16, augment=False).__getitems__(range(200))]
    dataset = SeededViews(LabeledAndUnlabeled(labeled, images), seed=3, views=VIEWS)
    TeacherCache(tmp_path, live, dataset, batch_size=256).write()
    changes = only(metric_loss=MultiSimilarityLoss(), distillation_loss=DarkRankLoss())
    sampler = MixedSampler(dataset.labels, 2, 32, 0.5, 640)
    runs = [train(dataset, t, sampler=sampler, **changes) for t in (live, CachedTeacher(tmp_path, dataset, live))]
    for ours, theirs in zip(*runs):
        assert ours == pytest.approx(theirs, rel=1e-6)


def test_the_same_data_serve_again(live, cached):
    again = SeededViews(Glyphs("val", size=16, augment=True), seed=3, views=VIEWS)
    changes = only(distillation_loss=DarkRankLoss())
    assert train(again, cached, **changes)[0] == pytest.approx(train(again, live, **changes)[0], rel=1e-6)


def test_two_caches_in_an_ensemble(tmp_path, dataset, live, cached):
    other = FrozenTeacher(network(4, seed=7))
    TeacherCache(tmp_path, other, dataset, batch_size=256).write()
    changes = {
        "loss_funcs": {"distillation_loss": RelativeTeacherLoss()},
        "student_features": (),
        "teacher_features": (),
    }
    caches = [cached, CachedTeacher(tmp_path, dataset, other)]
    runs = [train(dataset, EnsembleTeacher(t, [2, 1]), **changes) for t in ([live, other], caches)]
    for ours, theirs in zip(*runs):
        assert ours == pytest.approx(theirs, rel=1e-5)


def test_in_an_ensemble(dataset, live, cached):
    data, _, rows = next(iter(torch.utils.data.DataLoader(dataset, 8)))
    joint = EnsembleTeacher([cached, live], weights=[2, 1])
    assert torch.allclose(joint(data, rows), EnsembleTeacher([live, live], [2, 1])(data, rows), atol=1e-5)


def test_cached_logits_are_those_of_the_classifier(tmp_path, dataset, live, classifier):
    TeacherCache(tmp_path, live, dataset, batch_size=256, classifier=classifier).write()
    changes = only(logit_distillation_loss=LogitDistillationLoss(temperature=4))
    with_logits = CachedTeacher(tmp_path, dataset)
    for ours, theirs in zip(train(dataset, live, classifier, **changes), train(dataset, with_logits, **changes)):
        assert ours == pytest.approx(theirs, rel=1e-6)


def test_without_logits_the_error_names_both_ways(dataset, cached):
    with pytest.raises(ValueError, match="needs teacher_classifier.*written with a classifier.*CachedTeacher without"):
        train(dataset, cached, **only(logit_distillation_loss=LogitDistillationLoss()))


WRAPPERS = [lambda t: t, lambda t: EnsembleTeacher([t]), lambda t: EnsembleTeacher([EnsembleTeacher([t])])]


@pytest.mark.parametrize("wrap", WRAPPERS)
def test_a_trainer_refuses_data_that_are_not_the_caches(dataset, cached, wrap):
    changes = only(distillation_loss=DarkRankLoss())
    for other in (
        dataset.dataset,
        Glyphs("val", size=16, return_index=True),
        SeededViews(dataset.dataset, seed=3, views=VIEWS + 1),
        SeededViews(dataset.dataset, seed=4, views=VIEWS),
        SeededViews(Glyphs("val", size=16, augment=True, seed=1), seed=3, views=VIEWS),
        SeededViews(dataset, seed=3, views=VIEWS),
    ):
        with pytest.raises(ValueError, match="cache of SeededViews with {'length': .*its rows mean nothing for"):
            train(other, wrap(cached), **changes)


def test_features_that_are_not_cached_are_refused(dataset, cached, classifier):
    with pytest.raises(ValueError, match=r"no features of \['layer3'\], but of \['layer2'\]"):
        train(dataset, cached, classifier, student_features=["layer3"], teacher_features=["layer3"])
    with pytest.raises(ValueError, match="has no logits; write one with a classifier"):
        cached.logits(torch.tensor([0]))


def test_pooled_features_have_no_attention(dataset, cached):
    losses = {"feature_distillation_loss": AttentionTransferLoss()}
    with pytest.raises(ValueError, match="one place is always alike. A cached teacher's features"):
        train(dataset, cached, loss_funcs=losses)


def test_no_rows_at_all(cached):
    assert cached(torch.zeros(0, 1), torch.empty(0, dtype=torch.long)).shape == (0, 32)


def test_wrong_indices_are_refused(dataset, cached):
    with pytest.raises(ValueError, match=r"needs the index of each sample: a batch must be \(data, labels, index\)"):
        cached(torch.zeros(2))
    for index in ([0, -1], [dataset.num_rows, 3]):
        with pytest.raises(IndexError, match=f"index must be from 0 to {dataset.num_rows - 1}.*{min(index)} to"):
            cached(torch.zeros(2), torch.tensor(index))
    for index in (torch.tensor([0.0, 1.0]), torch.tensor([[0], [1]]), torch.tensor([True, False])):
        with pytest.raises(ValueError, match=r"index must hold integers and have the shape \(batch,\), but is torch\."):
            cached(torch.zeros(2), index)
    with pytest.raises(ValueError, match=r"index must have one row for each sample, but has 3 for data of \(2, 5\)"):
        cached(torch.zeros(2, 5), torch.tensor([0, 1, 2]))
    with pytest.raises(ValueError, match="dataset must be the SeededViews .* but is a Glyphs"):
        CachedTeacher(cached.file.folder, dataset.dataset)
