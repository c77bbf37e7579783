"""Trains the tiny world's ImageReward: ``python -m overpaint.tinyworld.train_reward``.

As the real one, it learns from pairs of pictures for one caption, of which a noisy annotator prefers one:
``P(first preferred) = sigmoid(3 (utility difference))``. As the real one, it does not learn from preferences alone.
The real one starts from BLIP; this one from tasks that give the same knowledge (which coloured shapes are in the
picture; does the caption match, against hard negatives), whose weight falls to zero. Every pair is drawn anew, so
nothing can be learnt by heart.
"""

import json
import random
import time
from dataclasses import replace
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from overpaint.settings import AnyPath, Field, Positive, Share, settings
from rewards.image_reward import ImageReward, ImageRewardConfig

from . import workers
from .caption import WORDS, CaptionRequest, parse, training_scene
from .detector import palette_distances
from .render import render
from .scene import BACKGROUNDS, COLOURS, IMAGE_SIZE, PLACES, SHAPES, TEXTURES, Scene, to_tensors
from .utility import CLEANNESS_WORTH, MISMATCH_COST, pleasantness, stands

ANNOTATOR_SHARPNESS = 3.0
"""How surely the annotator prefers the better picture, per unit of utility."""


@settings
class RewardTrainingConfig(workers.WorkersConfig):
    """How the reward model is trained."""

    output_dir: AnyPath = Path("tinyworld-training/reward")
    """Where weights are written."""

    vae: AnyPath | None = None
    """An autoencoder through which three pictures in ten pass, so that the reward knows how generated pictures look."""

    steps: int = Field(3500, ge=1)
    """Optimizer steps of each worker."""

    pairs: int = Field(32, ge=1)
    """Pairs of pictures per step and worker."""

    learning_rate: Positive = 1.0e-3
    """Peak of a cosine schedule with a short warm-up."""

    auxiliary_share: Share = 0.7
    """Part of the run over which the weight of the starting tasks falls to zero."""

    workers: int = Field(1, ge=1)
    """Processes, one thread each."""


def build_reward() -> ImageReward:
    """Builds the untrained network: ImageReward's structure, 96 wide, three layers deep, patches of 8 pixels."""
    from rewards.blip_network import BlipTokenizer

    vocabulary = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *dict.fromkeys(WORDS)]
    tokenizer = BlipTokenizer(vocabulary)
    config = ImageRewardConfig(
        image_size=IMAGE_SIZE,
        patch_size=8,
        vision_hidden_size=96,
        vision_layers=3,
        vision_heads=4,
        vision_intermediate_size=384,
        vocab_size=len(tokenizer),
        hidden_size=96,
        text_layers=3,
        text_heads=4,
        text_intermediate_size=256,
        max_positions=32,
        max_length=26,
        head_widths=(128, 64, 16),
        mean=0.0,
        std=1.0,
        initializer_range=0.08,
    )
    return ImageReward(config, tokenizer)


def changed(scene: Scene, rng: random.Random) -> Scene:
    """Returns the scene with one attribute changed: a hard negative."""
    k = rng.randrange(len(scene.things))
    thing = scene.things[k]
    choice = rng.choices(("shape", "colour", "texture", "background", "swap"), (3, 2, 2, 1, 1))[0]
    if choice == "background":
        return scene._replace(background=rng.choice([b for b in BACKGROUNDS if b != scene.background]))
    if choice == "swap" and len(scene.things) == 2:
        first, second = scene.things
        return scene._replace(things=(first._replace(x=second.x, y=second.y), second._replace(x=first.x, y=first.y)))
    if choice == "texture":
        other = thing._replace(texture=rng.choice([t for t in TEXTURES if t != thing.texture]))
    elif choice == "colour":
        taken = {t.colour for t in scene.things}
        other = thing._replace(colour=rng.choice([c for c in COLOURS if c not in taken]))
    else:
        other = thing._replace(shape=rng.choice([s for s in SHAPES if s != thing.shape]))
    return scene._replace(things=(*scene.things[:k], other, *scene.things[k + 1 :]))


def redrawn(scene: Scene, rng: random.Random) -> Scene:
    """Returns a scene with the same contents, a lone object at another place and of another size."""
    for thing in scene.things:
        radius = rng.uniform(11, 26) if len(scene.things) == 1 else thing.radius
        x, y = (rng.uniform(radius + 1, IMAGE_SIZE - radius - 1) for _ in range(2))  # drawn for two as well
        if len(scene.things) == 1:
            return scene._replace(things=(thing._replace(x=x, y=y, radius=radius),))
    return scene


def candidate(scene: Scene, rng: random.Random) -> Scene:
    """Draws a picture that a model might have drawn for the scene's caption, right or wrong."""
    kind = rng.random()
    if kind < 0.08:
        return training_scene(rng)[1]
    other = redrawn(scene, rng)
    if kind < 0.45:
        other = changed(other, rng)
    if kind < 0.18:
        other = changed(other, rng)
    return other


def scene_mismatches(request: CaptionRequest, scene: Scene) -> int:
    """Counts mismatches of a known scene, by the same rules as ``utility.mismatches`` does for a detected one."""
    by_colour = {t.colour: t for t in scene.things}
    count = 0
    for thing in request.things:
        found = by_colour.get(thing.colour)
        count += 2 if found is None else int(found.shape != thing.shape)
    count += int(len(scene.things) > len(request.things))
    count += int(request.background is not None and request.background != scene.background)
    shown, wanted = ({t.texture for t in things} for things in (scene.things, request.things))
    count += len((shown ^ wanted) - {"plain"})
    count += int(request.place != scene.place)
    if request.relation:
        centres = [(t.x, t.y) for thing in request.things if (t := by_colour.get(thing.colour))]
        count += int(len(centres) < 2 or not stands(request.relation, *centres))
    return count


def corrupted(images: Tensor, generator: torch.Generator, vae) -> Tensor:
    """Passes some pictures through the autoencoder, and blurs or dirties some, each by a random amount."""
    images = images.clone()
    count = len(images)
    if vae is not None:
        through = torch.rand(count, generator=generator) < 0.3
        with torch.no_grad():
            latents = vae.encode(images[through] * 2 - 1).latent_dist.mean
            spread = 0.5 * torch.rand(len(latents), 1, 1, 1, generator=generator)
            latents = latents + spread * torch.randn(latents.shape, generator=generator)
            images[through] = (vae.decode(latents).sample / 2 + 0.5).clamp(0, 1)
    blurred = F.avg_pool2d(F.pad(images, (2, 2, 2, 2), mode="replicate"), 5, stride=1)
    strength = torch.rand(count, 1, 1, 1, generator=generator)
    chosen = torch.rand(count, 2, 1, 1, 1, generator=generator) < 0.15
    images = torch.where(chosen[:, 0], torch.lerp(images, blurred, strength), images)
    noise = 0.15 * strength * torch.randn(images.shape, generator=generator)
    return torch.where(chosen[:, 1], images + noise, images).clamp(0, 1)


def scene_utility(caption: str, scene: Scene) -> float:
    """The part of the utility that a known scene settles; cleanness is measured on the picture."""
    absent = [(0.0, 0.0, 0.0)] * (2 - len(scene.things))
    centre, radius = torch.tensor([[(t.x, t.y, t.radius) for t in scene.things] + absent]).split((2, 1), dim=2)
    worth = pleasantness(radius[..., 0], centre, torch.tensor([len(scene.things)])).item()
    return worth - MISMATCH_COST * scene_mismatches(parse(caption), scene)


def cleanness(images: Tensor) -> Tensor:
    """Minus the mean distance of the pixels to the palette, as the detector measures it."""
    return -palette_distances(images).amin(dim=2).mean(dim=1)


def pairs(
    count: int, rng: random.Random, generator: torch.Generator, vae
) -> tuple[list[str], list[Scene], Tensor, Tensor]:
    """Draws pairs: captions, scenes (first ones, then second ones), pictures and utilities in the same order."""
    drawn = [training_scene(rng) for _ in range(count)]
    prompts = [caption for caption, _ in drawn]
    scenes = [candidate(scene, rng) for _ in range(2) for _, scene in drawn]
    images = corrupted(render(to_tensors(scenes)), generator, vae)
    known = torch.tensor([scene_utility(c, s) for c, s in zip(prompts * 2, scenes, strict=True)])
    return prompts, scenes, images, known + CLEANNESS_WORTH * cleanness(images)


def contents(scenes: list[Scene]) -> tuple[Tensor, Tensor]:
    """Lists what is in the pictures: which coloured shapes and textures (yes or no), and background and place."""
    there = torch.zeros(len(scenes), len(COLOURS) * len(SHAPES) + 2)
    where = torch.zeros(len(scenes), 2, dtype=torch.long)
    for k, scene in enumerate(scenes):
        for thing in scene.things:
            there[k, COLOURS.index(thing.colour) * len(SHAPES) + SHAPES.index(thing.shape)] = 1
            if thing.texture != "plain":
                there[k, len(COLOURS) * len(SHAPES) + TEXTURES.index(thing.texture) - 1] = 1
        where[k, 0] = BACKGROUNDS.index(scene.background)
        where[k, 1] = PLACES.index(scene.place) + 1 if scene.place else 0
    return there, where


class StartingTasks(nn.Module):
    """The tasks that stand for BLIP's pretraining, as losses."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.contents = nn.Linear(width, len(COLOURS) * len(SHAPES) + 2)
        self.where = nn.Linear(width, len(BACKGROUNDS) + len(PLACES) + 1)
        self.match = nn.Linear(width, 1)
        self.worth = nn.Linear(width, 1)

    def forward(self, vision: Tensor, feature: Tensor, scenes: list[Scene], matched: Tensor, worth: Tensor) -> Tensor:
        """Returns the sum of the losses."""
        there, where = contents(scenes)
        loss = 10 * F.binary_cross_entropy_with_logits(self.contents(vision), there)
        background, place = self.where(vision).split((len(BACKGROUNDS), len(PLACES) + 1), dim=1)
        loss = loss + F.cross_entropy(background, where[:, 0]) + F.cross_entropy(place, where[:, 1])
        loss = loss + F.binary_cross_entropy_with_logits(self.match(feature)[:, 0], matched)
        return loss + 0.2 * F.smooth_l1_loss(self.worth(feature)[:, 0], worth)


def accuracy(reward: ImageReward, vae, *, count: int = 2000, seed: int = 12345) -> dict[str, float]:
    """Measures how often the reward and the annotator agree with the true utility, on fresh pairs."""
    prompts, _, images, worth = pairs(count, random.Random(f"test-{seed}"), torch.Generator().manual_seed(seed), vae)
    with torch.no_grad():
        scores = torch.cat([reward(images[k : k + 200], (prompts * 2)[k : k + 200]) for k in range(0, 2 * count, 200)])
    difference, learned = (v[:count] - v[count:] for v in (worth, scores))
    ceiling = torch.sigmoid(ANNOTATOR_SHARPNESS * difference.abs())
    clear, right = difference.abs() > 1, (difference > 0) == (learned > 0)
    annotated = torch.where(right, ceiling, 1 - ceiling)
    return {
        "accuracy": annotated.mean().item(),
        "accuracy_clear": annotated[clear].mean().item(),
        "ceiling": ceiling.mean().item(),
        "ceiling_clear": ceiling[clear].mean().item(),
        "agreement_clear": right[clear].float().mean().item(),
        "correlation": torch.corrcoef(torch.stack([worth, scores]))[0, 1].item(),
        "mean": scores.mean().item(),
        "std": scores.std().item(),
    }


def train(rank: int, count: int, config: RewardTrainingConfig) -> None:
    """Trains one worker; worker 0 saves."""
    vae = None
    if config.vae is not None:
        from diffusers import AutoencoderKL

        vae = AutoencoderKL.from_pretrained(config.vae).eval().requires_grad_(False)
    torch.manual_seed(config.seed)
    reward = build_reward()
    tasks = StartingTasks(reward.config.hidden_size)
    modules = nn.ModuleList([reward, tasks])
    vision: list[Tensor] = []  # the vision tower's class token of the last pictures
    reward.vision.register_forward_hook(lambda _, __, output: vision.append(output.last_hidden_state[:, 0]))
    rng = random.Random(f"reward-{config.seed}-{rank}")
    generator = torch.Generator().manual_seed(config.seed * 1000 + rank)
    descent = workers.Descent(modules, config, weight_decay=0.01, warm_up=200)
    start = time.time()
    for step in range(1, config.steps + 1):
        prompts, scenes, images, worth = pairs(config.pairs, rng, generator, vae)
        features = reward.features(images, prompts * 2)
        scores = reward.standardise(reward.raw_score(features))
        better = torch.sigmoid(ANNOTATOR_SHARPNESS * (worth[: config.pairs] - worth[config.pairs :]))
        chosen = torch.bernoulli(better, generator=generator)
        preference = F.binary_cross_entropy_with_logits(scores[: config.pairs] - scores[config.pairs :], chosen)
        weight = max(0.0, 1 - step / (config.auxiliary_share * config.steps))
        loss = preference
        if weight > 0:
            requests = [parse(p) for p in prompts * 2]
            matched = torch.tensor([float(scene_mismatches(r, s) == 0) for r, s in zip(requests, scenes, strict=True)])
            loss = loss + weight * tasks(vision[-1], features, scenes, matched, worth.clamp(min=-8))
        vision.clear()
        descent.step(loss, step)
        if rank == 0 and step % 250 == 0:
            measured = {k: round(v, 4) for k, v in accuracy(reward, vae, count=400).items()}
            print(json.dumps({"step": step, "seconds": round(time.time() - start), **measured}), flush=True)
        if rank == 0 and (step % 1000 == 0 or step == config.steps):
            measured = accuracy(reward, vae)
            standard = replace(reward.config, mean=measured["mean"], std=measured["std"])
            plain, reward.config = reward.config, standard
            reward.save_pretrained(
                config.output_dir / ("final" if step == config.steps else "last"), dtype=torch.float16
            )
            reward.config = plain
            if step == config.steps:
                print(json.dumps(measured), flush=True)


if __name__ == "__main__":
    workers.run_program(train, RewardTrainingConfig)
