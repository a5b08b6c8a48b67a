"""Distillation losses: ``loss(embeddings, labels, ref_emb=teacher_embeddings)``, one class per file."""

from .absolute_teacher_loss import AbsoluteTeacherLoss
from .asymmetric_regression_loss import AsymmetricRegressionLoss
from .attention_transfer_loss import AttentionTransferLoss
from .base_distillation_loss import BaseDistillationLoss
from .base_feature_loss import BaseFeatureLoss
from .base_gallery_loss import BaseGalleryLoss
from .base_hashing_loss import BaseHashingLoss
from .catalogue import CatalogueEntry, catalogue
from .central_similarity_loss import CentralSimilarityLoss
from .collaborative_rank_loss import CollaborativeRankLoss
from .correlation_congruence_loss import CorrelationCongruenceLoss
from .cosine_teacher_loss import CosineTeacherLoss
from .dark_rank_loss import DarkRankLoss
from .decoupled_differential_loss import DecoupledDifferentialLoss
from .deep_cauchy_hashing_loss import DeepCauchyHashingLoss
from .distillation_memory import DistillationMemory
from .dpsh_loss import DPSHLoss
from .greedy_hash_loss import GreedyHashLoss
from .hash_centers import center_distances, hash_centers
from .hash_net_loss import HashNetLoss
from .hint_loss import HintLoss
from .logit_distillation_loss import LogitDistillationLoss
from .matryoshka_loss import MatryoshkaLoss
from .multiple_distillation_losses import MultipleDistillationLosses
from .mutual_distance_loss import MutualDistanceLoss
from .ortho_hash_loss import OrthoHashLoss
from .pooled_feature_loss import PooledFeatureLoss
from .probabilistic_transfer_loss import ProbabilisticTransferLoss
from .rank_preservation_loss import RankPreservationLoss
from .regression_teacher_loss import RegressionTeacherLoss
from .relative_teacher_loss import RelativeTeacherLoss
from .relaxed_contrastive_loss import RelaxedContrastiveLoss
from .rkd_angle_loss import RKDAngleLoss
from .rkd_distance_loss import RKDDistanceLoss
from .rkd_loss import RKDLoss
from .similarity_distribution_loss import SimilarityDistributionLoss
from .similarity_preserving_loss import SimilarityPreservingLoss
from .similarity_regression_loss import SimilarityRegressionLoss
from .teacher_queue import TeacherQueue
from .token_loss import TokenLoss
from .unambiguous_granularity_loss import UnambiguousGranularityLoss
from .variational_information_loss import VariationalInformationLoss

__all__ = [
    "AbsoluteTeacherLoss",
    "AsymmetricRegressionLoss",
    "AttentionTransferLoss",
    "BaseDistillationLoss",
    "BaseFeatureLoss",
    "BaseGalleryLoss",
    "BaseHashingLoss",
    "CatalogueEntry",
    "CentralSimilarityLoss",
    "CollaborativeRankLoss",
    "CorrelationCongruenceLoss",
    "CosineTeacherLoss",
    "DPSHLoss",
    "DarkRankLoss",
    "DecoupledDifferentialLoss",
    "DeepCauchyHashingLoss",
    "DistillationMemory",
    "GreedyHashLoss",
    "HashNetLoss",
    "HintLoss",
    "LogitDistillationLoss",
    "MatryoshkaLoss",
    "MultipleDistillationLosses",
    "MutualDistanceLoss",
    "OrthoHashLoss",
    "PooledFeatureLoss",
    "ProbabilisticTransferLoss",
    "RKDAngleLoss",
    "RKDDistanceLoss",
    "RKDLoss",
    "RankPreservationLoss",
    "RegressionTeacherLoss",
    "RelativeTeacherLoss",
    "RelaxedContrastiveLoss",
    "SimilarityDistributionLoss",
    "SimilarityPreservingLoss",
    "SimilarityRegressionLoss",
    "TeacherQueue",
    "TokenLoss",
    "UnambiguousGranularityLoss",
    "VariationalInformationLoss",
    "catalogue",
    "center_distances",
    "hash_centers",
]
