import importlib.util
import json
import re
from pathlib import Path

import pytest
import torch

ROOT = Path(__file__).parents[1]
DOCS = ROOT / "docs"
PAGES = sorted(DOCS.rglob("*.md"))
CODE = re.compile(r"```python\n(.*?)```", flags=re.DOTALL)


def load(name):
    spec = importlib.util.spec_from_file_location(f"docs_{name}", DOCS / f"{name}.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


hooks = load("hooks")


@pytest.mark.parametrize("page", [page for page in PAGES if CODE.search(page.read_text())], ids=lambda page: page.stem)
def test_examples_run_as_they_stand(page):
    torch.manual_seed(0)
    names = {"__name__": page.stem}
    for block in CODE.findall(page.read_text()):
        exec(compile(block, str(page), "exec"), names)


def test_every_exported_name_is_on_a_page():
    pages = hooks.expand("".join(map(hooks.package_page, hooks.packages())))
    for package in hooks.packages():
        for name in importlib.import_module(f"pml_distill.{package}").__all__:
            assert re.search(rf"::: pml_distill\.{package}\.(\w+\.)?{name}\n|## {name}\n", pages + "\n"), name


def test_every_loss_is_in_the_table():
    from pml_distill.losses import catalogue

    table = hooks.catalogue_table()
    assert len(table.splitlines()) == 2 + len(catalogue())
    assert (
        "| [DarkRankLoss](#pml_distill.losses.DarkRankLoss) | listwise | nothing more | distance, pairs | no |" in table
    )


def test_tables_hold_the_recorded_figures(tmp_path, monkeypatch):
    (tmp_path / "a.csv").write_text("name,seed,map,flops\nx,0,0.1,1000\nx,1,0.3,1000\ny,0,0.5,20\n")
    monkeypatch.setattr(hooks, "RESULTS", tmp_path)
    rows = hooks.expand("<!-- table: a.csv | name | map flops -->").splitlines()
    assert rows[0] == "| name | lines | map | flops |"
    assert rows[2:4] == ["| x | 2 | 0.200\u00a0±\u00a00.100 | 1,000 |", "| y | 1 | 0.5 | 20 |"]
    assert "(results/a.csv)" in rows[-1]
    assert hooks.expand("<!-- table: a.csv | seed=0 name | map -->").splitlines()[2] == "| x | 1 | 0.1 |"
    assert hooks.expand("<!-- table: a.csv -->").splitlines()[2] == "| x | 0 | 0.1 | 1,000 |"


@pytest.mark.parametrize(
    "docstring, markdown",
    [
        ("Sum :math:`a_b` here", "Sum $a_b$ here"),
        (".. math:: a\n\nText", "\n$$\na\n$$\n\n\nText"),
        (".. math:: a +\n    b\n\nText", "\n$$\na +\nb\n$$\n\n\nText"),
        (".. math::\n\n    a\n    b\n\nText", "\n$$\na\nb\n$$\n\n\nText"),
        (".. math:: a &= b\n\nText", "\n$$\n\\begin{aligned}\na &= b\n\\end{aligned}\n$$\n\n\nText"),
        ("    .. math:: a\n    Text", "\n    $$\n    a\n    $$\n\n    Text"),
        ("Example:\n    >>> 1", "Examples:\n    >>> 1"),
    ],
)
def test_docstrings_become_markdown(docstring, markdown):
    pytest.importorskip("griffe", reason="needs the extra docs")
    assert load("docstrings").to_markdown(docstring) == markdown


@pytest.mark.skipif(not (ROOT / "site").exists(), reason="the site is built by `nox -s docs`")
def test_search_finds_every_exported_name():
    index = json.loads((ROOT / "site" / "search" / "search_index.json").read_text())
    places = {entry["location"].partition("#")[2].rpartition(".")[2].lower() for entry in index["docs"]}
    for package in hooks.packages():
        for name in importlib.import_module(f"pml_distill.{package}").__all__:
            assert name.lower() in places, name


@pytest.mark.skipif(not (ROOT / "site").exists(), reason="the site is built by `nox -s docs`")
def test_no_directive_is_left_on_the_site():
    for page in (ROOT / "site").rglob("*.html"):
        assert not re.search(r"\.\. math|:math:|<!-- (api|table|catalogue|results)", page.read_text()), page
