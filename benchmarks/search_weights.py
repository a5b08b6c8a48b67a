"""Find the demo's loss weights on the validation classes of Glyphs, never the test classes.

One teacher is trained on the training classes without the validation classes; then each loss is tried with each
weight. The baseline, the student alone, gets as many trials, over learning rates and metric losses. Finished
trials are not repeated. Usage:

    python benchmarks/search_weights.py --out weight_search

The results of the search behind the demo's defaults are in benchmarks/results/weight_search.csv.
"""

import argparse
import csv
import multiprocessing
from pathlib import Path

import torch

from pml_distill.demo import Demo, DemoConfig, Distillation
from pml_distill.losses import (
    AbsoluteTeacherLoss,
    DarkRankLoss,
    LogitDistillationLoss,
    RelativeTeacherLoss,
    SimilarityRegressionLoss,
)

TRIALS = {
    "soft_4": (lambda: DarkRankLoss("soft", list_length=4), (0.003, 0.01, 0.03, 0.1)),
    "soft_8": (lambda: DarkRankLoss("soft", list_length=8), (0.003, 0.01, 0.03, 0.1)),
    "hard_8": (lambda: DarkRankLoss("hard", list_length=8), (0.003, 0.01, 0.03, 0.1)),
    "hard_16": (lambda: DarkRankLoss("hard", list_length=16), (0.001, 0.003, 0.01, 0.03)),
    "hard_all": (lambda: DarkRankLoss("hard", list_length=None), (0.0003, 0.001, 0.003, 0.01)),
    "absolute": (AbsoluteTeacherLoss, (1.0, 3.0, 10.0, 30.0)),
    "relative": (RelativeTeacherLoss, (0.1, 0.3, 1.0, 3.0)),
    "relative_l2": (lambda: RelativeTeacherLoss("l2"), (0.3, 1.0, 3.0, 10.0)),
    "regression": (SimilarityRegressionLoss, (0.03, 0.1, 0.3, 1.0)),
    "logit": (lambda: LogitDistillationLoss(temperature=4), (0.003, 0.01, 0.03, 0.1)),
}
RATES = (3e-3, 1e-2, 2e-2, 3e-2)


def run(job: tuple[Path, str, float]) -> dict:
    out, loss, value = job
    torch.set_num_threads(1)
    demo = Demo(DemoConfig(train_split="train", test_split="val"), out, torch.device("cpu"))
    if loss == "teacher":
        row = demo.run("teacher", 0)
    elif loss == "student":
        row = demo.run(f"student@{value:g}", 0, learning_rate=value)
    else:
        row = demo.run(f"{loss}@{value:g}", 0, Distillation(TRIALS[loss][0], value))
    return {"loss": loss, "learning_rate" if loss == "student" else "weight": value, **row}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=Path("weight_search"))
    parser.add_argument("--processes", type=int, default=2)
    parser.add_argument("--losses", nargs="+", default=["student", *TRIALS], choices=["student", *TRIALS])
    options = parser.parse_args()
    run((options.out, "teacher", 0.0))
    jobs = [
        (options.out, loss, value)
        for loss in options.losses
        for value in (RATES if loss == "student" else TRIALS[loss][1])
    ]
    rows = []
    with multiprocessing.get_context("spawn").Pool(options.processes) as pool:
        for row in pool.imap_unordered(run, jobs, chunksize=1):
            rows.append(row)
            print("\n", {k: round(v, 4) if isinstance(v, float) else v for k, v in row.items()}, flush=True)
    columns = ["loss", "weight", "learning_rate", "precision_at_1", "mean_average_precision_at_r", "neighbor_agreement"]
    with open(options.out / "weight_search.csv", "w", newline="") as file:
        writer = csv.DictWriter(file, columns, extrasaction="ignore")
        writer.writeheader()
        writer.writerows(sorted(rows, key=lambda row: (row["loss"], row.get("weight", row.get("learning_rate")))))


if __name__ == "__main__":
    main()
