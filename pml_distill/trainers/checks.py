"""What a distillation trainer refuses before it trains, because it would cost hours or end in an obscure error."""

from typing import Any

import torch
from pytorch_metric_learning.losses import BaseMetricLossFunction, CrossBatchMemory, MultipleLosses, SelfSupervisedLoss
from pytorch_metric_learning.utils import common_functions as c_f
from pytorch_metric_learning.utils.distributed import DistributedLossWrapper

from ..losses import BaseFeatureLoss, BaseHashingLoss
from ..teachers import CachedTeacher, FrozenTeacher
from ..teachers.cached_teacher import caches
from ..utils.distributed import num_processes
from ..utils.feature_tap import FeatureTap
from ..utils.modules import unwrapped

#: Methods by which DistributedDataParallel and sharded networks are known, of both kinds of FSDP.
JOINT = ("no_sync", "set_requires_gradient_sync")
#: What the values of each dictionary must have, and what they are called.
PARTS = {
    "models": ("parameters", "a torch.nn.Module"),
    "loss_funcs": ("parameters", "a loss, a torch.nn.Module"),
    "optimizers": ("param_groups", "an optimizer"),
    "lr_schedulers": ("step", "a scheduler"),
    "mining_funcs": ("__call__", "a miner"),
    "gradient_clippers": ("__call__", "a function"),
}
MAPS = "feature_distillation_loss"


def refuse(wrong: Any, text: str) -> None:
    """Raise ``ValueError`` with this text if something is wrong."""
    if wrong:
        raise ValueError(text)


def check_setup(trainer: Any) -> None:
    """Raise ``ValueError`` for what does not go together."""
    check_parts(trainer)
    check_distillation_miner(trainer)
    check_losses(trainer)
    if trainer.teacher is not None:
        check_teacher(trainer.teacher, trainer.models)
        for cache in caches(trainer.teacher):
            cache.check_dataset(trainer.dataset)
    check_features(trainer)
    check_trained(trainer)
    check_processes(trainer)
    dtype, steps = trainer.amp_dtype, trainer.accumulation_steps
    wrong = dtype not in (None, torch.float16, torch.bfloat16)
    refuse(wrong, f"amp_dtype must be None, torch.float16 or torch.bfloat16, but is {dtype}.")
    refuse(steps < 1, f"accumulation_steps must be at least 1, but is {steps}.")


def check_parts(trainer: Any) -> None:
    """Check that each dictionary holds what it is for."""
    for name, (attribute, kind) in PARTS.items():
        held = getattr(trainer, name)
        if held is None and name in ("lr_schedulers", "gradient_clippers"):
            continue
        refuse(not hasattr(held, "items"), f"{name} must be a dictionary, but is {type(held).__name__}.")
        for key, part in held.items():
            text = f'{name}["{key}"] must be {kind}, but is a {type(part).__name__}; leave out the key.'
            refuse(not hasattr(part, attribute), text)
    text = 'models has the key "teacher", which PML would train. Pass teacher=FrozenTeacher(trunk, embedder).'
    refuse("teacher" in trainer.models, text)
    unknown = [key for key in trainer.loss_weight_ramps if key not in trainer.loss_funcs]
    refuse(unknown, f"loss_weight_ramps has {unknown}, but loss_funcs has only {sorted(trainer.loss_funcs)}.")


def check_keys(trainer: Any) -> None:
    """Check that PML knows all keys."""
    for name, checker in trainer.schema.children.items():
        allowed = checker.keys(checker, trainer.schema.children) if callable(checker.keys) else checker.keys
        unknown = [key for key in getattr(trainer, name) or () if key not in allowed]
        refuse(unknown, f"{name} has the unknown keys {unknown}; known are {sorted(allowed)}.")


def check_losses(trainer: Any) -> None:
    """Check the losses with a teacher, and what asks it without there being one."""
    losses, miners, keys = trainer.loss_funcs, trainer.mining_funcs, trainer.loss_keys_with_teacher
    refuse(not losses, 'loss_funcs is empty; give "metric_loss", "distillation_loss" or both.')
    asking = [f'loss_funcs["{key}"]' for key in keys if key in losses]
    asking += ['mining_funcs["tuple_miner"]'] * (trainer.teacher_miner("tuple_miner") is not None)
    text = f"{' and '.join(asking)} asks the teacher, but teacher is None; pass FrozenTeacher(trunk, embedder)."
    refuse(asking and trainer.teacher is None, text)
    text = f"teacher is given, but loss_funcs has only {sorted(losses)}; a teacher serves {list(keys)}."
    refuse(trainer.teacher is not None and not asking, text)
    wrappers = {f'mining_funcs["{key}"]': miners[key] for key in miners if trainer.teacher_miner(key) is not None}
    for key in keys:
        loss, name = without_wrapper(losses.get(key)), f'loss_funcs["{key}"]'
        kind, wrappers[name] = type(loss).__name__, unwrapped(losses.get(key))
        advice = "MultipleDistillationLosses" if isinstance(loss, MultipleLosses) else "a single loss"
        passes_none_on = isinstance(loss, (MultipleLosses, CrossBatchMemory, SelfSupervisedLoss))
        refuse(passes_none_on, f"{name} is a {kind}, which passes no ref_emb on; give {advice}.")
        wrong, needed = (BaseMetricLossFunction, "feature maps") if key == MAPS else (BaseFeatureLoss, "embeddings")
        refuse(isinstance(loss, wrong), f"{name} is a {kind}, but must be a loss on {needed}.")
    for name, wrapper in wrappers.items():
        kind, one_sided = type(wrapper).__name__, getattr(wrapper, "efficient", False)
        refuse(one_sided, f"{name} is a {kind} with efficient=True, which gathers only one side; use efficient=False.")


def check_distillation_miner(trainer: Any) -> None:
    """Check that this miner asks the teacher, for a loss that takes its pairs."""
    if "distillation_miner" not in trainer.mining_funcs:
        return
    name, served = 'mining_funcs["distillation_miner"]', 'loss_funcs["distillation_loss"]'
    loss, kind = trainer.loss_funcs.get("distillation_loss"), type(trainer.mining_funcs["distillation_miner"]).__name__
    text = f"{name} must be a miner of pml_distill.miners, such as TeacherMiner(miner), but is a {kind}."
    refuse(trainer.teacher_miner("distillation_miner") is None, text)
    refuse(loss is None, f"{name} serves {served}, which is not there.")
    loss = without_wrapper(loss)
    text = f"{name} finds pairs, but {type(loss).__name__}, {served}, takes none."
    refuse(not getattr(loss, "takes_pairs", True), text)


def check_teacher(teacher: Any, models: dict[str, torch.nn.Module]) -> None:
    """Raise ``ValueError`` if the teacher cannot be called, would learn, or its batch norms would drift."""
    kind, advice = type(teacher).__name__, "pass FrozenTeacher(trunk, embedder)"
    refuse(not callable(teacher), f"teacher is called as teacher(data), but a {kind} cannot be; {advice}.")
    if not isinstance(teacher, torch.nn.Module):
        return
    learns = any(p.requires_grad for p in teacher.parameters())
    refuse(learns, f"teacher, a {kind}, has parameters that require gradients; {advice}.")
    drifts = any(module.training for module in teacher.modules())
    refuse(drifts, f"teacher, a {kind}, is in train mode; {advice}, which stays in eval mode.")
    taught = {id(p) for p in teacher.parameters()}
    for key, model in models.items():
        shared = any(id(p) in taught for p in model.parameters())
        refuse(shared, f'teacher and models["{key}"] share parameters; give the teacher a copy of its own.')


def check_features(trainer: Any) -> None:
    """Check what the feature distillation needs."""
    teacher, ours, theirs = trainer.teacher, trainer.student_features, trainer.teacher_features
    if MAPS not in trainer.loss_funcs:
        text = f'student_features and teacher_features serve loss_funcs["{MAPS}"], which is not there.'
        return refuse(ours or theirs, text)
    text = "student_features and teacher_features, two lists of names of modules that go pair by pair"
    wrong = not ours or len(ours) != len(theirs) or isinstance(ours, str) or isinstance(theirs, str)
    refuse(wrong, f'loss_funcs["{MAPS}"] needs {text}, but they are {ours!r} and {theirs!r}.')
    text = f"the teacher, which must be a FrozenTeacher or a CachedTeacher, but is a {type(teacher).__name__}"
    refuse(not isinstance(teacher, (FrozenTeacher, CachedTeacher)), f'loss_funcs["{MAPS}"] taps {text}.')
    FeatureTap(trainer.models["trunk"], ours)
    teacher.tap(theirs)


def check_trained(trainer: Any) -> None:
    """Check that the networks and what bridges student and teacher learn, unless they are frozen."""
    trained = trained_by(trainer.optimizers)
    for key, model in trainer.models.items():
        held = [p for p in model.parameters() if id(p) in trained]
        frozen = held and key not in trainer.freeze_these and not any(p.requires_grad for p in held)
        advice = f'Call requires_grad_(True) on it, or give "{key}" in freeze_these'
        refuse(frozen, f'models["{key}"] is in an optimizer, but none of its parameters requires a gradient. {advice}.')
    for holder, key in (("loss_funcs", MAPS), ("models", "projection")):
        module = getattr(trainer, holder).get(key)
        if module is not None and key not in trainer.freeze_these:
            untrained = [name for name, p in module.named_parameters() if id(p) not in trained]
            advice = f'give optimizers["{key}_optimizer"], or "{key}" in freeze_these'
            refuse(untrained, f'{holder}["{key}"] has parameters that no optimizer trains, {untrained}; {advice}.')


def check_processes(trainer: Any) -> None:
    """Check that what learns beside a network whose processes learn together does so too."""
    if num_processes() == 1:
        return
    trained, alone, joint, gathered = trained_by(trainer.optimizers), [], [], []
    for name, module in ((f'{h}["{k}"]', m) for h in ("models", "loss_funcs") for k, m in getattr(trainer, h).items()):
        if any(hasattr(part, method) for part in module.modules() for method in JOINT):
            joint.append(name)
        elif name.split('"')[1] not in trainer.freeze_these and any(id(p) in trained for p in module.parameters()):
            alone.append(name)
        if isinstance(unwrapped(module), DistributedLossWrapper):
            gathered.append(name)
    why = f"while {' and '.join(joint)} does not" if joint else f"but {' and '.join(gathered)} gathers the embeddings"
    advice = "put the networks into DistributedDataParallel, or call fully_shard on them"
    text = f"{' and '.join(alone)} would learn in each process for itself, {why}; {advice}."
    refuse(alone and (joint or gathered), text)


def check_multi_hot_level(labels: torch.Tensor, level: Any, loss: Any) -> None:
    """Raise ``ValueError`` if a hashing loss would be given one column of multi-hot labels."""
    several = isinstance(level, int) and labels.ndim == 2 and labels.shape[1] > 1
    wrong = several and isinstance(without_wrapper(loss), BaseHashingLoss) and labels.max() <= 1
    text = f"label_hierarchy_level is {level}, which takes one column of the multi-hot labels {tuple(labels.shape)}"
    refuse(wrong, f'{text}; give label_hierarchy_level="all".')


def check_labels_seen(trainer: Any) -> None:
    """Say after the first epoch that no label has been seen; of several processes one may have none."""
    wanting = [key for key in ("metric_loss", "classifier_loss") if trainer.wants(key)]
    if wanting and not trainer.labels_seen:
        text = f'loss_funcs["{wanting[0]}"] has learned nothing: all labels of the first epoch are -1, that is, none.'
        text += " Let the dataset yield (data, label)."
        refuse(num_processes() == 1, text)
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
