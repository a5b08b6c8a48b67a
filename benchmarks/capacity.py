"""Capacity dynamics on Glyphs: how small does a student become that shrinks while it learns, and at what price?

Eight networks for each seed, tested on classes that none has seen, all trained for as many epochs by the same
optimizer:

- the teacher, and a student of the same architecture that learns alone, or is taught;
- the same heavy student, taught and shrunk by capacity dynamics, with and without gradient resetting, and to a milder
  target, and exported;
- a narrow student of uniform width, with at least as many parameters as the first exported one, from scratch and
  taught.

Whoever is taught also sees the training images mirrored and turned, without labels.

    python benchmarks/capacity.py --out capacity                      # a ResNet-18 of a quarter of its width, CPU
    python benchmarks/capacity.py --out wide --width 32 --compare price   # of half of its width, fewer networks
    python benchmarks/capacity.py --out three --width 32 --compare price --teachers 3   # taught by three teachers
    python benchmarks/capacity.py --out full --width 64 --bfloat16 --compare price   # ResNet-18 itself, two hours
    python benchmarks/capacity.py --out capacity50 --network resnet50 --positions all --target-flops 0.22
    python benchmarks/capacity.py --out foreign50 --network resnet50 --width 32 --positions all --target-flops 0.2 \\
        --bfloat16 --compare price --teachers 3 --teacher-network resnet18   # taught by three ResNet-18
    python benchmarks/capacity.py --out capacity101 --gpu             # ResNet-101 at full width
    python benchmarks/capacity.py --out marks --compare marks         # how long the marks of gradient resetting stay
    python benchmarks/capacity.py --out lasso --compare lasso         # both forms of the lasso under SGD and AdamW

writes capacity.csv row by row (a run that was stopped goes on where it was), capacity.md, curves.csv and
capacity.png, MAP@R of the validation classes against parameters over training, into the folder. Parameters, FLOPs,
latency and throughput are those of the network as it would be deployed. benchmarks/results/capacity.csv holds the
runs that the documentation shows.
"""

import argparse
import csv
import logging
import multiprocessing
import time
from collections import defaultdict
from pathlib import Path

import torch
from comparison import claim, finished
from glyph_runs import layout_for
from pytorch_metric_learning.losses import MultiSimilarityLoss
from pytorch_metric_learning.samplers import MPerClassSampler
from pytorch_metric_learning.utils import common_functions as c_f
from pytorch_metric_learning.utils.accuracy_calculator import AccuracyCalculator
from pytorch_metric_learning.utils.inference import CustomKNN
from torch import nn

from pml_distill.capacity import (
    CapacityDynamics,
    RetrievalReset,
    SizeBudget,
    export,
    find_compactors,
    insert_compactors,
    load_compact,
    save_compact,
)
from pml_distill.datasets import Glyphs
from pml_distill.datasets.items import UNLABELED
from pml_distill.distances import EuclideanDistance
from pml_distill.evaluation import model_cost
from pml_distill.losses import MutualDistanceLoss
from pml_distill.samplers import MixedSampler
from pml_distill.teachers import EnsembleTeacher, FrozenTeacher
from pml_distill.trainers import DistillationTrainer
from pml_distill.utils.report import format_table, mean_and_error, shown

LAYERS = {
    "resnet18": ("BasicBlock", (2, 2, 2, 2)),
    "resnet50": ("Bottleneck", (3, 4, 6, 3)),
    "resnet101": ("Bottleneck", (3, 4, 23, 3)),
}
TEACHER, HEAVY, HEAVY_DISTILLED = "teacher", "heavy student alone", "heavy student distilled"
SCRATCH, DISTILLED = "small student alone", "small student distilled"
DYNAMIC, LASSO = "capacity dynamics", "capacity dynamics without resetting"
MILDER = "capacity dynamics, milder target"
ALONE, REFRESHED = "marks of each step alone", "marks taken back every epoch"
COMPARISONS = {
    "size": (TEACHER, HEAVY, HEAVY_DISTILLED, DYNAMIC, MILDER, SCRATCH, DISTILLED, LASSO),
    "price": (TEACHER, HEAVY, DYNAMIC, HEAVY_DISTILLED, SCRATCH),
    "marks": (TEACHER, DYNAMIC, REFRESHED, ALONE, LASSO),
    "lasso": (
        TEACHER,
        *(f"{form}, {optimizer}" for optimizer in ("SGD", "AdamW") for form in ("proximal", "gradient")),
    ),
}
#: By --compare lasso, without a budget: how far a row would shrink if nothing else pulled at it; rows begin at 1.
SHRINKING = 3.0
ADAMW_RATE = 5e-3
SIZE, EMBEDDING, BATCH = 64, 128, 128
#: With a teacher: turned glyphs for each labelled one in a batch, and the weight of its loss.
TURNED, WEIGHT = 1, 5.0
FIELDS = (
    *("seed", "positions", "method", "map_at_r", "precision_at_1", "parameters", "flops", "latency_ms"),
    *("images_per_second", "training_seconds", "parameters_at_0.01", "map_at_r_at_0.01"),
)
#: What the runs in one folder have in common.
SETTINGS = (
    *("network", "width", "positions", "target_flops", "milder_flops", "budget_share", "epochs", "learning_rate"),
    *("bfloat16", "gpu", "teachers", "teacher_network"),
)
CURVE_FIELDS = ("seed", "positions", "method", "epoch", "parameters", "map_at_r")


def network(name: str, width: int) -> nn.Module:
    """Return a ResNet of torchvision, with another number of channels in its first stage than 64."""
    from torchvision.models import resnet

    block_name, layers = LAYERS[name]
    block = getattr(resnet, block_name)
    model = resnet.ResNet(block, list(layers), num_classes=EMBEDDING)
    if width != 64:
        model.conv1, model.bn1 = nn.Conv2d(3, width, 7, 2, 3, bias=False), nn.BatchNorm2d(width)
        model.inplanes = width
        for i, count in enumerate(layers):
            setattr(model, f"layer{i + 1}", model._make_layer(block, width << i, count, stride=1 if i == 0 else 2))
        model.fc = nn.Linear((width << 3) * block.expansion, EMBEDDING)
    return model.to(memory_format=layout_for(width))


def size_of(model: nn.Module) -> int:
    return sum(parameter.numel() for parameter in model.parameters())


def width_for(name: str, parameters: int) -> int:
    """Return the smallest width with at least so many parameters."""
    width = 1
    while size_of(network(name, width)) < parameters:
        width += 1
    return width


@torch.no_grad()
def embed(model: nn.Module, dataset) -> torch.Tensor:
    device = next(model.parameters()).device
    images = torch.stack([image for image, _ in dataset])
    return torch.cat([model(part.to(device)) for part in images.split(256)])


def as_one(teachers: list[nn.Module], dataset) -> FrozenTeacher:
    """Return teachers as one with embeddings as wide as a student's, which hold most of what theirs do."""
    if len(teachers) == 1:
        return FrozenTeacher(teachers[0])
    teacher = EnsembleTeacher([FrozenTeacher(one) for one in teachers])
    directions = torch.linalg.svd(embed(teacher, dataset), full_matrices=False).Vh[:EMBEDDING]
    embedder = nn.Linear(directions.shape[1], EMBEDDING, bias=False, device=directions.device)
    embedder.weight.data.copy_(directions)
    return FrozenTeacher(teacher, embedder)


def accuracy(model: nn.Module, dataset, device: torch.device) -> dict[str, float]:
    embeddings = embed(model.eval(), dataset)
    calculator = AccuracyCalculator(
        include=("precision_at_1", "mean_average_precision_at_r"),
        k="max_bin_count",
        device=device,
        knn_func=CustomKNN(EuclideanDistance(), batch_size=1024),
    )
    return calculator.get_accuracy(embeddings, dataset.labels)


def report(rows: list[dict[str, str]], folder: Path) -> str:
    groups = defaultdict(list)
    for row in rows:
        groups[row["positions"], row["method"]].append(row)
    by_seed = {row["seed"]: row for row in rows if row["method"] == HEAVY}
    lines = []
    for (positions, method), group in groups.items():
        line = {"method": method if positions == "-" else f'{method}, "{positions}"', "seeds": str(len(group))}
        for field, title in (("map_at_r", "MAP@R"), ("precision_at_1", "precision@1")):
            line[title] = shown([float(row[field]) for row in group])
        for field, title, unit in (("parameters", "parameters", 1e3), ("flops", "MFLOPs", 1e6)):
            mean = mean_and_error([float(row[field]) for row in group])[0]
            pairs = [(float(row[field]), float(by_seed[row["seed"]][field])) for row in group if row["seed"] in by_seed]
            saved = 100 * mean_and_error([1 - own / heavy for own, heavy in pairs])[0] if pairs else float("nan")
            line[title] = f"{mean / unit:.1f}{' k' if unit == 1e3 else ''}"
            line[f"{title} saved"] = f"{saved:.1f} %"
        line["ms (batch 1)"] = f"{mean_and_error([float(row['latency_ms']) for row in group])[0]:.2f}"
        line["images/s"] = f"{mean_and_error([float(row['images_per_second']) for row in group])[0]:.0f}"
        lines.append(line)
    table = format_table(lines)
    (folder / "capacity.md").write_text(table + "\n", encoding="utf-8")
    return table


def plot(curves: list[dict[str, str]], folder: Path) -> None:
    """Draw the way of each shrinking student, its epochs from right to left."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(7, 4.5), layout="constrained")
    axes = figure.subplots()
    ways = defaultdict(list)
    for row in curves:
        ways[row["method"], row["positions"], row["seed"]].append((int(row["parameters"]), float(row["map_at_r"])))
    colors = {key: f"C{i}" for i, key in enumerate(sorted({key[:2] for key in ways}))}
    named = set()
    for (method, positions, _), points in ways.items():
        key = (method, positions)
        label = None if key in named else (method if positions == "-" else f'{method}, "{positions}"')
        named.add(key)
        axes.plot(*zip(*points), marker=".", color=colors[key], label=label, linewidth=1, alpha=0.8)
    axes.set_xscale("log")
    axes.set_xlabel("parameters of the network if it were exported at this epoch")
    axes.set_ylabel("MAP@R on validation classes")
    axes.spines[["top", "right"]].set_visible(False)
    axes.legend(frameon=False, fontsize=8)
    figure.savefig(folder / "capacity.png", dpi=130)


class WithTurned(torch.utils.data.Dataset):
    """Training glyphs, and once more behind them, mirrored or turned and without labels.

    A turned glyph is a character that nobody has named. How it compares with others is what a teacher can say, and
    what a student that sees the labelled ones alone does not learn.
    """

    def __init__(self, glyphs: Glyphs):
        self.glyphs = glyphs
        self.labels = torch.cat([glyphs.labels, torch.full_like(glyphs.labels, UNLABELED)])

    def __len__(self) -> int:
        return len(self.labels)

    def __getitems__(self, indices: list[int]) -> list[tuple[torch.Tensor, int]]:
        count = len(self.glyphs)
        items = self.glyphs.__getitems__([i % count for i in indices])
        return [item if i < count else (turned(item[0]), UNLABELED) for i, item in zip(indices, items)]


def turned(image: torch.Tensor) -> torch.Tensor:
    """Return the image in one of the seven other positions of a square."""
    position = int(torch.randint(1, 8, ()))
    image = image.flip(-1) if position >= 4 else image
    return image.rot90(position % 4, (1, 2))


class Run:
    """The networks of one seed: trained, measured, and written down."""

    def __init__(self, options: argparse.Namespace, seed: int):
        self.options, self.seed = options, seed
        self.device = torch.device("cuda" if options.gpu else "cpu")
        self.train_set = Glyphs("train", size=SIZE, channels=3)
        self.val_set, self.test_set = (Glyphs(split, size=SIZE, channels=3) for split in ("val", "test"))
        logging.getLogger("PML").setLevel(logging.ERROR)

    def network(self, method: str) -> nn.Module:
        """Return the network of a method as it is before training."""
        name, width = self.options.network, self.options.width
        if method == TEACHER:
            name = self.options.teacher_network
        elif method in (SCRATCH, DISTILLED):
            width = width_for(name, self.exported_size())
        torch.manual_seed(self.seed if method == TEACHER else self.seed + 1000)
        return network(name, width).to(self.device)

    def trained(self, method: str, seed: int) -> nn.Module:
        model = self.network(method)
        model.load_state_dict(torch.load(self.options.out / f"{method} {seed}.pth", map_location=self.device))
        return model

    def teachers(self) -> list[nn.Module]:
        """Return the teacher of this seed, and those of the seeds that follow."""
        return [self.trained(TEACHER, (self.seed + i) % self.options.seeds) for i in range(self.options.teachers)]

    def exported_size(self) -> int:
        """The parameters of this seed's exported student, for the small one to match."""
        return size_of(load_compact(self.options.out / f"{DYNAMIC} {self.seed}.safetensors", self.network(DYNAMIC)))

    def run(self, method: str) -> tuple[dict, list[dict]]:
        """Train, test and measure; return a row of figures and the curve of a student that shrinks."""
        model = self.network(method)
        start = time.perf_counter()
        model, curve, loose = self.fit(model, method)
        seconds = time.perf_counter() - start
        figures, cost = accuracy(model, self.test_set, self.device), model_cost(model, (3, SIZE, SIZE))
        if method in (TEACHER, HEAVY):
            torch.save(model.state_dict(), self.options.out / f"{method} {self.seed}.pth")
        row = {
            "seed": self.seed,
            "positions": self.options.positions if curve else "-",
            "method": method,
            "map_at_r": figures["mean_average_precision_at_r"],
            "precision_at_1": figures["precision_at_1"],
            "parameters": cost.parameters,
            "flops": cost.flops,
            "latency_ms": cost.latency[1],
            "images_per_second": 1000 / cost.latency[64],
            "training_seconds": seconds,
            **loose,
        }
        return row, curve

    def optimizer(self, model: nn.Module, method: str) -> torch.optim.Optimizer:
        # Weight decay would shrink the compactors as a whole.
        compactors = [c.weight for c in find_compactors(model).values()]
        known = {id(weight) for weight in compactors}
        groups = [{"params": [p for p in model.parameters() if id(p) not in known]}]
        groups += [{"params": compactors, "weight_decay": 0.0}] if compactors else []
        if method.endswith("AdamW"):
            return torch.optim.AdamW(groups, lr=ADAMW_RATE, weight_decay=1e-2)
        return torch.optim.SGD(groups, lr=self.options.learning_rate, momentum=0.9, weight_decay=5e-4)

    def dynamics(
        self, model: nn.Module, method: str, guide: nn.Module, optimizer: torch.optim.Optimizer, steps: int
    ) -> CapacityDynamics:
        """Build the hook: with a budget, or with the same pull on all rows to compare the forms of the lasso."""
        size, shape = len(self.train_set), (3, SIZE, SIZE)
        if method in COMPARISONS["lasso"]:
            # OneCycleLR's mean is about half of its largest rate.
            weight = SHRINKING / (optimizer.defaults["lr"] / 2 * steps)
            return CapacityDynamics(model, optimizer, shape, weight, proximal=method.startswith("proximal"))
        reset = RetrievalReset(
            guide,
            warmup_epochs=1,
            queue_size=size,
            accumulate=method != ALONE,
            refresh_interval=size // BATCH if method == REFRESHED else None,
        )
        target = self.options.milder_flops if method == MILDER else self.options.target_flops
        budget = SizeBudget(flops=target, steps=int(self.options.budget_share * steps))
        return CapacityDynamics(
            model, optimizer, shape, lasso_weight=0.01, reset=None if method == LASSO else reset, budget=budget
        )

    def fit(self, model: nn.Module, method: str) -> tuple[nn.Module, list[dict], dict]:
        """Train, and export a student that shrinks; return its curve, and what a larger threshold would leave."""
        size, epochs = len(self.train_set), self.options.epochs
        steps = epochs * (size // BATCH)
        shrinking = method not in (TEACHER, HEAVY, HEAVY_DISTILLED, SCRATCH, DISTILLED)
        if shrinking:
            insert_compactors(model, self.options.positions)
        optimizer = self.optimizer(model, method)
        teachers = [] if method in (TEACHER, HEAVY, SCRATCH) else self.teachers()
        loss_funcs, loss_weights = {"metric_loss": MultiSimilarityLoss()}, {"metric_loss": 1.0}
        if teachers:
            loss_funcs["distillation_loss"], loss_weights["distillation_loss"] = MutualDistanceLoss(), WEIGHT
        dynamics = None
        if shrinking:
            # Whoever resets gradients has the student's blocks.
            alike = self.options.teacher_network == self.options.network
            guide = teachers[0] if alike else self.trained(HEAVY, self.seed)
            dynamics = self.dynamics(model, method, guide, optimizer, steps)
        curve = []

        def end_of_epoch(trainer: DistillationTrainer) -> None:
            figures = accuracy(model, self.val_set, self.device)
            curve.append(
                {
                    "seed": self.seed,
                    "positions": self.options.positions,
                    "method": method,
                    "epoch": trainer.epoch,
                    "parameters": dynamics.history[-1]["parameters"],
                    "map_at_r": figures["mean_average_precision_at_r"],
                }
            )

        c_f.NUMPY_RANDOM.seed(self.seed)
        torch.manual_seed(self.seed)
        dataset, batch_size = self.train_set, BATCH
        sampler = MPerClassSampler(dataset.labels, 4, BATCH, size)
        if teachers:
            dataset, batch_size = WithTurned(self.train_set), (1 + TURNED) * BATCH
            sampler = MixedSampler(dataset.labels, 4, batch_size, 1 / (1 + TURNED), (1 + TURNED) * size)
        DistillationTrainer(
            models={"trunk": model},
            optimizers={"trunk_optimizer": optimizer},
            batch_size=batch_size,
            loss_funcs=loss_funcs,
            loss_weights=loss_weights,
            dataset=dataset,
            teacher=as_one(teachers, self.train_set) if teachers else None,
            sampler=sampler,
            lr_schedulers={
                "trunk_scheduler_by_iteration": torch.optim.lr_scheduler.OneCycleLR(
                    optimizer, optimizer.defaults["lr"], total_steps=steps, pct_start=0.2
                )
            },
            end_of_epoch_hook=None if dynamics is None else dynamics.end_of_epoch_hook(end_of_epoch),
            data_device=self.device,
            dataloader_num_workers=0,
            amp_dtype=torch.bfloat16 if self.options.bfloat16 else None,
        ).train(1, epochs)
        if dynamics is None:
            return model, curve, {}
        exported = dynamics.export()
        if method == DYNAMIC:
            save_compact(exported, self.options.out / f"{DYNAMIC} {self.seed}.safetensors")
        loose = {}
        if method in COMPARISONS["lasso"]:
            if all(bool((c.row_norms() < 0.01).all()) for c in find_compactors(model).values()):
                return exported, curve, {}
            looser = export(model.eval(), threshold=0.01)
            figures = accuracy(looser, self.test_set, self.device)
            loose = {"parameters_at_0.01": size_of(looser), "map_at_r_at_0.01": figures["mean_average_precision_at_r"]}
        return exported, curve, loose


def append(path: Path, fields: tuple[str, ...], rows: list[dict]) -> None:
    """Add rows to a CSV, with a header if it is new."""
    new = not path.exists()
    with open(path, "a", newline="") as file:
        writer = csv.DictWriter(file, fields)
        if new:
            writer.writeheader()
        writer.writerows(rows)


def run_seed(job: tuple[argparse.Namespace, int, tuple[str, ...]]) -> None:
    """Make what is missing of one seed, in an order in which each finds what it needs."""
    options, seed, methods = job
    if not options.gpu:
        torch.set_num_threads(1)
    done = {(row["seed"], row["method"]) for row in finished(options.out / "capacity.csv")}
    for method in methods:
        if (str(seed), method) not in done:
            row, curve = Run(options, seed).run(method)
            append(options.out / "curves.csv", CURVE_FIELDS, curve)
            append(options.out / "capacity.csv", FIELDS, [row])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=Path("capacity"))
    parser.add_argument("--compare", choices=COMPARISONS, default="size")
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--network", choices=LAYERS, default=None, help="default: resnet18, with --gpu resnet101")
    parser.add_argument("--width", type=int, default=None, help="first stage; default: 16, with --gpu 64")
    parser.add_argument("--positions", choices=("inner", "all"), default="inner")
    parser.add_argument("--target-flops", type=float, default=0.34, help="share that shall remain")
    parser.add_argument("--milder-flops", type=float, default=0.7, help="the same, of the milder target")
    parser.add_argument("--budget-share", type=float, default=0.4, help="of the training, until the target is met")
    parser.add_argument("--epochs", type=int, default=24)
    parser.add_argument("--learning-rate", type=float, default=0.3)
    parser.add_argument("--bfloat16", action="store_true", help="train under autocast; teachers and tests stay float32")
    parser.add_argument("--teachers", type=int, default=1, help="that teach together: the seed's own, and of others")
    parser.add_argument("--teacher-network", choices=LAYERS, default=None, help="default: the student's")
    parser.add_argument("--processes", type=int, default=2, help="one seed in each")
    parser.add_argument("--gpu", action="store_true")
    options = parser.parse_args()
    options.network = options.network or ("resnet101" if options.gpu else "resnet18")
    options.teacher_network = options.teacher_network or options.network
    options.width = options.width or (64 if options.gpu else 16)
    if not 1 <= options.teachers <= options.seeds:
        parser.error(f"--teachers must be 1 to {options.seeds}, one for each of --seeds, but is {options.teachers}.")
    if options.teacher_network != options.network and HEAVY not in COMPARISONS[options.compare]:
        parser.error(f"--teacher-network needs a comparison with a {HEAVY}, which is taught by none: size or price.")
    claim(options.out, {name: getattr(options, name) for name in SETTINGS})
    first, *others = COMPARISONS[options.compare]
    # A student may have teachers of several seeds.
    steps = [[(options, seed, tuple(methods)) for seed in range(options.seeds)] for methods in ([first], others)]
    if options.gpu:
        for job in (job for jobs in steps for job in jobs):
            run_seed(job)
    else:
        with multiprocessing.get_context("spawn").Pool(options.processes) as pool:
            for jobs in steps:
                pool.map(run_seed, jobs, chunksize=1)
    rows = finished(options.out / "capacity.csv")
    print(report(rows, options.out))
    plot(finished(options.out / "curves.csv"), options.out)


if __name__ == "__main__":
    main()
