"""A pretrained MobileNetV2 that shrinks while it learns furniture, beside others of the same size.

    pip install ".[train]" torch-pruning
    python benchmarks/furniture_capacity.py          # images and weights as for furniture.py; about an hour of a core

All learn from the labels and the teacher as in `furniture.py`, on images of 64 pixels, for as many steps at one rate:

- the network as it is;
- with capacity dynamics, to a half and a third of the FLOPs;
- cut to the same FLOPs before the training by Torch-Pruning, by the magnitude of weights over all layers;
- what capacity dynamics left of the half, with random weights.

Latency: ONNX Runtime, one image, one thread, median of runs in turns.
"""

import argparse
import copy
import tempfile
import warnings
from functools import partial
from pathlib import Path

import torch
from capacity_latency import medians, runner
from furniture import DEFAULT, MAP, RESULTS, Regime, measure, train
from furniture_data import teacher_network
from record import complete, finished, shown_by
from torch import nn

from pml_distill.capacity import CapacityDynamics, SizeBudget, export, insert_compactors
from pml_distill.evaluation import model_cost

SHAPE = (3, 64, 64)
REGIME = Regime(student="mobilenet", size=64, epochs=16, rate=5e-4)
SHARES = {"half": 0.5, "third": 1 / 3}
NETWORKS = ("whole", *SHARES, *(f"{share}, Torch-Pruning" for share in SHARES), "half, random weights")
METRICS = ("precision_at_1", MAP, "validation", "teacher", "parameters", "flops")


def shrinking(share: float, trunk: nn.Module, optimizer: torch.optim.Optimizer, steps: int) -> None:
    budget = SizeBudget(flops=share, steps=round(0.6 * steps))
    CapacityDynamics(trunk, optimizer, SHAPE, budget=budget)


def cut(network: nn.Module, share: float) -> nn.Module:
    """Cut a network to a share of its FLOPs before the training; the outputs keep their width."""
    import torch_pruning

    images = torch.zeros(1, *SHAPE)
    low, high = 0.0, 1.0
    for _ in range(8):
        ratio, trial = (low + high) / 2, copy.deepcopy(network)
        before, _ = torch_pruning.utils.count_ops_and_params(trial, images)
        importance = torch_pruning.importance.MagnitudeImportance(p=2)
        options = {"pruning_ratio": ratio, "global_pruning": True, "round_to": 8, "max_pruning_ratio": 0.9}
        torch_pruning.pruner.MagnitudePruner(
            trial, images, importance, ignored_layers=[trial.features[-1][0]], **options
        ).step()
        after, _ = torch_pruning.utils.count_ops_and_params(trial, images)
        low, high = (low, ratio) if after < share * before else (ratio, high)
        if after <= 1.03 * share * before:
            best = trial
    return best


def shrunk_student(share: float, seed: int) -> tuple[nn.Module, nn.Module]:
    """Train with capacity dynamics; return the exported student and what standardises the teacher."""
    trunk = teacher_network("mobilenet").requires_grad_(True)
    insert_compactors(trunk, "all")
    student, prepared = train(REGIME, DEFAULT, seed, (trunk, 1280), partial(shrinking, share))
    student[0] = export(student[0].eval())
    return student, prepared


def student_of(name: str, seed: int) -> tuple[nn.Module, nn.Module]:
    if name in SHARES:
        return shrunk_student(SHARES[name], seed)
    trunk = teacher_network("mobilenet").requires_grad_(True)
    if "Torch-Pruning" in name:
        trunk = cut(trunk, SHARES[name.partition(",")[0]])
    elif "random" in name:
        trunk = shrunk_student(SHARES["half"], seed)[0][0]
        torch.manual_seed(seed)
        for module in trunk.modules():
            if hasattr(module, "reset_parameters"):
                module.reset_parameters()
    return train(REGIME, DEFAULT, seed, (trunk.requires_grad_(True), 1280))


def run(folder: Path, job: dict) -> dict:
    torch.set_num_threads(1)
    torch.manual_seed(job["seed"])
    warnings.filterwarnings("ignore")
    student, prepared = student_of(job["network"], job["seed"])
    cost = model_cost(student[0], SHAPE, ())
    torch.save(student.eval(), folder / f"{job['network']}-{job['seed']}.pth")
    row = measure(student, prepared, REGIME, "test") | {"validation": measure(student, prepared, REGIME, "val")[MAP]}
    return job | row | {"parameters": cost.parameters, "flops": cost.flops}


def latencies(folder: Path, repeats: int = 50) -> dict[str, float]:
    images, runs = torch.randn(1, *SHAPE), {}
    with tempfile.TemporaryDirectory() as exported:
        for path in sorted(folder.glob("*-0.pth")):
            network = torch.load(path, weights_only=False).eval()
            runs[path.stem.removesuffix("-0")] = runner(network, images, exported)
        return medians(runs, repeats)


def draw(rows: list[dict[str, str]], latency: dict[str, float], path: Path) -> None:
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(figsize=(6, 4), layout="constrained")
    for name in NETWORKS:
        values = torch.tensor([float(row[MAP]) for row in rows if row["network"] == name])
        if name in latency and len(values) > 1:
            error = values.std() / len(values) ** 0.5
            marker = "s" if "Pruning" in name else "x" if "random" in name else "o"
            axes.errorbar(latency[name], values.mean(), error, fmt=marker, capsize=3, label=name)
    axes.set(xlabel="ONNX Runtime, one image, one thread (ms)", ylabel="MAP@R on new objects")
    axes.legend(fontsize="small")
    figure.savefig(path, dpi=120)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--processes", type=int, default=2, help="of one thread each")
    parser.add_argument("--networks", type=Path, default=Path("furniture_capacity"), help="folder of trained networks")
    parser.add_argument("--out", type=Path, default=RESULTS / "furniture_capacity.csv")
    parser.add_argument("--picture", type=Path, help="draw accuracy against latency into this file")
    given = parser.parse_args()
    given.networks.mkdir(exist_ok=True)
    jobs = [{"network": name, "seed": seed} for seed in range(given.seeds) for name in NETWORKS]
    complete(given.out, jobs, METRICS, partial(run, given.networks), given.processes)
    torch.set_num_threads(1)
    rows, latency = finished(given.out), latencies(given.networks)
    for row in rows:
        row["flops"], row["ms"] = str(float(row["flops"]) / 1e6), str(latency.get(row["network"], float("nan")))
    print(shown_by(rows, ("network",), ("precision_at_1", MAP, "flops", "ms")))
    if given.picture:
        draw(rows, latency, given.picture)


if __name__ == "__main__":
    main()
