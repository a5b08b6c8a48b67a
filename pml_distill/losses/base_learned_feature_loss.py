from collections.abc import Sequence
from typing import Any

import torch

from .base_feature_loss import BaseFeatureLoss, Maps


class BaseLearnedFeatureLoss(BaseFeatureLoss):
    """Base of the losses that predict the teacher's maps from the student's by a learned 1x1 convolution each.

    Args:
        student_channels: channels of each of the student's maps.
        teacher_channels: channels of each of the teacher's maps.
        **kwargs: as in ``BaseFeatureLoss``.
    """

    def __init__(self, student_channels: Sequence[int], teacher_channels: Sequence[int], **kwargs: Any):
        super().__init__(**kwargs)
        self.channels = list(zip(student_channels, teacher_channels))
        if len(student_channels) != len(teacher_channels) or not self.channels:
            raise ValueError(
                "student_channels and teacher_channels must name the channels of each pair of maps, but are "
                f"{list(student_channels)} and {list(teacher_channels)}."
            )
        # Named, not numbered: record-keeper turns the names into those of tables, which may not begin with a digit.
        convolutions = {f"map_{i}": torch.nn.Conv2d(*pair, 1) for i, pair in enumerate(self.channels)}
        self.regressors = torch.nn.ModuleDict(convolutions)

    def compute_loss(self, student_maps: Maps, teacher_maps: Maps) -> torch.Tensor:
        given = [(s.shape[1], t.shape[1]) for s, t in zip(student_maps, teacher_maps)]
        if given != self.channels:
            raise ValueError(f"The loss is for maps of (student, teacher) channels {self.channels}, but has {given}.")
        pairs = zip(student_maps, teacher_maps, self.regressors.items())
        losses = [self.map_loss(name, conv(s.to(next(conv.parameters()).dtype)), t) for s, t, (name, conv) in pairs]
        return torch.stack(losses).sum(dim=0)

    def map_loss(self, name: str, found: torch.Tensor, expected: torch.Tensor) -> torch.Tensor:
        """Return one value per sample, (B,), for the prediction of a teacher's map."""
        raise NotImplementedError
