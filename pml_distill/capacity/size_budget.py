import math
from bisect import bisect_left
from collections.abc import Sequence
from dataclasses import dataclass
from numbers import Integral

import torch

from .compactor import Compactor
from .export import rounded, unit_step
from .export_meter import ExportMeter


@dataclass(frozen=True)
class SizeBudget:
    """How small a network shall become: the target of ``CapacityDynamics``, and in how many steps.

    Args:
        parameters: share of the parameters of the network without compactors that shall remain, from 0 to 1.
        flops: share of its FLOPs that shall remain. One of both.
        steps: of the optimizer, until the target is met.
        multiple_of: widths are multiples of it; ONNX Runtime computes convolutions in blocks of 8 channels.

    Raises:
        ValueError: no target or two, a share out of range, a number that is no positive whole one.
    """

    parameters: float | None = None
    flops: float | None = None
    steps: int | None = None
    multiple_of: int = 8

    def __post_init__(self) -> None:
        if (self.parameters is None) == (self.flops is None):
            raise ValueError(f"give one, not both: parameters ({self.parameters}) or flops ({self.flops}).")
        if not 0 < self.share < 1:
            raise ValueError(f"{self.measured}, the share that remains, must lie between 0 and 1, but is {self.share}.")
        for name, value in (("steps", self.steps), ("multiple_of", self.multiple_of)):
            if not isinstance(value, Integral) or value < 1:
                raise ValueError(f"{name} must be a positive whole number, but is {value!r}.")

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
    as that row is behind or ahead. In the end the shortest rows that are still too many go, and zeros stay zero.
    """

    def __init__(self, settings: SizeBudget, compactors: dict[str, Compactor], meter: ExportMeter, threshold: float):
        self.measured, self.steps = settings.measured, int(settings.steps or 0)
        self.compactors, self.meter, self.threshold = compactors, meter, threshold
        self.weights = [compactor.weight for compactor in compactors.values()]
        self.counts = [len(weight) for weight in self.weights]
        self.multiple_of = settings.multiple_of
        self.portion = [unit_step(compactor.chain, self.multiple_of) for compactor in compactors.values()]
        self.starts = [sum(self.counts[:place]) for place in range(len(self.counts))]
        whole, least = (getattr(meter.measure(rows, self.multiple_of), self.measured) for rows in (0.0, math.inf))
        self.target = settings.share * whole
        if self.target < least:
            raise ValueError(
                f"{self.measured} is {settings.share}, but {self.multiple_of} channel(s) behind each compactor leave "
                f"{least / whole:.3f} of the network: choose a smaller multiple_of or positions='all'."
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
        """Return by what to multiply the lasso weight, or settle what stays; ``before`` is as before the shrinking."""
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
        """Return which rows of all compactors have to go, shortest first, until the target is met, and all lengths.

        Rows of a compactor go in portions, so that the widths between are multiples; each portion goes by its longest.
        """
        lengths = torch.cat([compactor.row_norms() for compactor in self.compactors.values()])
        ranks = [own.argsort(stable=True) for own in lengths.split(self.counts)]
        keys = torch.cat([portions(own[r], n) for own, r, n in zip(lengths.split(self.counts), ranks, self.portion)])
        places = torch.cat([rank + start for rank, start in zip(ranks, self.starts)])
        order = places[keys.argsort(stable=True)]
        owners = torch.arange(len(self.counts)).repeat_interleave(torch.tensor(self.counts))[order.cpu()]

        def meets(number: int) -> bool:
            rows = torch.bincount(owners[number:], minlength=len(self.counts)).tolist()
            return self.size(self.widths(rows)) <= self.target

        number = bisect_left(range(len(order)), True, key=meets)
        return torch.zeros_like(lengths, dtype=torch.bool).index_fill_(0, order[:number], True), lengths

    def widths(self, rows: Sequence[int]) -> dict[str, int]:
        """Return the widths of so many rows, rounded up to multiples."""
        pairs = zip(self.compactors.items(), rows)
        return {name: rounded(count, compactor.chain, self.multiple_of) for (name, compactor), count in pairs}

    def settle(self) -> None:
        """Zero the shortest rows that are too many; those at zero stay there from now on."""
        going, lengths = self.rows_to_go()
        rows = [int((~part).sum()) for part in (going | (lengths < self.threshold)).split(self.counts)]
        widths, lengths_of = self.widths(rows), lengths.split(self.counts)
        ranks = [own.argsort(descending=True, stable=True) for own in lengths_of]
        self.fill_up(widths, lengths_of, ranks)
        self.alive = []
        for (name, compactor), rank in zip(self.compactors.items(), ranks):
            weight = compactor.weight
            alive = torch.zeros(len(weight), dtype=weight.dtype, device=weight.device)
            alive[rank[: widths[name]]] = 1
            self.alive.append(alive.view(-1, *(1,) * (weight.ndim - 1)))
        self.hold()

    def fill_up(self, widths: dict[str, int], lengths: Sequence[torch.Tensor], ranks: Sequence[torch.Tensor]) -> None:
        """Let the longest rows that go from each compactor stay where the target allows it."""
        found = []
        for name, own, rank, step in zip(self.compactors, lengths, ranks, self.portion):
            if widths[name] < len(own):
                found.append((float(own[rank[widths[name]]]), name, min(step, len(own) - widths[name])))
        for length, name, step in sorted(found, key=lambda one: one[0], reverse=True):
            wider = widths | {name: widths[name] + step}
            if length >= self.threshold and self.size(wider) <= self.target:
                widths[name] += step

    def state_dict(self) -> dict[str, object]:
        """Return the progress and the plan."""
        plan = {name: getattr(self, name) for name in ("measured", "target", "steps", "multiple_of")}
        return {"alive": self.alive, "first_longest": self.first_longest, "plan": plan}

    def load_state_dict(self, state: dict) -> None:
        """Go on where ``state_dict`` was taken, or raise ``ValueError`` if it was under another plan."""
        if state["plan"] != (plan := self.state_dict()["plan"]):
            raise ValueError(f"the state is of the budget {state['plan']}, but this one is {plan}.")
        self.first_longest, alive = state["first_longest"], state["alive"]
        self.alive = None if alive is None else [own.to(weight) for own, weight in zip(alive, self.weights)]


def portions(lengths: torch.Tensor, step: int) -> torch.Tensor:
    """Return for each of some sorted rows the length of the longest of its portion; the shortest may be fewer."""
    ends = torch.arange(len(lengths) - 1, -1, -1, device=lengths.device) // step * step
    return lengths[len(lengths) - 1 - ends]
