"""DDPO: policy gradients over whole denoising trajectories; reward-weighted regression and DiffusionNFT beside them."""

from overpaint.checked import check_calls

from .advantage import PromptStatistics, centred_advantages, group_advantages, round_advantages
from .config import DDPOConfig
from .critic import CriticConfig, generalised_advantages
from .loss import clipped_surrogate, score_function
from .nft import NFTConfig, NFTMetrics, NFTTrainer
from .nft_loss import nft_loss
from .rwr import RWRConfig, RWRMetrics, RWRTrainer
from .scoring import RewardError, ScoringConfig
from .trainer import DDPOMetrics, DDPOTrainer
from .weighting import softmax_weights, sparse_weights

__all__ = [
    "CriticConfig",
    "DDPOConfig",
    "DDPOMetrics",
    "DDPOTrainer",
    "NFTConfig",
    "NFTMetrics",
    "NFTTrainer",
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
    "nft_loss",
    "round_advantages",
    "score_function",
    "softmax_weights",
    "sparse_weights",
]

check_calls(__name__)
