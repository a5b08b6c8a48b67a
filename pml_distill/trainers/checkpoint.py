import copy
import os
import random
from pathlib import Path
from typing import Any

import numpy as np
import torch
from pytorch_metric_learning.losses import CrossBatchMemory
from pytorch_metric_learning.utils import common_functions as c_f

from ..utils.distributed import gathered, num_processes, process_rank
from ..utils.files import whole_file
from ..utils.modules import unwrapped

SAVED = ("models", "optimizers", "lr_schedulers", "loss_funcs", "mining_funcs", "gradient_clippers")


class Checkpoints:
    """Saving and loading, for a trainer."""

    def save_checkpoint(self: Any, path: str | os.PathLike) -> None:
        """Write all that an exact resume needs: the states of all parts, random states, the place in the data.

        An older file is replaced only once the new one is complete. Call it last in the end-of-epoch hook: a
        checkpoint saved within an epoch resumes at the next one, with a warning. Of several processes all call this,
        each with a path of its own.
        """
        left = 0 if self.dataloader is None else self.iterations_per_epoch - 1 - self.iteration
        if left:
            c_f.LOGGER.warning(f"{path} is written within epoch {self.epoch}; a resumed run leaves out {left} steps.")
        state: dict[str, Any] = {
            name: {key: without_numpy(unwrapped(part).state_dict()) for key, part in parts.items()}
            for name, parts in saved_parts(self).items()
        }
        state.update(
            epoch=self.epoch,
            rank=process_rank(),
            scaler=self.scaler.state_dict(),
            random_state=get_random_state(),
            data_position=None if self.dataloader is None else self.dataloader.position(),
            class_numbers=self.class_numbers.as_they_come,
            # PML's state of a cross-batch memory lacks its place in the queue.
            queues={key: (loss.queue_idx, loss.has_been_filled) for key, loss in memories(self)},
        )
        Path(path).parent.mkdir(parents=True, exist_ok=True)
        with whole_file(path) as unfinished:
            torch.save(state, unfinished)
            if num_processes() > 1:
                torch.distributed.barrier()

    def load_checkpoint(self: Any, path: str | os.PathLike) -> int:
        """Restore what ``save_checkpoint`` wrote and return the epoch to go on with.

        ``trainer.train(start_epoch=trainer.load_checkpoint(path), num_epochs=...)`` ends, on the CPU, with the
        weights of a run that was never interrupted. Of several processes all call this.

        Raises:
            ValueError: the file is of other parts, of another process, or of another epoch than the others' files.
        """
        state = torch.load(path, map_location=self.data_device, weights_only=True)
        if not isinstance(state, dict) or "data_position" not in state:
            held = sorted(state)[:5] if isinstance(state, dict) else f"a {type(state).__name__}"
            raise ValueError(f"path {path} must be a file of save_checkpoint, but holds {held}.")
        check_process(path, state)
        ours = saved_parts(self)
        for name, parts in ours.items():
            if state[name].keys() != parts.keys():
                raise ValueError(f"{path} holds {name} {sorted(state[name])}, but this trainer has {sorted(parts)}.")
        for name, key, part in [(name, key, part) for name, parts in ours.items() for key, part in parts.items()]:
            try:
                unwrapped(part).load_state_dict(state[name][key])
            except (RuntimeError, ValueError) as error:
                raise ValueError(f'{path} holds other {name}["{key}"] than this trainer: {error}') from error
        for key, memory in memories(self):
            memory.queue_idx, memory.has_been_filled = state["queues"][key]
        self.scaler.load_state_dict(state["scaler"])
        self.epoch, self.data_position = state["epoch"], state["data_position"]
        self.class_numbers.as_they_come = state["class_numbers"]
        set_random_state(state["random_state"])
        return self.epoch + 1


def check_process(path: str | os.PathLike, state: dict[str, Any]) -> None:
    """Raise ``ValueError`` unless all processes load files of one epoch, each its own."""
    rank, epoch = process_rank(), state["epoch"]
    if state["rank"] != rank:
        text = f"path {path} was written by process {state['rank']}, but this is process {rank}"
        raise ValueError(f"{text}; each needs its own path.")
    epochs = gathered(epoch)
    if len(set(epochs)) > 1:
        text = f"path must be the checkpoint of one epoch in all processes, but {path} is of epoch {epoch}"
        raise ValueError(f"{text}, and those of all processes are of the epochs {epochs}.")


def saved_parts(trainer: Any) -> dict[str, dict[str, Any]]:
    """Return all that has a state to save, by argument and key."""
    parts = {name: getattr(trainer, name) or {} for name in SAVED}
    parts["teacher"] = {str(place): part for place, part in enumerate(followers(trainer.teacher))}
    return {name: {k: v for k, v in held.items() if hasattr(v, "state_dict")} for name, held in parts.items()}


def followers(teacher: Any) -> list[Any]:
    """Return the parts of a teacher that follow the student: those with ``follows_student``."""
    modules = teacher.modules() if isinstance(teacher, torch.nn.Module) else [teacher]
    return [module for module in modules if getattr(module, "follows_student", False)]


def memories(trainer: Any) -> list[tuple[str, CrossBatchMemory]]:
    """Return the cross-batch memories among the losses and inside of them."""
    named = ((f"{k}.{name}", part) for k, loss in trainer.loss_funcs.items() for name, part in loss.named_modules())
    return [(name, part) for name, part in named if isinstance(part, CrossBatchMemory)]


def without_numpy(state: Any) -> Any:
    """Return a state with Python's numbers in place of NumPy's, which ``torch.load(weights_only=True)`` refuses."""
    if isinstance(state, np.generic):
        return state.item()
    if isinstance(state, dict):
        # A copy keeps what a state dict carries beside its items, and a scheduler's Counter.
        plain = copy.copy(state)
        plain.clear()
        plain.update({without_numpy(key): without_numpy(value) for key, value in state.items()})
        return plain
    return type(state)(map(without_numpy, state)) if type(state) in (list, tuple) else state


def get_random_state() -> dict[str, Any]:
    """Return the states of Python's, NumPy's, PML's and torch's random generators, as plain types and tensors."""
    # A safe torch.load refuses NumPy's arrays.
    twisters = {"numpy": np.random.get_state(), "pml": c_f.NUMPY_RANDOM.get_state()}
    return {
        "python": random.getstate(),
        **{name: (kind, keys.tolist(), *rest) for name, (kind, keys, *rest) in twisters.items()},
        "torch": torch.get_rng_state(),
        "cuda": torch.cuda.get_rng_state_all(),
    }


def set_random_state(state: dict[str, Any]) -> None:
    """Restore what ``get_random_state`` returned."""
    random.setstate(state["python"])
    np.random.set_state(state["numpy"])
    c_f.NUMPY_RANDOM.set_state(state["pml"])
    torch.set_rng_state(state["torch"].cpu())
    if state["cuda"] and len(state["cuda"]) == torch.cuda.device_count():
        torch.cuda.set_rng_state_all([s.cpu() for s in state["cuda"]])
