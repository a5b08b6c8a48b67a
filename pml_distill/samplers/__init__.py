"""Samplers for PML's trainers and for ``torch.utils.data.DataLoader``."""

from .distributed_m_per_class_sampler import DistributedMPerClassSampler
from .mixed_sampler import MixedSampler

__all__ = ["DistributedMPerClassSampler", "MixedSampler"]
