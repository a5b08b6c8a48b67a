"""What a run is asked to do, and the defaults, which experiments on validation classes have found."""

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

from .. import losses as library

#: Epochs of a student, and of a teacher that starts from random weights and is trained on the labels first.
EPOCHS, TUNE_EPOCHS = 40, 20
#: What is done to the teacher's outputs, and to how many numbers they are reduced at most.
STANDARDIZATION, WIDTH = "whiten", 128
#: How the rotation of the outputs is tuned on labels: steps, samples of each, learning rate.
HEAD_STEPS, HEAD_BATCH, HEAD_RATE = 400, 128, 1e-3
#: The losses to distil with unless others are named, and what their weights below are multiplied by: the best of these
#: on the validation images, in runs of this share of the epochs.
DEFAULT_LOSSES, FACTORS, SHORT_RUN = ("cosine_teacher",), (0.0, 1.0), 0.25
#: The distillation beside a metric loss fades out until this share of the training.
FADE = 0.6
#: Learning rates of AdamW: from scratch, from pretrained weights, of a pretrained teacher, of codes.
RATE_FROM_SCRATCH, RATE_PRETRAINED, TEACHER_RATE_PRETRAINED, RATE_HASHING = 5e-3, 5e-4, 1e-4, 1e-3
#: After which share of the training a shrinking student has its final size.
SHRINKING = 0.6
#: Images of a class in a batch, and what is compared on validation images.
PER_CLASS, METRIC = 4, "mean_average_precision_at_r"

METRIC_LOSSES = ("multi_similarity", "none")
#: The usual weight of each loss beside MultiSimilarityLoss.
WEIGHTS = {
    "soft_dark_rank": 0.01,
    "hard_dark_rank": 0.01,
    "similarity_regression": 1.0,
    "absolute_teacher": 3.0,
    "relative_teacher": 1.0,
    "cosine_teacher": 3.0,
    "regression_teacher": 2.0,
    "asymmetric_regression": 10.0,
    "rkd_distance": 10.0,
    "rkd_angle": 10.0,
    "similarity_preserving": 20.0,
    "probabilistic_transfer": 15.0,
    "correlation_congruence": 2.0,
    "relaxed_contrastive": 8.0,
    "mutual_distance": 1.5,
    "rank_preservation": 0.05,
    "decoupled_differential": 0.05,
    "collaborative_rank": 0.3,
    "compress": 0.2,
    "compress_two_queues": 0.1,
    "contextual_similarity": 0.3,
}


def new_loss(name: str, width: int) -> Any:
    """Return a distillation loss by its name, for embeddings of a width."""
    if name.endswith("dark_rank"):
        return library.DarkRankLoss(name.partition("_")[0])
    if name == "collaborative_rank":
        return library.CollaborativeRankLoss(queue_size=1024, width=width)
    if name == "contextual_similarity":
        return library.SimilarityDistributionLoss(1024, width, 1.0, 0.01, include_batch=True, topk=128)
    if name.startswith("compress"):
        return library.SimilarityDistributionLoss(1024, width, student_width=width if "two" in name else None)
    kind = name.replace("_", "") + "loss"
    return getattr(library, next(known for known in library.__all__ if known.lower() == kind))()


@dataclass(frozen=True)
class Settings:
    """What decides the result of a run; a folder holds one run.

    Args:
        teacher: large network: timm/NAME, torchvision/NAME, module:function or the folder of a run
        student: small network, likewise
        teacher_embeddings: file of embeddings in place of a teacher, see read_vectors
        losses: NAME or NAME:WEIGHT to distil with; without weights, these are chosen on validation images
        metric_loss: multi_similarity on the labels, or none
        tune_teacher: epochs of training the teacher on the labels first; 0 to leave it as it is
        views: augmented views of each image, of which the teacher's outputs are stored
        width: of the embeddings (at most 128, if not given)
        epochs: of the student's training
        batch_size: of all processes together
        lr: highest learning rate
        seed: of weights, order and augmentation
        baseline: also train the student without a teacher
        bits: length of a binary code to learn
        keep_flops: share of the student's FLOPs to shrink it to
        int8: also write a quantised ONNX file
        image_size: side of the images, in place of the networks' own
        pretrained: start from pretrained weights
        teacher_weights: file of weights in place of the pretrained ones
        student_weights: file of weights in place of the pretrained ones
        skip_broken: leave out images that cannot be read

    Raises:
        ValueError: a setting is out of range.
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
        least = dict.fromkeys(("views", "width", "epochs", "batch_size", "bits", "image_size"), 1) | {"tune_teacher": 0}
        for name, lowest in least.items():
            value = getattr(self, name)
            if value is not None and value < lowest:
                raise ValueError(f"--{name.replace('_', '-')} must be at least {lowest}, but is {value}.")
        if (self.teacher is None) == (self.teacher_embeddings is None):
            raise ValueError("Give either a teacher or its embeddings (--teacher or --teacher-embeddings).")
        if self.tune_teacher and self.teacher is None:
            raise ValueError("--tune-teacher trains a network, but only embeddings are given; leave it out.")
        if self.metric_loss not in METRIC_LOSSES:
            raise ValueError(f"--metric-loss must be one of {', '.join(METRIC_LOSSES)}, but is {self.metric_loss!r}.")
        if not 0 < (self.keep_flops or 0.5) < 1:
            raise ValueError(f"--keep-flops must lie between 0 and 1, but is {self.keep_flops}.")
        if self.lr is not None and not self.lr > 0:
            raise ValueError(f"--lr must be positive, but is {self.lr}.")
        weights_of(self.losses)

    def to_dict(self) -> dict[str, Any]:
        """Return all settings, as JSON has them."""
        return asdict(self) | {"losses": list(self.losses)}


def weights_of(losses: Sequence[str]) -> dict[str, float | None]:
    """Return the weight of each loss, None where it is to be chosen; ``ValueError`` for what is no such list."""
    weights: dict[str, float | None] = {}
    for text in losses:
        name, _, weight = text.partition(":")
        if name not in WEIGHTS:
            raise ValueError(f"--losses has unknown names {[name]}; known are {sorted(WEIGHTS)}.")
        try:
            weights[name] = float(weight) if weight else None
        except ValueError:
            raise ValueError(f"--losses has {text!r}, whose weight must be a number, as in {name}:3.") from None
    if len({weight is None for weight in weights.values()}) > 1:
        raise ValueError("--losses must give a weight to all or to none; without, they are chosen together.")
    return weights


def aligned(name: str) -> bool:
    """Whether a student that learns all it can from this loss stands in the teacher's own space."""
    loss = new_loss(name, 2)
    entry = next(entry for entry in library.catalogue() if entry.name == type(loss).__name__)
    # With a queue of the student's own, relations alone are compared.
    return entry.aligned and loss.equal_widths
