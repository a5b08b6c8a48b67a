"""Find the demo's loss weights on the validation classes of Glyphs, never the test classes.

One teacher is trained on the training classes without the validation classes; then each loss is tried with each
weight and learning rate. The baseline, the student alone, is tried with more learning rates. Finished trials are
not repeated. Usage:

    python benchmarks/search_weights.py --out weight_search

benchmarks/results/weight_search.csv holds the search behind the demo's defaults, one seed per trial; its column
``ramp`` tells trials with the demo's ramp (see LossWeightRamp) from those before there was one.
"""

import argparse
from functools import partial
from pathlib import Path

import torch
from comparison import complete
from glyph_runs import LOSSES, Demo, DemoConfig, Distillation

from pml_distill.losses import DarkRankLoss, RelativeTeacherLoss

WEIGHTS = {
    "soft_dark_rank": (0.003, 0.01, 0.03, 0.1),
    "hard_dark_rank": (0.003, 0.01, 0.03, 0.1),
    "similarity_regression": (0.03, 0.1, 0.3, 1.0),
    "absolute_teacher": (1.0, 3.0, 10.0, 30.0),
    "relative_teacher": (0.1, 0.3, 1.0, 3.0),
    "logit_distillation": (0.003, 0.01, 0.03, 0.1),
    "cosine_teacher": (1.0, 3.0, 10.0),
    "regression_teacher": (0.2, 0.6, 2.0, 6.0),
    "asymmetric_regression": (1.0, 3.0, 10.0),
    "rkd_distance": (3.0, 10.0, 40.0, 150.0),
    "rkd_angle": (3.0, 10.0, 40.0),
    "similarity_preserving": (5.0, 20.0, 80.0),
    "probabilistic_transfer": (4.0, 15.0, 60.0),
    "correlation_congruence": (0.5, 2.0, 10.0, 40.0, 150.0),
    "relaxed_contrastive": (1.0, 3.0, 8.0, 30.0, 120.0),
    "mutual_distance": (0.5, 1.5, 5.0),
    "rank_preservation": (0.015, 0.05, 0.15, 0.5),
    "decoupled_differential": (0.015, 0.05, 0.15),
    "collaborative_rank": (0.1, 0.3, 1.0, 3.0),
    "compress": (0.02, 0.06, 0.2, 0.6, 2.0),
    "compress_two_queues": (0.1, 0.3, 1.0, 3.0, 10.0),
    "contextual_similarity": (0.1, 0.3, 1.0, 3.0),
}
#: Other settings of two losses, which the demo does not have.
VARIANTS = {
    "soft_dark_rank_4": (lambda: DarkRankLoss("soft", list_length=4), (0.003, 0.01, 0.03, 0.1)),
    "hard_dark_rank_16": (lambda: DarkRankLoss("hard", list_length=16), (0.001, 0.003, 0.01, 0.03)),
    "hard_dark_rank_all": (lambda: DarkRankLoss("hard", list_length=None), (0.0003, 0.001, 0.003, 0.01)),
    "relative_teacher_l2": (lambda: RelativeTeacherLoss("l2"), (0.3, 1.0, 3.0, 10.0)),
}
TRIALS = {name: (LOSSES[name].make, weights) for name, weights in WEIGHTS.items()} | VARIANTS
RATES = (5e-3, 1e-2, 2e-2)
BASELINE_RATES = (3e-3, 5e-3, 1e-2, 2e-2, 3e-2)


METRICS = ("precision_at_1", "mean_average_precision_at_r", "neighbor_agreement")


def run(out: Path, job: dict) -> dict:
    loss, weight, rate = job.values()
    torch.set_num_threads(1)
    demo = Demo(DemoConfig(train_split="train", test_split="val"), out, torch.device("cpu"))
    if loss == "teacher":
        row = demo.run("teacher", 0)
    elif loss == "student":
        row = demo.run(f"student@{rate:g}", 0, learning_rate=rate)
    else:
        row = demo.run(f"{loss}@{weight:g}@{rate:g}", 0, Distillation(TRIALS[loss][0], weight), rate)
    return job | row


def job(loss: str, weight: float, rate: float) -> dict:
    return {"loss": loss, "weight": weight, "learning_rate": rate}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=Path("weight_search"))
    parser.add_argument("--processes", type=int, default=2)
    parser.add_argument("--losses", nargs="+", default=["student", *TRIALS], choices=["student", *TRIALS])
    parser.add_argument("--rates", nargs="+", type=float, default=RATES, help="learning rates for each weight")
    options = parser.parse_args()
    run(options.out, job("teacher", 0.0, 0.0))
    jobs = []
    for loss in options.losses:
        if loss == "student":
            jobs += [job(loss, 0.0, rate) for rate in BASELINE_RATES]
        else:
            jobs += [job(loss, weight, rate) for weight in TRIALS[loss][1] for rate in options.rates]
    complete(options.out / "weight_search.csv", jobs, partial(run, options.out), options.processes, METRICS)


if __name__ == "__main__":
    main()
