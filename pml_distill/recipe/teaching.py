"""The teacher of a run: tuned on the labels, its outputs stored once and standardised; or its embeddings as given."""

import csv
import json
from pathlib import Path
from typing import Any

import numpy as np
import torch
from pytorch_metric_learning.losses import MultiSimilarityLoss
from torch import nn

from ..datasets import SeededViews
from ..datasets.items import UNLABELED
from ..models import EmbeddingNetwork, NamedNetwork
from ..teachers import CachedTeacher, FrozenTeacher, StandardizedTeacher, TeacherCache, TensorTeacher
from ..teachers.tensor_teacher import read_table
from ..utils.distributed import in_first_process, num_processes, process_rank
from ..utils.files import whole_file, write_json
from . import settings as usual
from .images import Images, ImageSet
from .report import accuracy
from .training import Machine, Training, placed
from .views import SharedViews


class Teaching:
    """What a student learns from.

    Args:
        folder: of what is kept of the teacher.
        machine: where it runs.
        images: of the run.
        teacher: a network with its preprocessing, or the (N, D) embeddings of all images.

    Attributes:
        teacher: called on training data and their rows, once ``standardize`` was called.
    """

    def __init__(self, folder: Path, machine: Machine, images: Images, teacher: NamedNetwork | torch.Tensor):
        self.folder, self.machine, self.images, self.source = folder, machine, images, teacher
        self.row_of = {name: row for row, name in enumerate(images.all.names)}
        self.teacher: Any = None
        self.latest: Any = (None, None)

    def outputs(self, images: ImageSet) -> torch.Tensor:
        """Return the teacher's own outputs for images without augmentation."""
        if isinstance(self.source, torch.Tensor):
            return self.source[[self.row_of[name] for name in images.names]]
        return self.machine.embed(self.source.network, SharedViews(images, None, self.source.preprocessing, None))

    def embeddings(self, images: ImageSet) -> torch.Tensor:
        """Return the standardised outputs, and keep those of the latest images."""
        if self.latest[0] != images.names:
            self.latest = images.names, self.teacher.standardize(self.outputs(images))
        return self.latest[1]

    def train(self, views: SeededViews, epochs: int, rate: float, seed: int) -> tuple[dict[str, float], list]:
        """Train the whole network on labels; keep that if it retrieves as well or better on validation images.

        Args:
            views: of the training images with labels, as the teacher sees them.
            epochs: of the training.
            rate: highest learning rate.
            seed: of the training.

        Returns:
            MAP@R ``before`` and ``after``, and the learning curve.
        """
        named: Any = self.source
        val, path = self.images["val"], self.folder / "tuning.json"
        shown = SharedViews(val, None, named.preprocessing, None)

        def validate(network: nn.Module) -> float:
            return accuracy(self.machine.embed(network, shown), val.labels)[usual.METRIC]

        network, loss = EmbeddingNetwork(named.network), MultiSimilarityLoss()
        training = Training(self.folder, network, views, self.machine, epochs, rate, seed, loss, validate=validate)
        tuned = training.finish()
        if not path.exists():
            figures = {"before": validate(network), "after": validate(tuned)}
            in_first_process(lambda: write_json(path, figures))
        result = json.loads(path.read_text(encoding="utf-8"))
        if result["after"] >= result["before"]:
            named.network = tuned.trunk
        return result, training.curve

    def standardize(
        self, width: int, views: SeededViews, tune: bool, kind: str = usual.STANDARDIZATION
    ) -> dict[str, float]:
        """Store the outputs for all views of the training images; centre, rotate and scale them.

        Args:
            width: of the result.
            views: of the training images, as the teacher sees them.
            tune: whether to tune the rotation on labels, and to keep that if it retrieves better.
            kind: of the standardisation, see ``StandardizedTeacher``.

        Returns:
            MAP@R on validation images ``before`` and ``after`` the tuning, nothing without one.
        """
        from safetensors.torch import load_file, save_file

        path, note = self.folder / "standardization.safetensors", self.folder / "rotation.json"
        if isinstance(self.source, torch.Tensor):
            own = self.outputs(self.images["train"])
            stored: Any = TensorTeacher(own.expand(views.views, *own.shape).contiguous())
        else:
            frozen = FrozenTeacher(placed(self.source.network, self.machine.device), dtype=self.machine.amp_dtype)
            cache = TeacherCache(self.folder / "outputs", frozen, views, torch.float16, self.machine.batch_size)
            cache.write(self.machine.workers)
            stored = CachedTeacher(cache.folder)
        self.teacher = StandardizedTeacher(stored, width, kind)
        if not path.exists():
            rows = torch.arange(process_rank(), views.num_rows, num_processes()).split(1024)
            self.teacher.fit([torch.empty(len(part)), None, part] for part in rows)

            def finish() -> None:
                write_json(note, self.tune_rotation(views.labels.repeat(views.views)) if tune else {})
                with whole_file(path) as unfinished:
                    save_file({key: value.contiguous() for key, value in self.teacher.state_dict().items()}, unfinished)

            in_first_process(finish)
        self.teacher.load_state_dict(load_file(path))
        return json.loads(note.read_text(encoding="utf-8"))

    def tune_rotation(self, labels: torch.Tensor) -> dict[str, float]:
        """Train the rotation on stored outputs and the labels of their rows; keep the better one."""
        val = self.images["val"]
        outputs = self.outputs(val)

        def score() -> float:
            return accuracy(self.teacher.standardize(outputs), val.labels)[usual.METRIC]

        torch.manual_seed(0)
        before, fitted, loss_fn = score(), self.teacher.matrix.clone(), MultiSimilarityLoss()
        matrix = nn.Parameter(fitted.clone())
        optimizer = torch.optim.AdamW([matrix], usual.HEAD_RATE, weight_decay=0)
        schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, usual.HEAD_RATE, total_steps=usual.HEAD_STEPS + 1)
        classes = [(labels == label).nonzero().flatten() for label in labels[labels != UNLABELED].unique()]
        for _ in range(usual.HEAD_STEPS):
            drawn = torch.randperm(len(classes))[: usual.HEAD_BATCH // usual.PER_CLASS].tolist()
            rows = torch.cat([classes[c][torch.randint(len(classes[c]), (usual.PER_CLASS,))] for c in drawn])
            given = self.teacher.teacher(torch.empty(len(rows)), rows).float()
            loss = loss_fn((given - self.teacher.mean) @ matrix.T, labels[rows])
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            schedule.step()
        self.teacher.matrix = matrix.detach()
        after = score()
        if after < before:
            self.teacher.matrix = fitted
        return {"before": before, "after": after}


def read_vectors(path: str | Path, images: ImageSet) -> torch.Tensor:
    """Return the (N, D) embeddings in a file, one for each image.

    ``.npy``, ``.safetensors`` and ``.parquet`` have a row for each image in order, or for each line of the
    ``paths.csv`` beside it, as ``embed`` writes both; ``.npz`` has ``embeddings`` and ``ids``, the paths.

    Raises:
        ValueError: there is no such file, it has another number of rows, or an image has none.
    """
    path, beside = Path(path), Path(path).parent / "paths.csv"
    if not path.is_file():
        raise ValueError(f"There is no file {path} of teacher embeddings.")
    ids: list[str] = list(images.names)
    if path.suffix == ".npz":
        content = np.load(path)
        if not {"embeddings", "ids"} <= set(content):
            raise ValueError(f"{path} must have the arrays embeddings and ids, but has {sorted(content)}.")
        table, ids = content["embeddings"], [str(name) for name in content["ids"]]
    else:
        table = read_table(str(path))
        if beside.exists():
            with open(beside, newline="", encoding="utf-8") as file:
                ids = [line["path"] for line in csv.DictReader(file)]
    vectors = torch.as_tensor(np.array(table, dtype=np.float32))
    if vectors.ndim != 2 or len(vectors) != len(ids):
        raise ValueError(
            f"{path} must have {len(ids)} rows, one for each image, but has {tuple(vectors.shape)}. Embed the same "
            "images again."
        )
    row_of = {name: row for row, name in enumerate(ids)}
    missing = [name for name in images.names if name not in row_of]
    if missing:
        raise ValueError(f"{path} has no embedding of {len(missing)} images, such as {missing[0]}. Embed them again.")
    return vectors[[row_of[name] for name in images.names]]
