import re
from pathlib import Path

import pytest

README = (Path(__file__).parents[1] / "README.md").read_text()


@pytest.mark.filterwarnings("ignore:DistributedLossWrapper is being used in a non-distributed setting")
def test_every_example_runs_as_it_stands(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    blocks = re.findall(r"```python\n(.*?)```", README, flags=re.DOTALL)
    assert len(blocks) == 10
    for block in blocks:
        assert len(block.strip().splitlines()) <= 16
    names = {}
    for block in blocks:
        exec(compile(block, "README.md", "exec"), names)
    assert names["loss"].item() >= 0 and names["loss_fn"](names["embeddings"], ref_emb=names["embeddings"]) > 0
    sizes = [sum(p.numel() for p in names[name].parameters()) for name in ("small", "heavy_teacher")]
    assert sizes[0] <= 0.4 * sizes[1]


def test_the_map_names_what_there_is():
    import importlib

    packages = "losses miners distances regularizers samplers teachers testers trainers datasets models recipe".split()
    packages += ["capacity", "evaluation", "utils"]
    for package in packages:
        for name in importlib.import_module(f"pml_distill.{package}").__all__:
            assert f"`{name}`" in README or name in ("BaseDistillationTrainer", "ModelCost"), name
