"""Distillation losses: ``loss(embeddings, labels, ref_emb=teacher_embeddings)``, one class per file."""

from .absolute_teacher_loss import AbsoluteTeacherLoss as AbsoluteTeacherLoss
from .asymmetric_regression_loss import AsymmetricRegressionLoss as AsymmetricRegressionLoss
from .attention_transfer_loss import AttentionTransferLoss as AttentionTransferLoss
from .base_distillation_loss import BaseDistillationLoss as BaseDistillationLoss
from .base_feature_loss import BaseFeatureLoss as BaseFeatureLoss
from .base_gallery_loss import BaseGalleryLoss as BaseGalleryLoss
from .base_hashing_loss import BaseHashingLoss as BaseHashingLoss
from .catalogue import CatalogueEntry as CatalogueEntry
from .catalogue import catalogue as catalogue
from .central_similarity_loss import CentralSimilarityLoss as CentralSimilarityLoss
from .collaborative_rank_loss import CollaborativeRankLoss as CollaborativeRankLoss
from .correlation_congruence_loss import CorrelationCongruenceLoss as CorrelationCongruenceLoss
from .cosine_teacher_loss import CosineTeacherLoss as CosineTeacherLoss
from .dark_rank_loss import DarkRankLoss as DarkRankLoss
from .decoupled_differential_loss import DecoupledDifferentialLoss as DecoupledDifferentialLoss
from .deep_cauchy_hashing_loss import DeepCauchyHashingLoss as DeepCauchyHashingLoss
from .distillation_memory import DistillationMemory as DistillationMemory
from .dpsh_loss import DPSHLoss as DPSHLoss
from .greedy_hash_loss import GreedyHashLoss as GreedyHashLoss
from .hash_centers import center_distances as center_distances
from .hash_centers import hash_centers as hash_centers
from .hash_net_loss import HashNetLoss as HashNetLoss
from .hint_loss import HintLoss as HintLoss
from .logit_distillation_loss import LogitDistillationLoss as LogitDistillationLoss
from .matryoshka_loss import MatryoshkaLoss as MatryoshkaLoss
from .multiple_distillation_losses import MultipleDistillationLosses as MultipleDistillationLosses
from .mutual_distance_loss import MutualDistanceLoss as MutualDistanceLoss
from .ortho_hash_loss import OrthoHashLoss as OrthoHashLoss
from .pooled_feature_loss import PooledFeatureLoss as PooledFeatureLoss
from .probabilistic_transfer_loss import ProbabilisticTransferLoss as ProbabilisticTransferLoss
from .rank_preservation_loss import RankPreservationLoss as RankPreservationLoss
from .regression_teacher_loss import RegressionTeacherLoss as RegressionTeacherLoss
from .relative_teacher_loss import RelativeTeacherLoss as RelativeTeacherLoss
from .relaxed_contrastive_loss import RelaxedContrastiveLoss as RelaxedContrastiveLoss
from .rkd_angle_loss import RKDAngleLoss as RKDAngleLoss
from .rkd_distance_loss import RKDDistanceLoss as RKDDistanceLoss
from .rkd_loss import RKDLoss as RKDLoss
from .similarity_distribution_loss import SimilarityDistributionLoss as SimilarityDistributionLoss
from .similarity_preserving_loss import SimilarityPreservingLoss as SimilarityPreservingLoss
from .similarity_regression_loss import SimilarityRegressionLoss as SimilarityRegressionLoss
from .teacher_queue import TeacherQueue as TeacherQueue
from .token_loss import TokenLoss as TokenLoss
from .unambiguous_granularity_loss import UnambiguousGranularityLoss as UnambiguousGranularityLoss
from .variational_information_loss import VariationalInformationLoss as VariationalInformationLoss

__all__ = [name for name, member in globals().items() if callable(member) and not name.startswith("_")]
