from typing import Any

import torch
from pytorch_metric_learning.losses import BaseMetricLossFunction
from torch.nn import functional as F

from ..distances import EuclideanDistance
from ..utils.distributed import num_processes
from ..utils.tensors import in_float32

IndicesTuple = tuple[torch.Tensor, ...]

#: The score of a place without a candidate: exp() of it is 0 in every dtype. Finite, because a softmax or a log-sum-exp
#: over nothing but -inf, and its gradient, are NaN.
ABSENT = -1e30


class BaseDistillationLoss(BaseMetricLossFunction):
    """Base of all distillation losses: ``loss(embeddings, labels, indices_tuple, ref_emb=teacher_embeddings)``.

    ``ref_emb`` holds the teacher's embeddings of the same samples in the same order, row for row. Here, once:

    - ``ref_emb`` must be given and have as many rows as ``embeddings``;
    - the teacher is detached and brought to the student's device;
    - the maths runs in float32 with autocast off, whatever comes in (float64 stays float64);
    - a zero row has no direction, so that a distance that normalises sends it a zero gradient (the bare
      normalisation of PyTorch would multiply the gradient by 1e12).

    Labels are optional: the losses do not read them, but ``ClassWeightedReducer`` does, and a trainer's batch with
    unlabelled rows has none; multi-hot ones are left out. Subclasses implement ``compute_loss`` and return one value
    per sample or per pair, so that every PML reducer but ``DivisorReducer`` applies; the default is the mean.

    Args:
        distance: any PML distance; default ``EuclideanDistance()``, of L2-normalised embeddings.
        reducer: any PML reducer; default ``MeanReducer()``.
        embedding_regularizer: as in every PML loss, applied to the student's embeddings.

    Shapes:
        embeddings: (B, Ds), float16, bfloat16, float32 or float64. ref_emb: (B, Dt). labels: (B,) or None.
        indices_tuple: None, a PML pair tuple (a1, p, a2, n) or triplet tuple (a, p, n). It is read as a set of
        (anchor, other) pairs: each pair counts once, however often the miner names it.

    Raises:
        ValueError: ``ref_emb`` is missing, is not 2-D, or has another number of rows (or of columns, for losses
            that compare the two spaces point by point).
    """

    #: Whether student and teacher embeddings must have the same width.
    equal_widths = False

    #: What to do about other widths; takes those of student and teacher.
    width_advice = (
        "Bring the student to the teacher's width with a projection embedder, for example torch.nn.Linear({}, {})."
    )

    #: Whether ``indices_tuple`` makes a difference; a loss on single samples ignores it.
    takes_pairs = True

    #: Whether a batch needs labels; only a loss that holds one of PML's does.
    needs_labels = False

    #: Whether the formula holds for distances only and refuses similarities (``distance.is_inverted``).
    needs_proper_distance = False

    def __init__(self, **kwargs):
        super().__init__(**kwargs)
        if self.needs_proper_distance and self.distance.is_inverted:
            raise ValueError(
                f"{type(self).__name__} needs a distance that grows with dissimilarity, such as LpDistance, but "
                f"distance is the similarity {type(self.distance).__name__}."
            )

    def forward(
        self,
        embeddings: torch.Tensor,
        labels: torch.Tensor | None = None,
        indices_tuple: IndicesTuple | None = None,
        ref_emb: torch.Tensor | None = None,
        ref_labels: torch.Tensor | None = None,
    ) -> torch.Tensor:
        """Return the reduced loss, a float32 (or float64) scalar under the default reducer."""
        teacher = self._checked_teacher(embeddings, ref_emb)
        # PML refuses labels of two dimensions, and none of its reducers could use them.
        if labels is not None and labels.ndim > 1:
            labels = ref_labels = None
        embeddings = in_float32(embeddings)
        # A copy, because no backward may keep what comes out of torch.inference_mode().
        teacher = teacher.detach().to(embeddings, copy=True)
        with torch.autocast(embeddings.device.type, enabled=False):
            return super().forward(embeddings, labels, indices_tuple, teacher, ref_labels)

    def _checked_teacher(self, embeddings: torch.Tensor, ref_emb: torch.Tensor | None) -> torch.Tensor:
        name = type(self).__name__
        if ref_emb is None:
            raise ValueError(
                f"{name} needs the teacher's embeddings: pass ref_emb=teacher_embeddings, a tensor with one row "
                f"for each row of embeddings {tuple(embeddings.shape)}."
            )
        shapes = f"embeddings has shape {tuple(embeddings.shape)} and ref_emb has shape {tuple(ref_emb.shape)}"
        if embeddings.ndim != 2 or ref_emb.ndim != 2:
            raise ValueError(f"{name} expects 2-D embeddings and ref_emb of shape (batch, width), but {shapes}.")
        if len(embeddings) != len(ref_emb):
            hint = ""
            if num_processes() > 1:
                hint = (
                    " DistributedLossWrapper(efficient=True) gathers only ref_emb; a distillation loss needs both "
                    "sides of every row: use DistributedLossWrapper(loss, efficient=False)."
                )
            raise ValueError(
                f"{name} compares student and teacher row for row, but {shapes}: the numbers of rows differ.{hint}"
            )
        if self.equal_widths and embeddings.shape[1] != ref_emb.shape[1]:
            raise ValueError(
                f"{name} needs equal widths, but {shapes}. "
                f"{self.width_advice.format(embeddings.shape[1], ref_emb.shape[1])}"
            )
        return ref_emb

    def get_default_distance(self) -> EuclideanDistance:
        """Return the distance to use where none is given."""
        return EuclideanDistance()

    def directed(self, embeddings: torch.Tensor) -> torch.Tensor:
        """Return the embeddings with the gradient of zero rows cut, where ``self.distance`` normalises them."""
        return cut_zero_rows(embeddings) if self.distance.normalize_embeddings else embeddings

    def distance_matrix(self, embeddings: torch.Tensor) -> torch.Tensor:
        """Return the (B, B) matrix of ``self.distance``; its diagonal may be off zero by rounding."""
        return self.distance(self.directed(embeddings))

    def pair_mask(self, indices_tuple: IndicesTuple, embeddings: torch.Tensor) -> torch.Tensor:
        """Return the (B, B) boolean matrix of the (anchor, other) pairs in a pair or triplet tuple."""
        size, device = len(embeddings), embeddings.device
        if len(indices_tuple) == 3:
            anchors, positives, negatives = indices_tuple
            indices_tuple = (anchors, positives, anchors, negatives)
        mask = torch.zeros(size, size, dtype=torch.bool, device=device)
        for anchors, others in (indices_tuple[:2], indices_tuple[2:]):
            mask[anchors.to(device).long(), others.to(device).long()] = True
        return mask.fill_diagonal_(False)

    def pair_losses(
        self,
        losses: torch.Tensor,
        indices_tuple: IndicesTuple | None,
        embeddings: torch.Tensor,
        name: str = "loss",
    ) -> dict[str, dict[str, Any]]:
        """Return PML's loss dictionary for a (B, B) matrix of losses: all pairs i != j, or those of the tuple."""
        if len(embeddings) < 2:
            return {name: self.zero_loss()}
        size = len(embeddings)
        if indices_tuple is None:
            rows = torch.arange(size, device=embeddings.device)
            anchors, others = off_diagonal(rows[:, None].expand(size, size)), off_diagonal(rows.expand(size, size))
            losses = off_diagonal(losses)
        else:
            anchors, others = self.pair_mask(indices_tuple, embeddings).nonzero(as_tuple=True)
            if len(anchors) == 0:
                return {name: self.zero_loss()}
            losses = losses[anchors, others]
        return {name: {"losses": losses, "indices": (anchors, others), "reduction_type": "pos_pair"}}

    def query_losses(
        self,
        losses: torch.Tensor,
        indices_tuple: IndicesTuple | None,
        embeddings: torch.Tensor,
        name: str = "loss",
    ) -> dict[str, dict[str, Any]]:
        """Return PML's loss dictionary for one value per query: all rows, or the anchors of the tuple."""
        queries = torch.arange(len(embeddings), device=embeddings.device)
        if indices_tuple is not None:
            queries = self.pair_mask(indices_tuple, embeddings).any(dim=1).nonzero().flatten()
            if len(queries) == 0:
                return {name: self.zero_loss()}
            losses = losses[queries]
        return {name: {"losses": losses, "indices": queries, "reduction_type": "element"}}


def check_not_negative(**numbers: float) -> None:
    """Raise ``ValueError`` for the first of the named numbers that is neither zero nor positive."""
    for name, value in numbers.items():
        if not value >= 0:
            raise ValueError(f"{name} must be zero or a positive number, but is {value}.")


def check_positive(**numbers: float) -> None:
    """Raise ``ValueError`` for the first of the named numbers that is not positive."""
    for name, value in numbers.items():
        if not value > 0:
            raise ValueError(f"{name} must be a positive number, but is {value}.")


def cut_zero_rows(rows: torch.Tensor) -> torch.Tensor:
    """Return the rows unchanged; those that are zero get no gradient."""
    if not rows.requires_grad:
        return rows
    is_zero = torch.linalg.vector_norm(rows.detach(), torch.inf, dim=1, keepdim=True) == 0
    return torch.where(is_zero, rows.detach(), rows)


def unit_rows(rows: torch.Tensor) -> torch.Tensor:
    """Return the rows at Euclidean length 1; a zero row stays zero and gets no gradient."""
    return F.normalize(cut_zero_rows(rows), dim=1)


def off_diagonal(mat: torch.Tensor) -> torch.Tensor:
    """Return the B(B - 1) entries of a (B, B) matrix that lie off its diagonal, row by row."""
    size = len(mat)
    # In row-major order the diagonal is every (B + 1)-th entry, the first included.
    return mat.flatten()[1:].view(size - 1, size + 1)[:, :-1].flatten()
