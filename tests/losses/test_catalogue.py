import inspect

import pytest
import torch
from pytorch_metric_learning.distances import LpDistance

from pml_distill import losses

ENTRIES = losses.catalogue()
of_embeddings = pytest.mark.parametrize(
    "entry", [e for e in ENTRIES if e.family != "feature maps"], ids=lambda entry: entry.name
)


def make(entry):
    return getattr(losses, entry.name)(*((64, 6) if "queue" in entry.needs else ()))


WRAPPERS = {"DistillationMemory", "MatryoshkaLoss", "MultipleDistillationLosses"}


def test_every_distillation_loss_has_one_entry():
    public = [getattr(losses, name) for name in losses.__all__]
    bases = losses.BaseDistillationLoss, losses.BaseFeatureLoss
    built = {
        c.__name__ for c in public if inspect.isclass(c) and issubclass(c, bases) and not c.__name__.startswith("Base")
    }
    assert sorted(entry.name for entry in ENTRIES) == sorted(built - WRAPPERS)


@of_embeddings
def test_equal_widths_are_needed_where_the_entry_says_so(entry):
    assert make(entry).equal_widths == ("equal widths" in entry.needs)


@of_embeddings
@pytest.mark.parametrize("kind", ["distance", "pairs"])
def test_an_argument_makes_a_difference_where_the_entry_says_so(entry, kind):
    generator = torch.Generator().manual_seed(0)
    student, teacher = torch.randn(2, 16, 6, generator=generator)
    rows = torch.arange(15)
    plain, other, pairs = make(entry), make(entry), None
    if kind == "pairs":
        pairs = (rows, rows + 1, rows[:8], rows[:8] + 8)
    else:
        other = getattr(losses, entry.name)(*((64, 6) if "queue" in entry.needs else ()), distance=LpDistance(p=1))
    if "queue" in entry.needs:
        for loss in (plain, other):
            loss(student, ref_emb=teacher)
    differs = plain(student, ref_emb=teacher).item() != other(student, None, pairs, ref_emb=teacher).item()
    assert differs == (kind in entry.takes)
    assert plain.takes_pairs == ("pairs" in entry.takes)


@of_embeddings
def test_aligned_losses_notice_a_rotated_student_and_the_others_do_not(entry):
    generator = torch.Generator().manual_seed(0)
    teacher = torch.randn(16, 6, generator=generator)
    rotation = torch.linalg.qr(torch.randn(6, 6, generator=generator))[0]
    loss = make(entry)
    if "queue" in entry.needs:
        loss(teacher, ref_emb=teacher)
        loss.eval()
    same, rotated = loss(teacher, ref_emb=teacher).item(), loss(teacher @ rotation, ref_emb=teacher).item()
    # That of logits compares logits, whatever the embeddings before them are.
    assert (rotated > same + 0.05) == (entry.aligned or entry.family == "logits")
    if not entry.aligned and entry.family != "logits":
        assert rotated == pytest.approx(same, abs=1e-5, rel=1e-4)
