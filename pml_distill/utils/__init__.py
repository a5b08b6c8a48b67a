"""What a distilled network costs and how near it comes to its teacher."""

from .model_cost import ModelCost, model_cost
from .neighbor_agreement import neighbor_agreement

__all__ = ["ModelCost", "model_cost", "neighbor_agreement"]
