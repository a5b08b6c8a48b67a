from collections.abc import Sequence
from typing import Any

import torch
from pytorch_metric_learning.utils import common_functions as c_f
from pytorch_metric_learning.utils.module_with_records_and_reducer import ModuleWithRecordsAndReducer
from torch.nn import functional as F

from ..utils.tensors import in_float32, spatial_map
from .base_distillation_loss import check_labels, entry, reads_labels

Maps = Sequence[torch.Tensor]
Grid = tuple[int, int] | None


class BaseFeatureLoss(ModuleWithRecordsAndReducer):
    """Base of the losses on feature maps or tokens: ``loss(student_maps, teacher_maps)``, two lists, pair by pair.

    ``FeatureTap`` takes them out of a network; the trainers do so for ``feature_distillation_loss``. The teacher's are
    detached and brought to the student's device. The larger map is average-pooled to the smaller one. The loss runs in
    float32 with autocast off (float64 stays float64). Each process takes its own batch, without
    ``DistributedLossWrapper``; a loss with parameters goes into ``DistributedDataParallel``. Shapes: lists of maps
    (B, C, H, W) or tokens (B, N, C), of which the last ones are the grid; those before, such as a class token, are left
    out. labels: (B,) or None, for ``reducer`` only. One value per sample.

    Args:
        student_grid: (height, width) of the student's tokens; by default the largest square.
        teacher_grid: the same of the teacher's tokens.
        **kwargs: ``reducer`` as in every PML loss.
    """

    def __init__(self, student_grid: Grid = None, teacher_grid: Grid = None, **kwargs: Any):
        super().__init__(**kwargs)
        self.student_grid, self.teacher_grid = student_grid, teacher_grid

    def forward(self, student_maps: Maps, teacher_maps: Maps, labels: torch.Tensor | None = None) -> torch.Tensor:
        """Return the reduced loss, a float32 (or float64) scalar under the default reducer."""
        self.reset_stats()
        check_maps(type(self).__name__, student_maps, teacher_maps)
        if reads_labels(self.reducer):
            check_labels(f"the ClassWeightedReducer of {type(self).__name__}", labels)
        labels = None if labels is None else c_f.to_device(labels, student_maps[0])
        if len(student_maps[0]) == 0:
            return torch.stack([(0 * in_float32(x)).sum() for x in (*student_maps, *self.parameters())]).sum()
        with torch.autocast(student_maps[0].device.type, enabled=False):
            students = [spatial_map(in_float32(s), self.student_grid) for s in student_maps]
            # A copy, because no backward may keep what comes out of torch.inference_mode().
            copies = (in_float32(t.detach().to(s.device, copy=True)) for s, t in zip(students, teacher_maps))
            losses = self.losses_of(students, [spatial_map(t, self.teacher_grid) for t in copies], labels)
            return self.reducer(losses, students[0].flatten(1), labels)

    def losses_of(self, student_maps: Maps, teacher_maps: Maps, labels: torch.Tensor | None) -> dict[str, Any]:
        pairs = [equal_sizes(*pair) for pair in zip(student_maps, teacher_maps)]
        return {"loss": entry(self.compute_loss(*zip(*pairs)))}

    def compute_loss(self, student_maps: Maps, teacher_maps: Maps) -> torch.Tensor:
        """Return one value per sample, (B,); the maps of a pair have equal heights and widths."""
        raise NotImplementedError


def check_maps(name: str, student_maps: Maps, teacher_maps: Maps) -> None:
    """Raise ``ValueError`` unless both are lists of as many maps or tokens for the same samples."""
    for side, maps in (("student_maps", student_maps), ("teacher_maps", teacher_maps)):
        if isinstance(maps, torch.Tensor) or not maps:
            given = f"a tensor of shape {tuple(maps.shape)}" if isinstance(maps, torch.Tensor) else repr(maps)
            raise ValueError(f"{name} expects {side} to be a list of feature maps, but it is {given}.")
    students, teachers = ([tuple(m.shape) for m in maps] for maps in (student_maps, teacher_maps))
    shapes = f"student_maps has the shapes {students} and teacher_maps {teachers}"
    if len(students) != len(teachers):
        raise ValueError(f"{name} compares the maps pair by pair, but {shapes}: their numbers differ.")
    if any(len(shape) not in (3, 4) for shape in students + teachers):
        expected = "(batch, channels, height, width) or tokens of shape (batch, tokens, channels)"
        raise ValueError(f"{name} expects maps of shape {expected}, but {shapes}.")
    if any(shape[0] != students[0][0] for shape in students + teachers):
        raise ValueError(f"{name} compares the same samples on both sides, but {shapes}: the numbers of rows differ.")


def equal_sizes(student: torch.Tensor, teacher: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Pool both maps to the smaller height and the smaller width."""
    size = min(student.shape[2], teacher.shape[2]), min(student.shape[3], teacher.shape[3])
    student, teacher = (m if m.shape[2:] == size else F.adaptive_avg_pool2d(m, size) for m in (student, teacher))
    return student, teacher
