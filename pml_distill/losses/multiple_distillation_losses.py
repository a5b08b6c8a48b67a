from collections.abc import Iterable, Mapping
from typing import Any

import torch

from .base_distillation_loss import BaseDistillationLoss


class MultipleDistillationLosses(BaseDistillationLoss):
    r"""The weighted sum of several distillation losses: PML's ``MultipleLosses`` with a teacher.

    .. math:: L = \sum_k w_k \, L_k

    ``ref_emb``, labels and pairs go to every loss. A loss with a miner of its own takes what this miner finds in the
    batch; a miner of ``pml_distill.miners`` is given the teacher's embeddings. A PML loss among them sees ``ref_emb``
    and ``ref_labels`` as its reference.

    Args:
        losses: a dict, or a list whose members are named by their class, with a number where a class is there twice.
        weights: as many numbers, a dict or a list like ``losses``; 1 each by default.
        miners: as many miners or None, a list like ``losses``, or a dict with some of its keys.

    Attributes:
        sub_losses: after each call the detached value of each loss by name, without its weight.

    Raises:
        ValueError: there are no losses, or weights or miners do not go with them.

    Example:
        >>> from pml_distill.losses import AbsoluteTeacherLoss, RKDDistanceLoss
        >>> loss = MultipleDistillationLosses([AbsoluteTeacherLoss(), RKDDistanceLoss()], weights=[1, 0.5])
        >>> value = loss(torch.rand(8, 4), ref_emb=torch.rand(8, 4))
        >>> list(loss.sub_losses)
        ['AbsoluteTeacherLoss', 'RKDDistanceLoss']
    """

    def __init__(
        self,
        losses: Mapping[str, torch.nn.Module] | Iterable[torch.nn.Module],
        weights: Mapping[str, float] | Iterable[float] | None = None,
        miners: Mapping[str, Any] | Iterable[Any] | None = None,
    ):
        super().__init__()
        named = dict(losses) if isinstance(losses, Mapping) else named_by_class(list(losses))
        if not named:
            raise ValueError("losses is empty; give at least one distillation loss.")
        self.losses = torch.nn.ModuleDict(named)
        self.weights = dict.fromkeys(named, 1.0) if weights is None else by_name("weights", weights, named)
        if set(self.weights) != set(named):
            raise ValueError(f"weights must have the keys {list(named)}, but has {list(self.weights)}.")
        found = {} if miners is None else by_name("miners", miners, named)
        self.miners = torch.nn.ModuleDict({name: miner for name, miner in found.items() if miner is not None})
        if not set(found) <= set(named):
            raise ValueError(f"miners must have keys of {list(named)}, but has {list(found)}.")
        self.takes_pairs = any(getattr(loss, "takes_pairs", True) for loss in named.values())
        self.needs_labels = any(getattr(loss, "needs_labels", True) for loss in named.values())
        self.sub_losses: dict[str, torch.Tensor] = {}

    def forward(self, embeddings, labels=None, indices_tuple=None, ref_emb=None, ref_labels=None, width=None):
        """Return the weighted sum, and keep its parts in ``sub_losses``; ``width`` is for ``MatryoshkaLoss``."""
        values = {}
        for name, loss in self.losses.items():
            pairs = indices_tuple
            if name in self.miners:
                asks = getattr(self.miners[name], "asks_teacher", False)
                pairs = self.miners[name](embeddings, labels, **({"ref_emb": ref_emb} if asks else {}))
            values[name] = at_width(loss, width, embeddings, labels, pairs, ref_emb, ref_labels)
        return self.weighted_sum(values)

    def weighted_sum(self, values: dict[str, torch.Tensor]) -> torch.Tensor:
        """Keep the losses by name, detached, and return their sum."""
        self.sub_losses = {name: value.detach() for name, value in values.items()}
        return torch.stack([self.weights[name] * value for name, value in values.items()]).sum()


def at_width(loss, width, embeddings, labels, indices_tuple, ref_emb, ref_labels):
    """Return a loss of embeddings cut to ``width``, or whole; where widths must be equal the teacher is cut too."""
    if isinstance(loss, MultipleDistillationLosses):
        return loss(embeddings, labels, indices_tuple, ref_emb, ref_labels, width)
    if width is not None and ref_emb is not None and getattr(loss, "equal_widths", True):
        ref_emb = ref_emb[:, :width]
    return loss(embeddings, labels, indices_tuple, ref_emb, ref_labels)


def named_by_class(losses: list[torch.nn.Module]) -> dict[str, torch.nn.Module]:
    """Return the losses by the name of their class, numbered where a class is there twice."""
    names = [type(loss).__name__ for loss in losses]
    numbered = [f"{name}_{names[:i].count(name)}" if names.count(name) > 1 else name for i, name in enumerate(names)]
    return dict(zip(numbered, losses))


def by_name(what: str, values: Any, named: Mapping[str, Any]) -> dict[str, Any]:
    """Return a dict of the values, which go with the losses in their order unless they are a dict already."""
    if isinstance(values, Mapping):
        return dict(values)
    values = list(values)
    if len(values) != len(named):
        raise ValueError(f"{what} must be one for each of the {len(named)} losses, but there are {len(values)}.")
    return dict(zip(named, values))
