import csv
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[2] / "benchmarks"))

import search


def test_a_small_database_is_searched_in_each_way(tmp_path, monkeypatch):
    sizes = "--size 3000 --width 32 --queries 20 --codes 5000 --repeats 1 --rescore-bits 16".split()
    monkeypatch.setattr(sys, "argv", ["search.py", "--out", str(tmp_path), *sizes])
    search.main()
    with open(tmp_path / "search.csv") as file:
        rows = {row["search"]: row for row in csv.DictReader(file)}
    recalls = {name: float(row["recall_at_10"]) for name, row in rows.items()}
    assert recalls["QuantizedKNN(8), float"] == 1
    assert recalls["QuantizedKNN(8), int8"] > 0.95
    assert recalls["faiss IndexBinaryFlat"] < recalls["QuantizedKNN(1), rescore=16, int8"] > 0.9
    assert float(rows["QuantizedKNN(1), rescore=16, bits"]["bytes_per_vector"]) == 4
    assert (tmp_path / "search.md").read_text().count("\n") == len(rows) + 2
    with open(tmp_path / "search_memory.csv") as file:
        (row,) = csv.DictReader(file)
    assert row["codes"] == "5000" and float(row["extra_mb"]) < 100
