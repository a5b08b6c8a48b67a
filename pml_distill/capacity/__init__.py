"""A student that shrinks while it learns: compactors, and the small network that they leave."""

from .compactor import Compactor, find_compactors, insert_compactors, register_block

__all__ = ["Compactor", "find_compactors", "insert_compactors", "register_block"]
