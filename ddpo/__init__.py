"""DDPO: policy gradients over whole denoising trajectories, and reward-weighted regression beside them."""

from .advantage import PromptStatistics, centred_advantages, group_advantages, round_advantages
from .config import DDPOConfig
from .critic import CriticConfig, generalised_advantages
from .loss import clipped_surrogate, score_function
from .rwr import RWRConfig, RWRMetrics, RWRTrainer
from .scoring import RewardError, ScoringConfig
from .trainer import DDPOMetrics, DDPOTrainer
from .weighting import softmax_weights, sparse_weights

__all__ = [
    "CriticConfig",
    "DDPOConfig",
    "DDPOMetrics",
    "DDPOTrainer",
    "PromptStatistics",
    "RWRConfig",
    "RWRMetrics",
    "RWRTrainer",
    "RewardError",
    "ScoringConfig",
    "centred_advantages",
    "clipped_surrogate",
    "generalised_advantages",
    "group_advantages",
    "round_advantages",
    "score_function",
    "softmax_weights",
    "sparse_weights",
]
