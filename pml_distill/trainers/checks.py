"""What a distillation trainer refuses before it trains."""

import inspect
from typing import Any

import torch
from pytorch_metric_learning.losses import (
    BaseMetricLossFunction,
    CrossBatchMemory,
    MultipleLosses,
    SelfSupervisedLoss,
)
from pytorch_metric_learning.utils.distributed import DistributedLossWrapper
from torch.nn.parallel import DistributedDataParallel

from ..losses import BaseFeatureLoss, BaseHashingLoss
from ..teachers import CachedTeacher, FrozenTeacher
from ..teachers.cached_teacher import caches
from ..utils.distributed import num_processes
from ..utils.feature_tap import FeatureTap
from ..utils.modules import unwrapped


def check_setup(trainer: Any) -> None:
    """Raise ``ValueError`` for what does not go together."""
    wanting = [key for key in trainer.loss_keys_with_teacher if key in trainer.loss_funcs]
    if "teacher" in trainer.models:
        raise ValueError(
            'models has the key "teacher", where PML would train and save it. Pass '
            "teacher=FrozenTeacher(trunk, embedder) instead."
        )
    if not trainer.loss_funcs:
        raise ValueError('loss_funcs is empty; give "metric_loss", "distillation_loss" or both.')
    if trainer.teacher_miner("tuple_miner") is not None and trainer.teacher is None:
        raise ValueError('mining_funcs["tuple_miner"] asks the teacher, but teacher is None.')
    if "distillation_miner" in trainer.mining_funcs:
        if trainer.teacher_miner("distillation_miner") is None:
            kind = type(trainer.mining_funcs["distillation_miner"]).__name__
            raise ValueError(
                'mining_funcs["distillation_miner"] must be a miner of pml_distill.miners, such as '
                f"TeacherMiner(miner), but is a {kind}."
            )
        if "distillation_loss" not in trainer.loss_funcs:
            raise ValueError(
                'mining_funcs["distillation_miner"] serves loss_funcs["distillation_loss"], which is not there.'
            )
        loss = without_wrapper(trainer.loss_funcs["distillation_loss"])
        if not getattr(loss, "takes_pairs", True):
            raise ValueError(
                f'mining_funcs["distillation_miner"] finds pairs, but {type(loss).__name__}, '
                'loss_funcs["distillation_loss"], takes none.'
            )
    if wanting and trainer.teacher is None:
        raise ValueError(f"loss_funcs has {wanting}, but teacher is None; pass FrozenTeacher(trunk, embedder).")
    if trainer.teacher is not None and not wanting and trainer.teacher_miner("tuple_miner") is None:
        raise ValueError(
            f"teacher is given, but loss_funcs has only {sorted(trainer.loss_funcs)}; a teacher serves "
            f"{list(trainer.loss_keys_with_teacher)}."
        )
    if isinstance(trainer.teacher, torch.nn.Module):
        check_frozen(trainer.teacher, trainer.models)
    if trainer.teacher is not None:
        check_call(trainer.teacher)
    for cache in caches(trainer.teacher):
        cache.check_dataset(trainer.dataset)
    for key in wanting:
        loss, on_maps = without_wrapper(trainer.loss_funcs[key]), key == "feature_distillation_loss"
        if isinstance(loss, (MultipleLosses, CrossBatchMemory, SelfSupervisedLoss)):
            raise ValueError(
                f'loss_funcs["{key}"] is a {type(loss).__name__}, which passes no ref_emb on; give a single loss.'
            )
        if isinstance(loss, BaseMetricLossFunction if on_maps else BaseFeatureLoss):
            raise ValueError(
                f'loss_funcs["{key}"] is a {type(loss).__name__}, but must be a loss on '
                f"{'feature maps, such as AttentionTransferLoss' if on_maps else 'embeddings'}."
            )
        check_gathering(f'loss_funcs["{key}"]', unwrapped(trainer.loss_funcs[key]))
    for key in ("tuple_miner", "distillation_miner"):
        if trainer.teacher_miner(key) is not None:
            check_gathering(f'mining_funcs["{key}"]', trainer.mining_funcs[key])
    check_features(trainer)
    check_trained(trainer)
    check_processes(trainer)
    if trainer.amp_dtype not in (None, torch.float16, torch.bfloat16):
        raise ValueError(f"amp_dtype must be None, torch.float16 or torch.bfloat16, but is {trainer.amp_dtype}.")
    if trainer.accumulation_steps < 1:
        raise ValueError(f"accumulation_steps must be at least 1, but is {trainer.accumulation_steps}.")


def check_gathering(name: str, wrapper: Any) -> None:
    """Check that one of PML's distributed wrappers gathers student and teacher."""
    if getattr(wrapper, "efficient", False):
        raise ValueError(
            f"{name} is a {type(wrapper).__name__} with efficient=True, which gathers only one side of each row; use "
            "efficient=False."
        )


def check_features(trainer: Any) -> None:
    """Check what the feature distillation needs."""
    key, names = "feature_distillation_loss", (trainer.student_features, trainer.teacher_features)
    if key not in trainer.loss_funcs:
        if any(names):
            raise ValueError(f'student_features and teacher_features serve loss_funcs["{key}"], which is not there.')
        return
    if len(names[0]) != len(names[1]) or not all(names) or any(isinstance(n, str) for n in names):
        raise ValueError(
            f'loss_funcs["{key}"] needs student_features and teacher_features, two lists of names of modules that '
            f"go pair by pair, but they are {names[0]!r} and {names[1]!r}."
        )
    if not isinstance(trainer.teacher, (FrozenTeacher, CachedTeacher)):
        raise ValueError(
            f'loss_funcs["{key}"] taps the layers of the teacher, which must be a FrozenTeacher or a '
            f"CachedTeacher, but is a {type(trainer.teacher).__name__}."
        )
    FeatureTap(trainer.models["trunk"], names[0])
    trainer.teacher.tap(names[1])


def check_trained(trainer: Any) -> None:
    """Check that the networks and what bridges student and teacher learn, unless they are frozen."""
    trained = trained_by(trainer.optimizers)
    for key, model in trainer.models.items():
        held = [p for p in model.parameters() if id(p) in trained]
        if held and key not in trainer.freeze_these and not any(p.requires_grad for p in held):
            raise ValueError(
                f'models["{key}"] is in an optimizer, but none of its parameters requires a gradient. A copy of what '
                f'FrozenTeacher holds is frozen too: call requires_grad_(True) on it, or give "{key}" in freeze_these.'
            )
    for holder, key in (("loss_funcs", "feature_distillation_loss"), ("models", "projection")):
        module = getattr(trainer, holder).get(key)
        if module is None or key in trainer.freeze_these:
            continue
        untrained = [name for name, p in module.named_parameters() if id(p) not in trained]
        if untrained:
            raise ValueError(
                f'{holder}["{key}"] has parameters that no optimizer trains, {untrained}; give '
                f'optimizers["{key}_optimizer"], or "{key}" in freeze_these.'
            )


def check_processes(trainer: Any) -> None:
    """Check that what learns beside a network in DistributedDataParallel is in there too."""
    if num_processes() == 1:
        return
    trained, alone, joint, gathered = trained_by(trainer.optimizers), [], [], []
    for holder in ("models", "loss_funcs"):
        for key, module in getattr(trainer, holder).items():
            name = f'{holder}["{key}"]'
            if any(isinstance(part, DistributedDataParallel) for part in module.modules()):
                joint.append(name)
            elif key not in trainer.freeze_these and any(id(p) in trained for p in module.parameters()):
                alone.append(name)
            if isinstance(unwrapped(module), DistributedLossWrapper):
                gathered.append(name)
    if gathered and alone and not joint:
        raise ValueError(
            f"{gathered[0]} gathers the embeddings of all processes, but {' and '.join(alone)} would learn in each for "
            "itself; put the networks into DistributedDataParallel."
        )
    if alone and joint:
        raise ValueError(
            f"{' and '.join(alone)} would learn in each process for itself, while {joint[0]} is in "
            "DistributedDataParallel; put it in there too."
        )


def check_multi_hot_level(labels: torch.Tensor, level: Any, loss: Any) -> None:
    """Raise ``ValueError`` if a hashing loss would be given one column of multi-hot labels."""
    several = isinstance(level, int) and labels.ndim == 2 and labels.shape[1] > 1
    if several and isinstance(without_wrapper(loss), BaseHashingLoss) and labels.max() <= 1:
        raise ValueError(
            f"label_hierarchy_level is {level}, which takes one column of the multi-hot labels {tuple(labels.shape)}; "
            'give label_hierarchy_level="all".'
        )


def trained_by(optimizers: dict[str, torch.optim.Optimizer]) -> set[int]:
    """Return the ids of the parameters that they train."""
    return {id(p) for o in optimizers.values() for group in o.param_groups for p in group["params"]}


def check_call(teacher: Any) -> None:
    """Raise ``ValueError`` if the teacher cannot be called as a trainer calls it."""
    try:
        inspect.signature(teacher.forward if isinstance(teacher, torch.nn.Module) else teacher).bind("data", "index")
    except TypeError as error:
        raise ValueError(
            f"teacher is called as teacher(data, index), but a {type(teacher).__name__} cannot be: {error}; pass "
            "FrozenTeacher(trunk, embedder)."
        ) from error


def check_frozen(teacher: torch.nn.Module, models: dict[str, torch.nn.Module]) -> None:
    """Raise ``ValueError`` if the teacher would learn, or its batch norms would drift."""
    if any(p.requires_grad for p in teacher.parameters()):
        raise ValueError(
            f"teacher, a {type(teacher).__name__}, has parameters that require gradients; "
            "pass FrozenTeacher(trunk, embedder)."
        )
    if any(module.training for module in teacher.modules()):
        raise ValueError(
            f"teacher, a {type(teacher).__name__}, is in train mode; pass FrozenTeacher(trunk, embedder), which stays "
            "in eval mode."
        )
    taught = {id(p) for p in teacher.parameters()}
    for key, model in models.items():
        if any(id(p) in taught for p in model.parameters()):
            raise ValueError(f'teacher and models["{key}"] share parameters; give the teacher a copy of its own.')


def without_wrapper(loss: Any) -> Any:
    """Return the loss inside of ``DistributedDataParallel`` and ``DistributedLossWrapper``."""
    loss = unwrapped(loss)
    return loss.loss if isinstance(loss, DistributedLossWrapper) else loss
