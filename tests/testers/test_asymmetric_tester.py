import pytest
import torch
from pytorch_metric_learning.testers import GlobalEmbeddingSpaceTester
from pytorch_metric_learning.utils.accuracy_calculator import AccuracyCalculator
from pytorch_metric_learning.utils.logging_presets import HookContainer, get_record_keeper
from torch import nn

from pml_distill.datasets import CrossQuality, Glyphs, SeededViews
from pml_distill.evaluation import HashAccuracyCalculator, asymmetric_accuracy
from pml_distill.models import SmallResNet
from pml_distill.teachers import FrozenTeacher
from pml_distill.testers import AsymmetricTester

SPLIT = "val"


@pytest.fixture(scope="module")
def glyphs():
    return Glyphs(SPLIT, size=16, augment=False)


def network(width, seed):
    torch.manual_seed(seed)
    return SmallResNet(width).eval()


def calculator(*names):
    return AccuracyCalculator(include=names, k="max_bin_count", device=torch.device("cpu"))


def make_tester(cls=AsymmetricTester, names=("precision_at_1", "mean_average_precision_at_r"), **changes):
    settings = {"batch_size": 256, "data_device": torch.device("cpu"), "dataloader_num_workers": 0}
    return cls(**settings | {"accuracy_calculator": calculator(*names)} | changes)


def embeddings(model, dataset):
    images = torch.stack([dataset[i][0] for i in range(len(dataset))])
    return nn.functional.normalize(model(images).detach())


def test_the_three_figures_are_those_of_each_pair_of_spaces(glyphs):
    student, teacher = network(8, 0), network(8, 0)
    with torch.no_grad():
        for p in student.parameters():
            p += 0.05 * p.std() * torch.randn(p.shape, generator=torch.Generator().manual_seed(0)) if p.ndim > 1 else 0
    found = make_tester(teacher=FrozenTeacher(teacher)).test({SPLIT: glyphs}, 3, student)[SPLIT]
    own = make_tester(GlobalEmbeddingSpaceTester).test({SPLIT: glyphs}, 3, student)[SPLIT]
    teachers = make_tester(GlobalEmbeddingSpaceTester).test({SPLIT: glyphs}, 3, teacher)[SPLIT]
    expected = asymmetric_accuracy(embeddings(student, glyphs), embeddings(teacher, glyphs), glyphs.labels)
    for name in ("precision_at_1", "mean_average_precision_at_r"):
        assert found[f"{name}_level0"] == own[f"{name}_level0"]
        assert found[f"teacher_{name}_level0"] == teachers[f"{name}_level0"]
        assert found[f"asymmetric_{name}_level0"] == pytest.approx(expected[name], abs=1e-6)
        assert 0.005 < found[f"asymmetric_{name}_level0"] != own[f"{name}_level0"]
    assert found["epoch"] == 3


def test_queries_in_a_gallery_of_other_images(glyphs):
    student, teacher = network(8, 0), network(8, 1)
    even, odd = (torch.utils.data.Subset(glyphs, range(start, len(glyphs), 2)) for start in (0, 1))
    found = make_tester(teacher=FrozenTeacher(teacher)).test(
        {"query": even, "gallery": odd}, 1, student, splits_to_eval=[("query", ["gallery"])]
    )["query"]
    expected = calculator("precision_at_1").get_accuracy(
        embeddings(student, even), glyphs.labels[::2], embeddings(teacher, odd), glyphs.labels[1::2]
    )
    assert found["asymmetric_precision_at_1_level0"] == pytest.approx(expected["precision_at_1"])


def test_each_network_sees_its_view(glyphs):
    student = network(8, 0)
    found = make_tester(teacher=FrozenTeacher(student)).test(
        {SPLIT: CrossQuality(glyphs, torch.zeros_like)}, 1, student
    )
    assert found[SPLIT]["precision_at_1_level0"] < 0.02 < found[SPLIT]["teacher_precision_at_1_level0"]


def test_after_an_error_of_the_teacher_the_student_sees_its_view_again(glyphs):
    tester, few = make_tester(teacher=FrozenTeacher(nn.Linear(3, 3))), torch.utils.data.Subset(glyphs, range(160))
    views = {SPLIT: CrossQuality(few, torch.zeros_like)}
    with pytest.raises(RuntimeError):
        tester.test(views, 1, network(4, 0))
    tester.teacher = FrozenTeacher(network(4, 1))
    expected = make_tester(teacher=tester.teacher).test(views, 1, network(4, 0))
    assert tester.test(views, 1, network(4, 0)) == expected


def test_data_with_an_index(glyphs):
    few = torch.utils.data.Subset(glyphs, range(160))
    expected = make_tester(teacher=FrozenTeacher(network(4, 1))).test({SPLIT: few}, 1, network(4, 0))
    for getter in ({}, {"data_and_label_getter": lambda batch: batch[:2]}):
        tester = make_tester(teacher=FrozenTeacher(network(4, 1)), **getter)
        assert tester.test({SPLIT: SeededViews(few)}, 1, network(4, 0)) == expected


def test_batches_that_are_dictionaries(glyphs):
    few = [glyphs[i] for i in range(160)]
    rows = [{"image": image, "label": label} for image, label, *_ in few]
    tester = make_tester(teacher=FrozenTeacher(network(4, 1)))
    expected = tester.test({SPLIT: few}, 1, network(4, 0))[SPLIT]
    assert tester.test({SPLIT: rows}, 1, network(4, 0))[SPLIT] == expected


def test_a_teacher_that_embeds_nothing_is_refused():
    with pytest.raises(ValueError, match="teacher must be a module that embeds data.*but is a function"):
        make_tester(teacher=lambda data: data)


def test_pca_is_refused_because_each_network_would_have_its_own():
    with pytest.raises(ValueError, match="pca must be None, but is 4"):
        make_tester(teacher=FrozenTeacher(network(4, 1)), pca=4)


@pytest.mark.parametrize("ties", ["expected", "stable"])
def test_hamming_figures_leave_out_each_querys_own_row(glyphs, ties):
    student, teacher = network(8, 0), network(8, 0)
    with torch.no_grad():
        for p in student.parameters():
            p += 0.05 * p.std() * torch.randn(p.shape, generator=torch.Generator().manual_seed(0)) if p.ndim > 1 else 0
    name = "mean_average_precision"
    counter = HashAccuracyCalculator(include=(name, "precision_at_1"), ties=ties, device=torch.device("cpu"))
    found = make_tester(teacher=FrozenTeacher(teacher), accuracy_calculator=counter).test({SPLIT: glyphs}, 1, student)
    spaces = embeddings(student, glyphs), embeddings(teacher, glyphs)
    for prefix, queries, gallery in (("", 0, 0), ("teacher_", 1, 1), ("asymmetric_", 0, 1)):
        expected = counter.get_accuracy(spaces[queries], glyphs.labels, spaces[gallery], glyphs.labels, True)
        for metric, value in expected.items():
            assert found[SPLIT][f"{prefix}{metric}_level0"] == pytest.approx(value), (prefix, metric)
    with_own = counter.get_accuracy(spaces[0], glyphs.labels, spaces[1], glyphs.labels)
    assert found[SPLIT][f"asymmetric_{name}_level0"] < with_own[name]


def test_a_diverged_network_has_no_figure(glyphs):
    few, student = torch.utils.data.Subset(glyphs, range(160)), network(4, 0)
    with torch.no_grad():
        next(iter(student.parameters())).fill_(torch.nan)
    with pytest.raises(ValueError, match=r"student's embeddings of val \(160, 16\) must be finite"):
        make_tester(teacher=FrozenTeacher(network(4, 1))).test({SPLIT: few}, 1, student)


def test_clusters_have_no_asymmetric_figure(glyphs):
    few = torch.utils.data.Subset(glyphs, range(160))
    found = make_tester(names=("NMI", "precision_at_1"), teacher=FrozenTeacher(network(4, 1))).test(
        {SPLIT: few}, 1, network(4, 0)
    )[SPLIT]
    assert {"NMI_level0", "teacher_NMI_level0", "asymmetric_precision_at_1_level0"} <= set(found)
    assert "asymmetric_NMI_level0" not in found


def test_hooks_log_all_three(glyphs, tmp_path):
    keeper, _, _ = get_record_keeper(str(tmp_path / "logs"), str(tmp_path / "tensorboard"))
    hooks = HookContainer(keeper, primary_metric="precision_at_1", validation_split_name=SPLIT)
    own = make_tester(teacher=FrozenTeacher(network(4, 1)), end_of_testing_hook=hooks.end_of_testing_hook)
    own.test({SPLIT: glyphs}, 1, network(4, 0))
    keeper.save_records()
    (row,) = keeper.query(f"SELECT * FROM {hooks.record_group_name(own, SPLIT)}")
    for prefix in ("", "teacher_", "asymmetric_"):
        assert row[f"{prefix}precision_at_1_level0"] == own.all_accuracies[SPLIT][f"{prefix}precision_at_1_level0"]


def test_other_widths_are_refused_and_a_projection_helps(glyphs):
    student, teacher = network(8, 0), FrozenTeacher(network(4, 1))
    with pytest.raises(ValueError, match="student's embeddings are 32 wide and the teacher's 16.*append a projection"):
        make_tester(teacher=teacher).test({SPLIT: glyphs}, 1, student)
    found = make_tester(teacher=teacher).test({SPLIT: glyphs}, 1, student, nn.Linear(32, 16))
    assert "asymmetric_precision_at_1_level0" in found[SPLIT]
