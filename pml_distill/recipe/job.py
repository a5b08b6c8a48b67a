"""The stages of a run: the teacher made ready, the weight of the distillation chosen, students trained."""

import copy
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from pytorch_metric_learning.losses import MultiSimilarityLoss
from torch import nn

from ..datasets import SeededViews
from ..datasets.items import UNLABELED
from ..evaluation import neighbor_agreement
from ..losses import DeepCauchyHashingLoss, MultipleDistillationLosses
from ..models import EmbeddingNetwork, NamedNetwork
from ..trainers import LossWeightRamp
from ..utils.distributed import in_first_process
from ..utils.files import write_json
from ..utils.report import write
from . import settings as usual
from .images import Images, ImageSet
from .networks import build_student, find_network
from .report import accuracy
from .settings import WEIGHTS, Settings, new_loss, weights_of
from .teaching import Teaching, read_vectors
from .training import Machine, Training
from .views import Augmentation, SharedViews

ALONE, DISTILLED = "student without teacher", "distilled student"


class Job:
    """All that one run trains.

    Args:
        out, settings, machine, images: of the run.
        teacher: the large network or its name, or the embeddings of all images; None for those in the settings' file.
        student: the small network or its name.
        augmentation: from an image to a random view of it; None for the usual one.

    Attributes:
        notes: what was found on the way, a sentence each.
        curves: of the losses and the validation of each network.

    Raises:
        ValueError: a name is unknown, or settings and images do not go together.
    """

    #: What is done to the teacher's outputs, and whether their rotation may be tuned.
    standardization, tunes = usual.STANDARDIZATION, True

    def __init__(
        self,
        out: Path,
        settings: Settings,
        machine: Machine,
        images: Images,
        teacher: str | nn.Module | torch.Tensor | None,
        student: str | nn.Module,
        augmentation: Callable[[Any], Any] | None = None,
    ):
        self.out, self.settings, self.machine, self.images = out, settings, machine, images
        self.augmentation = Augmentation() if augmentation is None else augmentation
        self.notes, self.curves = [], {}  # type: tuple[list[str], dict[str, list]]
        train, val = images["train"], images["val"]
        self.labeled = train.at((train.labels != UNLABELED).nonzero().flatten().tolist())
        for name in ("bits", "tune_teacher", "baseline"):
            if getattr(settings, name) and not len(self.labeled):
                raise ValueError(f"--{name.replace('_', '-')} needs labels, but the images to train on have none.")
        if settings.tune_teacher and not val.labeled:
            raise ValueError(
                "--tune-teacher needs labels of validation images, to tell whether it helps; there are none."
            )
        # With one label of a class or none, the teacher knows better to the end.
        self.few_labels = len(self.labeled) < 2 * len(self.labeled.labels.unique()) or not len(self.labeled)
        self.can_tune = val.labeled and not self.few_labels
        # A code is learned from labels, after the teacher's features without.
        self.metric_loss = settings.metric_loss != "none" and settings.bits is None and len(self.labeled) > 0

        torch.manual_seed(settings.seed)
        options = {"pretrained": settings.pretrained, "image_size": settings.image_size}
        self.student = find_network(copied(student), weights=settings.student_weights, **options)
        source: Any = read_vectors(str(settings.teacher_embeddings), images.all) if teacher is None else teacher
        if not isinstance(source, torch.Tensor):
            source = find_network(copied(source), weights=settings.teacher_weights, **options)
        self.teacher: NamedNetwork | torch.Tensor = source
        self.teaching = Teaching(out / "teacher", machine, images, source)
        self.widest = source.shape[1] if isinstance(source, torch.Tensor) else source.width
        self.width = settings.width or min(usual.WIDTH, self.widest, max(1, len(train) // 2))
        equal = [name for name in self.loss_names() if new_loss(name, self.width).equal_widths]
        if self.width > self.widest and equal:
            raise ValueError(
                f"--width {self.width} is more than the {self.widest} numbers of the teacher, and {', '.join(equal)} "
                f"compares equal widths. Give at most {self.widest}, or other losses, such as --losses rkd_angle."
            )

    def loss_names(self) -> list[str]:
        """Return the names of the losses to distil with."""
        return list(weights_of(self.settings.losses) or usual.DEFAULT_LOSSES)

    def views(self, images: ImageSet | None = None, **sides: Any) -> SeededViews:
        """Return the augmented views of training images, for ``student=`` or ``teacher=`` with its preprocessing."""
        shown = {"student": None, "teacher": None} | sides
        shared = SharedViews(self.images["train"] if images is None else images, self.augmentation, **shown)
        return SeededViews(shared, self.settings.seed, self.settings.views)

    def note(self, text: str) -> None:
        """Tell the user, now and in the report."""
        self.notes.append(text)
        write(text)

    def teach(self) -> None:
        """Train the teacher if that is asked for or it knows nothing yet, and make it ready to be asked."""
        epochs, sees = self.settings.tune_teacher, self.student.preprocessing
        if isinstance(self.teacher, NamedNetwork):
            sees = self.teacher.preprocessing
            trained = self.settings.pretrained or self.settings.teacher_weights
            if epochs is None and self.can_tune and not trained:
                epochs = usual.TUNE_EPOCHS
            if epochs:
                write(f"Tuning the teacher on the labels of {len(self.labeled):,} images.")
                rate = usual.TEACHER_RATE_PRETRAINED if trained else usual.RATE_FROM_SCRATCH
                views = self.views(self.labeled, teacher=sees)
                result, self.curves["teacher"] = self.teaching.train(views, epochs, rate, self.settings.seed)
                self.tell_tuning("The teacher", result)
        tune, width = self.can_tune and epochs != 0, min(self.width, self.widest)
        result = self.teaching.standardize(width, self.views(teacher=sees), tune and self.tunes, self.standardization)
        if result:
            self.tell_tuning("The rotation of the teacher's outputs", result)

    def tell_tuning(self, what: str, result: dict[str, float]) -> None:
        """Tell whether tuning has helped."""
        before, after = result["before"], result["after"]
        kept = "" if after >= before else "; what was before is used"
        self.note(
            f"{what} was tuned on labels: MAP@R on validation images {before:.3f} before, {after:.3f} after{kept}."
        )

    def weights(self) -> dict[str, float]:
        """Return the weight of each loss: given, or the best of a few on the validation images; none if 0 is best."""
        given, names = weights_of(self.settings.losses), self.loss_names()
        if not self.metric_loss:
            return {name: given.get(name) or 1.0 for name in names}
        if None not in given.values() and given or not self.images["val"].labeled:
            return {name: WEIGHTS[name] if given.get(name) is None else float(given[name] or 0) for name in names}
        path = self.out / "choice.json"
        if not path.exists():
            epochs, tried = max(1, round(usual.SHORT_RUN * self.settings.epochs)), []
            for factor in usual.FACTORS:
                write(f"Trying {factor:g} times the usual weight of the distillation, for {epochs} epochs.")
                training = self.training(f"choice/{factor:g}", scaled(names, factor), epochs)
                tried.append((factor, self.validate(training.finish())))
            in_first_process(lambda: write_json(path, tried))
        results = json.loads(path.read_text(encoding="utf-8"))
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
        losses = {name: new_loss(name, self.width) for name in weights}
        beside_labels = bool(losses) and self.metric_loss and not self.few_labels
        torch.manual_seed(self.settings.seed)
        return Training(
            self.out / folder,
            build_student(copy.deepcopy(self.student), self.width),
            self.views(student=self.student.preprocessing),
            self.machine,
            epochs or self.settings.epochs,
            self.settings.lr or (usual.RATE_PRETRAINED if trained else usual.RATE_FROM_SCRATCH),
            self.settings.seed,
            MultiSimilarityLoss() if self.metric_loss else None,
            MultipleDistillationLosses(losses, weights) if losses else None,
            teacher=self.teaching.teacher if losses else None,
            projection=nn.Linear(self.width, self.width) if beside_labels else None,
            # The teacher comes first, the labels have the last word.
            ramp=LossWeightRamp(0, usual.FADE, 1, 0) if beside_labels else None,
            validate=self.validate,
            keep_flops=self.settings.keep_flops if epochs is None else None,
            image_shape=self.student.preprocessing.image_shape,
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

    def students(self) -> tuple[dict[str, EmbeddingNetwork], str]:
        """Return the students by name, and which of them is to be deployed: the better one on validation images."""
        weights, bits, found = self.weights(), self.settings.bits, {}

        def finish(name: str, training: Training) -> None:
            write(f"Training the {name}.")
            found[name] = training.finish()
            self.curves[name] = training.curve

        if self.settings.baseline or not weights:
            trunk = copy.deepcopy(self.student.network)
            finish(ALONE, self.hashing("baseline", trunk) if bits else self.training("baseline", {}))
        if weights:
            finish(DISTILLED, self.training("student", weights))
        if bits:
            finish(DISTILLED, self.hashing("hashing", found[DISTILLED].trunk))
        best = DISTILLED if weights else ALONE
        if len(found) == 2 and self.images["val"].labeled:
            figures = {name: self.validate(found[name]) for name in (DISTILLED, ALONE)}
            best = max(figures, key=lambda name: figures[name])
            shown = " and ".join(f"{value:.3f} by the {name}" for name, value in figures.items())
            self.note(f"MAP@R on validation images is {shown}.")
        self.note(f"The student to deploy is the {best}.")
        return found, best

    def validate(self, network: EmbeddingNetwork) -> float:
        """Measure a student on the validation images: MAP@R, or without labels the agreement with the teacher."""
        images = self.images["val"]
        found = self.machine.embed(network, SharedViews(images, None, self.student.preprocessing, None))
        if images.labeled:
            return accuracy(found, images.labels)[usual.METRIC]
        return neighbor_agreement(found, self.teaching.embeddings(images), min(10, len(images) - 1))


def scaled(names: list[str], factor: float) -> dict[str, float]:
    """Return so many times the usual weights, nothing for 0."""
    return {name: factor * WEIGHTS[name] for name in names} if factor else {}


def copied(network: str | nn.Module) -> str | nn.Module:
    """Return a copy of a network that was given, which a run leaves as it is."""
    return network if isinstance(network, str) else copy.deepcopy(network)
