"""The stages of a run: the teacher made ready, the weight of the distillation chosen, students trained."""

import copy
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import nn

from ..datasets import SeededViews
from ..datasets.items import UNLABELED
from ..evaluation import neighbor_agreement
from ..losses import DeepCauchyHashingLoss, MultipleDistillationLosses
from ..models import EmbeddingNetwork, NamedNetwork
from ..utils.distributed import in_first_process
from ..utils.files import write_json
from ..utils.report import write
from . import settings as usual
from .images import Images, ImageSet
from .networks import build_student, find_network
from .report import accuracy
from .settings import LOSSES, Settings, weights_of
from .teaching import GivenTeaching, NetworkTeaching, read_vectors
from .training import Machine, Training, new_metric_loss
from .views import Augmentation, SharedViews

ALONE, DISTILLED = "student without teacher", "distilled student"


class Job:
    """All that one run trains.

    Args:
        out, settings, machine, images: of the run.
        teacher, student: names or networks; no teacher where its embeddings are given.
        vectors: the teacher's embeddings of all images, in place of a teacher; None: those of the settings' file.
        augmentation: from an image to a random view of it; None for the usual one.

    Attributes:
        notes: what was found on the way, a sentence each.
        curves: of the losses and the validation of each network.

    Raises:
        ValueError: a name is unknown, or settings and images do not go together.
    """

    def __init__(
        self,
        out: Path,
        settings: Settings,
        machine: Machine,
        images: Images,
        teacher: str | nn.Module | None,
        student: str | nn.Module,
        vectors: torch.Tensor | None = None,
        augmentation: Callable[[Any], Any] | None = None,
    ):
        self.out, self.settings, self.machine, self.images = out, settings, machine, images
        self.augmentation = Augmentation() if augmentation is None else augmentation
        self.teaching: Any = None
        self.notes, self.curves = [], {}  # type: tuple[list[str], dict[str, list]]
        # The same weights, whatever is done with them.
        torch.manual_seed(settings.seed)
        options = {"pretrained": settings.pretrained, "image_size": settings.image_size}
        self.student = find_network(copied(student), weights=settings.student_weights, **options)
        self.teacher, self.vectors = None, vectors
        if teacher is not None:
            self.teacher = find_network(copied(teacher), weights=settings.teacher_weights, **options)
        elif vectors is None:
            self.vectors = read_vectors(str(settings.teacher_embeddings), images.all)
        train = images["train"]
        self.labeled = train.at((train.labels != UNLABELED).nonzero().flatten().tolist())
        for name in ("bits", "tune_teacher", "baseline"):
            if getattr(settings, name) and not len(self.labeled):
                raise ValueError(f"{usual.flag(name)} needs labels, but the images to train on have none.")
        if settings.tune_teacher and not images["val"].labeled:
            raise ValueError(
                "--tune-teacher needs labels of validation images, to tell whether it helps; there are none."
            )
        # Codes are learned from labels after the teacher's features without.
        self.metric_loss = settings.metric_loss if len(self.labeled) and not settings.bits else "none"
        self.width = self.checked_width()

    def checked_width(self) -> int:
        """Return the width of the student's embeddings, the settings' or the usual one."""
        widest = self.teacher.width if self.teacher is not None else self.vectors.shape[1]  # type: ignore[union-attr]
        width = self.settings.width or min(usual.WIDTH, widest, max(1, len(self.images["train"]) // 2))
        equal = [name for name in self.loss_names() if LOSSES[name][0](width).equal_widths]
        if width > widest and equal:
            raise ValueError(
                f"--width {width} is more than the {widest} numbers of the teacher, and {', '.join(equal)} compares "
                f"equal widths. Give at most {widest}, or other losses, such as --losses rkd_angle."
            )
        return width

    def loss_names(self) -> list[str]:
        """Return the names of the losses to distil with."""
        usually = usual.WITHOUT_LABELS if self.metric_loss == "none" else usual.WITH_LABELS
        return list(weights_of(self.settings.losses) or usually)

    def views(self, images: ImageSet | None = None, **sides: Any) -> SeededViews:
        """Return the augmented views of training images, for ``student=`` or ``teacher=`` with its preprocessing."""
        shown = {"student": None, "teacher": None} | sides
        shared = SharedViews(self.images["train"] if images is None else images, self.augmentation, **shown)
        return SeededViews(shared, self.settings.seed, self.settings.views)

    def teach(self) -> None:
        """Take the teacher, and train it if that is asked for or it knows nothing yet."""
        folder = self.out / "teacher"
        if self.teacher is None:
            vectors: Any = self.vectors
            self.teaching = GivenTeaching(folder, min(self.width, vectors.shape[1]), self.machine, vectors, self.images)
            return
        sees = self.teacher.preprocessing
        width = min(self.width, self.teacher.width)
        self.teaching = NetworkTeaching(folder, width, self.machine, self.teacher, self.views(teacher=sees))
        epochs = self.settings.tune_teacher
        trained = self.settings.pretrained or self.settings.teacher_weights
        if epochs is None:
            epochs = 0 if trained or not self.can_tune() else usual.TUNE_EPOCHS
        if epochs:
            write(f"Tuning the teacher on the labels of {len(self.labeled):,} images.")
            rate = usual.TEACHER_RATE_PRETRAINED if trained else usual.RATE_FROM_SCRATCH
            views = self.views(self.labeled, teacher=sees)
            result = self.teaching.tune(views, epochs, rate, self.settings.seed, self.images["val"])
            self.curves["teacher"] = result["curve"]
            self.tell_tuning("The teacher was", result)

    def standardize(self) -> None:
        """Make the teacher ready to be asked for the views of the training images."""
        tune = self.can_tune() and self.settings.tune_teacher != 0
        result = self.teaching.store(self.images["train"], self.images["val"], tune)
        if result:
            self.tell_tuning("The rotation of the teacher's outputs was", result)

    def can_tune(self) -> bool:
        """Whether there are labels to tune on, two of a class on average, and others to validate on."""
        classes = len(self.labeled.labels.unique())
        return 0 < 2 * classes <= len(self.labeled) and self.images["val"].labeled

    def tell_tuning(self, what: str, result: dict[str, Any]) -> None:
        """Tell whether tuning has helped."""
        before, after = result["before"], result["after"]
        self.note(
            f"{what} tuned on the labels: MAP@R on validation images {before:.3f} before, {after:.3f} after"
            + ("." if after >= before else "; it is used as it was before.")
        )

    def note(self, text: str) -> None:
        """Tell the user, now and in the report."""
        self.notes.append(text)
        write(text)

    def weights(self) -> dict[str, float]:
        """Return the weight of each loss: given, or the best of a few on the validation images; none if 0 is best."""
        given = weights_of(self.settings.losses)
        names = self.loss_names()
        if self.metric_loss == "none":
            return {name: given.get(name) or 1.0 for name in names}
        if any(weight is not None for weight in given.values()) or not self.images["val"].labeled:
            return {name: LOSSES[name][1] if given.get(name) is None else float(given[name] or 0) for name in names}
        path = self.out / "choice.json"
        if not path.exists():
            epochs, tried = max(1, round(usual.SHORT_RUN * self.settings.epochs)), {}
            for factor in usual.FACTORS:
                write(f"Trying {factor:g} times the usual weight of the distillation, for {epochs} epochs.")
                training = self.training(f"choice/{factor:g}", scaled(names, factor), epochs)
                tried[factor] = self.validate(training.finish())
            in_first_process(lambda: write_json(path, list(tried.items())))
        results = json.loads(path.read_text())
        best = max(results, key=lambda result: result[1])[0]
        figures = ", ".join(f"{factor:g} times {value:.3f}" for factor, value in results)
        self.note(
            f"The weight of the distillation by {' and '.join(names)} was chosen on validation images: {best:g} times "
            f"the usual. MAP@R after short runs with {figures}."
        )
        return scaled(names, best)

    def training(self, folder: str, weights: dict[str, float], epochs: int | None = None) -> Training:
        """Return the training of a new student, by these losses and the metric loss."""
        trained = self.settings.pretrained or self.settings.student_weights
        losses = {name: LOSSES[name][0](self.width) for name in weights}
        named = copy.deepcopy(self.student)
        torch.manual_seed(self.settings.seed)
        network = build_student(named, self.width)
        return Training(
            self.out / folder,
            network,
            self.views(student=named.preprocessing),
            self.machine,
            epochs or self.settings.epochs,
            self.settings.lr or (usual.RATE_PRETRAINED if trained else usual.RATE_FROM_SCRATCH),
            self.settings.seed,
            new_metric_loss(self.metric_loss),
            MultipleDistillationLosses(losses, weights) if losses else None,
            teacher=self.teaching.teacher if losses else None,
            validate=self.validate,
            fade=usual.FADE if len(self.labeled) == len(self.images["train"]) else None,
            keep_flops=self.settings.keep_flops if epochs is None else None,
            image_shape=named.preprocessing.image_shape,
        )

    def hashing(self, folder: str, trunk: nn.Module) -> Training:
        """Return the training of a network with a head of so many bits on the labels."""
        torch.manual_seed(self.settings.seed)
        named = NamedNetwork(self.student.name, trunk, self.student.preprocessing, self.student.width)
        return Training(
            self.out / folder,
            build_student(named, self.width, self.settings.bits),
            self.views(self.labeled, student=named.preprocessing),
            self.machine,
            self.settings.epochs,
            self.settings.lr or usual.RATE_HASHING,
            self.settings.seed,
            DeepCauchyHashingLoss(),
            validate=self.validate,
        )

    def students(self) -> dict[str, EmbeddingNetwork]:
        """Return the distilled student, and the one without a teacher if there is to be one."""
        weights, bits = self.weights(), self.settings.bits
        trainings = {}
        if self.settings.baseline or not weights:
            alone = self.hashing("baseline", copy.deepcopy(self.student.network)) if bits else None
            trainings[ALONE] = alone or self.training("baseline", {})
        if weights:
            trainings[DISTILLED] = self.training("student", weights)
        found = {}
        for name, training in trainings.items():
            write(f"Training the {name}.")
            found[name] = training.finish()
            self.curves[name] = training.curve
        if bits:
            write(f"Training codes of {bits} bits.")
            training = self.hashing("hashing", found[DISTILLED].trunk)
            found[DISTILLED], self.curves["codes"] = training.finish(), training.curve
        if not weights:
            self.note(
                "Distillation did not help on the validation images, so that the student is that without teacher."
            )
            found[DISTILLED] = found[ALONE]
        return found

    def validate(self, network: EmbeddingNetwork) -> float:
        """Measure a student on the validation images: MAP@R, or without labels the agreement with the teacher."""
        images = self.images["val"]
        found = self.machine.embed(network, SharedViews(images, None, self.student.preprocessing, None))
        if images.labeled:
            return accuracy(found, images.labels)[usual.METRIC]
        return neighbor_agreement(found, self.teaching.embeddings(images), min(10, len(images) - 1))


def scaled(names: list[str], factor: float) -> dict[str, float]:
    """Return so many times the usual weights, nothing for 0."""
    return {name: factor * LOSSES[name][1] for name in names} if factor else {}


def copied(network: str | nn.Module) -> str | nn.Module:
    """Return a copy of a network that was given, which a run leaves as it is."""
    return network if isinstance(network, str) else copy.deepcopy(network)
