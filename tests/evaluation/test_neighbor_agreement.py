import pytest
import torch

from pml_distill.evaluation import neighbor_agreement


def test_equal_spaces_agree_whatever_their_rotation_and_scale():
    space = torch.randn(50, 4)
    rotation = torch.linalg.qr(torch.randn(4, 4)).Q
    assert neighbor_agreement(space, 3 * space @ rotation, k=5) == 1


def test_counts_common_neighbours_without_the_sample_itself():
    angles = torch.tensor([0.0, 0.1, 0.3, 0.7])
    student = torch.stack([angles.cos(), angles.sin()], dim=1)
    teacher = student[[0, 2, 1, 3]]
    # Nearest in the student: 1, 0, 1, 2; in the teacher: 2, 2, 0, 1.
    assert neighbor_agreement(student, teacher, k=1) == 0
    assert neighbor_agreement(student, teacher, k=3) == 1


def test_unrelated_spaces_agree_by_chance():
    torch.manual_seed(0)
    assert neighbor_agreement(torch.randn(2000, 16), torch.randn(2000, 16), k=20) == pytest.approx(0.01, abs=0.005)


def test_errors_name_the_argument():
    with pytest.raises(ValueError, match="embeddings has 3 rows and ref_emb 4"):
        neighbor_agreement(torch.randn(3, 2), torch.randn(4, 2))
    with pytest.raises(ValueError, match="k must be from 1 to 2.*but is 3"):
        neighbor_agreement(torch.randn(3, 2), torch.randn(3, 2), k=3)


def test_diverged_embeddings_have_no_figure():
    space = torch.randn(50, 4)
    for arguments in ((space * torch.nan, space), (space, space * torch.inf)):
        with pytest.raises(ValueError, match=r"\(50, 4\) must be finite"):
            neighbor_agreement(*arguments)
