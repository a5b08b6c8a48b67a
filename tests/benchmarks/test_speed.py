"""What the benchmarks of speed measure."""

import sys
from pathlib import Path

import pytest
import torch

sys.path.insert(0, str(Path(__file__).parents[2] / "benchmarks"))

import speed

from pml_distill import losses, miners


def exported(package) -> set[str]:
    """Return the names of the modules that a user can make of a package."""
    found = {name: getattr(package, name) for name in package.__all__ if not name.startswith("Base")}
    return {name for name, thing in found.items() if isinstance(thing, type) and issubclass(thing, torch.nn.Module)}


def test_every_loss_and_miner_of_the_library_is_measured():
    measured = {type(subject.function).__name__ for subject in speed.subjects(8, 4, torch.device("cpu")).values()}
    ours = exported(losses) - {"TeacherQueue"} | exported(miners)
    assert {"DarkRankLoss", "CentralSimilarityLoss", "TeacherRankMiner"} <= ours <= measured


def test_a_table_of_speed_is_not_overwritten(tmp_path, monkeypatch, capsys):
    (tmp_path / "speed.csv").write_text("family,name\n")
    monkeypatch.setattr(sys, "argv", ["speed.py", "--out", str(tmp_path)])
    with pytest.raises(SystemExit):
        speed.main()
    assert "holds a speed.csv already; choose another folder" in capsys.readouterr().err
    assert (tmp_path / "speed.csv").read_text() == "family,name\n"
