"""Options that programs share, so that they have the same names everywhere."""

from collections.abc import Callable, Mapping
from pathlib import Path
from types import MappingProxyType
from typing import Any, Literal, Unpack

import torch

from erasure import (
    NUDITY,
    ACConfig,
    ANTConfig,
    Concept,
    EraseFlowConfig,
    ESDConfig,
    MACEConfig,
    RecelerConfig,
    SAConfig,
    SAFREEConfig,
    SLDConfig,
    UCEConfig,
)
from erasure.registry import MethodName, method_named
from overpaint.evaluation.images.plan import DrawConfig
from overpaint.policy import DiffusionPolicy, LoRAConfig, check_checkpoint
from overpaint.policy.flow import Chain
from overpaint.policy.loading import PolicyOptions, default_device
from overpaint.policy.lora_files import check_format
from overpaint.settings import AnyPath, Field, Seed, Text, settings
from overpaint.tinyworld import REWARDS as TINY_WORLD_REWARDS
from overpaint.tinyworld import STRIPES, load_flow_policy, load_policy
from overpaint.tinyworld.own_concept import own_concept, preset
from overpaint.training import TrainingConfig, default_precision
from overpaint.training.config import Precision, Schedule
from rewards import Reward, reward_named

from .program import check_same

TINY_WORLD, TINY_FLOW = "tinyworld", "tinyworld-flow"
TINY_WORLDS: Mapping[str, Callable[..., DiffusionPolicy]] = MappingProxyType(
    {TINY_WORLD: load_policy, TINY_FLOW: load_flow_policy}
)
"""The models of the tiny world by name: a Stable Diffusion, and a rectified-flow transformer."""

Dtype = Literal["float32", "bfloat16", "float16"]

TINY_GUIDANCE, USUAL_GUIDANCE = 3.0, 7.5
"""Guidance of the tiny world, and diffusers' default for Stable Diffusion."""


@settings
class ModelOptions:
    """Which model draws, and how."""

    policy: str = TINY_WORLD
    """The tiny world ("tinyworld", or "tinyworld-flow" for its rectified flow), or a checkpoint of a known family: a
    folder, a hub id, or a single file."""

    policy_config: str | None = None
    """For a checkpoint in one file: the folder or hub id whose configuration and tokenizer it takes; None finds it."""

    guidance_scale: float | None = Field(None, ge=0)
    """Classifier-free guidance, in training and in evaluation; None is 3 for the tiny world, and else 7.5. In
    `ddpo_finetune.py` None is what its algorithm takes. FLUX.1-dev wants 3.5, and schnell takes 1 only."""

    size: int | None = Field(None, ge=8, multiple_of=8)
    """Side of all pictures in pixels, in training and in evaluation; None is the model's own."""

    dtype: Dtype = "float32"
    """Precision of all frozen weights; a LoRA stays float32, and a named set of weights to train needs it."""

    tiling: bool = False
    """Whether the VAE goes over large pictures in tiles."""

    chain: Chain | None = None
    """Which noise a flow's stochastic steps add; None is "sde", Flow-GRPO's. EraseFlow takes "ancestral"."""

    seed: Seed = 0
    """Seed of everything."""

    @property
    def tiny(self) -> bool:
        """Whether this is about the tiny world."""
        return self.policy in TINY_WORLDS

    @property
    def usual_guidance(self) -> float:
        """The guidance that was asked for, or the model's usual one."""
        if self.guidance_scale is not None:
            return self.guidance_scale
        return TINY_GUIDANCE if self.tiny else USUAL_GUIDANCE

    @property
    def training_pictures(self) -> dict[str, Any]:
        """Guidance and size of the pictures that a trainer draws, as its settings name them."""
        return {"guidance_scale": self.usual_guidance, "height": self.size, "width": self.size}

    @property
    def precision(self) -> Precision | None:
        """Mixed precision of training: that of the launcher for the tiny world, else what the device is fast at."""
        return None if self.tiny else default_precision(default_device())

    def drawing(self, steps: int) -> DrawConfig:
        """Returns how pictures are drawn for an evaluation."""
        return DrawConfig(steps=steps, guidance_scale=self.usual_guidance, size=self.size)

    def check(self) -> None:
        """Raises a `ValueError` where there is no such model, without loading it."""
        if not self.tiny:
            check_checkpoint(self.policy, self.policy_config)

    def load(self, **trained: Unpack[PolicyOptions]) -> DiffusionPolicy:
        """Loads the model; what of it is trained is an option of the policy."""
        options = PolicyOptions(dtype=getattr(torch, self.dtype), tiling=self.tiling)
        if self.chain is not None:
            options["chain"] = self.chain
        if self.tiny:
            return TINY_WORLDS[self.policy](**options | trained)
        options["gradient_checkpointing"] = True
        return DiffusionPolicy.from_pretrained(self.policy, config=self.policy_config, **options | trained)


@settings
class SharingOptions:
    """Where the results go besides the output folder."""

    push_to_hub: str | None = Field(None, pattern=r"^[\w.-]+/[\w.-]+$")
    """Repository on the Hugging Face hub, "owner/name", that the output folder is uploaded to in the end; private."""


@settings
class RunOptions(ModelOptions):
    """How a training runs. A program's own defaults stand in its settings."""

    output_dir: AnyPath = Path("runs/training")
    """Where everything is written."""

    iterations: int = Field(100, ge=1)
    """Iterations of training."""

    learning_rate: float | None = Field(None, gt=0)
    """Of what is trained; None is the program's for the model."""

    run: TrainingConfig | None = None
    """All else about the training's run."""

    resume: bool = False
    """Go on with an interrupted run in the same folder."""

    def run_of(self, learning_rate: float, schedule: Schedule = "constant") -> TrainingConfig:
        """Returns the settings of the run: those given, or the usual ones with what the options say.

        Args:
            learning_rate: The usual one.
            schedule: Of the learning rate, likewise.

        Raises:
            ValueError: Those given contradict the options.
        """
        usual = TrainingConfig(
            output_dir=self.output_dir,
            iterations=self.iterations,
            learning_rate=learning_rate if self.learning_rate is None else self.learning_rate,
            schedule=schedule,
            mixed_precision=self.precision,
            checkpoint_every=20,
            resume=self.resume,
            seed=self.seed,
        )
        if self.run is None:
            return usual
        said = [name for name in OWNED["run"] if getattr(self, name) is not None]
        check_same("run", self.run, **{name: getattr(usual, name) for name in said})
        return self.run


PICTURES = ("guidance_scale", "height", "width")
OWNED = {
    "run": ("output_dir", "iterations", "learning_rate", "resume", "seed"),
    **dict.fromkeys(("refl", "ddpo", "nft", "rwr"), PICTURES),
    "destruction": ("guidance_scale",),
    **dict.fromkeys(("descent", "eraser.descent"), ("seed",)),
}
"""Settings of groups that programs have options of their own for."""


@settings
class TunedOptions:
    """What is trained."""

    lora: LoRAConfig | None = None
    """The LoRA that is trained; None is one of rank 8, or of none where `train` names weights."""

    lora_file: AnyPath | None = None
    """A LoRA to go on from, of diffusers, peft or kohya, as a file or a folder; rank and targets are its own."""

    kohya: bool = False
    """Whether the LoRA is also written as A1111 and ComfyUI read it."""

    train: str | None = None
    """A named set of the UNet's own weights in place of a LoRA, such as "xattn" or "full" (`PARAMETER_SETS`)."""

    def tuned(self, usual: LoRAConfig) -> dict[str, Any]:
        """Returns the policy's options for what is trained.

        Raises:
            ValueError: Both a LoRA and a set are given, or a LoRA's settings beside its file, or kohya's format for a
                set.
        """
        if self.kohya and self.train is not None:
            raise ValueError(f"kohya must be left out with train, which trains no LoRA, got train {self.train!r}")
        if self.lora_file is not None:
            if (self.lora, self.train) != (None, None):
                raise ValueError(f"lora_file must come without lora and train, got {self.lora or self.train!r} besides")
            return {}
        if self.train is None:
            return {"lora": self.lora or usual}
        if self.lora is not None:
            raise ValueError(f"train must be None with a LoRA, got {self.train!r} with {self.lora}")
        return {"train": self.train}

    def check_kohya(self, policy: DiffusionPolicy) -> None:
        """Raises a `ValueError` where kohya's format is asked for, and the policy's LoRA has none, before any work."""
        if self.kohya and policy.lora is not None:
            check_format(policy.model, policy.lora, "kohya")

    def start(self, policy: DiffusionPolicy) -> None:
        """Puts the LoRA to go on from into a policy, if there is one; raises as `check_kohya`."""
        if self.lora_file is not None:
            policy.load_lora(self.lora_file)
        self.check_kohya(policy)

    def save(self, policy: DiffusionPolicy, folder: Path) -> None:
        """Writes what was trained below a folder: a LoRA, or else the whole pipeline."""
        if policy.lora is None:
            policy.save_pipeline(folder / "pipeline")
            return
        policy.save_lora(folder / "lora")
        if self.kohya:
            policy.save_lora(folder / "lora", format="kohya")


@settings
class ConceptOptions:
    """What is erased, and what measures it."""

    concept: tuple[Text, ...] | None = Field(None, min_length=1)
    """Phrases that bring the concept, its name first; none is that of a saved erasure, or stripes in the tiny world,
    and else nudity."""

    anchor: str = " "
    """What takes its place, with a concept of yours; a single space is nothing in particular."""

    preserve: tuple[Text, ...] = ()
    """What must survive, with a concept of yours; prompts that show it are among those that are compared."""

    measure: Text | None = None
    """What tells whether the concept shows: "nudenet", "opennsfw", "clip", "package.module:factory", or "none"; None is
    the truth of the tiny world, NudeNet for nudity, and "clip" for any other."""

    prompts_file: AnyPath | None = None
    """JSON with a list of prompts for each kind (explicit, implicit, neighbour, benign, train); None: built in."""

    def own_concept(self, *, tiny: bool) -> Concept | None:
        """Returns the concept that was said in words; None where none was.

        Raises:
            ValueError: An anchor or what must survive is given without a concept.
        """
        if not self.concept:
            for name, usual in (("anchor", " "), ("preserve", ())):
                if (value := getattr(self, name)) != usual:
                    raise ValueError(f"{name} must come with a concept, got {value!r} without")
            return None
        if tiny:
            return own_concept(self.concept, self.anchor, self.preserve)
        if self.concept == NUDITY.phrases and (self.anchor, self.preserve) == (NUDITY.anchor, ()):
            return NUDITY
        name, *_ = self.concept
        return Concept(name=name, phrases=self.concept, anchor=self.anchor, preserve=("", *self.preserve))


EraserSettings = (
    SLDConfig
    | SAFREEConfig
    | UCEConfig
    | MACEConfig
    | ESDConfig
    | ACConfig
    | SAConfig
    | RecelerConfig
    | ANTConfig
    | EraseFlowConfig
)
"""Settings of any of the ten methods."""


def usual_eraser(method: MethodName, concept: Concept | None, *, policy: str, seed: int) -> EraserSettings:
    """Returns a method's settings: those found for a model of the tiny world, or its authors'.

    Args:
        method: Which.
        concept: What is erased; None is the model's usual one.
        policy: The model's name.
        seed: Of everything random in its training, where it trains.
    """
    settings = preset(method, concept or STRIPES, flow=policy == TINY_FLOW) if policy in TINY_WORLDS else None
    return method_named(method, settings, seed=seed).config


@settings
class RewardOptions:
    """What is raised."""

    reward: Text | None = None
    """A short name such as "aesthetic", the address of a served one, or "package.module:name" of a reward, of what
    makes one, or of a function of images and prompts; None is ImageReward."""

    reward_weights: AnyPath | None = None
    """File or folder with the reward's weights, for those that have any; None fetches them."""

    vocab: AnyPath | None = None
    """File or folder with the vocabulary of ImageReward's tokenizer; None is that beside the weights, or fetched."""

    @property
    def reward_name(self) -> str:
        """What tables call the reward."""
        return self.reward if self.reward not in (None, "image-reward") else "ImageReward"

    def own_reward(self) -> Reward | None:
        """Returns the reward that was asked for; None where none was."""
        if self.reward is None and self.reward_weights is None and self.vocab is None:
            return None
        return reward_named(
            self.reward or "image-reward", TINY_WORLD_REWARDS, weights=self.reward_weights, vocab=self.vocab
        )
