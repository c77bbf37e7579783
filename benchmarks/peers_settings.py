"""The settings of each side of peers.py, and what they are called in TRL."""

import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

from benchmarks.peers_child import RewardName
from ddpo import DDPOConfig
from examples import ddpo_finetune
from overpaint.policy import LoRAConfig
from overpaint.training import TrainingConfig

NEVER = 1_000_000
"""A round that no run gets to."""


@dataclass(frozen=True, kw_only=True)
class Settings:
    """What one side trains with. Two sides with equal settings do the same arithmetic, up to their random numbers."""

    reward: RewardName
    """What is raised."""

    prompts: tuple[str, ...]
    """What images are drawn for."""

    ddpo: DDPOConfig
    """The algorithm."""

    run: TrainingConfig
    """The optimizer and the seed."""

    lora: LoRAConfig = field(default_factory=lambda: LoRAConfig(rank=8, alpha=8.0))
    """What is trained; as in examples/ddpo_finetune.py."""


def own_settings(*, reward: RewardName, prompts: Sequence[str], output_dir: Path, seed: int) -> Settings:
    """Returns the settings of examples/ddpo_finetune.py for the tiny world, without checkpoints."""
    preset = ddpo_finetune.Config(task=reward, output_dir=output_dir, seed=seed)
    run = replace(ddpo_finetune.run_config(preset), iterations=NEVER, checkpoint_every=NEVER, progress=False)
    return Settings(reward=reward, prompts=tuple(prompts), ddpo=ddpo_finetune.ddpo_config(preset), run=run)


def our_job(settings: Settings) -> dict[str, Any]:
    """Returns the job of peers_ours.py."""
    return json.loads(json.dumps(asdict(settings), default=str))


def trl_job(settings: Settings) -> dict[str, Any]:
    """Returns the job of peers_trl.py."""
    job = our_job(settings)
    return {"config": trl_config(settings), **{name: job[name] for name in ("reward", "prompts", "lora")}}


def trl_config(settings: Settings) -> dict[str, Any]:
    """Returns the arguments of TRL's `DDPOConfig`.

    Raises:
        ValueError: TRL cannot do what the settings say.
    """
    ddpo, run = settings.ddpo, settings.run
    samples = ddpo.samples_per_round // ddpo.updates_per_round
    fixed = {
        "ddpo.estimator": (ddpo.estimator, "importance"),
        "ddpo.baseline": (ddpo.baseline, "prompt"),
        "ddpo.images_per_prompt": (ddpo.images_per_prompt, 1),
        "ddpo.step_weights": (ddpo.step_weights, "equal"),
        "ddpo.kl_weight": (ddpo.kl_weight, 0.0),
        "run.optimizer": (run.optimizer, "adamw"),
        "run.ema_decay": (run.ema_decay, None),
        "run.schedule": (run.schedule, "constant"),
        "run.warmup_iterations": (run.warmup_iterations, 0),
        "run.mixed_precision": (run.mixed_precision or "no", "no"),
        "samples_per_round % sampling_batch_size": (ddpo.samples_per_round % ddpo.sampling_batch_size, 0),
        "sampling_batch_size % minibatch_size": (ddpo.sampling_batch_size % ddpo.minibatch_size, 0),
        "samples of an update % minibatch_size": (samples % ddpo.minibatch_size, 0),
    }
    for name, (value, only) in fixed.items():
        if value != only:
            raise ValueError(f"{name} must be {only!r} for TRL, got {value!r}")
    if ddpo.guidance_scale <= 1:
        raise ValueError(f"ddpo.guidance_scale must be above 1 for TRL, got {ddpo.guidance_scale}")
    return {
        "seed": run.seed,
        "save_freq": NEVER,
        "mixed_precision": "no",
        "sample_num_steps": ddpo.steps,
        "sample_eta": ddpo.eta,
        "sample_guidance_scale": ddpo.guidance_scale,
        "sample_batch_size": ddpo.sampling_batch_size,
        "sample_num_batches_per_epoch": ddpo.samples_per_round // ddpo.sampling_batch_size,
        "train_batch_size": ddpo.minibatch_size,
        "train_gradient_accumulation_steps": samples // ddpo.minibatch_size,
        "train_learning_rate": run.learning_rate,
        "train_adam_beta1": run.adam_betas[0],
        "train_adam_beta2": run.adam_betas[1],
        "train_adam_weight_decay": run.weight_decay,
        "train_adam_epsilon": run.adam_epsilon,
        "train_max_grad_norm": run.max_grad_norm,
        "train_adv_clip_max": ddpo.max_advantage,
        "train_clip_range": ddpo.clip_range,
        "train_timestep_fraction": ddpo.timestep_fraction,
        "per_prompt_stat_tracking": True,
        "per_prompt_stat_tracking_buffer_size": ddpo.buffer_size,
        "per_prompt_stat_tracking_min_count": ddpo.min_count,
    }
