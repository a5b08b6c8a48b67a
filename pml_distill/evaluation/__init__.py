"""What is searched and measured after training: k-NN on codes, accuracy, agreement with the teacher, cost."""

from ..distances.packed_codes import pack_codes, unpack_codes
from .accuracy_by_width import accuracy_by_width
from .asymmetric_accuracy import asymmetric_accuracy
from .bootstrap import bootstrap_interval
from .code_statistics import CodeStatistics, code_statistics
from .compare import Comparison, compare
from .hamming_knn import HammingKNN
from .hash_accuracy_calculator import HashAccuracyCalculator
from .model_cost import ModelCost, model_cost
from .neighbor_agreement import neighbor_agreement
from .quantize import quantize
from .quantized_knn import QuantizedKNN
from .reid_accuracy import reid_accuracy
from .retrieval_metrics import retrieval_accuracy, retrieval_values

__all__ = [
    "CodeStatistics",
    "Comparison",
    "HammingKNN",
    "HashAccuracyCalculator",
    "ModelCost",
    "QuantizedKNN",
    "accuracy_by_width",
    "asymmetric_accuracy",
    "bootstrap_interval",
    "code_statistics",
    "compare",
    "model_cost",
    "neighbor_agreement",
    "pack_codes",
    "quantize",
    "reid_accuracy",
    "retrieval_accuracy",
    "retrieval_values",
    "unpack_codes",
]
