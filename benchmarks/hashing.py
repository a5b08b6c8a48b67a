"""Hashing of Glyphs: does a student that first learns a teacher's features, without labels, hash better?

The teacher, a ResNet-18, is trained on one half of the characters. The other characters are the data: 100 classes
that the teacher never saw, with different faces to train, to query and as database. Three backbones are tuned with a
hash head of 16, 32, 48 or 64 bits by DCH and CSQ, for the same number of steps each:

- the teacher's own;
- CompactResNet from scratch;
- CompactResNet after regression of the teacher's features on the training images, without labels.

    python benchmarks/hashing.py --out hashing

writes hashing.csv row by row (a run that was stopped goes on where it was), hashing.md and precision_recall.png into
the folder.
"""

import argparse
import copy
from collections import defaultdict
from pathlib import Path

import torch
from pytorch_metric_learning.losses import MultiSimilarityLoss
from pytorch_metric_learning.samplers import MPerClassSampler
from record import append, claim, finished

from pml_distill.datasets import Glyphs, glyph_hashing
from pml_distill.evaluation import HashAccuracyCalculator, model_cost
from pml_distill.losses import CentralSimilarityLoss, DeepCauchyHashingLoss, RegressionTeacherLoss
from pml_distill.models import CompactResNet, HashHead
from pml_distill.teachers import FrozenTeacher
from pml_distill.trainers import DistillationTrainer
from pml_distill.utils.report import format_table, mean_and_error, shown

BITS = (16, 32, 48, 64)
LOSSES = ("dch", "csq")
METHODS = ("teacher backbone", "student from scratch", "student after distillation")
CLASSES, SIZE, WIDTH = 100, 32, 128
CPU = torch.device("cpu")
FIELDS = ("seed", "loss", "bits", "method", "map", "precision_at_radius_2", "parameters", "flops", "latency_ms")


def resnet18() -> torch.nn.Module:
    from torchvision.models import resnet18

    model = resnet18(num_classes=WIDTH)
    model.conv1 = torch.nn.Conv2d(1, 64, 7, 2, 3, bias=False)
    return model


def fit(models, loss_funcs, dataset, steps, rate, teacher=None):
    """Train for a number of steps, batches of 16 classes by 4 images."""
    parameters = [p for model in models.values() for p in model.parameters()]
    DistillationTrainer(
        models=models,
        optimizers={"trunk_optimizer": torch.optim.Adam(parameters, lr=rate)},
        batch_size=64,
        loss_funcs=loss_funcs,
        dataset=dataset,
        teacher=teacher,
        sampler=MPerClassSampler(dataset.labels, 4, 64, 64 * steps),
        data_device=CPU,
        dataloader_num_workers=0,
    ).train(1, 1)


def backbones(seed: int, train, folder: Path, options) -> dict[str, torch.nn.Module]:
    """Return the three backbones of a seed, from the folder if they are there."""
    torch.manual_seed(seed)
    found = {
        "teacher backbone": resnet18(),
        "student from scratch": CompactResNet(SIZE, in_channels=1),
    }
    found["student after distillation"] = copy.deepcopy(found["student from scratch"])
    path = folder / f"backbones_{seed}.pth"
    if path.exists():
        for name, state in torch.load(path).items():
            found[name].load_state_dict(state)
        return found
    teacher, student = found["teacher backbone"], found["student after distillation"]
    unseen = Glyphs("test", augment=True)
    fit({"trunk": teacher}, {"metric_loss": MultiSimilarityLoss()}, unseen, options.teacher_steps, 1e-3)
    frozen, distillation = FrozenTeacher(copy.deepcopy(teacher)), {"distillation_loss": RegressionTeacherLoss()}
    fit({"trunk": student}, distillation, train, options.distillation_steps, 1e-3, frozen)
    torch.save({name: model.state_dict() for name, model in found.items()}, path)
    return found


def outputs(model, dataset) -> torch.Tensor:
    images = torch.stack([image for image, _ in dataset])
    model.eval()
    with torch.no_grad():
        return torch.cat([model(part) for part in images.split(256)])


def measure(seed, loss, bits, trunk, parts, steps):
    """Tune a backbone; return a row of figures and the precision-recall curve."""
    torch.manual_seed(seed)
    head = HashHead(WIDTH, bits)
    metric_loss = DeepCauchyHashingLoss() if loss == "dch" else CentralSimilarityLoss(CLASSES, bits)
    fit({"trunk": trunk, "embedder": head}, {"metric_loss": metric_loss}, parts["train"], steps, 1e-3)
    model = torch.nn.Sequential(trunk, head)
    query, database = (outputs(model, parts[part]) for part in ("query", "database"))
    arguments = (query, parts["query"].labels, database, parts["database"].labels)
    calculator = HashAccuracyCalculator(device=CPU)
    values, cost = calculator.get_accuracy(*arguments), model_cost(model, (1, SIZE, SIZE), batch_sizes=(1,))
    row = {
        "map": values["mean_average_precision"],
        "precision_at_radius_2": values["precision_within_radius"],
        "parameters": cost.parameters,
        "flops": cost.flops,
        "latency_ms": cost.latency[1],
    }
    return row, calculator.precision_recall_curve(*arguments)


def report(rows: list[dict[str, str]], folder: Path) -> str:
    groups = defaultdict(list)
    for row in rows:
        groups[row["loss"], int(row["bits"]), row["method"]].append(row)
    lines = []
    for (loss, bits, method), group in sorted(groups.items()):
        line = {"method": method, "loss": loss, "bits": str(bits), "seeds": str(len(group))}
        for field, name in (("map", "mAP"), ("precision_at_radius_2", "precision@radius 2")):
            line[name] = shown([float(row[field]) for row in group])
        line["parameters"] = f"{int(group[0]['parameters']) / 1e6:.2f} M"
        line["FLOPs"] = f"{int(group[0]['flops']) / 1e6:.0f} M"
        line["ms/image"] = f"{mean_and_error([float(row['latency_ms']) for row in group])[0]:.2f}"
        lines.append(line)
    table = format_table(lines)
    (folder / "hashing.md").write_text(table + "\n", encoding="utf-8")
    return table


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", default="hashing", type=Path)
    parser.add_argument("--seeds", default=5, type=int)
    parser.add_argument("--teacher-steps", default=300, type=int)
    parser.add_argument("--distillation-steps", default=200, type=int)
    parser.add_argument("--steps", default=60, type=int, help="of hashing, for each backbone alike")
    options = parser.parse_args()
    claim(options.out, {name: getattr(options, name) for name in ("teacher_steps", "distillation_steps", "steps")})
    path = options.out / "hashing.csv"
    if not path.exists():
        path.write_text(",".join(FIELDS) + "\n")
    done = {(row["seed"], row["loss"], row["bits"], row["method"]) for row in finished(path)}
    curves_path = options.out / "curves.pth"
    curves = torch.load(curves_path) if curves_path.exists() else {}
    for seed in range(options.seeds):
        parts = glyph_hashing(CLASSES, SIZE, seed=0)
        trunks = backbones(seed, parts["train"], options.out, options)
        for loss in LOSSES:
            for bits in BITS:
                for method in METHODS:
                    key = {"seed": str(seed), "loss": loss, "bits": str(bits), "method": method}
                    if tuple(key.values()) in done:
                        continue
                    row, curve = measure(seed, loss, bits, copy.deepcopy(trunks[method]), parts, options.steps)
                    append(path, key | row, FIELDS)
                    print(f"seed {seed} {loss} {bits:>2} bits {method:<26} mAP {row['map']:.3f}", flush=True)
                    if bits == max(BITS):
                        curves[f"{loss}, {method}"] = curve
                        torch.save(curves, curves_path)
        if curves:
            HashAccuracyCalculator.plot_precision_recall(options.out / "precision_recall.png", curves)
    print(report(finished(path), options.out))


if __name__ == "__main__":
    main()
