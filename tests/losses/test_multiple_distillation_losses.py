import pytest
import torch
from pytorch_metric_learning.losses import ContrastiveLoss
from pytorch_metric_learning.miners import MultiSimilarityMiner
from test_contract import embeddings

from pml_distill.losses import (
    AbsoluteTeacherLoss,
    DarkRankLoss,
    MultipleDistillationLosses,
    RelativeTeacherLoss,
    RKDAngleLoss,
    RKDDistanceLoss,
    RKDLoss,
)
from pml_distill.miners import TeacherMiner, TeacherNeighborMiner


def batch():
    return embeddings(8, dtype=torch.float64), embeddings(8, seed=1, dtype=torch.float64)


@pytest.mark.parametrize("weights", [None, [2, 0.5], {"AbsoluteTeacherLoss": 2, "RelativeTeacherLoss": 0.5}])
def test_it_is_the_weighted_sum(weights):
    student, teacher = batch()
    parts = [AbsoluteTeacherLoss()(student, ref_emb=teacher), RelativeTeacherLoss()(student, ref_emb=teacher)]
    loss = MultipleDistillationLosses([AbsoluteTeacherLoss(), RelativeTeacherLoss()], weights)
    first, second = (1, 1) if weights is None else (2, 0.5)
    assert torch.equal(loss(student, ref_emb=teacher), first * parts[0] + second * parts[1])
    assert loss.sub_losses == {"AbsoluteTeacherLoss": parts[0], "RelativeTeacherLoss": parts[1]}
    assert not any(value.requires_grad for value in loss.sub_losses.values())


def test_names():
    losses = [DarkRankLoss("soft"), AbsoluteTeacherLoss(), DarkRankLoss("hard")]
    named = MultipleDistillationLosses(losses)
    assert list(named.losses) == ["DarkRankLoss_0", "AbsoluteTeacherLoss", "DarkRankLoss_1"]
    assert list(MultipleDistillationLosses({"soft": losses[0], "hard": losses[2]}).losses) == ["soft", "hard"]


def test_rkd_is_distances_and_two_times_angles():
    student, teacher = batch()
    expected = RKDDistanceLoss()(student, ref_emb=teacher) + 2 * RKDAngleLoss()(student, ref_emb=teacher)
    assert torch.equal(RKDLoss()(student, ref_emb=teacher), expected)
    assert RKDLoss().takes_pairs


def test_pairs_and_miners():
    student, teacher = batch()
    labels = torch.arange(8) // 2
    near = TeacherNeighborMiner(2)
    found, pairs = near(student, labels, ref_emb=teacher), MultiSimilarityMiner()(student, labels)
    first, second = RelativeTeacherLoss(), DarkRankLoss()
    expected = first(student, labels, found, teacher) + second(student, labels, pairs, teacher)
    for miners in ([near, None], {"RelativeTeacherLoss": near}, [near, MultiSimilarityMiner()]):
        loss = MultipleDistillationLosses([first, second], miners=miners)
        given = None if None not in miners and len(miners) == 2 else pairs
        assert torch.equal(loss(student, labels, given, ref_emb=teacher), expected)
    judged = MultipleDistillationLosses([first], miners=[TeacherMiner(MultiSimilarityMiner())])
    pairs = MultiSimilarityMiner()(teacher, labels)
    assert torch.equal(judged(student, labels, ref_emb=teacher), first(student, labels, pairs, teacher))


def test_a_loss_of_pml_sees_the_teacher_as_its_reference():
    student, teacher, labels = *batch(), torch.arange(8) // 2
    loss = MultipleDistillationLosses([ContrastiveLoss(), RelativeTeacherLoss()])
    expected = ContrastiveLoss()(student, labels, ref_emb=teacher, ref_labels=labels.clone())
    value = loss(student, labels, ref_emb=teacher, ref_labels=labels.clone())
    assert torch.equal(value, expected + RelativeTeacherLoss()(student, ref_emb=teacher))
    assert loss.needs_labels and not RKDLoss().needs_labels


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (([],), "losses is empty"),
        (([AbsoluteTeacherLoss()], [1, 2]), "weights must be one for each of the 1 losses, but there are 2"),
        (({"a": AbsoluteTeacherLoss()}, {"b": 1}), r"weights must have the keys \['a'\], but has \['b'\]"),
        (({"a": AbsoluteTeacherLoss()}, None, {"b": None}), r"miners must have keys of \['a'\], but has \['b'\]"),
    ],
)
def test_what_does_not_go_together_is_named(arguments, message):
    with pytest.raises(ValueError, match=message):
        MultipleDistillationLosses(*arguments)
