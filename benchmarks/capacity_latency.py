"""How fast networks are with half of their FLOPs, with widths as they fall and with multiples of 8.

    python benchmarks/capacity_latency.py --out capacity_latency.csv

Random weights; the rows that go are chosen by random lengths, under the same budget. ONNX Runtime and eager PyTorch,
one image, one thread; runs are interleaved, and medians are compared.
"""

import argparse
import csv
import tempfile
import time
import warnings
from collections.abc import Callable
from pathlib import Path
from statistics import median

import onnxruntime
import torch
from torch import nn

from pml_distill.capacity import CapacityDynamics, SizeBudget, insert_compactors
from pml_distill.evaluation import model_cost
from pml_distill.utils.report import format_table

NAMES = ("resnet50", "mobilenetv3_large_100", "convnext_tiny", "vit_small_patch16_224")


def shrunk(name: str, share: float, multiple_of: int) -> nn.Module:
    """Return a network with this share of its FLOPs."""
    import timm

    torch.manual_seed(0)
    student = timm.create_model(name)
    compactors = insert_compactors(student, "all")
    optimizer = torch.optim.SGD(student.parameters(), lr=0.0)
    budget = SizeBudget(flops=share, steps=1, multiple_of=multiple_of)
    dynamics = CapacityDynamics(student, optimizer, (3, 224, 224), budget=budget)
    with torch.no_grad():
        for compactor in compactors.values():
            lengths = 0.5 + torch.rand(len(compactor.weight), generator=torch.Generator().manual_seed(1))
            compactor.weight.mul_(lengths.view(-1, *(1,) * (compactor.weight.ndim - 1)))
    optimizer.step()
    return dynamics.export(fold_norms=True)


def runner(model: nn.Module, images: torch.Tensor, folder: str) -> Callable[[], object]:
    """Return the network as ONNX Runtime runs it."""
    path = str(Path(folder) / f"{id(model)}.onnx")
    torch.onnx.export(model, (images,), path, dynamo=True, verbose=False)
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = 1
    session = onnxruntime.InferenceSession(path, options)
    feed = {session.get_inputs()[0].name: images.numpy()}
    return lambda: session.run(None, feed)


def medians(runs: dict[str, Callable[[], object]], repeats: int) -> dict[str, float]:
    """Return the median milliseconds of each, run in turns."""
    times: dict[str, list[float]] = {key: [] for key in runs}
    for number in range(repeats + 2):
        for key, run in runs.items():
            start = time.perf_counter()
            run()
            if number > 1:
                times[key].append(1000 * (time.perf_counter() - start))
    return {key: median(values) for key, values in times.items()}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=Path("capacity_latency.csv"))
    parser.add_argument("--names", nargs="*", default=NAMES)
    parser.add_argument("--flops", type=float, default=0.5, help="share that remains")
    parser.add_argument("--repeats", type=int, default=15)
    options = parser.parse_args()
    warnings.filterwarnings("ignore")
    torch.set_num_threads(1)
    images, rows = torch.randn(1, 3, 224, 224), []
    for name in options.names:
        import timm

        networks = {"whole": timm.create_model(name).eval()}
        networks |= {f"multiples of {m}": shrunk(name, options.flops, m) for m in (1, 8)}
        with tempfile.TemporaryDirectory() as folder, torch.no_grad():
            onnx = medians({key: runner(model, images, folder) for key, model in networks.items()}, options.repeats)
            eager = medians({k: lambda m=m: m(images) for k, m in networks.items()}, options.repeats)
        for key, model in networks.items():
            cost = model_cost(model, (3, 224, 224), ())
            figures = {"parameters": cost.parameters, "flops": cost.flops}
            milliseconds = {"onnx_ms": round(onnx[key], 2), "eager_ms": round(eager[key], 2)}
            rows.append({"network": name, "widths": key, **figures, **milliseconds})
            print(rows[-1], flush=True)
        with open(options.out, "w", newline="") as file:
            writer = csv.DictWriter(file, list(rows[0]))
            writer.writeheader()
            writer.writerows(rows)
    print(format_table([{key: str(value) for key, value in row.items()} for row in rows]))


if __name__ == "__main__":
    main()
