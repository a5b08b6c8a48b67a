from collections.abc import Iterable
from typing import Any

from torch import nn

from ..utils.modules import unwrapped
from ..utils.report import write
from .compactor import find_compactors

# Settings of DistributedDataParallel that are arguments and attributes of one name.
WRAPPER_SETTINGS: tuple[str, ...] = ("device_ids", "output_device", "dim", "process_group", "find_unused_parameters")
WRAPPER_SETTINGS += ("gradient_as_bucket_view", "static_graph", "mixed_precision")


def replace_student(trainer: Any, student: nn.Module, small: nn.Module) -> None:
    """Put the exported network in the student's place in a trainer, see ``CapacityDynamics.replace_student``."""
    key = key_in(trainer, student)
    wrapper = trainer.models[key]
    old, new = dict(student.named_parameters()), dict(small.named_parameters())
    heirs: dict[int, list[nn.Parameter]] = {id(p): [] for p in old.values()}
    for name, source in origins(student, new).items():
        heirs[id(old[source])].append(new[name])
    for optimizer in trainer.optimizers.values():
        for group in optimizer.param_groups:
            # In place: states in checkpoints go by the order.
            group["params"] = [heir for p in group["params"] for heir in heirs.get(id(p), [p])]
        for parameter in old.values():
            optimizer.state.pop(parameter, None)
    before, after = (sum(p.numel() for p in parameters.values()) for parameters in (old, new))
    write(f"The student is exported: {before:,} parameters have become {after:,}. Its optimizer is renewed.")
    trainer.models[key] = small
    if isinstance(wrapper, nn.parallel.DistributedDataParallel):
        settings = {name: getattr(wrapper, name) for name in WRAPPER_SETTINGS}
        trainer.models[key] = nn.parallel.DistributedDataParallel(small, **settings)
        # As an argument it is deprecated in newer versions, and under another name not known to older ones.
        trainer.models[key].broadcast_buffers = wrapper.broadcast_buffers
        write("So is its DistributedDataParallel, without communication hooks.")


def key_in(trainer: Any, student: nn.Module) -> str:
    """Return the student's key in ``trainer.models``, or raise ``ValueError`` for what forbids to replace it."""
    keys = [key for key, model in trainer.models.items() if unwrapped(model) is student]
    compiled = [k for k, m in trainer.models.items() if unwrapped(getattr(unwrapped(m), "_orig_mod", None)) is student]
    if compiled:
        raise ValueError(
            f'trainer.models["{compiled[0]}"] is what torch.compile(student) returned, in which the student cannot be '
            "replaced; give the student itself, compiled in place by student.compile()."
        )
    if not keys:
        raise ValueError(f"trainer.models has {sorted(trainer.models)}, none of which is this student.")
    names = {module: name for name, module in student.named_modules()}
    chains = [compactor.chain for compactor in find_compactors(student).values()]
    merged = [names[m] for chain in chains for m in (chain.producer, *chain.carriers, *chain.companions)]
    merged += list(find_compactors(student))
    features = getattr(trainer, "student_features", ()) if keys[0] == "trunk" else ()
    tapped = [name for name in features if any(f"{name}.".startswith(f"{place}.") for place in merged)]
    if tapped:
        raise ValueError(
            f"student_features names {tapped}, which the export merges: name outputs of blocks, or export at the end."
        )
    return keys[0]


def origins(student: nn.Module, names: Iterable[str]) -> dict[str, str]:
    """Return the student's parameter in whose place each parameter of the exported network belongs."""
    old = dict(student.named_parameters())
    modules = {module: name for name, module in student.named_modules()}
    moved: dict[str, str] = {}
    for place, compactor in find_compactors(student).items():
        chain = compactor.chain
        # What was wrapped is at its own name again, and a merged convolution has the bias of its normalisation.
        moved |= {f"{place}.{name}": f"{place}.0.{name}" for name, _ in chain.place.named_parameters()}
        layer = modules[chain.producer].removesuffix(".0") if chain.place is chain.producer else modules[chain.producer]
        if chain.full:
            norm = f"{modules[chain.place]}.bias"
            moved[f"{layer}.bias"] = norm if norm in old else f"{modules[chain.producer]}.weight"
    return {name: name if name in old else moved[name] for name in names}
