import pytest
import torch
from pytorch_metric_learning.distances import CosineSimilarity
from pytorch_metric_learning.losses import ContrastiveLoss, MultipleLosses, MultiSimilarityLoss, TripletMarginLoss
from pytorch_metric_learning.miners import BatchHardMiner, MultiSimilarityMiner, TripletMarginMiner
from pytorch_metric_learning.utils.distributed import DistributedMinerWrapper

from pml_distill.distances import EuclideanDistance
from pml_distill.losses import DarkRankLoss, RelativeTeacherLoss
from pml_distill.miners import TeacherMiner, TeacherNeighborMiner, TeacherRankMiner, teacher_rank_miner
from pml_distill.teachers import FrozenTeacher
from pml_distill.trainers import DistillationTrainer

MINERS = {
    "neighbor": lambda **kw: TeacherNeighborMiner(neighbors=3, **kw),
    "rank": lambda **kw: TeacherRankMiner(neighbors=3, **kw),
    "any": lambda **kw: TeacherMiner(MultiSimilarityMiner()),
}
every_miner = pytest.mark.parametrize("name", MINERS)


def batch(size=12, seed=0):
    generator = torch.Generator().manual_seed(seed)
    labels = torch.arange(size) % 3
    return torch.randn(size, 6, generator=generator), labels, torch.randn(size, 9, generator=generator)


def pairs(*columns):
    return set(zip(*(column.tolist() for column in columns)))


@pytest.mark.parametrize("distance", [EuclideanDistance(), CosineSimilarity()])
def test_neighbors_are_the_teachers_nearest(distance):
    student, labels, teacher = batch()
    unit = torch.nn.functional.normalize(teacher)
    order = (unit @ unit.t()).fill_diagonal_(-9).argsort(dim=1, descending=True)[:, :3]
    expected = {(i, j) for i in range(12) for j in order[i].tolist()}
    anchors, positives, *negatives = TeacherNeighborMiner(3, distance=distance)(student, ref_emb=teacher)
    assert pairs(anchors, positives) == expected and not any(len(n) for n in negatives)
    a1, p, a2, n = TeacherNeighborMiner(3, distance=distance)(student, labels, ref_emb=teacher)
    assert pairs(a1, p) == {(i, j) for i, j in expected if labels[i] == labels[j]}
    assert pairs(a2, n) == {(i, j) for i, j in expected if labels[i] != labels[j]}


@pytest.mark.parametrize("neighbors", [2, None])
def test_triplets_are_those_that_both_order_differently(neighbors):
    student, _, teacher = batch()
    s, t = (torch.cdist(*2 * [torch.nn.functional.normalize(x)]) for x in (student, teacher))
    expected = set()
    for a in range(12):
        others = [i for i in range(12) if i != a]
        near = sorted(others, key=lambda i, a=a: t[a, i].item())[:neighbors]
        expected |= {(a, p, n) for p in near for n in others if t[a, p] < t[a, n] and s[a, p] > s[a, n]}
    found = TeacherRankMiner(neighbors)(student, ref_emb=teacher)
    assert pairs(*found) == expected and len(found[0]) == len(expected)


def test_triplets_are_bounded_and_drawn_from_all():
    student, _, teacher = batch(40)
    every = pairs(*TeacherRankMiner()(student, ref_emb=teacher))
    torch.manual_seed(0)
    first = TeacherRankMiner(max_triplets=10)(student, ref_emb=teacher)
    torch.manual_seed(0)
    again = TeacherRankMiner(max_triplets=10)(student, ref_emb=teacher)
    other = TeacherRankMiner(max_triplets=10)(student, ref_emb=teacher)
    assert len(first[0]) == 10 and pairs(*first) < every and pairs(*first) == pairs(*again) != pairs(*other)


@pytest.mark.parametrize("at_once", [1, 2000])
def test_chunks_of_anchors_change_nothing(at_once, monkeypatch):
    student, _, teacher = batch(40)
    whole = TeacherRankMiner(None, max_triplets=None)(student, ref_emb=teacher)
    monkeypatch.setattr(teacher_rank_miner, "TRIPLETS_AT_ONCE", at_once)
    parts = TeacherRankMiner(None, max_triplets=None)(student, ref_emb=teacher)
    assert all(torch.equal(a, b) for a, b in zip(whole, parts))
    drawn = TeacherRankMiner(None, max_triplets=10)(student, ref_emb=teacher)
    assert len(pairs(*drawn)) == 10 and pairs(*drawn) < pairs(*whole)


def test_the_draw_over_chunks_is_uniform(monkeypatch):
    monkeypatch.setattr(teacher_rank_miner, "TRIPLETS_AT_ONCE", 1)
    student, _, teacher = batch(8)
    every = sorted(pairs(*TeacherRankMiner(None)(student, ref_emb=teacher)))
    size, draws, miner = len(every), 2000, TeacherRankMiner(None, max_triplets=len(every) // 3)
    torch.manual_seed(0)
    counts = dict.fromkeys(every, 0)
    for _ in range(draws):
        for triplet in pairs(*miner(student, ref_emb=teacher)):
            counts[triplet] += 1
    share = (size // 3) / size
    # Chi-squared of each triplet's count, scaled by the variance of a draw without replacement: about one each.
    spread = sum((count - draws * share) ** 2 for count in counts.values()) / (draws * share * (1 - share))
    assert abs(spread / size - 1) < 5 * (2 / size) ** 0.5


def test_a_student_that_orders_like_the_teacher_leaves_nothing_to_mine():
    _, _, teacher = batch()
    assert len(TeacherRankMiner(None)(2 * teacher, ref_emb=teacher)[0]) == 0


def test_any_miner_sees_the_teacher():
    student, labels, teacher = batch()
    expected = MultiSimilarityMiner()(teacher, labels)
    found = TeacherMiner(MultiSimilarityMiner())(student, labels, ref_emb=teacher)
    assert all(torch.equal(a, b) for a, b in zip(expected, found))


def test_any_miners_triplets_are_bounded_and_drawn_from_all():
    student, labels, teacher = batch(24)
    every = pairs(*TeacherMiner(TripletMarginMiner(type_of_triplets="all"))(student, labels, ref_emb=teacher))
    miner = TeacherMiner(TripletMarginMiner(type_of_triplets="all"), max_triplets=10)
    torch.manual_seed(0)
    first, other = (pairs(*miner(student, labels, ref_emb=teacher)) for _ in range(2))
    torch.manual_seed(0)
    assert len(first) == 10 and first < every and first != other
    assert pairs(*miner(student, labels, ref_emb=teacher)) == first
    of_pairs = TeacherMiner(MultiSimilarityMiner(), max_triplets=1)(student, labels, ref_emb=teacher)
    assert all(map(torch.equal, of_pairs, MultiSimilarityMiner()(teacher, labels)))


@pytest.mark.parametrize("name", ["neighbor", "any"])
def test_multiple_losses_take_what_was_mined_once(name):
    student, labels, teacher = batch(24)
    found = MINERS[name]()(student, labels, ref_emb=teacher)
    losses = ContrastiveLoss(), TripletMarginLoss()
    expected = sum(loss(student, labels, found) for loss in losses)
    assert torch.allclose(MultipleLosses(losses)(student, labels, found), expected)


@every_miner
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
def test_degenerate_batches(name, dtype):
    student, labels, teacher = batch()
    twins = teacher.clone()
    twins[1] = twins[0]
    for s, y, t in (
        (student, labels, torch.zeros(12, 9)),
        (torch.zeros(12, 6), labels, teacher),
        (student, labels, twins),
        (student, torch.zeros(12, dtype=torch.long), teacher),
        (student[:2], labels[:2], teacher[:2]),
        (student[:1], labels[:1], teacher[:1]),
    ):
        found = MINERS[name]()(s.to(dtype), y, ref_emb=t.to(dtype))
        assert all(0 <= int(i) < len(s) for column in found for i in column)
        for left, right in (found[:2], found[-2:]) if len(found) == 4 else (found[:2], found[::2]):
            assert not (left == right).any()


@every_miner
def test_what_they_return_serves_pml_and_distillation_losses(name):
    student, labels, teacher = batch(24)
    student.requires_grad_()
    found = MINERS[name]()(student, labels, ref_emb=teacher)
    # A matrix loss takes no batch where a pair is positive in one triplet and negative in another.
    for loss in (TripletMarginLoss(),) if name == "rank" else (ContrastiveLoss(), MultiSimilarityLoss()):
        assert torch.isfinite(loss(student, labels, found))
    for loss in (RelativeTeacherLoss(), DarkRankLoss()):
        assert loss(student, labels, found, ref_emb=teacher) > 0
    assert not student.grad_fn and all(not column.requires_grad for column in found)


@every_miner
@pytest.mark.parametrize("wrapped", [False, True])
def test_a_trainer_hands_it_the_teachers_embeddings(name, wrapped, monkeypatch):
    student, labels, _ = batch(24)
    torch.manual_seed(0)
    trunk, teacher, seen = torch.nn.Linear(6, 4), FrozenTeacher(torch.nn.Linear(6, 9)), []
    miner = MINERS[name]()
    mine = miner.mine
    monkeypatch.setattr(miner, "mine", lambda *arguments: seen.append(arguments[2]) or mine(*arguments))
    if wrapped:
        monkeypatch.setattr(torch.distributed, "get_world_size", lambda: 1)
        miner = DistributedMinerWrapper(miner)
    DistillationTrainer(
        models={"trunk": trunk},
        optimizers={"trunk_optimizer": torch.optim.SGD(trunk.parameters(), lr=0.1)},
        batch_size=12,
        loss_funcs={"metric_loss": TripletMarginLoss()},
        mining_funcs={"tuple_miner": miner},
        dataset=torch.utils.data.TensorDataset(student, labels),
        teacher=teacher,
        data_device=torch.device("cpu"),
        dataloader_num_workers=0,
    ).train(1, 1)
    assert len(seen) == 2 and all(rows.shape == (12, 9) for rows in seen)
    assert {tuple(row) for rows in seen for row in rows.round(decimals=4).tolist()} <= {
        tuple(row) for row in teacher(student).round(decimals=4).tolist()
    }


def test_without_labels_a_trainer_takes_a_miner_that_needs_none():
    student, _, _ = batch(24)
    trunk = torch.nn.Linear(6, 4)
    trainer = DistillationTrainer(
        models={"trunk": trunk},
        optimizers={"trunk_optimizer": torch.optim.SGD(trunk.parameters(), lr=0.1)},
        batch_size=12,
        loss_funcs={"distillation_loss": RelativeTeacherLoss()},
        mining_funcs={"tuple_miner": TeacherNeighborMiner(3)},
        dataset=list(student),
        teacher=FrozenTeacher(torch.nn.Linear(6, 9)),
        data_device=torch.device("cpu"),
        dataloader_num_workers=0,
    )
    trainer.train(1, 1)
    assert trainer.epoch_losses["distillation_loss"] > 0


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda s, y, t: TeacherNeighborMiner()(s, y), r"needs the teacher's embeddings: pass ref_emb=.*\(12, 6\)"),
        (lambda s, y, t: TeacherNeighborMiner()(s, y, ref_emb=t[:5]), r"\(12, 6\) and ref_emb \(5, 9\)"),
        (lambda s, y, t: TeacherNeighborMiner()(s, y.repeat(2), ref_emb=t), r"\(12, 6\) and labels \(24,\)"),
        (lambda s, y, t: TeacherMiner(BatchHardMiner())(s, ref_emb=t), "needs labels for its BatchHardMiner"),
        (lambda s, y, t: TeacherNeighborMiner(0), "neighbors must be at least 1, but is 0"),
        (lambda s, y, t: TeacherRankMiner(0), "neighbors must be None or at least 1, but is 0"),
        (lambda s, y, t: TeacherRankMiner(max_triplets=0), "max_triplets must be None or at least 1, but is 0"),
        (lambda s, y, t: TeacherMiner(BatchHardMiner(), 0), "max_triplets must be None or at least 1, but is 0"),
        (lambda s, y, t: TeacherMiner(TeacherNeighborMiner()), "must be a miner of pytorch-metric-learning"),
        (
            lambda s, y, t: MultipleLosses([ContrastiveLoss()], [TeacherNeighborMiner()])(s, y),
            "MultipleLosses passes none to its miners: mine once and pass .* as indices_tuple, or .* as tuple_miner",
        ),
    ],
)
def test_wrong_use_is_named(make, message):
    with pytest.raises(ValueError, match=message):
        make(*batch())
