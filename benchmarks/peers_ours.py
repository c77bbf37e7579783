"""The child of peers.py that trains with this project's trainer."""

import sys
from pathlib import Path

from pydantic import TypeAdapter

from benchmarks.peers_child import load_reward, serve
from benchmarks.peers_settings import Settings
from ddpo import DDPOTrainer
from overpaint import tinyworld
from overpaint.training import TrainingRun


def main() -> None:
    """Makes the trainer as the job says, and does rounds."""
    job = TypeAdapter(Settings).validate_json(Path(sys.argv[1]).read_text(encoding="utf-8"))
    policy = tinyworld.load_policy(lora=job.lora)
    trainer = DDPOTrainer(policy, load_reward(job.reward), job.prompts, job.ddpo)
    with TrainingRun(policy, job.run) as run:
        trainer.prepare(run)
        iterations = run.iterations()

        def one_round() -> float:
            next(iterations)
            metrics = trainer.step(run)
            run.log(metrics._asdict())
            return metrics.reward

        serve(one_round, policy.trainable_state)


if __name__ == "__main__":
    main()
