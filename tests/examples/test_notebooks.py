"""The notebooks, on small settings: their cells run in one fresh process, and what they show is true."""

import importlib.util
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

EXAMPLES = Path(__file__).parents[2] / "examples"
#: What must hold after the last cell.
OUTCOMES = {
    "dark_rank": """
        assert [results[n]["epoch"] for n in networks] == [1, 1, 1]
        assert min(r["precision_at_1_level0"] for r in results.values()) > 0.01
        assert os.path.getsize("neighbors.png") > 10_000
    """,
    "hashing": """
        assert min(r["mean_average_precision"] for r in results.values()) > 1 / CLASSES
        assert indices.shape == (6, 5) and int(distances.max()) <= BITS
    """,
    "capacity": """
        assert difference < 1e-4 and onnx_difference < 1e-4
        assert after.flops <= 0.347 * before.flops and after.parameters < 0.5 * before.parameters
        assert os.path.getsize("capacity.png") > 10_000
    """,
    "lightning": """
        assert len(results) == 3 and results["teacher"][0] == results["teacher"][1]
        assert not [name for name in distilled.state_dict() if "teacher" in name]
    """,
    "torchrun": """
        assert difference < 1e-5 and 0 < agreement <= 1
    """,
}


def cells(name):
    notebook = json.loads((EXAMPLES / f"{name}.ipynb").read_text())
    return ["".join(cell["source"]) for cell in notebook["cells"] if cell["cell_type"] == "code"]


@pytest.mark.parametrize("name", OUTCOMES)
def test_a_notebook_runs_and_keeps_its_word(tmp_path, name):
    if name == "lightning" and importlib.util.find_spec("lightning") is None:
        pytest.skip("PyTorch Lightning is not installed")
    lines = [line.removeprefix("        ") for line in OUTCOMES[name].splitlines()]
    (tmp_path / "run.py").write_text("\n".join([*cells(name), "import os", *lines]))
    environment = {"PML_DISTILL_QUICK": "1", "PML_DISTILL_EXAMPLES": str(EXAMPLES), "MPLBACKEND": "agg"}
    done = subprocess.run(
        [sys.executable, "run.py"],
        cwd=tmp_path,
        env={**os.environ, **environment, "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""},
        capture_output=True,
        text=True,
        timeout=600,
    )
    assert done.returncode == 0, done.stderr[-3000:]


def test_every_notebook_is_tested_and_holds_no_output():
    assert {path.stem for path in EXAMPLES.glob("*.ipynb")} == set(OUTCOMES)
    for path in EXAMPLES.glob("*.ipynb"):
        for cell in json.loads(path.read_text())["cells"]:
            assert not cell.get("outputs") and not cell.get("execution_count")
