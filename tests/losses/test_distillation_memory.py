import pytest
import torch
from pytorch_metric_learning.losses import ContrastiveLoss
from pytorch_metric_learning.miners import MultiSimilarityMiner
from test_contract import embeddings

from pml_distill.losses import (
    AbsoluteTeacherLoss,
    DarkRankLoss,
    DistillationMemory,
    MultipleDistillationLosses,
    RelativeTeacherLoss,
    RKDAngleLoss,
    RKDDistanceLoss,
    SimilarityPreservingLoss,
)
from pml_distill.miners import TeacherMiner, TeacherNeighborMiner

LOSSES = {
    "relative": RelativeTeacherLoss,
    "ranks": lambda: DarkRankLoss(list_length=3),
    "angles": RKDAngleLoss,
    "distances": RKDDistanceLoss,
    "rows": SimilarityPreservingLoss,
    "two": lambda: MultipleDistillationLosses([RelativeTeacherLoss(), RKDAngleLoss()]),
}


def steps(count=4):
    return [(embeddings(5, 6, i), embeddings(5, 9, 10 + i)) for i in range(count)]


def pairs_of_the_batch(size, others):
    first, second = zip(*((i, j) for i in range(size) for j in range(size + others) if i != j))
    nothing = torch.empty(0, dtype=torch.long)
    return torch.tensor(first), torch.tensor(second), nothing, nothing


@pytest.mark.parametrize("name", LOSSES)
def test_a_full_memory_gives_the_loss_of_all_rows_with_anchors_in_the_batch(name):
    loss = DistillationMemory(LOSSES[name](), embedding_size=6, memory_size=10, ref_size=9)
    for student, teacher in steps(3):
        loss(student, ref_emb=teacher)
    (s1, t1), (s2, t2), (s3, t3) = steps(4)[1:]
    student, teacher = torch.cat([s3, s1, s2]), torch.cat([t3, t1, t2])
    # The queue is a ring: its rows lie in another order.
    expected_student = student.clone().requires_grad_()
    expected = LOSSES[name]()(expected_student, None, pairs_of_the_batch(5, 10), teacher)
    s3 = s3.clone().requires_grad_()
    value = loss(s3, ref_emb=t3)
    assert value.item() == pytest.approx(expected.item(), rel=1e-5)
    gradients = torch.autograd.grad(value, s3)[0], torch.autograd.grad(expected, expected_student)[0][:5]
    assert torch.allclose(*gradients, atol=1e-6)


@pytest.mark.parametrize("name", [name for name in LOSSES if name != "distances"])
def test_an_empty_memory_gives_the_bare_loss(name):
    student, teacher = steps(1)[0]
    loss = DistillationMemory(LOSSES[name](), 6, 16, ref_size=9)
    assert loss(student, ref_emb=teacher).item() == pytest.approx(LOSSES[name]()(student, ref_emb=teacher).item())


def test_pairs_and_miners_choose_within_the_memory():
    loss = DistillationMemory(RelativeTeacherLoss(), 6, 10, ref_size=9, miner=TeacherNeighborMiner(2))
    for student, teacher in steps(2):
        loss(student, ref_emb=teacher)
    loss.eval()
    (s0, t0), (s1, t1), (s2, t2), _ = steps(4)
    student, teacher = torch.cat([s2, s0, s1]), torch.cat([t2, t0, t1])
    anchors, others, *nothing = TeacherNeighborMiner(2)(student, ref_emb=teacher)
    kept = anchors < 5
    expected = RelativeTeacherLoss()(student, None, (anchors[kept], others[kept], *nothing), teacher)
    assert loss(s2, ref_emb=t2).item() == pytest.approx(expected.item(), rel=1e-5)
    no_rows = torch.empty(0, dtype=torch.long)
    loss.miner = None
    among = [(i, j) for i in range(5) for j in range(15) if j >= 5 or (i, j) == (0, 3)]
    first, second = map(torch.tensor, zip(*among))
    expected = RelativeTeacherLoss()(student, None, (first, second, no_rows, no_rows), teacher)
    chosen = (torch.tensor([0]), torch.tensor([3]), no_rows, no_rows)
    assert loss(s2, None, chosen, t2).item() == pytest.approx(expected.item(), rel=1e-5)


def test_it_resumes_from_its_state():
    first, second = (DistillationMemory(RelativeTeacherLoss(), 6, 8, ref_size=9) for _ in range(2))
    for student, teacher in steps(3):
        first(student, ref_emb=teacher)
    second.load_state_dict(first.state_dict())
    student, teacher = steps(4)[3]
    assert torch.equal(first(student, ref_emb=teacher), second(student, ref_emb=teacher))


def test_empty_batches_labels_and_compilation():
    loss = DistillationMemory(RelativeTeacherLoss(), 6, 8, ref_size=9)
    student, teacher = steps(1)[0]
    student.requires_grad_()
    value = loss(student[:0], ref_emb=teacher[:0])
    value.backward()
    assert value == 0 and loss.queue.count == 0
    assert loss(student, torch.arange(5), ref_emb=teacher) > 0
    torch._dynamo.reset()
    compiled = torch.compile(loss.eval(), fullgraph=True, backend="aot_eager")
    assert torch.allclose(compiled(student, ref_emb=teacher), loss(student, ref_emb=teacher))


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ((AbsoluteTeacherLoss(), 6), "AbsoluteTeacherLoss takes no pairs"),
        (
            (MultipleDistillationLosses([RelativeTeacherLoss(), AbsoluteTeacherLoss()]), 6),
            "AbsoluteTeacherLoss takes no",
        ),
        ((ContrastiveLoss(), 6), "ContrastiveLoss takes no pairs"),
        (
            (RelativeTeacherLoss(), 6, 8, None, TeacherMiner(MultiSimilarityMiner())),
            "needs no labels.*is a TeacherMiner",
        ),
        ((RelativeTeacherLoss(), 6, 0), "size of the queue must be at least 1"),
    ],
)
def test_what_cannot_be_remembered_is_named(arguments, message):
    with pytest.raises(ValueError, match=message):
        DistillationMemory(*arguments)


def test_other_widths_are_named():
    loss = DistillationMemory(RelativeTeacherLoss(), 6)
    with pytest.raises(ValueError, match=r"width 6, but was given shape \(5, 9\)"):
        loss(*steps(1)[0][:1], ref_emb=steps(1)[0][1])
