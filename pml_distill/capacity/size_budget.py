import math
from bisect import bisect_left
from collections.abc import Sequence
from dataclasses import dataclass
from numbers import Integral

import torch

from .compactor import Compactor
from .export_meter import ExportMeter


@dataclass(frozen=True)
class SizeBudget:
    """How small a network shall become: the target of ``CapacityDynamics``, and in how many steps.

    Args:
        parameters: share of the parameters of the network without compactors that shall remain, from 0 to 1.
        flops: share of its FLOPs that shall remain. One of both.
        steps: of the optimizer, until the target is met.

    Raises:
        ValueError: no target or two, a share out of range, ``steps`` that are no positive whole number.

    Example:
        >>> SizeBudget(flops=0.5, steps=1000).share
        0.5
    """

    parameters: float | None = None
    flops: float | None = None
    steps: int | None = None

    def __post_init__(self) -> None:
        if (self.parameters is None) == (self.flops is None):
            raise ValueError(
                f"a SizeBudget has parameters ({self.parameters}) or flops ({self.flops}): give one, not both."
            )
        if not 0 < self.share < 1:
            raise ValueError(
                f"{self.measured} is the share that shall remain and must lie between 0 and 1, but is {self.share}."
            )
        if not isinstance(self.steps, Integral) or self.steps < 1:
            raise ValueError(
                f"steps must be a positive whole number, after which the target is met, but is {self.steps!r}."
            )

    @property
    def measured(self) -> str:
        """What has a target: ``"parameters"`` or ``"flops"``."""
        return "flops" if self.parameters is None else "parameters"

    @property
    def share(self) -> float:
        """How much of that shall remain."""
        return getattr(self, self.measured)


class BudgetSchedule:
    """Brings a network to its ``SizeBudget``, and settles which rows of its compactors stay.

    Of the rows that have to go, the longest is led to zero along a straight line: the lasso grows stronger or weaker
    as that row is behind or ahead. When the target is met or the time is over, the shortest rows that are still too
    many go, and from then on those that are zero stay zero.

    Args:
        settings: the target.
        compactors: by name, as ``find_compactors`` returns them.
        meter: of the network.
        threshold: rows shorter than this count as gone.

    Raises:
        ValueError: the target is out of reach.
    """

    def __init__(self, settings: SizeBudget, compactors: dict[str, Compactor], meter: ExportMeter, threshold: float):
        self.measured, self.steps = settings.measured, int(settings.steps or 0)
        self.compactors, self.meter, self.threshold = compactors, meter, threshold
        self.weights = [compactor.weight for compactor in compactors.values()]
        self.counts = [len(weight) for weight in self.weights]
        whole, least = (getattr(meter.measure(rows), self.measured) for rows in (0.0, math.inf))
        self.target = settings.share * whole
        if self.target < least:
            raise ValueError(
                f"{self.measured} is {settings.share}, but one channel behind each compactor leaves "
                f"{least / whole:.3f} of the network."
            )
        self.first_longest = 0.0
        self.alive: list[torch.Tensor] | None = None

    @property
    def met(self) -> bool:
        """Whether it is settled which rows stay."""
        return self.alive is not None

    def size(self, widths: dict[str, int]) -> int:
        """Return the parameters or FLOPs, whichever has a target, with so many rows in each compactor."""
        return getattr(self.meter.cost(widths), self.measured)

    def hold(self) -> None:
        """Keep the rows that are gone at zero."""
        for weight, alive in zip(self.weights, self.alive or ()):
            weight.mul_(alive)

    def follow(self, step: int, widths: dict[str, int], before: list[torch.Tensor]) -> float:
        """Return by what to multiply the lasso weight, or settle what stays.

        Args:
            step: how many have been taken.
            widths: the rows of each compactor that are left.
            before: the weights as they were before the last shrinking.
        """
        size = self.size(widths)
        if size <= self.target or step >= self.steps:
            if size < self.target:
                # Rows vanish together; one by one they come nearer to the target.
                for weight, previous in zip(self.weights, before):
                    weight.copy_(previous)
            self.settle()
        elif step % max(1, self.steps // 100) == 0:
            going, lengths = self.rows_to_go()
            longest = float(lengths[going].max())
            self.first_longest = self.first_longest or longest
            planned = self.first_longest * (1 - step / self.steps)
            return 1.25 if longest > planned else 1 / 1.25
        return 1.0

    def rows_to_go(self) -> tuple[torch.Tensor, torch.Tensor]:
        """Return which rows of all compactors have to go, shortest first, until the target is met, and all lengths."""
        lengths = torch.cat([compactor.row_norms() for compactor in self.compactors.values()])
        order = lengths.argsort(stable=True)
        owners = torch.arange(len(self.counts)).repeat_interleave(torch.tensor(self.counts))[order.cpu()]

        def meets(number: int) -> bool:
            widths = torch.bincount(owners[number:], minlength=len(self.counts)).clamp(min=1).tolist()
            return self.size(dict(zip(self.compactors, widths))) <= self.target

        number = bisect_left(range(len(order)), True, key=meets)
        return torch.zeros_like(lengths, dtype=torch.bool).index_fill_(0, order[:number], True), lengths

    def settle(self) -> None:
        """Zero the shortest rows that are too many; those at zero stay there from now on."""
        going, lengths = self.rows_to_go()
        gone_rows = (going | (lengths < self.threshold)).split(self.counts)
        lengths_of = lengths.split(self.counts)
        for gone, own in zip(gone_rows, lengths_of):
            if gone.all():
                gone[own.argmax()] = False  # stays in any case
        self.fill_up(gone_rows, lengths_of)
        self.alive = [(~gone).to(w.dtype).view(-1, *(1,) * (w.ndim - 1)) for gone, w in zip(gone_rows, self.weights)]
        self.hold()

    def fill_up(self, gone_rows: Sequence[torch.Tensor], lengths_of: Sequence[torch.Tensor]) -> None:
        """Let the longest row that goes from each compactor stay where the target allows it.

        The last of all rows to go may cost more than what was missing.
        """
        widths = {name: int((~gone).sum()) for name, gone in zip(self.compactors, gone_rows)}
        longest = [torch.where(gone, lengths, 0).max(dim=0) for gone, lengths in zip(gone_rows, lengths_of)]
        candidates = zip(self.compactors, gone_rows, longest)
        for name, gone, (length, row) in sorted(candidates, key=lambda c: float(c[2].values), reverse=True):
            wider = widths | {name: widths[name] + 1}
            if length >= self.threshold and self.size(wider) <= self.target:
                gone[row], widths = False, wider

    def state_dict(self) -> dict[str, object]:
        """Return the progress and the plan."""
        return {"alive": self.alive, "first_longest": self.first_longest, "plan": self.plan()}

    def plan(self) -> dict[str, object]:
        """Return what is counted, how much of it shall remain, and when."""
        return {"measured": self.measured, "target": self.target, "steps": self.steps}

    def load_state_dict(self, state: dict) -> None:
        """Go on where ``state_dict`` was taken, or raise ``ValueError`` if it was under another plan."""
        if state["plan"] != self.plan():
            raise ValueError(f"the state is of the budget {state['plan']}, but this one is {self.plan()}.")
        self.first_longest, alive = state["first_longest"], state["alive"]
        self.alive = None if alive is None else [own.to(weight) for own, weight in zip(alive, self.weights)]
