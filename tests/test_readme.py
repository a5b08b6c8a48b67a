import inspect
import json
import re
from pathlib import Path

import pytest

README = (Path(__file__).parents[1] / "README.md").read_text()


@pytest.fixture
def a_run(tmp_path, monkeypatch):
    """A folder with a photo and the files of a run, in place of the weights that the first example names."""
    import torch
    from PIL import Image

    from pml_distill import recipe
    from pml_distill.models import Preprocessing, SmallResNet
    from pml_distill.recipe.deploy import write_onnx

    monkeypatch.chdir(tmp_path)
    Image.new("RGB", (60, 40), "red").save("photo.jpg")
    Path("run").mkdir()
    sees = Preprocessing((32, 32), "bicubic")
    torch.manual_seed(0)
    write_onnx(Path("run"), SmallResNet(4, in_channels=3).eval(), sees.image_shape)
    Path("run/config.json").write_text(json.dumps({"preprocessing": sees.to_dict()}))
    called, signature = {}, inspect.signature(recipe.distill)

    def distill(*args, **kwargs):
        called.update(signature.bind(*args, **kwargs).arguments)
        return recipe.Run(Path("run"), None, [], [], Path("run/report.html"))

    monkeypatch.setattr(recipe, "distill", distill)
    return called


def test_every_example_runs_as_it_stands(a_run):
    blocks = re.findall(r"```python\n(.*?)```", README, flags=re.DOTALL)
    assert len(blocks) == 4
    names = {}
    for block in blocks:
        exec(compile(block, "README.md", "exec"), names)
    assert a_run["teacher"].startswith("timm/") and a_run["out"] == "run"
    assert names["embedding"].ndim == 1
    assert names["student_embeddings"].grad.abs().sum() > 0


def test_the_commands_are_those_of_the_command_line():
    from pml_distill import cli

    commands = re.findall(r"^pml-distill .*?(?<!\\)$", README, flags=re.DOTALL | re.MULTILINE)
    assert len(commands) == 3
    for command in commands:
        cli.new_parser().parse_args(command.replace("\\\n", "").split()[1:])


def test_pages_that_it_links_are_there():
    for target in re.findall(r"\]\(([^):]+?)\)", README):
        assert (Path(__file__).parents[1] / target).exists(), target
