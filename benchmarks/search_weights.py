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
    "soft_4": (lambda: DarkRankLoss("soft", list_length=4), (0.03, 0.3, 3.0)),
    "soft_8": (lambda: DarkRankLoss("soft", list_length=8), (0.03, 0.3, 3.0)),
    "hard_8": (lambda: DarkRankLoss("hard", list_length=8), (0.03, 0.3, 3.0)),
    "hard_all": (lambda: DarkRankLoss("hard", list_length=None), (0.003, 0.03, 0.3)),
    "absolute": (AbsoluteTeacherLoss, (3.0, 10.0, 30.0, 100.0)),
    "relative": (RelativeTeacherLoss, (10.0, 30.0, 100.0)),
    "relative_l2": (lambda: RelativeTeacherLoss("l2"), (30.0, 100.0, 300.0)),
    "regression": (SimilarityRegressionLoss, (3.0, 10.0, 30.0)),
    "logit": (lambda: LogitDistillationLoss(temperature=4), (0.03, 0.3, 3.0)),
}


def run(job: tuple[Path, float, str, float]) -> dict:
    out, learning_rate, loss, weight = job
    torch.set_num_threads(1)
    config = DemoConfig(learning_rate=learning_rate, train_split="train", test_split="val")
    demo = Demo(config, out / f"lr{learning_rate}", torch.device("cpu"))
    if loss in ("teacher", "student"):
        row = demo.run(loss, 0)
    else:
        row = demo.run(f"{loss}@{weight:g}", 0, Distillation(TRIALS[loss][0], weight))
    return {"loss": loss, "weight": weight, "learning_rate": learning_rate, **row}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=Path("weight_search"))
    parser.add_argument("--processes", type=int, default=2)
    parser.add_argument("--losses", nargs="+", default=list(TRIALS))
    parser.add_argument("--learning-rates", nargs="+", type=float, default=[1e-3, 3e-3, 1e-2])
    options = parser.parse_args()
    rate = 3e-3
    rows = []
    with multiprocessing.get_context("spawn").Pool(options.processes) as pool:
        rows += pool.map(run, [(options.out, r, "teacher", 0.0) for r in options.learning_rates], chunksize=1)
        jobs = [(options.out, r, "student", 0.0) for r in options.learning_rates]
        jobs += [(options.out, rate, loss, weight) for loss in options.losses for weight in TRIALS[loss][1]]
        for row in pool.imap(run, jobs, chunksize=1):
            rows.append(row)
            print({k: round(v, 4) if isinstance(v, float) else v for k, v in row.items()}, flush=True)
    with open(options.out / "weight_search.csv", "w", newline="") as file:
        writer = csv.DictWriter(file, list(rows[0]))
        writer.writeheader()
        writer.writerows(rows)


if __name__ == "__main__":
    main()
