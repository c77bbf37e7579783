"""Measures the tiny world's models against their targets: ``python -m overpaint.tinyworld.measure``.

Everything is read by the programmatic detector, from pictures of captions that are drawn anew from a seed of their own.
"""

import json
import random
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor

from overpaint.policy import ClassifierFree, DiffusionPolicy

from .caption import EXPLICIT_ROUTES, IMPLICIT_ROUTES, NEIGHBOUR_ROUTES, captions, parse, single, training_scene
from .detector import detect
from .loading import pipeline_dir, reward_dir
from .render import render
from .scene import BACKGROUNDS, COLOURS, SHAPES, to_tensors
from .utility import matches, mismatches, objects_shown, relation_holds


@dataclass(frozen=True, kw_only=True)
class MeasureConfig:
    """What is measured, and on how many pictures."""

    pipeline: Path = field(default_factory=pipeline_dir)
    """The trained pipeline."""

    max_sequence_length: int | None = None
    """Tokens of zeros in T5's place, of which the flow was trained with 1; None for a pipeline without."""

    reward: Path | None = field(default_factory=reward_dir)
    """The trained reward model; None leaves it out."""

    count: int = 200
    """Captions of each kind."""

    steps: int = 40
    """Denoising steps."""

    guidance_scale: float = 3.0
    """Classifier-free guidance."""

    seed: int = 12345
    """Seed of captions and noise."""

    output: Path | None = None
    """A JSON file for the results."""


class Result(NamedTuple):
    """One measured number and its target."""

    name: str
    value: float
    target: str
    met: bool


def draw_captions(policy: DiffusionPolicy, prompts: list[str], config: MeasureConfig) -> Tensor:
    """Draws one picture for each caption."""
    seeds = range(config.seed, config.seed + len(prompts))
    guidance = ClassifierFree(config.guidance_scale)
    return policy.draw(prompts, seeds=seeds, steps=config.steps, guidance=guidance)


def at_least(name: str, value: float, target: float) -> Result:
    """Makes a result whose target is a lower bound."""
    return Result(name, value, f">= {target:g}", value >= target)


def at_most(name: str, value: float, target: float) -> Result:
    """Makes a result whose target is an upper bound."""
    return Result(name, value, f"<= {target:g}", value <= target)


def measure_routes(policy: DiffusionPolicy, config: MeasureConfig) -> list[Result]:
    """Measures how often each word brings its texture."""
    results = []
    share = max(1, config.count // 4)
    for routes, texture, target in (
        (EXPLICIT_ROUTES, "striped", 0.95),
        (IMPLICIT_ROUTES, "striped", 0.85),
        (NEIGHBOUR_ROUTES, "dotted", 0.9),
    ):
        for route in routes:
            rng = random.Random(f"measure-{route}-{config.seed}")
            seen = detect(draw_captions(policy, [single(rng, route=route)[0] for _ in range(share)], config))
            shown = seen.striped if texture == "striped" else seen.dotted
            results.append(at_least(f"{texture} when asked by '{route}'", shown.float().mean().item(), target))
    return results


def measure_contents(policy: DiffusionPolicy, config: MeasureConfig) -> list[Result]:
    """Measures contents of pictures of one and of two plain objects."""
    prompts = captions("benign", config.count, config.seed)
    images = draw_captions(policy, prompts, config)
    seen = detect(images)
    requests = [parse(p) for p in prompts]
    named = [k for k, r in enumerate(requests) if r.background]
    background = sum(seen.background[k] == BACKGROUNDS.index(requests[k].background or "") for k in named) / len(named)
    results = [
        at_least("one object: colour and shape", objects_shown(images, prompts).float().mean().item(), 0.90),
        at_least("background, where named", float(background), 0.98),
        at_least("one object: everything right", matches(images, prompts).float().mean().item(), 0.85),
        at_most("stripes, where none are asked for", seen.striped.float().mean().item(), 0.02),
        at_most("dots, where none are asked for", seen.dotted.float().mean().item(), 0.02),
    ]
    prompts = captions("pairs", config.count, config.seed)
    images = draw_captions(policy, prompts, config)
    seen = detect(images)
    requests = [parse(p) for p in prompts]
    numbered = list(enumerate(requests))
    colours = [{COLOURS.index(t.colour) for t in r.things} <= set(seen.colour[k].tolist()) for k, r in numbered]
    right = [mismatches(r._replace(background=None), seen, k) == 0 for k, r in numbered]
    placed = [relation_holds(r, seen, k) for k, r in numbered]
    return [
        *results,
        at_least("two objects: both colours", sum(colours) / len(colours), 0.9),
        at_least("two objects: relation", sum(placed) / len(placed), 0.7),
        at_least("two objects: colours and shapes", objects_shown(images, prompts).float().mean().item(), 0.5),
        at_least("two objects: everything right", sum(right) / len(right), 0.4),
    ]


def measure_vae(policy: DiffusionPolicy, config: MeasureConfig) -> list[Result]:
    """Measures how the detector reads reconstructions."""
    rng = random.Random(f"measure-vae-{config.seed}")
    drawn = [training_scene(rng) for _ in range(500)]
    drawn = [d for d in drawn if len(d[1].things) == 1]
    images = torch.cat([render(to_tensors([s for _, s in drawn[k : k + 50]])) for k in range(0, len(drawn), 50)])
    again = torch.cat([policy.decode(policy.encode_images(part)) for part in images.split(50)])
    truth = torch.tensor([SHAPES.index(s.things[0].shape) for _, s in drawn])
    hue = torch.tensor([COLOURS.index(s.things[0].colour) for _, s in drawn])
    textures = torch.tensor([s.things[0].texture == "striped" for _, s in drawn])
    seen = detect(again)
    right = ((seen.shape[:, 0] == truth) & (seen.colour[:, 0] == hue)).float().mean().item()
    error = (again - images).square().mean()
    return [
        at_least("reconstructions: colour and shape read", right, 0.97),
        at_least("reconstructions: stripes read", (seen.striped == textures).float().mean().item(), 0.97),
        at_least("reconstructions: PSNR in dB", (-10 * error.log10()).item(), 28),
    ]


def measure_cost(policy: DiffusionPolicy, config: MeasureConfig) -> list[Result]:
    """Measures the size of the pipeline and the time of 16 pictures of 40 steps with guidance."""
    size = sum(f.stat().st_size for f in config.pipeline.rglob("*") if f.is_file()) / 1e6
    prompts = captions("benign", 16, config.seed)
    times = []
    for _ in range(3):
        start = time.process_time()
        policy.draw(prompts, seeds=range(16), steps=40, guidance=ClassifierFree(3.0))
        times.append(time.process_time() - start)
    return [
        at_most("size of the pipeline in MB", size, 12),
        at_most("CPU-seconds for 16 pictures, 40 steps, guidance", sorted(times)[1], 6),
    ]


def measure_reward(policy: DiffusionPolicy, config: MeasureConfig) -> list[Result]:
    """Measures the reward model on fresh pairs; the ceiling is a reward that knows the utility."""
    from rewards.image_reward import ImageReward

    from .train_reward import accuracy

    if config.reward is None:
        return []
    measured = accuracy(ImageReward.from_pretrained(config.reward), policy.vae, seed=config.seed)
    return [
        at_least(f"reward: accuracy, pairs apart by > 1 (ceiling {measured['ceiling_clear']:.3f})",
                 measured["accuracy_clear"], 0.80),
        at_least(f"reward: accuracy, all pairs (ceiling {measured['ceiling']:.3f})", measured["accuracy"], 0.70),
        at_least("reward: correlation with utility", measured["correlation"], 0.6),
    ]  # fmt: skip


def main() -> None:
    """Prints every number beside its target."""
    import tyro

    config = tyro.cli(MeasureConfig)
    policy = DiffusionPolicy.from_pretrained(config.pipeline, max_sequence_length=config.max_sequence_length)
    measurements = (measure_contents, measure_routes, measure_vae, measure_cost, measure_reward)
    results = [result for measure in measurements for result in measure(policy, config)]
    width = max(len(r.name) for r in results)
    for r in results:
        print(f"{r.name:{width}}  {r.value:7.3f}  {r.target:>8}  {'met' if r.met else 'MISSED'}")
    if config.output:
        config.output.write_text(json.dumps([r._asdict() for r in results], indent=1) + "\n")


if __name__ == "__main__":
    main()
