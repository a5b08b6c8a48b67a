from typing import Any

from pytorch_metric_learning.utils.loss_tracker import LossTracker

from .checks import without_wrapper


class LossWeightRamp:
    """The factor of a loss weight during the training: ``first`` until ``start``, then linearly to ``last`` at ``end``.

    A loss on distances may lower the accuracy if it acts before the metric loss has shaped the space: it rises from 0.
    A teacher that was not made for the task helps most at the beginning: ``LossWeightRamp(0, 0.6, first=1, last=0)``.

    Args:
        start, end: shares of the training, 0 to 1.
        first, last: factors up to ``start`` and from ``end`` on.

    Raises:
        ValueError: not 0 <= start < end.

    Example:
        >>> ramp = LossWeightRamp(start=0.25, end=0.75)
        >>> [ramp(step / 10) for step in (1, 5, 8)]
        [0.0, 0.5, 1.0]
    """

    def __init__(self, start: float = 0.2, end: float = 0.5, first: float = 0.0, last: float = 1.0):
        if not 0 <= start < end:
            raise ValueError(f"start must be at least 0 and below end, but they are {start} and {end}.")
        self.start, self.end, self.first, self.last = start, end, first, last

    def __call__(self, progress: float) -> float:
        """Return the factor for the weight after this share of the training, ``step / total_steps``."""
        share = min(1, max(0, (progress - self.start) / (self.end - self.start)))
        return (1 - share) * self.first + share * self.last


class WeightedLossTracker(LossTracker):
    """PML's loss tracker without its in-place product, which spoils what a backward has saved."""

    def weight_the_losses(self, exclude_loss: tuple[str, ...] = ("total_loss",)) -> None:
        """Multiply each loss by its weight."""
        for name in self.losses:
            if name not in exclude_loss:
                self.losses[name] = self.losses[name] * self.loss_weights[name]


def sub_losses(trainer: Any) -> dict[str, Any]:
    """Return the parts of losses that hold several, by the names of both."""
    found = {}
    for key, loss in trainer.loss_funcs.items():
        parts = getattr(without_wrapper(loss), "sub_losses", None)
        if isinstance(parts, dict) and trainer.wants(key):  # of hashing losses it is something else
            found.update({f"{key}_{name}": value for name, value in parts.items()})
    return found
