import pytest
import torch
from golden import cases, closed_form

from pml_distill.losses import RKDAngleLoss


@cases("rkd_angle")
def test_equals_the_authors_loss_up_to_its_divisor(case):
    size = len(case.student)
    case.check(((size - 1) / size) ** 2 * RKDAngleLoss()(case.student, ref_emb=case.teacher))


def test_figure_of_the_closed_form_example():
    student, teacher = closed_form()
    assert RKDAngleLoss()(student, ref_emb=teacher).item() * (7 / 8) ** 2 == pytest.approx(0.049806, rel=1e-5)


def direct(student, teacher, pairs):
    """The definition, vertex by vertex: unit arms, all their inner products."""
    values = []
    for vertex in range(len(student)):
        ends = [end for end in range(len(student)) if (vertex, end) in pairs]
        if ends:
            arms = [torch.nn.functional.normalize(x[ends] - x[vertex]) for x in (student, teacher)]
            values.append(torch.nn.functional.smooth_l1_loss(arms[0] @ arms[0].t(), arms[1] @ arms[1].t()))
    return torch.stack(values).mean()


@pytest.mark.parametrize("mined", [False, True])
@pytest.mark.parametrize("shortest", [1, 3, 64])
@pytest.mark.parametrize("chunk", [1, 30, 2**20])
def test_equals_the_definition_whatever_the_blocks(monkeypatch, chunk, shortest, mined):
    monkeypatch.setattr("pml_distill.losses.rkd_angle_loss.CHUNK", chunk)
    monkeypatch.setattr("pml_distill.losses.rkd_angle_loss.SHORTEST", shortest)
    student, teacher = closed_form()
    student.requires_grad_()
    pairs = {(i, j) for i in range(8) for j in range(8) if i != j}
    indices = None
    if mined:
        indices = tuple(torch.tensor(x) for x in ([0, 0, 3, 5], [1, 4, 4, 6], [2, 5, 5, 7]))
        pairs = {pair for a, p, n in zip(*(x.tolist() for x in indices)) for pair in ((a, p), (a, n))}
    values = RKDAngleLoss()(student, None, indices, teacher), direct(student, teacher, pairs)
    gradients = [torch.autograd.grad(value, student)[0] for value in values]
    assert values[0].item() == pytest.approx(values[1].item())
    assert torch.allclose(*gradients)


def test_neither_scale_nor_shift_matters():
    student, teacher = closed_form()
    value = RKDAngleLoss()(5 * student + 3, ref_emb=teacher)
    assert value.item() == pytest.approx(RKDAngleLoss()(student, ref_emb=teacher).item())


def test_gradients_stay_small_where_only_the_student_has_duplicates():
    student, teacher = (x.float() for x in closed_form())
    student[1] = student[0]
    student.requires_grad_()
    RKDAngleLoss()(student, ref_emb=teacher).backward()
    assert student.grad.norm() < 1


def test_float32_stays_near_float64():
    generator = torch.Generator().manual_seed(0)
    student, teacher = (torch.randn(64, 128, generator=generator, dtype=torch.float64) for _ in range(2))
    exact = RKDAngleLoss()(student, ref_emb=teacher)
    assert RKDAngleLoss()(student.float(), ref_emb=teacher.float()).item() == pytest.approx(exact.item(), rel=1e-5)


@pytest.mark.parametrize("factor", [300, 30_000])
def test_a_sample_far_out_leaves_the_others_their_angles(factor):
    generator = torch.Generator().manual_seed(0)
    student, teacher = (torch.randn(16, 8, generator=generator, dtype=torch.float64) for _ in range(2))
    far = student.clone()
    far[3] *= factor
    exact = direct(far, teacher, {(i, j) for i in range(16) for j in range(16) if i != j})
    assert RKDAngleLoss()(far.float(), ref_emb=teacher.float()).item() == pytest.approx(exact.item(), rel=1e-4)
