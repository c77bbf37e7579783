"""ReFL: reward feedback learning, a reward backpropagated through one late denoising step."""

from overpaint.checked import check_calls

from .config import ReFLConfig
from .distance import distance_to_reference
from .loss import hinge
from .one_step import one_step_images
from .pretraining import PretrainingPairs, pairs_from_folder, pairs_from_policy
from .trainer import ReFLMetrics, ReFLTrainer

__all__ = [
    "PretrainingPairs",
    "ReFLConfig",
    "ReFLMetrics",
    "ReFLTrainer",
    "distance_to_reference",
    "hinge",
    "one_step_images",
    "pairs_from_folder",
    "pairs_from_policy",
]

check_calls(__name__)
