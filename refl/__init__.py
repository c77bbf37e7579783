"""ReFL: reward feedback learning, a reward backpropagated through one late denoising step."""

from .config import ReFLConfig
from .distance import distance_to_reference
from .graded import graded_images
from .loss import hinge
from .pretraining import PretrainingPairs, pairs_from_folder, pairs_from_policy
from .trainer import ReFLMetrics, ReFLTrainer

__all__ = [
    "PretrainingPairs",
    "ReFLConfig",
    "ReFLMetrics",
    "ReFLTrainer",
    "distance_to_reference",
    "graded_images",
    "hinge",
    "pairs_from_folder",
    "pairs_from_policy",
]
