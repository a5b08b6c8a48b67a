"""Distillation for pytorch-metric-learning: ``ref_emb`` is the teacher, row for row.

Subpackages: ``losses``, ``distances``, ``regularizers``, ``miners``, ``samplers``, ``teachers``, ``trainers``,
``testers``, ``evaluation``, ``capacity``, ``datasets``, ``models``, ``recipe``, ``utils``.
"""

__version__ = "0.1.0"
