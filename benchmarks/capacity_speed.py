"""What gradient resetting costs: one mask, all masks of a ResNet-101, and the whole hook in a training step.

    python benchmarks/capacity_speed.py

prints a table and writes it as CSV. Runs are interleaved in one process, and medians are compared.
"""

import argparse
import csv
from collections.abc import Callable
from pathlib import Path

import torch
from timing import medians
from torch.nn import functional as F

from pml_distill.capacity import CapacityDynamics, GradientReset, RetrievalReset, insert_compactors
from pml_distill.utils.report import format_table

BATCH, QUEUE = 96, 24000
RESNET101 = (64,) * 3 + (128,) * 4 + (256,) * 23 + (512,) * 3
#: Seconds of the authors' code for one mask of 512 channels and for all of a ResNet-101, on two CPU cores.
AUTHORS = {"mask": 0.177, "ResNet-101": 3.8}


def filled(channels: int, device: torch.device) -> GradientReset:
    reset = GradientReset(channels, QUEUE).to(device)
    for part in F.normalize(torch.rand(QUEUE, channels, device=device)).split(1000):
        reset.enqueue(part)
    return reset


def masks(device: torch.device, repeats: int) -> list[dict]:
    resets = [filled(channels, device) for channels in RESNET101]
    pairs = [tuple(torch.rand(2, BATCH, channels, device=device)) for channels in RESNET101]
    one, batch = resets[-1], pairs[-1]

    def product() -> torch.Tensor:
        return batch[1] @ one.queue.t()

    def all_masks() -> None:
        for reset, pair in zip(resets, pairs):
            reset.update(*pair)

    found = medians({"product": product, "mask": lambda: one.update(*batch), "ResNet-101": all_masks}, repeats)
    return [
        {"what": "batch x queue product, 96 x 24,000, 512 channels", "ms": found["product"], "ratio": 1.0, "to": ""},
        {"what": "mask of it", "ms": found["mask"], "ratio": found["mask"] / found["product"], "to": "the product"},
        {
            "what": "masks of all 33 blocks of a ResNet-101",
            "ms": found["ResNet-101"],
            "ratio": AUTHORS["ResNet-101"] / found["ResNet-101"],
            "to": "faster than the authors' code",
        },
    ]


def step(device: torch.device, batch: int, size: int, repeats: int) -> list[dict]:
    """Time a training step of a ResNet-50 with a ResNet-50 as teacher, with and without the hook."""
    from torchvision.models import resnet50

    runs: dict[str, Callable[[], object]] = {}
    for name in ("step", "step with the hook"):
        torch.manual_seed(0)
        student, teacher = resnet50().to(device), resnet50().to(device).eval().requires_grad_(False)
        insert_compactors(student)
        optimizer = torch.optim.SGD(student.parameters(), lr=1e-4, momentum=0.9)
        if name != "step":
            settings = RetrievalReset(teacher, warmup_epochs=0)
            dynamics = CapacityDynamics(student, optimizer, (3, size, size), reset=settings)
            for reset in dynamics.resetting.resets:
                reset.load_state_dict(filled(len(reset.mask), device).state_dict())
        images = torch.randn(batch, 3, size, size, device=device)

        def run(student=student, teacher=teacher, optimizer=optimizer, images=images) -> None:
            optimizer.zero_grad()
            outputs = student(images)
            with torch.no_grad():
                targets = teacher(images)
            (outputs - targets).square().mean().backward()
            optimizer.step()

        runs[name] = run
    found = medians(runs, repeats)
    plain, hooked = found["step"], found["step with the hook"]
    return [
        {"what": f"training step of a ResNet-50, {batch} images of {size} px", "ms": plain, "ratio": 1.0, "to": ""},
        {"what": "the same with the hook", "ms": hooked, "ratio": hooked / plain, "to": "the step without"},
    ]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--batch", type=int, default=32, help="of the training step")
    parser.add_argument("--size", type=int, default=128, help="of its images, in pixels")
    parser.add_argument("--repeats", type=int, default=9)
    parser.add_argument("--out", type=Path, default=Path("capacity_speed.csv"))
    options = parser.parse_args()
    device = torch.device(options.device)
    rows = masks(device, options.repeats) + step(device, options.batch, options.size, options.repeats)
    for row in rows:
        row["ms"] = round(1000 * row["ms"], 2)
        row["ratio"] = round(row["ratio"], 3)
    with open(options.out, "w", newline="") as file:
        writer = csv.DictWriter(file, list(rows[0]))
        writer.writeheader()
        writer.writerows(rows)
    print(format_table([{key: str(value) for key, value in row.items()} for row in rows]))


if __name__ == "__main__":
    main()
