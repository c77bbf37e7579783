"""Selective amnesia: the objective, and Fisher information."""

from .fisher import FisherConfig
from .sa import EVERYDAY, SA, SAConfig

__all__ = ["EVERYDAY", "SA", "FisherConfig", "SAConfig"]
