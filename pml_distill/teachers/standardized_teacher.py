import warnings
from collections.abc import Callable, Iterable
from typing import Any

import torch

from ..datasets import Views
from ..datasets.items import read_item
from ..losses.hash_centers import hadamard
from ..utils.distributed import gathered
from ..utils.tensors import in_float32
from .ask import AlwaysEval, ask, refuse_unfrozen

KINDS = ("center", "pca", "whiten", "phi-s")
#: Added to each variance, as a share of their mean: what half precision does to embeddings lies below it.
RIDGE = 1e-5


class StandardizedTeacher(AlwaysEval):
    r"""A teacher whose embeddings are centred, rotated and scaled by statistics of the training images.

    .. math:: y = A \, (t - \mu)

    With the covariance :math:`U \Lambda U^T` of the embeddings and its first ``width`` directions :math:`U_w`,

    - ``"center"``: :math:`A = I`;
    - ``"pca"``: :math:`A = U_w^T`; the first coordinates are those with the largest variance;
    - ``"whiten"``: :math:`A = (\Lambda_w + \epsilon)^{-1/2} U_w^T`; each coordinate has variance 1;
    - ``"phi-s"``: :math:`A = H U_w^T / \sqrt{\mathrm{mean} \, \Lambda_w}` with a Hadamard matrix H; each coordinate has
      variance 1, but by one scale for all, which keeps distances in proportion ("PHI-S: Distribution Balancing for
      Label-Free Multi-Teacher Distillation", Ranzinger et al. 2024, the standardisation of NVIDIA's RADIO).

    Embeddings (B, Dt) are taken as the teacher returns them; the result, (B, width), is not normalised. ``width=None``
    is the teacher's own. ``state_dict()`` holds mean and matrix but not the teacher: what was fitted with a cache
    serves its network as well.

    Raises:
        ValueError: ``kind`` is unknown; ``width`` is below 1 or given for ``"center"``; the teacher is not frozen; it
            is called before ``fit`` or ``load_state_dict``.

    Example:
        >>> teacher = StandardizedTeacher(torch.nn.Identity(), width=2, kind="pca")
        >>> teacher.fit([torch.randn(50, 8), torch.randn(50, 8)])(torch.randn(3, 8)).shape
        torch.Size([3, 2])
    """

    mean: torch.Tensor
    matrix: torch.Tensor

    def __init__(self, teacher: Callable[..., Any], width: int | None = None, kind: str = "whiten"):
        super().__init__()
        if kind not in KINDS:
            raise ValueError(f"kind must be one of {', '.join(KINDS)}, but is {kind!r}.")
        if width is not None and (width < 1 or kind == "center"):
            raise ValueError(f"width must be at least 1, or None, as for 'center'; given are {width} and {kind!r}.")
        refuse_unfrozen(teacher)
        self.teacher, self.width, self.kind = teacher, width, kind
        self.register_buffer("mean", torch.empty(0))
        self.register_buffer("matrix", torch.empty(0, 0))
        self.register_load_state_dict_post_hook(without_teacher)
        self.eval()

    @property
    def needs_index(self) -> bool:
        """Whether the teacher needs the rows of a batch."""
        return getattr(self.teacher, "needs_index", False)

    @torch.no_grad()
    def fit(self, loader: Iterable[Any]) -> "StandardizedTeacher":
        """Take mean and covariance from one pass over a loader, in float64, and return the teacher.

        Batches are (data, labels, index), (data, labels) or data. Under ``torch.distributed`` all processes call this,
        each with its share of the images, and have the same result. ``ValueError``: ``loader`` is empty; embeddings are
        not (B, Dt) and finite, or all alike; ``width`` exceeds Dt; no Hadamard matrix has this width for ``"phi-s"``.
        """
        moments = None
        for batch in loader:
            data, _, index = read_item(batch)
            embeddings = ask(self.teacher, Views.of(data).teacher, index)
            if embeddings.ndim != 2 or not embeddings.isfinite().all():
                raise ValueError(
                    f"The teacher must return finite embeddings (B, Dt), but returned {tuple(embeddings.shape)}, with "
                    f"{int((~embeddings.isfinite()).sum())} values that are NaN or infinite."
                )
            moments = joined(moments, moments_of(embeddings))
        total = None
        for part in gathered(None if moments is None else [value.cpu() for value in moments]):
            total = joined(total, part)
        if total is None or total[0] == 0:
            raise ValueError("loader is empty: there are no embeddings to fit the StandardizedTeacher to.")
        count, mean, scatter = total
        # The result of the first process, so that no rank differs in a sign or a last digit.
        matrix = gathered(self.matrix_of(scatter / count, int(count)))[0]
        device = self.mean.device
        self.mean, self.matrix = mean.float().to(device), matrix.float().to(device)
        return self

    def matrix_of(self, covariance: torch.Tensor, count: int) -> torch.Tensor:
        """Return A, (width, Dt), for the covariance of so many rows."""
        full = len(covariance)
        width = full if self.width is None else self.width
        if width > full:
            raise ValueError(f"width must be at most {full}, the teacher's, but is {width}.")
        if self.kind == "center":
            return torch.eye(full, dtype=torch.float64)
        variances, directions = torch.linalg.eigh(covariance)
        variances, directions = variances.flip(0)[:width].clamp_min(0), directions.flip(1)[:, :width]
        # The sign of a direction is arbitrary: its largest number is positive here.
        largest = directions.gather(0, directions.abs().argmax(0, keepdim=True))
        rotation = (directions * largest.sign()).T
        if self.kind == "pca":
            return rotation
        mean_variance = variances.mean()
        if mean_variance == 0:
            raise ValueError(f"All {count} embeddings are alike: there is no variance to scale to 1.")
        if self.kind == "phi-s":
            mixing = hadamard(width)
            if mixing is None:
                smaller = next(size for size in range(width, 0, -1) if hadamard(size) is not None)
                raise ValueError(f'No Hadamard matrix of width {width} is known for "phi-s". Give width={smaller}.')
            return mixing.double() @ rotation / (width * mean_variance).sqrt()
        if count <= width:
            warnings.warn(
                f"StandardizedTeacher whitens {width} coordinates by {count} rows, which have fewer directions. Fit it "
                "to more images, or give a smaller width.",
                stacklevel=3,
            )
        return rotation / (variances + RIDGE * mean_variance).sqrt()[:, None]

    @torch.no_grad()
    def standardize(self, embeddings: torch.Tensor) -> torch.Tensor:
        """Return what becomes of embeddings (B, Dt) of the teacher: (B, width) in float32, float64 for float64."""
        if not len(self.mean):
            raise ValueError("StandardizedTeacher has no statistics yet. Call fit(loader) or load_state_dict(state).")
        if embeddings.ndim != 2 or embeddings.shape[1] != len(self.mean):
            raise ValueError(f"embeddings must be (B, {len(self.mean)}), but are {tuple(embeddings.shape)}.")
        embeddings = in_float32(embeddings)
        mean, matrix = (value.to(embeddings) for value in (self.mean, self.matrix))
        with torch.autocast(embeddings.device.type, enabled=False):
            return (embeddings - mean) @ matrix.T

    def forward(self, data: Any, index: torch.Tensor | None = None) -> torch.Tensor:
        """Return the standardised embeddings of a batch."""
        return self.standardize(ask(self.teacher, data, index))

    def state_dict(self, *args: Any, prefix: str = "", **kwargs: Any) -> dict[str, Any]:  # type: ignore[override]
        """Return the mean and the matrix."""
        state = super().state_dict(*args, prefix=prefix, **kwargs)
        for name in [name for name in state if name.startswith(f"{prefix}teacher.")]:
            del state[name]
        return state

    def _load_from_state_dict(self, state: dict[str, Any], prefix: str, *args: Any) -> None:
        mean, matrix = (state.get(prefix + name) for name in ("mean", "matrix"))
        if mean is not None and matrix is not None:
            if self.width not in (None, len(matrix)):
                raise ValueError(f"The state is of a StandardizedTeacher of width {len(matrix)}, not {self.width}.")
            # Before it is fitted it has no size.
            self.mean, self.matrix = torch.empty_like(mean), torch.empty_like(matrix)
        super()._load_from_state_dict(state, prefix, *args)


def without_teacher(module: torch.nn.Module, keys: Any) -> None:
    """Do not ask for the teacher's weights, which the state does not hold."""
    keys.missing_keys[:] = [key for key in keys.missing_keys if not key.startswith("teacher.")]


Moments = list[torch.Tensor]


def moments_of(embeddings: torch.Tensor) -> Moments:
    """Return number, mean and sum of the squared deviations of rows."""
    values = (embeddings.cpu() if embeddings.device.type == "mps" else embeddings).double()
    mean = values.mean(0) if len(values) else values.sum(0)
    return [torch.tensor(len(values), dtype=torch.float64), mean, (values - mean).T @ (values - mean)]


def joined(ours: Moments | None, theirs: Moments | None) -> Moments | None:
    """Return the moments of the rows of both (Chan, Golub & LeVeque 1979)."""
    if ours is None or theirs is None:
        return theirs if ours is None else ours
    count = ours[0] + theirs[0]
    if count == 0:
        return ours
    shift = theirs[1] - ours[1]
    mean = ours[1] + shift * (theirs[0] / count)
    return [count, mean, ours[2] + theirs[2] + torch.outer(shift, shift) * (ours[0] * theirs[0] / count)]
