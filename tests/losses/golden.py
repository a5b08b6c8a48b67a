"""Reads the authors' numbers: one test case per case of a file."""

from pathlib import Path

import numpy as np
import pytest
import torch
from pytorch_metric_learning.distances import LpDistance

FOLDER = Path(__file__).parents[1] / "golden"


class Case:
    def __init__(self, file, name):
        with np.load(FOLDER / f"{file}.npz") as archive:
            prefix = f"{name}_"
            self.arrays = {k[len(prefix) :]: v for k, v in archive.items() if k.startswith(prefix)}
        self.student = torch.tensor(self.arrays["s"], requires_grad=True)
        self.teacher = torch.tensor(self.arrays["t"])

    def __getattr__(self, hyperparameter):
        return self.arrays[f"hp_{hyperparameter}"].item()

    def check(self, loss, suffix="", rounding=0.0):
        """Loss and gradient to a relative error of 1e-6; a zero gradient exactly.

        ``rounding``: the length of what the official code returns where the true gradient is zero.
        """
        (gradient,) = torch.autograd.grad(loss, self.student)
        official = torch.tensor(self.arrays["loss" + suffix])
        official_gradient = torch.tensor(self.arrays["grad" + suffix])
        assert (loss - official).abs() <= 1e-6 * official.abs()
        assert (gradient - official_gradient).norm() <= 1e-6 * official_gradient.norm() + rounding


def cases(file):
    with np.load(FOLDER / f"{file}.npz") as archive:
        names = sorted({key.split("_")[0] for key in archive.files})
    return pytest.mark.parametrize("case", [Case(file, name) for name in names], ids=names)


def raw():
    """The authors' code takes embeddings as they come."""
    return LpDistance(normalize_embeddings=False)


def closed_form():
    """Student and teacher of 8 unit rows of width 6, given by a formula."""
    i, j = torch.arange(8, dtype=torch.float64)[:, None], torch.arange(6, dtype=torch.float64)
    student, teacher = torch.sin(0.7 * i + 1.3 * j + 0.11 * i * j), torch.cos(0.3 * i - 0.9 * j + 0.17 * i * j)
    return torch.nn.functional.normalize(student), torch.nn.functional.normalize(teacher)
