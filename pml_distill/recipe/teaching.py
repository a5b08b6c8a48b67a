"""The teacher of a run: tuned on the labels, its outputs stored once, standardised; or its embeddings as given."""

import csv
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch
from pytorch_metric_learning.losses import MultiSimilarityLoss
from safetensors.torch import load_file, save_file
from torch import nn

from ..datasets import SeededViews
from ..datasets.items import UNLABELED
from ..models import EmbeddingNetwork, NamedNetwork
from ..teachers import CachedTeacher, FrozenTeacher, StandardizedTeacher, TeacherCache
from ..utils.distributed import in_first_process, num_processes, process_rank
from ..utils.files import whole_file, write_json
from .images import Images, ImageSet
from .report import accuracy
from .settings import HEAD_BATCH, HEAD_RATE, HEAD_STEPS, METRIC, PER_CLASS, STANDARDIZATION
from .training import Machine, Training, new_metric_loss
from .views import SharedViews

RESULT, HEAD, STATISTICS = "result.json", "head.json", "standardization.safetensors"


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
        self.latest: Any = None, None

    def outputs(self, images: ImageSet) -> torch.Tensor:
        """Return the teacher's own outputs for images, without augmentation."""
        raise NotImplementedError

    def embeddings(self, images: ImageSet) -> torch.Tensor:
        """Return the standardised outputs for images, without augmentation."""
        names = tuple(images.names)
        if self.latest[0] != names:
            self.latest = names, self.teacher.standardize(self.outputs(images))
        return self.latest[1]

    def standardize(self, source: Any, views: int, images: ImageSet, val: ImageSet, tune: bool) -> dict[str, Any]:
        """Fit mean and rotation to the outputs for all views of the training images, or load them.

        Args:
            source: the outputs by row.
            views: of each image.
            images: to train on.
            val: to validate on.
            tune: whether to tune the rotation on the labels, and to keep that if it retrieves better.

        Returns:
            MAP@R ``before`` and ``after`` the tuning, nothing without one.
        """
        self.teacher, path = StandardizedTeacher(source, self.width, STANDARDIZATION), self.folder / STATISTICS
        if not path.exists():
            self.teacher.fit(batches_of_rows(views * len(images)))

            def work() -> None:
                found = self.tune_rotation(source, images.labels.repeat(views), val) if tune else {}
                write_json(self.folder / HEAD, found)
                with whole_file(path) as unfinished:
                    save_file({key: value.contiguous() for key, value in self.teacher.state_dict().items()}, unfinished)

            in_first_process(work)
        self.teacher.load_state_dict(load_file(path))
        return json.loads((self.folder / HEAD).read_text(encoding="utf-8"))

    def tune_rotation(self, source: Any, labels: torch.Tensor, val: ImageSet) -> dict[str, float]:
        """Train the rotation on stored outputs and the labels of their rows; keep the better one, return both MAP@R."""
        outputs = self.outputs(val)

        def score() -> float:
            return accuracy(self.teacher.standardize(outputs), val.labels)[METRIC]

        torch.manual_seed(0)
        before, fitted, loss_fn = score(), self.teacher.matrix.clone(), MultiSimilarityLoss()
        matrix = nn.Parameter(fitted.clone())
        optimizer = torch.optim.AdamW([matrix], HEAD_RATE, weight_decay=0)
        schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, HEAD_RATE, total_steps=HEAD_STEPS + 1)
        for rows in batches_by_class(labels, HEAD_STEPS):
            embeddings = (source(torch.empty(len(rows)), rows).float().cpu() - self.teacher.mean) @ matrix.T
            loss = loss_fn(embeddings, labels[rows])
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            schedule.step()
        self.teacher.matrix = matrix.detach()
        after = score()
        if after < before:
            self.teacher.matrix = fitted
        return {"before": before, "after": after}


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
            epochs: of the training.
            rate: highest learning rate.
            seed: of the training.
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

    def store(self, images: ImageSet, val: ImageSet, tune: bool) -> dict[str, Any]:
        """Write the outputs for all views of the training images, those that are not there yet, and standardise."""
        frozen = FrozenTeacher(self.named.network.to(self.machine.device), dtype=self.machine.amp_dtype)
        folder = self.folder / "outputs"
        TeacherCache(folder, frozen, self.views, torch.float16, self.machine.batch_size).write(self.machine.workers)
        return self.standardize(CachedTeacher(folder, self.views), self.views.views, images, val, tune)

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

    def store(self, images: ImageSet, val: ImageSet, tune: bool) -> dict[str, Any]:
        """Standardise the vectors."""
        return self.standardize(SampleRows(self.outputs(images)), 1, images, val, tune)

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


def batches_by_class(labels: torch.Tensor, steps: int) -> Iterator[torch.Tensor]:
    """Yield rows of labelled samples, several of each of some classes."""
    classes = [(labels == label).nonzero().flatten() for label in labels[labels != UNLABELED].unique()]
    for _ in range(steps):
        drawn = torch.randperm(len(classes))[: HEAD_BATCH // PER_CLASS].tolist()
        yield torch.cat([classes[c][torch.randint(len(classes[c]), (PER_CLASS,))] for c in drawn])


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
    vectors: Any
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
