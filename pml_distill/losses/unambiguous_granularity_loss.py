from collections import OrderedDict
from collections.abc import Sequence
from typing import Any

import torch
from torch.nn import functional as F

from .base_distillation_loss import check_labels, chosen_losses, unit_rows
from .base_feature_loss import BaseFeatureLoss, Maps


class UnambiguousGranularityLoss(BaseFeatureLoss):
    r"""Local embeddings of the cells that the teacher classifies rightly, for asymmetric retrieval (UGD).

    .. math:: L = \sum_{g \in grids} \frac{1}{|R_g|} \sum_{c \in R_g}
        \left\| \frac{h(\bar t_c)}{\|h(\bar t_c)\|} - \frac{r_g(\bar s_c)}{\|r_g(\bar s_c)\|} \right\|_2

    Both maps are average-pooled to g x g cells. The teacher's embedder h embeds each cell of its last map; R_g are the
    cells whose embedding its classifier assigns to the label of the image. The student's cells go through a learned
    projection r_g (batch norm, linear, batch norm); train it as the regressors of ``HintLoss``. Shapes: lists of one
    map, labels (B,); as sub-loss ``grid_4`` and so on, one value per cell. Source: Zhang et al., "Unambiguous
    granularity distillation for asymmetric image retrieval", Neural Networks 2025, from the authors' code: this loss
    with weight 2, ``AbsoluteTeacherLoss`` with weight 2 (ResNet-18) or 5 (MobileNetV3), grids of a 16th and a 32nd of
    the student's image, and the map of the student's third stage.

    Args:
        student_channels: channels of the student's map.
        embedder: the teacher's head, (N, C) pooled features to (N, ``embedding_size``), in eval mode and not saved.
        classifier: the teacher's classifier, of these embeddings, likewise.
        embedding_size: width of the teacher's embeddings.
        grids: cells along each side of the image.
    """

    def __init__(
        self,
        student_channels: int,
        embedder: torch.nn.Module,
        classifier: torch.nn.Module,
        embedding_size: int,
        grids: Sequence[int] = (8, 4),
        **kwargs: Any,
    ):
        self.grids = tuple(grids)
        super().__init__(**kwargs)
        if embedder.training or classifier.training:
            raise ValueError("embedder and classifier must be in eval mode; call eval() on both.")
        # In a tuple, so that they are neither trained nor saved with the loss.
        self.head = embedder, classifier
        self.projections = torch.nn.ModuleDict()
        for name in self.sub_loss_names():
            linear = torch.nn.Linear(student_channels, embedding_size, bias=False)
            torch.nn.init.kaiming_normal_(linear.weight, mode="fan_out")
            norms = torch.nn.BatchNorm1d(student_channels), torch.nn.BatchNorm1d(embedding_size)
            layers = OrderedDict(norm=norms[0], linear=linear, last_norm=norms[1])
            self.projections[name] = torch.nn.Sequential(layers)

    def sub_loss_names(self):
        return [f"grid_{grid}" for grid in self.grids]

    def losses_of(self, student_maps: Maps, teacher_maps: Maps, labels: Any) -> dict[str, Any]:
        check_labels(type(self).__name__, labels)
        if len(student_maps) > 1:
            raise ValueError(f"{type(self).__name__} takes one map of each side, but was given {len(student_maps)}.")
        losses = {}
        for grid, (name, project) in zip(self.grids, self.projections.items()):
            rows = torch.arange(len(student_maps[0]), device=student_maps[0].device).repeat_interleave(grid**2)
            with torch.no_grad():
                expected = self.head[0](cells(teacher_maps[0], grid))
                right = self.head[1](expected).argmax(dim=1) == labels[rows]
            found = project(cells(student_maps[0], grid))
            errors = torch.linalg.vector_norm(unit_rows(expected) - unit_rows(found), dim=1)
            losses[name] = chosen_losses(self.reducer, name, errors, right, rows)
        return losses


def cells(feature_map: torch.Tensor, grid: int) -> torch.Tensor:
    """Return the means of grid x grid cells of each map, (B * grid * grid, C)."""
    return F.adaptive_avg_pool2d(feature_map, grid).flatten(2).transpose(1, 2).flatten(0, 1)
