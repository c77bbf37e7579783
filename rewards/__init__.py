"""Rewards: scores of (image, prompt), from ImageReward to a server over HTTP."""

from overpaint.checked import check_calls

from .aesthetic import Aesthetic, AestheticHead
from .alignment import Alignment, AlignmentConfig, Question, ScoredAnswer, StrictAlignment
from .bertscore import BertScore, BertScoreConfig, BertScores
from .blip import BLIPScore, BLIPScoreConfig
from .blip_network import BlipTokenizer
from .clip import CLIPScore, CLIPScoreConfig
from .clip_encoder import ClipEncoder, ClipTokenizer
from .combine import Clipped, Standardised, WeightedSum
from .function import FunctionReward, as_reward
from .hps import HPSv2
from .http_json import HttpConfig, HttpError
from .image_reward import ImageReward, ImageRewardConfig
from .jpeg import Compressibility, Incompressibility
from .measures import DETECTOR_CONCEPTS, SHOWN_FROM, concept_measure
from .named import FACTORIES, reward_named
from .nudity import NudeNet, NudeNetConfig, OpenNSFW
from .pick import PickScore
from .remote import RemoteConfig, RemoteReward
from .types import Reward, RewardLike, ScoresError, scores_of
from .vlm import LocalVLM, LocalVLMConfig, VisionLanguageModel
from .vlm_server import ServedVLM, ServedVLMConfig
from .zero_shot import CLIPZeroShot, CLIPZeroShotConfig

__all__ = [
    "DETECTOR_CONCEPTS",
    "FACTORIES",
    "SHOWN_FROM",
    "Aesthetic",
    "AestheticHead",
    "Alignment",
    "AlignmentConfig",
    "BLIPScore",
    "BLIPScoreConfig",
    "BertScore",
    "BertScoreConfig",
    "BertScores",
    "BlipTokenizer",
    "CLIPScore",
    "CLIPScoreConfig",
    "CLIPZeroShot",
    "CLIPZeroShotConfig",
    "ClipEncoder",
    "ClipTokenizer",
    "Clipped",
    "Compressibility",
    "FunctionReward",
    "HPSv2",
    "HttpConfig",
    "HttpError",
    "ImageReward",
    "ImageRewardConfig",
    "Incompressibility",
    "LocalVLM",
    "LocalVLMConfig",
    "NudeNet",
    "NudeNetConfig",
    "OpenNSFW",
    "PickScore",
    "Question",
    "RemoteConfig",
    "RemoteReward",
    "Reward",
    "RewardLike",
    "ScoredAnswer",
    "ScoresError",
    "ServedVLM",
    "ServedVLMConfig",
    "Standardised",
    "StrictAlignment",
    "VisionLanguageModel",
    "WeightedSum",
    "as_reward",
    "concept_measure",
    "reward_named",
    "scores_of",
]

check_calls(__name__)
