from collections.abc import Sequence

import torch
from pytorch_metric_learning.utils import common_functions as c_f
from pytorch_metric_learning.utils.module_with_records_and_reducer import ModuleWithRecordsAndReducer
from torch.nn import functional as F

from ..utils.tensors import in_float32

Maps = Sequence[torch.Tensor]


class BaseFeatureLoss(ModuleWithRecordsAndReducer):
    """Base of the losses on feature maps: ``loss(student_maps, teacher_maps)``, two lists that go pair by pair.

    ``FeatureTap`` takes the maps out of a network; the trainers do so for ``feature_distillation_loss``. Here, once:

    - the maps are checked; the teacher's are detached and brought to the student's device;
    - where heights or widths differ, the larger map is average-pooled to the size of the smaller one;
    - the maths runs in float32 with autocast off, whatever comes in (float64 stays float64).

    Subclasses implement ``compute_loss(student_maps, teacher_maps)`` and return one value per sample, the sum over
    the pairs of maps, so that every PML reducer of single elements applies; the default is the mean.

    The loss compares each sample with itself alone. With several processes each takes its own batch, without
    ``DistributedLossWrapper``; a loss that has parameters goes into ``DistributedDataParallel`` like the student.

    Args:
        **kwargs: ``reducer`` as in every PML loss; default ``MeanReducer()``.

    Shapes:
        student_maps: tensors (B, C_s, H_s, W_s), float16, bfloat16, float32 or float64; teacher_maps: as many
        tensors (B, C_t, H_t, W_t). labels: (B,) or None, read by reducers only.

    Raises:
        ValueError: the lists are empty or of different lengths; a map is not 4-D or has another number of samples.
    """

    def forward(self, student_maps: Maps, teacher_maps: Maps, labels: torch.Tensor | None = None) -> torch.Tensor:
        """Return the reduced loss, a float32 (or float64) scalar under the default reducer."""
        self.reset_stats()
        check_maps(type(self).__name__, student_maps, teacher_maps)
        device = student_maps[0].device
        with torch.autocast(device.type, enabled=False):
            # A copy, because no backward may keep what comes out of torch.inference_mode().
            pairs = [
                equal_sizes(in_float32(s), in_float32(t.detach().to(s.device, copy=True)))
                for s, t in zip(student_maps, teacher_maps)
            ]
            losses = self.compute_loss(*zip(*pairs))
            loss_dict = {
                "loss": {
                    "losses": losses,
                    "indices": torch.arange(len(losses), device=device),
                    "reduction_type": "element",
                }
            }
            labels = None if labels is None else c_f.to_device(labels, losses)
            return self.reducer(loss_dict, pairs[0][0].flatten(1), labels)

    def compute_loss(self, student_maps: Maps, teacher_maps: Maps) -> torch.Tensor:
        """Return one value per sample, (B,); the maps of a pair have equal heights and widths."""
        raise NotImplementedError


def check_maps(name: str, student_maps: Maps, teacher_maps: Maps) -> None:
    """Raise ``ValueError`` unless both are lists of as many (B, C, H, W) tensors for the same samples."""
    for side, maps in (("student_maps", student_maps), ("teacher_maps", teacher_maps)):
        if isinstance(maps, torch.Tensor) or not maps:
            given = f"a tensor of shape {tuple(maps.shape)}" if isinstance(maps, torch.Tensor) else repr(maps)
            raise ValueError(f"{name} expects {side} to be a list of feature maps, but it is {given}.")
    shapes = f"student_maps has the shapes {shapes_of(student_maps)} and teacher_maps {shapes_of(teacher_maps)}"
    if len(student_maps) != len(teacher_maps):
        raise ValueError(f"{name} compares the maps pair by pair, but {shapes}: their numbers differ.")
    maps = (*student_maps, *teacher_maps)
    if any(m.ndim != 4 for m in maps):
        raise ValueError(f"{name} expects feature maps of shape (batch, channels, height, width), but {shapes}.")
    if any(len(m) != len(maps[0]) for m in maps):
        raise ValueError(f"{name} compares the same samples on both sides, but {shapes}: the numbers of rows differ.")


def shapes_of(maps: Maps) -> list[tuple[int, ...]]:
    """Return the shapes, for messages."""
    return [tuple(m.shape) for m in maps]


def equal_sizes(student: torch.Tensor, teacher: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Pool both maps to the smaller height and the smaller width."""
    size = min(student.shape[2], teacher.shape[2]), min(student.shape[3], teacher.shape[3])
    student, teacher = (m if m.shape[2:] == size else F.adaptive_avg_pool2d(m, size) for m in (student, teacher))
    return student, teacher
