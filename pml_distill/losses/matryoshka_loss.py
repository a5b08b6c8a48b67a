from collections.abc import Sequence

import torch

from .multiple_distillation_losses import MultipleDistillationLosses, by_name


class MatryoshkaLoss(MultipleDistillationLosses):
    r"""A loss summed over nested widths, so that embeddings may be cut short after training (Matryoshka, MRL).

    .. math:: L = \sum_m w_m \, L(f_{1..m}), \quad m \in \text{widths}

    A loss that needs equal widths compares the first m coordinates of the student with the first m of the teacher: give
    it a teacher whose coordinates are sorted by variance (PCA). All other distillation losses see the whole teacher at
    every width. ``loss`` may be one of PML's, and then needs no ``ref_emb``; where it has a weight or a queue for each
    coordinate, as ``ProxyAnchorLoss(classes, width)`` has, give a list with one for each width. ``weights`` are 1 each
    by default. The value at each width is kept in ``sub_losses`` (``"width_32"``), detached and without its weight.
    Source: Kusupati et al., "Matryoshka Representation Learning", NeurIPS 2022, equation 1, with its weights of 1.
    """

    def __init__(
        self,
        loss: torch.nn.Module | Sequence[torch.nn.Module],
        widths: Sequence[int] = (32, 64, 128),
        weights: Sequence[float] | None = None,
    ):
        if not widths or min(widths) < 1 or len(set(widths)) < len(widths):
            raise ValueError(f"widths must be different numbers of coordinates, each at least 1, but is {widths}.")
        names = dict.fromkeys(f"width_{width}" for width in widths)
        if isinstance(loss, torch.nn.Module):
            tied = [name for name, x in (*loss.named_parameters(), *loss.named_buffers()) if x.ndim > 1]
            if tied and len(widths) > 1:
                raise ValueError(
                    f"{type(loss).__name__} has {', '.join(tied)} for one width only; give a list with one loss for "
                    f"each of the widths {tuple(widths)}."
                )
            loss = [loss] * len(widths)
        super().__init__(by_name("loss", loss, names), weights)
        self.widths, self.cuts = tuple(widths), dict(zip(names, widths))

    def forward(self, embeddings, labels=None, indices_tuple=None, ref_emb=None, ref_labels=None, width=None):
        """Return the weighted sum over the widths, and keep its parts in ``sub_losses``."""
        if not self.needs_labels:
            self.check_teacher(embeddings, ref_emb)
        if embeddings.shape[1] < max(self.widths):
            raise ValueError(f"widths go up to {max(self.widths)}, but embeddings has shape {tuple(embeddings.shape)}.")
        return super().forward(embeddings, labels, indices_tuple, ref_emb, ref_labels)
