"""Both networks see the same part of an image, each as it was trained to."""

import torch
from PIL import Image

from pml_distill.datasets import SeededViews
from pml_distill.models import Preprocessing
from pml_distill.recipe.images import find_images
from pml_distill.recipe.views import Augmentation, SharedViews

STUDENT = Preprocessing((24, 24), "bicubic", (0.0,) * 3, (1.0,) * 3)
TEACHER = Preprocessing((48, 48), "bilinear", (0.5,) * 3, (0.5,) * 3)


def test_student_and_teacher_see_the_same_view(photos):
    images = find_images(photos)["train"]
    both, alone, teachers = (
        SeededViews(SharedViews(images, Augmentation(), *sides), seed=3, views=2)
        for sides in ((STUDENT, TEACHER), (STUDENT, None), (None, TEACHER))
    )
    rows = [0, 5, len(images) + 5]
    for joint, student, teacher in zip(both.read(rows), alone.read(rows), teachers.read(rows)):
        assert torch.equal(joint[0].student, student[0]) and torch.equal(joint[0].teacher, teacher[0])
        small = torch.nn.functional.interpolate((teacher[0] / 2 + 0.5)[None], (24, 24), mode="area")[0]
        assert (small - student[0]).abs().mean() < 0.05
    first, second = (both.read([row])[0][0].student for row in rows[1:])
    assert (first - second).abs().mean() > 0.01


def test_a_view_is_a_square_part_that_differs_from_read_to_read():
    augment = Augmentation()
    image = Image.linear_gradient("L").convert("RGB").resize((60, 40))
    sizes = {augment(image).size for _ in range(30)}
    assert all(width == height and 25 <= width <= 40 for width, height in sizes) and len(sizes) > 5
    assert augment(torch.rand(3, 40, 60)).shape[1] <= 40


def test_preprocessing_covers_crops_and_normalises():
    image = Image.new("RGB", (80, 40), (255, 0, 0))
    image.paste((0, 0, 255), (0, 0, 20, 40))
    pixels = Preprocessing((20, 20), "nearest", (0.5,) * 3, (0.25,) * 3)(image)
    assert pixels.shape == (3, 20, 20) and torch.equal(pixels[:, 5, 10], torch.tensor([2.0, -2, -2]))
    tensor = torch.stack([torch.full((40, 80), value) for value in (1.0, 0.0, 0.0)])
    assert torch.allclose(TEACHER(tensor)[:, 20, 20], torch.tensor([1.0, -1, -1]), atol=1e-5)
    grey = Preprocessing((8, 8), mean=(0.0,), std=(1.0,))
    assert grey(image).shape == (1, 8, 8) and grey(torch.ones(1, 8, 8)).shape == (1, 8, 8)
    assert Preprocessing.of(TEACHER.to_dict()) == TEACHER
