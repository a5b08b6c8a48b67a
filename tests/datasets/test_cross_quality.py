import pytest
import torch

from pml_distill.datasets import CrossQuality, Glyphs, Views


def halve(image):
    return image / 2


def test_the_clean_view_is_degraded_after_the_augmentation():
    dataset = CrossQuality(Glyphs("train"), halve)
    torch.manual_seed(0)
    (views, label), expected = dataset[3], Glyphs("train").labels[3]
    assert label == expected and torch.equal(views.student, views.teacher / 2)
    assert not torch.equal(dataset[3][0].teacher, views.teacher)


def test_a_batch_is_what_its_items_are():
    dataset = CrossQuality(Glyphs("test"), halve)
    for (views, label), i in zip(dataset.__getitems__([5, 2]), (5, 2)):
        assert label == dataset.labels[i] and torch.equal(views.student, dataset[i][0].student)


@pytest.mark.parametrize("item", [(4.0, 1, 7), (4.0, 1), (4.0,)])
def test_what_stands_behind_the_data_stays(item):
    assert CrossQuality([item], halve)[0] == (Views(2.0, 4.0), *item[1:])


def test_data_alone_become_views_alone():
    assert CrossQuality([4.0], halve)[0] == Views(student=2.0, teacher=4.0)


@pytest.mark.parametrize("name", ["resolution", "blur", "compression"])
def test_the_transforms_that_the_docstring_names_degrade_an_image(name):
    v2 = pytest.importorskip("torchvision.transforms.v2", reason="torchvision is optional")
    degrade = {
        "resolution": v2.Compose([v2.Resize(12), v2.Resize(32)]),
        "blur": v2.GaussianBlur(9, 2.0),
        "compression": v2.Compose(
            [v2.ToDtype(torch.uint8, scale=True), v2.JPEG(10), v2.ToDtype(torch.float32, scale=True)]
        ),
    }[name]
    images = [((Glyphs("test")[0][0] + 1) / 2).clamp(0, 1)]
    views = CrossQuality(images, degrade)[0]
    assert views.student.shape == views.teacher.shape == (1, 32, 32)
    assert 0.01 < (views.student - views.teacher).abs().mean() < 0.2
