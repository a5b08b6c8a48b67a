from dataclasses import dataclass
from typing import Any

EQUAL, MAPS, CLASSES = "equal widths", "feature maps", "labels"
DISTANCE, PAIRS, BOTH = ("distance",), ("pairs",), ("distance", "pairs")


@dataclass(frozen=True)
class CatalogueEntry:
    """What one needs to know of a loss to choose it.

    ``family`` is ``"pointwise"``, ``"pairwise"`` (distances of pairs), ``"relational"`` (angles, rows of similarities),
    ``"listwise"`` (rankings), ``"gallery"`` (the teacher's batch or queue), ``"logits"`` or ``"feature maps"``.
    ``needs`` are asked for beside embeddings, and of PML's ``"distance"`` and ``"pairs"`` ``takes`` make a difference.
    In the space of an ``aligned`` loss student and teacher compare, for asymmetric retrieval. ``cost`` is time in the
    batch size B, the width D, the gallery's size G, and maps of C channels and H W places.
    """

    name: str
    family: str
    needs: tuple[str, ...]
    takes: tuple[str, ...]
    aligned: bool
    cost: str
    source: str


ROWS: tuple[tuple[Any, ...], ...] = (
    ("AbsoluteTeacherLoss", "pointwise", (EQUAL,), DISTANCE, True, "B D", "Yu et al. 2019"),
    ("CosineTeacherLoss", "pointwise", (EQUAL,), (), True, "B D", "Budnik & Avrithis 2021"),
    ("RegressionTeacherLoss", "pointwise", (EQUAL,), (), True, "B D", "Budnik & Avrithis 2021"),
    # Equal logits leave the embeddings free.
    ("LogitDistillationLoss", "logits", (EQUAL, "logits"), (), False, "B D", "Hinton et al. 2015"),
    ("AsymmetricRegressionLoss", "pairwise", (EQUAL,), PAIRS, True, "B² D", "Suma & Tolias 2023"),
    ("RelativeTeacherLoss", "pairwise", (), BOTH, False, "B² D", "Yu et al. 2019"),
    ("SimilarityRegressionLoss", "pairwise", (), BOTH, False, "B² D", "Chen et al. 2018"),
    ("RKDDistanceLoss", "pairwise", (), BOTH, False, "B² D", "Park et al. 2019"),
    ("CorrelationCongruenceLoss", "pairwise", (), PAIRS, False, "B² D", "Peng et al. 2019"),
    ("RelaxedContrastiveLoss", "pairwise", (), BOTH, False, "B² D", "Kim et al. 2021"),
    ("RKDAngleLoss", "relational", (), PAIRS, False, "B³ + B² D", "Park et al. 2019"),
    ("RKDLoss", "relational", (), BOTH, False, "B³ + B² D", "Park et al. 2019"),
    ("SimilarityPreservingLoss", "relational", (), PAIRS, False, "B² D", "Tung & Mori 2019"),
    ("ProbabilisticTransferLoss", "relational", (), PAIRS, False, "B² D", "Passalis & Tefas 2018"),
    ("DarkRankLoss", "listwise", (), BOTH, False, "B² D + B 2^list_length", "Chen et al. 2018"),
    ("MutualDistanceLoss", "gallery", (EQUAL,), DISTANCE, True, "B G D", "Xie et al. 2023"),
    ("RankPreservationLoss", "gallery", (EQUAL,), DISTANCE, True, "B G D + B topk²", "Wu et al. 2023"),
    ("DecoupledDifferentialLoss", "gallery", (EQUAL,), DISTANCE, True, "B G D + B topk²", "Xie et al. 2024"),
    ("CollaborativeRankLoss", "gallery", (EQUAL,), DISTANCE, True, "B G D + B topk²", "Xie et al. 2023"),
    # With a second queue, for the student, neither equal widths are needed nor are the spaces aligned.
    ("SimilarityDistributionLoss", "gallery", (EQUAL, "queue"), (), True, "B G D", "Koohpayegani et al. 2020"),
    ("HintLoss", MAPS, (MAPS,), (), False, "B C² H W", "Romero et al. 2015"),
    ("AttentionTransferLoss", MAPS, (MAPS,), (), False, "B C H W", "Zagoruyko & Komodakis 2017"),
    ("PooledFeatureLoss", MAPS, (MAPS,), (), False, "B C H W", "Xie et al. 2023"),
    ("VariationalInformationLoss", MAPS, (MAPS,), (), False, "B C² H W", "Ahn et al. 2019"),
    ("TokenLoss", MAPS, (MAPS,), (), False, "B C² H W", "Ranzinger et al. 2024"),
    ("UnambiguousGranularityLoss", MAPS, (MAPS, CLASSES), (), False, "B C² H W", "Zhang et al. 2025"),
)


def catalogue() -> list[CatalogueEntry]:
    """Return an entry for every loss of this package that compares embeddings or feature maps, pointwise ones first."""
    return [CatalogueEntry(*row) for row in ROWS]
