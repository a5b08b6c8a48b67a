import itertools
import math

import pytest
import torch
from golden import cases, raw
from pytorch_metric_learning.distances import CosineSimilarity, DotProductSimilarity, LpDistance
from pytorch_metric_learning.reducers import DoNothingReducer
from torch._subclasses.fake_tensor import FakeTensorMode

from pml_distill.distances import EuclideanDistance
from pml_distill.losses import DarkRankLoss
from pml_distill.losses.dark_rank_loss import log_cumulative_sum_exp, similarity_scores


def per_query(loss, *args, **kwargs):
    loss.reducer = DoNothingReducer()
    return loss(*args, **kwargs)["loss"]["losses"]


def embeddings(size, width=5, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(size, width, generator=generator, dtype=torch.float64)


@cases("darkrank_listnet")
def test_soft_equals_the_authors_listnet(case):
    loss = DarkRankLoss(
        "soft", case.scale**case.power, 2 * case.power, int(case.list_length), tail=False, distance=raw()
    )
    case.check(per_query(loss, case.student, ref_emb=case.teacher)[: len(case.student) // 2].mean())


@cases("darkrank_listmle")
def test_hard_equals_the_authors_listmle(case):
    loss = DarkRankLoss("hard", case.scale**case.power, 2 * case.power, None, tail=False, distance=raw())
    losses = per_query(loss, case.student, ref_emb=case.teacher)
    case.check(losses[: len(case.student) // 2].mean(), "_stable")


@cases("rkd_hard_darkrank")
def test_hard_equals_the_rkd_repository(case):
    distances = torch.cdist(case.teacher, case.teacher).sort(dim=1).values
    loss = DarkRankLoss("hard", case.alpha, case.beta, int(case.permute_len), tail=False, distance=raw())
    if (distances[:, 2:] - distances[:, 1:-1]).min() > 1e-9:
        case.check(loss(case.student, ref_emb=case.teacher))
        return
    # A zero teacher row is equally far from all unit rows: one of the tied orders must be the official one.
    official = torch.tensor(case.arrays["loss"])
    losses = per_query(loss, case.student, ref_emb=case.teacher)
    (tied,) = (distances[:, 2:] - distances[:, 1:-1]).amin(dim=1).lt(1e-9).nonzero().flatten().tolist()
    others = losses.sum() - losses[tied]
    scores = -case.alpha * torch.cdist(case.student, case.student)[tied] ** case.beta
    candidates = [i for i in range(len(scores)) if i != tied]
    orders = torch.tensor(list(itertools.permutations(candidates, int(case.permute_len))))
    chains = scores[orders]
    tied_losses = (chains.flip(1).logcumsumexp(1).flip(1) - chains).sum(dim=1)
    assert ((others + tied_losses) / len(losses) / official - 1).abs().min() < 1e-6


def brute_force_soft(student, teacher, listed, rest):
    """The cross entropy over all orders, written out for one query."""

    def log_probability(scores, order, tail):
        total = 0.0
        for place, picked in enumerate(order):
            pool = [scores[j] for j in order[place:]] + [scores[j] for j in tail]
            total = total + scores[picked] - torch.stack(pool).logsumexp(0)
        return total

    return -sum(
        log_probability(teacher, order, []).exp() * log_probability(student, order, rest)
        for order in itertools.permutations(listed)
    )


@pytest.mark.parametrize("tail", [True, False])
@pytest.mark.parametrize("length", [1, 2, 3, 5, 7])
def test_soft_equals_the_sum_over_all_orders(tail, length):
    student, teacher = embeddings(8), embeddings(8, 3, seed=1)
    loss = DarkRankLoss("soft", alpha=2.0, beta=1.5, list_length=length, tail=tail)
    losses = per_query(loss, student, ref_emb=teacher)
    for query in (0, 5):
        s, t = similarity_scores(loss, student)[query], similarity_scores(loss, teacher)[query]
        order = [j for j in t.argsort(descending=True).tolist() if j != query]
        rest = order[length:] if tail else []
        assert losses[query].item() == pytest.approx(brute_force_soft(s, t, order[:length], rest).item(), rel=1e-10)


@pytest.mark.parametrize("tail", [True, False])
@pytest.mark.parametrize("length", [1, 3, None])
def test_hard_equals_the_written_out_likelihood(tail, length):
    student, teacher = embeddings(8), embeddings(8, 3, seed=1)
    loss = DarkRankLoss("hard", alpha=2.0, beta=1.5, list_length=length, tail=tail)
    losses = per_query(loss, student, ref_emb=teacher)
    for query in range(8):
        s, t = similarity_scores(loss, student)[query], similarity_scores(loss, teacher)[query]
        order = [j for j in t.argsort(descending=True).tolist() if j != query]
        listed = order[: length or 7]
        expected = sum(s[order[k:] if tail else listed[k:]].logsumexp(0) - s[listed[k]] for k in range(len(listed)))
        assert losses[query].item() == pytest.approx(expected.item(), rel=1e-10)


def test_figures_of_the_closed_form_example():
    i, j = torch.arange(8, dtype=torch.float64)[:, None], torch.arange(6, dtype=torch.float64)
    student, teacher = torch.sin(0.7 * i + 1.3 * j + 0.11 * i * j), torch.cos(0.3 * i - 0.9 * j + 0.17 * i * j)

    def losses(*args, **kwargs):
        return per_query(DarkRankLoss(*args, tail=False, **kwargs), student, ref_emb=teacher)

    assert losses("hard", list_length=4).mean().item() == pytest.approx(4.282612, abs=1e-6)
    assert losses("hard", list_length=None)[:4].mean().item() == pytest.approx(21.075401, abs=1e-6)
    assert losses("hard", list_length=None)[0].item() == pytest.approx(32.284100, abs=1e-6)
    assert losses("soft", list_length=4)[:4].mean().item() == pytest.approx(5.785620, abs=1e-6)
    assert losses("soft", 12.25, 4, list_length=4)[:4].mean().item() == pytest.approx(34.116491, abs=1e-6)


@pytest.mark.parametrize("transfer", ["soft", "hard"])
def test_tail_penalises_a_stranger_before_the_list(transfer):
    teacher = embeddings(8, 3, seed=1)
    student = teacher.clone()
    query, far = 0, torch.cdist(teacher, teacher)[0].argmax()
    student[far] = student[query]
    kept, gone = (
        per_query(DarkRankLoss(transfer, list_length=3, tail=True), x, ref_emb=teacher)[query]
        for x in (teacher, student)
    )
    assert gone > kept + 0.1
    kept, gone = (
        per_query(DarkRankLoss(transfer, list_length=3, tail=False), x, ref_emb=teacher)[query]
        for x in (teacher, student)
    )
    assert gone == pytest.approx(kept)


@pytest.mark.parametrize("transfer", ["soft", "hard"])
@pytest.mark.parametrize("length", [2, 4])
@pytest.mark.parametrize("tail", [True, False])
def test_pairs_restrict_the_candidates(transfer, length, tail):
    student, teacher = embeddings(9), embeddings(9, seed=1)
    candidates = {0: [1, 2, 5, 6, 8], 3: [0, 7], 4: [2]}
    anchors = torch.tensor([q for q, c in candidates.items() for _ in c])
    others = torch.tensor([j for c in candidates.values() for j in c])
    nothing = torch.tensor([], dtype=torch.long)
    pairs = (anchors[:3], others[:3], anchors[3:], others[3:])
    loss = DarkRankLoss(transfer, list_length=length, tail=tail, reducer=DoNothingReducer())
    result = loss(student, indices_tuple=pairs, ref_emb=teacher)["loss"]
    assert result["indices"].tolist() == [0, 3, 4]
    for value, (query, others) in zip(result["losses"], candidates.items()):
        small = torch.tensor([query, *others])
        alone = DarkRankLoss(transfer, list_length=length, tail=tail)
        assert value.item() == pytest.approx(per_query(alone, student[small], ref_emb=teacher[small])[0].item())
    assert loss(student, indices_tuple=(nothing,) * 4, ref_emb=teacher)["loss"]["losses"] == 0


def test_triplets_restrict_the_candidates_like_their_pairs():
    student, teacher = embeddings(6), embeddings(6, seed=1)
    triplets = tuple(torch.tensor(x) for x in ([0, 0, 1], [1, 1, 2], [2, 3, 4]))
    pairs = tuple(torch.tensor(x) for x in ([0, 1], [1, 2], [0, 0, 1], [2, 3, 4]))
    loss = DarkRankLoss("hard")
    assert loss(student, None, triplets, teacher) == loss(student, None, pairs, teacher)


@pytest.mark.parametrize("transfer", ["soft", "hard"])
def test_scores_down_to_minus_ten_thousand_stay_finite(transfer):
    student = (100 * embeddings(8)).float().requires_grad_()
    loss = DarkRankLoss(transfer, alpha=1, beta=2, list_length=7, distance=raw())
    assert similarity_scores(loss, student).min() < -1e4
    value = loss(student, ref_emb=100 * embeddings(8, seed=1))
    value.backward()
    assert torch.isfinite(value) and torch.isfinite(student.grad).all()


@pytest.mark.parametrize("transfer", ["soft", "hard"])
@pytest.mark.parametrize(("length", "tail"), [(3, True), (3, False), (None, True)])
def test_second_derivatives_are_correct(transfer, length, tail):
    loss, teacher = DarkRankLoss(transfer, list_length=length, tail=tail), embeddings(6, seed=1)
    assert torch.autograd.gradgradcheck(lambda s: loss(s, ref_emb=teacher), embeddings(6).requires_grad_(), atol=1e-4)


@pytest.mark.parametrize("counted", [None, torch.arange(20) % 3 > 0])
@pytest.mark.parametrize("size", [1, 1e3, 1e6, 1e12])
def test_the_hard_gradient_is_exact_for_scores_of_any_size(size, counted):
    chain = (size * torch.randn(5, 20, generator=torch.Generator().manual_seed(0))).requires_grad_()
    counted = None if counted is None else counted.expand(5, 20)
    scan = log_cumulative_sum_exp(chain)
    found = torch.autograd.grad((scan if counted is None else scan[counted]).sum(), chain)[0]
    expected = torch.zeros(5, 20, dtype=torch.float64)
    for k in range(20):
        if counted is None or counted[0, k]:
            expected[:, : k + 1] += chain.detach().double()[:, : k + 1].softmax(dim=1)
    torch.testing.assert_close(found.double(), expected, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("distance", [CosineSimilarity(), DotProductSimilarity(), LpDistance(p=1)])
def test_powers_below_one_have_finite_gradients_at_zero(distance):
    student = torch.eye(4).repeat(2, 1).requires_grad_()
    DarkRankLoss(beta=0.5, distance=distance)(student, ref_emb=embeddings(8)).backward()
    assert torch.isfinite(student.grad).all()


@pytest.mark.parametrize("distance", [CosineSimilarity(), DotProductSimilarity(), LpDistance(p=1), LpDistance(power=2)])
@pytest.mark.parametrize("transfer", ["soft", "hard"])
def test_any_distance_prefers_the_teachers_order(distance, transfer):
    teacher = embeddings(8)
    loss = DarkRankLoss(transfer, beta=1, distance=distance)
    assert loss(teacher, ref_emb=teacher) < loss(-teacher + embeddings(8, seed=2), ref_emb=teacher)


def test_soft_is_the_entropy_at_best_and_grows_with_divergence():
    teacher = embeddings(6)
    loss = DarkRankLoss("soft", list_length=5)
    scores = similarity_scores(loss, teacher)[0, 1:].tolist()
    entropy = 0.0
    for order in itertools.permutations(scores):
        log_p = sum(s - math.log(sum(math.exp(x) for x in order[k:])) for k, s in enumerate(order))
        entropy -= math.exp(log_p) * log_p
    student = teacher.clone().requires_grad_()
    losses = per_query(loss, student, ref_emb=teacher)
    assert losses[0].item() == pytest.approx(entropy)
    losses.sum().backward()
    assert student.grad.abs().max() < 1e-9


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"transfer": "medium"}, '"soft" or "hard", but is \'medium\''),
        ({"alpha": 0}, "alpha must be a positive number, but is 0"),
        ({"beta": -1}, "beta must be a positive number, but is -1"),
        ({"list_length": 0}, "list_length must be None or at least 1, but is 0"),
        ({"list_length": 15}, r"list_length is 15, .* at most 14.*transfer=\"hard\""),
    ],
)
def test_errors_name_the_argument(arguments, message):
    with pytest.raises(ValueError, match=message):
        DarkRankLoss(**arguments)


def test_a_whole_batch_too_long_for_soft_is_refused():
    with pytest.raises(ValueError, match="list_length is 19"):
        DarkRankLoss("soft", list_length=None)(embeddings(20), ref_emb=embeddings(20))


def test_tensors_made_without_values_stay_out_of_later_calls():
    """As torch.export makes them where it does not compile."""
    loss, student, teacher = DarkRankLoss(), embeddings(20), embeddings(20, seed=1)
    expected = loss(student, ref_emb=teacher)
    with FakeTensorMode():
        loss(torch.zeros(20, 5), ref_emb=torch.zeros(20, 5))
    assert loss(student, ref_emb=teacher) == expected


@pytest.mark.parametrize("length", [8, None])
@pytest.mark.parametrize("transfer", ["soft", "hard"])
def test_embeddings_that_are_not_normalised_keep_their_digits(transfer, length):
    if transfer == "soft" and length is None:
        length = 3
    generator = torch.Generator().manual_seed(0)
    teacher = torch.rand(64, 2048, generator=generator)
    loss = DarkRankLoss(transfer, list_length=length, distance=EuclideanDistance(normalize_embeddings=False))
    for student in (teacher, teacher + 0.03 * torch.randn(64, 2048, generator=generator)):
        exact = loss(student.double(), ref_emb=teacher.double()).item()
        assert loss(student, ref_emb=teacher).item() == pytest.approx(exact, rel=1e-3, abs=0.02)


@pytest.mark.parametrize("transfer", ["soft", "hard"])
@pytest.mark.parametrize("tail", [True, False])
def test_a_list_as_long_as_the_batch_is_the_whole_batch(transfer, tail):
    student, teacher = embeddings(8), embeddings(8, seed=1)
    whole = DarkRankLoss(transfer, list_length=None, tail=tail)(student, ref_emb=teacher)
    for length in (7, 8, 9):
        value = DarkRankLoss(transfer, list_length=length, tail=tail)(student, ref_emb=teacher)
        assert value.item() == pytest.approx(whole.item(), rel=1e-12)
