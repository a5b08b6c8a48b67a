"""What mkdocs writes into the pages, so that they cannot drift from the package and from the recorded figures.

A page holds one line per thing to be written:

- ``<!-- api: pml_distill.losses -->``: one ``:::`` block for each name that the package exports;
- ``<!-- catalogue -->``: the table of all losses;
- ``<!-- table: demo.csv | name | precision_at_1 flops -->``: figures of ``benchmarks/results/demo.csv``, one row for
  each value of the columns between the bars, mean ± standard error over its lines, and a link to the file. With
  ``batch=512`` among those columns only the lines with that value count, with ``loss=DCH/CSQ`` those with one of them;
  ``_`` stands for a space in a value. Without columns the file is shown as it is;
- ``<!-- results -->``: a link to each file in ``benchmarks/results``.

Each subpackage has a page in the reference: its docstring and what it exports.
"""

import csv
import importlib
import pkgutil
import re
import statistics
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
BENCHMARKS = ROOT / "benchmarks"
RESULTS = BENCHMARKS / "results"


def api_blocks(package: str) -> str:
    """Return the markdown that documents every exported name of a package."""
    module = importlib.import_module(package)
    blocks = []
    for name in sorted(module.__all__, key=str.lower):
        if name in getattr(module, "FROM_PML", ()):
            blocks.append(f"## {name}\n\n`{package}.{name}` is the class of that name in pytorch-metric-learning.")
            continue
        path = f"{package}.{name}"
        thing = getattr(module, name)
        if thing.__module__ == path:  # a function in a file of the same name, which the short path would mean
            path = f"{path}.{name}"
        blocks.append(f"::: {path}")
    return "\n\n".join(blocks)


def catalogue_table() -> str:
    """Return the table of all losses."""
    from pml_distill.losses import catalogue
    from pml_distill.recipe.settings import WEIGHTS, new_loss

    weights: dict[str, list[str]] = {}
    for name, weight in WEIGHTS.items():
        weights.setdefault(type(new_loss(name, 128)).__name__, []).append(f"{weight:g}")
    rows = [
        [
            f"[{entry.name}](#pml_distill.losses.{entry.name})",
            entry.family,
            ", ".join(entry.needs) or "nothing more",
            ", ".join(entry.takes) or "neither",
            "yes" if entry.aligned else "no",
            entry.cost,
            " to ".join(dict.fromkeys(sorted(weights.get(entry.name, []), key=float))),
            entry.source,
        ]
        for entry in catalogue()
    ]
    return markdown_table(["loss", "family", "needs", "takes", "aligned", "cost", "weight", "source"], rows)


def csv_table(name: str, keys: list[str], columns: list[str], up: str = "") -> str:
    """Return the figures of a recorded result: mean ± standard error of ``columns`` for each value of ``keys``."""
    wanted = {key: values.split("/") for key, _, values in (word.partition("=") for word in keys) if values}
    keys = [key for key in keys if "=" not in key]
    with open(RESULTS / name, newline="") as file:
        lines = [
            line
            for line in csv.DictReader(file)
            if all(line[key].replace(" ", "_") in values for key, values in wanted.items())
        ]
    if not keys:
        header, rows = list(lines[0]), [[shown(value) for value in line.values()] for line in lines]
    else:
        groups: dict[tuple[str, ...], list[dict[str, str]]] = {}
        for line in lines:
            groups.setdefault(tuple(line[key] for key in keys), []).append(line)
        header = [*keys, "lines", *columns]
        rows = [
            [*map(shown, group), str(len(members)), *(mean_and_error([m[c] for m in members]) for c in columns)]
            for group, members in groups.items()
        ]
    return markdown_table([title.replace("_", " ") for title in header], rows) + f"\n\n{source(name, up)}"


def mean_and_error(values: list[str]) -> str:
    """Return the mean of recorded values, with its standard error where they differ."""
    numbers = [float(value) for value in values if value]
    if not numbers:
        return ""
    mean = statistics.fmean(numbers)
    if len(set(numbers)) == 1:
        return shown(values[0])
    error = statistics.stdev(numbers) / len(numbers) ** 0.5
    return f"{mean:.3f}\u00a0±\u00a0{error:.3f}" if abs(mean) < 10 else f"{mean:.4g}\u00a0±\u00a0{error:.2g}"


def shown(value: str) -> str:
    """Return a recorded value to four digits; integers and words as they are."""
    try:
        return f"{float(value):.4g}" if "." in value else f"{int(value):,}"
    except ValueError:
        return value.replace("|", "\\|")


def markdown_table(header: list[str], rows: list[list[str]]) -> str:
    """Return a markdown table."""
    lines = [header, ["---"] * len(header), *rows]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def source(name: str, up: str) -> str:
    """Return a sentence that links a recorded result from a page ``up`` folders below the top."""
    return f"From [`benchmarks/results/{name}`]({up}results/{name})."


def result_links(up: str) -> str:
    """Return a list of links to all recorded results."""
    return "\n".join(f"- [`benchmarks/results/{path.name}`]({up}results/{path.name})" for path in result_files())


def result_files() -> list[Path]:
    """Return the recorded results by name."""
    return sorted(RESULTS.glob("*.csv"))


def expand(markdown: str, up: str = "") -> str:
    """Return a page with what its lines ask for."""
    markdown = re.sub(r"<!-- api: (\S+) -->", lambda m: api_blocks(m[1]), markdown)
    markdown = re.sub(r"<!-- catalogue -->", lambda m: catalogue_table(), markdown)
    markdown = re.sub(r"<!-- results -->", lambda m: result_links(up), markdown)
    return re.sub(
        r"<!-- table: (\S+)(?: \| ([^|\n]*) \| ([^|\n]*))? -->",
        lambda m: csv_table(m[1], (m[2] or "").split(), (m[3] or "").split(), up),
        markdown,
    )


def packages() -> list[str]:
    """Return the names of the subpackages."""
    import pml_distill

    return [module.name for module in pkgutil.iter_modules(pml_distill.__path__) if module.ispkg]


def package_page(name: str) -> str:
    """Return the reference page of a subpackage: what it says of itself, and all that it exports."""
    package = f"pml_distill.{name}"
    docstring = (importlib.import_module(package).__doc__ or "").replace("``", "`").strip()
    catalogue = "\n\n<!-- catalogue -->" if name == "losses" else ""
    return f"# {name.capitalize()}\n\n{docstring}{catalogue}\n\n<!-- api: {package} -->\n"


def on_config(config):
    """Mkdocs calls this first: the reference has a page for each subpackage."""
    group = next(entry["Reference"] for entry in config.nav if "Reference" in entry)
    group[:] = [{name.capitalize(): f"reference/{name}.md"} for name in packages()]
    return config


def on_files(files, config):
    """Mkdocs calls this once: the recorded results and the reference become files of the site."""
    from mkdocs.structure.files import File

    for path in result_files():
        files.append(File.generated(config, f"results/{path.name}", abs_src_path=str(path)))
    for name in packages():
        files.append(File.generated(config, f"reference/{name}.md", content=package_page(name)))
    return files


def on_page_markdown(markdown, page, config, files):
    """Mkdocs calls this for each page."""
    return expand(markdown, "../" * page.file.src_uri.count("/"))
