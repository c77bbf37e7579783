"""ANT: the objective, and the saliency mask."""

from .ant import ANT, ANTConfig
from .saliency import SaliencyConfig

__all__ = ["ANT", "ANTConfig", "SaliencyConfig"]
