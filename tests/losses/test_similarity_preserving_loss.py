import pytest
import torch
from golden import cases, closed_form

from pml_distill.losses import SimilarityPreservingLoss


@cases("similarity_preserving")
def test_equals_the_authors_loss(case):
    case.check(SimilarityPreservingLoss()(case.student, ref_emb=case.teacher))


def test_figure_of_the_closed_form_example():
    student, teacher = closed_form()
    assert SimilarityPreservingLoss()(student, ref_emb=teacher).item() == pytest.approx(0.074339, abs=1e-6)


def test_a_miners_pairs_are_the_candidates():
    student, teacher = closed_form()
    chosen = torch.tensor([0, 1, 3])
    rows = [torch.nn.functional.normalize(x[0] @ x[chosen].t(), dim=0) for x in (student, teacher)]
    value = SimilarityPreservingLoss()(student, None, tuple(torch.tensor([x]) for x in (0, 1, 3)), teacher)
    assert value.item() == pytest.approx((rows[0] - rows[1]).square().mean().item())
