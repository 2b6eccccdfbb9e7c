"""Importing this package registers its stages."""

from . import compensation, order, preset, reuse, selection

__all__ = ["compensation", "order", "preset", "reuse", "selection"]
