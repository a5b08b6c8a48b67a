"""Networks by name, compact students, and the trunks they are compared with."""

from .by_name import NamedNetwork, network_by_name
from .compact_alexnet_student import CompactAlexNetStudent
from .compact_resnet import CompactResNet
from .embedding_network import EmbeddingNetwork
from .hash_head import HashHead
from .preprocessing import Preprocessing
from .small_resnet import SmallResNet

__all__ = [
    "CompactAlexNetStudent",
    "CompactResNet",
    "EmbeddingNetwork",
    "HashHead",
    "NamedNetwork",
    "Preprocessing",
    "SmallResNet",
    "network_by_name",
]
