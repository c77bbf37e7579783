"""Options of the programs that win back the reward of an erased model, and which model and concept they mean."""

import warnings
from dataclasses import replace
from typing import Any, Literal, TypeVar

from erasure import (
    NUDITY,
    DestructionConfig,
    Erasure,
)
from erasure.erased import is_saved
from overpaint.policy import LoRAConfig, check_checkpoint
from overpaint.settings import AnyPath, Field, settings
from overpaint.training import TrainingConfig
from refl import ReFLConfig

from .experiment import Experiment, experiment_of
from .options import ConceptOptions, RewardOptions, RunOptions, SharingOptions, TunedOptions
from .program import check_same

ConstraintName = Literal["detector", "objective", "reference", "destruction", "none"]
"""What may hold a concept, see `RecoveryOptions.constraint`."""

DECIDING = ("policy", "method", "concept", "anchor", "preserve")
"""Options of the programs that decide what others are by default."""


@settings
class RecoveryOptions(SharingOptions, RewardOptions, TunedOptions, ConceptOptions, RunOptions):
    """How the reward of an erased model is won back, and how its states are compared."""

    original: str | None = None
    """The model before it was erased, to compare with, where the policy is an erased model: a folder, a hub id or a
    file."""

    erasure: AnyPath | None = None
    """What erases the policy: a folder of a saved erasure (`Erasure.save`), or a file or folder of erased weights as
    ESD, UCE, AC, SA, MACE, Receler and EraseFlow release them."""

    constraint: ConstraintName | None = None
    """What keeps the concept gone in the recovery: a "detector" of it with a gradient; the "objective" that the erasure
    method descends; the distance of noise predictions from those of the erased model, its "reference"; the
    "destruction" of what the model sees in pictures of the concept that the original draws, whatever words are learned
    against it; or "none", to see how much of the concept comes back. None is the detector of the tiny world's stripes,
    and the destruction where the program has erased them itself, and else the reference: a detector that is also the
    measure would no longer tell the truth, and a destruction has not been tried on a Stable Diffusion."""

    ceiling: float | None = Field(None, gt=0)
    """Highest mean of what the constraint holds down that counts as erased; None is 0.005 for the detector of stripes
    and 0.1 for others, 0.001 for the reference, 0.08 for the destruction, and for an objective a tenth more than
    the erased model's own loss."""

    attacked: bool = False
    """Whether the constraint has to hold on prompts that are made hard: half of those that bring the concept unnamed or
    whose pictures still show it (`ConceptPrompts`), and every other one attacked by free vectors (`SoftAttack`). A
    destruction always has to, against words of its own."""

    iterations: int = Field(80, ge=1)
    """ReFL iterations of the recovery."""

    learning_rate: float | None = Field(None, gt=0)
    """Of what is trained; None is 1e-3 for the tiny world and 1e-4 for Stable Diffusion, and three times that, falling
    to 0, with the constraint destruction, which has more to unlearn."""

    refl: ReFLConfig | None = None
    """How the reward is won back; None is small for the tiny world, and the authors' batch for Stable Diffusion."""

    destruction: DestructionConfig | None = None
    """How the concept is destroyed, under that constraint; None draws its pictures as ReFL draws others."""

    prompts_per_kind: int = Field(200, ge=1)
    """Prompts of each kind in the evaluation."""

    evaluation_steps: int = Field(20, ge=1)
    """Denoising steps of the pictures that are compared."""

    @property
    def training(self) -> TrainingConfig:
        """The settings of the recovery's run."""
        usual = 1e-3 if self.tiny else 1e-4
        return self.run_of(3 * usual, schedule="cosine") if self.constraint == "destruction" else self.run_of(usual)


Options = TypeVar("Options", bound=RecoveryOptions)


def completed(config: Options) -> Options:
    """Fills in what depends on the model."""
    rank = 64 if config.constraint == "destruction" else 8
    config = replace(config, guidance_scale=config.usual_guidance, **config.tuned(LoRAConfig(rank=rank, alpha=rank)))
    refl, run = config.refl or refl_config(config), config.training
    check_same("refl", refl, **config.training_pictures)
    usual = DestructionConfig(steps=refl.steps, guidance_scale=config.usual_guidance)
    destruction = config.destruction or usual
    return replace(config, refl=refl, run=run, learning_rate=run.learning_rate, destruction=destruction)


def refl_config(config: RecoveryOptions) -> ReFLConfig:
    """Returns the settings of the recovery: small for the tiny world, the authors' batch for Stable Diffusion."""
    keeping: dict[str, Any] = {"pretraining_batch_size": 16}
    if config.constraint == "destruction":  # which moves the model far, and what is not to move with it has to be held
        keeping = {
            "reward_from": config.iterations // 3,
            "pretraining_pairs": 256,
            "pretraining_weight": 8.0,
            "pretraining_target": "reference",
            "pretraining_batch_size": 32,
            "caption_dropout": 0.33,
        }
    if config.tiny:
        return ReFLConfig(
            batch_size=8,
            micro_batch_size=32,
            erasure_batch_size=8,
            **keeping,
            steps=20,
            first_reward_step=10,
            last_reward_step=19,
            **config.training_pictures,
            reward_scale=0.05,
            evaluate_every=max(20, config.iterations // 3),
        )
    return ReFLConfig(
        batch_size=64,
        micro_batch_size=2,
        erasure_batch_size=16,
        **keeping,
        **config.training_pictures,
        checkpoint_steps=True,
    )


def about_of(config: RecoveryOptions) -> Experiment:
    """Returns what is erased from what; a saved erasure brings its concept.

    Raises:
        ValueError: The concept that is asked for is not that of the saved erasure.
    """
    concept = config.own_concept(tiny=config.tiny)
    if config.erasure is not None and is_saved(config.erasure):
        saved = Erasure.load(config.erasure).concept
        if concept is not None and concept.phrases != saved.phrases:
            raise ValueError(
                f"concept must be the saved erasure's, {', '.join(saved.phrases)}, got {', '.join(concept.phrases)}"
            )
        concept = saved
    elif concept is None and (config.erasure is not None or config.original is not None):
        source, usual = config.erasure or config.policy, "stripes" if config.tiny else NUDITY.name
        warnings.warn(f"{source} does not say what was erased, taken for {usual}; see --concept", stacklevel=2)
    return experiment_of(config, concept)


def check_model(config: RecoveryOptions) -> None:
    """Checks which model is which, before any work.

    Raises:
        ValueError: There is no such model, or it is said to be erased already and an erasure is given, too.
    """
    config.check()
    if config.original is not None:
        if config.erasure is not None:
            raise ValueError(f"original must come without an erasure of the policy, got {config.erasure} besides")
        if config.tiny:
            raise ValueError(
                f"policy must be an erased model beside the original {config.original}, got the tiny world"
            )
        check_checkpoint(config.original)
