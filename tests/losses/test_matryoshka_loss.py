import pytest
import torch
from pytorch_metric_learning.losses import MultiSimilarityLoss, ProxyAnchorLoss
from test_contract import embeddings

from pml_distill import losses
from pml_distill.losses import (
    AbsoluteTeacherLoss,
    MatryoshkaLoss,
    MultipleDistillationLosses,
    RelativeTeacherLoss,
    SimilarityDistributionLoss,
)

ENTRIES = [e for e in losses.catalogue() if e.family != "feature maps" and "queue" not in e.needs]


def batch(width=6):
    return embeddings(8, dtype=torch.float64), embeddings(8, width, seed=1, dtype=torch.float64)


@pytest.mark.parametrize("entry", ENTRIES, ids=lambda entry: entry.name)
def test_the_full_width_alone_is_the_bare_loss(entry):
    student, teacher = batch()
    loss = getattr(losses, entry.name)()
    assert torch.equal(MatryoshkaLoss(loss, widths=[6])(student, ref_emb=teacher), loss(student, ref_emb=teacher))


@pytest.mark.parametrize("entry", ENTRIES, ids=lambda entry: entry.name)
def test_only_losses_of_equal_widths_cut_the_teacher(entry):
    student, teacher = batch()
    loss = getattr(losses, entry.name)()
    parts = [loss(student[:, :w], ref_emb=teacher[:, :w] if loss.equal_widths else teacher) for w in (2, 4, 6)]
    nested = MatryoshkaLoss(loss, widths=(2, 4, 6), weights=(1, 0.5, 2))
    assert torch.allclose(nested(student, ref_emb=teacher), parts[0] + 0.5 * parts[1] + 2 * parts[2], rtol=1e-12)
    assert nested.sub_losses == dict(zip(("width_2", "width_4", "width_6"), parts))


def test_of_several_losses_each_sees_the_teacher_that_it_needs():
    student, teacher = batch(9)
    nested = MatryoshkaLoss(MultipleDistillationLosses([AbsoluteTeacherLoss(), RelativeTeacherLoss()]), (2, 4))
    expected = sum(
        AbsoluteTeacherLoss()(student[:, :w], ref_emb=teacher[:, :w])
        + RelativeTeacherLoss()(student[:, :w], ref_emb=teacher)
        for w in (2, 4)
    )
    assert torch.allclose(nested(student, ref_emb=teacher), expected, rtol=1e-12)


def test_a_loss_of_pml_needs_no_teacher():
    student, labels = batch()[0].requires_grad_(), torch.arange(8) // 2
    nested = MatryoshkaLoss(MultiSimilarityLoss(), widths=(3, 6))
    value = nested(student, labels)
    assert torch.equal(value, sum(MultiSimilarityLoss()(student[:, :w], labels) for w in (3, 6)))
    value.backward()
    assert nested.needs_labels and not MatryoshkaLoss(RelativeTeacherLoss()).needs_labels


def test_losses_with_proxies_or_a_queue_are_given_one_for_each_width():
    student, labels = batch()[0].float(), torch.arange(8) // 2
    proxies = [ProxyAnchorLoss(4, w) for w in (3, 6)]
    value = MatryoshkaLoss(proxies, widths=(3, 6))(student, labels)
    assert torch.equal(value, sum(loss(student[:, : loss.proxies.shape[1]], labels) for loss in proxies))
    with pytest.raises(ValueError, match=r"ProxyAnchorLoss has proxies for one width only; .* \(3, 6\)"):
        MatryoshkaLoss(proxies[0], widths=(3, 6))
    with pytest.raises(ValueError, match=r"SimilarityDistributionLoss has queue.rows for one width only"):
        MatryoshkaLoss(SimilarityDistributionLoss(16, 6), widths=(3, 6))


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"widths": ()}, r"widths must be different numbers of coordinates, each at least 1, but is \(\)"),
        ({"widths": (0, 4)}, r"but is \(0, 4\)"),
        ({"widths": (4, 4)}, r"but is \(4, 4\)"),
        ({"widths": (2, 4), "weights": [1]}, "weights must be one for each of the 2 losses, but there are 1"),
    ],
)
def test_wrong_widths_are_named(arguments, message):
    with pytest.raises(ValueError, match=message):
        MatryoshkaLoss(RelativeTeacherLoss(), **arguments)


def test_embeddings_that_are_too_narrow_are_named():
    with pytest.raises(ValueError, match=r"widths go up to 128, but embeddings has shape \(8, 6\)"):
        MatryoshkaLoss(RelativeTeacherLoss())(*batch()[:1], ref_emb=batch()[1])
