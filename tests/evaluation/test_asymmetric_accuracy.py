import pytest
import torch
from pytorch_metric_learning.utils.accuracy_calculator import AccuracyCalculator

from pml_distill.evaluation import asymmetric_accuracy


def data(size=60, width=8):
    generator = torch.Generator().manual_seed(0)
    labels = torch.randint(9, (size,), generator=generator)
    labels[-1] = 100  # alone in its class
    centers = torch.randn(101, width, generator=generator)
    return centers[labels] + torch.randn(size, width, generator=generator), labels


@pytest.mark.parametrize("batch_size", [7, 1024])
def test_equal_embeddings_on_both_sides_give_pmls_figures(batch_size):
    embeddings, labels = data()
    embeddings = torch.nn.functional.normalize(embeddings)
    calculator = AccuracyCalculator(
        include=("precision_at_1", "mean_average_precision_at_r"), k="max_bin_count", device=torch.device("cpu")
    )
    expected = calculator.get_accuracy(embeddings, labels)
    found = asymmetric_accuracy(embeddings, embeddings, labels, batch_size)
    assert found == pytest.approx({name: expected[name] for name in found}, rel=1e-5)


def test_equals_the_definition_query_by_query():
    student, labels = data()
    teacher = student + torch.randn(student.shape, generator=torch.Generator().manual_seed(1))
    normalize = torch.nn.functional.normalize
    averages, firsts = [], []
    for i in range(len(student) - 1):
        others = [j for j in range(len(student)) if j != i]
        others.sort(key=lambda j: -float(normalize(student[i], dim=0) @ normalize(teacher[j], dim=0)))
        hits = [bool(labels[j] == labels[i]) for j in others]
        relevant = sum(hits)
        if relevant:
            firsts.append(hits[0])
            averages.append(sum(sum(hits[: r + 1]) / (r + 1) for r in range(relevant) if hits[r]) / relevant)
    found = asymmetric_accuracy(student, teacher, labels)
    assert found["precision_at_1"] == pytest.approx(sum(firsts) / len(firsts))
    assert found["mean_average_precision_at_r"] == pytest.approx(sum(averages) / len(averages), rel=1e-5)


def test_a_rotated_student_finds_nothing_in_the_teachers_gallery():
    teacher, labels = data()
    rotated = teacher @ torch.linalg.qr(torch.randn(8, 8, generator=torch.Generator().manual_seed(2)))[0]
    assert asymmetric_accuracy(rotated, rotated, labels)["precision_at_1"] > 0.5
    assert asymmetric_accuracy(rotated, teacher, labels)["precision_at_1"] < 0.3


def test_wrong_input_is_named():
    with pytest.raises(ValueError, match=r"\(4, 3\) and \(4, 2\); where widths differ, project"):
        asymmetric_accuracy(torch.zeros(4, 3), torch.zeros(4, 2), torch.zeros(4))
    with pytest.raises(ValueError, match="No query has a relevant item"):
        asymmetric_accuracy(torch.zeros(4, 3), torch.zeros(4, 3), torch.arange(4))


def test_diverged_embeddings_have_no_figure():
    embeddings, labels = data()
    with pytest.raises(ValueError, match=r"embeddings \(60, 8\) must be finite"):
        asymmetric_accuracy(embeddings.clone().fill_(torch.nan), embeddings, labels)
    with pytest.raises(ValueError, match=r"ref_emb \(60, 8\) must be finite"):
        asymmetric_accuracy(embeddings, embeddings.clone().index_fill_(0, torch.tensor([3]), torch.inf), labels)
