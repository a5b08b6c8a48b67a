"""What a run is asked to do, and the defaults that experiments on validation classes have found."""

from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from typing import Any

from ..losses import (
    AbsoluteTeacherLoss,
    AsymmetricRegressionLoss,
    BaseDistillationLoss,
    CollaborativeRankLoss,
    CorrelationCongruenceLoss,
    CosineTeacherLoss,
    DarkRankLoss,
    DecoupledDifferentialLoss,
    MutualDistanceLoss,
    ProbabilisticTransferLoss,
    RankPreservationLoss,
    RegressionTeacherLoss,
    RelativeTeacherLoss,
    RelaxedContrastiveLoss,
    RKDAngleLoss,
    RKDDistanceLoss,
    SimilarityDistributionLoss,
    SimilarityPreservingLoss,
    SimilarityRegressionLoss,
    catalogue,
)

# Defaults ---------------------------------------------------------------------------------------------------------
#: Epochs of a student, and of a teacher that starts from random weights and is trained on the labels first.
EPOCHS, TUNE_EPOCHS = 40, 20
#: What is done to the teacher's outputs, and to how many numbers they are reduced at most.
STANDARDIZATION, WIDTH = "whiten", 128
#: How the rotation of the outputs is tuned on labels: steps, samples of each, learning rate.
HEAD_STEPS, HEAD_BATCH, HEAD_RATE = 200, 128, 3e-4
#: The losses to distil with, where there are labels and where there are none.
WITH_LABELS, WITHOUT_LABELS = ("cosine_teacher",), ("cosine_teacher",)
#: Times the weights below: what is tried on the validation images, in runs of this share of the epochs.
FACTORS, SHORT_RUN = (0.0, 0.3, 1.0), 0.25
#: Where all images have labels, the distillation fades out until this share of the training.
FADE = 0.6
#: Learning rates of AdamW: from scratch, from pretrained weights, of a pretrained teacher, of codes.
RATE_FROM_SCRATCH, RATE_PRETRAINED, TEACHER_RATE_PRETRAINED, RATE_HASHING = 6e-3, 5e-4, 1e-4, 1e-3
#: After which share of the training a shrinking student has its final size.
SHRINKING = 0.6
#: Images of a class in a batch.
PER_CLASS = 4
#: What is compared on validation images.
METRIC = "mean_average_precision_at_r"
# ------------------------------------------------------------------------------------------------------------------

Make = Callable[[int], BaseDistillationLoss]
#: By name, how to make a loss for embeddings of a width, and its weight beside MultiSimilarityLoss.
LOSSES: dict[str, tuple[Make, float]] = {
    "soft_dark_rank": (lambda width: DarkRankLoss("soft"), 0.01),
    "hard_dark_rank": (lambda width: DarkRankLoss("hard"), 0.01),
    "similarity_regression": (lambda width: SimilarityRegressionLoss(), 1.0),
    "absolute_teacher": (lambda width: AbsoluteTeacherLoss(), 3.0),
    "relative_teacher": (lambda width: RelativeTeacherLoss(), 1.0),
    "cosine_teacher": (lambda width: CosineTeacherLoss(), 3.0),
    "regression_teacher": (lambda width: RegressionTeacherLoss(), 2.0),
    "asymmetric_regression": (lambda width: AsymmetricRegressionLoss(), 10.0),
    "rkd_distance": (lambda width: RKDDistanceLoss(), 10.0),
    "rkd_angle": (lambda width: RKDAngleLoss(), 10.0),
    "similarity_preserving": (lambda width: SimilarityPreservingLoss(), 20.0),
    "probabilistic_transfer": (lambda width: ProbabilisticTransferLoss(), 15.0),
    "correlation_congruence": (lambda width: CorrelationCongruenceLoss(), 2.0),
    "relaxed_contrastive": (lambda width: RelaxedContrastiveLoss(), 8.0),
    "mutual_distance": (lambda width: MutualDistanceLoss(), 1.5),
    "rank_preservation": (lambda width: RankPreservationLoss(), 0.05),
    "decoupled_differential": (lambda width: DecoupledDifferentialLoss(), 0.05),
    "collaborative_rank": (lambda width: CollaborativeRankLoss(queue_size=1024, width=width), 0.3),
    "compress": (lambda width: SimilarityDistributionLoss(1024, width), 0.2),
    "compress_two_queues": (lambda width: SimilarityDistributionLoss(1024, width, student_width=width), 0.1),
    "contextual_similarity": (
        lambda width: SimilarityDistributionLoss(1024, width, 1.0, 0.01, include_batch=True, topk=128),
        0.3,
    ),
}


@dataclass(frozen=True)
class Settings:
    """What decides the result of a run; a folder holds one run.

    Args:
        teacher: name of the large network, see ``network_by_name``; None where its embeddings are given.
        student: name of the small one.
        teacher_embeddings: the file of given embeddings.
        losses: ``name`` or ``name:weight``; empty for the defaults. Without a weight it is chosen.
        metric_loss: ``"multi_similarity"``, or ``"none"`` to learn from the teacher alone.
        tune_teacher: epochs of training the teacher on the labels. None: the rotation of its outputs alone is tuned, or
            all of it if it starts from random weights; 0: nothing is.
        views: augmented views of each image, of which the teacher's outputs are stored.
        width: of the student's embeddings; None: at most 128.
        epochs, batch_size, seed: of the training.
        lr: highest learning rate; None: by whether the student is pretrained.
        baseline: also train the student without a teacher.
        bits: length of a binary code to learn in the end.
        keep_flops: share of the student's FLOPs to keep.
        int8: also write a quantised ONNX file.
        image_size: side of the images for both networks, in place of their own.
        pretrained: whether the networks start from their pretrained weights.
        teacher_weights, student_weights: files of weights in place of those.
        skip_broken: leave out images that cannot be read.
    """

    teacher: str | None
    student: str
    teacher_embeddings: str | None = None
    losses: tuple[str, ...] = ()
    metric_loss: str = "multi_similarity"
    tune_teacher: int | None = None
    views: int = 4
    width: int | None = None
    epochs: int = EPOCHS
    batch_size: int = 64
    lr: float | None = None
    seed: int = 0
    baseline: bool = False
    bits: int | None = None
    keep_flops: float | None = None
    int8: bool = False
    image_size: int | None = None
    pretrained: bool = True
    teacher_weights: str | None = None
    student_weights: str | None = None
    skip_broken: bool = False

    def __post_init__(self) -> None:
        for name in ("views", "width", "epochs", "batch_size", "bits", "image_size"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise ValueError(f"{flag(name)} must be at least 1, but is {value}.")
        if (self.teacher is None) == (self.teacher_embeddings is None):
            raise ValueError("Give either a teacher or its embeddings (--teacher or --teacher-embeddings).")
        if self.tune_teacher is not None and self.tune_teacher < 0:
            raise ValueError(f"--tune-teacher must be at least 0, but is {self.tune_teacher}.")
        if self.tune_teacher and self.teacher is None:
            raise ValueError("--tune-teacher trains a network, but only embeddings are given; leave it out.")
        if self.metric_loss not in METRIC_LOSSES:
            raise ValueError(f"--metric-loss must be one of {', '.join(METRIC_LOSSES)}, but is {self.metric_loss!r}.")
        if self.keep_flops is not None and not 0 < self.keep_flops < 1:
            raise ValueError(f"--keep-flops must lie between 0 and 1, but is {self.keep_flops}.")
        if self.lr is not None and self.lr <= 0:
            raise ValueError(f"--lr must be positive, but is {self.lr}.")
        weights_of(self.losses)

    def to_dict(self) -> dict[str, Any]:
        """Return all settings, as JSON has them."""
        return {key: list(value) if isinstance(value, tuple) else value for key, value in asdict(self).items()}


def aligned(name: str) -> bool:
    """Whether a student that learns all it can from this loss stands in the teacher's own space."""
    loss = LOSSES[name][0](2)
    entry = next(entry for entry in catalogue() if entry.name == type(loss).__name__)
    # With a queue of the student's own relations alone are compared.
    return entry.aligned and loss.equal_widths


METRIC_LOSSES = ("multi_similarity", "none")


def flag(name: str) -> str:
    """Return the option of a setting."""
    return "--" + name.replace("_", "-")


def weights_of(losses: Sequence[str]) -> dict[str, float | None]:
    """Return the weight of each loss, None where it is to be chosen; ``ValueError`` for unknown names."""
    weights: dict[str, float | None] = {}
    for text in losses:
        name, _, weight = text.partition(":")
        if name not in LOSSES:
            raise ValueError(f"--losses has the unknown name {name!r}; known are {', '.join(sorted(LOSSES))}.")
        try:
            weights[name] = float(weight) if weight else None
        except ValueError:
            raise ValueError(f"--losses has {text!r}, whose weight must be a number, as in {name}:3.") from None
    given = [weight is not None for weight in weights.values()]
    if any(given) and not all(given):
        raise ValueError("--losses must give a weight to all or to none; without, they are chosen together.")
    return weights
