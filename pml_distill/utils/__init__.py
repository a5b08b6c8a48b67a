"""What a distilled network costs and how near it comes to its teacher."""

from typing import TYPE_CHECKING, Any

from .asymmetric_accuracy import asymmetric_accuracy
from .feature_tap import FeatureTap
from .hamming_knn import HammingKNN
from .model_cost import ModelCost, model_cost
from .neighbor_agreement import neighbor_agreement

if TYPE_CHECKING:
    from .hash_accuracy_calculator import HashAccuracyCalculator

__all__ = [
    "FeatureTap",
    "HammingKNN",
    "HashAccuracyCalculator",
    "ModelCost",
    "asymmetric_accuracy",
    "model_cost",
    "neighbor_agreement",
]


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})


def __getattr__(name: str) -> Any:
    # PML's accuracy calculator imports scikit-learn, which costs more than all that trainers and teachers need.
    if name == "HashAccuracyCalculator":
        from .hash_accuracy_calculator import HashAccuracyCalculator

        return HashAccuracyCalculator
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
