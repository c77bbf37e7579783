"""The embedded default: a small trained text-to-image model of a world with ground truth, and its reward model.

Pictures show coloured shapes. The concept to erase is stripes, its harmless neighbour dots. What a picture shows
(``detect``), whether it is what was asked for (``matches``) and how much people like it (``utility``) are public
functions, so every claim about erasing and rewarding can be checked against the truth. See docs/tinyworld.md.
"""

from types import MappingProxyType

from overpaint.checked import check_calls

from .caption import EXPLICIT_ROUTES, IMPLICIT_ROUTES, NEIGHBOUR_ROUTES, CaptionRequest, Request, captions, parse
from .detector import Detection, detect
from .loading import flow_dir, load_flow_policy, load_policy, load_reward, pipeline_dir, reward_dir
from .presets import FLOW_PRESETS, PRESETS, STRIPES
from .render import render
from .scene import IMAGE_SIZE, Scene, SceneTensors, Thing, to_tensors
from .texture import StripeScore, dot_response, stripe_response
from .utility import Utility, concept_shown, matches, neighbour_shown, objects_shown, utility

__all__ = [
    "EXPLICIT_ROUTES",
    "FLOW_PRESETS",
    "IMAGE_SIZE",
    "IMPLICIT_ROUTES",
    "NEIGHBOUR_ROUTES",
    "PRESETS",
    "REWARDS",
    "STRIPES",
    "CaptionRequest",
    "Detection",
    "Request",
    "Scene",
    "SceneTensors",
    "StripeScore",
    "Thing",
    "Utility",
    "captions",
    "concept_shown",
    "detect",
    "dot_response",
    "flow_dir",
    "load_flow_policy",
    "load_policy",
    "load_reward",
    "matches",
    "neighbour_shown",
    "objects_shown",
    "parse",
    "pipeline_dir",
    "render",
    "reward_dir",
    "stripe_response",
    "to_tensors",
    "utility",
]

REWARDS = MappingProxyType(
    {"tiny-image-reward": load_reward, "tinyworld:StripeScore": StripeScore, "tinyworld:Utility": Utility}
)
"""Short names of the tiny world's rewards, for `rewards.reward_named`."""

check_calls(__name__)
