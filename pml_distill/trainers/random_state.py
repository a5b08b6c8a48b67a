import random
from typing import Any

import numpy as np
import torch
from pytorch_metric_learning.utils import common_functions as c_f


def get_random_state() -> dict[str, Any]:
    """Return the states of Python's, NumPy's, PML's and torch's random generators, as plain types and tensors."""
    return {
        "python": random.getstate(),
        "numpy": plain(np.random.get_state()),
        "pml": plain(c_f.NUMPY_RANDOM.get_state()),
        "torch": torch.get_rng_state(),
        "cuda": torch.cuda.get_rng_state_all(),
    }


def set_random_state(state: dict[str, Any]) -> None:
    """Restore what ``get_random_state`` returned."""
    random.setstate(state["python"])
    np.random.set_state(state["numpy"])
    c_f.NUMPY_RANDOM.set_state(state["pml"])
    torch.set_rng_state(state["torch"].cpu())
    if len(state["cuda"]) == torch.cuda.device_count():
        torch.cuda.set_rng_state_all([s.cpu() for s in state["cuda"]])


def plain(state: Any) -> tuple:
    """Return a Mersenne twister's state without NumPy's array, which a safe ``torch.load`` refuses."""
    name, keys, *rest = state
    return (name, keys.tolist(), *rest)
