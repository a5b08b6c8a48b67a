from collections.abc import Sequence

import torch


class ChannelRegressors(torch.nn.ModuleDict):
    """A 1x1 convolution with bias for each pair of feature maps, from the student's channels to the teacher's.

    Raises:
        ValueError: the lists are empty or of different lengths, or the maps have other channels.
    """

    def __init__(self, student_channels: Sequence[int], teacher_channels: Sequence[int]):
        if len(student_channels) != len(teacher_channels) or not student_channels:
            raise ValueError(
                "student_channels and teacher_channels must name the channels of each pair of maps, but are "
                f"{list(student_channels)} and {list(teacher_channels)}."
            )
        # Named, not numbered: record-keeper turns the names into those of tables, which may not begin with a digit.
        super().__init__(
            {f"map_{i}": torch.nn.Conv2d(*pair, 1) for i, pair in enumerate(zip(student_channels, teacher_channels))}
        )
        self.channels = list(student_channels), list(teacher_channels)

    def forward(self, student_maps: Sequence[torch.Tensor], teacher_maps: Sequence[torch.Tensor]) -> list[torch.Tensor]:
        """Return what the student's maps predict of the teacher's."""
        given = [m.shape[1] for m in student_maps], [m.shape[1] for m in teacher_maps]
        if given != self.channels:
            raise ValueError(
                f"The regressors are for student_channels={self.channels[0]} and teacher_channels="
                f"{self.channels[1]}, but the maps call for student_channels={given[0]} and "
                f"teacher_channels={given[1]}."
            )
        return [conv(m.to(next(conv.parameters()).dtype)) for conv, m in zip(self.values(), student_maps)]
