"""A student that shrinks while it learns: compactors, what drives their rows to zero, and the network that is left."""

from .capacity_dynamics import CapacityDynamics
from .chain import register_block
from .compact_file import load_compact, save_compact
from .compactor import ChannelGate, Compactor, find_compactors, insert_compactors
from .export import export
from .export_meter import ExportMeter
from .gradient_reset import GradientReset
from .group_lasso import add_lasso_gradient, group_lasso, shrink_rows
from .retrieval_reset import RetrievalReset
from .size_budget import SizeBudget

__all__ = [
    "CapacityDynamics",
    "ChannelGate",
    "Compactor",
    "ExportMeter",
    "GradientReset",
    "RetrievalReset",
    "SizeBudget",
    "add_lasso_gradient",
    "export",
    "find_compactors",
    "group_lasso",
    "insert_compactors",
    "load_compact",
    "register_block",
    "save_compact",
    "shrink_rows",
]
