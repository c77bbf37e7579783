"""How an image is drawn: prompt encoding, sampling, log-probability, trainable weights, saving."""

from overpaint.checked import check_calls

from .conditioning import Conditioning
from .ddim import (
    PredictionType,
    add_noise,
    ddim_mean_and_std,
    gaussian_log_prob,
    predict_clean,
    predict_epsilon,
    prediction_target,
    schedule,
)
from .diffusion_policy import DiffusionPolicy
from .guidance import ClassifierFree, Guidance, SamplingGuard, StepContext, TrueGuidance
from .loading import check_checkpoint
from .noise import SampleNoise
from .prompts import TruncatedPromptWarning
from .trajectory import Trajectory
from .types import Embeddings, Images, Latents, PerSample, Plan
from .weights import PARAMETER_SETS, LoRAConfig, WeightDelta, merged_state, select_parameters

__all__ = [
    "PARAMETER_SETS",
    "ClassifierFree",
    "Conditioning",
    "DiffusionPolicy",
    "Embeddings",
    "Guidance",
    "Images",
    "Latents",
    "LoRAConfig",
    "PerSample",
    "Plan",
    "PredictionType",
    "SampleNoise",
    "SamplingGuard",
    "StepContext",
    "Trajectory",
    "TrueGuidance",
    "TruncatedPromptWarning",
    "WeightDelta",
    "add_noise",
    "check_checkpoint",
    "ddim_mean_and_std",
    "gaussian_log_prob",
    "merged_state",
    "predict_clean",
    "predict_epsilon",
    "prediction_target",
    "schedule",
    "select_parameters",
]

check_calls(__name__)
