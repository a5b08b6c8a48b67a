"""This process among those that train together; alone, it is the first and only one."""

from collections.abc import Callable
from typing import Any

import torch


def process_rank() -> int:
    """Return the number of this process, from 0."""
    return torch.distributed.get_rank() if is_distributed() else 0


def num_processes() -> int:
    """Return how many processes there are."""
    return torch.distributed.get_world_size() if is_distributed() else 1


def is_distributed() -> bool:
    """Tell whether there is a process group; PML's own function comes with all of its losses and miners."""
    return torch.distributed.is_available() and torch.distributed.is_initialized()


def joint_seed() -> int:
    """Return what the first process draws from torch's global generator; all processes call this and draw."""
    seed = [int(torch.randint(2**62, ()))]
    if num_processes() > 1:
        torch.distributed.broadcast_object_list(seed)
    return seed[0]


def in_first_process(action: Callable[[], object]) -> None:
    """Run this in the first process, and let the others wait; the usual errors that it raises are raised in all."""
    outcome: list[Exception | None] = [None]
    if process_rank() == 0:
        try:
            action()
        except (ValueError, RuntimeError, OSError) as error:
            outcome = [error]
    if num_processes() > 1:
        torch.distributed.broadcast_object_list(outcome)
    if outcome[0] is not None:
        raise outcome[0]


def gathered(value: Any) -> list[Any]:
    """Return what each process passes, in the order of their ranks; all processes call this."""
    values = [value] * num_processes()
    if len(values) > 1:
        torch.distributed.all_gather_object(values, value)
    return values
