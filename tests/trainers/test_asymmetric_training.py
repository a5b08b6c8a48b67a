import pytest
import torch
from pytorch_metric_learning.losses import ContrastiveLoss, MultiSimilarityLoss, TripletMarginLoss

from pml_distill.evaluation import asymmetric_accuracy
from pml_distill.losses import RelativeTeacherLoss
from pml_distill.teachers import FrozenTeacher
from pml_distill.trainers import DistillationTrainer


def trained(loss, epochs=30, dtype=None):
    """Train a student of another width, projected, and return both sides' embeddings and the labels."""
    torch.manual_seed(0)
    labels = torch.arange(96) % 8
    data = torch.randn(8, 16)[labels] + 0.3 * torch.randn(96, 16)
    models = {"trunk": torch.nn.Linear(16, 12), "projection": torch.nn.Linear(12, 10)}
    teacher = FrozenTeacher(torch.nn.Linear(16, 10), dtype=dtype)
    parameters = [p for model in models.values() for p in model.parameters()]
    DistillationTrainer(
        models=models,
        optimizers={"trunk_optimizer": torch.optim.Adam(parameters, lr=0.02)},
        batch_size=48,
        loss_funcs={"distillation_loss": loss},
        dataset=torch.utils.data.TensorDataset(data, labels),
        teacher=teacher,
        data_device=torch.device("cpu"),
        dataloader_num_workers=0,
    ).train(1, epochs)
    with torch.no_grad():
        return models["projection"](models["trunk"](data)), teacher(data), labels


@pytest.mark.parametrize("loss", [ContrastiveLoss(), MultiSimilarityLoss(), TripletMarginLoss()])
def test_any_pml_loss_teaches_the_student_to_search_the_teachers_gallery(loss):
    before, after = (asymmetric_accuracy(*trained(loss, epochs))["precision_at_1"] for epochs in (0, 30))
    assert before < 0.5 and after > 0.9


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("loss", [ContrastiveLoss(), MultiSimilarityLoss(), TripletMarginLoss()])
def test_a_teacher_of_half_precision_serves_too(loss, dtype):
    student, teacher, labels = trained(loss, dtype=dtype)
    assert teacher.dtype == dtype and asymmetric_accuracy(student, teacher, labels)["precision_at_1"] > 0.9


def test_relations_alone_do_not():
    student, teacher, labels = trained(RelativeTeacherLoss())
    assert asymmetric_accuracy(student, student, labels)["precision_at_1"] > 0.9
    assert asymmetric_accuracy(student, teacher, labels)["precision_at_1"] < 0.5


def test_a_pml_loss_leaves_out_each_samples_own_row_unless_given_other_labels():
    student, teacher, labels = torch.randn(6, 4), torch.randn(6, 4), torch.arange(6)
    own = ContrastiveLoss(neg_margin=0)  # no positive pair but the own one
    left_out = own(student, labels, ref_emb=teacher, ref_labels=labels)
    assert left_out == own(student, labels, ref_emb=teacher)
    assert own(student, labels, ref_emb=teacher, ref_labels=labels.clone()) > left_out
