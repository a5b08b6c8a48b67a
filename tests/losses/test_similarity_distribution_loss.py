import pytest
import torch
from golden import cases
from pytorch_metric_learning.reducers import DoNothingReducer, SumReducer

from pml_distill.losses import SimilarityDistributionLoss, TeacherQueue

FORMS = {
    "one queue": {},
    "two queues": {"student_width": 6},
    "with the batch": {"include_batch": True},
    "two queues with the batch": {"student_width": 6, "include_batch": True},
    "topk": {"topk": 5},
}
every_form = pytest.mark.parametrize("form", FORMS)


def embeddings(size, width=6, seed=0, dtype=torch.float32):
    return torch.randn(size, width, generator=torch.Generator().manual_seed(seed)).to(dtype)


def filled(form, batches=3, **kwargs):
    """A loss that has seen some batches and stays as it is."""
    loss = SimilarityDistributionLoss(32, 6, 0.2, 0.1, **FORMS[form], **kwargs)
    for seed in range(2, 2 + batches):
        loss(embeddings(8, seed=seed), ref_emb=embeddings(8, seed=-seed % 100))
    return loss.eval()


def restored(case, file_queue, **kwargs):
    rows = torch.tensor(case.arrays[file_queue])
    loss = SimilarityDistributionLoss(*rows.shape, **kwargs).double()
    fill(loss.queue, rows, int(case.arrays.get("hp_ptr", 0)))
    return loss


def fill(queue, rows, position=0):
    state = {"rows": rows, "count": torch.tensor(len(rows)), "position": torch.tensor(position)}
    queue.load_state_dict(state)


@cases("compress_1q")
def test_equals_compress_with_one_queue(case):
    loss = restored(case, "queue_t", student_temperature=case.T, teacher_temperature=case.T)
    value = loss(case.student, ref_emb=case.teacher)
    zero = (case.student == 0).all(dim=1)
    if zero.any():
        # Official: NaN in all of it.
        (gradient,) = torch.autograd.grad(value, case.student)
        assert torch.isfinite(value) and torch.isfinite(gradient).all() and not gradient[zero].any()
        return
    case.check(value)
    assert torch.allclose(loss.queue.rows, torch.tensor(case.arrays["queue_t_after"]))


@cases("compress_2q")
def test_equals_compress_with_two_queues(case):
    width = case.student.shape[1]
    loss = restored(case, "queue_t", student_temperature=case.T, teacher_temperature=case.T, student_width=width)
    rows = torch.tensor(case.arrays["queue_s"])
    fill(loss.student_queue, rows)
    case.check(loss(case.student, ref_emb=case.teacher))
    assert torch.allclose(loss.queue.rows, torch.tensor(case.arrays["queue_t_after"]))
    assert torch.allclose(loss.student_queue.rows, torch.tensor(case.arrays["queue_s_after"]))


@cases("rrd")
def test_equals_rrd_less_the_teachers_entropy(case):
    loss = restored(
        case,
        "queue",
        student_temperature=case.tau_s,
        teacher_temperature=case.tau_t,
        include_batch=True,
    )
    value = loss(case.student, ref_emb=case.teacher)
    rows = torch.tensor(case.arrays["queue_after"])
    assert torch.allclose(loss.queue.rows, rows)
    similarities = torch.nn.functional.normalize(case.teacher) @ rows.t() / case.tau_t
    entropy = torch.distributions.Categorical(logits=similarities).entropy().mean()
    zero = (case.student == 0).all(dim=1)
    if not zero.any():
        return case.check(value + entropy)
    # A zero row has no direction: its official gradient is 1e12 times too large, ours zero; the others agree.
    (gradient,) = torch.autograd.grad(value, case.student)
    official = torch.tensor(case.arrays["grad"])[~zero]
    assert (value + entropy).item() == pytest.approx(case.arrays["loss"].item(), rel=1e-6)
    assert (gradient[~zero] - official).norm() <= 1e-6 * official.norm() and not gradient[zero].any()


@cases("csd")
def test_equals_csd_with_the_batch_as_gallery(case):
    loss = SimilarityDistributionLoss(
        *case.teacher.shape, case.tau_s, case.tau_t, include_batch=True, topk=int(case.topk)
    )
    case.check(loss.double()(case.student, ref_emb=case.teacher))


# With the batch in the student's own queue, its rows there are constants for autograd and not for the numbers.
@pytest.mark.parametrize("form", [form for form in FORMS if form != "two queues with the batch"])
def test_gradients_are_correct(form):
    loss, teacher = filled(form).double(), embeddings(7, seed=1, dtype=torch.float64)
    student = embeddings(7, dtype=torch.float64).requires_grad_()
    assert torch.autograd.gradcheck(lambda s: loss(s, ref_emb=teacher), student)


@every_form
@pytest.mark.parametrize("autocast", [None, torch.bfloat16])
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
def test_degenerate_batches_have_finite_values_and_gradients(form, dtype, autocast):
    usual, other = embeddings(8), embeddings(8, seed=1)
    zero, twins = usual.clone(), usual.clone()
    zero[2], twins[1] = 0, twins[0]
    batches = [(usual, other), (zero, other), (other, zero), (torch.zeros(8, 6), torch.zeros(8, 6))]
    batches += [(twins, other), (other, twins), (usual, usual), (usual[:1], other[:1]), (300 * usual, 300 * other)]
    for loss in (filled(form), filled(form, batches=0), filled(form).train()):
        for student, teacher in batches:
            student = student.to(dtype).requires_grad_()
            with torch.autocast("cpu", dtype=torch.bfloat16, enabled=autocast is not None):
                value = loss(student, ref_emb=teacher.to(dtype))
            value.backward()
            assert value.dtype == torch.float32
            assert torch.isfinite(value) and torch.isfinite(student.grad).all()


@every_form
def test_the_order_of_the_batch_does_not_matter_and_reducers_apply(form):
    loss, order = filled(form), torch.randperm(8)
    student, teacher = embeddings(8), embeddings(8, seed=1)
    value = loss(student, ref_emb=teacher)
    assert loss(student[order], ref_emb=teacher[order]).item() == pytest.approx(value.item(), rel=1e-5)
    details = filled(form, reducer=DoNothingReducer())(student, ref_emb=teacher)["loss"]
    assert details["reduction_type"] == "element" and details["indices"].tolist() == list(range(8))
    assert details["losses"].mean().item() == pytest.approx(value.item(), rel=1e-5)
    total = filled(form, reducer=SumReducer())(student, ref_emb=teacher)
    assert total.item() == pytest.approx(8 * value.item(), rel=1e-5)


@every_form
def test_compiles_to_a_single_graph(form):
    torch._dynamo.reset()
    student, teacher = embeddings(8).requires_grad_(), embeddings(8, seed=1)
    eager, compiled = filled(form).train(), filled(form).train()
    # Twice, so that what the first call has stored counts.
    for _ in range(2):
        values = (
            eager(student, ref_emb=teacher),
            torch.compile(compiled, fullgraph=True, backend="eager")(student, ref_emb=teacher),
        )
        gradients = [torch.autograd.grad(value, student)[0] for value in values]
        assert torch.allclose(*values) and torch.allclose(*gradients, atol=1e-6)


def test_a_query_never_finds_itself_unless_asked():
    teacher = torch.eye(4)
    loss = SimilarityDistributionLoss(8, 4, reducer=DoNothingReducer())
    assert not loss(torch.eye(4).flip(0), ref_emb=teacher)["loss"]["losses"].any()
    with_batch = SimilarityDistributionLoss(8, 4, include_batch=True)
    assert with_batch(torch.eye(4).flip(0), ref_emb=teacher) > 1


def test_the_queue_forgets_the_oldest_and_rests_in_eval_mode():
    loss, rows = SimilarityDistributionLoss(5, 6), torch.nn.functional.normalize(embeddings(10))
    for start in (0, 3):
        loss(rows[start : start + 3], ref_emb=rows[start : start + 3])
    assert torch.allclose(loss.queue.rows, rows[[5, 1, 2, 3, 4]])
    loss.eval()(rows[6:9], ref_emb=rows[6:9])
    assert torch.allclose(loss.queue.rows, rows[[5, 1, 2, 3, 4]])
    loss.train()(rows, ref_emb=rows)
    assert sorted(loss.queue.rows[:, 0].tolist()) == pytest.approx(sorted(rows[5:, 0].tolist()))


def test_a_checkpoint_resumes_the_queue():
    first, second = filled("two queues").train(), SimilarityDistributionLoss(32, 6, 0.2, 0.1, student_width=6)
    second.load_state_dict(first.state_dict())
    student, teacher = embeddings(12), embeddings(12, seed=1)
    for _ in range(2):
        assert first(student, ref_emb=teacher) == second(student, ref_emb=teacher)
    assert torch.equal(first.queue.rows, second.queue.rows)


def test_the_queue_follows_the_embeddings_to_their_device():
    rows, filled = TeacherQueue(4, 2).candidates(torch.zeros(3, 2, device="meta"))
    assert rows.device.type == filled.device.type == "meta"


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: TeacherQueue(0, 4), "size of the queue must be at least 1, but is 0"),
        (lambda: SimilarityDistributionLoss(4, 4, student_temperature=0), "student_temperature must be a positive"),
        (lambda: SimilarityDistributionLoss(4, 4, topk=0), "topk must be None or at least 1, but is 0"),
        (
            lambda: SimilarityDistributionLoss(4, 4)(torch.ones(2, 3), ref_emb=torch.ones(2, 3)),
            r"queue holds embeddings of width 4, but was given shape \(2, 3\)",
        ),
        (
            lambda: SimilarityDistributionLoss(4, 4)(torch.ones(2, 3), ref_emb=torch.ones(2, 4)),
            "projection embedder",
        ),
    ],
)
def test_wrong_arguments_are_refused(make, message):
    with pytest.raises(ValueError, match=message):
        make()


@pytest.mark.parametrize("include_batch", [False, True])
def test_an_overflow_spoils_the_loss_of_one_step_alone(include_batch):
    loss = SimilarityDistributionLoss(32, 6, student_width=6, include_batch=include_batch)
    student, teacher = embeddings(8), embeddings(8, seed=1)
    loss(student, ref_emb=teacher)
    spoilt = student.clone()
    spoilt[3, 2] = torch.inf
    assert not loss(spoilt, ref_emb=teacher).isfinite()
    assert loss(student, ref_emb=teacher).isfinite()
