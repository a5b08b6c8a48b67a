"""The teacher of a run: tuned on the labels, its outputs stored once, standardised; or its embeddings as given."""

import csv
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn

from ..datasets import SeededViews
from ..models import EmbeddingNetwork, NamedNetwork
from ..teachers import CachedTeacher, FrozenTeacher, StandardizedTeacher, TeacherCache
from ..utils.distributed import in_first_process, num_processes, process_rank
from ..utils.files import whole_file, write_json
from .images import Images, ImageSet
from .report import accuracy
from .settings import METRIC, STANDARDIZATION
from .training import Machine, Training, new_metric_loss
from .views import SharedViews

RESULT, STATISTICS = "result.json", "standardization.safetensors"


class Teaching:
    """What a student learns from.

    Args:
        folder: of what is kept of the teacher.
        width: of the standardised outputs.
        machine: where it runs.

    Attributes:
        teacher: called on training data and their rows in the views.
    """

    def __init__(self, folder: Path, width: int, machine: Machine):
        self.folder, self.width, self.machine = folder, width, machine
        self.teacher: Any = None

    def outputs(self, images: ImageSet) -> torch.Tensor:
        """Return the teacher's own outputs for images, without augmentation."""
        raise NotImplementedError

    def embeddings(self, images: ImageSet) -> torch.Tensor:
        """Return the standardised outputs for images, without augmentation."""
        return self.teacher.standardize(self.outputs(images))

    def standardize(self, source: Any, rows: int) -> None:
        """Fit mean and rotation to the outputs of all training rows, or load them."""
        from safetensors.torch import load_file, save_file

        self.teacher = StandardizedTeacher(source, self.width, STANDARDIZATION)
        path = self.folder / STATISTICS
        if path.exists():
            self.teacher.load_state_dict(load_file(path))
            return
        self.teacher.fit(batches_of_rows(rows))

        def save() -> None:
            self.folder.mkdir(parents=True, exist_ok=True)
            with whole_file(path) as unfinished:
                save_file({key: value.contiguous() for key, value in self.teacher.state_dict().items()}, unfinished)

        in_first_process(save)


class NetworkTeaching(Teaching):
    """A network that teaches.

    Args:
        named: the network with its preprocessing.
        views: of the training images, as the teacher sees them.
    """

    def __init__(self, folder: Path, width: int, machine: Machine, named: NamedNetwork, views: SeededViews):
        super().__init__(folder, width, machine)
        self.named, self.views = named, views

    def tune(self, views: SeededViews, epochs: int, rate: float, seed: int, val: ImageSet) -> dict[str, Any]:
        """Train the network on the labels, and keep that if it retrieves as well or better on validation images.

        Args:
            views: of the training images with labels, as the teacher sees them.
            epochs, rate, seed: of the training.
            val: the validation images.

        Returns:
            MAP@R ``before`` and ``after``, whether the tuned network is ``kept``, and the ``curve``.
        """
        shown = SharedViews(val, None, self.named.preprocessing, None)

        def validate(network: nn.Module) -> float:
            return accuracy(self.machine.embed(network, shown), val.labels)[METRIC]

        network, path = EmbeddingNetwork(self.named.network), self.folder / RESULT
        metric_loss = new_metric_loss("multi_similarity")
        training = Training(
            self.folder, network, views, self.machine, epochs, rate, seed, metric_loss, validate=validate
        )
        tuned = training.finish()
        if not path.exists():
            before, after = validate(network), validate(tuned)
            result = {"before": before, "after": after, "kept": after >= before}
            in_first_process(lambda: write_json(path, result))
        result = json.loads(path.read_text(encoding="utf-8"))
        if result["kept"]:
            self.named.network = tuned.trunk
        return result | {"curve": training.curve}

    def store(self) -> None:
        """Write the outputs for all views of the training images, those that are not there yet, and standardise."""
        frozen = FrozenTeacher(self.named.network.to(self.machine.device), dtype=self.machine.amp_dtype)
        folder = self.folder / "outputs"
        cache = TeacherCache(folder, frozen, self.views, torch.float16, self.machine.batch_size)
        cache.write(self.machine.workers)
        self.standardize(CachedTeacher(folder, self.views), self.views.num_rows)

    def outputs(self, images: ImageSet) -> torch.Tensor:
        """Return what the network makes of images."""
        return self.machine.embed(
            self.named.network, SharedViews(images, None, self.named.preprocessing, None), "teacher"
        )


class GivenTeaching(Teaching):
    """Embeddings that were computed elsewhere, one for each image.

    Args:
        vectors: (N, D), for the images in ``all``, row for row.
        images: all of them.
    """

    def __init__(self, folder: Path, width: int, machine: Machine, vectors: torch.Tensor, images: Images):
        super().__init__(folder, width, machine)
        self.vectors = vectors
        self.row_of = {name: row for row, name in enumerate(images.all.names)}
        training = self.outputs(images["train"])
        self.standardize(SampleRows(training), len(training))

    def outputs(self, images: ImageSet) -> torch.Tensor:
        """Return the vectors of images."""
        return self.vectors[[self.row_of[name] for name in images.names]]


class SampleRows(nn.Module):
    """A teacher that returns the same embedding for each view of a sample."""

    needs_index = True

    def __init__(self, embeddings: torch.Tensor):
        super().__init__()
        self.embeddings = embeddings

    def forward(self, data: torch.Tensor, index: torch.Tensor) -> torch.Tensor:
        """Return the embeddings of the rows of views."""
        return self.embeddings[index.cpu() % len(self.embeddings)].to(data.device)


def batches_of_rows(rows: int, size: int = 1024) -> Iterator[tuple]:
    """Yield batches of rows without data, this process's share of them."""
    for index in torch.arange(process_rank(), rows, num_processes()).split(size):
        yield torch.empty(len(index)), None, index


def read_vectors(path: str | Path, images: ImageSet) -> torch.Tensor:
    """Return the (N, D) embeddings of a file, one for each image.

    The file is ``.npy``, with the rows in the order of the images or of the ``paths.csv`` beside it, as ``embed``
    writes both; or ``.npz`` with ``embeddings`` and ``ids``, the paths.

    Raises:
        ValueError: there is no such file, it has another number of rows, or images are missing.
    """
    path = Path(path)
    if not path.is_file():
        raise ValueError(f"There is no file {path} of teacher embeddings.")
    ids: list[str] | None = None
    content = np.load(path, allow_pickle=False)
    if isinstance(content, np.lib.npyio.NpzFile):
        if not {"embeddings", "ids"} <= set(content):
            raise ValueError(f"{path} must have the arrays embeddings and ids, but has {sorted(content)}.")
        vectors, ids = content["embeddings"], [str(name) for name in content["ids"]]
    else:
        vectors = content
        if (path.parent / "paths.csv").exists():
            with open(path.parent / "paths.csv", newline="", encoding="utf-8") as file:
                ids = [line["path"] for line in csv.DictReader(file)]
    expected = len(images) if ids is None else len(ids)
    if vectors.ndim != 2 or len(vectors) != expected:
        raise ValueError(
            f"{path} must have {expected} rows, one for each {'image' if ids is None else 'id'}, but has the shape "
            f"{vectors.shape}. Embed the same images again."
        )
    vectors = torch.from_numpy(np.ascontiguousarray(vectors, dtype=np.float32))
    if ids is None:
        return vectors
    row_of = {name: row for row, name in enumerate(ids)}
    missing = [name for name in images.names if name not in row_of]
    if missing:
        raise ValueError(f"{path} has no embedding of {len(missing)} images, such as {missing[0]}.")
    return vectors[[row_of[name] for name in images.names]]
