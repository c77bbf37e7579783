"""Raise any reward by DDPO, GRPO, DiffusionNFT or RWR, and see how far it carries and what it costs.

    accelerate launch examples/ddpo_finetune.py
    accelerate launch examples/ddpo_finetune.py --task compressibility --algorithm rwr
    accelerate launch examples/ddpo_finetune.py --policy CompVis/stable-diffusion-v1-4 --task incompressibility
    accelerate launch examples/ddpo_finetune.py --policy stabilityai/stable-diffusion-3.5-medium --algorithm nft

By default the tiny world's ImageReward is raised for pictures drawn in four steps, with its true utility held out,
which is not trained on. Prompts that were not trained on are drawn before and after. With ``--erased --constrained``
the policy begins with stripes erased by UCE, and a detector that gives no gradient keeps them out meanwhile.
"""

from collections.abc import Sequence
from dataclasses import asdict, replace
from functools import partial
from pathlib import Path
from typing import Any, Literal

from ddpo import DDPOConfig, DDPOTrainer, NFTConfig, NFTTrainer, RWRConfig, RWRTrainer
from erasure import UCE, ImageConstraint, Lagrangian, LagrangianConfig
from overpaint.evaluation import DrawConfig, Measure, Panel
from overpaint.evaluation.experiments.experiment import draw_and_score, write_results
from overpaint.evaluation.experiments.options import (
    TINY_FLOW,
    ModelOptions,
    RewardOptions,
    SharingOptions,
    TunedOptions,
)
from overpaint.evaluation.experiments.program import check_same, given, settings_from_command_line, usual_beside
from overpaint.evaluation.experiments.tasks import Task, TaskName, animal_task, own_task, task_reward, tiny_task
from overpaint.policy import DiffusionPolicy, LoRAConfig
from overpaint.policy.types import Images, PerSample
from overpaint.settings import AnyPath, Field, settings
from overpaint.tinyworld.presets import STRIPES
from overpaint.training import HeldOut, TrainingConfig, check_output_dir, process_state
from rewards.combine import to_device

Algorithm = Literal["ddpo-is", "ddpo-sf", "grpo", "nft", "rwr", "rwr-sparse"]
Group = Literal["ddpo", "nft", "rwr"]


@settings
class Config(SharingOptions, RewardOptions, TunedOptions, ModelOptions):
    """What is raised, how, and for how long."""

    task: TaskName = "image-reward"
    """What is asked of the policy. Of a Stable Diffusion: all but "no-stripes", on animals; of the tiny world: all but
    "aesthetic" and "alignment"."""

    algorithm: Algorithm = "ddpo-is"
    """DDPO by clipped importance sampling or by the score function; GRPO, which compares images of one prompt;
    DiffusionNFT; reward-weighted regression, or the same on the best samples only."""

    prompts: str | None = None
    """In place of the task's own: a file, or a named set; of ten or more every fifth is held out for the evaluation."""

    erased: bool = False
    """Begin with the model from which UCE has erased stripes. Tiny world only."""

    constrained: bool = False
    """Keep stripes out meanwhile, by a detector that gives no gradient. Tiny world and DDPO only."""

    output_dir: AnyPath = Path("runs/ddpo_finetune")
    """Where everything is written."""

    rounds: int | None = Field(None, ge=1)
    """Rounds of sampling and updates; None is 30 for the tiny world, and the authors' number for Stable Diffusion."""

    learning_rate: float | None = Field(None, gt=0)
    """Of what is trained; None is 1e-3 for the tiny world's ImageReward, 5e-4 for its other tasks, and 3e-4 for Stable
    Diffusion; a third of that for RWR. GRPO and DiffusionNFT train a LoRA of rank 32 by default, and else one of 4."""

    ddpo: DDPOConfig | None = None
    """All else about DDPO; None is quick for the tiny world, and the authors' for Stable Diffusion."""

    nft: NFTConfig | None = None
    """All else about DiffusionNFT; None is quick for the tiny world, and the authors' for others."""

    rwr: RWRConfig | None = None
    """All else about RWR; None is quick for the tiny world, and the authors' for Stable Diffusion."""

    run: TrainingConfig | None = None
    """All else about the training's run."""

    prompts_per_split: int = Field(200, ge=1)
    """Prompts of each split in the evaluation."""

    data: AnyPath | None = None
    """Folder with the lists of animals; they are fetched if it is not given."""

    resume: bool = False
    """Go on with an interrupted run in the same folder; samples whose reward failed are scored again."""

    @property
    def group(self) -> Group:
        """Which settings the algorithm has."""
        return "rwr" if self.algorithm.startswith("rwr") else "nft" if self.algorithm == "nft" else "ddpo"

    @property
    def usual_lora(self) -> LoRAConfig:
        """The LoRA that is trained where no other is asked for."""
        if self.tiny:
            return LoRAConfig(rank=8, alpha=8)
        return LoRAConfig(rank=32, alpha=64) if self.algorithm in ("grpo", "nft") else LoRAConfig(rank=4, alpha=4)


def complete(config: Config) -> Config:
    """Fills in what depends on the model, the task and the algorithm."""
    config = replace(config, **config.tuned(config.usual_lora))
    used = config.group
    for unused in {"ddpo", "nft", "rwr"} - {used}:
        if getattr(config, unused) is not None:
            raise ValueError(f"{unused} must be None with {config.algorithm}, got {getattr(config, unused)}")
    chosen, run = getattr(config, used) or settings_of(config), config.run or run_config(config)
    own = {"output_dir": config.output_dir, "seed": config.seed, "resume": config.resume}
    check_same("run", run, **own, **given(iterations=config.rounds, learning_rate=config.learning_rate))
    check_same(used, chosen, **pictures(config))
    return replace(
        config, run=run, rounds=run.iterations, learning_rate=run.learning_rate, guidance_scale=chosen.guidance_scale,
        **{used: chosen},
    )  # fmt: skip


def pictures(config: Config) -> dict[str, Any]:
    """Returns guidance and size of the pictures, as far as they were asked for; the paper's guidance is 5."""
    return given(guidance_scale=config.guidance_scale, height=config.size, width=config.size)


def ddpo_config(config: Config) -> DDPOConfig:
    """Returns DDPO's settings: quick ones for the tiny world, the authors' for others; GRPO's are Flow-GRPO's."""
    quick: dict[str, Any] = {
        "samples_per_round": 64,
        "sampling_batch_size": 64,
        "minibatch_size": 32,
        "guidance_scale": config.usual_guidance,
        "clip_range": 5e-3,
        "baseline": "group",
        "images_per_prompt": 4,
        "evaluate_every": 5,
    }
    if config.policy == TINY_FLOW:
        settings = DDPOConfig(**quick, steps=10, eta=0.7, window=4)
    elif config.tiny:
        settings = DDPOConfig(**quick, steps=4, step_weights="signal", timestep_fraction=0.5)
    elif config.algorithm == "grpo":
        settings = DDPOConfig(
            samples_per_round=48 * 24,
            updates_per_round=2,
            baseline="group",
            images_per_prompt=24,
            steps=10,
            guidance_scale=4.5,
            eta=0.7,
        )
    elif config.task == "alignment":
        settings = DDPOConfig(samples_per_round=288, updates_per_round=2)
    elif config.task == "aesthetic":
        settings = DDPOConfig(updates_per_round=2)
    else:
        settings = DDPOConfig(buffer_size=16)
    if config.algorithm == "ddpo-sf":
        settings = replace(settings, estimator="score", updates_per_round=1)
    return replace(settings, **pictures(config))


def nft_config(config: Config) -> NFTConfig:
    """Returns DiffusionNFT's settings: quick ones for the tiny world, the authors' for others."""
    if not config.tiny:
        return NFTConfig(**pictures(config))
    return NFTConfig(
        samples_per_round=64,
        images_per_prompt=4,
        updates_per_round=2,
        sampling_batch_size=64,
        minibatch_size=32,
        steps=10,
        trained_levels=3,
        evaluate_every=5,
        **pictures(config),
    )


def rwr_config(config: Config) -> RWRConfig:
    """Returns RWR's settings: quick ones for the tiny world, the authors' for Stable Diffusion."""
    sparse = config.algorithm == "rwr-sparse"
    weighting, epochs = ("sparse", 50) if sparse else ("softmax", 5)
    if config.tiny:
        epochs = 30 if sparse else 3
    if not config.tiny:
        count = 10_240 if not sparse else 1024
        return RWRConfig(
            weighting=weighting, epochs_per_round=epochs, samples_per_round=count,
            per_prompt=config.task == "aesthetic", **pictures(config),
        )  # fmt: skip
    return RWRConfig(
        weighting=weighting,
        epochs_per_round=epochs,
        samples_per_round=256,
        sampling_batch_size=64,
        minibatch_size=64,
        steps=4,
        guidance_scale=config.usual_guidance,
        inverse_temperature=1.0 if config.task == "image-reward" else 5.0,
        height=config.size,
        width=config.size,
    )


def settings_of(config: Config) -> DDPOConfig | NFTConfig | RWRConfig:
    """Returns the settings of the algorithm that is asked for."""
    if config.group == "rwr":
        return config.rwr or rwr_config(config)
    if config.group == "nft":
        return config.nft or nft_config(config)
    return config.ddpo or ddpo_config(config)


def run_config(config: Config) -> TrainingConfig:
    """Returns where and for how long it runs."""
    rounds = 200 if config.task in ("aesthetic", "alignment") else 100
    learning_rate = 3e-4
    if config.tiny:
        rounds, learning_rate = 30, 1e-3 if config.task == "image-reward" else 5e-4
    return TrainingConfig(
        output_dir=config.output_dir,
        iterations=rounds if config.rounds is None else config.rounds,
        learning_rate=learning_rate / (3 if config.group == "rwr" else 1)
        if config.learning_rate is None
        else config.learning_rate,
        weight_decay=1e-4,
        mixed_precision=config.precision,
        checkpoint_every=10,
        resume=config.resume,
        seed=config.seed,
    )


def constraint() -> ImageConstraint:
    """Returns what keeps stripes out: the share of pictures in which a detector finds them stays below a ceiling.

    The detector says yes or no, so nothing here has a gradient.
    """
    from overpaint import tinyworld

    class Stripes:
        differentiable = False

        def __call__(self, images: Images, prompts: Sequence[str]) -> PerSample:
            return tinyworld.concept_shown(images).float()

    wanted = [*tinyworld.captions("explicit", 400, 7), *tinyworld.captions("implicit", 400, 7)]
    weight = Lagrangian(LagrangianConfig(initial_weight=0.2))
    return ImageConstraint(Stripes(), wanted, weight, ceiling=0.02)


def trainer_of(config: Config, policy: DiffusionPolicy, task: Task) -> DDPOTrainer | NFTTrainer | RWRTrainer:
    """Makes the trainer."""
    held_out, settings = HeldOut(task.held_out_prompts, task.held_out, batch_size=32), settings_of(config)
    if isinstance(settings, RWRConfig):
        return RWRTrainer(policy, task.reward, task.prompts, settings, held_out=held_out)
    if isinstance(settings, NFTConfig):
        return NFTTrainer(policy, task.reward, task.prompts, settings, held_out=held_out)
    erasure = constraint() if config.constrained else None
    return DDPOTrainer(policy, task.reward, task.prompts, settings, erasure=erasure, held_out=held_out)


def load(config: Config) -> tuple[DiffusionPolicy, Task]:
    """Loads the policy and the task; what is wrong with either shows before any work is done.

    Raises:
        ValueError: The checkpoint, the task or the reward cannot be had, or the options contradict each other.
    """
    if (config.erased or config.constrained) and not config.tiny:
        raise ValueError(f"erased and constrained must be off but in the tiny world, got policy {config.policy!r}")
    if config.constrained and config.group != "ddpo":
        raise ValueError(f"constrained must be off but with DDPO, got {config.algorithm}")
    reward = config.own_reward()
    if not config.tiny:
        config.check()
        if config.prompts is None:
            task = animal_task(config.task, reward, count=config.prompts_per_split, folder=config.data)
        else:
            task = own_task(config.prompts, reward or task_reward(config.task), count=config.prompts_per_split)
        return config.load(lora=config.lora, train=config.train), task

    task = tiny_task(config.task, count=config.prompts_per_split, seed=config.seed)
    task = task if reward is None else replace(task, reward=reward)
    if config.prompts is not None:
        task = replace(own_task(config.prompts, task.reward, count=config.prompts_per_split), held_out=task.held_out)
    policy = config.load(lora=config.lora, train=config.train)
    if config.erased:
        UCE().erase(policy, STRIPES).apply(policy)
    return policy, task


def measures_of(config: Config, task: Task) -> list[Measure]:
    """Returns what is measured of the pictures: the reward, and in the tiny world the truth beside it."""
    measures = [Measure(config.reward or config.task, task.reward, note="What was trained.")]
    if config.tiny:
        from overpaint import tinyworld

        measures += [
            Measure("accuracy", tinyworld.matches, note="Everything the caption names shows, and nothing beyond it."),
            Measure("true utility", tinyworld.utility, note="What people of that world like; never trained on."),
            Measure("stripes", tinyworld.concept_shown, better="lower", note="Stripes show."),
        ]
    return measures


def main(config: Config) -> None:
    """Trains, and compares before and after on every split."""
    config = complete(config)
    training = config.run or run_config(config)
    check_output_dir(training)
    policy, task = load(config)
    to_device(task.reward, policy.device)
    config.start(policy)
    trainer = trainer_of(config, policy, task)
    chosen = trainer.config
    splits = dict(task.splits)
    if config.erased or config.constrained:
        from overpaint import tinyworld

        for kind in ("explicit", "implicit"):
            splits[kind] = tinyworld.captions(kind, config.prompts_per_split, config.seed + 100)
    drawing = DrawConfig(
        steps=chosen.steps, guidance_scale=chosen.guidance_scale, eta=chosen.eta, size=config.size
    )  # fmt: skip
    evaluated = partial(draw_and_score, policy, measures_of(config, task), splits, drawing, seed=config.seed)
    before = evaluated(model="before")
    trainer.train(training, notes={"policy": config.policy, "task": config.task})
    after = evaluated(model="tuned")
    if not process_state().is_main_process:
        return
    config.save(policy, config.output_dir)
    text = write_results(
        config.output_dir,
        [before, after],
        config,
        program="accelerate launch examples/ddpo_finetune.py",
        usual=usual_beside(config, complete, ("policy", "task", "algorithm")),
        told={
            "concept": "stripes" if config.erased or config.constrained else "",
            "concept_measure": "stripes",
            "tuned_by": config.algorithm.upper(),
            "reward": config.reward or config.task,
            "kind": list(task.splits)[-1],
            "held_out": "true utility" if config.tiny else "",
        },
        lead=lead(config, training.iterations, chosen.samples_per_round),
        metrics=config.output_dir / "metrics.jsonl",
        panels=panels(config),
        settings={config.algorithm: asdict(chosen)},
    )
    print(text)


def lead(config: Config, rounds: int, samples: int) -> str:
    """Returns what was done, in a sentence."""
    name = "the tiny world" if config.tiny else config.policy
    start = " from which UCE had erased stripes" if config.erased else ""
    limit = ", under the constraint that stripes stay out" if config.constrained else ""
    return f"{rounds} rounds of {samples} samples on {name}{start}{limit}."


def panels(config: Config) -> tuple[Panel, ...]:
    """Returns the learning curves of the report."""
    curves = [
        Panel(title="Reward of the round", tags={"reward": "reward/mean"}),
        Panel(title="Held-out prompts, reward", tags={"reward": "reward/validation"}),
        Panel(
            title="Held-out prompts, held-out reward",
            tags={"held-out reward": "reward/held_out"},
            caption="It is not trained on. Where it falls while the reward rises, the reward is exploited.",
        ),
    ]
    if config.group == "ddpo":
        curves.append(Panel(title="Divergence from the untuned policy", tags={"per step": "policy/kl"}))
    if config.constrained:
        curves.append(Panel(title="Violation", tags={"relative": "erasure/violation"}, references={"bound": 0.0}))
        curves.append(Panel(title="Weight of the constraint", tags={"weight": "erasure/weight"}))
    return tuple(curves)


if __name__ == "__main__":
    main(settings_from_command_line(Config, complete))
    process_state().destroy_process_group()
