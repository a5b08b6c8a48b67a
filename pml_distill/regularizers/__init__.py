"""Regularizers for any PML loss: ``loss(embedding_regularizer=..., embedding_reg_weight=...)``."""

from .quantization_regularizer import QuantizationRegularizer

__all__ = ["QuantizationRegularizer"]
