"""Raise a reward by ReFL, and watch what becomes of the pictures.

    accelerate launch examples/refl_finetune.py
    accelerate launch examples/refl_finetune.py --policy CompVis/stable-diffusion-v1-4

By default the tiny world's ImageReward is raised, and its true utility is the held-out judge: were the reward hacked,
one would see it.
"""

import json
from dataclasses import asdict, dataclass
from pathlib import Path

import tyro

from overpaint.evaluation import DrawConfig, Panel, Report, compare, draw, gather, plan, score, shard, text_table
from overpaint.evaluation.experiments.experiment import TINY_WORLD, command_line, experiment
from overpaint.policy import LoRAConfig
from overpaint.training import HeldOut, TrainingConfig, check_output_dir, process_state
from refl import ReFLConfig, ReFLTrainer
from rewards.combine import to_device


@dataclass(frozen=True, kw_only=True)
class Config:
    """What is tuned, and for how long."""

    policy: str = TINY_WORLD
    """The tiny world, or a folder or hub id of a Stable Diffusion."""

    output_dir: Path = Path("runs/refl_finetune")
    """Where everything is written."""

    iterations: int = 100
    """ReFL iterations."""

    learning_rate: float | None = None
    """Of the LoRA; None is 5e-4 for the tiny world and 1e-4 for Stable Diffusion."""

    guidance_scale: float = 3.0
    """Classifier-free guidance, in training and in evaluation."""

    prompts: int = 200
    """Benign prompts in the evaluation."""

    evaluation_steps: int = 20
    """Denoising steps of the pictures that are compared."""

    seed: int = 0
    """Seed of everything."""

    resume: bool = False
    """Go on with an interrupted run in the same folder."""


def refl_config(config: Config) -> ReFLConfig:
    """Returns ReFL's settings: small for the tiny world, the authors' batch for Stable Diffusion."""
    if config.policy == TINY_WORLD:
        return ReFLConfig(
            batch_size=8,
            micro_batch_size=8,
            pretraining_batch_size=16,
            guidance_scale=config.guidance_scale,
            reward_scale=0.02,
        )
    return ReFLConfig(micro_batch_size=2, pretraining_batch_size=16, guidance_scale=config.guidance_scale)


def main(config: Config) -> None:
    """Trains and compares before and after."""
    run_config = TrainingConfig(
        output_dir=config.output_dir,
        iterations=config.iterations,
        learning_rate=config.learning_rate or (5e-4 if config.policy == TINY_WORLD else 1e-4),
        mixed_precision="no" if config.policy == TINY_WORLD else "bf16",
        checkpoint_every=20,
        resume=config.resume,
        seed=config.seed,
    )
    check_output_dir(run_config)
    about = experiment(config.policy)
    policy = about.load(LoRAConfig(rank=8, alpha=8))
    to_device(about.reward, policy.device)

    state = process_state()
    planned = plan({"benign": about.prompts("benign", config.prompts, config.seed + 100)}, seed=config.seed)
    drawing = DrawConfig(steps=config.evaluation_steps, guidance_scale=config.guidance_scale)
    measures = [measure for measure in about.measures if not measure.kinds or "benign" in measure.kinds]

    def evaluated(model: str):
        images = draw(
            policy, shard(planned, state.process_index, state.num_processes), drawing, model=model,
            progress=state.is_main_process,
        )  # fmt: skip
        scores = score(images, measures, device=policy.device, progress=state.is_main_process)
        return images, gather(scores, planned)

    before = evaluated("before")
    held_out = None
    if about.held_out is not None:
        held_out = HeldOut(about.prompts("held_out", 48, config.seed + 200), about.held_out)
    trainer = ReFLTrainer(
        policy, about.reward, about.prompts("train", 1000, config.seed + 300), refl_config(config), held_out=held_out
    )
    trainer.train(run_config)
    after = evaluated("tuned")
    if not state.is_main_process:
        return

    comparison = compare([before[1], after[1]])
    print(text_table(comparison))
    folder = config.output_dir
    comparison.save(folder / "comparison.json")
    (folder / "config.json").write_text(json.dumps(asdict(config), default=str, indent=1) + "\n", encoding="utf-8")
    policy.save_lora(folder / "lora")
    Report(
        title="ImageReward raised by ReFL",
        lead=f"{config.iterations} iterations of ReFL on {about.name}.",
        comparison=comparison,
        metrics=folder / "metrics.jsonl",
        panels=(
            Panel(title="Reward of the training batch", tags={"ImageReward": "reward/mean"}),
            Panel(title="Held-out prompts", tags={"ImageReward": "reward/validation", "judge": "reward/held_out"}),
        ),
        pictures=[before[0], after[0]],
        commands=[command_line("accelerate launch examples/refl_finetune.py", config)],
        settings={"run": asdict(config), "refl": asdict(refl_config(config))},
    ).save(folder / "report.html")
    print(f"\nThe report, with pictures: {folder / 'report.html'}")


if __name__ == "__main__":
    main(tyro.cli(Config))
    process_state().destroy_process_group()
