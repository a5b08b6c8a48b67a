"""What the benchmarks that compare accuracy share."""

import sys
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parents[2] / "benchmarks"))

import record


def test_a_folder_with_runs_of_other_settings_is_refused(tmp_path):
    folder = tmp_path / "out"
    record.claim(folder, {"steps": 60, "width": 16})
    record.claim(folder, {"steps": 60, "width": 16})
    with pytest.raises(SystemExit, match=r"out holds runs with {'steps': 60}; choose another folder"):
        record.claim(folder, {"steps": 180, "width": 16})


def test_a_folder_with_other_files_is_refused(tmp_path):
    (tmp_path / "hashing.csv").write_text("seed,loss\n")
    with pytest.raises(SystemExit, match="is not empty and has no settings.json; choose another folder"):
        record.claim(tmp_path, {"steps": 60})
