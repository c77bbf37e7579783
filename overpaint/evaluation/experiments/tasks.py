"""Tasks of reward fine-tuning: a reward, prompts to train on, and prompts that tell how far it carries.

The four of Black et al. (2023), https://arxiv.org/abs/2305.13301, section 5, and those of the tiny world.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from overpaint.evaluation.prompts import (
    activity_splits,
    animal_activities,
    common_animals,
    evenly,
    imagenet_animals,
    prompt_set,
    splits,
)
from rewards import Aesthetic, Alignment, Compressibility, ImageReward, Incompressibility, Reward, WeightedSum

TaskName = Literal["image-reward", "compressibility", "incompressibility", "aesthetic", "alignment", "no-stripes"]
"""Aesthetics and alignment are of the real models, the absence of stripes of the tiny world, the rest of both."""


@dataclass(frozen=True, kw_only=True)
class Task:
    """A reward to fine-tune on, with its prompts."""

    name: str
    reward: Reward
    """What the policy is fine-tuned on."""
    prompts: Sequence[str]
    """What the policy is trained on."""
    splits: Mapping[str, Sequence[str]]
    """Prompts of the evaluation, by how far they are from those."""
    held_out_prompts: Sequence[str]
    """Prompts of early stopping."""
    held_out: Reward
    """Reward of early stopping: the truth where there is one, or else the reward itself."""


def tiny_task(name: TaskName, *, count: int = 200, held_out_count: int = 96, seed: int = 0) -> Task:
    """Returns a task of the tiny world; held-out pairs of colour and shape tell how far it carries.

    There are `count` prompts in each split and `held_out_count` for early stopping, chosen by the seed.

    Raises:
        ValueError: The task is one of real models, aesthetics or alignment.
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
        kinds, held_out_kind = {"trained": "explicit", "implicit": "implicit", "benign": "benign"}, "explicit"
    else:
        kinds, held_out_kind = {"trained": "train", "unseen-pairs": "held_out"}, "held_out"
    return Task(
        name=name,
        reward=rewards[name](),
        prompts=tinyworld.captions(kinds["trained"], 1000, seed + 300),
        splits={split: tinyworld.captions(kind, count, seed + 100) for split, kind in kinds.items()},
        held_out_prompts=tinyworld.captions(held_out_kind, held_out_count, seed + 200),
        held_out=tinyworld.Utility(),
    )


def task_reward(name: TaskName) -> Reward:
    """Makes the reward of a task, whose networks are fetched where needed.

    Raises:
        ValueError: The task is not one of real models.
    """
    rewards: dict[TaskName, Callable[[], Reward]] = {
        "compressibility": Compressibility,
        "incompressibility": Incompressibility,
        "aesthetic": Aesthetic.load,
        "alignment": Alignment.load,
        "image-reward": ImageReward.load,
    }
    if name not in rewards:
        raise ValueError(f"task must be one of {tuple(rewards)} for a Stable Diffusion, got {name!r}")
    return rewards[name]()


def own_prompts(name_or_path: str) -> tuple[list[str], list[str]]:
    """Reads prompts and returns those to train on and those held out: every fifth, or all where there are below ten."""
    texts = list(prompt_set(name_or_path).texts)
    held_out = texts[::5] if len(texts) >= 10 else texts
    return [text for text in texts if text not in set(held_out)] or texts, held_out


def own_task(prompts: str, reward: Reward, *, count: int = 64) -> Task:
    """Returns a task on prompts of one's own.

    Args:
        prompts: A file, or a named set, see `own_prompts`.
        reward: What the policy is fine-tuned on.
        count: Prompts of each split.
    """
    trained, held_out = own_prompts(prompts)
    splits = {"trained": evenly(trained, count), "held-out": evenly(held_out, count)}
    return Task(
        name="own", reward=reward, prompts=trained, splits=splits, held_out_prompts=splits["held-out"], held_out=reward
    )


def animal_task(name: TaskName, reward: Reward | None = None, *, count: int = 64, folder: Path | None = None) -> Task:
    """Returns a task of the paper, on animals.

    Args:
        name: Any but the tiny world's own.
        reward: What the policy is fine-tuned on; by default that of the task, whose networks are fetched where needed.
        count: Prompts of each split.
        folder: Where the lists of animals lie; they are fetched if it is not given.

    Raises:
        ValueError: The task is unknown.
    """
    lists: dict[TaskName, Callable[[Path | None], list[str]]] = {
        "compressibility": imagenet_animals,
        "incompressibility": imagenet_animals,
        "alignment": animal_activities,
    }
    reward = reward or task_reward(name)
    prompts = lists.get(name, common_animals)(folder)
    sets = activity_splits(folder) if name == "alignment" else splits(folder)
    sets["trained"] = prompts
    if not set(sets["unseen-animals"]).isdisjoint(prompts):
        del sets["unseen-animals"]  # the compression tasks train on every animal of ImageNet
    sets = {split: evenly(texts, count) for split, texts in sets.items()}
    return Task(
        name=name,
        reward=reward,
        prompts=prompts,
        splits=sets,
        held_out_prompts=sets.get("unseen-animals", sets["objects"]),
        held_out=reward,
    )
