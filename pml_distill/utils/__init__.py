"""What a distilled network costs and how near it comes to its teacher."""

from .asymmetric_accuracy import asymmetric_accuracy
from .feature_tap import FeatureTap
from .hamming_knn import HammingKNN
from .hash_accuracy_calculator import HashAccuracyCalculator
from .model_cost import ModelCost, model_cost
from .neighbor_agreement import neighbor_agreement

__all__ = [
    "FeatureTap",
    "HammingKNN",
    "HashAccuracyCalculator",
    "ModelCost",
    "asymmetric_accuracy",
    "model_cost",
    "neighbor_agreement",
]
