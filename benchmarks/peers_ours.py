"""The child of peers.py that trains with this project's trainer."""

from pathlib import Path
from typing import Any

from benchmarks.peers_child import load_reward, lora_of, read_job, serve
from ddpo import DDPOConfig, DDPOTrainer
from overpaint.training import TrainingConfig, TrainingRun


def main() -> None:
    """Makes the trainer as the job says, and does rounds."""
    from overpaint import tinyworld

    job = read_job()
    policy = tinyworld.load_policy(lora=lora_of(job))
    trainer = DDPOTrainer(policy, load_reward(job["reward"]), job["prompts"], DDPOConfig(**job["ddpo"]))
    with TrainingRun(policy, run_config(job["run"])) as run:
        trainer.prepare(run)
        iterations = run.iterations()

        def one_round() -> float:
            next(iterations)
            metrics = trainer.step(run)
            run.log(metrics._asdict())
            return metrics.reward

        serve(one_round, policy.trainable_state)


def run_config(values: dict[str, Any]) -> TrainingConfig:
    """Returns the settings of the run, whose folder and pairs of numbers JSON has as text and lists."""
    typed: dict[str, Any] = {
        **values,
        "output_dir": Path(values["output_dir"]),
        "adam_betas": tuple(values["adam_betas"]),
        "trackers": tuple(values["trackers"]),
    }
    return TrainingConfig(**typed)


if __name__ == "__main__":
    main()
