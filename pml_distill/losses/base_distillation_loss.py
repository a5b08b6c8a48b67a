from typing import Any

import torch
from pytorch_metric_learning.losses import BaseMetricLossFunction
from pytorch_metric_learning.reducers import ClassWeightedReducer, MeanReducer, MultipleReducers
from torch.nn import functional as F

from ..distances import EuclideanDistance
from ..utils.distributed import num_processes
from ..utils.tensors import in_float32

#: The score of a place without a candidate. Finite, because a softmax over nothing but -inf, and its gradient, are NaN.
ABSENT = -1e30


class BaseDistillationLoss(BaseMetricLossFunction):
    """Base of all distillation losses: ``loss(embeddings, labels, indices_tuple, ref_emb=teacher_embeddings)``.

    ``ref_emb`` is detached and brought to the student's device. The loss runs in float32 with autocast off (float64
    stays float64). An empty batch is a zero loss; a zero row gets no gradient from a distance that normalises.
    Subclasses implement ``compute_loss`` and return one value per sample or pair, so that every PML reducer applies.

    Arguments are those of every PML loss: ``distance`` (default ``EuclideanDistance()``, of L2-normalised embeddings),
    ``reducer``, ``embedding_regularizer`` (of the student's embeddings). Shapes: embeddings (B, Ds), ref_emb (B, Dt) of
    the same samples; labels (B,) or None, for ``ClassWeightedReducer``. indices_tuple: a PML pair or triplet tuple,
    read as a set of (anchor, other) pairs: each counts once.
    """

    default_distance: type = EuclideanDistance
    #: Whether both embeddings must have the same width, and what to do where they have not.
    equal_widths = False
    width_advice = "Give the student a projection embedder, for example torch.nn.Linear({}, {})."
    #: Whether ``indices_tuple`` makes a difference; a loss on single samples ignores it.
    takes_pairs = True
    #: Whether a batch needs labels, for a ``ClassWeightedReducer`` or a loss of PML's inside.
    needs_labels = False
    #: Whether the formula holds for distances only and refuses similarities (``distance.is_inverted``).
    needs_proper_distance = False
    #: The sub-losses, which are reduced one by one and added.
    part_names: tuple[str, ...] = ("loss",)

    def __init__(self, **kwargs):
        super().__init__(**kwargs)
        if self.needs_proper_distance and self.distance.is_inverted:
            raise ValueError(
                f"{type(self).__name__} needs a distance that grows with dissimilarity, such as LpDistance, but "
                f"distance is the similarity {type(self.distance).__name__}."
            )
        self.needs_labels = reads_labels(self.reducer)

    def forward(self, embeddings, labels=None, indices_tuple=None, ref_emb=None, ref_labels=None):
        """Return the reduced loss, a float32 (or float64) scalar under the default reducer."""
        self.check_teacher(embeddings, ref_emb)
        if labels is not None and labels.ndim > 1:  # PML refuses them, and none of its reducers could use them
            labels = ref_labels = None
        if self.needs_labels:
            check_labels(f"the ClassWeightedReducer of {type(self).__name__}", labels)
        embeddings = in_float32(embeddings)
        if len(embeddings) == 0:
            return self.reducer(self.zero_losses(), embeddings, labels)
        # A copy, because no backward may keep what comes out of torch.inference_mode().
        teacher = ref_emb.detach().to(embeddings, copy=True)
        with torch.autocast(embeddings.device.type, enabled=False):
            return super().forward(embeddings, labels, indices_tuple, teacher, ref_labels)

    def check_teacher(self, embeddings: torch.Tensor, ref_emb: torch.Tensor | None) -> None:
        """Raise ``ValueError`` unless the teacher's embeddings go with the student's."""
        name, shape = type(self).__name__, tuple(embeddings.shape)
        if ref_emb is None:
            raise ValueError(
                f"{name} needs the teacher's embeddings: pass ref_emb=teacher_embeddings, row for row of {shape}."
            )
        shapes = f"embeddings has shape {shape} and ref_emb has shape {tuple(ref_emb.shape)}"
        if embeddings.ndim != 2 or ref_emb.ndim != 2:
            raise ValueError(f"{name} expects 2-D embeddings and ref_emb of shape (batch, width), but {shapes}.")
        if len(embeddings) != len(ref_emb):
            advice = " DistributedLossWrapper needs efficient=False for it." if num_processes() > 1 else ""
            raise ValueError(f"{name} compares student and teacher row for row, but {shapes}.{advice}")
        if self.equal_widths and embeddings.shape[1] != ref_emb.shape[1]:
            advice = self.width_advice.format(embeddings.shape[1], ref_emb.shape[1])
            raise ValueError(f"{name} needs equal widths, but {shapes}. {advice}")

    def get_default_distance(self):
        return self.default_distance()

    def _sub_loss_names(self):
        return list(self.part_names)

    def directed(self, embeddings: torch.Tensor) -> torch.Tensor:
        """Return the embeddings with the gradient of zero rows cut, where ``self.distance`` normalises them."""
        return cut_zero_rows(embeddings) if self.distance.normalize_embeddings else embeddings

    def distance_matrix(self, embeddings: torch.Tensor) -> torch.Tensor:
        """Return the (B, B) matrix of ``self.distance``; its diagonal may be off zero by rounding."""
        return self.distance(self.directed(embeddings))

    def pair_mask(self, indices_tuple: Any, embeddings: torch.Tensor) -> torch.Tensor:
        """Return the (B, B) boolean matrix of the (anchor, other) pairs in a tuple; such a matrix is returned as is."""
        if isinstance(indices_tuple, torch.Tensor):
            return indices_tuple
        size, device = len(embeddings), embeddings.device
        first, positives, *second, negatives = indices_tuple
        mask = torch.zeros(size, size, dtype=torch.bool, device=device)
        for anchors, others in ((first, positives), (second[0] if second else first, negatives)):
            mask[anchors.to(device).long(), others.to(device).long()] = True
        mask.diagonal().zero_()
        return mask

    def pair_losses(self, losses: torch.Tensor, indices_tuple: Any, embeddings: torch.Tensor, name: str = "loss"):
        """Return PML's loss dictionary for a (B, B) matrix of losses: all pairs i != j, or those of the tuple."""
        size = len(embeddings)
        if size < 2:
            return {name: self.zero_loss()}
        if indices_tuple is not None:
            return {name: chosen_losses(self.reducer, name, losses, self.pair_mask(indices_tuple, embeddings))}
        rows = torch.arange(size, device=embeddings.device)
        pairs = off_diagonal(rows[:, None].expand(size, size)), off_diagonal(rows.expand(size, size))
        return {name: entry(off_diagonal(losses), pairs, "pos_pair")}

    def query_losses(self, losses: torch.Tensor, indices_tuple: Any, embeddings: torch.Tensor, name: str = "loss"):
        """Return PML's loss dictionary for one value per query: all rows, or the anchors of the tuple."""
        if indices_tuple is None:
            return {name: entry(losses)}
        anchors = self.pair_mask(indices_tuple, embeddings).any(dim=1)
        return {name: chosen_losses(self.reducer, name, losses, anchors)}


def entry(losses: torch.Tensor, indices: Any = None, kind: str = "element") -> dict[str, Any]:
    """Return PML's loss dictionary of some values, by default one per row; ``DivisorReducer`` takes their mean."""
    indices = torch.arange(len(losses), device=losses.device) if indices is None else indices
    return {"losses": losses, "indices": indices, "reduction_type": kind, "divisor": len(losses)}


def already_reduced(value: torch.Tensor | int) -> dict[str, Any]:
    """Return PML's loss dictionary of a single value that no reducer touches."""
    return {"losses": value, "indices": None, "reduction_type": "already_reduced"}


def chosen_losses(
    reducer: torch.nn.Module, name: str, losses: torch.Tensor, chosen: torch.Tensor, *indices: torch.Tensor
) -> dict[str, Any]:
    """Return PML's loss dictionary of the values at the places of a mask, (B, B) or (N,), or at their ``indices``."""
    reducers = reducer.reducers if isinstance(reducer, MultipleReducers) else {}
    if type(reducers[name] if name in reducers else reducer) is MeanReducer:
        # How many there are is known to the device alone: no waiting for it, and one graph when compiled.
        return already_reduced(losses.where(chosen, 0).sum() / chosen.sum().clamp(min=1))
    places = chosen.nonzero(as_tuple=True)
    if len(places[0]) == 0:
        return already_reduced(0)
    found = tuple(x[places] for x in indices) or places
    return entry(losses[places], *((found, "pos_pair") if len(found) == 2 else found))


def reads_labels(reducer: torch.nn.Module) -> bool:
    """Whether a reducer weights the losses by class."""
    return any(isinstance(part, ClassWeightedReducer) for part in reducer.modules())


def check_labels(name: str, labels: torch.Tensor | None) -> None:
    """Raise ``ValueError`` if the classes are not there."""
    if labels is None or labels.ndim != 1:
        given = "are None or multi-hot" if labels is None else f"have shape {tuple(labels.shape)}"
        raise ValueError(f"{name} needs a class for each row, but labels {given}. Pass labels of shape (batch,).")


def set_numbers(loss: Any, least: int | None = None, **numbers: float) -> None:
    """Set attributes that PML's record-keeper logs; raise ``ValueError`` below ``least``, without it if not above 0."""
    words = {None: "a positive number", 0: "zero or a positive number"}.get(least, f"at least {least}")
    for name, value in numbers.items():
        if not (value > 0 if least is None else value >= least):
            raise ValueError(f"{name} must be {words}, but is {value}.")
        setattr(loss, name, value)
    loss.add_to_recordable_attributes(list_of_names=list(numbers), is_stat=False)


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


def diagonal_mask(rows: torch.Tensor) -> torch.Tensor:
    """Return the (B, B) boolean matrix that is true on its diagonal."""
    return torch.eye(len(rows), dtype=torch.bool, device=rows.device)
