"""The child of peers.py that trains with TRL, inside an environment that has TRL 0.23.1.

TRL's loader turns the pipeline's scheduler into one that clips predicted images to [-1, 1], which latents are not, and
it attaches a LoRA of rank 4 whatever one wants. Both are set right here. Nothing else of TRL is changed.
"""

import json
import random
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from torch import Tensor

from benchmarks.peers_child import load_reward, serve


def main() -> None:
    """Makes TRL's trainer as the job says, and does rounds."""
    from accelerate import PartialState
    from diffusers import DDIMScheduler

    PartialState()  # TRL logs through accelerate while it is set up, and accelerate logs to a state only
    from trl import (  # ty: ignore[import-not-found]  only the other environment has it
        DDPOConfig,
        DDPOTrainer,
        DefaultDDPOStableDiffusionPipeline,
    )

    from overpaint import LoRAConfig, tinyworld
    from overpaint.policy.weights import attach_lora

    job = json.loads(Path(sys.argv[1]).read_text(encoding="utf-8"))
    lora = LoRAConfig(**job["lora"] | {"targets": tuple(job["lora"]["targets"])})

    class Pipeline(DefaultDDPOStableDiffusionPipeline):
        """TRL's pipeline with the job's LoRA."""

        def get_trainable_layers(self) -> Any:
            attach_lora(self.unet, lora)
            return self.unet

    pipeline = Pipeline(str(tinyworld.pipeline_dir()), use_lora=True)
    pipeline.sd_pipeline.scheduler = DDIMScheduler.from_config(pipeline.scheduler.config, clip_sample=False)
    reward, rewards = load_reward(job["reward"]), []
    chance = random.Random(job["config"]["seed"])

    def score(images: Tensor, prompts: Sequence[str], metadata: Any) -> tuple[Tensor, Any]:
        rewards.append(reward(images, list(prompts)))
        return rewards[-1], metadata

    def draw_prompt() -> tuple[str, dict[str, Any]]:
        return chance.choice(job["prompts"]), {}

    trainer = DDPOTrainer(DDPOConfig(**job["config"]), score, draw_prompt, pipeline)
    pipeline.set_progress_bar_config(disable=True)
    epoch = updates = 0

    def one_round() -> float:
        nonlocal epoch, updates
        rewards.clear()
        updates = trainer.step(epoch, updates)
        epoch += 1
        return sum(float(part.sum()) for part in rewards) / sum(len(part) for part in rewards)

    def weights() -> Mapping[str, Tensor]:
        return {name: value for name, value in pipeline.unet.named_parameters() if value.requires_grad}

    serve(one_round, weights)


if __name__ == "__main__":
    main()
