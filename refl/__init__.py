"""ReFL: reward feedback learning, a reward backpropagated through one late denoising step."""

from .config import ReFLConfig
from .graded import graded_images
from .held_out import HeldOut, HeldOutWatch
from .loss import hinge
from .pretraining import PretrainingPairs, pairs_from_folder, pairs_from_policy
from .trainer import ReFLMetrics, ReFLTrainer

__all__ = [
    "HeldOut",
    "HeldOutWatch",
    "PretrainingPairs",
    "ReFLConfig",
    "ReFLMetrics",
    "ReFLTrainer",
    "graded_images",
    "hinge",
    "pairs_from_folder",
    "pairs_from_policy",
]
