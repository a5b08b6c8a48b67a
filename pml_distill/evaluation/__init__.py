"""What is searched and measured after training: k-NN on codes, accuracy, agreement with the teacher, cost."""

from ..distances.packed_codes import pack_codes, unpack_codes
from .asymmetric_accuracy import asymmetric_accuracy
from .hamming_knn import HammingKNN
from .hash_accuracy_calculator import HashAccuracyCalculator
from .model_cost import ModelCost, model_cost
from .neighbor_agreement import neighbor_agreement

__all__ = [
    "HammingKNN",
    "HashAccuracyCalculator",
    "ModelCost",
    "asymmetric_accuracy",
    "model_cost",
    "neighbor_agreement",
    "pack_codes",
    "unpack_codes",
]
