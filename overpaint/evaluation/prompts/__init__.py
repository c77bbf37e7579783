"""Prompts: sets by name or from a file, prompts by kind, and the animals of DDPO's tasks."""

from overpaint.evaluation.images.plan import Prompt

from .animals import (
    ACTIVITIES,
    COMMON_ANIMALS,
    IMAGENET_CLASSES,
    activity_splits,
    animal_activities,
    common_animals,
    imagenet_animals,
    splits,
)
from .kinds import concept_prompts, is_style, nudity_prompts, prompts_of_concept, read_prompt_kinds
from .sets import BY_HAND, FETCHED, IMAGE_REWARD_TEST, NAMES, TINY_KINDS, PromptSet, evenly, prompt_set

__all__ = [
    "ACTIVITIES",
    "BY_HAND",
    "COMMON_ANIMALS",
    "FETCHED",
    "IMAGENET_CLASSES",
    "IMAGE_REWARD_TEST",
    "NAMES",
    "TINY_KINDS",
    "Prompt",
    "PromptSet",
    "activity_splits",
    "animal_activities",
    "common_animals",
    "concept_prompts",
    "evenly",
    "imagenet_animals",
    "is_style",
    "nudity_prompts",
    "prompt_set",
    "prompts_of_concept",
    "read_prompt_kinds",
    "splits",
]
