"""What DDPO is asked to do: a reward, prompts to train on, and prompts that tell how far it carries.

The four tasks of Black et al. (2023), https://arxiv.org/abs/2305.13301, section 5, and those of the tiny world.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from overpaint.evaluation.prompts.prompts_animals import (
    activity_splits,
    animal_activities,
    common_animals,
    imagenet_animals,
    splits,
)
from rewards import Aesthetic, Alignment, Compressibility, ImageReward, Incompressibility, Reward, WeightedSum

TaskName = Literal["image-reward", "compressibility", "incompressibility", "aesthetic", "alignment", "no-stripes"]
"""Aesthetics and alignment are of the real models, the absence of stripes of the tiny world, the rest of both."""


@dataclass(frozen=True, kw_only=True)
class Task:
    """A reward, and what it is raised on."""

    name: str
    reward: Reward
    """What is raised."""
    prompts: Sequence[str]
    """What the policy is trained on."""
    splits: Mapping[str, Sequence[str]]
    """Prompts that are looked at before and after, by how far they are from those."""
    held_out_prompts: Sequence[str]
    """What it is watched on while it trains."""
    held_out: Reward
    """What it is watched by: the truth where there is one, or else the reward itself."""


def tiny_task(name: TaskName, *, count: int = 200, watched: int = 96, seed: int = 0) -> Task:
    """Returns a task of the tiny world; held-out pairs of colour and shape tell how far it carries.

    Args:
        name: Any but aesthetics and alignment.
        count: Prompts of each split.
        watched: Prompts that the policy is watched on.
        seed: Chooses the captions.

    Raises:
        ValueError: The task is not one of the tiny world's.
    """
    from overpaint import tinyworld

    rewards: dict[str, Callable[[], Reward]] = {
        "image-reward": tinyworld.load_reward,
        "compressibility": Compressibility,
        "incompressibility": Incompressibility,
        "no-stripes": lambda: WeightedSum([tinyworld.StripeScore()], [-1.0]),
    }
    if name not in rewards:
        raise ValueError(f"task must be one of {tuple(rewards)} in the tiny world, got {name!r}")
    if name == "no-stripes":
        kinds = {"trained": "explicit", "implicit": "implicit", "benign": "benign"}
    else:
        kinds = {"trained": "train", "unseen-pairs": "held_out"}
    return Task(
        name=name,
        reward=rewards[name](),
        prompts=tinyworld.captions(kinds["trained"], 1000, seed + 300),
        splits={split: tinyworld.captions(kind, count, seed + 100) for split, kind in kinds.items()},
        held_out_prompts=tinyworld.captions("explicit" if name == "no-stripes" else "held_out", watched, seed + 200),
        held_out=tinyworld.Utility(),
    )


def animal_task(name: TaskName, reward: Reward | None = None, *, count: int = 64, folder: Path | None = None) -> Task:
    """Returns a task of the paper, on animals.

    Args:
        name: Any but the tiny world's own.
        reward: What is raised; by default that of the task, whose networks are fetched where they are not cached.
        count: Prompts of each split.
        folder: Where the lists of animals lie; they are fetched if it is not given.

    Raises:
        ValueError: The task is unknown.
    """
    trained: dict[str, Callable[[Path | None], list[str]]] = {
        "compressibility": imagenet_animals,
        "incompressibility": imagenet_animals,
        "aesthetic": common_animals,
        "alignment": animal_activities,
        "image-reward": common_animals,
    }
    if name not in trained:
        raise ValueError(f"task must be one of {tuple(trained)} for a Stable Diffusion, got {name!r}")
    own: dict[str, Callable[[], Reward]] = {
        "compressibility": Compressibility,
        "incompressibility": Incompressibility,
        "aesthetic": Aesthetic.load,
        "alignment": Alignment.load,
        "image-reward": ImageReward.load,
    }
    reward = reward or own[name]()
    prompts = trained[name](folder)
    sets = activity_splits(folder) if name == "alignment" else splits(folder)
    sets["trained"] = prompts
    if not set(sets["unseen-animals"]).isdisjoint(prompts):
        del sets["unseen-animals"]  # the compression tasks train on every animal of ImageNet
    sets = {split: _spread(texts, count) for split, texts in sets.items()}
    return Task(
        name=name,
        reward=reward,
        prompts=prompts,
        splits=sets,
        held_out_prompts=sets.get("unseen-animals", sets["objects"]),
        held_out=reward,
    )


def _spread(prompts: Sequence[str], count: int) -> list[str]:
    """Returns a number of prompts, evenly spaced; all where there are fewer."""
    if len(prompts) <= count:
        return list(prompts)
    return [prompts[k * len(prompts) // count] for k in range(count)]
