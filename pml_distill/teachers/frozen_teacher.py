import copy
from collections.abc import Sequence
from typing import Any

import torch

from ..utils.feature_tap import FeatureTap
from ..utils.tensors import one_tensor
from .ask import AlwaysEval


class FrozenTeacher(AlwaysEval):
    """A network that teaches: a callable from a batch to embeddings (B, Dt), without gradients.

    The given modules are put into eval mode and their parameters no longer require gradients, whatever ``train()`` is
    called. Copy a student that shall start as its teacher before: a later copy is frozen like the original.

    Args:
        trunk: the network, images in, features or embeddings out; or its name, such as ``"timm/NAME"``, for
            ``network_by_name``. What its images must look like is then in ``preprocessing``.
        embedder: what turns the trunk's output into embeddings; None for nothing.
        dtype: the precision to run in, such as ``torch.bfloat16``, of a copy that is made then; None for the modules'
            own. Tensors are moved to the trunk's device and precision; autocast of the caller does not apply.
        **named: for ``network_by_name``: ``weights`` of a file, or ``pretrained=False``.

    Example:
        >>> teacher = FrozenTeacher(torch.nn.Linear(8, 4))
        >>> teacher(torch.zeros(2, 8)).shape
        torch.Size([2, 4])
    """

    def __init__(
        self,
        trunk: torch.nn.Module | str,
        embedder: torch.nn.Module | None = None,
        dtype: torch.dtype | None = None,
        **named: Any,
    ):
        super().__init__()
        if isinstance(trunk, str):
            from ..models.by_name import network_by_name

            network = network_by_name(trunk, **named)
            trunk, self.preprocessing = network.network, network.preprocessing
        embedder = torch.nn.Identity() if embedder is None else embedder
        for name, module in (("trunk", trunk), ("embedder", embedder)):
            if not isinstance(module, torch.nn.Module):
                raise ValueError(f"{name} must be a torch.nn.Module, but is a {type(module).__name__}.")
        if dtype is not None:
            trunk, embedder = copy.deepcopy((trunk, embedder))
            trunk, embedder = trunk.to(dtype), embedder.to(dtype)
        self.trunk, self.embedder = trunk, embedder
        self.requires_grad_(False)
        self.eval()

    @torch.no_grad()
    def forward(self, data: Any, index: torch.Tensor | None = None) -> torch.Tensor:
        """Return the embeddings of ``data``; the samples' ``index`` is not needed here."""
        weight = next((parameter for parameter in self.parameters() if parameter.is_floating_point()), None)
        if weight is not None and isinstance(data, torch.Tensor):
            data = data.to(device=weight.device, dtype=weight.dtype if data.is_floating_point() else None)
        placed = data if weight is None else weight
        with torch.autocast(placed.device.type if isinstance(placed, torch.Tensor) else "cpu", enabled=False):
            output = self.embedder(self.trunk(data))
        return one_tensor(output, "trunk and embedder", "; give an embedder that takes it out")

    def tap(self, names: Sequence[str]) -> FeatureTap:
        """Return what takes the outputs of modules of the trunk while the teacher runs."""
        return FeatureTap(self.trunk, names)
