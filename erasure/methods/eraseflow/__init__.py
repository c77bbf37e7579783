"""EraseFlow: trajectories of an anchor become as likely under the concept's prompts."""

from .eraseflow import EraseFlow, EraseFlowConfig

__all__ = ["EraseFlow", "EraseFlowConfig"]
