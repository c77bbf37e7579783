"""A program that the tests start in one process and in two: the same batches, whole or shared out."""

import json
import sys
from pathlib import Path
from typing import Any

import torch
from conftest import KilledError, StandIn, small_training
from safetensors.torch import save_file

from overpaint.policy import DiffusionPolicy, LoRAConfig
from overpaint.training import TrainingConfig, TrainingRun, process_state


def unequal_losses(folder: Path) -> None:
    """Trains with several forwards before several backwards, and a loss that is not finite in one process only."""
    policy = StandIn()
    config = TrainingConfig(output_dir=folder, iterations=6, learning_rate=1e-2, progress=False, ema_decay=0.5)
    facts: dict[str, Any] = {"norms": []}
    with TrainingRun(policy, config) as run:
        for iteration in run.iterations():
            batch = torch.randn(8, 4, generator=run.generator)
            offset = torch.zeros(8)
            if iteration == 3:
                offset[6] = float("nan")  # in the second half; the gradient stays finite
            part, offset = run.shard(batch), run.shard(offset)
            with torch.no_grad():
                for _ in range(run.process_index):  # processes may draw different numbers of images
                    policy.network(part)
            first, second = policy.network(part), policy.network(-part)
            third = policy.network(part + 1)
            run.backward(first.square().mean(), sync=False)
            run.backward(second.abs().mean(), sync=iteration % 3 != 1)  # averaging early does no harm
            run.backward((third.sum(dim=1) + offset).mean())
            norm = run.update()
            if iteration != 3:
                facts["norms"].append(norm)
            run.log({"reward/mean": run.mean(first)})
        facts["skipped"] = run.skipped
        facts["gathered"] = run.gather(run.shard(torch.arange(8))).tolist()
        facts["processes"] = run.num_processes
        facts["main"] = run.is_main
        with run.ema_weights():
            average = policy.trainable_state()
        if run.is_main:
            save_file(policy.trainable_state(), folder / "weights.safetensors")
            save_file(average, folder / "average.safetensors")
            (folder / "facts.json").write_text(json.dumps(facts))
        elif any(not torch.isfinite(tensor).all() for tensor in average.values()):
            raise AssertionError("the second process has other weights")


def lora(folder: Path, pipeline: str) -> None:
    """Trains the LoRA of a tiny Stable Diffusion, with checkpointed activations, to draw a brighter image."""
    torch.manual_seed(0)
    policy = DiffusionPolicy.from_pretrained(pipeline, lora=LoRAConfig(), device="cpu", gradient_checkpointing=True)
    # With a large epsilon a step is proportional to the gradient, so that rounding stays as small as it is.
    config = TrainingConfig(
        output_dir=folder, iterations=3, learning_rate=1e-2, adam_epsilon=1e-2, progress=False, checkpoint_every=2
    )
    with TrainingRun(policy, config) as run:
        for _ in run.iterations():
            seeds = run.shard(torch.randint(2**31, (4,), generator=run.generator).tolist())
            embeddings = policy.encode(["a red circle"] * len(seeds))
            latents = policy.sample(embeddings, steps=4, until=2, seeds=seeds)
            images = policy.decode(policy.predict_clean(latents, embeddings, step=2, steps=4))
            run.backward(-images.mean())
            run.update()
        if run.is_main:
            save_file(policy.trainable_state(), folder / "weights.safetensors")


def interrupted(folder: Path) -> None:
    """Trains to the end, and again with an interruption; then tries a folder that is taken."""
    whole = small_training(folder / "whole", ema_decay=0.5)
    try:
        small_training(folder / "run", ema_decay=0.5, die_at=5)
    except KilledError:
        torch.manual_seed(9)
    resumed = small_training(folder / "run", ema_decay=0.5, resume=True)
    if resumed.dual != whole.dual or any(not torch.equal(resumed.weights[n], t) for n, t in whole.weights.items()):
        raise AssertionError("the resumed run differs")
    try:
        small_training(folder / "run")
    except ValueError as error:
        if "output_dir must not hold another run" not in str(error):
            raise
    else:
        raise AssertionError("a folder that is taken was accepted")


if __name__ == "__main__":
    output = Path(sys.argv[1])
    unequal_losses(output / "unequal")
    lora(output / "lora", sys.argv[2])
    interrupted(output)
    process_state().destroy_process_group()
