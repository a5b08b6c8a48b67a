"""Distillation for pytorch-metric-learning: ``ref_emb`` is the teacher, row for row.

Subpackages: ``losses``, ``teachers``, ``trainers``, ``datasets``, ``utils``.
"""

__version__ = "0.1.0"
