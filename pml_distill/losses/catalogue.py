from dataclasses import dataclass

EQUAL, MAPS, CLASSES = "equal widths", "feature maps", "labels"
DISTANCE, PAIRS, BOTH = ("distance",), ("pairs",), ("distance", "pairs")


@dataclass(frozen=True)
class CatalogueEntry:
    """What one needs to know of a loss to choose it.

    Args:
        name: name of the class in ``pml_distill.losses``.
        family: ``"pointwise"``, ``"pairwise"`` (distances of pairs), ``"relational"`` (angles, rows of similarities),
            ``"listwise"`` (rankings), ``"gallery"`` (the teacher's batch or queue), ``"logits"`` or ``"feature maps"``.
        needs: what it asks for in addition to embeddings of both sides.
        takes: which of PML's ``"distance"`` and ``"pairs"`` (``indices_tuple``) make a difference.
        aligned: whether a student that reaches zero stands in the teacher's own space, for asymmetric retrieval.
        cost: time in the batch size B, the width D, the gallery's size G, and maps of C channels and H W places.
        source: where it was published.
    """

    name: str
    family: str
    needs: tuple[str, ...]
    takes: tuple[str, ...]
    aligned: bool
    cost: str
    source: str


CATALOGUE = (
    CatalogueEntry("AbsoluteTeacherLoss", "pointwise", (EQUAL,), DISTANCE, True, "B D", "Yu et al. 2019"),
    CatalogueEntry("CosineTeacherLoss", "pointwise", (EQUAL,), (), True, "B D", "Budnik & Avrithis 2021"),
    CatalogueEntry("RegressionTeacherLoss", "pointwise", (EQUAL,), (), True, "B D", "Budnik & Avrithis 2021"),
    # Equal logits leave the embeddings free.
    CatalogueEntry("LogitDistillationLoss", "logits", (EQUAL, "logits"), (), False, "B D", "Hinton et al. 2015"),
    CatalogueEntry("AsymmetricRegressionLoss", "pairwise", (EQUAL,), PAIRS, True, "B² D", "Suma & Tolias 2023"),
    CatalogueEntry("RelativeTeacherLoss", "pairwise", (), BOTH, False, "B² D", "Yu et al. 2019"),
    CatalogueEntry("SimilarityRegressionLoss", "pairwise", (), BOTH, False, "B² D", "Chen et al. 2018"),
    CatalogueEntry("RKDDistanceLoss", "pairwise", (), BOTH, False, "B² D", "Park et al. 2019"),
    CatalogueEntry("CorrelationCongruenceLoss", "pairwise", (), PAIRS, False, "B² D", "Peng et al. 2019"),
    CatalogueEntry("RelaxedContrastiveLoss", "pairwise", (), BOTH, False, "B² D", "Kim et al. 2021"),
    CatalogueEntry("RKDAngleLoss", "relational", (), PAIRS, False, "B³ + B² D", "Park et al. 2019"),
    CatalogueEntry("RKDLoss", "relational", (), BOTH, False, "B³ + B² D", "Park et al. 2019"),
    CatalogueEntry("SimilarityPreservingLoss", "relational", (), PAIRS, False, "B² D", "Tung & Mori 2019"),
    CatalogueEntry("ProbabilisticTransferLoss", "relational", (), PAIRS, False, "B² D", "Passalis & Tefas 2018"),
    CatalogueEntry("DarkRankLoss", "listwise", (), BOTH, False, "B² D + B 2^list_length", "Chen et al. 2018"),
    CatalogueEntry("MutualDistanceLoss", "gallery", (EQUAL,), DISTANCE, True, "B G D", "Xie et al. 2023"),
    CatalogueEntry("RankPreservationLoss", "gallery", (EQUAL,), DISTANCE, True, "B G D + B topk²", "Wu et al. 2023"),
    CatalogueEntry(
        "DecoupledDifferentialLoss", "gallery", (EQUAL,), DISTANCE, True, "B G D + B topk²", "Xie et al. 2024"
    ),
    CatalogueEntry("CollaborativeRankLoss", "gallery", (EQUAL,), DISTANCE, True, "B G D + B topk²", "Xie et al. 2023"),
    # With a second queue, for the student, neither equal widths are needed nor are the spaces aligned.
    CatalogueEntry(
        "SimilarityDistributionLoss", "gallery", (EQUAL, "queue"), (), True, "B G D", "Koohpayegani et al. 2020"
    ),
    CatalogueEntry("HintLoss", MAPS, (MAPS,), (), False, "B C² H W", "Romero et al. 2015"),
    CatalogueEntry("AttentionTransferLoss", MAPS, (MAPS,), (), False, "B C H W", "Zagoruyko & Komodakis 2017"),
    CatalogueEntry("PooledFeatureLoss", MAPS, (MAPS,), (), False, "B C H W", "Xie et al. 2023"),
    CatalogueEntry("VariationalInformationLoss", MAPS, (MAPS,), (), False, "B C² H W", "Ahn et al. 2019"),
    CatalogueEntry("TokenLoss", MAPS, (MAPS,), (), False, "B C² H W", "Ranzinger et al. 2024"),
    CatalogueEntry("UnambiguousGranularityLoss", MAPS, (MAPS, CLASSES), (), False, "B C² H W", "Zhang et al. 2025"),
)


def catalogue() -> list[CatalogueEntry]:
    """Return an entry for every loss of this package that compares embeddings or feature maps, pointwise ones first."""
    return list(CATALOGUE)
