import subprocess
import sys
from importlib import metadata, resources

import pml_distill


def test_is_typed_and_knows_its_version():
    assert resources.files("pml_distill").joinpath("py.typed").is_file()
    assert pml_distill.__version__ == metadata.version("pml-distill")


def test_console_script_and_extras():
    (script,) = [e for e in metadata.entry_points(group="console_scripts") if e.name == "pml-distill"]
    assert script.value == "pml_distill.cli:main"
    extras = metadata.metadata("pml-distill").get_all("Provides-Extra")
    assert {"with-hooks", "with-hooks-cpu", "test", "docs"} <= set(extras)


def modules_after(statement):
    code = f"import sys; {statement}; print(*sys.modules)"
    return set(subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout.split())


def test_losses_import_nothing_heavy_beyond_pml():
    ours = modules_after("import pml_distill.losses, pml_distill.datasets, pml_distill.teachers")
    extra = ours - modules_after("import pytorch_metric_learning.losses")
    assert {name.split(".")[0] for name in extra} <= {"pml_distill", "zipfile", "struct", "_struct", "warnings"}, extra


def test_the_module_runs_as_a_command():
    shown = subprocess.run([sys.executable, "-m", "pml_distill", "demo", "--help"], capture_output=True, text=True)
    assert shown.returncode == 0
    for option in ("--seeds", "--epochs", "--device", "--out", "--dataset", "--losses"):
        assert option in shown.stdout
