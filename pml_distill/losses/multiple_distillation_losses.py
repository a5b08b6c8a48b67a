from collections.abc import Iterable, Mapping
from typing import Any

import torch

from .base_distillation_loss import BaseDistillationLoss


class MultipleDistillationLosses(BaseDistillationLoss):
    r"""The weighted sum of several distillation losses, w_1 L_1 + w_2 L_2 + ...: ``MultipleLosses`` with a teacher.

    ``ref_emb``, labels and pairs go to every loss; a loss with a miner of its own takes what this miner finds in the
    batch, by the teacher's embeddings if it is one of ``pml_distill.miners``. A PML loss sees ``ref_emb`` and
    ``ref_labels`` as its reference. ``sub_losses`` holds the detached value of each by name, without its weight.

    Args:
        losses: a dict, or a list whose members are named by their class, with a number where a class is there twice.
        weights: as many numbers, a dict or a list like ``losses``; 1 each by default.
        miners: as many miners or None, a list like ``losses``, or a dict with some of its keys.
    """

    def __init__(
        self,
        losses: Mapping[str, torch.nn.Module] | Iterable[torch.nn.Module],
        weights: Mapping[str, float] | Iterable[float] | None = None,
        miners: Mapping[str, Any] | Iterable[Any] | None = None,
    ):
        super().__init__()
        if not isinstance(losses, Mapping):
            losses = list(losses)
            kinds = [type(loss).__name__ for loss in losses]
            names = [k if kinds.count(k) == 1 else f"{k}_{kinds[:i].count(k)}" for i, k in enumerate(kinds)]
            losses = dict(zip(names, losses))
        if not losses:
            raise ValueError("losses is empty; give at least one distillation loss.")
        self.losses = torch.nn.ModuleDict(losses)
        self.weights = by_name("weights", [1.0] * len(losses) if weights is None else weights, losses)
        if set(self.weights) != set(losses):
            raise ValueError(f"weights must have the keys {list(losses)}, but has {list(self.weights)}.")
        found = by_name("miners", {} if miners is None else miners, losses)
        self.miners = torch.nn.ModuleDict({name: miner for name, miner in found.items() if miner is not None})
        if not set(found) <= set(losses):
            raise ValueError(f"miners must have keys of {list(losses)}, but has {list(found)}.")
        self.takes_pairs = any(getattr(loss, "takes_pairs", True) for loss in losses.values())
        self.needs_labels = any(getattr(loss, "needs_labels", True) for loss in losses.values())
        self.cuts: dict[str, int] = {}
        self.sub_losses: dict[str, torch.Tensor] = {}

    def forward(self, embeddings, labels=None, indices_tuple=None, ref_emb=None, ref_labels=None, width=None):
        """Return the weighted sum, and keep its parts in ``sub_losses``; ``width`` is for ``MatryoshkaLoss``."""
        values = {}
        for name, loss in self.losses.items():
            pairs = indices_tuple
            if name in self.miners:
                asks = getattr(self.miners[name], "asks_teacher", False)
                pairs = self.miners[name](embeddings, labels, **({"ref_emb": ref_emb} if asks else {}))
            cut, rows, teacher = self.cuts.get(name, width), embeddings, ref_emb
            if cut is not None:
                rows = embeddings[:, :cut]
                if ref_emb is not None and getattr(loss, "equal_widths", True):
                    teacher = ref_emb[:, :cut]
            inner = (cut,) if isinstance(loss, MultipleDistillationLosses) else ()
            values[name] = loss(rows, labels, pairs, teacher, ref_labels, *inner)
        self.sub_losses = {name: value.detach() for name, value in values.items()}
        return torch.stack([self.weights[name] * value for name, value in values.items()]).sum()


def by_name(what: str, values: Any, named: Mapping[str, Any]) -> dict[str, Any]:
    """Return a dict of the values, which go with the losses in their order unless they are a dict already."""
    if isinstance(values, Mapping):
        return dict(values)
    values = list(values)
    if len(values) != len(named):
        raise ValueError(f"{what} must be one for each of the {len(named)} losses, but there are {len(values)}.")
    return dict(zip(named, values))
