"""Receler: the objective, and the erasers that it trains."""

from .erasers import AddedNetworks, Eraser
from .receler import Receler, RecelerConfig

__all__ = ["AddedNetworks", "Eraser", "Receler", "RecelerConfig"]
