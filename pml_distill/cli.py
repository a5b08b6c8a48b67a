"""The console command ``pml-distill``."""

import argparse
import csv
import importlib.util
import sys
from collections.abc import Sequence
from pathlib import Path


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command line; return the exit status."""
    parser = argparse.ArgumentParser(prog="pml-distill", description="Distillation for pytorch-metric-learning.")
    commands = parser.add_subparsers(dest="command", required=True)
    demo = commands.add_parser(
        "demo",
        help="distil a teacher into a small student and show what is gained",
        description="Train a teacher, a student alone and the same student with each distillation loss, with the "
        "same budget, sampler and seeds, and compare them on classes none of them has seen. Interrupted, it goes "
        "on where it was; run again, it reuses what is finished.",
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    demo.add_argument("--seeds", type=int, default=1, help="how many seeds; from two on, standard errors are shown")
    demo.add_argument("--epochs", type=int, default=10, help="epochs of every network, the teacher's included")
    demo.add_argument("--device", default=None, help="where to train (default: the GPU, if there is one)")
    demo.add_argument("--out", type=Path, default=Path("pml_distill_demo"), help="folder of results, logs, pictures")
    demo.add_argument("--dataset", choices=("glyphs", "digits"), default="glyphs", help="data to train and test on")
    demo.add_argument(
        "--losses", nargs="+", default=["core"], help="core (six losses), all, or names of distillation losses"
    )
    options = parser.parse_args(arguments)
    if importlib.util.find_spec("record_keeper") is None or importlib.util.find_spec("tensorboard") is None:
        parser.error('the demo logs with record-keeper and tensorboard: pip install "pml-distill[with-hooks-cpu]"')
    try:
        run_demo(options)
    except ValueError as error:
        demo.error(str(error))
    except KeyboardInterrupt:
        print(
            f"\nInterrupted. The same command goes on from here; finished runs are in {options.out}.", file=sys.stderr
        )
        return 130
    return 0


def run_demo(options: argparse.Namespace) -> None:
    """Run what is missing, then print and draw the comparison."""
    import torch

    from .demo import CORE, LOSSES, Demo, DemoConfig

    sets = {("core",): list(CORE), ("all",): list(LOSSES)}
    names = sets.get(tuple(options.losses), options.losses)
    unknown = sorted(set(names) - set(LOSSES))
    if unknown:
        raise ValueError(f"--losses has unknown names {unknown}; known are {sorted(LOSSES)}.")
    for argument in ("seeds", "epochs"):
        if getattr(options, argument) < 1:
            raise ValueError(f"--{argument} must be at least 1, but is {getattr(options, argument)}.")
    device = options.device or ("cuda" if torch.cuda.is_available() else "cpu")
    try:
        device = torch.zeros(0, device=device).device
    except (AssertionError, RuntimeError) as error:
        raise ValueError(f"--device {device} cannot be used: {str(error).splitlines()[0]}") from error
    demo = Demo(DemoConfig(options.dataset, options.epochs), options.out, device)
    runs = [(seed, name) for seed in range(options.seeds) for name in ("teacher", "student", *names)]
    for number, (seed, name) in enumerate(runs, 1):
        print(f"[{number}/{len(runs)}] {name}, seed {seed}", file=sys.stderr)
        demo.run(name, seed, LOSSES.get(name))
    report(demo, names, options.seeds)


def report(demo, names: Sequence[str], seeds: int) -> None:
    """Print the table; write it beside the CSV and the pictures."""
    import torch

    from .demo import LOSSES
    from .utils.report import bar_chart, format_table, mean_and_error, neighbor_sheet, shown

    runs = {(row["name"], row["seed"]): row for row in demo.results()}
    costs = demo.costs()

    def values(name: str, metric: str) -> list[float]:
        return [runs[name, seed][metric] for seed in range(seeds)]

    metric = "mean_average_precision_at_r"
    table, records = [], []
    for name in ("teacher", "student", *names):
        cost = costs["teacher" if name == "teacher" else "student"]
        gaps = [
            (own - alone) / (best - alone)
            for own, alone, best in zip(values(name, metric), values("student", metric), values("teacher", metric))
        ]
        table.append(
            {
                "network": "student alone" if name == "student" else name,
                "precision@1": shown(values(name, "precision_at_1")),
                "MAP@R": shown(values(name, metric)),
                "student to teacher": shown(values(name, "asymmetric_map_at_r")),
                "aligned": ("yes" if LOSSES[name].aligned else "no") if name in LOSSES else "",
                "gap recovered": shown([100 * gap for gap in gaps], ".0f") + " %",
                "agreement": shown(values(name, "neighbor_agreement")),
                "parameters": f"{cost.parameters:,}",
                "MFLOPs": f"{cost.flops / 1e6:.1f}",
                "ms (batch 1)": f"{cost.latency[1]:.2f}",
                "ms (batch 64)": f"{cost.latency[64]:.3f}",
            }
        )
        records += [
            {
                **runs[name, seed],
                "gap_recovered": gap,
                "parameters": cost.parameters,
                "flops": cost.flops,
                "latency_ms_batch_1": cost.latency[1],
                "latency_ms_batch_64": cost.latency[64],
            }
            for seed, gap in enumerate(gaps)
        ]
    text = format_table(table)
    print(text)
    (demo.out / "table.md").write_text(text + "\n", encoding="utf-8")
    with open(demo.out / "results.csv", "w", newline="") as file:
        writer = csv.DictWriter(file, list(records[0]))
        writer.writeheader()
        writer.writerows(records)
    bar_chart(
        demo.out / "map_at_r.png",
        {row["network"]: mean_and_error(values(name, metric)) for row, name in zip(table[2:], names)},
        {
            "student alone": mean_and_error(values("student", metric))[0],
            "teacher": mean_and_error(values("teacher", metric))[0],
        },
        "MAP@R on unseen classes",
    )
    best = max(names, key=lambda name: mean_and_error(values(name, metric))[0])
    labels = torch.as_tensor(demo.test_set.labels)
    queries = torch.randperm(len(labels), generator=torch.Generator().manual_seed(0))[:12].tolist()
    neighbor_sheet(
        demo.out / "neighbors.png",
        torch.stack([demo.test_set[i][0] for i in range(len(labels))]),
        labels,
        {"student alone": demo.embeddings("student", 0).cpu(), f"student with {best}": demo.embeddings(best, 0).cpu()},
        queries,
    )
    print("\nstudent to teacher: MAP@R of the student's queries in the teacher's gallery. Losses that do not align")
    print("the two spaces (aligned: no), such as those on relations alone, have no reason to raise it.")
    print(f"Averaged over {seeds} seed{'s' * (seeds > 1)}. In {demo.out}: table.md, results.csv, map_at_r.png,")
    print("neighbors.png, and the record-keeper and tensorboard logs of every run in its folder.")
