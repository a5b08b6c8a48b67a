"""The example under torchrun: ten steps of two and of four processes end like those of one with the joined batch."""

import runpy
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from pml_distill.datasets import Glyphs
from pml_distill.models import SmallResNet

SCRIPT = Path(__file__).parents[2] / "examples" / "train_ddp.py"
OPTIONS = ("--steps", "10", "--lr", "0.002", "--batch-norm", "frozen", "--plain-images", "--batch-size", "32")


@pytest.fixture(scope="module")
def options(tmp_path_factory):
    """The example's options, with a teacher whose batch norm has seen images.

    The embeddings of one that has not lie so close together that float32 leaves few digits of their distances.
    """
    torch.manual_seed(0)
    teacher, glyphs = SmallResNet(32), Glyphs("train")
    images = torch.stack([glyphs[i][0] for i in range(0, len(glyphs), len(glyphs) // 256)])
    for module in teacher.modules():
        if isinstance(module, torch.nn.BatchNorm2d):
            module.momentum = None  # the statistics of the one pass
    with torch.no_grad():
        teacher(images)
    path = tmp_path_factory.mktemp("teacher") / "teacher.pth"
    torch.save(teacher.state_dict(), path)
    return *OPTIONS, "--teacher", str(path), "--out"


@pytest.fixture(scope="module")
def single(tmp_path_factory, options):
    """The student's weights after ten steps of one process, without torchrun."""
    path = tmp_path_factory.mktemp("single") / "student.pth"
    environment = {"RANK": "0", "WORLD_SIZE": "1", "LOCAL_RANK": "0", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "0"}
    with pytest.MonkeyPatch.context() as patch:
        for name, value in environment.items():
            patch.setenv(name, value)
        patch.setattr(torch.cuda, "is_available", lambda: False)
        patch.setattr(sys, "argv", [str(SCRIPT), *options, str(path)])
        runpy.run_path(str(SCRIPT), run_name="__main__")
    return torch.load(path)


@pytest.mark.parametrize("processes", [2, 4])
@pytest.mark.parametrize("cached", [False, True])
def test_ten_steps_equal_those_of_one_process(tmp_path, options, single, processes, cached):
    path = tmp_path / "student.pth"
    cache = ["--views", "1", "--cache", str(tmp_path / "cache")] if cached else []
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(processes)]
    environment = {"CUDA_VISIBLE_DEVICES": "", "OMP_NUM_THREADS": "1"}
    done = subprocess.run(
        ["env", *(f"{k}={v}" for k, v in environment.items()), *command, str(SCRIPT), *cache, *options, str(path)],
        capture_output=True,
        text=True,
        timeout=240,
    )
    assert done.returncode == 0, done.stderr
    several = torch.load(path)
    torch.manual_seed(0)
    SmallResNet(32)
    start = SmallResNet(8).state_dict()

    def largest(one, other):
        return max((one[k].double() - other[k].double()).abs().max().item() for k in one)

    assert largest(several, single) < 1e-5
    assert largest(start, single) > 1e-2
