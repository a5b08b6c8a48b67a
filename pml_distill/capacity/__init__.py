"""A student that shrinks while it learns: compactors, and the small network that they leave."""

from .compact_file import load_compact, save_compact
from .compactor import Compactor, find_compactors, insert_compactors, register_block
from .export import export
from .export_meter import ExportMeter

__all__ = [
    "Compactor",
    "ExportMeter",
    "export",
    "find_compactors",
    "insert_compactors",
    "load_compact",
    "register_block",
    "save_compact",
]
