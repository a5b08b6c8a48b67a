"""Miners that choose pairs and triplets by the teacher: ``miner(embeddings, labels, ref_emb=teacher_embeddings)``."""

from .base_teacher_miner import BaseTeacherMiner
from .teacher_miner import TeacherMiner
from .teacher_neighbor_miner import TeacherNeighborMiner
from .teacher_rank_miner import TeacherRankMiner

__all__ = ["BaseTeacherMiner", "TeacherMiner", "TeacherNeighborMiner", "TeacherRankMiner"]
