"""What a distillation trainer refuses before it trains, because it would cost hours or end in an obscure error."""

from typing import Any

import torch
from pytorch_metric_learning.losses import BaseMetricLossFunction, CrossBatchMemory, MultipleLosses, SelfSupervisedLoss
from pytorch_metric_learning.utils import common_functions as c_f
from pytorch_metric_learning.utils.distributed import DistributedLossWrapper
from torch.distributed.fsdp import FullyShardedDataParallel
from torch.nn.parallel import DistributedDataParallel

from ..losses import BaseFeatureLoss, BaseHashingLoss
from ..teachers import CachedTeacher, FrozenTeacher
from ..teachers.cached_teacher import caches
from ..utils.distributed import num_processes
from ..utils.feature_tap import FeatureTap
from ..utils.modules import unwrapped

JOINT = (DistributedDataParallel, FullyShardedDataParallel)
#: What the values of each dictionary must have, and what they are called.
PARTS = {
    "models": ("parameters", "a torch.nn.Module"),
    "loss_funcs": ("parameters", "a loss, a torch.nn.Module"),
    "optimizers": ("param_groups", "an optimizer"),
    "lr_schedulers": ("step", "a scheduler"),
    "mining_funcs": ("__call__", "a miner"),
    "gradient_clippers": ("__call__", "a function"),
}


def check_setup(trainer: Any) -> None:
    """Raise ``ValueError`` for what does not go together."""
    check_parts(trainer)
    check_losses_and_miners(trainer)
    if trainer.teacher is not None:
        check_teacher(trainer.teacher, trainer.models)
        for cache in caches(trainer.teacher):
            cache.check_dataset(trainer.dataset)
    check_features(trainer)
    check_trained(trainer)
    check_processes(trainer)
    if trainer.amp_dtype not in (None, torch.float16, torch.bfloat16):
        raise ValueError(f"amp_dtype must be None, torch.float16 or torch.bfloat16, but is {trainer.amp_dtype}.")
    if trainer.accumulation_steps < 1:
        raise ValueError(f"accumulation_steps must be at least 1, but is {trainer.accumulation_steps}.")


def check_parts(trainer: Any) -> None:
    """Check that each dictionary holds what it is for."""
    for name, (attribute, kind) in PARTS.items():
        held = getattr(trainer, name)
        if held is None and name in ("lr_schedulers", "gradient_clippers"):
            continue
        if not hasattr(held, "items"):
            raise ValueError(f"{name} must be a dictionary, but is {type(held).__name__}.")
        for key, part in held.items():
            if not hasattr(part, attribute):
                raise ValueError(f'{name}["{key}"] must be {kind}, but is a {type(part).__name__}; leave out the key.')
    if "teacher" in trainer.models:
        raise ValueError(
            'models has the key "teacher", where PML would train and save it. Pass '
            "teacher=FrozenTeacher(trunk, embedder) instead."
        )
    unknown = [key for key in trainer.loss_weight_ramps if key not in trainer.loss_funcs]
    if unknown:
        raise ValueError(f"loss_weight_ramps has {unknown}, but loss_funcs has only {sorted(trainer.loss_funcs)}.")


def check_keys(trainer: Any) -> None:
    """Check that PML knows all keys."""
    for name, checker in trainer.schema.children.items():
        allowed = checker.keys(checker, trainer.schema.children) if callable(checker.keys) else checker.keys
        unknown = [key for key in getattr(trainer, name) or () if key not in allowed]
        if unknown:
            raise ValueError(f"{name} has the unknown keys {unknown}; known are {sorted(allowed)}.")


def check_losses_and_miners(trainer: Any) -> None:
    """Check the losses with a teacher, and the miners that ask it."""
    losses, miners, teacher = trainer.loss_funcs, trainer.mining_funcs, trainer.teacher
    wanting = [f'loss_funcs["{key}"]' for key in trainer.loss_keys_with_teacher if key in losses]
    wanting += ['mining_funcs["tuple_miner"]'] if trainer.teacher_miner("tuple_miner") is not None else []
    if not losses:
        raise ValueError('loss_funcs is empty; give "metric_loss", "distillation_loss" or both.')
    if wanting and teacher is None:
        raise ValueError(f"{wanting[0]} asks the teacher, but teacher is None; pass FrozenTeacher(trunk, embedder).")
    if "distillation_miner" in miners:
        own = 'mining_funcs["distillation_miner"]'
        if trainer.teacher_miner("distillation_miner") is None:
            kind = type(miners["distillation_miner"]).__name__
            raise ValueError(
                f"{own} must be a miner of pml_distill.miners, such as TeacherMiner(miner), but is a {kind}."
            )
        if "distillation_loss" not in losses:
            raise ValueError(f'{own} serves loss_funcs["distillation_loss"], which is not there.')
        loss = without_wrapper(losses["distillation_loss"])
        if not getattr(loss, "takes_pairs", True):
            raise ValueError(
                f'{own} finds pairs, but {type(loss).__name__}, loss_funcs["distillation_loss"], takes none.'
            )
    if teacher is not None and not wanting:
        raise ValueError(
            f"teacher is given, but loss_funcs has only {sorted(losses)}; a teacher serves "
            f"{list(trainer.loss_keys_with_teacher)}."
        )
    for key in trainer.loss_keys_with_teacher:
        loss, on_maps = without_wrapper(losses.get(key)), key == "feature_distillation_loss"
        if isinstance(loss, (MultipleLosses, CrossBatchMemory, SelfSupervisedLoss)):
            several = "give MultipleDistillationLosses" if isinstance(loss, MultipleLosses) else "give a single loss"
            raise ValueError(f'loss_funcs["{key}"] is a {type(loss).__name__}, which passes no ref_emb on; {several}.')
        if isinstance(loss, BaseMetricLossFunction if on_maps else BaseFeatureLoss):
            raise ValueError(
                f'loss_funcs["{key}"] is a {type(loss).__name__}, but must be a loss on '
                f"{'feature maps, such as AttentionTransferLoss' if on_maps else 'embeddings'}."
            )
        check_gathering(f'loss_funcs["{key}"]', unwrapped(losses.get(key)))
    for key in ("tuple_miner", "distillation_miner"):
        if trainer.teacher_miner(key) is not None:
            check_gathering(f'mining_funcs["{key}"]', miners[key])


def check_gathering(name: str, wrapper: Any) -> None:
    """Check that one of PML's distributed wrappers gathers student and teacher."""
    if getattr(wrapper, "efficient", False):
        raise ValueError(
            f"{name} is a {type(wrapper).__name__} with efficient=True, which gathers only one side of each row; use "
            "efficient=False."
        )


def check_teacher(teacher: Any, models: dict[str, torch.nn.Module]) -> None:
    """Raise ``ValueError`` if the teacher cannot be called, would learn, or its batch norms would drift."""
    if not callable(teacher):
        raise ValueError(
            f"teacher is called as teacher(data), but a {type(teacher).__name__} cannot be; pass "
            "FrozenTeacher(trunk, embedder)."
        )
    if not isinstance(teacher, torch.nn.Module):
        return
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
    """Check that what learns beside a network whose processes learn together does so too."""
    if num_processes() == 1:
        return
    trained, alone, joint, gathered = trained_by(trainer.optimizers), [], [], []
    for holder in ("models", "loss_funcs"):
        for key, module in getattr(trainer, holder).items():
            name = f'{holder}["{key}"]'
            # Only what fully_shard has been given has the second.
            if any(isinstance(m, JOINT) or hasattr(m, "set_requires_gradient_sync") for m in module.modules()):
                joint.append(name)
            elif key not in trainer.freeze_these and any(id(p) in trained for p in module.parameters()):
                alone.append(name)
            if isinstance(unwrapped(module), DistributedLossWrapper):
                gathered.append(name)
    if alone and (joint or gathered):
        why = f"while {joint[0]} does not" if joint else f"but {gathered[0]} gathers the embeddings of all"
        raise ValueError(
            f"{' and '.join(alone)} would learn in each process for itself, {why}; put the networks into "
            "DistributedDataParallel, or call fully_shard on them."
        )


def check_multi_hot_level(labels: torch.Tensor, level: Any, loss: Any) -> None:
    """Raise ``ValueError`` if a hashing loss would be given one column of multi-hot labels."""
    several = isinstance(level, int) and labels.ndim == 2 and labels.shape[1] > 1
    if several and isinstance(without_wrapper(loss), BaseHashingLoss) and labels.max() <= 1:
        raise ValueError(
            f"label_hierarchy_level is {level}, which takes one column of the multi-hot labels {tuple(labels.shape)}; "
            'give label_hierarchy_level="all".'
        )


def check_labels_seen(trainer: Any) -> None:
    """Say after the first epoch that no label has been seen; of several processes one may have none."""
    wanting = [key for key in ("metric_loss", "classifier_loss") if trainer.wants(key)]
    if trainer.labels_seen or not wanting:
        return
    text = (
        f'loss_funcs["{wanting[0]}"] has learned nothing: all labels of the first epoch are -1, which means that a '
        "sample has none. Let the dataset yield (data, label)."
    )
    if num_processes() == 1:
        raise ValueError(text)
    c_f.LOGGER.warning(text)


def trained_by(optimizers: dict[str, torch.optim.Optimizer]) -> set[int]:
    """Return the ids of the parameters that they train."""
    return {id(p) for o in optimizers.values() for group in o.param_groups for p in group["params"]}


def needs_labels(loss: Any) -> bool:
    """Whether a loss that is given a teacher is one of PML's own, or holds one."""
    loss = without_wrapper(loss)
    return isinstance(loss, BaseMetricLossFunction) and getattr(loss, "needs_labels", True)


def without_wrapper(loss: Any) -> Any:
    """Return the loss inside of ``DistributedDataParallel`` and ``DistributedLossWrapper``."""
    loss = unwrapped(loss)
    return loss.loss if isinstance(loss, DistributedLossWrapper) else loss
